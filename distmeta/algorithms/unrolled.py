"""What algorithms have in common that unroll an inner loop and differentiate through it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from distmeta.core.algorithm import Bilevel
from distmeta.core.inner import InnerOptimizer, InnerStep, Order, Rate, Rule, optimizer_of, unroll
from distmeta.core.types import Params, Support, TaskLoss
from distmeta.errors import ConfigError, at_least, positive

EPS = 1e-8  # of Adam, as its paper has it


@dataclass(frozen=True)
class Unrolled(Bilevel):
    """K steps of a differentiable optimizer on the support set, with derivatives through all of them.

    Instead of plain gradient descent the inner loop may have momentum or be Adam, afresh in each task; derivatives go
    through its state too. That of Adam's first step, g / (|g| + eps), is eps / (|g| + eps)² ∇²L: almost nothing
    where |g| is much larger than eps, and 1 / eps where g is nearly zero. Raise ``inner_eps`` if that is too rough.

    ``recompute`` keeps the ends of the inner steps alone (gradient checkpointing): the memory of the outer backward
    pass no longer grows with K, but for K copies of the parameters, and the bits stay the same.

    Raises:
        ConfigError: A setting is out of range.
    """

    inner_lr: Annotated[float, "inner learning rate, alpha"] = 0.01
    inner_steps: Annotated[int, "gradient steps of the inner loop in meta-training, K"] = 1
    test_inner_steps: Annotated[int | None, "inner steps in evaluation and adaptation; null: inner_steps"] = None
    inner_optimizer: Annotated[Rule, "update rule of the inner loop: sgd, nesterov or adam"] = "sgd"
    inner_momentum: Annotated[float, "momentum of sgd and nesterov, beta1 of adam; 0: none"] = 0.0
    inner_eps: Annotated[float, "what adam adds to the root of the second moment"] = EPS
    first_order: Annotated[bool, "leave out second derivatives (FOMAML): cheaper, often nearly as good"] = False
    recompute: Annotated[bool, "memory of one inner step for one more forward and backward pass of each"] = False

    least_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        positive("algorithm.inner_lr", self.inner_lr)
        positive("algorithm.inner_eps", self.inner_eps)
        at_least("algorithm.inner_steps", self.inner_steps, self.least_steps)
        if self.test_inner_steps is not None:
            at_least("algorithm.test_inner_steps", self.test_inner_steps, 0)
        if not 0 <= self.inner_momentum < 1:
            raise ConfigError(f"algorithm.inner_momentum must be from 0 to less than 1; given: {self.inner_momentum}")
        if self.inner_optimizer == "nesterov" and not self.inner_momentum:
            raise ConfigError("algorithm.inner_optimizer: nesterov needs algorithm.inner_momentum, for example 0.9")
        if self.inner_optimizer != "adam" and self.inner_eps != EPS:
            raise ConfigError(
                f"algorithm.inner_eps={self.inner_eps} is a setting of adam; algorithm.inner_optimizer is "
                f"{self.inner_optimizer}, which has none"
            )

    def unroll(
        self,
        loss: TaskLoss,
        params: Params,
        support: Support,
        *,
        step: int | None,
        adapted: Collection[str],
        state: Params | None = None,
    ) -> Iterator[InnerStep]:
        """`distmeta.core.inner.unroll` by these settings, in outer step ``step`` or, if that is None, at test time."""
        return unroll(
            loss,
            params,
            support,
            self.optimizer(),
            self.steps(step),
            order=0 if step is None else self.order(step),
            adapted=adapted,
            state=state,
            recompute=self.recompute,
        )

    def steps(self, step: int | None) -> int:
        """The number of inner steps in outer step ``step`` or, if that is None, at test time."""
        return self.inner_steps if step is not None or self.test_inner_steps is None else self.test_inner_steps

    def optimizer(self) -> InnerOptimizer:
        """The update rule of the inner loop."""
        return self.rule(self.inner_lr)

    def rule(self, lr: Rate) -> InnerOptimizer:
        """The configured update rule with the rate ``lr``."""
        return optimizer_of(self.inner_optimizer, lr, self.inner_momentum, self.inner_eps)

    def order(self, step: int) -> Order:
        """The order of the derivatives taken in outer step ``step``."""
        return 1 if self.first_order else 2
