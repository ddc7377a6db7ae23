"""iMAML (Rajeswaran, Finn, Kakade, Levine, "Meta-learning with implicit gradients", NeurIPS 2019)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from distmeta.core.algorithm import MetaAlgorithm
from distmeta.core.conjugate import conjugate_gradient, dot
from distmeta.core.gradients import grad_and_value
from distmeta.core.inner import SGD, InnerStep, last, unroll
from distmeta.core.types import Batch, MetaGradient, MetaParams, Metrics, Params, Task, TaskLoss
from distmeta.errors import at_least, positive


@dataclass(frozen=True)
class IMAML(MetaAlgorithm):
    """MAML whose meta-gradient depends on where the inner loop ends and not on its path.

    The inner loop minimises, by K gradient steps, the regularised support loss

        phi = argmin_p L(p; S) + λ/2 ‖p − theta‖²

    At that minimum the implicit function theorem gives the meta-gradient

        ∇_theta L(phi(theta); Q) = (I + ∇²L(phi; S) / λ)⁻¹ ∇L(phi; Q)

    which conjugate gradients solve with one Hessian-vector product an iteration, in memory that does not grow with K.
    It is as good as the minimum is near. The metric ``cg_residual`` is ‖b − A x‖ / ‖b‖ of the solution.

    Where the inner loop ends short of the minimum, I + H/λ may be indefinite, and no solution of it a meta-gradient.
    ``cg_damping`` δ solves with I + H/(λ + δ) instead, which is between first-order MAML (δ → ∞) and the above (δ = 0).
    The authors' code (imaml_dev, ``matrix_evaluator``) solves with 2 I + H/(λ + 10), which at their λ = 2 is twice that
    of δ = 22. It also takes the K steps without the pull, and one step of the pull alone
    behind them (none in test tasks), so that their λ of 2 lets a task go as far as a small one does here.

    Raises:
        ConfigError: A setting is out of range.
    """

    inner_lr: Annotated[float, "inner learning rate"] = 0.01
    inner_steps: Annotated[int, "gradient steps of the inner loop in meta-training, K"] = 10
    test_inner_steps: Annotated[int | None, "inner steps in evaluation and adaptation; null: inner_steps"] = None
    regularization: Annotated[float, "lambda, the pull of the adapted parameters to the initialisation"] = 2.0
    cg_steps: Annotated[int, "iterations of conjugate gradients"] = 5
    cg_damping: Annotated[float, "added to lambda in the system that conjugate gradients solve"] = 0.0

    def __post_init__(self) -> None:
        positive("algorithm.inner_lr", self.inner_lr)
        positive("algorithm.regularization", self.regularization)
        at_least("algorithm.cg_damping", self.cg_damping, 0)
        at_least("algorithm.inner_steps", self.inner_steps, 1)
        at_least("algorithm.cg_steps", self.cg_steps, 1)
        if self.test_inner_steps is not None:
            at_least("algorithm.test_inner_steps", self.test_inner_steps, 0)

    def trajectory(self, meta: MetaParams, task: Task, loss: TaskLoss) -> Iterator[InnerStep]:
        """theta_0, theta_1, …"""
        return self._unroll(
            meta, task, loss, self.inner_steps if self.test_inner_steps is None else self.test_inner_steps
        )

    def _unroll(self, meta: MetaParams, task: Task, loss: TaskLoss, steps: int) -> Iterator[InnerStep]:
        def regularised(params: Params, batch: Batch) -> tuple[Tensor, Metrics]:
            value, metrics = loss(params, batch)
            pull = torch.stack([(tensor - meta.model[name]).square().sum() for name, tensor in params.items()]).sum()
            return value + 0.5 * self.regularization * pull, metrics

        return unroll(regularised, meta.model, task.support, SGD(self.inner_lr), steps)

    def meta_gradient(self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int) -> MetaGradient:
        """(I + H/λ)⁻¹ ∇L(phi; Q); the metrics are those of the query set at phi, and ``cg_residual``."""
        phi = last(self._unroll(meta, task, loss, self.inner_steps)).params
        query = task.query(phi)
        gradient, value, metrics = grad_and_value(lambda p: loss(p, query), phi, create_graph=False)
        support = task.support(phi, self.inner_steps)

        def slope(p: Params, v: Params) -> tuple[Tensor, Metrics]:
            return dot(grad_and_value(lambda q: loss(q, support), p, create_graph=True)[0], v), {}

        strength = self.regularization + self.cg_damping

        def matrix(v: Params) -> Params:
            hessian_v, *_ = grad_and_value(lambda p: slope(p, v), phi, create_graph=False)
            return {name: tensor + hessian_v[name] / strength for name, tensor in v.items()}

        solution, residual = conjugate_gradient(matrix, gradient, self.cg_steps)
        return MetaGradient(MetaParams(solution, {}), metrics | {"loss": value, "cg_residual": residual})

    def complaint(self, metrics: Mapping[str, float]) -> str | None:
        """Says so if conjugate gradients have ended farther from the solution than they began."""
        if metrics["cg_residual"] < 1:
            return None
        return (
            f"conjugate gradients did not converge in {self.cg_steps} iterations (relative residual "
            f"{metrics['cg_residual']:.2g}): I + H/lambda is badly conditioned or not positive definite; raise "
            "algorithm.regularization, algorithm.cg_damping or algorithm.cg_steps"
        )
