"""Memory for time: a function whose intermediate results are not kept but computed again in the backward pass.

torch.utils.checkpoint does not do for an inner step: a function that differentiates, and so unpacks what it has saved,
is computed anew at once (three times in all), and function transforms know nothing of saved-tensor hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from distmeta.core.gradients import function_transforms, transforming
from distmeta.core.types import Batch, Metrics, Params

Function = Callable[[Params, Batch], tuple[Params, Metrics]]


def recomputed(function: Function, variables: Params, data: Batch) -> tuple[Params, Metrics]:
    """``function(variables, data)``, differentiable in ``variables``, with these and the data all that is kept.

    Derivatives have the bits of a ``function`` whose variables are views of their own (see `torch.Tensor.view_as`).

    Args:
        function: A pure function; it draws the same random numbers again.
        variables: Tensors that derivatives are taken of.
        data: Constants.

    Returns:
        The tensors of ``function``, and its metrics, which are constants.
    """
    call = _Call(function, list(variables), {t.device for t in variables.values() if t.is_cuda})
    tensors = cast("tuple[Tensor, ...]", _Recomputed.apply(call, *variables.values(), *data))  # pyright: ignore[reportUnknownMemberType]
    moved, said = call.outputs
    return dict(zip(moved, tensors, strict=False)), {
        name: tensor.detach() for name, tensor in zip(said, tensors[len(moved) :], strict=True)
    }


class _Call:
    """A call of a function of dicts as one of a row of tensors; it knows how to happen again as it was."""

    def __init__(self, function: Function, names: list[str], cuda: set[torch.device]) -> None:
        self.function, self.names = function, names
        self.outputs: tuple[list[str], list[str]] = [], []
        self.transforming = transforming()
        self._random = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in cuda}

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        variables = dict(zip(self.names, tensors, strict=False))
        moved, said = self.function(variables, tensors[len(self.names) :])
        self.outputs = list(moved), list(said)
        return (*moved.values(), *said.values())

    @contextmanager
    def again(self) -> Generator[None]:
        """Within this context the call has the random numbers and the machinery that it had at first.

        The backward pass of a GPU runs in a thread of its own, which knows nothing of this one's context.
        """
        cpu, cuda = self._random
        with torch.random.fork_rng([device.index for device in cuda]):  # pyright: ignore[reportUnknownMemberType]
            torch.set_rng_state(cpu)
            for device, state in cuda.items():
                torch.cuda.set_rng_state(state, device)
            with function_transforms() if self.transforming else nullcontext():
                yield


class _Recomputed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        if call.transforming:
            return call(*tensors)
        with torch.enable_grad():  # with the same kernels as in the backward pass, and then cut off
            row = [t.detach().requires_grad_() if i < len(call.names) else t for i, t in enumerate(tensors)]
            return tuple(tensor.detach() for tensor in call(*row))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG004
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        variables, data = saved[: len(call.names)], saved[len(call.names) :]
        count = len(call.outputs[0])
        differentiable = torch.is_grad_enabled()
        with call.again():
            if call.transforming:
                pull = torch.func.vjp(lambda *row: call(*row, *data)[:count], *variables)[1]
                found = cast("tuple[Tensor, ...]", pull(cotangents[:count]))
            else:
                with torch.enable_grad():
                    row = [
                        t.view_as(t) if differentiable and t.requires_grad else t.detach().requires_grad_()
                        for t in variables
                    ]
                    outputs = call(*row, *data)[:count]
                    found = torch.autograd.grad(
                        outputs, row, cotangents[:count], create_graph=differentiable, allow_unused=True
                    )
        return None, *found, *(None for _ in data)
