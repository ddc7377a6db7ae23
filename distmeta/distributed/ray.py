"""A pool of Ray actors that pull task shards.

Workers hold nothing but caches, so a lost one costs only the shards it was at: they go to another, and the numbers stay
the same to the bit. Parameters travel as one flat array, put once a step in the object store of each node.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import ray
from ray import cloudpickle
from ray.exceptions import (
    AuthenticationError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from distmeta.config import Scaling
from distmeta.core.types import Task
from distmeta.distributed.work import Problem, Shard, ShardResult, Work, named, reproducible, span
from distmeta.errors import DistmetaError, ResourceError, WorkerError, one_line

log = logging.getLogger("distmeta")

LOST = (RayActorError, ObjectLostError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)
QUEUED = 2  # shards that a worker has at a time: one to compute, one to begin at once after it
TRIES = 4  # workers that a shard may lose before it is taken for the cause


class _Worker:
    """The actor: computes the shards that it is sent, and builds tasks ahead."""

    def __init__(self) -> None:
        self.ahead: dict[Shard, list[Task]] = {}

    def ready(self, path: Sequence[str], pickled: bytes) -> int:
        """The process of this worker, once it can work on the problem.

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
        return os.getpid()

    def prepare(self, shards: Sequence[Shard]) -> None:
        """Builds the tasks of ``shards`` while the driver is busy."""
        self.ahead = {shard: self.problem.build(shard) for shard in shards}

    def run(self, work: Work, vector: np.ndarray, shard: Shard) -> ShardResult:
        """See `Problem.run`."""
        return self.problem.run(work, vector, shard, self.ahead.pop(shard, None))


class RayPool:
    """Computes shards on Ray actors; joins a cluster, or starts a local one, and stops what it has started.

    Args:
        problem: What to compute.
        scaling: How many workers, and what each is given.
        most: The greatest number of shards of one call: more workers would idle.

    Raises:
        ResourceError: The cluster cannot be reached, or cannot give even one worker its resources.
    """

    def __init__(self, problem: Problem, scaling: Scaling, most: int) -> None:
        self.scaling = scaling
        self.retries = 0
        self._owns_cluster = not ray.is_initialized()
        if self._owns_cluster:
            connect(scaling)
        try:
            self.size = self._size(most)
            self._check_resources()
            self._problem = ray.put(cloudpickle.dumps(problem))  # pyright: ignore[reportPrivateImportUsage]
            gpus = scaling.gpus_per_worker if scaling.use_gpu else 0
            self._actor: Any = ray.remote(_Worker).options(
                num_cpus=scaling.cpus_per_worker, num_gpus=gpus, max_restarts=0, max_task_retries=0
            )
            self._starting: dict[ray.ObjectRef, Any] = {}
            self._workers: dict[Any, int] = {}
            self._stillborn = 0
            for _ in range(self.size):
                self._add_worker()
            self._wait_for_first()
        except BaseException:
            self.close()
            raise

    def _size(self, most: int) -> int:
        if self.scaling.num_workers != "auto":
            return self.scaling.num_workers
        have = ray.cluster_resources()
        if self.scaling.use_gpu:
            found = int(have.get("GPU", 0) / self.scaling.gpus_per_worker)
        else:
            found = int(have.get("CPU", 1) / max(self.scaling.cpus_per_worker, 1e-3))
        return max(1, min(found, most))

    def _check_resources(self) -> None:
        have = ray.cluster_resources()
        need = {"CPU": self.scaling.cpus_per_worker * self.size}
        if self.scaling.use_gpu:
            need["GPU"] = self.scaling.gpus_per_worker * self.size
        if any(have.get(kind, 0) < amount for kind, amount in need.items()):
            asked = ", ".join(f"{amount:g} {kind}" for kind, amount in need.items())
            offered = ", ".join(f"{have.get(kind, 0):g} {kind}" for kind in need)
            raise ResourceError(
                f"{self.size} workers need {asked}; the cluster has {offered}. Lower scaling.num_workers, "
                "scaling.cpus_per_worker or scaling.gpus_per_worker, or join a larger cluster with scaling.address"
            )

    def _add_worker(self) -> None:
        worker: Any = self._actor.remote()
        self._starting[worker.ready.remote(sys.path, self._problem)] = worker

    def _wait_for_first(self) -> None:
        while not self._workers:
            ready, _ = ray.wait(list(self._starting), timeout=self.scaling.start_timeout)
            if not ready:
                raise self._none_started()
            self._admit(ready)

    def _none_started(self) -> ResourceError:
        free = ray.available_resources()
        offered = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
        return ResourceError(
            f"no worker has started within {self.scaling.start_timeout:g} s; free in the cluster: {offered}. "
            "Another job may hold the rest; scaling.start_timeout waits longer"
        )

    def _admit(self, ready: Sequence[ray.ObjectRef]) -> None:
        """Takes workers that have started into service."""
        for ref in ready:
            worker = self._starting.pop(ref)
            try:
                self._workers[worker] = ray.get(ref)
                self._stillborn = 0
            except RayTaskError as error:
                raise _unwrap(error) from None
            except LOST as error:
                self._workers.pop(worker, None)
                self._stillborn += 1
                if self._stillborn >= TRIES:
                    raise WorkerError(f"{TRIES} workers died while starting: {one_line(error)}") from error
                log.warning("a worker died while starting (%s): another one is started", one_line(error))
                self._add_worker()

    def map(
        self, work: Work, vector: np.ndarray, shards: Sequence[Shard], upcoming: Sequence[Shard] = ()
    ) -> list[ShardResult]:
        """See `distmeta.distributed.executor.Executor.map`."""
        broadcast = ray.put(vector)
        waiting = deque(range(len(shards)))
        results: dict[int, ShardResult] = {}
        running: dict[ray.ObjectRef, tuple[Any, int]] = {}
        queues: dict[Any, list[int]] = {}
        tries: Counter[int] = Counter()
        # The shards of the next call that each worker will be sent first, if nothing happens to a worker until then.
        ahead = {w: upcoming[i :: len(self._workers)][:QUEUED] for i, w in enumerate(self._workers)}
        while len(results) < len(shards):
            while waiting and self._workers:
                worker = min(self._workers, key=lambda w: len(queues.setdefault(w, [])))  # the first of the idlest
                if len(queues[worker]) >= QUEUED:
                    break
                index = waiting.popleft()
                running[worker.run.remote(work, broadcast, shards[index])] = (worker, index)
                queues[worker].append(index)
            done, _ = ray.wait(
                [*running, *self._starting], num_returns=1, timeout=None if running else self.scaling.start_timeout
            )
            if not done:
                raise self._none_started()
            for ref in done:
                if ref in self._starting:
                    self._admit([ref])
                    continue
                worker, index = running.pop(ref)
                try:
                    results[index] = ray.get(ref)
                    queues[worker].remove(index)
                except LOST as error:
                    waiting.appendleft(index)
                    if worker in self._workers:
                        at = queues[worker][0]  # the one it was computing; what was queued behind it is not to blame
                        tries[at] += 1
                        self._replace(worker, error, shards[at], tries[at])
                except RayTaskError as error:
                    raise _unwrap(error) from None
                except RayError as error:
                    raise WorkerError(f"Ray failed at {span(shards[index])}: {one_line(error)}") from error
                else:
                    if not waiting and not queues[worker] and worker in ahead:
                        worker.prepare.remote(ahead.pop(worker))
        return [results[index] for index in range(len(shards))]

    def _replace(self, worker: Any, error: Exception, shard: Shard, tries: int) -> None:
        """Lets go of a lost worker and starts another, without waiting for it."""
        self.retries += 1
        log.warning(
            "worker %d was lost at %s (%s): another worker redoes them",
            self._workers.pop(worker),
            span(shard),
            type(error).__name__,
        )
        ray.kill(worker)
        self._add_worker()
        if tries >= TRIES:
            raise WorkerError(
                f"{span(shard)} have lost {tries} workers in a row: {one_line(error)}. They may need more memory than "
                "a worker has; lower train.shard_size or the size of a task"
            ) from error

    def close(self) -> None:
        """Ends the workers, and the cluster if it was started here."""
        for worker in [*getattr(self, "_workers", ()), *getattr(self, "_starting", {}).values()]:
            ray.kill(worker)
        self._workers, self._starting = {}, {}
        if self._owns_cluster:
            ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def connect(scaling: Scaling, log_to_driver: bool = True) -> None:
    """Joins the cluster that ``scaling`` or the environment names, or starts one on this machine.

    Raises:
        ResourceError: The cluster cannot be reached.
    """
    address = scaling.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": "warning", "log_to_driver": log_to_driver, "namespace": "distmeta"}
    start = time.perf_counter()
    before = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            # A worker per core is the rule; who asks for more on one machine gets them, sharing the cores.
            wanted = 0 if scaling.num_workers == "auto" else scaling.num_workers * scaling.cpus_per_worker
            cores = int(np.ceil(wanted)) if wanted > len(os.sched_getaffinity(0)) else None
            ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
    except (ConnectionError, AuthenticationError, ValueError, RuntimeError) as error:
        raise ResourceError(
            f"the Ray cluster {address or 'of this machine'} cannot be joined ({one_line(error)}); is it up, and is "
            "RAY_AUTH_MODE=token set here if it uses tokens?"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # ray.init sets a handler of its own, which exits with 15
    log.info("Ray is ready after %.1f s", time.perf_counter() - start)


def _unwrap(error: RayTaskError) -> DistmetaError:
    """The worker's own error as it was raised there, or one that tells of it."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, DistmetaError):
        return cause
    return WorkerError(f"a worker failed: {type(cause).__name__}: {one_line(cause or error)}")
