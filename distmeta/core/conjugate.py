"""Conjugate gradients over named tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distmeta.core.types import Params


def dot(a: Params, b: Params) -> Tensor:
    """<a, b> over all parameters."""
    return torch.stack([(tensor * b[name]).sum() for name, tensor in a.items()]).sum()


def conjugate_gradient(matrix: Callable[[Params], Params], b: Params, steps: int) -> tuple[Params, Tensor]:
    """x with A x = b for a positive definite A (Hestenes & Stiefel, 1952), from x = 0, and ‖b − A x‖ / ‖b‖.

    The number of iterations is fixed, so that tasks can be vectorised; once the residual is 0 they change nothing.
    """
    x = {name: torch.zeros_like(tensor) for name, tensor in b.items()}
    r, p = b, b
    start = rr = dot(b, b)
    for _ in range(steps):
        ap = matrix(p)
        alpha = _ratio(rr, dot(p, ap))
        x = {name: tensor + alpha * p[name] for name, tensor in x.items()}
        r = {name: tensor - alpha * ap[name] for name, tensor in r.items()}
        rr, before = dot(r, r), rr
        beta = _ratio(rr, before)
        p = {name: tensor + beta * p[name] for name, tensor in r.items()}
    return x, _ratio(rr, start).sqrt()


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))
