"""Where a run's time has gone, and what one of its shards spends it on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity

from distmeta.adaptation import restore
from distmeta.core.loss import Criterion
from distmeta.core.types import TaskDistribution
from distmeta.distributed.work import shards_of
from distmeta.errors import RunError
from distmeta.experiment import MetaAlgorithm, assemble
from distmeta.runs import RunFolder, storage_errors

DRIVER = {
    "map": "waiting for shards",
    "reduce": "summing them",
    "outer": "outer update",
    "checkpoint": "checkpoint",
}
"""The parts of an outer step, which the driver does one after the other, and what people call them."""


@dataclass(frozen=True)
class Profile:
    """Where the time goes."""

    steps: int
    """Outer steps that the run has recorded."""
    driver: dict[str, float]
    """Seconds of an outer step in each of `DRIVER`."""
    workers: dict[str, float]
    """Seconds of an outer step in each part of the workers' computing, summed over the shards."""
    operations: list[tuple[str, int, float]]
    """Of one shard, in this process: the operations of torch, how often each was called, and the seconds in it alone
    (on the GPU, where the run computes there), the longest first."""
    trace: Path
    """The whole course of that shard, for Perfetto or Chrome's ``about:tracing``."""

    @property
    def concurrency(self) -> float:
        """How many shards were computed at a time, on average over outer steps: at best, the number of workers."""
        wall = sum(self.driver.values())
        return sum(self.workers.values()) / wall if wall else 0.0

    def tables(self, most: int = 15) -> list[Table]:
        """For people: the outer step, the workers, and the ``most`` operations that take longest."""
        wall, computed = sum(self.driver.values()), sum(self.workers.values())
        steps = Table("outer step", "ms", "share", title=f"{1000 * wall:.1f} ms, the mean of {self.steps:,}")
        for part, value in self.driver.items():
            steps.add_row(DRIVER[part], f"{1000 * value:.2f}", f"{value / wall:.1%}")
        workers = Table("workers", "ms a step", "share", title=f"{self.concurrency:.2f} shards computed at a time")
        for part, value in sorted(self.workers.items(), key=lambda item: -item[1]):
            workers.add_row(part, f"{1000 * value:.2f}", f"{value / computed:.1%}")
        total = sum(seconds for *_, seconds in self.operations)
        shard = Table("operation", "calls", "ms", "share", title=f"one shard here: {1000 * total:.1f} ms")
        for name, calls, seconds in self.operations[:most]:
            shard.add_row(name, str(calls), f"{1000 * seconds:.2f}", f"{seconds / total:.1%}")
        return [steps, workers, shard]


def per_step(lines: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """The seconds of an outer step on the driver and in the workers, from the lines of kind ``train`` of a run."""
    steps = sum(line["steps"] for line in lines)
    parts = {part for line in lines for part in line["seconds"]}
    mean = {part: sum(line["seconds"].get(part, 0.0) for line in lines) / steps for part in sorted(parts)}
    driver = {part: mean.get(part, 0.0) for part in DRIVER}
    return driver, {part: value for part, value in mean.items() if part not in (*DRIVER, "validation")}


def profile(
    path: str | Path,
    checkpoint: str = "last",
    *,
    model: nn.Module | None = None,
    loss: Criterion | None = None,
    tasks: TaskDistribution | None = None,
    algorithm: MetaAlgorithm | None = None,
) -> Profile:
    """Sums up what a run has recorded of its time, and computes one task shard under torch's profiler.

    Args:
        path: The folder of the run, or its URL.
        checkpoint: Whose parameters the shard is computed at.
        model, loss, tasks, algorithm: The Python objects that the run was started with, if any.

    Raises:
        RunError: The run has recorded no outer step.
        DistmetaError: See `distmeta.errors`.
    """
    run = RunFolder.open(path)
    lines = [line for line in run.records() if line["kind"] == "train"]
    if not lines:
        raise RunError(f"{run.address} has recorded no outer step yet")
    driver, workers = per_step(lines)
    experiment = assemble(run.config(), model=model, loss=loss, tasks=tasks, algorithm=algorithm)
    problem, settings = experiment.problem, experiment.config.train
    problem.check_device()
    vector = problem.layout.pack(restore(run, experiment, checkpoint))
    shard = shards_of("train", lines[-1]["step"], settings.meta_batch_size, settings.shard_size)[0]
    on_gpu = problem.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    problem.run("meta_gradient", vector, shard)  # once before: kernels are compiled, memory is taken
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler speaks of GPUs that are not there
    with torch.profiler.profile(activities=activities) as profiler:
        problem.run("meta_gradient", vector, shard)
    operations = [
        (event.key, event.count, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6)
        for event in profiler.key_averages()
    ]
    trace = run.path / "report" / "trace.json"
    with storage_errors(run.path):
        trace.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    longest = sorted(operations, key=lambda operation: -operation[2])
    return Profile(sum(line["steps"] for line in lines), driver, workers, longest, trace)
