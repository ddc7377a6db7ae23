"""What a meta-learning algorithm is: an inner loop, and a direction for the outer loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping

from torch import Tensor

from distmeta.core.gradients import grad_and_value, hessian_product
from distmeta.core.inner import InnerStep, last
from distmeta.core.params import join, split
from distmeta.core.policy import PolicyLoss
from distmeta.core.types import MetaGradient, MetaParams, Metrics, Params, Task, TaskLoss


class MetaAlgorithm(ABC):
    """One algorithm; a subclass is a frozen dataclass whose fields are its settings.

    Its methods are pure functions of tensors, free of global state, and use `distmeta.core.gradients.grad_and_value`
    for every derivative, so that the same code runs task by task and vectorised over the tasks of a shard.
    """

    def init(self, params: Params) -> MetaParams:
        """The meta-parameters at the start of meta-training, from the model's initial parameters.

        Random numbers come from torch's global generator, which a run seeds.
        """
        return MetaParams(params, {})

    @abstractmethod
    def trajectory(self, meta: MetaParams, task: Task, loss: TaskLoss) -> Iterator[InnerStep]:
        """The adaptation as it is done at test time: the state before the first and after each inner step."""

    def adapt(self, meta: MetaParams, task: Task, loss: TaskLoss) -> Params:
        """The parameters adapted to the support data of ``task``."""
        return last(self.trajectory(meta, task, loss)).params

    @abstractmethod
    def meta_gradient(self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int) -> MetaGradient:
        """What ``task`` contributes to the outer update of outer step ``step`` (from 0).

        The driver descends the *mean* of these over the meta-batch.
        """

    @property
    def task_head(self) -> str | None:
        """The model's last layer, where each task makes its own from the support set: of as many outputs as it has
        classes, however many the model has. None: theta has the head, and its outputs."""
        return None

    def phase(self, step: int) -> Hashable:
        """What of the outer step a meta-gradient depends on: in steps of one phase it is the same function."""
        return None

    def complaint(self, metrics: Mapping[str, float]) -> str | None:
        """What is wrong with a task whose meta-gradient came with ``metrics``, and the remedy; None: nothing."""
        return None


class Bilevel(MetaAlgorithm):
    """An algorithm that descends the query loss after adaptation, differentiated through the adaptation.

    With omega all the meta-parameters, S the support set and Q the query set:

        ∇_omega L(theta_K(omega; S); Q)

    A subclass says how theta_K comes from omega and S.
    """

    @abstractmethod
    def inner_loop(
        self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int | None = None
    ) -> Iterator[InnerStep]:
        """theta_0, …, theta_K.

        ``step`` is the outer step in meta-training, where theta_k must be a differentiable function of ``meta``, and
        None at test time.
        """

    def trajectory(self, meta: MetaParams, task: Task, loss: TaskLoss) -> Iterator[InnerStep]:
        """See `MetaAlgorithm.trajectory`."""
        return self.inner_loop(meta, task, loss)

    def objective(self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int) -> tuple[Tensor, Metrics]:
        """L(theta_K; Q), the function of ``meta`` that the outer loop descends, and the metrics of the query set."""
        adapted = last(self.inner_loop(meta, task, loss, step=step)).params
        return loss(adapted, task.query(adapted))

    def meta_gradient(self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int) -> MetaGradient:
        """The gradient of `objective` with respect to all meta-parameters."""
        gradient, value, metrics = grad_and_value(
            lambda joined: self.objective(split(joined), task, loss, step=step), join(meta), create_graph=False
        )
        return MetaGradient(split(gradient), metrics | {"loss": value})

    def divergence(self, meta: MetaParams, task: Task, loss: PolicyLoss, *, step: int) -> Tensor:
        """KL(pi_old ‖ pi_{theta_K}) on the states of the query set, where pi_old is the policy that sampled it."""
        adapted = last(self.inner_loop(meta, task, loss, step=step)).params
        return loss.divergence(adapted, task.query(adapted))

    def curvature(
        self, meta: MetaParams, task: Task, loss: PolicyLoss, direction: MetaParams, *, step: int
    ) -> MetaParams:
        """The product of the Hessian of `divergence` in all meta-parameters and ``direction``."""
        product = hessian_product(
            lambda joined: self.divergence(split(joined), task, loss, step=step), join(meta), join(direction)
        )
        return split(product)
