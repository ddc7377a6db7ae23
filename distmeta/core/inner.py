"""The inner loop: differentiable optimizers and the unrolled adaptation to one task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from distmeta.core.gradients import grad_and_value
from distmeta.core.types import Batch, Metrics, Params, TaskLoss

Order = Literal[0, 1, 2]
"""Of the derivatives that an outer differentiation through the inner loop sees (see `unroll`)."""


class InnerOptimizer(Protocol):
    """An update rule as a pure function, so that an outer loop can differentiate through it."""

    def step(self, params: Params, gradient: Params, state: Params, count: int) -> tuple[Params, Params]:
        """The parameters and the state after update number ``count`` (from 1); the first state is empty."""
        ...


@dataclass(frozen=True)
class SGD:
    """theta ← theta − lr · g."""

    lr: float

    def step(self, params: Params, gradient: Params, state: Params, count: int) -> tuple[Params, Params]:
        """One step of gradient descent; there is no state."""
        return {name: tensor - self.lr * gradient[name] for name, tensor in params.items()}, state


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba, 2015, algorithm 1), with beta1 = 0 by default as Nichol et al. (2018) use it.

    With beta1 = 0 there is no momentum that one mini-batch would hand to the next, only the running scale v:

        theta ← theta − lr · g / (√v̂ + eps),   v̂ = v / (1 − beta2^t),   v ← beta2 v + (1 − beta2) g²

    The state holds the bias-corrected v̂ (and m̂), which follow v̂ ← w v̂ + (1 − w) g², w = beta2 (1 − beta2^(t−1)) /
    (1 − beta2^t): 0 at the first step, and beta2 after many.
    """

    lr: float
    beta1: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8

    def step(self, params: Params, gradient: Params, state: Params, count: int) -> tuple[Params, Params]:
        """One update; the state holds v̂ under ``v.*`` and, where beta1 > 0, m̂ under ``m.*``."""
        moved: Params = {}
        new_state: Params = {}
        keep_v, keep_m = (beta * (1 - beta ** (count - 1)) / (1 - beta**count) for beta in (self.beta2, self.beta1))
        for name, tensor in params.items():
            g = gradient[name]
            v = torch.addcmul(state[f"v.{name}"] * keep_v, g, g, value=1 - keep_v) if keep_v else g * g
            new_state[f"v.{name}"] = v
            if self.beta1:
                g = torch.lerp(g, state[f"m.{name}"], keep_m) if keep_m else g
                new_state[f"m.{name}"] = g
            moved[name] = torch.addcdiv(tensor, g, v.sqrt() + self.eps, value=-self.lr)
        return moved, new_state


class InnerStep(NamedTuple):
    """Where the inner loop stands after some number of steps."""

    params: Params
    """The adapted parameters."""
    loss: Tensor | None
    """The support loss that the last step descended, at the parameters before it; None before the first step."""
    metrics: Metrics
    """The support metrics that belong to ``loss``."""
    state: Params
    """The state of the inner optimizer."""


def unroll(
    loss: TaskLoss,
    params: Params,
    support: Callable[[Params, int], Batch],
    optimizer: InnerOptimizer,
    steps: int,
    *,
    order: Order = 0,
    adapted: Collection[str] | None = None,
    state: Params | None = None,
    count: int = 0,
) -> Iterator[InnerStep]:
    """theta_0 = theta, theta_{k+1} = U(theta_k, ∇L(theta_k; D_k)): yields theta_0, …, theta_steps.

    Args:
        loss: L.
        params: theta.
        support: From theta_k and k to the support data D_k, as `distmeta.core.types.Task.support`.
        optimizer: U.
        steps: Number of updates.
        order: What an outer differentiation sees of theta_k as a function of theta and of U's own parameters: 2, all;
            1, the updates but not the derivatives of ∇L, which is then a constant; 0, nothing.
        adapted: Names of the parameters that are updated; None for all. The others stay what they are in theta.
        state: The state that U starts with, if it does not start afresh.
        count: Number of updates that ``state`` has seen.
    """
    state = {} if state is None else state
    if order == 0:
        params = {name: tensor.detach() for name, tensor in params.items()}
    yield InnerStep(params, None, {}, state)
    for k in range(steps):
        batch = support(params, k)
        moving = params if adapted is None else {name: t for name, t in params.items() if name in adapted}
        gradient, value, metrics = grad_and_value(
            lambda p, fixed=params, b=batch: loss(fixed | p, b), moving, create_graph=order == 2
        )
        with torch.set_grad_enabled(order > 0):
            moving, state = optimizer.step(moving, gradient, state, count + k + 1)
        params = params | moving
        yield InnerStep(params, value, metrics, state)


def last(steps: Iterator[InnerStep]) -> InnerStep:
    """The end of the inner loop."""
    *_, final = steps
    return final
