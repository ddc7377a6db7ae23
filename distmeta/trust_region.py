"""Trust-region policy optimisation (Schulman et al., ICML 2015) as the outer step of meta-learning."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from distmeta.config import TrustRegion
from distmeta.core.conjugate import conjugate_gradient, dot
from distmeta.core.types import Params
from distmeta.errors import NumericalError


class Passes(Protocol):
    """Further passes over the data that the tasks of an outer step have sampled at theta."""

    def gradient(self, at: np.ndarray) -> np.ndarray:
        """The mean meta-gradient at other meta-parameters."""
        ...

    def objective(self, at: np.ndarray) -> tuple[float, float]:
        """L, and the mean KL divergence of the policies adapted from other meta-parameters from those of theta."""
        ...

    def curvature(self, direction: np.ndarray) -> np.ndarray:
        """The product of a direction and the Hessian of the divergence at theta."""
        ...


def natural_step(
    theta: np.ndarray, gradient: np.ndarray, passes: Passes, settings: TrustRegion
) -> tuple[np.ndarray, dict[str, float]]:
    """The direction d whose step theta − d lowers L as much as the trust region allows.

        (H + c) x = g  by conjugate gradients,    d = sqrt(2 delta / xᵀ (H + c) x) · x      (their appendix C)

    where g is the gradient of L, H the Hessian of the mean KL divergence of the adapted policies, c ``damping`` and
    delta ``max_kl``. d is shortened by ``shrink`` until L is lower than at theta and the divergence at most delta;
    where no length will do, it is 0.

    Returns:
        d, and ``kl``, ``gain`` (by how much L falls) and ``backtracks`` for the metrics.

    Raises:
        NumericalError: The curvature along a direction is not finite.
    """

    def matrix(v: Params) -> Params:
        product = torch.from_numpy(passes.curvature(_like(v["theta"], gradient))).double()
        return {"theta": product + settings.damping * v["theta"]}

    solution, _ = conjugate_gradient(matrix, {"theta": torch.from_numpy(gradient).double()}, settings.cg_steps)
    x, model = solution["theta"], float(dot(solution, matrix(solution)))
    if not np.isfinite(model):
        raise NumericalError(
            "the curvature of the divergence is not finite; lower algorithm.inner_lr or outer.trust_region.max_kl"
        )
    nothing = np.zeros_like(gradient), {"kl": 0.0, "gain": 0.0, "backtracks": float(settings.backtracks + 1)}
    if model <= 0:
        return nothing
    step = (2 * settings.max_kl / model) ** 0.5 * x
    before, _ = passes.objective(theta)
    for tries in range(settings.backtracks + 1):
        candidate = _like(settings.shrink**tries * step, gradient)
        after, kl = passes.objective(theta - candidate)
        if after < before and kl <= settings.max_kl:  # neither is so where one of them is not a number
            return candidate, {"kl": kl, "gain": before - after, "backtracks": float(tries)}
    return nothing


def _like(vector: Tensor, model: np.ndarray) -> np.ndarray:
    return vector.numpy().astype(model.dtype)
