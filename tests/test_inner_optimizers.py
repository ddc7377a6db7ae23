"""The inner loop's update rules, and their derivatives, against torch's and other libraries' own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import higher
import numpy as np
import pytest
import torch
import torchopt
from problems import Blobs, HeadedMLP, problem_of, relative_error
from torch import nn

from distmeta import MAML, Episode, LearnedOptimizer, MAMLpp, MetaCurvature, MetaSGD, ProtoMAML
from distmeta.core.gradients import hessian_product
from distmeta.core.inner import SGD, Adam, InnerOptimizer
from distmeta.core.loss import cross_entropy
from distmeta.core.params import split
from distmeta.distributed.work import Shard
from distmeta.errors import ConfigError
from distmeta.models import MLP, Conv4

DOUBLE = torch.float64
SHARD = Shard("train", 0, 0, 1)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(1)
    return HeadedMLP(3, 3).to(DOUBLE)


def gradient_of(algorithm: MAML, network: nn.Module, **options: object) -> tuple[np.ndarray, Episode]:
    """Our meta-gradient, and the task that it is of."""
    problem, theta = problem_of(algorithm, network, Blobs(dtype=DOUBLE), **options)
    (task,) = problem.build(SHARD)
    return problem.run("meta_gradient", theta, SHARD).total, task


def flat(tensors: tuple[torch.Tensor, ...]) -> np.ndarray:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).numpy()


@pytest.mark.parametrize(
    ("rule", "momentum"), [("sgd", 0.0), ("sgd", 0.9), ("nesterov", 0.9), ("adam", 0.0), ("adam", 0.9)]
)
def test_inner_optimizers_are_torch_s(rule: str, momentum: float) -> None:
    ours = Adam(0.01, beta1=momentum) if rule == "adam" else SGD(0.01, momentum, nesterov=rule == "nesterov")
    theirs = torch.nn.Parameter(torch.randn(5, dtype=DOUBLE))
    if rule == "adam":
        reference: torch.optim.Optimizer = torch.optim.Adam([theirs], lr=0.01, betas=(momentum, 0.999))
    else:
        reference = torch.optim.SGD([theirs], lr=0.01, momentum=momentum, nesterov=rule == "nesterov")
    params, state = {"w": theirs.detach().clone()}, {}
    for count in range(1, 8):
        theirs.grad = torch.randn(5, dtype=DOUBLE)
        params, state = ours.step(params, {"w": theirs.grad}, state, count)
        reference.step()
    assert relative_error(params["w"], theirs.detach()) < 1e-13


@pytest.mark.parametrize(
    ("rule", "momentum"), [("sgd", 0.0), ("sgd", 0.9), ("nesterov", 0.9), ("adam", 0.0), ("adam", 0.9)]
)
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_meta_gradient_equals_the_library_higher(rule: str, momentum: float, strategy: str, network: nn.Module) -> None:
    """higher adds eps to Adam's root before it corrects the bias, hence one without weight."""
    options = {"inner_optimizer": rule, "inner_momentum": momentum} | ({"inner_eps": 1e-30} if rule == "adam" else {})
    algorithm = MAML(inner_lr=0.1, inner_steps=4, **options)
    ours, task = gradient_of(algorithm, network, strategy=strategy)
    if rule == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(network.parameters(), 0.1, (momentum, 0.999), 1e-30)
    else:
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum, nesterov=rule == "nesterov")
    with higher.innerloop_ctx(network, optimizer) as (copy, inner):
        for _ in range(4):
            inner.step(cross_entropy(copy(task.support_set[0]), task.support_set[1])[0])
        query = cross_entropy(copy(task.query_set[0]), task.query_set[1])[0]
        expected = flat(torch.autograd.grad(query, list(copy.parameters(time=0))))
    assert relative_error(ours, expected) < 1e-10


@dataclass(frozen=True)
class OwnRule(MAML):
    """MAML with an inner optimizer from Python."""

    rule_of: InnerOptimizer = SGD(0.1)  # noqa: RUF009

    def optimizer(self) -> InnerOptimizer:
        return self.rule_of


@pytest.mark.parametrize(
    ("rule", "momentum", "eps"),
    [("sgd", 0.9, 0), ("nesterov", 0.9, 0), ("adam", 0.0, 1e-2), ("adam", 0.5, 1e-8), ("adam", 0.5, 1e-2)],
)
def test_meta_gradient_equals_the_library_torchopt(rule: str, momentum: float, eps: float, network: nn.Module) -> None:
    """torchopt corrects Adam's bias in single precision, hence betas whose powers are exact there."""
    own = Adam(0.1, momentum, 0.75, eps) if rule == "adam" else SGD(0.1, momentum, rule == "nesterov")
    ours, task = gradient_of(OwnRule(inner_steps=4, rule_of=own), network)
    start = list(network.parameters())
    if rule == "adam":
        optimizer = torchopt.MetaAdam(network, 0.1, (momentum, 0.75), eps)
    else:
        optimizer = torchopt.MetaSGD(network, 0.1, momentum, nesterov=rule == "nesterov")
    for _ in range(4):
        optimizer.step(cross_entropy(network(task.support_set[0]), task.support_set[1])[0])
    query = cross_entropy(network(task.query_set[0]), task.query_set[1])[0]
    assert relative_error(ours, flat(torch.autograd.grad(query, start))) < 1e-10


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_adam_has_a_derivative_where_units_are_dead(strategy: str) -> None:
    """A hidden unit that is off for every input has no gradient: the naive root of its second moment gives 0 · ∞."""
    torch.manual_seed(0)
    network = MLP((3,), 3, (8,)).to(DOUBLE)
    with torch.no_grad():
        network.layers[1].bias[:3] = -100
    algorithm = MAML(inner_lr=0.05, inner_steps=3, inner_optimizer="adam", inner_momentum=0.9, inner_eps=1e-3)
    problem, theta = problem_of(algorithm, network, Blobs(dtype=DOUBLE), strategy=strategy)
    gradient = problem.run("meta_gradient", theta, SHARD).total
    (task,) = problem.build(SHARD)
    assert np.isfinite(gradient).all()
    assert (split(problem.layout.unpack(gradient)).model["layers.1.bias"][:3] == 0).all()

    def objective(vector: np.ndarray) -> float:
        adapted = algorithm.adapt(split(problem.layout.unpack(vector)), task, problem.loss)
        return float(problem.loss(adapted, task.query_set)[0])

    rng, length = np.random.default_rng(0), 1e-6
    for _ in range(4):
        direction = rng.standard_normal(theta.size) / theta.size**0.5
        numeric = objective(theta + length * direction) - objective(theta - length * direction)
        assert gradient @ direction == pytest.approx(numeric / (2 * length), rel=1e-6)


@pytest.mark.parametrize("kind", [MetaSGD, MetaCurvature, MAMLpp])
def test_what_learns_rates_or_curvature_starts_as_maml_with_the_same_optimizer(kind: type, network: nn.Module) -> None:
    settings = {"inner_lr": 0.1, "inner_steps": 3, "inner_optimizer": "adam", "inner_momentum": 0.9}
    ours, _ = gradient_of(kind(**settings), network)
    maml, _ = gradient_of(MAML(**settings), network)
    assert relative_error(ours[: maml.size], maml) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_optimizer": "nesterov"}, "nesterov needs algorithm.inner_momentum"),
        ({"inner_momentum": 1.0}, "algorithm.inner_momentum must be from 0 to less than 1; given: 1.0"),
        ({"inner_eps": 1e-3}, "algorithm.inner_eps=0.001 is a setting of adam; algorithm.inner_optimizer is sgd"),
        ({"inner_eps": 0.0}, "algorithm.inner_eps must be a number above 0"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProtoMAML(**options)


class Dropping(HeadedMLP):
    """With dropout, whose masks recomputation must draw again as they were."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(nn.functional.dropout(self.body(x), 0.5, self.training))


RECOMPUTED = {
    "maml": MAML(inner_lr=0.1, inner_steps=3),
    "adam": MAML(inner_lr=0.1, inner_steps=3, inner_optimizer="adam", inner_momentum=0.9, inner_eps=1e-3),
    "anil": MAML(inner_lr=0.1, inner_steps=3, adapted_params=("classifier.*",)),
    "boil": MAML(inner_lr=0.1, inner_steps=3, frozen_params=("classifier.*",)),
    "learned": LearnedOptimizer(inner_lr=0.1, inner_steps=3, hidden=3),
    "maml-pp": MAMLpp(inner_lr=0.1, inner_steps=3, multi_step_until=10),
    "meta-sgd": MetaSGD(inner_lr=0.1, inner_steps=3, inner_momentum=0.9),
    "meta-curvature": MetaCurvature(inner_lr=0.1, inner_steps=3),
    "protomaml": ProtoMAML(inner_lr=0.1, inner_steps=3),
}


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
@pytest.mark.parametrize("model", ["conv4", "dropout"])
@pytest.mark.parametrize("name", sorted(RECOMPUTED))
def test_recomputation_changes_no_bit(name: str, model: str, strategy: str) -> None:
    totals = []
    for recompute in (False, True):
        torch.manual_seed(2)
        network = Conv4((1, 16, 16), 3, filters=4) if model == "conv4" else Dropping(3, 3)
        algorithm = replace(RECOMPUTED[name], recompute=recompute)
        tasks = Blobs((1, 16, 16) if model == "conv4" else (3,))
        problem, theta = problem_of(algorithm, network, tasks, strategy=strategy)
        result = problem.run("meta_gradient", theta, Shard("train", 0, 0, 2))
        totals.append((result.total, *(result.metrics[metric] for metric in sorted(result.metrics))))
    assert np.abs(totals[0][0]).max() > 0
    for without, recomputed in zip(*totals, strict=True):
        assert np.array_equal(without, recomputed)


class Saved:
    """Counts the bytes that autograd keeps for backward passes, each storage once: the most at any time."""

    def __init__(self) -> None:
        self.holders: Counter[int] = Counter()
        self.alive = self.most = 0

    def pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Holder]:
        return tensor.detach(), Holder(self, tensor.untyped_storage())


class Holder:
    def __init__(self, saved: Saved, storage: torch.UntypedStorage) -> None:
        self.saved, self.name, self.size = saved, storage.data_ptr(), storage.nbytes()
        saved.holders[self.name] += 1
        saved.alive += self.size * (saved.holders[self.name] == 1)
        saved.most = max(saved.most, saved.alive)

    def __del__(self) -> None:
        self.saved.holders[self.name] -= 1
        self.saved.alive -= self.size * (self.saved.holders[self.name] == 0)


def test_recomputation_keeps_one_inner_step_and_not_all() -> None:
    most: dict[tuple[bool, int], int] = {}
    for recompute in (False, True):
        for steps in (2, 10):
            algorithm = MAML(inner_lr=0.1, inner_steps=steps, recompute=recompute)
            problem, theta = problem_of(algorithm, Conv4((1, 16, 16), 3, filters=4), Blobs((1, 16, 16), shots=10))
            saved = Saved()
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda packed: packed[0]):
                problem.run("meta_gradient", theta, SHARD)
            most[recompute, steps] = saved.most
    assert most[False, 10] > 3 * most[False, 2]
    assert most[True, 10] < 1.3 * most[True, 2]
    assert most[True, 2] < most[False, 2]


def test_what_is_recomputed_can_be_differentiated_twice(network: nn.Module) -> None:
    """As a trust region does."""
    problem, theta = problem_of(MAML(), network, Blobs(dtype=DOUBLE))
    (task,) = problem.build(SHARD)
    point = problem.layout.unpack(theta)
    direction = problem.layout.unpack(np.random.default_rng(0).standard_normal(theta.size))
    products = []
    for recompute in (False, True):
        algorithm = MAML(inner_lr=0.1, inner_steps=2, inner_momentum=0.9, recompute=recompute)
        products.append(
            hessian_product(
                lambda joined, a=algorithm: a.objective(split(joined), task, problem.loss, step=0)[0], point, direction
            )
        )
    for name, tensor in products[0].items():
        assert relative_error(products[1][name], tensor) < 1e-11
