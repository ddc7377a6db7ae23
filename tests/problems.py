"""Small problems that several tests share."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distmeta import (
    CAVIA,
    IMAML,
    MAML,
    Episode,
    LearnedOptimizer,
    MAMLpp,
    MetaAlgorithm,
    MetaCurvature,
    MetaSGD,
    ProtoMAML,
    Reptile,
    Split,
    TaskSpec,
)
from distmeta.algorithms import ALGORITHMS
from distmeta.core.loss import ModuleLoss, cross_entropy
from distmeta.core.params import Layout, join
from distmeta.distributed.work import Problem
from distmeta.models import Conv4


class HeadedMLP(nn.Module):
    """A perceptron whose last layer has a name, for algorithms that treat the head apart."""

    def __init__(self, inputs: int, outputs: int, hidden: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh())
        self.classifier = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


class Blobs:
    """Classification of Gaussian blobs: cheap tasks for any input shape."""

    def __init__(
        self, shape: tuple[int, ...] = (3,), ways: int = 3, shots: int = 2, dtype: torch.dtype = torch.float32
    ):
        self.shape, self.ways, self.shots, self.dtype = tuple(shape), ways, shots, dtype

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec(self.shape, self.ways, "cross_entropy")

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        centres = rng.standard_normal((self.ways, 1, *self.shape))
        x = torch.from_numpy(centres + 0.5 * rng.standard_normal((self.ways, 2 * self.shots, *self.shape)))
        y = torch.arange(self.ways)[:, None].expand(self.ways, self.shots).flatten()
        halves = (x[:, : self.shots], x[:, self.shots :])
        return Episode(*((half.flatten(0, 1).to(self.dtype), y) for half in halves))


class Together(Blobs):
    """Blobs whose processes begin only when ``processes`` of them are there, and take their time."""

    def __init__(self, folder: str, processes: int, wait: float, shape: tuple[int, ...] = (3,), ways: int = 3) -> None:
        super().__init__(shape, ways)
        self.folder, self.processes, self.wait, self.met = Path(folder), processes, wait, False

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        if split == "train" and not self.met:
            (self.folder / str(os.getpid())).touch()
            deadline = time.monotonic() + 120
            while len(list(self.folder.iterdir())) < self.processes and time.monotonic() < deadline:
                time.sleep(0.05)
            self.met = True
        time.sleep(self.wait)
        return super().sample(rng, split)


class Mortal(Blobs):
    """Blobs, whose first process to have sampled ``after`` tasks dies on the spot; those after it live."""

    def __init__(self, marker: str, after: int = 30, shape: tuple[int, ...] = (3,), ways: int = 3) -> None:
        super().__init__(shape, ways)
        self.marker, self.after, self.sampled = Path(marker), after, 0

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        self.sampled += 1
        if self.sampled > self.after and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(rng, split)


def problem_of(algorithm: MetaAlgorithm, model: nn.Module, tasks: Any, **options: Any) -> tuple[Problem, np.ndarray]:
    """A problem and its initial meta-parameters as a flat vector."""
    loss = ModuleLoss(model, options.pop("loss", cross_entropy), options.pop("precision", "float32"))
    initial = join(algorithm.init(loss.init()))
    layout = Layout.of(initial)
    return Problem(algorithm, loss, tasks, layout, seed=1, **options), layout.pack(initial)


def small_models(dtype: torch.dtype) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Networks and the shape of their inputs: every kind of layer that the package offers."""
    torch.manual_seed(0)
    models: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "mlp": (HeadedMLP(3, 3), (3,)),
        "conv4-stride": (Conv4((1, 16, 16), 3, filters=4), (1, 16, 16)),
        "conv4-pool": (Conv4((1, 16, 16), 3, filters=4, downsample="pool", head="flatten"), (1, 16, 16)),
    }
    for model, _ in models.values():
        model.to(dtype)
        with torch.no_grad():  # away from the special point of affine weights 1 and 0 and of a nearly zero head
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return models


def algorithms() -> dict[str, MetaAlgorithm]:
    """Every algorithm for supervised tasks with its defaults but for a larger inner rate, and its variants."""
    made: dict[str, MetaAlgorithm] = {
        name: kind(**({"inner_lr": 0.1} if "inner_lr" in inspect.signature(kind).parameters else {}))
        for name, kind in ALGORITHMS.items()
        if name not in ("e-maml", "promp")  # for control alone
    }
    made["imaml"] = IMAML(inner_lr=0.01, regularization=50.0)
    made["cavia-film"] = CAVIA(inner_lr=0.3, inner_steps=2, context=3, layers=("*",), film=True, recompute=True)
    made["learned-optimizer-2"] = LearnedOptimizer(inner_lr=0.1, inner_steps=2, first_order=False, hidden=3)
    made["maml-adam"] = MAML(inner_lr=0.02, inner_steps=2, inner_optimizer="adam", inner_momentum=0.9, inner_eps=1e-2)
    made["maml-nesterov"] = MAML(inner_lr=0.05, inner_steps=2, inner_optimizer="nesterov", inner_momentum=0.9)
    made["maml-recompute"] = MAML(inner_lr=0.05, inner_steps=3, inner_momentum=0.5, recompute=True)
    made["maml-3"] = MAML(inner_lr=0.1, inner_steps=3)
    made["fomaml"] = MAML(inner_lr=0.1, inner_steps=2, first_order=True)
    made["anil"] = MAML(inner_lr=0.1, inner_steps=2, adapted_params=("classifier.*",))
    made["boil"] = MAML(inner_lr=0.1, inner_steps=2, frozen_params=("classifier.*",))
    made["meta-sgd-2"] = MetaSGD(inner_lr=0.1, inner_steps=2)
    made["meta-curvature-2"] = MetaCurvature(inner_lr=0.1, inner_steps=2)
    made["maml-pp-multi-step"] = MAMLpp(inner_lr=0.1, inner_steps=3, multi_step_until=10)
    made["maml-pp-annealed"] = MAMLpp(inner_lr=0.1, inner_steps=2, first_order_until=10)
    made["protonet"] = ProtoMAML(inner_steps=0)
    made["reptile-sgd"] = Reptile(inner_lr=0.1, inner_optimizer="sgd", batch_size=4)
    return made


def our_processes() -> list[str]:
    """The command lines of all processes that have these tests' environment, and no others of this machine."""
    ours = f"DISTMETA_CACHE={os.environ['DISTMETA_CACHE']}\0".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            if ours in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().decode(errors="replace").rstrip("\0"))
    return found


def lasting_workers(seconds: float = 20) -> list[str]:
    """The workers of the pools of these tests that are still there after a while: Ray kills in the background."""
    deadline = time.monotonic() + seconds
    while True:
        found = [title for title in our_processes() if title.startswith("ray::Worker")]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def relative_error(one: np.ndarray | Tensor, other: np.ndarray | Tensor) -> float:
    """‖one − other‖ / ‖other‖."""
    one, other = np.asarray(one), np.asarray(other)
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))
