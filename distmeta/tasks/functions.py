"""Few-shot regression of functions of one number: what its families share, and four simple ones.

The families, with the sinusoids, are those of Vuorio, Sun, Hu and Lim, "Multimodal model-agnostic meta-learning via
task-aware modulation", NeurIPS 2019, section 5.1, whose tasks come from two, three or five of them (see
`distmeta.tasks.mixture`); ranges are those of its code (github.com/vuoristo/MMAML-Regression).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from distmeta.core.types import Batch, Episode, Split, TaskSpec
from distmeta.errors import ConfigError
from distmeta.tasks.sizes import Sizes, check_sizes, choices, draw

Function = Callable[[NDArray[np.float64]], NDArray[np.float64]]
_X = (-5.0, 5.0)


@dataclass(eq=False)
class FewShotFunction(ABC):
    """Points (x, f(x)) of a function f that is drawn for each task, with inputs x from U[-5, 5].

    The three splits are the same distribution: their tasks differ because their random streams do.

    Raises:
        ConfigError: a field is out of range.
    """

    shots: Annotated[Sizes, "Support points of each task (K); a list: each task draws one of them."] = 10
    queries: Annotated[int, "Query points of each task in meta-training."] = 10
    test_queries: Annotated[int, "Query points of each task in meta-validation and meta-testing."] = 100
    noise: Annotated[float, "Standard deviation of the noise on the support's targets; queries have none."] = 0.0

    def __post_init__(self) -> None:
        for key in ("shots", "queries", "test_queries"):
            check_sizes(f"tasks.{key}", getattr(self, key), 1)
        if not 0 <= self.noise < math.inf:
            raise ConfigError(f"tasks.noise is {self.noise}; it must be 0 or more, and finite")

    @abstractmethod
    def draw_function(self, rng: np.random.Generator) -> Function:
        """One function of the family."""

    @property
    def spec(self) -> TaskSpec:
        """What a model is built for: one number in, one out, mean squared error."""
        return TaskSpec((1,), 1, "mse")

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        """Draws a function: support (x, y) and query (x, y), each float32 [points, 1]."""
        shots, queries = draw(rng, self.shots), self.queries if split == "train" else self.test_queries
        function = self.draw_function(rng)
        x = rng.uniform(*_X, size=(shots + queries, 1))
        y = function(x)
        y[:shots] += self.noise * rng.standard_normal((shots, 1))
        return Episode(_batch(x[:shots], y[:shots]), _batch(x[shots:], y[shots:]))

    def groups_of(self, rng: np.random.Generator, split: Split) -> tuple[str, ...]:
        """The task's shots, where they are drawn: ``("10-shot",)``, or nothing."""
        return (f"{draw(rng, self.shots)}-shot",) if len(set(choices(self.shots))) > 1 else ()


@dataclass(eq=False)
class SimpleFunction(FewShotFunction):
    """Lines, parabolas, hyperbolic tangents or absolute values, as ``family`` says.

    - line: y = a x + b, with a, b from U[-3, 3]
    - parabola: y = a (x − c)² + b, with the size of a from U[0.02, 0.15], its sign at random, and b, c from U[-3, 3]
    - tanh: y = a tanh(x − c) + b, with a, b, c from U[-3, 3]
    - absolute: y = a |x − c| + b, with a, b, c from U[-3, 3]
    """

    family: Annotated[Literal["line", "parabola", "tanh", "absolute"], "line, parabola, tanh or absolute."] = "line"

    def draw_function(self, rng: np.random.Generator) -> Function:
        """One function of the family."""
        a, b, c = rng.uniform(-3.0, 3.0, 3)
        if self.family == "line":
            return lambda x: a * x + b
        if self.family == "tanh":
            return lambda x: a * np.tanh(x - c) + b
        if self.family == "absolute":
            return lambda x: a * np.abs(x - c) + b
        curvature = math.copysign(rng.uniform(0.02, 0.15), a)
        return lambda x: curvature * (x - c) ** 2 + b


def _batch(x: NDArray[np.float64], y: NDArray[np.float64]) -> Batch:
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y.astype(np.float32))
