"""Counter-based seeds: each task has its own random stream, named by where it stands in the run.

A stream is a Philox generator [1] whose 128-bit key is a hash of the name. No global generator is read or advanced,
so a task can be built at any time, on any worker, any number of times, and is the same.

[1] Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray


def stream(*name: int | str) -> np.random.Generator:
    """The random stream called ``name``, for example ``stream(seed, "train", outer_step, index)``."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in name)
    key = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(_Key(key)))  # pyright: ignore[reportArgumentType]


def torch_seed(*name: int | str) -> int:
    """A 63-bit seed for a torch generator (model initialisation), from the stream called ``name``."""
    return int(stream(*name).integers(0, 2**63 - 1))


class _Key(ISeedSequence):
    """Gives a generator its key. With ``Philox(key=…)`` NumPy also asks the system for a seed that it does not use,
    which takes longer than all else here."""

    def __init__(self, key: NDArray[np.uint64]) -> None:
        self.key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[np.uint64]:
        """The key: two words of 64 bits are what Philox asks for."""
        return self.key
