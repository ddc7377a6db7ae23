"""Tasks that take a while, so that faults find workers at work."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distmeta.core.types import Episode, Split
from distmeta.tasks.sinusoid import Sinusoid

PAUSE = "DISTMETA_CHAOS_PAUSE"
"""Names the file that says how many seconds a training task takes longer; no file, no longer."""


@dataclass(eq=False)
class Dawdling(Sinusoid):
    """Sinusoids that come late."""

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        file = Path(os.environ.get(PAUSE, "/nonexistent"))
        if split == "train" and file.exists():
            time.sleep(float(file.read_text() or 0))
        return super().sample(rng, split)
