"""What is done with one task shard: a pure function of the problem, the meta-parameters and the shard.

Whoever calls `Problem.run`, this process or an actor anywhere, gets the same bits on the same type of device: tasks
are drawn from named streams, gradients are summed in task order, and the number of threads is a setting.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from distmeta.core.algorithm import MetaAlgorithm
from distmeta.core.gradients import function_transforms
from distmeta.core.loss import ModuleLoss, uses_batch_statistics
from distmeta.core.params import Layout, join, split
from distmeta.core.seeds import stream, torch_seed
from distmeta.core.types import Batch, Episode, MetaGradient, MetaParams, Params, Split, Task, TaskDistribution
from distmeta.errors import ConfigError, DistmetaError, NumericalError, ResourceError, WorkerError, one_line

Work = Literal["meta_gradient", "evaluate", "nearest_neighbour"]
Strategy = Literal["loop", "vmap"]


class Shard(NamedTuple):
    """A fixed slice of a meta-batch: the unit of placement, vectorising, retry and reduction."""

    split: Split
    step: int
    """Outer step in meta-training; 0 in evaluation, whose tasks are the same each time."""
    first: int
    """Index in the meta-batch of the first task."""
    size: int
    """Number of tasks."""


def shards_of(split: Split, step: int, tasks: int, shard_size: int) -> list[Shard]:
    """The shards of a meta-batch; the last one is smaller where ``shard_size`` does not divide ``tasks``."""
    return [Shard(split, step, first, min(shard_size, tasks - first)) for first in range(0, tasks, shard_size)]


class ShardResult(NamedTuple):
    """What comes back for one shard."""

    total: np.ndarray | None
    """Sum over the shard's tasks of their meta-gradients as one flat vector; None for other work."""
    metrics: dict[str, np.ndarray]
    """For each metric an array whose first axis counts the shard's tasks."""
    seconds: dict[str, float]
    """Time spent building tasks (``sample``) and on the rest (``adapt``)."""


@contextmanager
def reproducible(threads: int, seed: int) -> Generator[None]:
    """Within this context torch computes with ``threads`` threads and deterministic kernels.

    The state of the global generator, which dropout uses, is set from ``seed`` and restored at the end.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first use of cuBLAS
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    mode = torch.get_deterministic_debug_mode()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = False
        _set_deterministic(2)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            torch.set_float32_matmul_precision(before[1])
            torch.backends.cudnn.benchmark = before[2]
            _set_deterministic(mode)


def _set_deterministic(mode: int) -> None:
    """Deterministic kernels as torch counts them: 0 not, 1 with a warning where there is none, 2 with an error."""
    if "torch._dynamo" in sys.modules:  # compiled code has a flag of its own, which this sets too
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
    else:  # without loading the compiler, which costs each new process a second
        torch.set_deterministic_debug_mode(mode)


@contextmanager
def named(what: str) -> Generator[None]:
    """Within this context an exception becomes a `WorkerError` that says what failed, its traceback kept as a note."""
    try:
        yield
    except DistmetaError:
        raise
    except Exception as error:
        failure = WorkerError(f"{what} failed: {type(error).__name__}: {one_line(error)}")
        failure.add_note(traceback.format_exc())  # a cause would be lost on the way from a worker
        raise failure from error


def span(shard: Shard) -> str:
    """The shard's tasks, for messages."""
    return f"tasks {shard.first}-{shard.first + shard.size - 1} of step {shard.step} (split {shard.split})"


@dataclass
class Problem:
    """Everything that a worker needs beside the meta-parameters and the name of a shard."""

    algorithm: MetaAlgorithm
    loss: ModuleLoss
    tasks: TaskDistribution
    layout: Layout
    seed: int
    strategy: Strategy = "loop"
    threads: int = 1
    device: str = "cpu"

    def check_device(self) -> None:
        """Raises `ResourceError` unless this process has the device that the problem is to be computed on."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ResourceError("scaling.use_gpu is on, but torch sees no GPU where the shards are to be computed")

    def run(self, work: Work, vector: np.ndarray, shard: Shard, tasks: list[Task] | None = None) -> ShardResult:
        """Does ``work`` on one shard.

        Args:
            work: What to do.
            vector: The meta-parameters, flat.
            shard: Which tasks.
            tasks: The shard's tasks, if they have been built already.

        Raises:
            NumericalError: A loss or a gradient is not finite; the message names the task.
            WorkerError: A task, the model or the loss raised; the message names the tasks.
        """
        start = time.perf_counter()
        tasks = self.build(shard) if tasks is None else tasks
        built = time.perf_counter()
        with named(f"{work} of {span(shard)}"), reproducible(self.threads, torch_seed(self.seed, work, *shard)):
            self.loss.module.to(self.device)
            self.loss.module.train(work == "meta_gradient")
            meta = split(self.layout.unpack(vector, self.device))
            tasks = [to_device(task, self.device) for task in tasks]
            if work == "meta_gradient":
                total, metrics = self._meta_gradients(meta, tasks, shard)
            else:
                total = None
                if work == "evaluate":
                    metrics = stack_metrics([self._evaluate(meta, task, shard.split == "test") for task in tasks])
                else:
                    metrics = stack_metrics([self._nearest_neighbour(meta, task) for task in tasks])
        return ShardResult(total, metrics, {"sample": built - start, "adapt": time.perf_counter() - built})

    def build(self, shard: Shard) -> list[Task]:
        """The shard's tasks, each from its own random stream."""
        tasks: list[Task] = []
        for index in range(shard.first, shard.first + shard.size):
            with named(f"building {self._name(shard, index)}"):
                tasks.append(self.tasks.sample(stream(self.seed, shard.split, shard.step, index), shard.split))
        return tasks

    def _name(self, shard: Shard, index: int) -> str:
        return f"task {index} of step {shard.step} (split {shard.split}, seed {self.seed})"

    def _meta_gradients(
        self, meta: MetaParams, tasks: list[Task], shard: Shard
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        if self.strategy == "vmap":
            result = self.vectorised(meta, tasks, shard.step)
            metrics = {name: tensor.cpu().double().numpy() for name, tensor in result.metrics.items()}
            joined = {name: tensor.sum(0) for name, tensor in join(result.gradient).items()}
            if not all(bool(tensor.isfinite().all()) for tensor in joined.values()):
                for i in range(shard.size):
                    self._check({k: v[i] for k, v in join(result.gradient).items()}, shard, shard.first + i)
        else:
            joined, rows = {}, []
            for i, task in enumerate(tasks):
                result = self.algorithm.meta_gradient(meta, task, self.loss, step=shard.step)
                gradient = join(result.gradient)
                self._check(gradient, shard, shard.first + i)
                rows.append({name: tensor.cpu().double().numpy() for name, tensor in result.metrics.items()})
                for name, tensor in gradient.items():
                    joined[name] = joined[name].add_(tensor) if name in joined else tensor.clone()
            metrics = stack_metrics(rows)
        for i in np.flatnonzero(~np.isfinite(metrics["loss"])):
            raise NumericalError(self._not_finite("loss", float(metrics["loss"][i]), shard, shard.first + int(i)))
        for i in range(shard.size):
            if complaint := self.algorithm.complaint({name: float(values[i]) for name, values in metrics.items()}):
                raise NumericalError(f"{self._name(shard, shard.first + i)}: {complaint}")
        return self.layout.pack(joined), metrics

    def vectorised(self, meta: MetaParams, tasks: list[Task], step: int) -> MetaGradient:
        """The meta-gradients of all tasks at once, each tensor with a leading axis that counts tasks.

        Raises:
            ConfigError: The tasks are not episodes of one shape.
        """
        if not all(isinstance(task, Episode) for task in tasks):
            raise ConfigError("train.strategy: vmap needs supervised episodes; these tasks want train.strategy: loop")
        try:
            support, query = (
                tuple(torch.stack(column) for column in zip(*sets, strict=True))
                for sets in (
                    [task.support_set for task in tasks],  # pyright: ignore[reportAttributeAccessIssue]
                    [task.query_set for task in tasks],  # pyright: ignore[reportAttributeAccessIssue]
                )
            )
        except RuntimeError as error:
            raise ConfigError(
                f"train.strategy: vmap needs tasks of one shape ({error}); train.strategy: loop takes any"
            ) from error

        def one(support_set: Batch, query_set: Batch) -> MetaGradient:
            return self.algorithm.meta_gradient(meta, Episode(support_set, query_set), self.loss, step=step)

        with function_transforms():
            return torch.vmap(one, randomness="different")(support, query)

    def _check(self, gradient: Params, shard: Shard, index: int) -> None:
        for name, tensor in gradient.items():
            # One reduction, no mask: a sum is finite unless an element is not (or it overflows, as bad for training).
            if not bool(tensor.sum().isfinite()):
                raise NumericalError(self._not_finite(f"meta-gradient of {name}", float(tensor.sum()), shard, index))

    def _not_finite(self, what: str, value: float, shard: Shard, index: int) -> str:
        return (
            f"the {what} of {self._name(shard, index)} is {value}; "
            "lower algorithm.inner_lr or outer.lr, or set outer.clip_norm"
        )

    def _evaluate(self, meta: MetaParams, task: Task, inductive: bool) -> dict[str, np.ndarray]:
        """Query metrics before adaptation and after each inner step: arrays (inner steps + 1,)."""
        rows: list[dict[str, np.ndarray]] = []
        params: Params = {}
        for params, *_ in self.algorithm.trajectory(meta, task, self.loss):
            with torch.no_grad():
                value, metrics = self.loss(params, task.query(params))
            rows.append({name: m.cpu().double().numpy() for name, m in (metrics | {"loss": value}).items()})
        result = stack_metrics(rows)
        if inductive and "accuracy" in result and uses_batch_statistics(self.loss.module):
            result["accuracy_inductive"] = np.asarray(self._inductive_accuracy(params, task))
        return result

    @torch.no_grad()
    def _inductive_accuracy(self, params: Params, task: Task) -> float:
        """Accuracy when no query example sees another (Nichol et al., 2018, section 6.1, "non-transductive").

        Each query example is classified in one batch with the support set, whose statistics normalise it.
        """
        *support, _ = task.support(params, 0)
        *inputs, target = task.query(params)
        correct = 0
        for i in range(len(target)):
            batch = [torch.cat([s, x[i : i + 1]]) for s, x in zip(support, inputs, strict=True)]
            correct += int(self.loss.predict(params, *batch)[-1].argmax() == target[i])
        return correct / len(target)

    def _nearest_neighbour(self, meta: MetaParams, task: Task) -> dict[str, np.ndarray]:
        """Accuracy of the label of the nearest support example by the Euclidean distance of raw inputs."""
        support, label = task.support(meta.model, 0)
        query, target = task.query(meta.model)
        nearest = torch.cdist(query.flatten(1), support.flatten(1)).argmin(1)
        return {"accuracy": (label[nearest] == target).double().mean().cpu().numpy()}


def to_device(task: Task, device: str) -> Task:
    """The task with its tensors on ``device``; a task that is no episode places its own."""
    if not isinstance(task, Episode) or device == "cpu":
        return task
    move = lambda batch: tuple(tensor.to(device) for tensor in batch)  # noqa: E731
    return Episode(move(task.support_set), move(task.query_set))


def stack_metrics(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """From a list of dicts to a dict of arrays."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
