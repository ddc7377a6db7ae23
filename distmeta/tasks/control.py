"""Tasks of control: an environment, a goal, and data that are sampled with whatever policy is asked about.

An environment of one's own is a subclass of `Control` (any simulator that steps several copies at once) or of
`distmeta.tasks.gym_control.GymControl` (a gymnasium environment) that says how goals are drawn.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distmeta.core.policy import ActionSpec, Estimator, Kind, PolicyLoss, Rollouts, advantages
from distmeta.core.seeds import stream
from distmeta.core.types import Params, Split, TaskSpec
from distmeta.errors import (
    ConfigError,
    DataError,
    DistmetaError,
    NumericalError,
    WorkerError,
    at_least,
    one_line,
    positive,
)
from distmeta.tasks.watchdog import Hung, Watchdog

Floats = NDArray[np.floating[Any]]


class Outcome(NamedTuple):
    """What one step has brought to each of the E episodes."""

    observation_EO: Floats
    reward_E: Floats
    ended_E: NDArray[np.bool_]
    """Whether the episode is over, before its time was up."""
    success_E: Floats
    """1 where the goal is reached; zeros where the tasks do not say."""


class Spaces(NamedTuple):
    """What a policy sees and does."""

    observation: tuple[int, ...]
    """The shape of an observation: (O,)."""
    actions: int
    """How many numbers an action has, or how many actions there are."""
    kind: Kind


class Simulator(Protocol):
    """E copies of an environment that are stepped together, in one process and with no state but that of `reset`."""

    def reset(self, goal: Any, seeds: Sequence[int]) -> Floats:
        """Begins E episodes of the task ``goal``; the first observations (E, O)."""
        ...

    def step(self, action_EA: NDArray[Any]) -> Outcome:
        """One step of every episode, also of those that are over, whose outcome is ignored."""
        ...


@dataclass(eq=False)
class Control(ABC):
    """A distribution over control tasks.

    A subclass gives `spaces`, `draw` and `simulator`, and may change `measures_success` and the two positions.

    Raises:
        ConfigError: A setting is out of range.
    """

    episodes: Annotated[int, "episodes that each inner step, and the query set, are sampled from"] = 20
    horizon: Annotated[int, "time steps of an episode in meta-training"] = 100
    test_episodes: Annotated[int | None, "episodes in validation, evaluation and adaptation; null: episodes"] = None
    test_horizon: Annotated[int | None, "time steps in validation, evaluation and adaptation; null: horizon"] = None
    discount: Annotated[float, "gamma, by which later rewards count less"] = 0.99
    gae_lambda: Annotated[float, "lambda of generalised advantage estimation; 1: returns less their baseline"] = 1.0
    estimator: Annotated[Estimator, "of the policy gradient's derivative: lvc, dice or log (see PolicyLoss)"] = "lvc"
    step_timeout: Annotated[float | None, "seconds in one step or reset after which it hangs; null: never"] = 60.0

    measures_success = False
    """Whether an episode can succeed; it has if its goal was reached at any step."""

    def __post_init__(self) -> None:
        for key in ("episodes", "horizon", "test_episodes", "test_horizon"):
            if getattr(self, key) is not None:
                at_least(f"tasks.{key}", getattr(self, key), 1)
        for key in ("discount", "gae_lambda"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"tasks.{key} must be between 0 and 1; given: {getattr(self, key)}")
        if self.step_timeout is not None:
            positive("tasks.step_timeout", self.step_timeout)
        self._policy: PolicyLoss | None = None

    @property
    @abstractmethod
    def spaces(self) -> Spaces:
        """What a policy sees and does."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, split: Split) -> Any:
        """A goal of ``split``, as plain data or arrays."""

    @abstractmethod
    def simulator(self, goal: Any, episodes: int) -> Simulator:
        """``episodes`` copies of the environment for ``goal``; called for every sampling, so it should keep them."""

    def forget(self, goal: Any) -> None:
        """Drops the environments of ``goal``, one of which has failed and may be in any state; here there are none."""
        return

    def size(self, split: Split) -> tuple[int, int]:
        """Episodes of each set of a task of ``split``, and the most time steps of each: E and T."""
        if split == "train":
            return self.episodes, self.horizon
        return self.test_episodes or self.episodes, self.test_horizon or self.horizon

    def film(self, goal: Any, seed: int, action_TA: NDArray[Any], every: int) -> list[NDArray[np.uint8]]:
        """Pictures of an episode of ``goal`` that begins with ``seed`` and goes on with ``action_TA``.

        Raises:
            ConfigError: The environment makes no pictures, or there is nothing to render with.
        """
        raise ConfigError(f"the environment {type(self).__name__} makes no pictures: leave out the film")

    def position(self, observation: Floats) -> Floats | None:
        """Where in the plane (…, 2) the observations (…, O) are, for pictures; None: nowhere."""
        return None

    def goal_position(self, goal: Any) -> Floats | None:
        """Where in the plane the goal is, for pictures; None: nowhere."""
        return None

    @property
    def spec(self) -> TaskSpec:
        """Observations in, parameters of a distribution over actions out."""
        scores = ("return", "success") if self.measures_success else ("return",)
        shape, actions, kind = self.spaces
        return TaskSpec(shape, actions, ActionSpec(kind, actions, scores, self.estimator), metric=scores[-1])

    def bind(self, policy: PolicyLoss) -> None:
        """Tells the tasks with which policy they are sampled."""
        self._policy = policy

    def sample(self, rng: np.random.Generator, split: Split) -> ControlTask:
        """Draws a goal, and the name of the random streams of all that will be sampled for it."""
        if self._policy is None:
            raise ConfigError("tasks of control are sampled with a policy: call bind(policy) first")
        return ControlTask(self, self._policy, self.draw(rng, split), int(rng.integers(2**62)), *self.size(split))


class ControlTask:
    """One goal. Both sets are pure functions of the policy's parameters: each has random streams of its own.

    The query set has the same streams at whatever parameters, so that policies are compared on the same luck.
    """

    def __init__(self, tasks: Control, policy: PolicyLoss, goal: Any, key: int, episodes: int, horizon: int) -> None:
        self.tasks, self.policy, self.goal, self.key = tasks, policy, goal, key
        self.episodes, self.horizon = episodes, horizon
        self.seconds = {"environment": 0.0, "policy": 0.0}

    def support(self, params: Params, inner_step: int) -> Rollouts:
        """Episodes sampled with the policy at hand."""
        return self.rollouts(params, "support", inner_step)

    def query(self, params: Params) -> Rollouts:
        """Episodes sampled with the adapted policy."""
        return self.rollouts(params, "query", 0)

    def rollouts(self, params: Params, name: str, number: int) -> Rollouts:
        """Samples the episodes of the stream ``name``, ``number``.

        Raises:
            WorkerError: The environment raised, or hangs.
            DataError: An observation or a reward is not finite.
            NumericalError: What the policy puts out is not finite.
        """
        try:
            with Watchdog(self.tasks.step_timeout) as watchdog:
                return self._rollouts(watchdog, params, name, number)
        except BaseException:
            self.tasks.forget(self.goal)
            raise

    @torch.no_grad()
    def _rollouts(self, watchdog: Watchdog, params: Params, name: str, number: int) -> Rollouts:
        tasks, kind = self.tasks, self.policy.actions
        first = next(iter(params.values()))
        device, dtype, policy = first.device, first.dtype, self.policy.at(params)
        rng, seeds = self._stream(name, number)
        noise = torch.from_numpy(kind.noise(rng, (self.horizon, self.episodes), tasks.spaces.actions)).to(device, dtype)
        simulator = tasks.simulator(self.goal, self.episodes)
        observation = self._stepped(watchdog, lambda: simulator.reset(self.goal, seeds))
        alive = np.ones(self.episodes, bool)
        self._check("first observation", observation[None], alive[None])
        decisions: list[tuple[Tensor, Tensor, Tensor]] = []
        outcomes: list[Outcome] = []
        valid: list[NDArray[np.bool_]] = []
        # All that can wait until the end is done there, for all steps at once.
        for t in range(self.horizon):
            start = time.perf_counter()
            seen = torch.from_numpy(observation).to(device, dtype)
            output = policy(seen)
            if not bool(output.sum().isfinite()):
                self._check_all(outcomes, valid)
                raise NumericalError(
                    f"what the policy puts out is not finite in step {t}, {self._where()}: its adaptation "
                    "diverges; lower algorithm.inner_lr"
                )
            action = kind.act(output, noise[t])
            self.seconds["policy"] += time.perf_counter() - start
            outcome = self._stepped(watchdog, lambda a=action: simulator.step(a.cpu().numpy()))
            outcome = Outcome(*map(np.array, outcome))  # a simulator may fill the same arrays in each step
            decisions.append((seen, action, output))
            outcomes.append(outcome)
            valid.append(alive)
            alive = alive & ~outcome.ended_E
            observation = outcome.observation_EO
            if not alive.all():
                observation = np.where(alive[:, None], observation, 0.0)
                if not alive.any():
                    break
        self._check_all(outcomes, valid)
        valid_ET = np.stack(valid, 1)
        of_valid = lambda values: torch.from_numpy(np.where(valid_ET, np.stack(values, 1), 0.0))  # noqa: E731
        reward_ET = of_valid([outcome.reward_E for outcome in outcomes]).double()
        success_E = of_valid([outcome.success_E for outcome in outcomes]).double().amax(1)
        observation_ETO, action_ETA, output_ETP = (torch.stack(each, 1) for each in zip(*decisions, strict=True))
        was_valid_ET = torch.from_numpy(valid_ET.astype(np.float64))
        advantage_ET = advantages(
            observation_ETO.cpu(), reward_ET, was_valid_ET, discount=tasks.discount, gae_lambda=tasks.gae_lambda
        )
        scores = [reward_ET.sum(1), success_E][: 1 + tasks.measures_success]
        return Rollouts(
            observation_ETO,
            action_ETA,
            output_ETP,
            advantage_ET.to(device, dtype),
            was_valid_ET.to(device, dtype),
            torch.stack(scores, 1).to(device, dtype),
        )

    def _stream(self, name: str, number: int) -> tuple[np.random.Generator, list[int]]:
        """The stream of one sampling, and the seeds of its episodes, which are drawn from it first."""
        rng = stream(self.key, name, number)
        return rng, [int(seed) for seed in rng.integers(2**31, size=self.episodes)]

    def film(self, query: Rollouts, every: int = 4) -> list[NDArray[np.uint8]]:
        """Pictures (H, W, 3) of the first episode of a query set that this task has sampled, each ``every`` steps.

        Raises:
            ConfigError: The environment makes no pictures, or there is nothing to render with.
        """
        _, seeds = self._stream("query", 0)
        actions = query.action_ETA[0, : int(query.valid_ET[0].sum())].cpu().numpy()
        return self.tasks.film(self.goal, seeds[0], actions, every)

    def _stepped(self, watchdog: Watchdog, call: Callable[[], Any]) -> Any:
        """What the simulator gives, its time counted and limited, and its exceptions named."""
        start = time.perf_counter()
        try:
            return watchdog.call(call)
        except DistmetaError:
            raise
        except Hung as error:
            raise WorkerError(
                f"the environment {type(self.tasks).__name__} hangs {self._where()}: one step of its {self.episodes} "
                f"copies has taken more than {watchdog.limit:g} s; if it is merely slow, raise tasks.step_timeout"
            ) from error
        except Exception as error:
            raise WorkerError(
                f"the environment {type(self.tasks).__name__} raised {type(error).__name__} {self._where()}: "
                f"{one_line(error)}"
            ) from error
        finally:
            self.seconds["environment"] += time.perf_counter() - start

    def _check_all(self, outcomes: Sequence[Outcome], valid: Sequence[NDArray[np.bool_]]) -> None:
        """Whether the simulator has given nothing but finite numbers."""
        if outcomes:
            valid_TE = np.stack(valid)
            self._check("observation", np.stack([outcome.observation_EO for outcome in outcomes]), valid_TE)
            self._check("reward", np.stack([outcome.reward_E for outcome in outcomes]), valid_TE)

    def _check(self, what: str, values_TE: Floats, valid_TE: NDArray[np.bool_]) -> None:
        bad_TE = ~np.isfinite(values_TE).reshape(*valid_TE.shape, -1).all(axis=2) & valid_TE
        if bad_TE.any():
            t, episode = np.argwhere(bad_TE)[0]
            raise DataError(
                f"the {what} of the environment {type(self.tasks).__name__} is not finite in episode {episode}, step "
                f"{t}, {self._where()}"
            )

    def _where(self) -> str:
        goal = " ".join(str(self.goal).split())[:100]
        return f"at the goal {goal} (streams of {self.key})"
