"""MAML: model-agnostic meta-learning (Finn, Abbeel, Levine, ICML 2017)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from distmeta.core.algorithm import MetaAlgorithm
from distmeta.core.gradients import grad_and_value
from distmeta.core.inner import SGD, InnerStep, last, unroll
from distmeta.core.types import MetaGradient, MetaParams, Metrics, Params, Task, TaskLoss
from distmeta.errors import at_least, positive


@dataclass(frozen=True)
class MAML(MetaAlgorithm):
    """Learns an initialisation from which a few gradient steps solve a new task.

    Inner loop (their eq. 1), K steps on the support set S:  theta_{k+1} = theta_k − α ∇L(theta_k; S),  theta_0 = theta.

    Meta-gradient (their algorithm 2, line 8), on the query set Q, differentiated through the adaptation:
    ∇_theta L(theta_K(theta); Q), which for K = 1 is (I − α ∇²L(theta; S)) ∇L(theta_1; Q).

    With ``first_order`` the second derivatives are left out (their section 5.2): ∇L(theta_K; Q).

    Raises:
        ConfigError: A setting is out of range.
    """

    inner_lr: Annotated[float, "inner learning rate, alpha"] = 0.01
    inner_steps: Annotated[int, "gradient steps of the inner loop in meta-training, K"] = 1
    test_inner_steps: Annotated[int | None, "inner steps in evaluation and adaptation; null: inner_steps"] = None
    first_order: Annotated[bool, "leave out second derivatives (FOMAML): cheaper, often nearly as good"] = False

    def __post_init__(self) -> None:
        positive("algorithm.inner_lr", self.inner_lr)
        at_least("algorithm.inner_steps", self.inner_steps, 1)
        if self.test_inner_steps is not None:
            at_least("algorithm.test_inner_steps", self.test_inner_steps, 0)

    def trajectory(self, meta: MetaParams, task: Task, loss: TaskLoss) -> Iterator[InnerStep]:
        """theta_0, theta_1, …"""
        steps = self.inner_steps if self.test_inner_steps is None else self.test_inner_steps
        return unroll(loss, meta.model, task.support, SGD(self.inner_lr), steps)

    def meta_gradient(self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int) -> MetaGradient:
        """∇_theta L(theta_K(theta); Q); the metrics are those of the query set at theta_K."""

        def adapt(theta: Params, create_graph: bool) -> Params:
            optimizer = SGD(self.inner_lr)
            return last(
                unroll(loss, theta, task.support, optimizer, self.inner_steps, create_graph=create_graph)
            ).params

        def query_loss(adapted: Params) -> tuple[Tensor, Metrics]:
            return loss(adapted, task.query(adapted))

        if self.first_order:
            gradient, value, metrics = grad_and_value(query_loss, adapt(meta.model, False), create_graph=False)
        else:
            gradient, value, metrics = grad_and_value(
                lambda theta: query_loss(adapt(theta, True)), meta.model, create_graph=False
            )
        return MetaGradient(MetaParams(gradient, {}), metrics | {"loss": value})
