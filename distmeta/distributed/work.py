"""What is done with one task shard: a pure function of the problem, the meta-parameters and the shard.

Whoever calls `Problem.run`, this process or an actor anywhere, gets the same bits on the same type of device: tasks
are drawn from named streams, gradients are summed in task order, and the number of threads is a setting.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
import traceback
from collections.abc import Callable, Container, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from distmeta.core.algorithm import MetaAlgorithm
from distmeta.core.loss import ModuleLoss, PureModule, predict_alone, uses_batch_statistics
from distmeta.core.params import Layout, split
from distmeta.core.scope import SCORES, score_of
from distmeta.core.seeds import stream, torch_seed
from distmeta.core.types import (
    Episode,
    Grouped,
    Judge,
    MetaParams,
    OpenSet,
    Params,
    Recorded,
    Split,
    Task,
    TaskDistribution,
    check_batch,
)
from distmeta.distributed.compiled import Programs
from distmeta.distributed.passes import FAILURES, Pass, Recordings, join_metrics, stack_metrics, train_pass
from distmeta.errors import ConfigError, DistmetaError, NumericalError, ResourceError, WorkerError, one_line

Work = Literal["meta_gradient", "objective", "curvature", "evaluate", "out_of_scope", "nearest_neighbour"]
Strategy = Literal["loop", "vmap", "compiled"]
JUDGED = "judged."

deterministic: Any = torch.utils.deterministic  # whose one attribute its types do not know


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
    """Sum over the shard's tasks of their meta-gradients as one flat vector; None for work that has none."""
    metrics: dict[str, np.ndarray]
    """For each metric an array whose first axis counts the shard's tasks; for ``out_of_scope``, all their examples."""
    seconds: dict[str, float]
    """Time spent building tasks (``sample``), in control on ``environment`` and ``policy``, and else (``adapt``)."""
    tasks: int
    """How many tasks the sum is of."""
    skipped: dict[int, str]
    """Tasks that were left out, by their index in the meta-batch, with the reason."""


def left_out(work: Work, vector: np.ndarray, shard: Shard, why: str) -> ShardResult:
    """The result of a shard all of whose tasks are skipped."""
    total = np.zeros_like(vector) if work in ("meta_gradient", "curvature") else None
    skipped = dict.fromkeys(range(shard.first, shard.first + shard.size), why)
    return ShardResult(total, {}, {"sample": 0.0, "adapt": 0.0}, 0, skipped)


@contextmanager
def reproducible(threads: int, seed: int) -> Generator[None]:
    """Within this context torch computes with ``threads`` threads and deterministic kernels.

    The state of the global generator, which dropout uses, is set from ``seed`` and restored at the end.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first use of cuBLAS
    keep_freed_memory()
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    cudnn: Any = torch.backends.cudnn
    flags = cudnn.benchmark, cudnn.allow_tf32
    mode, fill = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
        cudnn.benchmark, cudnn.allow_tf32 = False, False
        _set_deterministic(2)
        # Else deterministic mode writes NaN into all new memory, a tenth of the time; no kernel here leaves any unset.
        deterministic.fill_uninitialized_memory = False
        # torch.manual_seed formats a traceback for a GPU to come, which takes longer than all else here.
        (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(seed)
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            torch.set_float32_matmul_precision(before[1])
            cudnn.benchmark, cudnn.allow_tf32 = flags
            deterministic.fill_uninitialized_memory = fill
            _set_deterministic(mode)


def _set_deterministic(mode: int) -> None:
    """Deterministic kernels as torch counts them: 0 not, 1 with a warning where there is none, 2 with an error."""
    if "torch._dynamo" in sys.modules:  # compiled code has a flag of its own, which this sets too
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
    else:  # without loading the compiler, which costs each new process a second
        torch.set_deterministic_debug_mode(mode)


@cache
def keep_freed_memory() -> None:
    """Has this process reuse the memory of tensors that were freed, where its C library is glibc.

    Blocks of more than some MB are otherwise given back to the system each time and faulted in again, page by page,
    which for the 15 MB activations of a convolutional network costs as much time as computing them.
    """
    glibc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(glibc, "gnu_get_libc_version"):
        threshold, trim = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
        if not glibc.mallopt(threshold, 2**30):
            glibc.mallopt(threshold, 2**25)  # the greatest that older versions take
        glibc.mallopt(trim, 2**31 - 1)


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
    loss: PureModule
    tasks: TaskDistribution
    layout: Layout
    seed: int
    strategy: Strategy = "loop"
    on_failure: Literal["raise", "skip"] = "raise"
    threads: int = 1
    device: str = "cpu"
    judge: Judge | None = None
    metric: str | None = None
    variable_ways: bool = False
    """See `distmeta.core.types.TaskSpec`."""
    recordings: Recordings = field(default_factory=Recordings, repr=False)
    programs: Programs = field(default_factory=Programs, repr=False)

    def check_device(self) -> None:
        """Raises `ResourceError` unless this process has the device that the problem is to be computed on."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ResourceError("scaling.use_gpu is on, but torch sees no GPU where the shards are to be computed")

    def run(
        self,
        work: Work,
        vector: np.ndarray,
        shard: Shard,
        tasks: list[Task] | None = None,
        second: np.ndarray | None = None,
    ) -> ShardResult:
        """Does ``work`` on one shard.

        Args:
            work: What to do: ``meta_gradient``, for training; ``objective``, the metrics of that alone, with the
                divergence of the adapted policies; ``curvature``, that of the divergence along ``second``.
            vector: The meta-parameters, flat. Data that depend on a policy are sampled with these.
            shard: Which tasks.
            tasks: The shard's tasks, if they have been built already.
            second: A direction for ``curvature``; else the meta-parameters to compute at, with the data of ``vector``;
                None for ``vector``.

        Raises:
            ConfigError: The model changes buffers when it is called.
            NumericalError: A loss or a gradient is not finite; the message names the task.
            WorkerError: A task, the model or the loss raised; the message names the tasks.
        """
        start = time.perf_counter()
        tasks = self.build(shard) if tasks is None else tasks
        built = time.perf_counter()
        with named(f"{work} of {span(shard)}"), reproducible(self.threads, torch_seed(self.seed, work, *shard)):
            self.loss.module.to(self.device)
            self.loss.module.train(work == "meta_gradient")
            buffers = self.loss.buffers()
            meta = split(self.layout.unpack(vector, self.device))
            if work != "meta_gradient" or self.strategy == "loop":  # else they are moved together
                tasks = [to_device(task, self.device) for task in tasks]
            done, inductive = Pass(), shard.split == "test"
            if work == "evaluate":
                done = self._of_each(tasks, shard, stack_metrics, lambda task, _: self._evaluate(meta, task, inductive))
                metrics = done.metrics
            elif work == "out_of_scope":
                done = self._of_each(tasks, shard, join_metrics, lambda task, i: self._scope(meta, task, shard, i))
                metrics = done.metrics
            elif work == "nearest_neighbour":
                metrics = stack_metrics([self._nearest_neighbour(meta, task) for task in tasks])
            else:
                done = train_pass(self, work, vector, dict(enumerate(tasks, shard.first)), shard, second)
                metrics = done.metrics
            for name, (tensor, written) in self.loss.buffers().items():
                before, times = buffers.get(name, (None, 0))
                if tensor is not before or written != times:
                    raise ConfigError(
                        f"the model changes its buffer {name} when it is called, so that results would depend on what "
                        "a worker has computed before: build it without layers that do (as spectral_norm does)"
                    )
        sampling = sampling_seconds(tasks)
        adapting = time.perf_counter() - built - sum(sampling.values())
        seconds = {"sample": built - start, "adapt": adapting} | sampling
        return ShardResult(done.total, metrics, seconds, len(tasks) - len(done.skipped), done.skipped)

    def build(self, shard: Shard) -> list[Task]:
        """The shard's tasks, each from its own random stream."""
        tasks: list[Task] = []
        for index in range(shard.first, shard.first + shard.size):
            with named(f"building {self.name(shard, index)}"):
                task = self.tasks.sample(stream(self.seed, shard.split, shard.step, index), shard.split)
                tasks.append(_checked(task, self.name(shard, index)))
        return tasks

    def loss_of(self, task: Task) -> PureModule:
        """The loss of ``task``: of its own classes, where tasks have different numbers of them."""
        if not (self.variable_ways and isinstance(task, Episode) and isinstance(self.loss, ModuleLoss)):
            return self.loss
        return self.loss.of_classes(1 + max(int(batch[-1].max()) for batch in task))

    def groups(self, shards: Sequence[Shard], skipped: Container[int] = ()) -> list[tuple[str, ...]]:
        """The groups of each task of ``shards`` that is not ``skipped``; empty where the tasks have none."""
        indices = [i for shard in shards for i in range(shard.first, shard.first + shard.size) if i not in skipped]
        tasks = self.tasks
        if not isinstance(tasks, Grouped) or not indices:
            return []
        split, step = shards[0].split, shards[0].step
        of = lambda index: tasks.groups_of(stream(self.seed, split, step, index), split)  # noqa: E731
        return [of(index) for index in indices] if of(indices[0]) else []

    def name(self, shard: Shard, index: int) -> str:
        """A task, for messages."""
        return f"task {index} of step {shard.step} (split {shard.split}, seed {self.seed})"

    def _of_each(
        self,
        tasks: list[Task],
        shard: Shard,
        together: Callable[[list[dict[str, np.ndarray]]], dict[str, np.ndarray]],
        judge: Callable[[Task, int], dict[str, np.ndarray]],
    ) -> Pass:
        """What ``judge`` says of each task and its index, put ``together``, and the tasks that are skipped."""
        rows: list[dict[str, np.ndarray]] = []
        skipped: dict[int, str] = {}
        for index, task in enumerate(tasks, shard.first):
            try:
                rows.append(judge(task, index))
            except FAILURES as error:
                if self.on_failure == "raise":
                    raise
                skipped[index] = one_line(error)
        return Pass(None, together(rows), skipped)

    def _evaluate(self, meta: MetaParams, task: Task, inductive: bool) -> dict[str, np.ndarray]:
        """Query metrics before adaptation and after each inner step, arrays (inner steps + 1,); the judge's, which may
        take long, before and after adaptation, arrays (2,) under names that begin with `JUDGED`."""
        rows: list[dict[str, np.ndarray]] = []
        params: Params = {}
        judged: list[dict[str, float]] = []
        loss = self.loss_of(task)
        for params, *_ in self.algorithm.trajectory(meta, task, loss):
            with torch.no_grad():
                value, metrics = loss(params, task.query(params))
            if not rows:
                judged += self._judge(params, task)
            rows.append({name: m.cpu().double().numpy() for name, m in (metrics | {"loss": value}).items()})
        judged += self._judge(params, task)
        result = stack_metrics(rows)
        if judged:
            result |= {f"{JUDGED}{name}": np.array([row[name] for row in judged]) for name in judged[0]}
        if inductive and "accuracy" in result and uses_batch_statistics(self.loss.module):
            result["accuracy_inductive"] = np.asarray(self._inductive_accuracy(params, task))
        return result

    @torch.no_grad()
    def _judge(self, params: Params, task: Task) -> list[dict[str, float]]:
        """What the judge says of ``params``, in a list; none without a judge."""
        return [] if self.judge is None else [self.judge(partial(self.loss.predict, params), task.query(params))]

    @torch.no_grad()
    def _inductive_accuracy(self, params: Params, task: Task) -> float:
        """Accuracy when no query example sees another (Nichol et al., 2018, section 6.1, "non-transductive").

        Each query example is classified in one batch with the support set, whose statistics normalise it.
        """
        *support, _ = task.support(params, 0)
        *inputs, target = task.query(params)
        logits = predict_alone(partial(self.loss_of(task).predict, params), support, inputs)
        return int((logits.argmax(-1) == target).sum()) / len(target)

    def _scope(self, meta: MetaParams, task: Task, shard: Shard, index: int) -> dict[str, np.ndarray]:
        """How sure the adapted model is, by each score, of the queries and of examples out of scope (``inside.SCORE``,
        ``outside.SCORE``); which queries it classifies rightly (``right``); and the two numbers of examples.

        Raises:
            NumericalError: A score is not finite.
        """
        assert isinstance(self.tasks, OpenSet)
        loss = self.loss_of(task)
        params = self.algorithm.adapt(meta, task, loss)
        *support, _ = task.support(params, 0)
        *inputs, target = task.query(params)
        outside = self.tasks.outside(stream(self.seed, "out_of_scope", shard.split, index), shard.split)
        predict = partial(loss.predict, params)
        alone = uses_batch_statistics(self.loss.module)
        with torch.no_grad():
            logits = {
                place: predict_alone(predict, support, x) if alone else predict(*x)
                for place, x in (("inside", inputs), ("outside", [x.to(self.device) for x in outside]))
            }
        row = {"right": (logits["inside"].argmax(-1) == target).cpu().numpy()}
        for place, values in logits.items():
            if not torch.isfinite(values).all():
                raise NumericalError(
                    f"{self.name(shard, index)}: the adapted model's outputs are not finite; lower algorithm.inner_lr"
                )
            row[place] = np.array([len(values)])
            row |= {f"{place}.{kind}": score_of(kind, values).cpu().numpy() for kind in SCORES}
        return row

    def _nearest_neighbour(self, meta: MetaParams, task: Task) -> dict[str, np.ndarray]:
        """Accuracy of the label of the nearest support example by the Euclidean distance of raw inputs."""
        support, label = task.support(meta.model, 0)
        query, target = task.query(meta.model)
        nearest = torch.cdist(query.flatten(1), support.flatten(1)).argmin(1)
        return {"accuracy": (label[nearest] == target).double().mean().cpu().numpy()}


def _checked(task: Task, name: str) -> Task:
    """The task, if it is one and has examples.

    Raises:
        ConfigError: It is not, or has none.
    """
    if not callable(getattr(task, "support", None)) or not callable(getattr(task, "query", None)):
        raise ConfigError(
            f"{name} is a {type(task).__name__}: sample(rng, split) must give an Episode(support_set, query_set), each "
            "a tuple of inputs and, last, targets"
        )
    if isinstance(task, Episode):
        for which, batch in (("support", task.support_set), ("query", task.query_set)):
            check_batch(batch, f"the {which} set of {name}")
    return task


def sampling_seconds(tasks: list[Task]) -> dict[str, float]:
    """Time that tasks which sample their own data have spent at it since they were asked last."""
    total: dict[str, float] = {}
    for task in tasks:
        while isinstance(task, Recorded):
            task = task.task
        for part, seconds in getattr(task, "seconds", {}).items():
            total[part] = total.get(part, 0.0) + seconds
            task.seconds[part] = 0.0  # pyright: ignore[reportAttributeAccessIssue]
    return total


def to_device(task: Task, device: str) -> Task:
    """The task with its tensors on ``device``; a task that is no episode places its own."""
    if not isinstance(task, Episode) or device == "cpu":
        return task
    move = lambda batch: tuple(tensor.to(device) for tensor in batch)  # noqa: E731
    return Episode(move(task.support_set), move(task.query_set))
