"""Meta-SGD (Li, Zhou, Chen, Li, "Meta-SGD: learning to learn quickly for few-shot learning", 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distmeta.algorithms.maml import MAML
from distmeta.core.inner import InnerOptimizer
from distmeta.core.types import MetaParams, Params


@dataclass(frozen=True)
class MetaSGD(MAML):
    """Learns, beside the initialisation, a learning rate for every parameter: direction and length of the update.

    Inner loop:  theta_{k+1} = theta_k − α ∘ ∇L(theta_k; S), with α a tensor like theta,
    meta-learned with it; it may become negative. (With another ``inner_optimizer`` its direction takes the place of the
    gradient.) The paper takes one step; here the same α serves every step. Every α
    starts at ``inner_lr``, where the paper draws the start at random from [0.005, 0.1].

    Raises:
        ConfigError: See `MAML`.
    """

    def init(self, params: Params) -> MetaParams:
        """theta, and α under ``lr.*`` for the parameters that are adapted."""
        rates = {f"lr.{name}": torch.full_like(params[name], self.inner_lr) for name in self.moving(params)}
        return MetaParams(params, rates)

    def optimizer(self) -> InnerOptimizer:
        """theta ← theta − α ∘ g."""
        return self.rule(lambda state, name, _: state[f"lr.{name}"])
