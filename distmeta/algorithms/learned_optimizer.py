"""A learned optimizer (Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", NeurIPS 2016).

The initialisation is learned beside it (Ravi, Larochelle, "Optimization as a model for few-shot learning", ICLR 2017).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import Annotated

import torch
from torch import Tensor

from distmeta.algorithms.maml import MAML
from distmeta.core.inner import InnerOptimizer
from distmeta.core.types import MetaParams, Params
from distmeta.errors import ConfigError, at_least

_P = 10.0  # the paper's p: gradients below e^-10 are small


@dataclass(frozen=True)
class LearnedOptimizer(MAML):
    """The update rule of the inner loop is a small recurrent network, the same for every coordinate of theta.

    Each coordinate i has a hidden state h_i of its own, 0 when a task begins. An inner step with the gradient g:

        h_i ← GRU(x_i, h_i),   (u_i, v_i) = W h_i + b,   theta_i ← theta_i − α (exp(u_i) g_i + v_i)

    where x_i is g_i as their appendix A gives it to the network, (log|g| / p, sign g) where |g| ≥ e^-p and
    (−1, e^p g) below, p = 10. The outer loop learns the GRU, W and b (under ``rule.*``) with the initialisation.

    It deviates from the papers, which have an LSTM whose output is the update itself, in the part exp(u) g: W and b
    start at 0, and so training starts as MAML. As in the papers gradients are constants for the outer
    loop (``first_order``); with ``first_order: false`` they are differentiated as well.

    Raises:
        ConfigError: See `MAML`.
    """

    inner_steps: Annotated[int, "gradient steps of the inner loop in meta-training, K"] = 5
    first_order: Annotated[bool, "leave out the derivatives of the inner gradients, as the papers do"] = True
    hidden: Annotated[int, "numbers of the recurrent state of each coordinate"] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("algorithm.hidden", self.hidden, 1)
        if self.inner_optimizer != "sgd" or self.inner_momentum:
            raise ConfigError(
                "algorithm learned-optimizer has an update rule of its own, with a memory of its own: leave out "
                "algorithm.inner_optimizer and algorithm.inner_momentum"
            )

    def init(self, params: Params) -> MetaParams:
        """theta, and with H hidden numbers input (2, 3H), recurrent (H, 3H), bias (3H,), output (H, 2) and (2,)."""
        like, size = params[self.moving(params)[0]], self.hidden
        rule = {
            "rule.input": like.new_empty(2, 3 * size).uniform_(-(size**-0.5), size**-0.5),
            "rule.recurrent": like.new_empty(size, 3 * size).uniform_(-(size**-0.5), size**-0.5),
            "rule.bias": like.new_zeros(3 * size),
            "rule.output": like.new_zeros(size, 2),
            "rule.output_bias": like.new_zeros(2),
        }
        return MetaParams(params, rule)

    def optimizer(self) -> InnerOptimizer:
        """theta ← theta − α (exp(u) g + v)."""
        return _Recurrent(self.inner_lr)


@dataclass(frozen=True)
class _Recurrent:
    lr: float

    def step(self, params: Params, gradient: Params, state: Params, count: int) -> tuple[Params, Params]:
        moved: Params = {}
        state = dict(state)
        for name, tensor in params.items():
            g_P = gradient[name].reshape(-1)
            h_PH = _gru(_features(g_P), state.get(f"h.{name}"), state)
            u_P, v_P = (h_PH @ state["rule.output"] + state["rule.output_bias"]).unbind(-1)
            moved[name] = tensor - self.lr * (u_P.exp() * g_P + v_P).reshape(tensor.shape)
            state[f"h.{name}"] = h_PH
        return moved, state


def _features(g_P: Tensor) -> Tensor:
    """Size and sign of gradients of any magnitude: (P, 2)."""
    size_P = g_P.abs()
    large = size_P >= exp(-_P)
    logarithm = torch.where(large, size_P, 1.0).log() / _P  # of 1 where it is not taken: log 0 has no derivative
    return torch.stack([torch.where(large, logarithm, -1.0), torch.where(large, g_P.sign(), exp(_P) * g_P)], -1)


def _gru(x_PX: Tensor, h_PH: Tensor | None, state: Params) -> Tensor:
    """A gated recurrent unit (Cho et al., 2014), as torch.nn.GRUCell has it with one bias; h is 0 at first."""
    from_x = x_PX @ state["rule.input"] + state["rule.bias"]
    reset_x, update_x, new_x = from_x.chunk(3, -1)
    if h_PH is None:
        return (1 - update_x.sigmoid()) * new_x.tanh()
    reset_h, update_h, new_h = (h_PH @ state["rule.recurrent"]).chunk(3, -1)
    update = (update_x + update_h).sigmoid()
    new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
    return (1 - update) * new + update * h_PH
