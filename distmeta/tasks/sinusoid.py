"""Few-shot regression of sine waves: Finn, Abbeel and Levine, "Model-agnostic meta-learning for fast adaptation of deep
networks", ICML 2017, section 5.1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray

from distmeta.core.types import Batch, Episode, Split, TaskSpec
from distmeta.errors import ConfigError

_AMPLITUDE, _PHASE, _X = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)


@dataclass(eq=False)
class Sinusoid:
    """y = A sin(x - phase), with A from U[0.1, 5], phase from U[0, pi], and inputs x from U[-5, 5].

    The paper writes that a task is a sine wave of some amplitude and phase; x - phase is what its code computes. The
    three splits are the same distribution: their tasks differ because their random streams do.

    Raises:
        ConfigError: a field is out of range.
    """

    shots: Annotated[int, "Support points of each task (K)."] = 10
    queries: Annotated[int, "Query points of each task in meta-training."] = 10
    test_queries: Annotated[int, "Query points of each task in meta-validation and meta-testing."] = 100
    noise: Annotated[float, "Standard deviation of the noise on the support's targets; queries have none."] = 0.0

    def __post_init__(self) -> None:
        for key in ("shots", "queries", "test_queries"):
            if getattr(self, key) < 1:
                raise ConfigError(f"tasks.{key} is {getattr(self, key)}; it must be 1 or more")
        if not 0 <= self.noise < math.inf:
            raise ConfigError(f"tasks.noise is {self.noise}; it must be 0 or more, and finite")

    @property
    def spec(self) -> TaskSpec:
        """What a model is built for: one number in, one out, mean squared error."""
        return TaskSpec((1,), 1, "mse")

    def prepare(self) -> None:
        """Nothing is to be prepared."""

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        """Draws a sine wave: support (x, y) and query (x, y), each float32 [points, 1]."""
        queries = self.queries if split == "train" else self.test_queries
        amplitude, phase = rng.uniform(*_AMPLITUDE), rng.uniform(*_PHASE)
        x = rng.uniform(*_X, size=(self.shots + queries, 1))
        y = amplitude * np.sin(x - phase)
        y[: self.shots] += self.noise * rng.standard_normal((self.shots, 1))
        return Episode(_batch(x[: self.shots], y[: self.shots]), _batch(x[self.shots :], y[self.shots :]))


def _batch(x: NDArray[np.float64], y: NDArray[np.float64]) -> Batch:
    return torch.from_numpy(x).float(), torch.from_numpy(y).float()
