"""A pool of Ray actors that pull task shards.

Workers hold nothing but caches, so a lost one costs only the shards it was at: they go to another, and the numbers stay
the same to the bit. Parameters travel as one flat array, put once a step in the object store of each node.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import sys
import time
from collections.abc import Collection, Sequence
from typing import Any, Self

import numpy as np
import ray
from ray import cloudpickle
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from distmeta.config import Scaling
from distmeta.core.types import Portable
from distmeta.distributed.cluster import amounts, capacity, connect, demand, draining
from distmeta.distributed.dispatch import QUEUED, Begun, Dispatch
from distmeta.distributed.gauges import Gauges
from distmeta.distributed.work import Problem, Shard, ShardResult, Work, left_out, span
from distmeta.distributed.worker import Ready, Worker, cause_of
from distmeta.errors import ResourceError, WorkerError, one_line

log = logging.getLogger("distmeta")

LOST = (RayActorError, ObjectLostError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)
TRIES = 4  # workers that a shard may lose before it is taken for the cause
POLL = 0.5  # seconds between looks at whether a worker hangs or is slow
HANGS = 10.0  # times what the slowest shard has taken, after which a worker is taken to hang
DEAD = "They may need more memory than a worker has; lower train.shard_size or the size of a task"
HUNG = "If they are merely long, raise scaling.shard_timeout, or lower train.shard_size or evaluation.shard_size"
LOOK = 5.0  # seconds between looks at whether the cluster has grown, or nodes are about to go
SAY = 15.0  # seconds between lines while waiting for workers


class RayPool:
    """Computes shards on Ray actors; joins a cluster, or starts a local one, and stops what it has started.

    A worker is taken into service whenever the cluster has room for it, also in the middle of a call. With
    ``scaling.min_workers`` the pool works as soon as so many are there, and the requests for the others make an
    autoscaler add nodes; with ``scaling.num_workers`` ``auto`` it asks for more when the cluster has grown. A worker on
    a node that is drained ends what it is at and goes, and another one is asked for elsewhere.

    Args:
        problem: What to compute.
        scaling: How many workers, and what each is given.
        most: The greatest number of shards of one call: more workers would idle.
        name: The run, on Ray's dashboard and in the names of its workers.

    Raises:
        ResourceError: The cluster cannot be reached, cannot give the workers their resources, or has workers of
            different hardware.
    """

    def __init__(self, problem: Problem, scaling: Scaling, most: int, name: str = "run") -> None:
        self.scaling = scaling
        self.retries, self.duplicates = 0, 0
        self._owns_cluster = not ray.is_initialized()
        if self._owns_cluster:
            connect(scaling)
        try:
            self._need, self._most, self._tasks = demand(scaling), most, problem.tasks
            self._skip, self._seed = problem.on_failure == "skip", problem.seed
            self._least = scaling.min_workers or (1 if scaling.num_workers == "auto" else scaling.num_workers)
            self.size = self._size()
            if scaling.min_workers is None:
                self._check_resources()
            self._gauges = Gauges(name)
            self._problem = ray.put(cloudpickle.dumps(problem))  # pyright: ignore[reportPrivateImportUsage]
            self._data: ray.ObjectRef | None = None
            custom = {kind: amount for kind, amount in self._need.items() if kind not in ("CPU", "GPU")}
            options: dict[str, Any] = {"scheduling_strategy": "SPREAD"} if self._spread() else {}
            self._actor: Any = ray.remote(Worker)
            self._options = options | {
                "num_cpus": self._need["CPU"], "num_gpus": self._need.get("GPU", 0), "resources": custom,
                "max_restarts": 0, "max_task_retries": 0,
            }  # fmt: skip
            self._name, self._pool, self._numbers = name, secrets.token_hex(3), itertools.count()
            self._starting: dict[ray.ObjectRef, Any] = {}
            self._fetching: dict[Any, Ready] = {}  # those of the starting ones that wait for data
            self._workers: dict[Any, Ready] = {}
            self._leaving: set[Any] = set()  # those of them whose nodes are about to go
            self._holders: dict[Shard, Any] = {}  # who has sampled the data of which shard of this step
            self._given_up: dict[Shard, str] = {}  # the shards of this step that hang, and what has been said of them
            self._late: dict[ray.ObjectRef, tuple[Any, float]] = {}  # shards that others have done, and since when
            self._begun: Begun[Any, ray.ObjectRef] | None = None  # of the next training step
            self._slowest = 0.0  # seconds of a shard
            self._left_out = 0
            self._hardware: str | None = None
            self._stillborn = 0
            self._looked = time.monotonic()
            for _ in range(self.size):
                self._add_worker()
            self._wait_for(self._least if scaling.min_workers else 1)
        except BaseException:
            self.close()
            raise

    def _size(self) -> int:
        """How many workers there should be."""
        if self.scaling.num_workers != "auto":
            return self.scaling.num_workers
        return max(self.scaling.min_workers or 1, min(capacity(self._need), self._most))

    def _spread(self) -> bool:
        """Whether workers go to different nodes; where a search has set resources aside, it has decided that."""
        return self.scaling.placement == "spread" and ray.util.get_current_placement_group() is None

    def _check_resources(self) -> None:
        if capacity(self._need) >= self.size:
            return
        have = ray.cluster_resources()
        asked = {kind: amount * self.size for kind, amount in self._need.items()}
        offered = amounts({kind: have.get(kind, 0) for kind in asked})
        raise ResourceError(
            f"{self.size} workers need {amounts(asked)}; the cluster has {offered} and holds {capacity(self._need)} of "
            "them. Lower scaling.num_workers or what a worker is given, join a larger cluster with scaling.address, or "
            "set scaling.min_workers to begin while an autoscaler adds nodes"
        )

    def _add_worker(self) -> None:
        label = f"{self._name} worker {next(self._numbers)}"
        # Names are unique in a cluster, and two runs may be called the same.
        worker: Any = self._actor.options(name=f"{label} ({self._pool})", **self._options).remote(label)
        self._starting[worker.ready.remote(sys.path, self._problem)] = worker

    def _look(self) -> None:
        """Looks now and then at what has become of the cluster, and asks for workers where some are missing."""
        if time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        going = draining()
        for worker, state in self._workers.items():
            if state.node_id in going and worker not in self._leaving:
                log.info("%s leaves: its node is drained", self._name_of(worker))
                self._leaving.add(worker)
        wanted = self._size()
        for _ in range(wanted - len(self._staying()) - len(self._starting) - self._left_out):
            self._add_worker()
        if wanted > self.size:
            log.info("the cluster has room for %d workers now instead of %d", wanted, self.size)
            self.size = wanted

    def _staying(self) -> list[Any]:
        return [worker for worker in self._workers if worker not in self._leaving]

    def _dismiss(self, round_: Dispatch[Any], busy: Collection[Any]) -> None:
        """Ends those whose nodes are about to go, when they have done what they were sent and others are there."""
        if self._staying():
            for worker in [w for w in self._leaving if not round_.queues.get(w) and w not in busy]:
                self._leaving.remove(worker)
                self._workers.pop(worker)
                ray.kill(worker)

    def _wait_for(self, least: int) -> None:
        """Returns once ``least`` workers are in service."""
        deadline = time.monotonic() + self.scaling.start_timeout
        while len(self._workers) < least:
            left = deadline - time.monotonic()
            ready, _ = ray.wait(list(self._starting), timeout=max(0.0, min(SAY, left)))
            if ready:
                self._admit(ready)
            elif left <= SAY or not self._starting:
                raise self._none_started(least)
            else:
                log.info(
                    "waiting for the cluster: %d of %d workers are there; each needs %s, free are %s",
                    len(self._workers), least, amounts(self._need), self._free(),
                )  # fmt: skip

    def _free(self) -> str:
        free = ray.available_resources()
        return amounts({kind: free.get(kind, 0) for kind in self._need})

    def _none_started(self, least: int) -> ResourceError:
        return ResourceError(
            f"{len(self._workers)} of {least} workers have started within {self.scaling.start_timeout:g} s; each needs "
            f"{amounts(self._need)}, free in the cluster are {self._free()}. {self._left_out} were left out for their "
            "hardware; another job may hold the rest; scaling.start_timeout waits longer"
        )

    def _admit(self, ready: Sequence[ray.ObjectRef]) -> None:
        """Takes workers that have started into service."""
        for ref in ready:
            worker = self._starting.pop(ref)
            try:
                state: Ready = ray.get(ref) or self._fetching.pop(worker)
                if not self._same_hardware(state):
                    self._leave_out(worker)
                elif state.has_data:
                    self._workers[worker] = state
                    self._stillborn = 0
                else:
                    self._fetching[worker] = state._replace(has_data=True)
                    self._starting[worker.take_data.remote(self._put_data())] = worker
            except RayTaskError as error:
                cause = cause_of(error)
                if not isinstance(cause, ResourceError) or self.scaling.min_workers is None:
                    raise cause from None
                log.warning("a worker is left out: %s", cause)
                self._leave_out(worker)
            except LOST as error:
                self._fetching.pop(worker, None)
                self._stillborn += 1
                if self._stillborn >= TRIES and not self._workers:
                    raise WorkerError(f"{TRIES} workers died while starting: {one_line(error)}") from error
                log.warning("a worker died while starting (%s): another one is started", one_line(error))
                self._add_worker()
            except RayError as error:
                raise WorkerError(f"Ray could not start a worker: {one_line(error)}") from error

    def _leave_out(self, worker: Any) -> None:
        """Does without a worker that cannot take part where workers come and go."""
        ray.kill(worker)
        self._left_out += 1

    def _same_hardware(self, state: Ready) -> bool:
        """Whether a worker computes on what the others do, without which the bits would depend on who computes what.

        Raises:
            ResourceError: It does not, and was not one to come when there is room.
        """
        self._hardware = self._hardware or state.hardware
        if state.hardware == self._hardware or self.scaling.mixed_hardware:
            return True
        text = f"the node {state.node} computes on {state.hardware}, the others on {self._hardware}"
        if self.scaling.min_workers is None:
            raise ResourceError(
                f"{text}: results would depend on who computes what. Ask for one kind with scaling.resources, or allow "
                "it with scaling.mixed_hardware=true"
            )
        log.warning("%s: its worker is left out; scaling.mixed_hardware=true takes it", text)
        return False

    def _put_data(self) -> ray.ObjectRef:
        """The data of the tasks in the object store, from where each node fetches them once."""
        if self._data is None:
            assert isinstance(self._tasks, Portable)
            self._data = ray.put(self._tasks.data())
            log.info("the data of the tasks are sent to the nodes that do not have them")
        return self._data

    def map(
        self,
        work: Work,
        vector: np.ndarray,
        shards: Sequence[Shard],
        upcoming: Sequence[Shard] = (),
        second: np.ndarray | None = None,
        ahead: np.ndarray | None = None,
    ) -> list[ShardResult]:
        """See `distmeta.distributed.executor.Executor.map`."""
        start = time.perf_counter()
        if second is None:
            self._holders.clear()
            self._given_up.clear()
        round_ = Dispatch(shards, self._holders)
        running: dict[ray.ObjectRef, tuple[Any, int]] = {}
        is_step = work == "meta_gradient" and second is None
        if is_step and self._begun is not None:
            assert np.array_equal(self._begun.vector, vector), "begun at other meta-parameters than announced"
            broadcast, running = self._begun.sent_as, self._begun.adopted_by(round_, self._workers)
        else:
            broadcast = ray.put(vector)
        further = None if second is None else ray.put(second)
        if is_step:
            self._begun = None if ahead is None else Begun(upcoming, ahead, ray.put(ahead))
        for index, shard in enumerate(shards):
            if shard in self._given_up:
                round_.give_up(index)
        results: dict[int, ShardResult] = {}
        # The shards of the next call that each worker will build first, if nothing happens to a worker until then.
        parts = {w: own for i, w in enumerate(self._workers) if (own := upcoming[i :: len(self._workers)][:QUEUED])}
        unbuilt = parts if ahead is None else {}
        while round_.missing:
            self._look()
            busy = {worker for worker, _ in self._late.values()}
            self._dismiss(round_, busy)
            able = [worker for worker in self._staying() or self._workers if worker not in busy]
            while (given := round_.next(able)) is not None:
                worker, index = given
                slow = [other for other, queue in round_.queues.items() if other != worker and index in queue]
                self.duplicates += len(slow)
                for other in slow:
                    log.info("%s take long on %s: an idle worker does them as well",
                             span(shards[index]), self._name_of(other))  # fmt: skip
                running[worker.run.remote(work, broadcast, shards[index], further)] = (worker, index)
            while is_step and self._begun is not None and (early := self._begun.next(able, round_)) is not None:
                self._begun.running[early[0].run.remote(work, self._begun.sent_as, early[1])] = early
            computing = bool(running or self._late)
            done, _ = ray.wait(
                [*running, *self._late, *self._starting],
                num_returns=1,
                timeout=POLL if computing else self.scaling.start_timeout,
            )
            if not done and not computing:
                raise self._none_started(1)
            limit = max(self.scaling.shard_timeout, HANGS * self._slowest)
            for worker in [*round_.hung(limit), *self._hung_since(limit)]:
                self._lose(worker, round_, f"at one shard for more than {limit:.0f} s", hung=True)
            for ref in done:
                if ref in self._starting:
                    self._admit([ref])
                elif ref in self._late:
                    self._let_go(ref, round_)
                elif ref in running:  # and not of a worker that has just been given up
                    self._take(ref, *running.pop(ref), round_, results)
                    free = (
                        w for w in unbuilt if w in self._workers and not round_.waiting and not round_.queues.get(w)
                    )
                    if (worker := next(free, None)) is not None:
                        worker.prepare.remote(unbuilt.pop(worker))
        # A worker that is still at a shard which another has done is free again when it has done it, too.
        self._late |= {ref: (w, round_.began[w]) for ref, (w, _) in running.items() if w in self._workers}
        ordered = [
            left_out(work, vector, shard, self._given_up[shard]) if shard in self._given_up else results[index]
            for index, shard in enumerate(shards)
        ]
        if is_step:
            self._gauges.step(ordered, time.perf_counter() - start, len(self._workers))
        return ordered

    def _take(
        self, ref: ray.ObjectRef, worker: Any, index: int, round_: Dispatch[Any], results: dict[int, ShardResult]
    ) -> None:
        """Takes in what has come of a shard."""
        try:
            result: ShardResult = ray.get(ref)
        except LOST as error:
            self._lose(worker, round_, type(error).__name__)
        except RayTaskError as error:
            raise cause_of(error) from None
        except RayError as error:
            raise WorkerError(f"Ray failed at {span(round_.shards[index])}: {one_line(error)}") from error
        else:
            self._slowest = max(self._slowest, sum(result.seconds.values()))
            again = index in round_.again
            if round_.done(worker, index):
                results[index] = result
                if again:
                    log.info("%s have been redone", span(round_.shards[index]))

    def _let_go(self, ref: ray.ObjectRef, round_: Dispatch[Any]) -> None:
        """Frees a worker that has ended a shard of an earlier round, which another had done before."""
        worker, _ = self._late.pop(ref)
        now = time.monotonic()  # when it has come to what is behind it
        self._late = {other: (w, now if w == worker else began) for other, (w, began) in self._late.items()}
        try:
            ray.get(ref)
        except LOST as error:
            self._lose(worker, round_, type(error).__name__)
        except RayError as error:
            log.warning("a shard failed that another worker has done: %s", one_line(error))

    def _hung_since(self, limit: float) -> list[Any]:
        return [worker for worker, began in self._late.values() if time.monotonic() - began > limit]

    def _name_of(self, worker: Any) -> str:
        """A worker in service, for messages."""
        state = self._workers[worker]
        return f"{state.label} on {state.node} (process {state.process})"

    def _lose(self, worker: Any, round_: Dispatch[Any], why: str, hung: bool = False) -> None:
        """Lets go of a worker that is lost or hangs, and starts another, without waiting for it."""
        if worker not in self._workers:
            return
        at = round_.lost(worker)
        self._late = {ref: late for ref, late in self._late.items() if late[0] != worker}
        self.retries += 1
        self._gauges.lost()
        name = self._name_of(worker)
        self._workers.pop(worker)
        where = span(round_.shards[at]) if at is not None else "work that another had done"
        log.warning("%s was lost at %s (%s): another worker redoes them", name, where, why)
        ray.kill(worker)
        if worker in self._leaving:
            self._leaving.remove(worker)  # whose place has been taken
        else:
            self._add_worker()
        if at is not None and round_.tries[at] >= TRIES:
            text = f"{where} have lost {TRIES} workers in a row, with seed {self._seed}: {why}"
            if not (hung and self._skip):
                raise WorkerError(f"{text}. {HUNG if hung else DEAD}")
            self._given_up[round_.shards[at]] = text
            round_.give_up(at)

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
