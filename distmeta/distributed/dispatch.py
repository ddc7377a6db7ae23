"""Which worker is sent which shard: the bookkeeping of a pool, which knows nothing of Ray."""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, MutableMapping, Sequence
from itertools import takewhile
from typing import Generic, TypeVar

import numpy as np

from distmeta.distributed.work import Shard

QUEUED = 2  # shards that a worker has at a time: one to compute, one to begin at once after it
SLOW = 3.0  # times what a shard has taken on the median, after which an idle worker does it as well
SLOW_AT_LEAST = 2.0  # seconds: to send a shard twice is not worth less

W = TypeVar("W", bound=Hashable)
R = TypeVar("R", bound=Hashable)


class Dispatch(Generic[W]):
    """One round of shards, until there is a result for each.

    A worker has at most two shards at a time. When none is left to begin and a worker is idle, it is given what a slow
    one has not come to, or has been at for `SLOW` times the median, as well: whichever result comes first counts, and
    they are equal.

    Args:
        shards: The round.
        holders: Who has sampled the data of which shard, and is therefore given it if possible; kept up to date.
        clock: Seconds.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        holders: MutableMapping[Shard, W],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.shards, self.holders, self.clock = shards, holders, clock
        self.waiting = deque(range(len(shards)))
        self.missing = set(self.waiting)
        self.queues: dict[W, list[int]] = {}
        self.began: dict[W, float] = {}
        """When each worker came to the first shard of its queue."""
        self.tries: Counter[int] = Counter()
        """How many workers have been lost at each shard."""
        self.again: set[int] = set()
        """What was given to a second worker, since the first was lost or is slow."""
        self.durations: list[float] = []

    def next(self, workers: Collection[W]) -> tuple[W, int] | None:
        """The next shard to send, by its place in the round, and the one of ``workers`` to send it to; None: nobody."""
        for worker in sorted(workers, key=lambda w: len(self.queues.get(w, []))):
            queue = self.queues.get(worker, [])
            if len(queue) >= QUEUED:
                return None
            for index in self.waiting:
                holder = self.holders.get(self.shards[index], worker)
                if holder == worker or holder not in workers:
                    return self.sent(worker, index)
            if queue:
                continue
            for index in self.waiting:  # whose data only a slow one has: they are sampled once more
                if self._is_slow(self.holders[self.shards[index]]):
                    return self.sent(worker, index)
            if not self.waiting:  # what there is for one idle worker, there is for all
                late = self._late()
                return None if late is None else self.sent(worker, late)
        return None

    def sent(self, worker: W, index: int) -> tuple[W, int]:
        """Takes in that a shard is given to a worker, as `next` has said, or because it was begun before the round."""
        if index in self.waiting:
            self.waiting.remove(index)
        queue = self.queues.setdefault(worker, [])
        if not queue:
            self.began[worker] = self.clock()
        queue.append(index)
        if any(index in other for name, other in self.queues.items() if name != worker):
            self.again.add(index)
        return worker, index

    def _is_slow(self, worker: W) -> bool:
        """Whether a worker has been at one shard for much longer than others take."""
        if not self.durations or not self.queues.get(worker):
            return False
        return self.clock() - self.began[worker] > max(SLOW * statistics.median(self.durations), SLOW_AT_LEAST)

    def _late(self) -> int | None:
        """A shard that only a slow worker has, the last of its queue."""
        copies = Counter(index for queue in self.queues.values() for index in queue)
        slowest = sorted((w for w, queue in self.queues.items() if queue), key=lambda w: self.began[w])
        for worker in takewhile(self._is_slow, slowest):
            for index in reversed(self.queues[worker]):
                if index in self.missing and copies[index] == 1:
                    return index
        return None

    def done(self, worker: W, index: int) -> bool:
        """Takes in that a result has come; whether it is the first for its shard."""
        now = self.clock()
        if worker in self.queues:  # and has not been given up a moment before
            self.durations.append(now - self.began[worker])
            self.began[worker] = now
            self.queues[worker].remove(index)
            self.holders[self.shards[index]] = worker
        if index in self.waiting:
            self.waiting.remove(index)
        first = index in self.missing
        self.missing.discard(index)
        return first

    def lost(self, worker: W) -> int | None:
        """Takes in that a worker is gone, its shards are to be sent again; the one that it was at, if any."""
        queue = self.queues.pop(worker, [])
        for index in reversed(queue):
            if index in self.missing and not any(index in other for other in self.queues.values()):
                self.waiting.appendleft(index)
        if queue:
            self.tries[queue[0]] += 1
            self.again.add(queue[0])
        return queue[0] if queue else None

    def give_up(self, index: int) -> None:
        """Takes in that a shard is to have no result."""
        if index in self.waiting:
            self.waiting.remove(index)
        self.missing.discard(index)

    def hung(self, limit: float) -> list[W]:
        """The workers that have been at a shard for more than ``limit`` seconds, twice that for each one lost at it."""
        at = {worker: queue[0] for worker, queue in self.queues.items() if queue}
        return [w for w, index in at.items() if self.clock() - self.began[w] > limit * 2 ** self.tries[index]]


class Begun(Generic[W, R]):
    """Shards of the round to come that are sent ahead, behind those of the present one.

    Args:
        shards: The round to come.
        vector: The meta-parameters that it will be at.
        sent_as: What workers are sent in their place.
    """

    def __init__(self, shards: Sequence[Shard], vector: np.ndarray, sent_as: R) -> None:
        self.vector, self.sent_as = vector, sent_as
        self.waiting = deque(shards)
        self.running: dict[R, tuple[W, Shard]] = {}
        """Who has been sent what, by the result to come."""

    def next(self, workers: Collection[W], round_: Dispatch[W]) -> tuple[W, Shard] | None:
        """The next shard to send ahead, and the one of ``workers`` to send it to; None: nobody.

        Only when none of the present round waits, and as many as a worker has at a time.
        """
        if round_.waiting or not self.waiting:
            return None
        own = Counter(worker for worker, _ in self.running.values())
        load = {worker: len(round_.queues.get(worker, [])) + own[worker] for worker in workers}
        worker = min(load, key=load.__getitem__, default=None)
        return None if worker is None or load[worker] >= QUEUED else (worker, self.waiting.popleft())

    def adopted_by(self, round_: Dispatch[W], workers: Collection[W]) -> dict[R, tuple[W, int]]:
        """Takes what has been sent to those of ``workers`` that are still there into ``round_``, which has come."""
        place = {shard: index for index, shard in enumerate(round_.shards)}
        there = {
            result: (worker, place[shard]) for result, (worker, shard) in self.running.items() if worker in workers
        }
        for worker, index in there.values():
            round_.sent(worker, index)
        return there
