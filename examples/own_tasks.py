"""A model, a loss and a task distribution of one's own: sensors of unknown gain and offset, calibrated by 5 readings.

python examples/own_tasks.py
"""

import numpy as np
import torch

import distmeta


class Sensors:
    """A task is one sensor. A task distribution is anything with this one method, which draws from ``rng`` alone."""

    def sample(self, rng: np.random.Generator, split: distmeta.Split) -> distmeta.Episode:
        gain, offset = rng.uniform(0.5, 1.5), rng.uniform(-1, 1)
        x = torch.tensor(rng.uniform(-1, 1, (25, 1)), dtype=torch.float32)
        y = gain * x + offset
        return distmeta.Episode(support_set=(x[:5], y[:5]), query_set=(x[5:], y[5:]))


def main() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    parts = {"model": net, "loss": torch.nn.functional.mse_loss, "tasks": Sensors()}
    parts["algorithm"] = distmeta.MAML(inner_lr=0.1, inner_steps=3)
    run = distmeta.train({"train": {"steps": 300, "strategy": "vmap"}}, "outer.lr=3e-3", **parts)

    x = torch.linspace(-1, 1, 5)[:, None]
    sensor = distmeta.adapt(run, (x, 1.4 * x - 0.5), **parts)  # a new sensor
    print(f"it reads 0.20 at 0.5; the adapted model says {float(sensor.predict(torch.tensor([[0.5]]))):.2f}")


if __name__ == "__main__":
    main()
