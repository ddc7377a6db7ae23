"""The simulators behind tasks of control: theirs are the goals and the rewards, and ours say which has failed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from problems import relative_error
from test_control import data_of, problem_with

from distmeta import MAML
from distmeta.core.params import split
from distmeta.core.policy import Rollouts
from distmeta.distributed.work import Shard
from distmeta.errors import DataError, WorkerError
from distmeta.tasks.control import Outcome
from distmeta.tasks.locomotion import Ant, Gym, HalfCheetahDirection, HalfCheetahVelocity
from distmeta.tasks.metaworld import MetaWorld
from distmeta.tasks.navigation import Navigation, Points


class Broken(Points):
    def __init__(self, points: int, how: str) -> None:
        super().__init__(points)
        self.how = how

    def step(self, action_EA: np.ndarray) -> Outcome:
        outcome = super().step(action_EA)
        if self.how == "raises":
            raise RuntimeError("the arm fell off")
        if self.how == "reward":
            outcome.reward_E[1] = np.nan
        else:
            outcome.observation_EO[2, 0] = np.inf
        return outcome


class BrokenNavigation(Navigation):
    how = ""

    def simulator(self, goal: Any, episodes: int) -> Broken:
        return Broken(episodes, self.how)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("raises", WorkerError, r"BrokenNavigation raised RuntimeError at the goal \[.*\] \(streams of \d+\): the arm"),
        ("reward", DataError, r"reward of the environment BrokenNavigation is not finite in episode 1, step 0, at the"),
        ("observation", DataError, "observation of the environment BrokenNavigation is not finite in episode 2, step"),
    ],
)
def test_a_broken_environment_is_named(how: str, kind: type, message: str) -> None:
    tasks = BrokenNavigation(episodes=4, horizon=6)
    tasks.how = how
    problem, theta = problem_with(tasks, MAML())
    with pytest.raises(kind, match=message):
        problem.run("meta_gradient", theta, Shard("train", 0, 0, 1))


@pytest.mark.parametrize("kind", [HalfCheetahDirection, HalfCheetahVelocity, Ant, Gym])
def test_robots_of_gymnasium_are_sampled_the_same_with_used_environments(kind: type) -> None:
    problem, theta = problem_with(kind(episodes=2, horizon=5), MAML())
    first = data_of(problem, theta)
    data_of(problem, theta, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, data_of(problem, theta), strict=True))


def test_goals_make_the_reward() -> None:
    """The same movements are worth the opposite in the other direction, but for the cost of control."""
    tasks = HalfCheetahDirection(episodes=1, horizon=5)
    simulator, rewards = tasks.simulator(1.0, 1), {}
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 1, 6))
    for goal in (1.0, -1.0):
        simulator.reset(goal, [7])
        rewards[goal] = np.array([simulator.step(action).reward_E[0] for action in actions])
    cost = 0.1 * (actions**2).sum((1, 2))
    assert relative_error(rewards[1.0] + cost, -(rewards[-1.0] + cost)) < 1e-6


@pytest.mark.parametrize(
    ("tasks", "names"),
    [
        (HalfCheetahDirection(), {"forward": 1.0, "backward": -1.0}),
        (Ant(), {"forward": 1.0, "backward": -1.0}),
        (HalfCheetahVelocity(), {}),
        (Ant(task="goal"), {}),
    ],
)
def test_directions_are_told_apart(tasks: Any, names: dict[str, float]) -> None:
    problem, _ = problem_with(tasks, MAML())
    shard = Shard("test", 0, 0, 12)
    groups = problem.groups([shard])
    assert {name for one in groups for name in one} == set(names)
    assert not names or [task.goal for task in problem.build(shard)] == [names[name] for (name,) in groups]


class TestMetaWorld:
    def test_tasks_are_those_of_the_benchmark(self) -> None:
        import metaworld

        tasks = MetaWorld(benchmark="ML1-push", benchmark_seed=3)
        theirs = metaworld.ML1("push-v3", seed=3)
        goals = {split: {goal.vector for goal in tasks.goals(split)} for split in ("train", "val", "test")}
        assert all(len(each) == 50 for each in goals.values())
        assert not goals["train"] & goals["test"]
        assert not goals["train"] & goals["val"]
        assert not goals["val"] & goals["test"]
        env = theirs.test_classes["push-v3"]()
        for task in theirs.test_tasks[:5]:
            env.set_task(task)
            env.reset()
            assert tuple(env._last_rand_vec) in goals["test"]

    def test_the_goal_is_hidden_and_used_environments_are_as_new(self) -> None:
        tasks = MetaWorld(benchmark="ML1-push", episodes=2, horizon=5)
        problem, theta = problem_with(tasks, MAML())
        first = data_of(problem, theta)
        assert not first.observation_ETO[..., -3:].any()
        data_of(problem, theta, 1)
        again = data_of(problem, theta)
        fresh = data_of(problem_with(MetaWorld(benchmark="ML1-push", episodes=2, horizon=5), MAML())[0], theta)
        for one, other, third in zip(first, again, fresh, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one, third)

    def test_rewards_and_success_are_metaworlds(self) -> None:
        """Against an environment of Meta-World's that is stepped by hand with the same actions."""
        import metaworld

        tasks = MetaWorld(episodes=1, horizon=30)
        problem, theta = problem_with(tasks, MAML())
        (task,) = problem.build(Shard("test", 0, 0, 1))
        data = Rollouts(*task.query(split(problem.layout.unpack(theta)).model))
        made = metaworld.ML1("reach-v3", seed=0)
        env = made.test_classes["reach-v3"]()
        rewards = []
        for candidate in made.test_tasks:
            env.set_task(candidate)
            env.reset()
            if tuple(env._last_rand_vec) == task.goal.vector:
                break
        for action in data.action_ETA[0].numpy():
            observation, reward, _, _, info = env.step(np.clip(action, -1, 1))
            rewards.append(reward)
        assert float(data.score_EM[0, 0]) == pytest.approx(sum(rewards), rel=1e-5)
        assert float(data.score_EM[0, 1]) in (0.0, 1.0)
        assert info["success"] <= float(data.score_EM[0, 1])
        assert observation.shape == tasks.spaces.observation
