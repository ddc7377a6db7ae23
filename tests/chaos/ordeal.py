"""A training of MAML and one of Reptile on one cluster, and what happens to them."""

from __future__ import annotations

import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

from .driver import RUNS, Driver, digest
from .faults import FAULTS, Hit
from .tasks import PAUSE

NODES = 1  # beside the head
PAUSED = 0.15  # seconds that a task takes longer while there are faults to come
STUCK = 600.0  # seconds without a step
NOTICE = 120.0  # seconds that a node has left: that much, or less, is what clouds give spot instances
LOST = re.compile(r"\(process (\d+)\) was lost at (tasks \S+ of step \d+ \(split \w+\))")
SLOW = re.compile(r"(tasks \S+ of step \d+ \(split \w+\)) take long on .*\(process (\d+)\)")
REDONE = re.compile(r"(tasks \S+ of step \d+ \(split \w+\)) have been redone")


class Failed(Exception):
    """The law is broken."""


class Ordeal:
    """Both runs, the cluster that they share, and their faults.

    Args:
        seed: Of the schedule.
        folder: For the runs and their caches.
        cluster: Of `cluster`.
        expected: What each run should end with (see `undisturbed`).
        steps: Outer steps of each run.
        environment: Of the drivers.
        disk: A small file system that can be filled, if there is one.
        say: Takes a line.
    """

    def __init__(
        self,
        seed: str,
        folder: Path,
        cluster: Cluster,
        expected: dict[str, str],
        steps: int,
        environment: dict[str, str],
        disk: Path | None,
        say: Callable[[str], None],
    ) -> None:
        self.random, self.folder, self.cluster, self.disk, self.say = random.Random(seed), folder, cluster, disk, say
        self.expected = expected
        self.hits: list[tuple[float, str, Hit, dict[str, int]]] = []
        """When, which fault, the processes that it has hit, and the step of each run."""
        self._pause = Path(environment[PAUSE])
        self._pause.write_text(str(PAUSED))
        home = disk or folder
        environment = environment | {"RAY_ADDRESS": cluster.address}
        self.drivers = [Driver(name, home / f"{name}-{seed}", environment, 2, steps) for name in RUNS]
        self._moved = {driver.name: (0, time.monotonic()) for driver in self.drivers}
        self._due: list[float] = []  # when nodes are to be added
        self._drained: list[tuple[float, Any]] = []  # since when, and which nodes
        self._left: list[float] = []  # seconds until they were empty
        self.reached: dict[str, list[tuple[float, int]]] = defaultdict(list)
        """When each run has come to which step."""

    # What faults work with

    def workers(self, most: int) -> list[psutil.Process]:
        """Up to ``most`` workers at random, of any run."""
        found: list[psutil.Process] = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Worker"):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        found.sort(key=lambda process: process.pid)
        return self.random.sample(found, min(most, len(found)))

    def pick(self) -> Driver | None:
        """A run that is not at its end; mostly one that has moved since it was started."""
        left = [driver for driver in self.drivers if not driver.ended]
        if self.random.random() > 0.1:
            left = [driver for driver in left if driver.step() != driver.from_step]
        return self.random.choice(left) if left else None

    def expect(self, driver: Driver, holds: bool, otherwise: str) -> None:
        """Raises `Failed` unless it ``holds``."""
        if not holds:
            raise Failed(f"{driver.name} {otherwise}\n{driver.last_words()[-3000:]}")

    def nodes(self) -> list[Any]:
        """The nodes that can be taken away, in the order in which they came."""
        return [node for node in self.cluster.worker_nodes if node not in (drained for _, drained in self._drained)]

    def workers_on(self, node: Any) -> list[int]:
        """The processes of a node's workers."""
        return [process.pid for process in self.workers(99) if process.ppid() == _raylet(node).pid]

    def replace_node(self, node: Any) -> None:
        """Ends a node at once, and adds one after a while."""
        self.cluster.remove_node(node, allow_graceful=False)
        self._due.append(time.monotonic() + self.random.uniform(1, 4))

    def drain(self, node: Any) -> list[int]:
        """Gives a node notice, and adds one after a while; the processes of its workers."""
        hit, notice = self.workers_on(node), (time.time() + NOTICE) * 1000
        accepted, why = GcsClient(address=self.cluster.address).drain_node(
            node.node_id, DRAIN_NODE_REASON_PREEMPTION, "chaos", int(notice)
        )
        if not accepted:
            raise Failed(f"Ray does not drain a node: {why}")
        self._drained.append((time.monotonic(), node))
        self._due.append(time.monotonic() + self.random.uniform(1, 4))
        return hit

    # What happens

    def suffer(self, schedule: Iterator[str], gap: float) -> list[str]:
        """Inflicts the faults of ``schedule``, some ``gap`` seconds apart; those that found nothing to hit."""
        missed: list[str] = []
        for kind in schedule:
            if any(driver.step() > driver.steps - 40 for driver in self.drivers):
                self._pause.write_text(str(4 * PAUSED))  # some steps must be left for the faults to come
            end = time.monotonic() + self.random.uniform(0.2, 2 * gap)
            while time.monotonic() < end:
                self._watch()
            if all(driver.done for driver in self.drivers):
                break
            before = time.monotonic()
            hit: Hit | None = None
            at, steps = before, {}
            while hit is None and time.monotonic() < before + 90:  # until there is somebody to hit
                at, steps = time.monotonic(), {driver.name: driver.step() for driver in self.drivers}
                hit = FAULTS[kind](self)
                if hit is None:
                    for _ in range(10):
                        self._watch()
            if hit is None:
                missed.append(kind)
            else:
                self.hits.append((at, kind, hit, steps))
                self.say(f"{kind:20} at steps {', '.join(map(str, steps.values()))}"
                         + (f", processes {', '.join(map(str, hit))}" if hit else ""))  # fmt: skip
        return missed

    def end(self) -> None:
        """Lets both runs come to their end, and compares what is left of them.

        Raises:
            Failed: A run does not end, ends with an error, or with other parameters.
        """
        self._pause.write_text("0")
        while self._drained or not all(driver.done and driver.ended for driver in self.drivers):
            self._watch()
        for driver in self.drivers:
            self.expect(driver, driver.process.returncode == 0, f"ended with {driver.process.returncode}")
            found = digest(driver.folder)
            self.expect(driver, found == self.expected[driver.name],
                        f"ended with other parameters: {found} instead of {self.expected[driver.name]}")  # fmt: skip
            failures = driver.failures()
            self.expect(driver, not failures, f"shows a traceback of {', '.join(failures)}")

    def _watch(self) -> None:
        time.sleep(0.1)
        now = time.monotonic()
        if self._due and self._due[0] < now:
            self._due.pop(0)
            add_node(self.cluster)
        for began, node in list(self._drained):
            if _raylet(node).poll() is not None:  # it ends by itself when nobody is left on it
                self._drained.remove((began, node))
                self._left.append(now - began)
                self.cluster.remove_node(node)
            elif now - began > NOTICE:
                raise Failed(f"a node that was drained is still in use after {NOTICE:.0f} s")
        for driver in self.drivers:
            step = driver.step()
            if step != self._moved[driver.name][0]:
                self._moved[driver.name] = step, now
                self.reached[driver.name].append((now, step))
            if driver.heed():  # what was to go back to the checkpoint before has been ended before it had
                continue
            code = driver.process.poll()
            self.expect(driver, code in (None, 0), f"ended with {code}, which nobody has asked for")
            self.expect(
                driver, driver.done or now - self._moved[driver.name][1] < STUCK, f"has stood still for {STUCK} s"
            )

    def recoveries(self) -> dict[str, list[float]]:
        """For each kind of fault the seconds from it until the shard that it has hit was redone, or for a driver until
        its run had come further than before, for a drained node until it was empty."""
        found: dict[str, list[float]] = defaultdict(list, {"node drained": self._left})
        for driver in self.drivers:
            waiting: dict[str, tuple[float, str]] = {}
            for at, line in driver.said:
                lost, slow, redone = LOST.search(line), SLOW.search(line), REDONE.search(line)
                process, span = (int(lost[1]), lost[2]) if lost else (int(slow[2]), slow[1]) if slow else (0, "")
                hit = next(
                    ((when, kind) for when, kind, hit, _ in reversed(self.hits) if process in hit and when < at), None
                )
                if hit is not None and span not in waiting:
                    waiting[span] = hit
                elif redone and redone[1] in waiting:
                    when, kind = waiting.pop(redone[1])
                    found[kind].append(at - when)
            for when, kind, hit, steps in self.hits:
                if driver.name in hit:
                    further = next(
                        (at for at, step in self.reached[driver.name] if at > when and step > steps[driver.name]), None
                    )
                    if further is not None:
                        found[kind].append(further - when)
        return found


def undisturbed(folder: Path, environment: dict[str, str], steps: int) -> dict[str, str]:
    """What each run ends with in one process, without Ray and without faults."""
    drivers = [Driver(name, folder / f"{name}-undisturbed", environment, 0, steps) for name in RUNS]
    for driver in drivers:
        if driver.wait(300) != 0:
            raise Failed(f"the undisturbed run of {driver.name} failed\n{driver.last_words()}")
    return {driver.name: digest(driver.folder) for driver in drivers}


def _raylet(node: Any) -> Any:
    return next(info.process for info in node.all_processes["raylet"])


def add_node(cluster: Cluster) -> None:
    """A node with room for two workers."""
    cluster.add_node(num_cpus=2, wait=False, include_dashboard=False)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster of separate raylets on this machine."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        for _ in range(NODES):
            add_node(made)
        yield made
    finally:
        made.shutdown()
