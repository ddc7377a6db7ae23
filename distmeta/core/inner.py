"""The inner loop: differentiable optimizers and the unrolled adaptation to one task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from distmeta.core.gradients import grad_and_value
from distmeta.core.params import join, split
from distmeta.core.recompute import recomputed
from distmeta.core.types import Batch, MetaParams, Metrics, Params, Support, TaskLoss

Order = Literal[0, 1, 2]
"""Of the derivatives that an outer differentiation through the inner loop sees (see `unroll`)."""


Rate = float | Callable[[Params, str, int], Tensor]
"""A learning rate: a number, or a function of the optimizer's state, a parameter's name and the update's number."""


class InnerOptimizer(Protocol):
    """An update rule as a pure function of tensors, so that an outer loop can differentiate through it.

    What is meta-learned of it (rates, curvature) lies in the state that it starts with, and stays there.
    """

    def step(self, params: Params, gradient: Params, state: Params, count: int) -> tuple[Params, Params]:
        """The parameters and the state after update number ``count`` (from 1)."""
        ...


@dataclass(frozen=True)
class SGD:
    """theta ← theta − lr · d, with d the gradient g, or with momentum μ as torch.optim.SGD has it

        m ← μ m + g,   d = m,   or with Nesterov's look-ahead   d = g + μ m

    The state holds m under ``m.*`` where μ > 0.
    """

    lr: Rate
    momentum: float = 0.0
    nesterov: bool = False

    def step(self, params: Params, gradient: Params, state: Params, count: int) -> tuple[Params, Params]:
        """One step of gradient descent."""
        if self.momentum:
            m = {n: g + self.momentum * state[f"m.{n}"] if f"m.{n}" in state else g for n, g in gradient.items()}
            state = state | {f"m.{name}": tensor for name, tensor in m.items()}
            gradient = {n: g + self.momentum * m[n] for n, g in gradient.items()} if self.nesterov else m
        return descend(params, gradient, self.lr, state, count), state


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba, 2015, algorithm 1).

        theta ← theta − lr · m̂ / (√v̂ + eps),   v̂ = v / (1 − beta2^t),   v ← beta2 v + (1 − beta2) g²,

    and m likewise with beta1 and g. With beta1 = 0 there is no momentum that one mini-batch would hand to the next.

    The state holds the bias-corrected v̂ (and m̂), which follow v̂ ← w v̂ + (1 − w) g², w = beta2 (1 − beta2^(t−1)) /
    (1 − beta2^t): 0 at the first step, and beta2 after many.

    √v̂ has no derivative at v̂ = 0, where a unit is dead and g = 0: it is taken as 0 there.
    """

    lr: Rate
    beta1: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8

    def step(self, params: Params, gradient: Params, state: Params, count: int) -> tuple[Params, Params]:
        """One update; the state holds v̂ under ``v.*`` and, where beta1 > 0, m̂ under ``m.*``."""
        direction: Params = {}
        new_state: Params = {}
        keep_v, keep_m = (beta * (1 - beta ** (count - 1)) / (1 - beta**count) for beta in (self.beta2, self.beta1))
        for name, g in gradient.items():
            v = torch.addcmul(state[f"v.{name}"] * keep_v, g, g, value=1 - keep_v) if keep_v else g * g
            new_state[f"v.{name}"] = v
            if self.beta1:
                g = torch.lerp(g, state[f"m.{name}"], keep_m) if keep_m else g
                new_state[f"m.{name}"] = g
            direction[name] = g / (_root(v) + self.eps)
        state = state | new_state
        return descend(params, direction, self.lr, state, count), state


Rule = Literal["sgd", "nesterov", "adam"]
"""Of the inner loop: gradient descent, with momentum as its look-ahead or not, or Adam."""


def optimizer_of(rule: Rule, lr: Rate, momentum: float = 0.0, eps: float = 1e-8) -> InnerOptimizer:
    """The optimizer that a configuration names; ``momentum`` is beta1 of Adam, which alone has ``eps``."""
    if rule == "adam":
        return Adam(lr, beta1=momentum, eps=eps)
    return SGD(lr, momentum, nesterov=rule == "nesterov")


def descend(params: Params, direction: Params, lr: Rate, state: Params, count: int) -> Params:
    """theta − lr · d."""
    if not callable(lr):
        return {name: tensor - lr * direction[name] for name, tensor in params.items()}
    return {name: tensor - lr(state, name, count) * direction[name] for name, tensor in params.items()}


def _root(v: Tensor) -> Tensor:
    """√v, with the derivative 0 at 0."""
    zero = v == 0
    return torch.where(zero, v, torch.where(zero, 1.0, v).sqrt())


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
    support: Support,
    optimizer: InnerOptimizer,
    steps: int,
    *,
    order: Order = 0,
    adapted: Collection[str] | None = None,
    state: Params | None = None,
    count: int = 0,
    recompute: bool = False,
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
        state: The state that U starts with, if it does not start afresh; meta-learned parts of U are in it.
        count: Number of updates that ``state`` has seen.
        recompute: Unless order is 0, keep of each step its ends alone and compute it anew in the backward pass: the
            memory of one step instead of all, for one more forward and backward pass a step. The same bits.
    """
    state = {} if state is None else state
    if order == 0:
        params = {name: tensor.detach() for name, tensor in params.items()}
    yield InnerStep(params, None, {}, state)
    for k in range(steps):
        update = _Update(loss, optimizer, params if adapted is None else adapted, count + k + 1, order)
        batch = support(params, k)
        ends = join(MetaParams(params, state))
        after, said = recomputed(update, ends, batch) if recompute and order > 0 else update(ends, batch)
        params, state = split(after)
        yield InnerStep(params, said.pop(_LOSS), said, state)


_LOSS = "support loss"  # a name that no metric has


@dataclass(frozen=True)
class _Update:
    """One inner step as a pure function of theta_k, the optimizer's state and the data."""

    loss: TaskLoss
    optimizer: InnerOptimizer
    adapted: Collection[str]
    count: int
    order: Order

    def __call__(self, ends: Params, batch: Batch) -> tuple[Params, Metrics]:
        """theta_{k+1} and the new state under joined names; the support loss at theta_k and its metrics."""
        if self.order > 0:  # what one step adds to a derivative is summed first, and so is the same when recomputed
            ends = {name: tensor.view_as(tensor) for name, tensor in ends.items()}
        params, state = split(ends)
        moving = {name: tensor for name, tensor in params.items() if name in self.adapted}
        gradient, value, metrics = grad_and_value(
            lambda p: self.loss(params | p, batch), moving, create_graph=self.order == 2
        )
        with torch.set_grad_enabled(self.order > 0):
            moving, state = self.optimizer.step(moving, gradient, state, self.count)
        return join(MetaParams(params | moving, state)), metrics | {_LOSS: value}


def last(steps: Iterator[InnerStep]) -> InnerStep:
    """The end of the inner loop."""
    *_, final = steps
    return final
