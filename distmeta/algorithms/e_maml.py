"""E-MAML: Stadie, Yang, Houthooft, Chen, Duan, Wu, Abbeel, Sutskever, "Some considerations on learning to explore via
meta-reinforcement learning", NeurIPS 2018."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from distmeta.algorithms.maml import MAML
from distmeta.core.policy import PolicyLoss, Rollouts
from distmeta.core.types import MetaParams, Metrics, Task, TaskLoss
from distmeta.errors import ConfigError, at_least


@dataclass(frozen=True)
class EMAML(MAML):
    """MAML for control whose outer loop also learns what to try before adaptation.

    What the adapted policy earns depends on theta in two ways: through the adaptation to the episodes that were
    sampled, which MAML differentiates, and through which episodes are sampled. With S_k the support set of inner step
    k, sampled with theta_k, and R the mean reward of a time step, the gradient of E[R(theta_K)] is the mean of

        ∇ R(theta_K; Q) + (R(Q) − b) ∇ Σ_k log P(S_k | theta_k)       (Stadie et al.; Al-Shedivat et al., 2018)

    where theta_K is a function of theta with the episodes given, so that the inner loop needs ``tasks.estimator: log``
    (formulation I of Rothfuss et al., 2019, section 4; MAML with the other estimators follows their formulation II).
    The baseline b is the mean reward of other episodes of the policy theta. It takes one more support set, and keeps
    out of the variance what the goal alone makes of the reward.

    The second term is weighted by ``exploration`` / N, with N the episodes of a support set. ``exploration: N`` would
    be the gradient itself if advantages, and with them the first term, were not divided by their standard deviation.

    Raises:
        ConfigError: A setting is out of range, or the tasks are not of control, or have another estimator.
    """

    inner_lr: Annotated[float, "inner learning rate, alpha"] = 0.1
    exploration: Annotated[float, "weight of the credit that episodes get for what is learned from them"] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("algorithm.exploration", self.exploration, 0)

    def objective(self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int) -> tuple[Tensor, Metrics]:
        """What has the negative of that for its gradient where the data have been sampled; the query set's scores."""
        if not isinstance(loss, PolicyLoss):
            raise ConfigError("algorithm e-maml is for tasks of control, which are sampled with a policy; take maml")
        if loss.spec.estimator != "log":
            raise ConfigError("algorithm e-maml takes the episodes as given: it needs tasks.estimator: log")
        *before, adapted = (at.params for at in self.inner_loop(meta, task, loss, step=step))
        query, others = Rollouts(*task.query(adapted)), Rollouts(*task.support(meta.model, len(before)))
        # A ratio has the gradient of a log likelihood, and does not fall off as theta moves away in further passes.
        likely = [loss.log_ratio(p, Rollouts(*task.support(p, k))).exp().sum(1).mean() for k, p in enumerate(before)]
        credit = _reward(query) - _reward(others)
        gain = loss.gain(loss.log_ratio(adapted, query), query)
        return -gain - self.exploration * credit * torch.stack(likely).sum(), loss.scores(query)


def _reward(data: Rollouts) -> Tensor:
    """The mean reward of a time step."""
    return data.score_EM[:, 0].sum() / data.valid_ET.sum()
