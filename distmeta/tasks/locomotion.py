"""Locomotion: the tasks of Finn, Abbeel and Levine, "Model-agnostic meta-learning for fast adaptation of deep
networks", ICML 2017, section 5.3, on the robots of today's gymnasium, and any environment of gymnasium."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from distmeta.core.types import Split
from distmeta.errors import ConfigError, one_line, positive
from distmeta.tasks.control import Floats
from distmeta.tasks.gym_control import GymControl, before_mujoco


@dataclass(eq=False)
class Gym(GymControl):
    """One environment of gymnasium by its id, always with the same goal; the base of tasks of one's own.

    A subclass draws goals (`draw`), sets them (`apply`) and may change the reward (`judge`).

    Raises:
        ConfigError: The environment cannot be made, or gymnasium is missing.
    """

    env: Annotated[str, "id of a gymnasium environment"] = "CartPole-v1"

    def __post_init__(self) -> None:
        super().__post_init__()
        _gymnasium()

    def draw(self, rng: np.random.Generator, split: Split) -> Any:
        """There is but one task."""
        return None

    def make(self, name: str, **options: Any) -> Any:
        """See `GymControl.make`."""
        gymnasium = _gymnasium()
        try:
            return gymnasium.make(self.env, max_episode_steps=max(self.horizon, self.test_horizon or 0), **options)
        except Exception as error:  # gymnasium's own errors, and whatever the environment's constructor raises
            raise ConfigError(f"tasks.env: gymnasium cannot make {self.env!r}: {one_line(error)}") from error


@dataclass(eq=False)
class HalfCheetahDirection(Gym):
    """A two-legged robot runs forward or backward, as fast as it can: the reward is its velocity in the direction.

    Both directions are in all splits, as in the paper. Less the cost of control that gymnasium's HalfCheetah-v5 takes.
    """

    env: Annotated[str, "id of a gymnasium environment"] = "HalfCheetah-v5"
    horizon: Annotated[int, "time steps of an episode"] = 200

    def draw(self, rng: np.random.Generator, split: Split) -> float:
        """1, forward, or -1."""
        return float(rng.choice([-1.0, 1.0]))

    def groups_of(self, rng: np.random.Generator, split: Split) -> tuple[str, ...]:
        """The direction (see `distmeta.core.types.Grouped`)."""
        return (_direction(self.draw(rng, split)),)

    def judge(self, env: Any, goal: float, reward: float, info: dict[str, Any]) -> tuple[float, float]:
        """goal · velocity − cost of control."""
        return goal * info["x_velocity"] + info["reward_ctrl"], 0.0


@dataclass(eq=False)
class HalfCheetahVelocity(HalfCheetahDirection):
    """A two-legged robot runs at a velocity that it is not told, drawn uniformly from [0, 2].

    The reward is the negative absolute difference from that velocity, less the cost of control.
    """

    def draw(self, rng: np.random.Generator, split: Split) -> float:
        """The velocity."""
        return float(rng.uniform(0.0, 2.0))

    def groups_of(self, rng: np.random.Generator, split: Split) -> tuple[str, ...]:
        """None: velocities are many."""
        return ()

    def judge(self, env: Any, goal: float, reward: float, info: dict[str, Any]) -> tuple[float, float]:
        """−|velocity − goal| − cost of control."""
        return -abs(info["x_velocity"] - goal) + info["reward_ctrl"], 0.0


@dataclass(eq=False)
class Ant(Gym):
    """A four-legged robot: ``direction``, runs forward or backward; ``goal``, walks to a point of the plane.

    Goals are drawn uniformly from a disc of radius ``radius``; the reward is then the negative distance to the goal.
    Gymnasium's Ant-v5 adds its reward for being upright, and takes its costs of control and of contact; an episode ends
    when the robot falls.
    """

    env: Annotated[str, "id of a gymnasium environment"] = "Ant-v5"
    horizon: Annotated[int, "time steps of an episode"] = 200
    task: Annotated[Literal["direction", "goal"], "what is to be learned anew"] = "direction"
    radius: Annotated[float, "how far a goal may be from where the robot starts"] = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("tasks.radius", self.radius)

    def draw(self, rng: np.random.Generator, split: Split) -> Any:
        """1, forward, or -1; or a point (x, y)."""
        if self.task == "direction":
            return float(rng.choice([-1.0, 1.0]))
        angle, distance = rng.uniform(0, 2 * np.pi), self.radius * rng.uniform() ** 0.5
        return distance * np.array([np.cos(angle), np.sin(angle)])

    def groups_of(self, rng: np.random.Generator, split: Split) -> tuple[str, ...]:
        """The direction, where that is the task."""
        return (_direction(self.draw(rng, split)),) if self.task == "direction" else ()

    def judge(self, env: Any, goal: Any, reward: float, info: dict[str, Any]) -> tuple[float, float]:
        """The task's reward in the place of the velocity forward."""
        rest = reward - info["reward_forward"]
        if self.task == "direction":
            return goal * info["x_velocity"] + rest, 0.0
        at: Floats = np.array([info["x_position"], info["y_position"]])
        return -float(np.linalg.norm(at - goal)) + rest, 0.0


def _direction(goal: float) -> str:
    return "forward" if goal > 0 else "backward"


def _gymnasium() -> Any:
    before_mujoco()
    try:
        import gymnasium
    except ImportError as error:
        raise ConfigError(
            f"these tasks need the package gymnasium ({error}); install it with pip install 'distmeta[control]'"
        ) from error
    return gymnasium
