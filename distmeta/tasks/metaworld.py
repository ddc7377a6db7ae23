"""Meta-World's benchmarks for meta-learning: Yu et al., "Meta-World: a benchmark and evaluation for multi-task and meta
reinforcement learning", CoRL 2019."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distmeta.core.types import Split
from distmeta.errors import ConfigError, at_least, nearest
from distmeta.tasks.control import Floats
from distmeta.tasks.gym_control import GymControl, before_mujoco

LARGE = ("ML10", "ML25", "ML45")
LONGEST = 500  # time steps of an episode


class Goal(NamedTuple):
    """One of the tasks that Meta-World draws: where the object starts and where it, or the hand, is to go."""

    environment: str
    vector: tuple[float, ...]


@dataclass(eq=False)
class MetaWorld(GymControl):
    """A robot arm that reaches, pushes, grasps, opens and closes: Meta-World's ML1, ML10, ML25 and ML45.

    ``benchmark`` is ``ML1-`` and the name of an environment (``ML1-reach``), for unseen goals of one skill, or
    ``ML10``, ``ML25``, ``ML45``, for unseen skills. Training and test tasks are those of Meta-World's own classes, 50
    goals for each environment, drawn with ``benchmark_seed``; validation has 50 goals of its own for the environments
    of training. As Meta-World has it for meta-learning, an observation hides the goal; an episode takes ``horizon``
    steps whatever happens, and has succeeded if its goal was reached at any of them. Observations are Meta-World's 39
    numbers, actions the displacement of the hand and the force of the fingers, each in [-1, 1].

    Raises:
        ConfigError: There is no such benchmark, a setting is out of range, or the package metaworld is missing.
    """

    episodes: Annotated[int, "episodes that each inner step, and the query set, are sampled from"] = 10
    horizon: Annotated[int, "time steps of an episode, at most 500"] = 500
    benchmark: Annotated[str, "ML1-<environment>, ML10, ML25 or ML45"] = "ML1-reach"
    benchmark_seed: Annotated[int, "of Meta-World's draw of goals"] = 0

    measures_success = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("tasks.benchmark_seed", self.benchmark_seed, 0)
        if max(self.horizon, self.test_horizon or 0) > LONGEST:
            raise ConfigError(
                f"tasks.horizon and tasks.test_horizon can be at most {LONGEST}, the length of Meta-World's episodes"
            )
        metaworld = package()
        self._goals: dict[Split, list[Goal]] = {}
        if self.benchmark in LARGE:
            return
        kind, _, skill = self.benchmark.partition("-")
        known = [name.removesuffix("-v3") for name in metaworld.ML1.ENV_NAMES]
        if kind != "ML1" or skill.removesuffix("-v3") not in known:
            names = [*LARGE, *(f"ML1-{name}" for name in known)]
            raise ConfigError(
                f"tasks.benchmark: Meta-World has no {self.benchmark!r}{nearest(self.benchmark, names)}; there are "
                f"{', '.join(LARGE)}, and ML1- with one of {', '.join(known)}"
            )

    def goals(self, split: Split) -> list[Goal]:
        """The tasks of ``split``."""
        if split not in self._goals:
            metaworld = package()
            seed = self.benchmark_seed + (2 if split == "val" else 0)  # ML1 draws its test goals with the next seed
            if self.benchmark in LARGE:
                made = getattr(metaworld, self.benchmark)(seed=seed)
            else:
                made = metaworld.ML1(_full(self.benchmark.partition("-")[2]), seed=seed)
            if split != "val":
                self._goals["train"], self._goals["test"] = _read(made.train_tasks), _read(made.test_tasks)
            else:
                self._goals["val"] = _read(made.train_tasks)
        return self._goals[split]

    def draw(self, rng: np.random.Generator, split: Split) -> Goal:
        """One of the tasks of ``split``."""
        goals = self.goals(split)
        return goals[int(rng.integers(len(goals)))]

    def first_name(self) -> str:
        """See `GymControl.first_name`."""
        return "reach-v3" if self.benchmark in LARGE else _full(self.benchmark.partition("-")[2])

    def name(self, goal: Goal) -> str:
        """See `GymControl.name`."""
        return goal.environment

    def make(self, name: str, **options: Any) -> Any:
        """See `GymControl.make`."""
        return package().env_dict.ALL_V3_ENVIRONMENTS[name](**options)

    @property
    def camera(self) -> dict[str, Any]:
        """See `GymControl.camera`."""
        return super().camera | {"camera_name": "corner2", "width": 320, "height": 320}

    def frame(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Turned: Meta-World's cameras stand on their heads."""
        return picture[::-1, ::-1]

    def apply(self, env: Any, goal: Goal) -> None:
        """Sets one of Meta-World's tasks."""
        settings = {"rand_vec": np.array(goal.vector), "env_cls": type(env), "partially_observable": True}
        env.set_task(package().Task(env_name=goal.environment, data=pickle.dumps(settings)))

    def judge(self, env: Any, goal: Goal, reward: float, info: dict[str, Any]) -> tuple[float, float]:
        """Meta-World's reward, and its success."""
        return reward, float(info["success"])

    def position(self, observation: Floats) -> Floats:
        """The hand, seen from above."""
        return observation[..., :2]

    def goal_position(self, goal: Goal) -> Floats:
        """Where the hand or the object is to go, seen from above."""
        return np.array(goal.vector[-3:-1])


def _full(skill: str) -> str:
    return skill if skill.endswith("-v3") else f"{skill}-v3"


def _read(tasks: list[Any]) -> list[Goal]:
    """Meta-World's tasks as plain data; they hold pickles that it has made in this very process."""
    return [Goal(task.env_name, tuple(map(float, pickle.loads(task.data)["rand_vec"]))) for task in tasks]


def package() -> ModuleType:
    """The package metaworld.

    Raises:
        ConfigError: It is not installed.
    """
    before_mujoco()
    try:
        import metaworld
    except ImportError as error:
        raise ConfigError(
            f"tasks metaworld need the package metaworld ({error}); install it with pip install 'distmeta[control]'"
        ) from error
    return metaworld
