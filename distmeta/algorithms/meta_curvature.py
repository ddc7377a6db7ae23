"""Meta-Curvature (Park, Oliva, NeurIPS 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distmeta.algorithms.maml import MAML
from distmeta.core.inner import InnerOptimizer
from distmeta.core.types import MetaParams, Params


@dataclass(frozen=True)
class MetaCurvature(MAML):
    """Learns, beside the initialisation, a Kronecker-factored matrix that turns the gradient of each layer.

    Inner loop:  theta_{k+1} = theta_k − α MC(∇L(theta_k; S)), where for a weight seen as a tensor of outputs × inputs ×
    filter positions

        MC(g)[o, i, f] = Σ_{p, q, r} M_o[o, p] M_i[i, q] M_f[f, r] g[p, q, r]

    (their MC2, of all three factors). A matrix of a linear layer has no M_f, a vector (bias, affine weight) only M_o.
    All start as identities, so that training starts as MAML. (Another ``inner_optimizer`` is given MC(g) as gradient.)

    Raises:
        ConfigError: See `MAML`.
    """

    def init(self, params: Params) -> MetaParams:
        """theta, and the factors under ``mc0.*`` (outputs), ``mc1.*`` (inputs), ``mc2.*`` (filter positions)."""
        factors: Params = {}
        for name in self.moving(params):
            for axis, size in enumerate(_as_three_axes(params[name]).shape):
                if axis < max(1, min(params[name].ndim, 3)):
                    factors[f"mc{axis}.{name}"] = torch.eye(size, dtype=params[name].dtype)
        return MetaParams(params, factors)

    def optimizer(self) -> InnerOptimizer:
        """theta ← theta − α MC(g)."""
        return _Curvature(super().optimizer())


def _as_three_axes(tensor: Tensor) -> Tensor:
    """[outputs, inputs, filter positions], each 1 where the tensor lacks it."""
    shape = tensor.shape
    return tensor.reshape(shape[0] if shape else 1, shape[1] if len(shape) > 1 else 1, -1)


@dataclass(frozen=True)
class _Curvature:
    rule: InnerOptimizer

    def step(self, params: Params, gradient: Params, state: Params, count: int) -> tuple[Params, Params]:
        turned: Params = {}
        for name, tensor in gradient.items():
            g = _as_three_axes(tensor)
            for axis, equation in enumerate(("op,pif->oif", "iq,oqf->oif", "fr,oir->oif")):
                if (factor := state.get(f"mc{axis}.{name}")) is not None:
                    g = torch.einsum(equation, factor, g)
            turned[name] = g.reshape(tensor.shape)
        return self.rule.step(params, turned, state, count)
