"""How fast tasks of control are sampled: environment steps a second of a processor, against bare loops.

    python benchmarks/sampling.py [--seconds 60] [--copies 10]

Three ways to step the same robot arm (Meta-World's reach-v3, episodes of 500 steps, resets included), in turns in one
run, one thread each. A second is one of processor time, which other work on the machine hardly changes:

- bare: ``env.step`` with random actions in a loop over the copies, and nothing else;
- Meta-World's own vector environment (gymnasium's SyncVectorEnv with Meta-World's wrappers), with random actions;
- distmeta: sampling with a policy of two layers of 64, recording, baseline and advantages included.

Printed are medians over turns of steps a second, and their ratios in the same turn with the spread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import gymnasium
import metaworld
import numpy as np
import torch

from distmeta.core.policy import PolicyLoss
from distmeta.models.policy import MLPPolicy
from distmeta.tasks.control import ControlTask
from distmeta.tasks.metaworld import MetaWorld

HORIZON = 500


def bare(copies: int) -> Callable[[], int]:
    """Steps each copy through an episode."""
    made = metaworld.ML1("reach-v3", seed=0)
    envs = [made.train_classes["reach-v3"]() for _ in range(copies)]
    for env in envs:
        env.set_task(made.train_tasks[0])
    actions = np.random.default_rng(0).uniform(-1, 1, (HORIZON, copies, 4)).astype(np.float32)

    def episode() -> int:
        for env in envs:
            env.reset()
        for t in range(HORIZON):
            for env, action in zip(envs, actions[t], strict=True):
                env.step(action)
        return HORIZON * copies

    return episode


def vector(copies: int) -> Callable[[], int]:
    """Meta-World's own, which resets by itself."""
    envs = gymnasium.make_vec("Meta-World/ML1-train", env_name="reach-v3", seed=0, meta_batch_size=copies)
    envs.call("sample_tasks")
    envs.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (HORIZON, copies, 4)).astype(np.float32)

    def episode() -> int:
        for t in range(HORIZON):
            envs.step(actions[t])
        return HORIZON * copies

    return episode


def ours(copies: int) -> Callable[[], int]:
    """A task's support set."""
    tasks = MetaWorld(episodes=copies, horizon=HORIZON)
    policy = PolicyLoss(MLPPolicy((39,), 4, hidden=(64, 64)), tasks.spec.loss)
    tasks.bind(policy)
    params = policy.init()
    task: ControlTask = tasks.sample(np.random.default_rng(0), "train")

    def episode() -> int:
        task.support(params, 0)
        return HORIZON * copies

    return episode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--copies", type=int, default=10, help="environments of a process")
    given = parser.parse_args()
    torch.set_num_threads(1)
    ways = {
        "bare env.step": bare(given.copies),
        "Meta-World's vector": vector(given.copies),
        "distmeta": ours(given.copies),
    }
    for episode in ways.values():
        episode()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + given.seconds
    while time.perf_counter() < end or len(rates["distmeta"]) < 3:
        for name, episode in ways.items():
            start = time.process_time()
            steps = episode()
            rates[name].append(steps / (time.process_time() - start))
    print(f"{given.copies} copies of reach-v3 in one process, one thread, {len(rates['distmeta'])} turns")
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(rates["distmeta"], values, strict=True)]
        print(
            f"{name:20} {statistics.median(values):7.0f} steps/s   distmeta / this: {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
