"""What an outer step costs the driver, by the number of workers and the size of the model: workers that sleep.

    python benchmarks/scale.py [--workers 2 4 8 16 32 64] [--millions 0.1 12 100] [--seconds 1] [--steps 5]
                               [--nodes N] [--tree K] [--stale] [--store GB]

The driver's side is all real: the pool of actors, the object store, the sum in shard order, Adam. The actors are real
processes as well, but they load neither torch nor distmeta (64 processes with torch take more memory than most machines
have), and sleep for ``--seconds`` where a worker computes its shard. Each has one shard a step. With ``--nodes N`` they
live on N further Ray nodes of this machine with object stores of their own, so that all bytes go through sockets. With
``--tree K`` an actor adds each K results that follow each other, and the driver those sums: what distmeta does not do.
With ``--stale`` gradients are those of one step before (`outer.stale`), and workers sleep while the driver works.

Printed for each number of workers and millions of parameters, medians over the steps: ``map``, the time from sending
the parameters to having all results, and ``step``, that of the whole outer step, both less the sleeping and longer
where processes wait for a core; and the processor time of the driver's process, which hardly depends on what else the
machine does: ``in map``, to ``reduce`` and in the ``outer`` update. Sizes whose results do not fit into the object
store (``--store`` GB) are left out. Last comes what the measured times fit best, in relative terms, of

    seconds = step + worker · W + broadcast · B + result · W · B,     W workers, B gigabytes of parameters.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import namedtuple
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import ray
import torch
from ray import cloudpickle
from ray.cluster_utils import Cluster

from distmeta.config import Outer, Scaling
from distmeta.core.params import Layout
from distmeta.distributed import ray as pools
from distmeta.distributed.executor import MetaBatch, reduce_mean
from distmeta.distributed.work import Shard, ShardResult, reproducible, shards_of
from distmeta.distributed.worker import Ready
from distmeta.outer import OuterLoop

TENSORS = 40  # of a model, whatever its size
MESSAGES = {
    "distmeta": {},
    "distmeta.distributed": {},
    "distmeta.distributed.work": {"Shard": Shard._fields, "ShardResult": ShardResult._fields},
    "distmeta.distributed.worker": {"Ready": Ready._fields},
}
"""The classes that driver and workers exchange, by module, with their fields."""


@dataclass
class Sleep:
    """In the place of a problem."""

    seconds: float
    tasks: None = None
    on_failure: str = "raise"
    seed: int = 0


class Sleeper:
    """In the place of a worker."""

    def __init__(self, label: str) -> None:
        self.label, self.total = label, np.empty(0, np.float32)
        for name, classes in MESSAGES.items():  # else the first message would load distmeta
            sys.modules[name] = module = ModuleType(name)
            for cls, fields in classes.items():
                setattr(module, cls, namedtuple(cls, fields, module=name))

    def ready(self, path: list[str], pickled: bytes) -> Any:  # noqa: ARG002
        self.seconds = cloudpickle.loads(pickled).seconds
        node = ray.get_runtime_context().get_node_id()
        return sys.modules["distmeta.distributed.worker"].Ready(self.label, 0, "here", node, "none", True)

    def prepare(self, shards: Any) -> None:
        pass

    def run(self, work: str, vector: Any, shard: Any, second: Any = None) -> Any:  # noqa: ARG002
        if len(self.total) != len(vector):
            self.total = np.zeros_like(vector)  # which takes no memory of its own until it is written to
        time.sleep(self.seconds)
        metrics = {name: np.zeros(shard.size) for name in ("loss", "accuracy")}
        seconds = {"sample": 0.0, "adapt": self.seconds}
        return sys.modules["distmeta.distributed.work"].ShardResult(self.total, metrics, seconds, shard.size, {})

    def add(self, *results: Any) -> np.ndarray:
        total = results[0].total.copy()
        for result in results[1:]:
            total += result.total
        return total


PARTS = ("step", "map", "in map", "reduce", "outer")


def add_in_tree(pool: pools.RayPool, theta: np.ndarray, shards: list[Shard], fan: int) -> list[ShardResult]:
    """The sums of each ``fan`` shards, made by actors."""
    broadcast, actors = ray.put(theta), list(pool._workers)
    done = [actor.run.remote("", broadcast, shard) for actor, shard in zip(actors, shards, strict=True)]
    groups = [done[i : i + fan] for i in range(0, len(done), fan)]
    sums = [actor.add.remote(*group) for actor, group in zip(actors[::fan], groups, strict=True)]
    return [ShardResult(s, {}, {}, len(g), {}) for s, g in zip(ray.get(sums), groups, strict=True)]


def step(pool: pools.RayPool, outer: OuterLoop, workers: int, seconds: float, fan: int, last: bool) -> dict[str, float]:
    """One outer step as `distmeta.training.Training` does it; seconds of its parts."""
    clock, begin = [time.process_time()], time.perf_counter()
    theta, (shards, upcoming) = outer.taken_at(), (shards_of("train", outer.step + i, workers, 1) for i in range(2))
    ahead = outer.vector() if outer.stale and not last else None
    clock.append(time.process_time())
    start = time.perf_counter()
    if fan:
        results = add_in_tree(pool, theta, shards, fan)
    else:
        results = pool.map("meta_gradient", theta, shards, upcoming, ahead=ahead)
    mapped = time.perf_counter() - start - seconds
    clock.append(time.process_time())
    gradient = reduce_mean(results)
    clock.append(time.process_time())
    with reproducible(1, 0):
        outer.update(gradient, MetaBatch(pool, theta, shards))
    clock.append(time.process_time())
    whole = time.perf_counter() - begin - seconds
    vector, within, reduced, updated = np.diff(clock)
    return dict(zip(PARTS, (whole, mapped, within, reduced, vector + updated), strict=True))


def outer_loop(size: int, stale: bool) -> OuterLoop:
    """Adam over ``size`` parameters."""
    pieces = torch.zeros(size).tensor_split(TENSORS)
    params = {f"model.{i}": piece.clone() for i, piece in enumerate(pieces)}
    return OuterLoop(Outer(stale=stale), params, Layout.of(params))  # pyright: ignore[reportCallIssue]


def fit(rows: list[tuple[int, float, float]]) -> dict[str, float]:
    """The constants of the model for rows of workers, gigabytes and seconds, none negative."""
    names, kept = ("step", "worker", "broadcast", "result"), [0, 1, 2, 3]
    terms = np.array([[1, w, b, w * b] for w, b, _ in rows])
    measured = np.array([seconds for *_, seconds in rows])
    while True:
        found = np.linalg.lstsq(terms[:, kept] / measured[:, None], np.ones(len(rows)), rcond=None)[0]
        if (found >= 0).all():
            return dict.fromkeys(names, 0.0) | {names[k]: float(value) for k, value in zip(kept, found, strict=True)}
        kept.pop(int(found.argmin()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--millions", nargs="+", type=float, default=[0.1, 12.0, 100.0])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=0)
    parser.add_argument("--tree", type=int, default=0)
    parser.add_argument("--stale", action="store_true")
    parser.add_argument("--store", type=float, default=7.0)
    given = parser.parse_args()
    most, store = max(given.workers), int(given.store * 1e9)
    pools.Worker = Sleeper
    made = None
    if given.nodes:
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": store})
        for _ in range(given.nodes):
            made.add_node(num_cpus=-(-most // given.nodes), object_store_memory=store // given.nodes)
        ray.init(address=made.address, logging_level="warning")
    else:
        ray.init(address="local", num_cpus=most, object_store_memory=store, include_dashboard=False)
    rows: list[tuple[int, float, dict[str, float]]] = []
    print("workers | M parameters |   step ms |    map ms | in map ms | reduce ms |  outer ms", flush=True)
    for workers in given.workers:
        settings = Scaling(num_workers=workers, start_timeout=600)  # pyright: ignore[reportCallIssue]
        with pools.RayPool(Sleep(given.seconds), settings, workers, "scale") as pool:  # pyright: ignore
            pool._wait_for(workers)
            for millions in given.millions:
                size = int(1e6 * millions)
                if (workers + 2) * 4 * size > store:
                    print(f"{workers:7} | {millions:12g} | does not fit into the object store", flush=True)
                    continue
                outer = outer_loop(size, given.stale)
                all_ = [
                    step(pool, outer, workers, given.seconds, given.tree, last=i == given.steps)
                    for i in range(given.steps + 1)
                ][1:]
                row = {part: statistics.median(one[part] for one in all_) for part in PARTS}
                rows.append((workers, 4e-9 * size, row))
                shown = " | ".join(f"{1000 * row[part]:9.1f}" for part in PARTS)
                print(f"{workers:7} | {millions:12g} | {shown}", flush=True)
                del outer
            assert not pool.duplicates and not pool.retries
    for part in PARTS if len(rows) > 4 else ():
        found = fit([(workers, size, row[part]) for workers, size, row in rows])
        spread = [
            (found["step"] + found["worker"] * w + found["broadcast"] * b + found["result"] * w * b) / row[part]
            for w, b, row in rows
        ]
        text = ", ".join(f"{name} {1000 * value:.3g} ms" for name, value in found.items())
        print(f"{part:10} {text}; model / measured {min(spread):.2f} to {max(spread):.2f}")
    ray.shutdown()
    if made is not None:
        made.shutdown()


if __name__ == "__main__":
    main()
