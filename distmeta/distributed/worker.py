"""The actor: computes the shards that it is sent, and builds tasks ahead."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
from ray import cloudpickle
from ray.exceptions import RayTaskError

from distmeta.core.types import Portable, Task
from distmeta.distributed.hardware import hardware
from distmeta.distributed.work import Problem, Shard, ShardResult, Work, named, reproducible
from distmeta.errors import DataError, DistmetaError, WorkerError, one_line


class Ready(NamedTuple):
    """What a worker says of itself once it can work."""

    label: str
    """What messages call it."""
    process: int
    node: str
    """The address of its node."""
    node_id: str
    hardware: str
    """What it computes on: only equal hardware gives equal bits."""
    has_data: bool
    """Whether the data of the tasks, if they have any, are on its node."""


class Worker:
    """Holds nothing but caches, so that another one can take its place at any time.

    Args:
        label: What it is called: the run's name, and its number.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.ahead: dict[Shard, list[Task]] = {}

    def __repr__(self) -> str:
        return self.label  # what Ray writes before each line of its log

    def ready(self, path: Sequence[str], pickled: bytes) -> Ready:
        """Makes ready for a problem.

        Args:
            path: Where the driver finds modules: those that the problem's classes come from must be found here too.
            pickled: The problem.

        Raises:
            ResourceError: There is no GPU where one is asked for.
            WorkerError: The problem cannot be built here.
        """
        sys.path += [entry for entry in path if entry not in sys.path]
        with named("building the problem in a worker (its modules must be importable there)"):
            self.problem: Problem = cloudpickle.loads(pickled)
        self.problem.check_device()
        with reproducible(self.problem.threads, 0):  # torch loads much at its first use
            pass
        self.node = ray.util.get_node_ip_address()
        has_data = not isinstance(self.problem.tasks, Portable) or self.problem.tasks.at_hand()
        node_id = ray.get_runtime_context().get_node_id()
        return Ready(self.label, os.getpid(), self.node, node_id, hardware(self.problem.device), has_data)

    def take_data(self, data: Any) -> None:
        """Takes the data of the tasks, which the workers of a node share in its object store."""
        assert isinstance(self.problem.tasks, Portable)
        self.problem.tasks.attach(data)

    def prepare(self, shards: Sequence[Shard]) -> None:
        """Builds the tasks of ``shards`` while the driver is busy."""
        self.ahead = {shard: self.problem.build(shard) for shard in shards}

    def run(self, work: Work, vector: np.ndarray, shard: Shard, second: np.ndarray | None = None) -> ShardResult:
        """See `Problem.run`."""
        try:
            return self.problem.run(work, vector, shard, self.ahead.pop(shard, None), second)
        except DataError as error:
            raise DataError(f"on the node {self.node}: {error}") from error


def cause_of(error: RayTaskError) -> DistmetaError:
    """The worker's own error as it was raised there, or one that tells of it."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, DistmetaError):
        return cause
    return WorkerError(f"a worker failed: {type(cause).__name__}: {one_line(cause or error)}")
