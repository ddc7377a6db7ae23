"""Gradients that can be differentiated again, with one spelling for two machineries.

Algorithms call `grad_and_value` and run unchanged in a loop over tasks (autograd's tape: 1.4 times as fast there as
function transforms, for the 4-layer convolutional network on a CPU) and under ``torch.func.vmap`` over the tasks of a
shard (where the tape cannot follow). ``vmap`` always stands outside ``grad``: the other way round, an affine
batch-norm has wrong second derivatives in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from distmeta.core.types import Metrics, Params

_transforms: ContextVar[bool] = ContextVar("transforms", default=False)


@contextmanager
def function_transforms() -> Generator[None]:
    """Within this context `grad_and_value` uses ``torch.func``, so that it may run under ``vmap``."""
    token = _transforms.set(True)
    try:
        yield
    finally:
        _transforms.reset(token)


def transforming() -> bool:
    """Whether `function_transforms` is in force."""
    return _transforms.get()


def grad_and_value(
    function: Callable[[Params], tuple[Tensor, Metrics]], params: Params, *, create_graph: bool
) -> tuple[Params, Tensor, Metrics]:
    """∇f(p), f(p) and the metrics of one call of f.

    Args:
        function: f, from parameters to a scalar and metrics.
        params: p, where to differentiate.
        create_graph: Whether the gradient is part of the graph of an outer differentiation through ``params``
            (second order). If not, it is a constant and ``params`` need no graph.

    Returns:
        The gradient (zeros for parameters that f does not use), the value, and the metrics without graph.
    """
    if _transforms.get():
        gradient, (value, metrics) = torch.func.grad_and_value(function, has_aux=True)(params)
        if not create_graph:
            gradient = {name: tensor.detach() for name, tensor in gradient.items()}
    else:
        params = {  # views are variables of their own, where one parameter was computed from another
            name: tensor.view_as(tensor) if create_graph and tensor.requires_grad else tensor.detach().requires_grad_()
            for name, tensor in params.items()
        }
        with torch.enable_grad():
            value, metrics = function(params)
            tensors = torch.autograd.grad(
                value, list(params.values()), create_graph=create_graph, materialize_grads=True
            )
        gradient = dict(zip(params, tensors, strict=True))
    return gradient, value.detach(), {name: tensor.detach() for name, tensor in metrics.items()}


def hessian_product(function: Callable[[Params], Tensor], params: Params, direction: Params) -> Params:
    """∇²f(p) v, by differentiating ∇f(p) · v once more.

    Args:
        function: f, from parameters to a scalar.
        params: p.
        direction: v, of the same structure.
    """
    params = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
    tensors = list(params.values())
    with torch.enable_grad():
        first = torch.autograd.grad(function(params), tensors, create_graph=True, materialize_grads=True)
        along = torch.stack([(g * direction[name]).sum() for name, g in zip(params, first, strict=True)]).sum()
        second = torch.autograd.grad(along, tensors, materialize_grads=True)
    return dict(zip(params, second, strict=True))
