"""Counter-based seeds: each task has its own random stream, named by where it stands in the run.

A stream is a Philox generator [1] whose 128-bit key is a hash of the name. No global generator is read or advanced,
so a task can be built at any time, on any worker, any number of times, and is the same.

[1] Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream(*name: int | str) -> np.random.Generator:
    """The random stream called ``name``, for example ``stream(seed, "train", outer_step, index)``."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in name)
    key = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def torch_seed(*name: int | str) -> int:
    """A 63-bit seed for a torch generator (model initialisation), from the stream called ``name``."""
    return int(stream(*name).integers(0, 2**63 - 1))
