"""What a run writes of itself while it trains: ``metrics.jsonl`` always, and TensorBoard's files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from distmeta.evaluation import Evaluation, mean_ci
from distmeta.runs import RunFolder, storage_errors


class MetricsLog:
    """Averages the metrics of outer steps and writes a line for each stretch of them.

    A line of kind ``train`` holds the step, means over the stretch (loss and accuracy as the algorithm gives them:
    MAML's are of the query set, Reptile's of the last mini-batch; ``grad_norm``, ``lr``),
    ``tasks_per_second`` and the seconds of each part: ``map`` (waiting for the shards), ``reduce``, ``outer``,
    ``validation``, ``checkpoint`` (copying the state, which is then written aside) on the driver, and ``sample`` and
    ``adapt`` summed over workers. Where tasks were skipped, ``skipped`` lists their ``step`` (from 0), ``task`` (the
    index in the meta-batch) and the reason ``why``. Where tasks fall into groups, ``groups`` holds for each the number
    of its ``tasks``, and mean and interval over them of the algorithm's metrics. A line of kind ``val`` holds an
    evaluation.
    """

    def __init__(self, run: RunFolder, step: int) -> None:
        self.run = run
        self._rows: list[dict[str, float]] = []
        self._seconds: list[dict[str, float]] = []
        self._tasks = 0
        self._retries, self._duplicates = 0, 0
        self._skipped: list[dict[str, Any]] = []
        self._groups: dict[str, dict[str, list[float]]] = {}
        self._step = step

    def __enter__(self) -> Self:
        from torch.utils.tensorboard import SummaryWriter  # half a second to load, which no worker needs

        with storage_errors(self.run.path):
            self._file = self.run.metrics.open("a")
            self._board = SummaryWriter(self.run.path / "tensorboard", purge_step=self._step + 1)
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._board.close()

    def add(
        self,
        step: int,
        tasks: int,
        metrics: Mapping[str, float],
        seconds: Mapping[str, float],
        retries: int,
        duplicates: int,
    ) -> None:
        """Takes in one outer step."""
        self._step = step
        self._tasks += tasks
        self._retries, self._duplicates = retries, duplicates
        self._rows.append(dict(metrics))
        self._seconds.append(dict(seconds))

    def spent(self, part: str, seconds: float) -> None:
        """Counts ``seconds`` to a part of the outer step that was taken in last, if its line has not been written."""
        if self._seconds:
            self._seconds[-1][part] = seconds

    def group(self, name: str, metrics: Mapping[str, np.ndarray]) -> None:
        """Takes in the metrics of the tasks of one group of an outer step."""
        kept = self._groups.setdefault(name, {})
        for metric, values in metrics.items():
            kept.setdefault(metric, []).extend(values.tolist())

    def skip(self, step: int, task: int, why: str) -> None:
        """Takes in that a task was left out of outer step ``step``."""
        self._skipped.append({"step": step, "task": task, "why": why})

    def flush(self) -> None:
        """Writes the line of the steps taken in since the last one, if there are any."""
        if not self._rows:
            return
        means = {name: float(np.mean([row[name] for row in self._rows])) for name in self._rows[-1]}
        parts = sorted({part for seconds in self._seconds for part in seconds})
        spent = {part: sum(seconds.get(part, 0.0) for seconds in self._seconds) for part in parts}
        wall = sum(spent[part] for part in ("map", "reduce", "outer"))
        record = means | {"kind": "train", "step": self._step, "steps": len(self._rows)}
        record |= {"tasks": self._tasks, "tasks_per_second": self._tasks / wall, "retries": self._retries}
        record["duplicates"] = self._duplicates
        if self._skipped:
            record["skipped"] = self._skipped
        if self._groups:
            record["groups"] = {name: self._group(name, kept) for name, kept in self._groups.items()}
        if self.run.mirror is not None:
            record["upload_failures"] = self.run.mirror.failures
        self._write(record | {"seconds": spent})
        for name, value in (means | {"tasks_per_second": record["tasks_per_second"]}).items():
            self._board.add_scalar(f"train/{name}", value, self._step)
        self._rows, self._seconds, self._tasks, self._skipped, self._groups = [], [], 0, [], {}

    def _group(self, name: str, kept: Mapping[str, list[float]]) -> dict[str, Any]:
        """What the line of a stretch says of one group."""
        figures = {metric: mean_ci(np.array(values)) for metric, values in kept.items()}
        for metric, figure in figures.items():
            self._board.add_scalar(f"train {metric}/{name}", figure["mean"], self._step)
        return {"tasks": len(kept["loss"])} | figures

    def validation(self, step: int, evaluation: Evaluation) -> None:
        """Writes the line of a validation."""
        self._write({"kind": "val", "step": step} | evaluation)
        metric = evaluation["metric"]
        self._board.add_scalar(f"val/{metric}", evaluation["after"]["mean"], step)
        for name, group in evaluation.get("groups", {}).items():
            self._board.add_scalar(f"val {metric}/{name}", group["after"]["mean"], step)

    def _write(self, record: dict[str, Any]) -> None:

        with storage_errors(self.run.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def _lines(self) -> list[dict[str, Any]]:
        return [record for record in self.run.records() if record["kind"] == "train"]

    def total_seconds(self) -> float:
        """Seconds of meta-training, over all resumptions, without validations."""
        return sum(
            sum(line["seconds"].get(p, 0.0) for p in ("map", "reduce", "outer", "checkpoint")) for line in self._lines()
        )

    def tasks_per_second(self) -> float:
        """Meta-training tasks a second over the whole run."""
        seconds = self.total_seconds()
        return sum(line["tasks"] for line in self._lines()) / seconds if seconds else 0.0
