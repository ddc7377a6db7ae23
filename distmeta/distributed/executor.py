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
        self, work: Work, vector: np.ndarray, shards: Sequence[Shard], upcoming: Sequence[Shard] = ()
    ) -> list[ShardResult]:
        """Does ``work`` on each shard at the meta-parameters ``vector``; the results are in shard order.

        ``upcoming`` are the shards of the next call, whose tasks may be built while the caller is busy.
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
        self, work: Work, vector: np.ndarray, shards: Sequence[Shard], upcoming: Sequence[Shard] = ()
    ) -> list[ShardResult]:
        """See `Executor.map`."""
        return [self.problem.run(work, vector, shard) for shard in shards]

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
