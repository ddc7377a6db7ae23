"""One pass over the tasks of a shard in meta-training: their meta-gradients, or what a trust region asks besides."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from distmeta.core.algorithm import Bilevel
from distmeta.core.gradients import function_transforms
from distmeta.core.params import join, split
from distmeta.core.policy import PolicyLoss
from distmeta.core.seeds import torch_seed
from distmeta.core.types import Batch, Episode, MetaGradient, MetaParams, Metrics, Params, Recorded, Task
from distmeta.errors import ConfigError, DataError, NumericalError, WorkerError, one_line

if TYPE_CHECKING:
    from distmeta.distributed.work import Problem, Shard

Training = Literal["meta_gradient", "objective", "curvature"]
FAILURES = (NumericalError, DataError, WorkerError)
"""What can be wrong with one task of many: its numbers, its data, its environment."""


@dataclass
class Pass:
    """What has come of a pass over the tasks of a shard."""

    total: np.ndarray | None = None
    metrics: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)


class Recordings:
    """A cache of the data that tasks have sampled in one outer step, at one vector, for further passes over them."""

    def __init__(self) -> None:
        self._step = -1
        self._vector = np.empty(0)
        self._kept: dict[Shard, tuple[dict[int, Task], dict[int, str]]] = {}

    def of(self, vector: np.ndarray, shard: Shard) -> tuple[dict[int, Task], dict[int, str]] | None:
        """The tasks of ``shard`` with the data sampled at ``vector``, and those skipped then, if they are here."""
        same = self._step == shard.step and np.array_equal(self._vector, vector)
        return self._kept.get(shard) if same else None

    def keep(self, vector: np.ndarray, shard: Shard, tasks: dict[int, Task], skipped: dict[int, str]) -> None:
        """Keeps them; those of another step or vector are dropped."""
        if self._step != shard.step or not np.array_equal(self._vector, vector):
            self._step, self._vector, self._kept = shard.step, vector.copy(), {}
        self._kept[shard] = tasks, skipped


def train_pass(
    problem: Problem,
    work: Training,
    vector: np.ndarray,
    tasks: dict[int, Task],
    shard: Shard,
    second: np.ndarray | None,
) -> Pass:
    """See `Problem.run`; ``tasks`` are named by their index in the meta-batch.

    Raises:
        NumericalError: A loss or a gradient is not finite, and tasks are not to be skipped.
    """
    at = lambda flat: split(problem.layout.unpack(flat, problem.device))  # noqa: E731
    skipped: dict[int, str] = {}
    if not all(isinstance(task, Episode) for task in tasks.values()):
        kept = problem.recordings.of(vector, shard)
        if kept is None:
            recorded: dict[int, Task] = {index: Recorded(task) for index, task in tasks.items()}
            _prepare(problem, "meta_gradient", shard)
            first = meta_gradients(problem, at(vector), recorded, shard)
            kept = {index: task for index, task in recorded.items() if index not in first.skipped}, first.skipped
            problem.recordings.keep(vector, shard, *kept)
            if work == "meta_gradient" and second is None:
                return first
            _prepare(problem, work, shard)
        tasks, skipped = kept  # sampled earlier; or just now, since the worker that had done so has been lost
    other = at(vector if second is None else second)
    if work == "meta_gradient":
        done = meta_gradients(problem, other, tasks, shard)
        return Pass(done.total, done.metrics, skipped | done.skipped)
    algorithm, loss = problem.algorithm, problem.loss
    assert isinstance(algorithm, Bilevel)
    assert isinstance(loss, PolicyLoss)
    if work == "curvature":
        total: Params = {}
        for index, task in tasks.items():
            product = join(algorithm.curvature(at(vector), task, loss, other, step=shard.step))
            bad = next((name for name, tensor in product.items() if not bool(tensor.sum().isfinite())), None)
            if bad is None:
                add(total, product)
                continue
            error = _not_finite(problem, f"curvature of {bad}", float(product[bad].sum()), shard, index)
            if problem.on_failure == "raise":
                raise error
            skipped = skipped | {index: one_line(error)}
        return Pass(_flat(problem, total), {}, skipped)
    rows: list[dict[str, np.ndarray]] = []
    for task in tasks.values():
        variables = split({name: tensor.requires_grad_() for name, tensor in join(other).items()})
        value, _ = algorithm.objective(variables, task, loss, step=shard.step)
        divergence = algorithm.divergence(variables, task, loss, step=shard.step)
        rows.append({"loss": value.detach().cpu().numpy(), "kl": divergence.detach().cpu().numpy()})
    return Pass(None, stack_metrics(rows), skipped)


def _prepare(problem: Problem, work: Training, shard: Shard) -> None:
    """Dropout and the like as they are at the beginning of ``work``, whoever has sampled the data."""
    problem.loss.module.train(work == "meta_gradient")
    torch.manual_seed(torch_seed(problem.seed, work, *shard))


def meta_gradients(problem: Problem, meta: MetaParams, tasks: dict[int, Task], shard: Shard) -> Pass:
    """The sum of the tasks' meta-gradients at ``meta``, added in task order, and their metrics."""
    total: Params = {}
    rows: list[dict[str, np.ndarray]] = []
    skipped: dict[int, str] = {}
    vectorised = vectorise(problem, meta, list(tasks.values()), shard.step) if problem.strategy != "loop" else None
    if vectorised is not None and (summed := _all_sound(problem, vectorised)) is not None:
        return summed
    for i, (index, task) in enumerate(tasks.items()):
        try:
            if vectorised is not None:
                gradient, metrics = _one(join(vectorised.gradient), i), _one(vectorised.metrics, i)
            else:
                result = problem.algorithm.meta_gradient(meta, task, problem.loss_of(task), step=shard.step)
                gradient, metrics = join(result.gradient), result.metrics
            row = {name: tensor.cpu().double().numpy() for name, tensor in metrics.items()}
            _check(problem, gradient, row, shard, index)
        except FAILURES as error:
            if problem.on_failure == "raise":
                raise
            skipped[index] = one_line(error)
        else:
            add(total, gradient)
            rows.append(row)
    return Pass(_flat(problem, total), stack_metrics(rows), skipped)


def vectorise(problem: Problem, meta: MetaParams, tasks: list[Task], step: int) -> MetaGradient:
    """The meta-gradients of all tasks, each tensor with a leading axis that counts tasks, in their order.

    Tasks of equal shapes and equally many classes are computed at once, one such bucket after the other.

    Raises:
        ConfigError: The tasks are no episodes.
    """
    buckets: dict[object, list[int]] = {}
    episodes: list[Episode] = []
    for i, task in enumerate(tasks):
        if not isinstance(task, Episode):
            raise ConfigError(
                f"train.strategy: {problem.strategy} needs supervised episodes; these tasks want train.strategy: loop"
            )
        episodes.append(task)
        buckets.setdefault(_form(problem, task), []).append(i)
    parts = [_at_once(problem, meta, [episodes[i] for i in members], step) for members in buckets.values()]
    if len(parts) == 1:
        return parts[0]
    order = [i for members in buckets.values() for i in members]
    place = sorted(range(len(order)), key=order.__getitem__)
    together = lambda several: {name: torch.cat([one[name] for one in several])[place] for name in several[0]}  # noqa: E731
    gradient = split(together([join(part.gradient) for part in parts]))
    return MetaGradient(gradient, together([part.metrics for part in parts]))


def _at_once(problem: Problem, meta: MetaParams, tasks: list[Episode], step: int) -> MetaGradient:
    """The meta-gradients of tasks of one form, vectorised."""
    loss = problem.loss_of(tasks[0])
    params = join(meta)
    device = next(iter(params.values())).device
    support, query = (
        tuple(_stack(column, device) for column in zip(*sets, strict=True))
        for sets in ([task.support_set for task in tasks], [task.query_set for task in tasks])
    )

    def vectorised(params: Params, support: Batch, query: Batch) -> tuple[Params, Metrics]:
        def one(support_set: Batch, query_set: Batch) -> tuple[Params, Metrics]:
            episode = Episode(support_set, query_set)
            gradient, metrics = problem.algorithm.meta_gradient(split(params), episode, loss, step=step)
            return join(gradient), metrics

        with function_transforms():
            return torch.vmap(one, randomness="different")(support, query)

    at_once = vectorised
    if problem.strategy == "compiled":
        key = len(tasks), _form(problem, tasks[0]), problem.algorithm.phase(step), loss.module.training
        at_once = problem.programs.of(key, vectorised, params, support, query, loss.precision)
    with torch.no_grad():
        gradient, metrics = at_once(params, support, query)
    return MetaGradient(split(gradient), metrics)


def _stack(tensors: tuple[Tensor, ...], device: torch.device) -> Tensor:
    """One tensor of all on ``device``; by page-locked memory, from which a GPU fetches them by itself."""
    if device.type == "cpu" or tensors[0].device == device:
        return torch.stack(tensors)
    together = torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype, pin_memory=True)
    return torch.stack(tensors, out=together).to(device, non_blocking=True)


def _form(problem: Problem, task: Episode) -> Hashable:
    """What tasks that are computed at once must have in common."""
    shapes = tuple(tuple((tensor.shape, tensor.dtype) for tensor in batch) for batch in task)
    return shapes, getattr(problem.loss_of(task), "classes", None)


def _all_sound(problem: Problem, result: MetaGradient) -> Pass | None:
    """The sum over all tasks at once, if nothing is wrong with any of them."""
    summed = {name: tensor.sum(0) for name, tensor in join(result.gradient).items()}
    metrics = {name: tensor.cpu().double().numpy() for name, tensor in result.metrics.items()}
    total = problem.layout.pack(summed)
    finite = bool(torch.from_numpy(total).sum().isfinite()) and np.isfinite(metrics["loss"]).all()
    rows = ({name: float(values[i]) for name, values in metrics.items()} for i in range(len(metrics["loss"])))
    if not finite or any(problem.algorithm.complaint(row) for row in rows):
        return None
    return Pass(total, metrics)


def _one(tensors: Params | Metrics, i: int) -> Params:
    return {name: tensor[i] for name, tensor in tensors.items()}


def _check(problem: Problem, gradient: Params, row: dict[str, np.ndarray], shard: Shard, index: int) -> None:
    """Raises `NumericalError` if something is wrong with the numbers of one task."""
    for name, tensor in gradient.items():
        # One reduction, no mask: a sum is finite unless an element is not (or it overflows, as bad for training).
        if not bool(tensor.sum().isfinite()):
            raise _not_finite(problem, f"meta-gradient of {name}", float(tensor.sum()), shard, index)
    if not np.isfinite(row["loss"]):
        raise _not_finite(problem, "loss", float(row["loss"]), shard, index)
    if complaint := problem.algorithm.complaint({name: float(value) for name, value in row.items()}):
        raise NumericalError(f"{problem.name(shard, index)}: {complaint}")


def _not_finite(problem: Problem, what: str, value: float, shard: Shard, index: int) -> NumericalError:
    (task,) = problem.build(shard._replace(first=index, size=1))  # once more, which gives the same
    sets = {"support": task.support_set, "query": task.query_set} if isinstance(task, Episode) else {}
    bad = [name for name, batch in sets.items() if not all(tensor.isfinite().all() for tensor in batch)]
    remedy = "lower algorithm.inner_lr or outer.lr, or set outer.clip_norm"
    if bad:
        remedy = f"its {bad[0]} set is not finite itself"
    leave = "; train.on_failure=skip leaves such tasks out" if problem.on_failure == "raise" else ""
    return NumericalError(f"the {what} of {problem.name(shard, index)} is {value}; {remedy}{leave}")


def add(total: Params, part: Params) -> None:
    """Adds ``part`` to ``total``, which is empty at first, in place."""
    for name, tensor in part.items():
        total[name] = total[name].add_(tensor) if name in total else tensor.clone()


def _flat(problem: Problem, total: Params) -> np.ndarray:
    return problem.layout.pack(total) if total else problem.layout.zeros()


def stack_metrics(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """From a list of dicts to a dict of arrays."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}


def join_metrics(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """From a list of dicts to a dict of arrays, of which those of one name may have different lengths."""
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]} if rows else {}
