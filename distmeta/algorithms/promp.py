"""ProMP: proximal meta-policy search (Rothfuss, Lee, Clavera, Asfour, Abbeel, ICLR 2019), and with it MAML-PPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from distmeta.algorithms.maml import MAML
from distmeta.core.inner import last
from distmeta.core.policy import PolicyLoss, Rollouts
from distmeta.core.types import MetaParams, Metrics, Task, TaskLoss
from distmeta.errors import ConfigError, positive


@dataclass(frozen=True)
class ProMP(MAML):
    """MAML for control whose outer loop goes over the data of a step several times, without straying from the policy.

    Outer objective (their eq. 11), with r_t the ratio of the adapted policy to the one that sampled the query set:

        J = mean min(r_t A_t, clip(r_t, 1 ± epsilon) A_t) − eta · KL(pi_old ‖ pi_theta)

    where the divergence is that of the policies *before* adaptation on the states of the support set. ``outer.passes``
    is how often the outer optimizer steps on it. With ``kl_weight: 0`` this is MAML-PPO. The inner loop is MAML's, on
    the surrogate of `distmeta.core.policy.PolicyLoss` with the estimator ``lvc``, which is the paper's.

    Raises:
        ConfigError: A setting is out of range, or the tasks are not of control, or have another estimator.
    """

    inner_lr: Annotated[float, "inner learning rate, alpha"] = 0.1
    clip: Annotated[float, "how far the ratio may leave 1, epsilon"] = 0.3
    kl_weight: Annotated[float, "weight of the divergence before adaptation, eta; 0: MAML-PPO"] = 0.0005

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("algorithm.clip", self.clip)
        if self.kl_weight:
            positive("algorithm.kl_weight", self.kl_weight)

    def objective(self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int) -> tuple[Tensor, Metrics]:
        """−J, and the scores of the query set."""
        if not isinstance(loss, PolicyLoss):
            raise ConfigError("algorithm promp is for tasks of control, which are sampled with a policy; take maml")
        if loss.spec.estimator != "lvc":
            raise ConfigError("algorithm promp clips the ratio of each step: it needs tasks.estimator: lvc")
        adapted = last(self.inner_loop(meta, task, loss, step=step)).params
        query = task.query(adapted)
        data = Rollouts(*query)
        value = -loss.gain(loss.log_ratio(adapted, data), data, self.clip)
        if self.kl_weight:
            value = value + self.kl_weight * loss.divergence(meta.model, task.support(meta.model, 0))
        return value, loss.scores(data)
