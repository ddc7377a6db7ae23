"""Few-shot regression of sine waves: Finn, Abbeel and Levine, "Model-agnostic meta-learning for fast adaptation of deep
networks", ICML 2017, section 5.1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distmeta.tasks.functions import FewShotFunction, Function

_AMPLITUDE, _PHASE = (0.1, 5.0), (0.0, math.pi)


@dataclass(eq=False)
class Sinusoid(FewShotFunction):
    """y = A sin(x - phase), with A from U[0.1, 5], phase from U[0, pi], and inputs x from U[-5, 5].

    The paper writes that a task is a sine wave of some amplitude and phase; x - phase is what its code computes.
    """

    def draw_function(self, rng: np.random.Generator) -> Function:
        """A sine wave."""
        amplitude, phase = rng.uniform(*_AMPLITUDE), rng.uniform(*_PHASE)
        return lambda x: amplitude * np.sin(x - phase)
