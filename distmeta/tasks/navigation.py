"""Navigation of a point in the plane: Finn, Abbeel and Levine, "Model-agnostic meta-learning for fast adaptation of
deep networks", ICML 2017, section 5.3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distmeta.core.types import Split
from distmeta.tasks.control import Control, Floats, Outcome, Spaces

_GOALS, _FASTEST, _NEAR = 0.5, 0.1, 0.01


@dataclass(eq=False)
class Navigation(Control):
    """A point moves from the origin to a goal that it is not told, drawn uniformly from [-0.5, 0.5]².

    The observation is its position, the action its velocity in units of 0.1, clipped to [-1, 1] in each direction. The
    reward is the negative distance to the goal, which is what the paper's code computes (the paper writes the squared
    distance) and what its curves show. An episode ends within 0.01 of the goal in both directions, or after 100 steps.

    The three splits are the same distribution: their goals differ because their random streams do.
    """

    @property
    def spaces(self) -> Spaces:
        """A position in, a velocity out."""
        return Spaces((2,), 2, "gaussian")

    def draw(self, rng: np.random.Generator, split: Split) -> Floats:
        """A goal (2,)."""
        return rng.uniform(-_GOALS, _GOALS, 2)

    def simulator(self, goal: Floats, episodes: int) -> Points:
        """All points at once."""
        return Points(episodes)

    def position(self, observation: Floats) -> Floats:
        """The observation itself."""
        return observation

    def goal_position(self, goal: Floats) -> Floats:
        """The goal itself."""
        return goal


class Points:
    """E points in the plane."""

    def __init__(self, points: int) -> None:
        self.points = points

    def reset(self, goal: Any, seeds: Sequence[int]) -> Floats:
        """All points at the origin; nothing is random."""
        self.goal, self.at = goal, np.zeros((self.points, 2))
        return self.at

    def step(self, action_EA: NDArray[Any]) -> Outcome:
        """Moves the points."""
        self.at = self.at + _FASTEST * np.clip(action_EA, -1, 1)
        away = self.at - self.goal
        near = (np.abs(away) < _NEAR).all(1)
        return Outcome(self.at, -np.linalg.norm(away, axis=1), near, np.zeros(self.points))
