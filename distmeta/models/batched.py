"""The layers of `distmeta.models.fused` for many tasks at once on a GPU, under ``torch.vmap``.

With weights of each task's own a convolution is a grouped one. On an H200 in single precision a meta-gradient made of
those took three times as long as one of products of matrices, task by task in one call, which convolutions are here.
All else is operations on single elements and sums, of which a compiler makes few passes over memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv2d(x_BCHW: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """The convolution of ``x`` with square ``weight`` (out, in, k, k), without bias.

    y[place, out] = Σ patches[place, (j, i, in)] · weight[(j, i, in), out], with a row of patches for each place of y.
    """
    out, channels, k, _ = weight.shape
    x_BHWC = F.pad(x_BCHW.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    for side in (1, 2):  # k shifted copies along the height beside each other, and k of those along the width
        places = (x_BHWC.shape[side] - k) // stride + 1
        ends = stride * (places - 1) + 1
        shifted = [x_BHWC.narrow(side, first, ends) for first in range(k)]
        x_BHWC = torch.cat([part[:, ::stride] if side == 1 else part[:, :, ::stride] for part in shifted], -1)
    images, height, width, _ = x_BHWC.shape
    y = x_BHWC.reshape(-1, k * k * channels) @ weight.permute(3, 2, 1, 0).reshape(k * k * channels, out)
    return y.reshape(images, height, width, out).permute(0, 3, 1, 2)


def norm_relu_pool(y_BCHW: Tensor, weight: Tensor, bias: Tensor, eps: float, window: int) -> Tensor:
    """Batch-norm by the statistics of ``y``, ReLU and max-pooling over windows of window × window (1: none).

    Of equal maxima the first one gets the gradient, as torch's own pooling has it.
    """
    centred = y_BCHW - y_BCHW.mean((0, 2, 3), keepdim=True)
    variance = centred.square().mean((0, 2, 3), keepdim=True)
    out = centred * ((variance + eps).rsqrt() * weight[:, None, None]) + bias[:, None, None]
    height, width = (side // window * window for side in out.shape[2:])
    first, *others = (out[:, :, i:height:window, j:width:window] for i in range(window) for j in range(window))
    for other in others:
        first = torch.where(other > first, other, first)
    return F.relu(first)
