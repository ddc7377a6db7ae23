"""Control tasks of one's own: any environment of gymnasium with goals; here, a pendulum of unknown length.

python examples/own_control.py
"""

import json
from dataclasses import dataclass

import numpy as np

import distmeta
from distmeta.tasks.locomotion import Gym


@dataclass(eq=False)
class Pendulums(Gym):
    """A task is one length of the pendulum, which the policy is not told."""

    env: str = "Pendulum-v1"

    def draw(self, rng: np.random.Generator, split: distmeta.Split) -> float:
        return float(rng.uniform(0.5, 1.5))

    def apply(self, env, goal: float) -> None:
        env.unwrapped.l = goal


def main() -> None:
    run = distmeta.train(
        {
            "model": {"use": "policy", "hidden": [32]},
            "outer": {"use": "SGD", "lr": 1.0, "trust_region": {"max_kl": 0.02}},
            "train": {"steps": 3, "meta_batch_size": 4, "shard_size": 2},
            "evaluation": {"tasks": 4},
        },
        "algorithm={use: maml, inner_lr: 0.1}",
        tasks=Pendulums(episodes=4, horizon=50),
    )
    test = json.loads((run.path / "summary.json").read_text())["test"]
    print(f"return {test['before']['mean']:.0f} before adaptation, {test['after']['mean']:.0f} after")


if __name__ == "__main__":
    main()
