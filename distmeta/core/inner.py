"""The inner loop: differentiable optimizers and the unrolled adaptation to one task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from distmeta.core.gradients import grad_and_value
from distmeta.core.types import Batch, Metrics, Params, TaskLoss


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
    """Adam (Kingma & Ba, 2015, algorithm 1), bias-corrected, with beta1 = 0 by default as Nichol et al. (2018) use it.

    With beta1 = 0 there is no momentum that one mini-batch would hand to the next, only the running scale v:

        v ← beta2 v + (1 − beta2) g²,   theta ← theta − lr · g / (√(v / (1 − beta2^t)) + eps)
    """

    lr: float
    beta1: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8

    def step(self, params: Params, gradient: Params, state: Params, count: int) -> tuple[Params, Params]:
        """One update; the state holds v, and m where beta1 > 0, under ``v.*`` and ``m.*``."""
        moved: Params = {}
        new_state: Params = {}
        # Both bias corrections are folded into the rate and eps: fewer passes over the parameters.
        scale = (1 - self.beta2**count) ** 0.5
        rate, eps = self.lr * scale / (1 - self.beta1**count), self.eps * scale
        for name, tensor in params.items():
            g = gradient[name]
            if count == 1:
                v = g * g * (1 - self.beta2)
            else:
                v = torch.addcmul(state[f"v.{name}"] * self.beta2, g, g, value=1 - self.beta2)
            new_state[f"v.{name}"] = v
            if self.beta1:
                g = g * (1 - self.beta1)
                if count > 1:
                    g = torch.add(g, state[f"m.{name}"], alpha=self.beta1)
                new_state[f"m.{name}"] = g
            moved[name] = torch.addcdiv(tensor, g, v.sqrt() + eps, value=-rate)
        return moved, new_state


class InnerStep(NamedTuple):
    """Where the inner loop stands after some number of steps."""

    params: Params
    """The adapted parameters."""
    loss: Tensor | None
    """The support loss that the last step descended, at the parameters before it; None before the first step."""
    metrics: Metrics
    """The support metrics that belong to ``loss``."""


def unroll(
    loss: TaskLoss,
    params: Params,
    support: Callable[[Params, int], Batch],
    optimizer: InnerOptimizer,
    steps: int,
    *,
    create_graph: bool = False,
) -> Iterator[InnerStep]:
    """theta_0 = theta, theta_{k+1} = U(theta_k, ∇L(theta_k; D_k)): yields theta_0, …, theta_steps.

    Args:
        loss: L.
        params: theta.
        support: From theta_k and k to the support data D_k, as `distmeta.core.types.Task.support`.
        optimizer: U.
        steps: Number of updates.
        create_graph: Whether theta_k stays a differentiable function of theta, for second-order meta-gradients.
    """
    state: Params = {}
    if not create_graph:
        params = {name: tensor.detach() for name, tensor in params.items()}
    yield InnerStep(params, None, {})
    for k in range(steps):
        batch = support(params, k)
        gradient, value, metrics = grad_and_value(lambda p, b=batch: loss(p, b), params, create_graph=create_graph)
        with torch.set_grad_enabled(create_graph):
            params, state = optimizer.step(params, gradient, state, k + 1)
        yield InnerStep(params, value, metrics)


def last(steps: Iterator[InnerStep]) -> InnerStep:
    """The end of the inner loop."""
    *_, final = steps
    return final
