"""Few-shot regression of tables: each task is one of many customers, sensors or patients, known by a few rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distmeta.core.types import Batch, Episode, Split, TaskSpec
from distmeta.errors import ConfigError, DataError, at_least, some
from distmeta.tasks.cache import ExampleSet
from distmeta.tasks.datasets import DataTasks
from distmeta.tasks.own import Predict, Predictions, truth_of_all
from distmeta.tasks.splits import SPLITS, USUAL, Fractions, by_fractions, check_fractions, listed, read_lists
from distmeta.tasks.tables import Row, rows

Floats = NDArray[np.float64]


class Scale(NamedTuple):
    """Mean and standard deviation of each column of a support set; 1 where a column is constant in it."""

    mean: Floats
    deviation: Floats

    @staticmethod
    def of(support: Floats) -> Scale:
        """Those of the rows ``support``.

        Raises:
            DataError: Their squares are too large for double precision.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            deviation = support.std(0)
        if not np.isfinite(deviation).all():
            raise DataError(f"numbers up to {np.abs(support).max():g} are too large for their spread to be computed")
        return Scale(support.mean(0), np.where(deviation > 1e-9 * (1 + np.abs(support).max(0)), deviation, 1.0))

    def apply(self, table: Floats) -> Floats:
        """(x - mean) / deviation."""
        return (table - self.mean) / self.deviation


@dataclass(eq=False, kw_only=True)
class Tabular(DataTasks):
    """Regression of a table of your own: a column names the task of each row, others hold numbers.

    A task is drawn, then K rows of it as support and others as query. All columns are shifted and scaled by mean and
    standard deviation of the support set alone (a column that is constant there is only shifted), so that nothing of
    the query is known beforehand and tasks of any units look alike; losses are in these units.

    Tasks are divided among the splits by ``split_file`` or, shuffled by ``split_seed``, by ``fractions``.

    Raises:
        ConfigError: a field is out of range.
    """

    path: Annotated[str, "The .csv, .tsv or .jsonl file, whose first line names the columns."]
    task: Annotated[str, "Column that says which task a row is of."] = "task"
    features: Annotated[tuple[str, ...], "Columns of the inputs, all numbers."]
    targets: Annotated[tuple[str, ...], "Columns of what is to be predicted, all numbers."]
    shots: Annotated[int, "Support rows of each task (K)."] = 10
    queries: Annotated[int, "Query rows of each task."] = 10
    skip_small: Annotated[bool, "Leave out tasks that have too few rows, instead of stopping at them."] = False
    split_file: Annotated[str | None, "JSON file with lists of tasks called train, val and test; null: fractions."] = (
        None
    )
    fractions: Fractions = USUAL
    split_seed: Annotated[int, "The seed that shuffles the tasks before they are divided."] = 0

    name: ClassVar[str] = "tabular"
    groups: ClassVar[str] = "tasks"

    def __post_init__(self) -> None:
        at_least("tasks.shots", self.shots, 2)
        at_least("tasks.queries", self.queries, 1)
        check_fractions(self.fractions)
        columns = [self.task, *self.features, *self.targets]
        twice = sorted({name for name in columns if columns.count(name) > 1})
        if not self.features or not self.targets or twice:
            raise ConfigError(
                f"tasks.task, tasks.features and tasks.targets must name columns, each once: {', '.join(columns)}"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Features, then targets."""
        return (*self.features, *self.targets)

    @property
    def spec(self) -> TaskSpec:
        """What a model is built for: a number for each feature in, for each target out, mean squared error."""
        return TaskSpec((len(self.features),), len(self.targets), "mse")

    def source_key(self) -> str:
        """The file's name, size and time, and the columns."""
        source = Path(self.path).expanduser()
        if not source.is_file():
            raise DataError(f"tasks.path: there is no file {source}")
        stat = source.stat()
        return f"{source} {stat.st_size} {stat.st_mtime_ns} {self.task!r} {self.columns!r}"

    def build(self) -> ExampleSet:
        """All rows, task by task in the order of the tasks' names."""
        source = Path(self.path).expanduser()
        by_task: dict[str, list[list[float]]] = defaultdict(list)
        for row in rows(source, (self.task, *self.columns)):
            name = (row.cells[0] or "").strip()
            if not name:
                raise DataError(f"{row.place} names no task: its cell {self.task!r} is empty")
            by_task[name].append(numbers(row, self.columns, 1))
        if not by_task:
            raise DataError(f"{source} holds no rows")
        names = sorted(by_task)
        table = np.array([values for name in names for values in by_task[name]])
        return ExampleSet(table, tuple(names), np.array([len(by_task[name]) for name in names], np.int64))

    def split_groups(self, names: Sequence[str], split: Split) -> NDArray[np.int64]:
        """The tasks of ``split``; with ``skip_small`` those that have enough rows."""
        if self.split_file is not None:
            chosen = listed(read_lists(Path(self.split_file).expanduser()), names, self.split_file)[split]
        else:
            chosen = by_fractions(names, self.fractions, self.split_seed, self.name)[split]
        members = np.flatnonzero([name in chosen for name in names]).astype(np.int64)
        enough = self.dataset.counts[members] >= self.shots + self.queries
        return members[enough] if self.skip_small else members

    def check(self, split: Split, members: NDArray[np.int64]) -> None:
        """A task at least, and enough rows of each."""
        if not len(members):
            raise DataError(
                f"the {split} split of {self.path} has no tasks: change tasks.fractions or tasks.split_file"
            )
        few = [group for group in members if self.dataset.counts[group] < self.shots + self.queries]
        if few:
            found = some(f"{self.dataset.names[group]} ({self.dataset.counts[group]})" for group in few)
            raise DataError(
                f"{len(few)} tasks of {self.path} ({split}) have fewer rows than {self.shots} shots + {self.queries} "
                f"queries: {found}; lower tasks.shots or tasks.queries, or set tasks.skip_small=true"
            )

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        """Draws a task: support (x, y) and query (x, y), float32 [rows, features] and [rows, targets], all scaled by
        the support."""
        group = int(rng.choice(self.checked(split)))
        drawn = rng.choice(self.dataset.counts[group], self.shots + self.queries, replace=False)
        table = self.dataset.examples[self.dataset.starts[group] + drawn]
        scale = Scale.of(table[: self.shots])
        return Episode(self.batch(table[: self.shots], scale), self.batch(table[self.shots :], scale))

    def batch(self, table: Floats, scale: Scale) -> Batch:
        """Inputs and targets of some rows."""
        scaled = torch.from_numpy(scale.apply(table)).float()
        return scaled[:, : len(self.features)].contiguous(), scaled[:, len(self.features) :].contiguous()

    def describe(self) -> str:
        """How many rows and tasks there are."""
        parts = [f"{split} {len(self.members[split]):,}" for split in SPLITS]
        return f"{len(self.dataset.examples):,} rows of {len(self.dataset.names):,} tasks ({', '.join(parts)})"

    def own_task(self, support: Path, query: Path) -> OwnTable:
        """From two tables: with features and targets, and with features and, where they are known, targets."""
        given = list(rows(support, self.columns, (self.task,)))
        known = np.array([numbers(row, self.columns, 0) for row in given])
        asked = list(rows(query, self.features, (*self.targets, self.task)))
        names = sorted({row.cells[-1].strip() for row in (*given, *asked) if row.cells[-1]})
        if len(names) > 1:
            raise DataError(
                f"{support} and {query} hold rows of {len(names)} tasks by their column {self.task!r}: {some(names)}; "
                "a model is adapted to one at a time"
            )
        for path, read in ((support, known), (query, asked)):
            if not len(read):
                raise DataError(f"{path} holds no rows")
        if len(known) < 2:
            raise DataError(f"{support} holds 1 row; its columns are scaled by their spread, which takes 2 or more")
        there = len(self.features)
        whole = [all(cell is not None and cell.strip() for cell in row.cells[there:-1]) for row in asked]
        truth = truth_of_all(
            query,
            [numbers(row, self.columns, 0)[there:] if given else None for row, given in zip(asked, whole, strict=True)],
        )
        inputs = np.array([numbers(row, self.features, 0) for row in asked])
        return OwnTable(self, known, [row.place for row in asked], inputs, None if truth is None else np.array(truth))


@dataclass
class OwnTable:
    """A user's task: rows with targets, and rows whose targets are asked for."""

    tasks: Tabular
    known: Floats
    places: list[str]
    inputs: Floats
    truth: Floats | None
    """The targets of the queries, where they are known."""

    @property
    def classes(self) -> list[str]:
        """None: outputs are numbers."""
        return []

    @property
    def support(self) -> Batch:
        """What the model is adapted to."""
        return self.tasks.batch(self.known, Scale.of(self.known))

    def predictions(self, predict: Predict) -> Predictions:
        """The targets of each query in the table's own units, and the root of the mean squared error of each."""
        scale, there = Scale.of(self.known), self.inputs.shape[1]
        inputs = (self.inputs - scale.mean[:there]) / scale.deviation[:there]
        outputs = predict(torch.from_numpy(inputs).float()).double().numpy()
        found = outputs * scale.deviation[there:] + scale.mean[there:]
        # Six digits of what targets differ by in the support set, however large they are themselves.
        digits = [6 - int(np.floor(np.log10(deviation))) for deviation in scale.deviation[there:]]
        lines = [
            [place.rsplit(" ", 1)[-1], *(str(round(float(value), n)) for value, n in zip(row, digits, strict=True))]
            for place, row in zip(self.places, found, strict=True)
        ]
        scores: dict[str, float] = {}
        if self.truth is not None:
            errors = np.sqrt(((found - self.truth) ** 2).mean(0))
            scores = {f"rmse of {name}": float(error) for name, error in zip(self.tasks.targets, errors, strict=True)}
        return Predictions(["line", *self.tasks.targets], lines, scores)


def numbers(row: Row, columns: Sequence[str], first: int) -> list[float]:
    """The cells of ``columns``, which stand from ``first`` on, as numbers.

    Raises:
        DataError: A cell is empty or holds no finite number; it is named.
    """
    found: list[float] = []
    for column, cell in zip(columns, row.cells[first:], strict=False):
        try:
            value = float(cell or "")
        except ValueError:
            value = np.nan
        if not np.isfinite(value):
            raise DataError(f"{row.place} has {cell!r} in the column {column!r}, where a number is expected")
        found.append(value)
    return found
