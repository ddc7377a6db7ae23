"""Tasks of control on gymnasium's environments: several copies of one, stepped in one process."""

from __future__ import annotations

import importlib.util
import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distmeta.errors import ConfigError, DistmetaError, one_line
from distmeta.tasks.control import Control, Floats, Outcome, Spaces


def before_mujoco() -> None:
    """To be called before MuJoCo is imported.

    Mesa's software renderer (MUJOCO_GL=osmesa) and triton, which torch imports when it needs it, each bring LLVM; the
    process crashes where Mesa's is loaded first.
    """
    if os.environ.get("MUJOCO_GL") == "osmesa" and importlib.util.find_spec("triton"):
        importlib.import_module("triton")


class GymCopies:
    """E copies of a gymnasium environment, stepped one after the other; actions are clipped to what it takes.

    Args:
        tasks: Who sets goals and judges steps.
        copies: The environments.
    """

    def __init__(self, tasks: GymControl, copies: Sequence[Any]) -> None:
        self.tasks, self.copies = tasks, copies
        space = copies[0].action_space
        self._low, self._high = getattr(space, "low", None), getattr(space, "high", None)
        self._start = int(getattr(space, "start", 0))

    def reset(self, goal: Any, seeds: Sequence[int]) -> Floats:
        """See `Simulator.reset`."""
        self._goal = goal
        first = []
        for env, seed in zip(self.copies, seeds, strict=True):
            self.tasks.apply(env, goal)
            first.append(env.reset(seed=seed)[0])
        self._last = np.stack(first)
        self._over = np.zeros(len(self.copies), bool)
        return self._last

    def step(self, action_EA: NDArray[Any]) -> Outcome:
        """See `Simulator.step`."""
        observation, reward, success = self._last.copy(), np.zeros(len(self.copies)), np.zeros(len(self.copies))
        if self._low is None:
            taken = (action_EA[:, 0] + self._start).tolist()
        else:
            taken = np.clip(action_EA, self._low, self._high)
        for e, env in enumerate(self.copies):
            if self._over[e]:
                continue
            observation[e], given, terminated, truncated, info = env.step(taken[e])
            reward[e], success[e] = self.tasks.judge(env, self._goal, float(given), info)
            self._over[e] = terminated or truncated
        self._last = observation
        return Outcome(observation, reward, self._over.copy(), success)


@dataclass(eq=False)
class GymControl(Control):
    """Tasks made of one gymnasium environment; a subclass says how goals are drawn, set and judged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._made: dict[str, list[Any]] = {}
        self._spaces: Spaces | None = None

    def forget(self, goal: Any) -> None:
        """See `Control.forget`."""
        self._made.pop(self.name(goal), None)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": {}}  # environments are made anew where they are used

    @abstractmethod
    def make(self, name: str, **options: Any) -> Any:
        """A new environment called ``name``, with ``options`` such as gymnasium's ``render_mode``."""

    def name(self, goal: Any) -> str:
        """Which environment ``goal`` is a task of, where there are several."""
        return ""

    def apply(self, env: Any, goal: Any) -> None:
        """Sets the goal of an environment, before it is reset; nothing is to be done where `judge` knows the goal."""

    def judge(self, env: Any, goal: Any, reward: float, info: dict[str, Any]) -> tuple[float, float]:
        """The reward for ``goal`` and 1 where it is reached, from what the environment's step has given."""
        return reward, float(info.get("success", 0.0))

    def simulator(self, goal: Any, episodes: int) -> GymCopies:
        """See `Control.simulator`."""
        name = self.name(goal)
        made = self._made.setdefault(name, [])
        made += [self.make(name) for _ in range(episodes - len(made))]
        return GymCopies(self, made[:episodes])

    def film(self, goal: Any, seed: int, action_TA: NDArray[Any], every: int) -> list[NDArray[np.uint8]]:
        """See `Control.film`; the episode is stepped through once more in an environment that makes pictures."""
        try:
            env = self.make(self.name(goal), **self.camera)
            simulator, frames = GymCopies(self, [env]), list[NDArray[np.uint8]]()
            simulator.reset(goal, [seed])
            for t, action in enumerate(action_TA):
                if t % every == 0:
                    frames.append(self.frame(env.render()))
                simulator.step(action[None])
            env.close()
        except DistmetaError:
            raise
        except Exception as error:  # whatever the renderer raises where there is no display
            raise ConfigError(
                f"the film cannot be rendered ({type(error).__name__}: {one_line(error)}). Without a display, set "
                "MUJOCO_GL=egl (a GPU) or MUJOCO_GL=osmesa (Debian's package libosmesa6)"
            ) from error
        return frames

    @property
    def camera(self) -> dict[str, Any]:
        """Options of an environment that makes pictures."""
        return {"render_mode": "rgb_array"}

    def frame(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A picture as people are to see it."""
        return picture

    def first_name(self) -> str:
        """The name of one of the environments: all of them have the same observations and actions."""
        return ""

    @property
    def spaces(self) -> Spaces:
        """Those of an environment that is made for the purpose.

        Raises:
            ConfigError: Observations are no vectors, or actions neither vectors nor one of several.
        """
        if self._spaces is None:
            from gymnasium import spaces  # there, where an environment of it is

            env = self.make(self.first_name())
            seen, acts = env.observation_space, env.action_space
            if not isinstance(seen, spaces.Box) or len(seen.shape) != 1:
                raise ConfigError(f"tasks: observations must be vectors; the environment gives {seen}")
            if isinstance(acts, spaces.Discrete):
                self._spaces = Spaces(tuple(seen.shape), int(acts.n), "categorical")
            elif isinstance(acts, spaces.Box) and len(acts.shape) == 1:
                self._spaces = Spaces(tuple(seen.shape), int(acts.shape[0]), "gaussian")
            else:
                raise ConfigError(f"tasks: actions must be vectors or one of several; the environment takes {acts}")
            env.close()
        return self._spaces
