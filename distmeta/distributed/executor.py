"""The protocol of those who compute shards, and the one that needs no cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np

from distmeta.distributed.work import Problem, Shard, ShardResult, Work
from distmeta.errors import NumericalError


class Executor(Protocol):
    """Computes shards somewhere; a context manager that gives its resources back at the end."""

    retries: int
    """How many workers have been lost, so that their shards were given out again."""
    duplicates: int
    """How many shards have been given to a second worker, since the first was slow."""

    def map(
        self,
        work: Work,
        vector: np.ndarray,
        shards: Sequence[Shard],
        upcoming: Sequence[Shard] = (),
        second: np.ndarray | None = None,
        ahead: np.ndarray | None = None,
    ) -> list[ShardResult]:
        """Does ``work`` on each shard at the meta-parameters ``vector``; the results are in shard order.

        ``upcoming`` are the shards of the next call for this work, whose tasks may be built while the caller is busy;
        if it is known already that this will be at ``ahead``, they may be computed as well. With ``second`` (see
        `Problem.run`) this is a further pass over the data that were sampled at ``vector``.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


class InProcess:
    """Computes the shards one after the other in this process.

    Raises:
        ResourceError: There is no GPU where one is asked for.
    """

    retries = 0
    duplicates = 0

    def __init__(self, problem: Problem) -> None:
        problem.check_device()
        self.problem = problem

    def map(
        self,
        work: Work,
        vector: np.ndarray,
        shards: Sequence[Shard],
        upcoming: Sequence[Shard] = (),
        second: np.ndarray | None = None,
        ahead: np.ndarray | None = None,
    ) -> list[ShardResult]:
        """See `Executor.map`."""
        return [self.problem.run(work, vector, shard, second=second) for shard in shards]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def reduce_mean(results: Sequence[ShardResult]) -> np.ndarray:
    """The mean over tasks: shard sums added in shard order, divided by the number of tasks that are in them.

    Raises:
        NumericalError: Every task has been skipped.
    """
    total: np.ndarray | None = None
    for result in results:
        assert result.total is not None
        total = result.total.copy() if total is None else np.add(total, result.total, out=total)
    assert total is not None
    tasks = sum(result.tasks for result in results)
    if not tasks:
        reasons = [reason for result in results for reason in result.skipped.values()]
        raise NumericalError(
            f"all {len(reasons)} tasks of an outer step were skipped; the first one, since {reasons[0]}"
        )
    return np.divide(total, tasks, out=total)


class MetaBatch:
    """Further passes over the data that the tasks of an outer step have sampled at ``theta``."""

    def __init__(self, executor: Executor, theta: np.ndarray, shards: Sequence[Shard]) -> None:
        self.executor, self.theta, self.shards = executor, theta, shards
        self.skipped: dict[int, str] = {}
        """Tasks that any of the passes has left out, with the reason."""

    def gradient(self, at: np.ndarray) -> np.ndarray:
        """The mean meta-gradient at other meta-parameters."""
        return self._mean("meta_gradient", at)

    def curvature(self, direction: np.ndarray) -> np.ndarray:
        """The product of a direction and the Hessian of the mean divergence of adapted policies at theta."""
        return self._mean("curvature", direction)

    def _mean(self, work: Work, second: np.ndarray) -> np.ndarray:
        results = self.executor.map(work, self.theta, self.shards, second=second)
        self.skipped |= {index: why for result in results for index, why in result.skipped.items()}
        return reduce_mean(results)

    def objective(self, at: np.ndarray) -> tuple[float, float]:
        """The mean of what the outer loop descends, and of the adapted policies' divergence from those of theta."""
        metrics = gather(self.executor.map("objective", self.theta, self.shards, second=at))
        return float(metrics["loss"].mean(dtype=np.float64)), float(metrics["kl"].mean(dtype=np.float64))


def gather(results: Sequence[ShardResult]) -> dict[str, np.ndarray]:
    """The metrics of all tasks in task order, each an array whose first axis counts tasks."""
    some = [result.metrics for result in results if result.metrics]
    return {name: np.concatenate([metrics[name] for metrics in some]) for name in some[0]} if some else {}
