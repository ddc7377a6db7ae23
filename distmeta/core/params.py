"""Parameters as one flat vector, the form in which they travel and are summed, and under unique names.

Law: the parameters that a computation reads are always copies in memory of their own, never views of a received
buffer: a write into the buffer would reach every process of the node, and a kernel may round otherwise on memory that
is aligned otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from distmeta.core.types import MetaParams, Params
from distmeta.errors import ConfigError


def join(meta: MetaParams) -> Params:
    """One dict of all meta-parameters, named ``model.*`` and ``extra.*``."""
    joined = {f"model.{name}": tensor for name, tensor in meta.model.items()}
    return joined | {f"extra.{name}": tensor for name, tensor in meta.extra.items()}


def split(joined: Params) -> MetaParams:
    """The inverse of `join`."""
    return MetaParams(
        {name[6:]: tensor for name, tensor in joined.items() if name.startswith("model.")},
        {name[6:]: tensor for name, tensor in joined.items() if name.startswith("extra.")},
    )


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in the flat vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, params: Params) -> Layout:
        """The layout of ``params``, in the dict's order.

        Raises:
            ConfigError: There are no parameters, or they are not all of one floating-point type.
        """
        dtypes = {tensor.dtype for tensor in params.values()}
        if len(dtypes) != 1:
            given = ", ".join(sorted(map(str, dtypes))) or "no parameter at all"
            raise ConfigError(f"the model's parameters must share one floating-point type; given: {given}")
        (dtype,) = dtypes
        if dtype not in (torch.float32, torch.float64):
            raise ConfigError(f"the model's parameters must be float32 or float64; given: {dtype}")
        return cls(tuple(params), tuple(tuple(tensor.shape) for tensor in params.values()), dtype)

    @property
    def size(self) -> int:
        """Number of scalars."""
        return sum(prod(shape) for shape in self.shapes)

    def zeros(self) -> np.ndarray:
        """The vector of nothing."""
        return torch.zeros(self.size, dtype=self.dtype).numpy()

    def pack(self, params: Params) -> np.ndarray:
        """One vector of all parameters, in host memory."""
        flat = torch.cat([params[name].detach().reshape(-1) for name in self.names])
        return flat.cpu().numpy()

    def unpack(self, vector: np.ndarray, device: torch.device | str = "cpu") -> Params:
        """The parameters, each copied out of ``vector`` into memory of its own.

        Raises:
            ValueError: The vector's length or type is not the layout's.
        """
        flat = torch.tensor(vector)
        if flat.dtype != self.dtype or flat.shape != (self.size,):
            raise ValueError(f"a vector of {self.size} {self.dtype} expected, {tuple(flat.shape)} {flat.dtype} given")
        pieces: tuple[Tensor, ...] = torch.split(flat.to(device), [prod(shape) for shape in self.shapes])
        return {
            name: piece.reshape(shape).clone()
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }
