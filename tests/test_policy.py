"""The maths of policies against torch's distributions, naive loops, and a decision process that is solved exactly."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from problems import relative_error
from torch import Tensor, nn

from distmeta.algorithms import EMAML
from distmeta.config import Outer, TrustRegion
from distmeta.core.params import Layout
from distmeta.core.policy import ACTIONS, ActionSpec, PolicyLoss, Rollouts, advantages
from distmeta.core.types import MetaParams, Params
from distmeta.errors import NumericalError
from distmeta.outer import OuterLoop
from distmeta.trust_region import natural_step

DOUBLE = torch.float64


def distribution(kind: str, output: Tensor) -> torch.distributions.Distribution:
    if kind == "categorical":
        return torch.distributions.Categorical(logits=output)
    mean, log_std = output.chunk(2, -1)
    return torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_distributions_are_those_of_torch(kind: str) -> None:
    torch.manual_seed(0)
    actions = ACTIONS[kind]
    old, new = (torch.randn(5, 7, actions.size(3), dtype=DOUBLE) for _ in range(2))
    theirs = distribution(kind, old)
    action = theirs.sample()
    given = action[..., None] if kind == "categorical" else action
    assert relative_error(actions.log_prob(old, given), theirs.log_prob(action)) < 1e-12
    divergence = torch.distributions.kl_divergence(theirs, distribution(kind, new))
    assert relative_error(actions.divergence(old, new), divergence) < 1e-12


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_actions_have_their_distribution(kind: str) -> None:
    """Sample means of 200,000 actions within five standard errors."""
    actions, count = ACTIONS[kind], 200_000
    output = torch.tensor([0.5, -1.0, 0.3, -0.2][: actions.size(2)] if kind == "gaussian" else [0.5, -1.0])
    noise = torch.from_numpy(actions.noise(np.random.default_rng(0), (count,), 2))
    drawn = actions.act(output.expand(count, -1), noise).double()
    if kind == "gaussian":
        mean, std = output.double()[:2], output.double()[2:].exp()
        assert ((drawn.mean(0) - mean).abs() < 5 * std / count**0.5).all()
        assert ((drawn.std(0) - std).abs() < 5 * std / (2 * count) ** 0.5).all()
    else:
        p = float(output.softmax(0)[1])
        assert abs(float(drawn.mean()) - p) < 5 * (p * (1 - p) / count) ** 0.5


def test_advantages_are_those_of_naive_loops() -> None:
    rng = np.random.default_rng(3)
    episodes, horizon, gamma, lam = 4, 6, 0.9, 0.8
    lengths = [6, 3, 6, 1]
    observation = 3 * rng.standard_normal((episodes, horizon, 2))
    reward = rng.standard_normal((episodes, horizon))
    valid = np.array([[float(t < n) for t in range(horizon)] for n in lengths])
    reward *= valid
    rows, targets = [], []
    for e, n in enumerate(lengths):
        for t in range(n):
            s = observation[e, t]
            rows.append([*s, *s**2, t / 100, (t / 100) ** 2, (t / 100) ** 3, 1.0])
            targets.append(sum(gamma ** (k - t) * reward[e, k] for k in range(t, n)))
    x, y = np.array(rows), np.array(targets)
    weights = np.linalg.lstsq(
        np.concatenate([x, 1e-5**0.5 * np.eye(x.shape[1])]), np.concatenate([y, np.zeros(x.shape[1])]), rcond=None
    )[0]
    fitted = iter(x @ weights)
    expected = np.zeros((episodes, horizon))
    for e, n in enumerate(lengths):
        value = [next(fitted) for _ in range(n)] + [0.0]
        delta = [reward[e, t] + gamma * value[t + 1] - value[t] for t in range(n)]
        for t in range(n):
            expected[e, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
    flat = expected[valid == 1]
    expected = np.where(valid == 1, (expected - flat.mean()) / flat.std(), 0)
    tensors = (torch.from_numpy(array) for array in (observation, reward, valid))
    ours = advantages(*tensors, discount=gamma, gae_lambda=lam)
    assert relative_error(ours, expected) < 1e-6


class Table(nn.Module):
    """Logits of two actions for each of the states, which are observed as one number."""

    def __init__(self, states: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.logits = nn.Parameter(torch.randn(states, 2, dtype=DOUBLE))

    def forward(self, observation: Tensor) -> Tensor:
        return self.logits[observation[..., 0].long()]


class Process:
    """A few states, two actions, ``horizon`` steps, from state 0: small enough to enumerate all that can happen."""

    def __init__(self, horizon: int, states: int = 3) -> None:
        rng = np.random.default_rng(2)
        self.horizon, self.states = horizon, states
        self.move = torch.from_numpy(rng.dirichlet(np.ones(states), (states, 2)))  # from (state, action) to state
        self.reward = torch.from_numpy(rng.standard_normal((states, 2)))

    def expected_return(self, logits: Tensor) -> Tensor:
        """J(theta), by dynamic programming."""
        policy = logits.softmax(-1)
        value = torch.zeros(self.states, dtype=DOUBLE)
        for _ in range(self.horizon):
            value = (policy * (self.reward + self.move @ value)).sum(-1)
        return value[0]

    def episodes(self) -> list[Rollouts]:
        """All that can happen, each as a set of one episode."""
        paths = [[(0, a)] for a in range(2)]
        for _ in range(1, self.horizon):
            paths = [[*path, (s, a)] for path in paths for s in range(self.states) for a in range(2)]
        return [self.rollouts(*torch.tensor([path]).unbind(-1)) for path in paths]

    def chance(self, data: Rollouts) -> Tensor:
        """The probability of the states of one episode, given its actions."""
        states, actions = data.observation_ETO[0, :, 0].long(), data.action_ETA[0, :, 0]
        return self.move[states[:-1], actions[:-1], states[1:]].prod()

    def by(self, logits: Tensor, data: Rollouts) -> Rollouts:
        """Episodes as those of the policy ``logits``."""
        return data._replace(output_ETP=logits[data.observation_ETO[..., 0].long()].detach())

    def rollouts(self, states: Tensor, actions: Tensor) -> Rollouts:
        """Episodes (E, T), with the rewards to come for advantages, as those of a policy of equal logits."""
        rewards = self.reward[states, actions]
        to_go = rewards.flip(1).cumsum(1).flip(1)
        ones = torch.ones_like(rewards)
        outputs = torch.zeros(*states.shape, 2, dtype=DOUBLE)
        return Rollouts(states[..., None].double(), actions[..., None], outputs, to_go, ones, to_go[:, :1])

    def sample(self, logits: Tensor, episodes: int) -> Rollouts:
        generator = torch.Generator().manual_seed(1)
        state = torch.zeros(episodes, dtype=torch.long)
        columns: list[tuple[Tensor, Tensor]] = []
        for _ in range(self.horizon):
            action = torch.multinomial(logits.softmax(-1)[state], 1, generator=generator)[:, 0]
            columns.append((state, action))
            state = torch.multinomial(self.move[state, action], 1, generator=generator)[:, 0]
        states, actions = (torch.stack(column, 1) for column in zip(*columns, strict=True))
        return self.by(logits, self.rollouts(states, actions))


@pytest.mark.parametrize(("estimator", "horizon"), [("dice", 3), ("dice", 1), ("lvc", 1)])
def test_first_two_derivatives_are_unbiased(estimator: str, horizon: int) -> None:
    """The loss's gradient and Hessian, per episode, against those of the exact expected return."""
    process, module, episodes = Process(horizon), Table(3), 8_000
    loss = PolicyLoss(module, ActionSpec("categorical", 2, estimator=estimator))
    params = loss.init()
    data = process.sample(params["logits"], episodes)

    def total(flat: Tensor, one: tuple[Tensor, ...]) -> Tensor:
        batch = Rollouts(*(tensor[None] for tensor in one))
        return -horizon * loss({"logits": flat.reshape(3, 2)}, batch)[0]

    flat = params["logits"].reshape(-1)
    exact = lambda f: process.expected_return(f.reshape(3, 2))  # noqa: E731
    chunks = [tuple(t[i : i + 2000] for t in data) for i in range(0, episodes, 2000)]
    for derivative, truth in (
        (torch.func.grad(total), torch.func.grad(exact)(flat)),
        (torch.func.hessian(total), torch.func.hessian(exact)(flat)),
    ):
        each = torch.cat([torch.vmap(derivative, (None, 0))(flat, chunk) for chunk in chunks])
        mean, error = each.mean(0), each.std(0) / episodes**0.5
        assert ((mean - truth).abs() <= 5 * error + 1e-9).all()
        assert float(error.max()) < 0.2 * float(truth.abs().max()), "the interval says something"


def test_lvc_leaves_out_a_part_of_the_hessian() -> None:
    process, module = Process(3), Table(3)
    loss = PolicyLoss(module, ActionSpec("categorical", 2))
    params = loss.init()
    data = process.sample(params["logits"], 50_000)
    total = lambda f: -3 * loss({"logits": f.reshape(3, 2)}, data)[0]  # noqa: E731
    flat = params["logits"].reshape(-1)
    exact = lambda f: process.expected_return(f.reshape(3, 2))  # noqa: E731
    assert relative_error(torch.func.grad(total)(flat), torch.func.grad(exact)(flat)) < 0.05
    assert relative_error(torch.func.hessian(total)(flat), torch.func.hessian(exact)(flat)) > 0.1


class Given(NamedTuple):
    """A task whose data have been sampled: a support set for each inner step, and one more."""

    supports: Sequence[Rollouts]
    query_set: Rollouts

    def support(self, params: Params, inner_step: int) -> Rollouts:
        return self.supports[inner_step]

    def query(self, params: Params) -> Rollouts:
        return self.query_set


@pytest.mark.parametrize(("horizon", "steps"), [(2, 1), (1, 2)])
def test_e_maml_is_unbiased(horizon: int, steps: int) -> None:
    """Its gradient, over all that can be sampled, against the derivative of the return that is expected after adapting.

    Every support set is one episode. All that can happen is enumerated, so that nothing is left to chance.
    """
    process, rate = Process(horizon, states=2), 0.7
    episodes = process.episodes()
    loss = PolicyLoss(Table(2), ActionSpec("categorical", 2, estimator="log"))

    def likelihood(logits: Tensor, data: Rollouts) -> Tensor:
        own = loss.actions.log_prob(logits[data.observation_ETO[..., 0].long()], data.action_ETA).sum().exp()
        return own * process.chance(data)

    def adapted(logits: Tensor, data: Rollouts) -> Tensor:
        ratio = loss.actions.log_prob(logits[data.observation_ETO[..., 0].long()], data.action_ETA)
        (gradient,) = torch.autograd.grad((ratio * data.advantage_ET).mean(), logits, create_graph=True)
        return logits + rate * gradient

    def expected(logits: Tensor, left: int) -> Tensor:
        if left == 0:
            return process.expected_return(logits) / horizon
        return torch.stack([likelihood(logits, e) * expected(adapted(logits, e), left - 1) for e in episodes]).sum()

    start = loss.init()["logits"].requires_grad_()
    (truth,) = torch.autograd.grad(expected(start, steps), start)

    def mean_gradient(exploration: float) -> Tensor:
        algorithm = EMAML(inner_lr=rate, inner_steps=steps, exploration=exploration)
        total = torch.zeros_like(start)
        for chosen in itertools.product(episodes, repeat=steps + 1):
            at, weight, sets = start, likelihood(start, chosen[-1]), list[Rollouts]()  # the last one for the baseline
            for one in chosen[:-1]:
                sets.append(process.by(at, one))
                weight, at = weight * likelihood(at, one), adapted(at, one)
            sets.append(process.by(start, chosen[-1]))
            for query in episodes:
                task, share = Given(sets, process.by(at, query)), float((weight * likelihood(at, query)).detach())
                meta = MetaParams({"logits": start.detach()}, {})
                total -= share * algorithm.meta_gradient(meta, task, loss, step=0).gradient.model["logits"]
        return total

    assert relative_error(mean_gradient(1.0), truth) < 1e-12
    assert relative_error(mean_gradient(0.0), truth) > 0.05, "the term says something"


def test_clipping_takes_what_is_lower() -> None:
    loss = PolicyLoss(Table(3), ActionSpec("categorical", 2))
    ones = torch.ones(1, 4)
    data = Rollouts(ones, ones, ones, torch.tensor([[1.0, -1.0, 1.0, -1.0]]), ones, ones)
    ratio = torch.tensor([[2.0, 2.0, 0.5, 0.5]])
    assert float(loss.gain(ratio.log(), data, 0.3)) == pytest.approx((1.3 - 2.0 + 0.5 - 0.7) / 4)
    assert float(loss.gain(ratio.log(), data)) == pytest.approx(0.0)


class Quadratic:
    """L(theta) = gᵀ(theta − theta_0) and KL = ½ (theta − theta_0)ᵀ H (theta − theta_0)."""

    def __init__(self, steeper: float = 1.0) -> None:
        rng = np.random.default_rng(0)
        root = rng.standard_normal((6, 6))
        self.h, self.g, self.theta = root @ root.T + 0.5 * np.eye(6), rng.standard_normal(6), rng.standard_normal(6)
        self.steeper = steeper

    def curvature(self, direction: np.ndarray) -> np.ndarray:
        return self.h @ direction

    def objective(self, at: np.ndarray) -> tuple[float, float]:
        away = at - self.theta
        return float(self.g @ away), self.steeper * float(away @ self.h @ away) / 2

    def gradient(self, at: np.ndarray) -> np.ndarray:
        return self.g[: len(at)]


@pytest.mark.parametrize("kl", [1.0, 1e-3])
def test_natural_step_is_the_best_in_the_region(kl: float) -> None:
    """d = sqrt(2 delta / gᵀH⁻¹g) H⁻¹g, whose divergence is delta."""
    problem = Quadratic()
    settings = TrustRegion(max_kl=kl * (1 + 1e-9), damping=0.0, cg_steps=6)
    step, said = natural_step(problem.theta, problem.g, problem, settings)
    solved = np.linalg.solve(problem.h, problem.g)
    assert relative_error(step, (2 * kl / (problem.g @ solved)) ** 0.5 * solved) < 1e-6
    assert said["kl"] == pytest.approx(kl, rel=1e-6)
    assert said["backtracks"] == 0
    assert said["gain"] == pytest.approx(problem.g @ step)


def test_natural_step_is_shortened_into_the_region() -> None:
    """Where the divergence is three times what its curvature says, the step shrinks by 0.8 until it fits."""
    problem = Quadratic(steeper=3.0)
    step, said = natural_step(problem.theta, problem.g, problem, TrustRegion(damping=0.0, cg_steps=6))
    assert said["backtracks"] == next(n for n in itertools.count() if 3 * 0.64**n <= 1)
    assert 0 < said["kl"] <= 0.01
    assert problem.objective(problem.theta - step)[1] == pytest.approx(said["kl"])


def test_a_step_that_cannot_help_is_not_taken() -> None:
    problem = Quadratic(steeper=1e9)
    step, said = natural_step(problem.theta, problem.g, problem, TrustRegion(backtracks=3))
    assert not step.any()
    assert said == {"kl": 0.0, "gain": 0.0, "backtracks": 4.0}


def test_curvature_that_is_no_number_is_named() -> None:
    problem = Quadratic()
    problem.h = problem.h * np.nan
    with pytest.raises(NumericalError, match=r"curvature of the divergence is not finite; lower .*trust_region.max_kl"):
        natural_step(problem.theta, problem.g, problem, TrustRegion())


class Failing:
    """Passes of which the second further one fails."""

    asked = 0

    def gradient(self, at: np.ndarray) -> np.ndarray:
        self.asked += 1
        if self.asked == 2:
            raise NumericalError("no more")
        return np.ones_like(at)


def test_a_step_half_done_is_undone() -> None:
    """What is saved after a failure in a later pass is the state before the step, optimizer included."""
    params = {"theta": torch.arange(3, dtype=DOUBLE)}
    outer = OuterLoop(Outer(lr=0.1, passes=4), params, Layout.of(params))
    outer.update(np.ones(3), Quadratic())
    before, state = outer.vector(), copy.deepcopy(outer.state())
    with pytest.raises(NumericalError, match="no more"):
        outer.update(np.ones(3), Failing())
    assert np.array_equal(outer.vector(), before)
    assert outer.state()[1] == state[1]
    assert all(torch.equal(outer.state()[0][name], tensor) for name, tensor in state[0].items())
    assert outer.step == 1
