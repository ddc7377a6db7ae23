"""How fast tasks of control are sampled: environment steps a second of a processor, against bare loops.

    python benchmarks/sampling.py [--seconds 60] [--copies 10]

Four ways to step the same robot arm (Meta-World's reach-v3, episodes of 500 steps, resets included) through the same
actions, since steps differ in what they cost, in turns in one run, one thread each. A second is one of processor time,
which other work on the machine hardly changes:

- bare: ``env.step`` with the actions that distmeta's policy took, in a loop over the copies, and nothing else;
- bare with cold caches: the same, and 4 MiB of anything read between the time steps, as whoever asks a policy there
  drives the simulator out of the processor's caches;
- Meta-World's own vector environment (gymnasium's SyncVectorEnv with Meta-World's wrappers), with these actions;
- distmeta: sampling with a policy of two layers of 64, recording, baseline and advantages included.

Printed are medians over turns of steps a second, and their ratios in the same turn with the spread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import gymnasium
import numpy as np
import torch

from distmeta.core.policy import PolicyLoss
from distmeta.models.policy import MLPPolicy
from distmeta.tasks.control import ControlTask
from distmeta.tasks.metaworld import Goal, MetaWorld

HORIZON = 500


def bare(tasks: MetaWorld, goal: Goal, actions_TEA: np.ndarray, between: int = 0) -> Callable[[], None]:
    """Steps each copy through an episode, and reads ``between`` bytes after each time step."""
    others = np.zeros(between, np.uint8)
    envs = [tasks.make(goal.environment) for _ in actions_TEA[0]]
    for env in envs:
        tasks.apply(env, goal)

    def episode() -> None:
        for env in envs:
            env.reset()
        for action_EA in actions_TEA:
            for env, action in zip(envs, action_EA, strict=True):
                env.step(action)
            others[::64].sum()  # a byte of each line of a cache

    return episode


def vector(goal: Goal, actions_TEA: np.ndarray) -> Callable[[], None]:
    """Meta-World's own, which resets by itself."""
    made = {"env_name": goal.environment, "seed": 0, "meta_batch_size": actions_TEA.shape[1]}
    envs = gymnasium.make_vec("Meta-World/ML1-train", **made)
    envs.call("sample_tasks")
    envs.reset()

    def episode() -> None:
        for action_EA in actions_TEA:
            envs.step(action_EA)

    return episode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--copies", type=int, default=10, help="environments of a process")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tasks = MetaWorld(episodes=given.copies, horizon=HORIZON)
    policy = PolicyLoss(MLPPolicy((39,), 4, hidden=(64, 64)), tasks.spec.loss)
    tasks.bind(policy)
    params = policy.init()
    task: ControlTask = tasks.sample(np.random.default_rng(0), "train")
    actions_TEA = task.query(params).action_ETA.transpose(0, 1).numpy().clip(-1, 1)
    ways: dict[str, Callable[[], object]] = {
        "bare env.step": bare(tasks, task.goal, actions_TEA),
        "bare, cold caches": bare(tasks, task.goal, actions_TEA, between=1 << 22),
        "Meta-World's vector": vector(task.goal, actions_TEA),
        "distmeta": lambda: task.query(params),
    }
    for episode in ways.values():
        episode()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + given.seconds
    while time.perf_counter() < end or len(rates["distmeta"]) < 3:
        for name, episode in ways.items():
            start = time.process_time()
            episode()
            rates[name].append(HORIZON * given.copies / (time.process_time() - start))
    print(f"{given.copies} copies of reach-v3 in one process, one thread, {len(rates['distmeta'])} turns")
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(rates["distmeta"], values, strict=True)]
        print(
            f"{name:20} {statistics.median(values):7.0f} steps/s   distmeta / this: {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
