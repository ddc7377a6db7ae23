"""What a run shows on Ray's dashboard and to Prometheus while it trains (``cluster/grafana.json`` draws it)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ray.util.metrics import Counter, Gauge, Histogram

from distmeta.distributed.executor import gather
from distmeta.distributed.work import ShardResult

SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]  # bounds of the histogram's buckets


class Gauges:
    """Ray metrics of one run, each with the tag ``run``."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        keys = ("run",)
        self._speed = Gauge("distmeta_tasks_per_second", "Meta-training tasks a second in the last outer step", keys)
        self._workers = Gauge("distmeta_workers", "Workers in service", keys)
        self._metric = Gauge("distmeta_train_metric", "Mean over the tasks of the last outer step", (*keys, "metric"))
        self._tasks = Counter("distmeta_tasks", "Meta-training tasks done", keys)
        self._retries = Counter("distmeta_retries", "Shards redone after a worker was lost", keys)
        self._shard = Histogram("distmeta_shard_seconds", "Seconds of a worker for a shard", SECONDS, keys)

    def lost(self) -> None:
        """A worker was lost."""
        self._retries.inc(1, self._tags)

    def step(self, results: Sequence[ShardResult], seconds: float, workers: int) -> None:
        """The shards of one outer step have come back after ``seconds``."""
        tasks = sum(result.tasks for result in results)
        self._speed.set(tasks / seconds, self._tags)
        self._workers.set(workers, self._tags)
        self._tasks.inc(tasks, self._tags)
        for name, values in gather(results).items():
            self._metric.set(float(np.mean(values)), self._tags | {"metric": name})
        for result in results:
            self._shard.observe(sum(result.seconds.values()), self._tags)
