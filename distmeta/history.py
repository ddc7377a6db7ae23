"""What a run has written of itself, read back and checked: its configuration, metrics and summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distmeta.components import explain
from distmeta.config import Config
from distmeta.core.types import Split
from distmeta.errors import RunError
from distmeta.runs import RunFolder


class Interval(BaseModel):
    """A mean over tasks and the half-width of its 95% confidence interval."""

    mean: float
    ci95: float


class Ends(BaseModel):
    """A metric before and after adaptation."""

    before: Interval
    after: Interval


class GroupScores(Ends):
    """The figures of some of an evaluation's tasks (see `distmeta.evaluation.evaluate_tasks`)."""

    tasks: int
    change: Interval | None = None
    by_inner_step: dict[str, Annotated[list[Interval], Field(min_length=1)]]
    judged: dict[str, Ends] = {}
    inductive: Interval | None = None


class Scores(GroupScores):
    """An evaluation."""

    split: Split
    metric: str
    transductive: bool
    made_head: bool = False
    groups: dict[str, GroupScores] = {}

    def points(self, metric: str) -> list[tuple[int, Interval]]:
        """Where the metric is known: the inner steps and its mean and interval there."""
        if metric in self.judged:
            ends = self.judged[metric]
            return [(0, ends.before), (len(self.by_inner_step["loss"]) - 1, ends.after)]
        return list(enumerate(self.by_inner_step.get(metric, [])))


class TrainLine(BaseModel):
    """Means over the outer steps since the line before it; metrics of the tasks' own are further fields."""

    model_config = ConfigDict(extra="allow")

    step: int
    loss: float
    tasks_per_second: float
    tasks: int
    retries: int = 0
    duplicates: int = 0
    skipped: list[dict[str, Any]] = []
    groups: dict[str, dict[str, Interval | int]] = {}
    seconds: dict[str, float]

    def value(self, metric: str) -> float | None:
        """The mean of ``metric``, if there is such."""
        return self.loss if metric == "loss" else (self.model_extra or {}).get(metric)


class ValidationLine(Scores):
    """A validation during training."""

    step: int


class ChangeLine(BaseModel):
    """Settings that count, and were changed when the run was resumed."""

    step: int
    changed: dict[str, tuple[Any, Any]]
    """The value before, and from ``step`` on."""


class Summary(BaseModel):
    """The judgement of a finished run; everything but the versions can be turned off in the configuration."""

    checkpoint: int | None = None
    test: Scores | None = None
    untrained: Scores | None = None
    nearest_neighbour: Interval | None = None
    versions: dict[str, str]


@dataclass(frozen=True)
class History:
    """A run as far as it has come."""

    run: RunFolder
    name: str
    """What the run is called among those it is compared with."""
    config: Config
    config_text: str
    """``config.yaml`` as it stands."""
    train: list[TrainLine]
    validation: list[ValidationLine]
    changes: list[ChangeLine]
    summary: Summary | None
    """None while the run is not finished."""

    @property
    def step(self) -> int:
        """Outer steps that have been logged."""
        return self.train[-1].step if self.train else 0

    @property
    def scores(self) -> Scores | None:
        """The test of a finished run, else its last validation, if there is one."""
        if self.summary is not None and self.summary.test is not None:
            return self.summary.test
        return self.validation[-1] if self.validation else None


def read(runs: Sequence[RunFolder]) -> list[History]:
    """The histories of ``runs``, each with a name of its own.

    Raises:
        RunError: A folder is not that of a run, or its metrics or summary are damaged.
        ConfigError: A configuration is damaged.
    """
    folders = {run.path: run for run in runs}  # a run that is given twice counts once
    if not folders:
        raise RunError("no run is given; name the folder of at least one")
    for folder in folders.values():
        folder.check_exists()
    configs = [folder.config() for folder in folders.values()]
    candidates = (
        [config.name or path.name for config, path in zip(configs, folders, strict=True)],
        [path.name for path in folders],
        [folder.address for folder in folders.values()],
    )
    names = next(names for names in candidates if len(set(names)) == len(names))
    return [_history(*parts) for parts in zip(folders.values(), names, configs, strict=True)]


def _history(run: RunFolder, name: str, config: Config) -> History:
    try:
        records, summary = run.records(), run.summary()
        config_text = (run.path / "config.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"the files of {run.path} cannot be read: {error}") from error
    models = {"train": TrainLine, "val": ValidationLine, "change": ChangeLine}
    lines: dict[str, list[Any]] = {kind: [] for kind in models}
    for number, record in enumerate(records, 1):
        kind = record.get("kind") if isinstance(record, dict) else None
        if kind not in lines:
            raise RunError(f"line {number} of {run.metrics} is of no known kind; kinds are {', '.join(lines)}")
        lines[kind].append(_checked(models[kind], record, f"line {number} of {run.metrics}"))
    return History(
        run,
        name,
        config,
        config_text,
        lines["train"],
        lines["val"],
        lines["change"],
        _checked(Summary, summary, str(run.path / "summary.json")) if summary else None,
    )


_Model = TypeVar("_Model", bound=BaseModel)


def _checked(model: type[_Model], data: object, where: str) -> _Model:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise RunError(f"{where} is damaged: {explain(error, model)}") from error
