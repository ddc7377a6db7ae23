"""The protocol of those who compute shards, and the one that needs no cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np

from distmeta.distributed.work import Problem, Shard, ShardResult, Work


class Executor(Protocol):
    """Computes shards somewhere; a context manager that gives its resources back at the end."""

    retries: int
    """How many shards have been given out again after a worker was lost."""

    def map(
        self,
        work: Work,
        vector: np.ndarray,
        shards: Sequence[Shard],
        upcoming: Sequence[Shard] = (),
        second: np.ndarray | None = None,
    ) -> list[ShardResult]:
        """Does ``work`` on each shard at the meta-parameters ``vector``; the results are in shard order.

        ``upcoming`` are the shards of the next call, whose tasks may be built while the caller is busy. With ``second``
        (see `Problem.run`) this is a further pass over the data that were sampled at ``vector``.
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
    ) -> list[ShardResult]:
        """See `Executor.map`."""
        return [self.problem.run(work, vector, shard, second=second) for shard in shards]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def reduce_mean(results: Sequence[ShardResult], tasks: int) -> np.ndarray:
    """The mean meta-gradient: shard sums added in shard order, divided by the number of tasks."""
    total: np.ndarray | None = None
    for result in results:
        assert result.total is not None
        total = result.total.copy() if total is None else np.add(total, result.total, out=total)
    assert total is not None
    return np.divide(total, tasks, out=total)


class MetaBatch:
    """Further passes over the data that the tasks of an outer step have sampled at ``theta``."""

    def __init__(self, executor: Executor, theta: np.ndarray, shards: Sequence[Shard], tasks: int) -> None:
        self.executor, self.theta, self.shards, self.tasks = executor, theta, shards, tasks

    def gradient(self, at: np.ndarray) -> np.ndarray:
        """The mean meta-gradient at other meta-parameters."""
        return reduce_mean(self.executor.map("meta_gradient", self.theta, self.shards, second=at), self.tasks)

    def curvature(self, direction: np.ndarray) -> np.ndarray:
        """The product of a direction and the Hessian of the mean divergence of adapted policies at theta."""
        return reduce_mean(self.executor.map("curvature", self.theta, self.shards, second=direction), self.tasks)

    def objective(self, at: np.ndarray) -> tuple[float, float]:
        """The mean of what the outer loop descends, and of the adapted policies' divergence from those of theta."""
        results = self.executor.map("objective", self.theta, self.shards, second=at)
        loss, kl = (np.concatenate([result.metrics[name] for result in results]) for name in ("loss", "kl"))
        return float(loss.mean(dtype=np.float64)), float(kl.mean(dtype=np.float64))
