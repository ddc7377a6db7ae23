"""Layers of convolutional networks that are fast to differentiate twice on a CPU.

`conv2d` and `norm_relu_pool` are drop-in functions: the same values as torch's own, up to rounding, whose gradients
and gradients' gradients are written out instead of left to autograd. On a GPU under the transforms of ``torch.func``
they are those of `distmeta.models.batched`; else, on other devices and under transforms, torch's own.

Both can be differentiated twice, which is what meta-gradients of second order need; a third time is an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function

from distmeta.models import batched


def _transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work, by the test of Function.apply."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore


def _fusable(x: Tensor) -> bool:
    """Whether the functions written out here are to be used for ``x``."""
    return not _transformed() and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def conv2d(x_BCHW: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """The convolution of ``x`` with square ``weight`` (out, in, k, k), without bias."""
    if not _fusable(x_BCHW):
        if x_BCHW.is_cuda and _transformed():
            return batched.conv2d(x_BCHW, weight, stride, padding)
        return F.conv2d(x_BCHW, weight, stride=stride, padding=padding)
    # Channels side by side are what oneDNN and the kernels are fastest with. (Of images with one channel `contiguous`
    # leaves the strides as they are, which do not say so.)
    x_BCHW = x_BCHW.to(memory_format=torch.channels_last)
    if not torch.is_autocast_enabled("cpu"):
        return _Convolution.apply(x_BCHW, weight, stride, padding)
    with torch.autocast("cpu", enabled=False):  # torch's own layers in bfloat16 are slower than these as they are
        return _Convolution.apply(x_BCHW, weight, stride, padding)


def norm_relu_pool(y_BCHW: Tensor, weight: Tensor, bias: Tensor, eps: float, window: int) -> Tensor:
    """Batch-norm by the statistics of ``y``, ReLU and max-pooling over windows of window × window (1: none)."""
    y_BCHW = y_BCHW.to(weight.dtype)  # torch.autocast may have rounded it
    if not _fusable(y_BCHW):
        if y_BCHW.is_cuda and _transformed():
            return batched.norm_relu_pool(y_BCHW, weight, bias, eps, window)
        out = F.batch_norm(y_BCHW, None, None, weight, bias, training=True, eps=eps)
        return F.relu(F.max_pool2d(out, window) if window > 1 else out)  # pooling first: less is left for the ReLU
    return _NormReLUPool.apply(y_BCHW, weight, bias, eps, window)


def _twice_at_most() -> None:
    """Refuses to be part of a graph, which the result would not really be part of."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "conv2d and norm_relu_pool can be differentiated twice, and a third derivative is asked for (a gradient of "
            "second order with create_graph=True); a network of torch's own layers has them"
        )


class _Convolution(Function):
    """y = C(x, w), linear in x and in w. With Cx and Cw its adjoints in x and w: dx = Cx(g, w), dw = Cw(g, x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = (stride, padding)
        return F.conv2d(x, w, stride=stride, padding=padding)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w = ctx.saved_tensors
        return *_ConvolutionBackward.apply(g, x, w, ctx.geometry, ctx.needs_input_grad[:2]), None, None


class _ConvolutionBackward(Function):
    """(g, x, w) to (dx, dw), each bilinear. With ax and aw what comes back for them:

    for g: C(ax, w) + C(x, aw);  for x: Cx(g, aw);  for w: Cw(g, ax).
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, geometry: tuple[int, int], wanted: tuple[bool, bool]) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return _adjoints(g, x, w, geometry, wanted)

    @staticmethod
    def backward(ctx: Any, ax: Tensor | None, aw: Tensor | None) -> Any:  # pyright: ignore
        _twice_at_most()
        g, x, w = ctx.saved_tensors
        stride, padding = ctx.geometry
        dg = None if ax is None else F.conv2d(ax, w, stride=stride, padding=padding)
        if aw is not None:
            term = F.conv2d(x, aw, stride=stride, padding=padding)
            dg = term if dg is None else dg.add_(term)
        wanted = ctx.needs_input_grad[1] and aw is not None, ctx.needs_input_grad[2] and ax is not None
        dx, dw = _adjoints(g, x if ax is None else ax, w if aw is None else aw, ctx.geometry, wanted)
        return dg, dx, dw, None, None


def _adjoints(
    g: Tensor, x: Tensor, w: Tensor, geometry: tuple[int, int], wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Cx(g, w) and Cw(g, x), each None where it is not wanted."""
    stride, padding = geometry
    g = g.contiguous(memory_format=torch.channels_last)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        g, x, w, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [*wanted, False]
    )
    return dx, dw


Array = NDArray[Any]


def _matrix(x_BCHW: Tensor) -> Array:
    """A row for each place, a column for each channel; a copy only where channels do not lie side by side."""
    x_BHWC = x_BCHW.detach().permute(0, 2, 3, 1)
    return x_BHWC.reshape(-1, x_BHWC.shape[3]).contiguous().numpy()


def _empty(like: Tensor, p: int = 1) -> tuple[Tensor, Array]:
    """An image tensor of the shape of ``like`` after pooling, and its memory as a matrix."""
    images, channels, height, width = like.shape
    x_BHWC = torch.empty((images, height // p, width // p, channels), dtype=like.dtype)
    return x_BHWC.permute(0, 3, 1, 2), x_BHWC.view(-1, channels).numpy()


class _NormReLUPool(Function):
    """out = max(|γ| q + β, 0), where q is the greatest s·x̂ of a window, s the sign of γ, and over the M places of y

    x̂ = (y − m) r,   m the mean of y,   r = (v + eps)^−1/2,   v the variance of y.

    With u the gradient of ``out`` at the chosen places where it is > 0, and 0 elsewhere, and

    J w = r (w − Σw/M − x̂ Σ(w x̂)/M),   the derivative of x̂ in y, which is symmetric:

    dy = γ J u,   dγ = Σ u x̂,   dβ = Σ u.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, gamma: Tensor, beta: Tensor, eps: float, window: int) -> Tensor:
        from distmeta.models import kernels  # Numba takes a while to load

        out, matrix = _empty(y, window)
        q, at = np.empty_like(matrix), np.empty(matrix.shape, np.uint8)
        images, _, *sides = y.shape
        shape, scale = (images, *sides, window), gamma.detach().numpy()
        statistics = kernels.forward(_matrix(y), scale, beta.detach().numpy(), eps, shape, q, at, matrix)
        ctx.save_for_backward(y, gamma)
        ctx.constants = (q, at, statistics, shape)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *_NormReLUPoolBackward.apply(g, *ctx.saved_tensors, ctx.constants), None, None


class _NormReLUPoolBackward(Function):
    """(g, y, γ) to (dy, dγ, dβ). With a, b and e what comes back for them, the gradient of

    φ = γ⟨a, J u⟩ + b Σ u x̂ + e Σ u

    is, with f = ⟨a, J u⟩, because J is symmetric and dr/dy = −r² x̂/M:

    for u: γ J a + b x̂ + e,   of which g gets what is at the chosen places where ``out`` > 0;
    for y: −(γ f r/M) x̂ − (γ r Σ(u x̂)/M) J a + (b − γ r Σ(a x̂)/M) J u;
    for γ: f.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, y: Tensor, gamma: Tensor, constants: tuple[Array, Array, Array, Any]) -> Any:
        from distmeta.models import kernels

        ctx.save_for_backward(g, y, gamma)
        ctx.constants = constants
        ctx.set_materialize_grads(False)
        dy, matrix = _empty(y)
        sums = kernels.gradient(_matrix(g), _matrix(y), gamma.detach().numpy(), *constants, matrix)
        return dy, *map(torch.from_numpy, sums)

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None, e: Tensor | None) -> Any:  # pyright: ignore
        from distmeta.models import kernels

        _twice_at_most()
        g, y, gamma = ctx.saved_tensors
        back = torch.zeros_like(y) if a is None else a
        on_gamma, on_beta = (torch.zeros_like(gamma) if t is None else t for t in (b, e))
        dg, dg_matrix = _empty(g)
        dy, dy_matrix = _empty(y)
        cotangents = _matrix(back), on_gamma.numpy(), on_beta.numpy()
        primals = _matrix(g), _matrix(y), gamma.detach().numpy()
        f = kernels.second(*cotangents, *primals, *ctx.constants, dg_matrix, dy_matrix)
        return dg, dy, torch.from_numpy(f), None
