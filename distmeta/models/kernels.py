"""Batch-norm, ReLU and max-pooling in two passes over memory: value, gradient, and the gradient's gradient.

In a convolutional network for few-shot learning the convolutions run near the processor's peak, while what stands
between them waits for memory: taken one by one, those layers read and write the largest activations a dozen times.
The three functions here do the work of `distmeta.models.fused.norm_relu_pool`, where their formulas are derived.

Numba compiles them at first use and keeps them on disk. Images are matrices: a row for each place (image, row,
column), a column for each channel, so that the processor's vectors run along channels. M is the number of places, and
``shape`` = (images, height, width, p): windows of p × p are pooled, 1 for none; what they leave over at the lower and
right edge counts in the statistics alone. ``at`` says which place of its window was chosen (p·row + column), p² where
the ReLU is off. Sums are taken in float64 in the order of memory, so that they depend on nothing but their inputs.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
from numba import njit  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray

Array = NDArray[Any]
Shape = tuple[int, int, int, int]


def _compiled(function: Any) -> Any:
    # A product may be fused with a sum; the order of sums is kept.
    options: Any = {"fastmath": {"contract"}, "error_model": "numpy", "nogil": True}
    try:
        return njit(**options, cache=True)(function)
    except RuntimeError:  # no folder can be written to, neither this one nor the user's cache
        return njit(**options)(function)


@_compiled
def forward(y: Array, gamma: Array, beta: Array, eps: float, shape: Shape, q: Array, at: Array, out: Array) -> Array:
    """Fills out = max(|γ| q + β, 0) and q, the greatest s·x̂ of each window; gives mean, 1/√(var + eps) and s."""
    images, height, width, p = shape
    places, channels = y.shape
    rows, columns = height // p, width // p
    statistics = np.zeros((3, channels))
    scale, shift, slope = np.empty_like(gamma), np.empty_like(gamma), np.empty_like(gamma)
    for r in range(places):
        for c in range(channels):
            value = np.float64(y[r, c])
            statistics[0, c] += value
            statistics[1, c] += value * value
    for c in range(channels):
        mean = statistics[0, c] / places
        variance = max(statistics[1, c] / places - mean * mean, 0.0)
        statistics[0, c], statistics[1, c] = mean, 1 / sqrt(variance + eps)
        statistics[2, c] = -1.0 if gamma[c] < 0 else 1.0
        scale[c], slope[c] = statistics[1, c] * statistics[2, c], abs(gamma[c])
        shift[c] = -mean * statistics[1, c] * statistics[2, c]
    none = np.uint8(p * p)
    for w in range(images * rows * columns):
        first = (w // columns // rows * height + w // columns % rows * p) * width + w % columns * p
        if p == 1:
            for c in range(channels):
                q[w, c] = y[w, c] * scale[c] + shift[c]
                z = q[w, c] * slope[c] + beta[c]
                at[w, c] = 0 if z > 0 else 1
                out[w, c] = z if z > 0 else z * 0  # NaN stays NaN
            continue
        for c in range(channels):
            q[w, c] = y[first, c] * scale[c] + shift[c]
            at[w, c] = 0
        for k in range(1, p * p):
            r, here = first + k // p * width + k % p, np.uint8(k)
            for c in range(channels):
                z = y[r, c] * scale[c] + shift[c]
                at[w, c] = here if z > q[w, c] else at[w, c]
                q[w, c] = z if z > q[w, c] else q[w, c]
        for c in range(channels):
            z = q[w, c] * slope[c] + beta[c]
            at[w, c] = at[w, c] if z > 0 else none
            out[w, c] = z if z > 0 else z * 0
    return statistics


@_compiled
def gradient(
    g: Array, y: Array, gamma: Array, q: Array, at: Array, statistics: Array, shape: Shape, dy: Array
) -> tuple[Array, Array]:
    """Fills dy = γ J u, with u the gradient ``g`` of ``out`` at the chosen places; gives dγ = Σ u x̂ and dβ = Σ u."""
    images, height, width, p = shape
    places, channels = y.shape
    rows, columns = height // p, width // p
    sum_u, sum_ux = np.zeros(channels), np.zeros(channels)
    none = np.uint8(p * p)
    for w in range(g.shape[0]):
        for c in range(channels):
            u = np.float64(g[w, c]) if at[w, c] < none else 0.0
            sum_u[c] += u
            sum_ux[c] += u * q[w, c]
    k0, ky, ku = np.empty_like(gamma), np.empty_like(gamma), np.empty_like(gamma)  # dy = k0 + ky y + ku u
    for c in range(channels):
        mean, rstd, sign = statistics[0, c], statistics[1, c], statistics[2, c]
        sum_ux[c] *= sign
        on_y = -gamma[c] * rstd * rstd * sum_ux[c] / places
        k0[c], ky[c], ku[c] = -gamma[c] * rstd * sum_u[c] / places - on_y * mean, on_y, gamma[c] * rstd
    for line in range(images * rows):
        for k in range(p * p):
            here, start = np.uint8(k), (line // rows * height + line % rows * p + k // p) * width + k % p
            for j in range(columns):
                w, r = line * columns + j, start + j * p
                for c in range(channels):
                    u = ku[c] * g[w, c]
                    dy[r, c] = k0[c] + ky[c] * y[r, c] + (u if at[w, c] == here else u * 0)
    for r in range(places):
        if r // width % height >= rows * p or r % width >= columns * p:
            for c in range(channels):
                dy[r, c] = k0[c] + ky[c] * y[r, c]
    return sum_ux.astype(gamma.dtype), sum_u.astype(gamma.dtype)


@_compiled
def second(
    a: Array, b: Array, e: Array, g: Array, y: Array, gamma: Array, q: Array, at: Array, statistics: Array,
    shape: Shape, dg: Array, dy: Array,
) -> Array:  # fmt: skip
    """The gradient of ⟨a, γ J u⟩ + b Σ u x̂ + e Σ u: fills ``dg`` and ``dy``, those in g and y, and gives that in γ."""
    images, height, width, p = shape
    places, channels = y.shape
    rows, columns = height // p, width // p
    sum_u, sum_ux, sum_ua = np.zeros(channels), np.zeros(channels), np.zeros(channels)
    sum_a, sum_ax, f = np.zeros(channels), np.zeros(channels), np.empty(channels)
    none = np.uint8(p * p)
    for r in range(places):
        for c in range(channels):
            value = np.float64(a[r, c])
            sum_a[c] += value
            sum_ax[c] += value * y[r, c]
    for w in range(g.shape[0]):
        for c in range(channels):
            u = np.float64(g[w, c]) if at[w, c] < none else 0.0
            sum_u[c] += u
            sum_ux[c] += u * q[w, c]
    for line in range(images * rows):
        for k in range(p * p):
            here, start = np.uint8(k), (line // rows * height + line % rows * p + k // p) * width + k % p
            for j in range(columns):
                w, r = line * columns + j, start + j * p
                for c in range(channels):
                    sum_ua[c] += np.float64(g[w, c]) * a[r, c] if at[w, c] == here else 0.0
    k0, ky, ka, ku = np.empty_like(gamma), np.empty_like(gamma), np.empty_like(gamma), np.empty_like(gamma)
    j0, jq, ja = np.empty_like(gamma), np.empty_like(gamma), np.empty_like(gamma)
    for c in range(channels):
        mean, rstd, sign = statistics[0, c], statistics[1, c], statistics[2, c]
        sum_ux[c] *= sign
        sum_ax[c] = (sum_ax[c] - mean * sum_a[c]) * rstd
        f[c] = rstd * (sum_ua[c] - sum_a[c] * sum_u[c] / places - sum_ax[c] * sum_ux[c] / places)
        k = gamma[c] * rstd
        # dg = j0 + jq q + ja a, from γ J a + b x̂ + e
        j0[c], jq[c], ja[c] = e[c] - k * sum_a[c] / places, sign * (b[c] - k * sum_ax[c] / places), k
        # dy = x x̂ + s J a + t J u, sorted into k0 + ky y + ka a + ku u
        s, t = -k * sum_ux[c] / places, b[c] - k * sum_ax[c] / places
        x = -k * f[c] / places - rstd * (s * sum_ax[c] + t * sum_ux[c]) / places
        ky[c], ka[c], ku[c] = x * rstd, s * rstd, t * rstd
        k0[c] = -rstd * (s * sum_a[c] + t * sum_u[c]) / places - x * rstd * mean
    for w in range(g.shape[0]):
        for c in range(channels):
            dg[w, c] = j0[c] + jq[c] * q[w, c]
            dg[w, c] = dg[w, c] if at[w, c] < none else dg[w, c] * 0
    for line in range(images * rows):
        for k in range(p * p):
            here, start = np.uint8(k), (line // rows * height + line % rows * p + k // p) * width + k % p
            for j in range(columns):
                w, r = line * columns + j, start + j * p
                for c in range(channels):
                    u, back = ku[c] * g[w, c], ja[c] * a[r, c]
                    dy[r, c] = k0[c] + ky[c] * y[r, c] + ka[c] * a[r, c] + (u if at[w, c] == here else u * 0)
                    dg[w, c] += back if at[w, c] == here else back * 0
    for r in range(places):
        if r // width % height >= rows * p or r % width >= columns * p:
            for c in range(channels):
                dy[r, c] = k0[c] + ky[c] * y[r, c] + ka[c] * a[r, c]
    return f.astype(gamma.dtype)
