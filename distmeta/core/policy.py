"""Policies: what they make of an observation, and the policy-gradient loss of a task that is sampled with them.

Shapes in names: ``E`` episodes, ``T`` time steps, ``O`` numbers of an observation, ``A`` of an action, ``P`` of what
the policy puts out for one observation, ``M`` scores of an episode.
"""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from distmeta.core.loss import PureModule
from distmeta.core.types import Batch, Metrics, Params

LOG_2PI = 1.8378770664093453


class Rollouts(NamedTuple):
    """Episodes of one task, sampled with one policy; those that end early are padded to T time steps."""

    observation_ETO: Tensor
    action_ETA: Tensor
    """What was done; for discrete actions (A = 1) the number of the action."""
    output_ETP: Tensor
    """What the policy put out when it acted."""
    advantage_ET: Tensor
    """How much better than expected the action turned out, 0 in the padding."""
    valid_ET: Tensor
    """1, and 0 in the padding."""
    score_EM: Tensor
    """Scores of each episode, as `ActionSpec.scores` names them; the first is the undiscounted return."""


class Actions(Protocol):
    """A family of distributions over actions, with the policy's output as parameters."""

    def size(self, outputs: int) -> int:
        """The length P of the policy's output for actions of ``outputs`` numbers, or of ``outputs`` kinds."""
        ...

    def noise(self, rng: np.random.Generator, shape: tuple[int, ...], outputs: int) -> NDArray[np.float32]:
        """The random numbers that ``act`` turns into actions, with the leading axes ``shape``."""
        ...

    def act(self, output: Tensor, noise: Tensor) -> Tensor:
        """Actions (…, A) drawn from the distributions ``output`` (…, P) by ``noise``."""
        ...

    def log_prob(self, output: Tensor, action: Tensor) -> Tensor:
        """log pi(action), one number for each action."""
        ...

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """KL(old ‖ new), one number for each pair of outputs."""
        ...


class Gaussian:
    """Independent normal distributions; the output is their means and, behind them, their log standard deviations."""

    def size(self, outputs: int) -> int:
        """See `Actions.size`."""
        return 2 * outputs

    def noise(self, rng: np.random.Generator, shape: tuple[int, ...], outputs: int) -> NDArray[np.float32]:
        """Standard normal numbers."""
        return rng.standard_normal((*shape, outputs), dtype=np.float32)

    def act(self, output: Tensor, noise: Tensor) -> Tensor:
        """mean + std · noise."""
        mean, log_std = output.chunk(2, -1)
        return mean + log_std.exp() * noise

    def log_prob(self, output: Tensor, action: Tensor) -> Tensor:
        """See `Actions.log_prob`."""
        mean, log_std = output.chunk(2, -1)
        z = (action - mean) * (-log_std).exp()
        return -(0.5 * z.square() + log_std + 0.5 * LOG_2PI).sum(-1)

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """log(σ₂/σ₁) + (σ₁² + (μ₁ − μ₂)²) / 2σ₂² − 1/2, summed over the action's numbers."""
        (m1, s1), (m2, s2) = old.chunk(2, -1), new.chunk(2, -1)
        spread = ((2 * s1).exp() + (m1 - m2).square()) * (-2 * s2).exp()
        return (s2 - s1 + 0.5 * spread - 0.5).sum(-1)


class Categorical:
    """One of several actions; the output is their logits."""

    def size(self, outputs: int) -> int:
        """See `Actions.size`."""
        return outputs

    def noise(self, rng: np.random.Generator, shape: tuple[int, ...], outputs: int) -> NDArray[np.float32]:
        """Gumbel-distributed numbers, whose sum with the logits is greatest at an action with its probability."""
        return rng.gumbel(size=(*shape, outputs)).astype(np.float32)

    def act(self, output: Tensor, noise: Tensor) -> Tensor:
        """The numbers of the actions."""
        return (output + noise).argmax(-1, keepdim=True)

    def log_prob(self, output: Tensor, action: Tensor) -> Tensor:
        """See `Actions.log_prob`."""
        return F.log_softmax(output, -1).gather(-1, action.long()).squeeze(-1)

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """Σ p₁ (log p₁ − log p₂)."""
        p, q = F.log_softmax(old, -1), F.log_softmax(new, -1)
        return (p.exp() * (p - q)).sum(-1)


ACTIONS: dict[str, Actions] = {"gaussian": Gaussian(), "categorical": Categorical()}
"""Kinds of actions: numbers, or one of several."""

Kind = Literal["gaussian", "categorical"]
Estimator = Literal["lvc", "dice", "log"]


class ActionSpec(NamedTuple):
    """What a policy and its loss must know of the actions of the tasks; stands in `TaskSpec.loss`."""

    kind: Kind
    actions: int
    """How many numbers an action has, or how many actions there are."""
    scores: tuple[str, ...] = ("return",)
    """Names of the scores of an episode, the first of them the return."""
    estimator: Estimator = "lvc"
    """See `PolicyLoss`."""


class PolicyLoss(PureModule):
    """The negative of what a policy gains over the one that sampled the data, as a function of its parameters.

    With r_t = pi_theta(a_t | s_t) / pi_old(a_t | s_t) and A the advantage, mean over all valid time steps:

        lvc:   L(theta) = − mean r_t A_t                               (low variance curvature; Rothfuss et al., 2019)
        dice:  L(theta) = − mean (Π_{u ≤ t} r_u − Π_{u < t} r_u) A_t   (loaded DiCE; Farquhar et al., 2019)
        log:   L(theta) = − mean log r_t A_t                           (the policy gradient; Finn et al., 2017)

    At theta = old all have the gradient of the policy gradient theorem. Their second derivatives, which MAML takes,
    differ: those of dice are unbiased, with a variance that grows with the episode's length; lvc leaves out how an
    action changes the distribution of later states, as Rothfuss et al. derive and recommend; log lacks the term
    ∇log pi ∇log piᵀ altogether, and is right where what has been sampled counts as given, as for E-MAML.

    Args:
        module: From observations (…, O) to outputs (…, P).
        spec: The tasks' actions and the estimator.
    """

    def __init__(self, module: nn.Module, spec: ActionSpec) -> None:
        super().__init__(module)
        self.spec = spec
        self.actions = ACTIONS[spec.kind]

    @torch.no_grad()
    def at(self, params: Params) -> nn.Module:
        """f_theta as a module of its own, for many calls without gradient: one costs half of one of `predict`."""
        module = copy.deepcopy(self.module)
        for name, parameter in module.named_parameters():
            if name in params:
                parameter.copy_(params[name])
        return module

    def __call__(self, params: Params, batch: Batch) -> tuple[Tensor, Metrics]:
        """L_T(theta; D), and the mean of each score over the episodes of D."""
        data = Rollouts(*batch)
        return -self.gain(self.log_ratio(params, data), data), self.scores(data)

    def scores(self, data: Rollouts) -> Metrics:
        """The mean of each score over the episodes."""
        means = data.score_EM.mean(0)
        return {name: means[i] for i, name in enumerate(self.spec.scores)}

    def log_ratio(self, params: Params, data: Rollouts) -> Tensor:
        """log r_t (E, T), 0 in the padding."""
        new = self.actions.log_prob(self.predict(params, data.observation_ETO), data.action_ETA)
        return (new - self.actions.log_prob(data.output_ETP, data.action_ETA)) * data.valid_ET

    def gain(self, log_ratio_ET: Tensor, data: Rollouts, clip: float | None = None) -> Tensor:
        """−L, with each ratio held within 1 ± ``clip`` where that lowers the gain (Schulman et al., 2017, eq. 7)."""
        ratio = log_ratio_ET.exp()
        if self.spec.estimator == "dice":
            upto = log_ratio_ET.cumsum(1)
            gain = (upto.exp() - (upto - log_ratio_ET).exp()) * data.advantage_ET
        else:
            gain = (log_ratio_ET if self.spec.estimator == "log" else ratio) * data.advantage_ET
        if clip is not None:
            gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * data.advantage_ET)
        return (gain * data.valid_ET).sum() / data.valid_ET.sum()

    def divergence(self, params: Params, batch: Batch) -> Tensor:
        """Mean over the states of D of KL(pi_old ‖ pi_theta), in nats."""
        data = Rollouts(*batch)
        per_step = self.actions.divergence(data.output_ETP, self.predict(params, data.observation_ETO))
        return (per_step * data.valid_ET).sum() / data.valid_ET.sum()


def advantages(
    observation_ETO: Tensor, reward_ET: Tensor, valid_ET: Tensor, *, discount: float, gae_lambda: float
) -> Tensor:
    """Advantages (E, T) by generalised advantage estimation over a linear baseline, normalised over all time steps.

        delta_t = r_t + gamma V(s_{t+1}) − V(s_t),   A_t = Σ_k (gamma lambda)^k delta_{t+k}    (Schulman et al., 2016)

    V is the least-squares fit, with a ridge of 1e-5, of the returns of these very episodes on the features
    (s, s², t/100, (t/100)², (t/100)³, 1) of Duan et al. (ICML 2016), with s held within ±10. Behind the last step of an
    episode V is 0, also where its time was up. All in float64.
    """
    observation, reward, valid = (tensor.double() for tensor in (observation_ETO, reward_ET, valid_ET))
    returns = discounted(reward, discount)
    s = observation.clamp(-10, 10)
    t = torch.arange(reward.shape[1], dtype=torch.float64).expand_as(reward)[..., None] / 100
    features = torch.cat([s, s * s, t, t**2, t**3, torch.ones_like(t)], -1)
    x, y = (features * valid[..., None]).flatten(0, 1), (returns * valid).flatten()
    ridge = 1e-5 * torch.eye(x.shape[1], dtype=torch.float64)
    weights = cast(Tensor, torch.linalg.solve(x.T @ x + ridge, x.T @ y))  # pyright: ignore[reportUnknownMemberType]
    value = (features @ weights) * valid
    after = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    advantage = discounted((reward + discount * after - value) * valid, discount * gae_lambda)
    count = valid.sum()
    mean = (advantage * valid).sum() / count
    deviation = (((advantage - mean) * valid).square().sum() / count).sqrt()
    return (((advantage - mean) / (deviation + 1e-8)) * valid).to(observation_ETO.dtype)


def discounted(values_ET: Tensor, factor: float) -> Tensor:
    """Σ_k factor^k values_{t+k}, for each t."""
    values_TE = values_ET.numpy().T  # NumPy adds a few numbers several times as fast as torch
    sums_TE, total = np.empty_like(values_TE), np.zeros_like(values_TE[0])
    for t in reversed(range(len(values_TE))):
        total = sums_TE[t] = values_TE[t] + factor * total
    return torch.from_numpy(sums_TE.T)  # pyright: ignore[reportUnknownMemberType]
