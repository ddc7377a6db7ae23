"""The report: pictures of one run or several, and one static page that shows and compares them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from distmeta import episode, history, paths, pictures
from distmeta.errors import DistmetaError, one_line
from distmeta.evaluation import show, show_value
from distmeta.experiment import Experiment, assemble
from distmeta.groups import draw_groups, draw_similarity
from distmeta.history import History, Interval, Scores
from distmeta.metrics import MetricsLog
from distmeta.page import Picture, folded, note, table, write_page
from distmeta.runs import RunFolder, describe
from distmeta.similarity import FORMULA, Similarity
from distmeta.tasks.control import Control

DIVERSITY = "diversity.json"
"""The file of a run's folder that `distmeta.diversity` writes."""
EXPLANATION = (
    "± is the half-width of the 95% confidence interval of the mean over tasks. Transductive: the query examples are "
    "classified in one batch and normalised by its statistics, so each prediction profits from the others; inductive: "
    "no query example sees another."
)


def report(runs: Sequence[RunFolder], out: Path | None = None, experiment: Experiment | None = None) -> Path:
    """Draws ``runs`` and writes the page ``index.html`` that compares them.

    Args:
        runs: One run or several; they may still be training.
        out: The folder for the page and its pictures; None: the folder ``report`` of the run, or for several runs of
            the working directory.
        experiment: What the configuration of a single run means, if its tasks or model were Python objects; None:
            assembled from the configuration.

    Returns:
        The path of the page.

    Raises:
        RunError: A folder is not that of a run, or its metrics are damaged.
        StorageError: The page or a picture cannot be written.
    """
    histories = history.read(runs)
    single = histories[0] if len(histories) == 1 else None
    folder = out or (single.run.path / "report" if single else Path("report"))
    drawn = [
        Picture(
            "learning_curve",
            "Training and validation over outer steps. Training curves are the metrics that the algorithm reports of "
            "its own tasks (MAML: query examples after adaptation; Reptile: the last mini-batch of the inner loop).",
            pictures.learning_curve(histories),
            "no metrics yet",
        ),
        Picture(
            "inner_steps",
            "How far each inner step brings unseen tasks, from no adaptation (0) on. Bands are 95% confidence "
            "intervals over tasks.",
            pictures.inner_steps(histories),
            "neither a test nor a validation yet",
        ),
        *([_episode(single, experiment)] if single else []),
        *_groups(histories),
        *(_diversity(single) if single else []),
        Picture(
            "throughput",
            "Tasks a second, and what the time of outer steps went to.",
            pictures.throughput(histories),
            "no metrics yet",
        ),
    ]
    title = f"Comparison of {len(histories)} runs" if len(histories) > 1 else histories[0].name
    configurations = [folded(f"Configuration of {run.name}", run.config_text) for run in histories]
    return write_page(folder, title, [_table(histories), note(EXPLANATION), *drawn, *configurations])


def status(run: RunFolder) -> str:
    """How far ``run`` has come, in a few lines.

    Raises:
        RunError: It is not the folder of a run, or its metrics are damaged.
    """
    (past,) = history.read([run])
    steps, last = past.config.train.steps, past.train[-1] if past.train else None
    state = "finished" if past.summary else "training" if run.in_use() else "stopped; `distmeta resume` goes on with it"
    lines = [f"{past.name}: {past.step:,} of {steps:,} outer steps, {state}"]
    if last is not None:
        age = max(0.0, time.time() - run.metrics.stat().st_mtime)
        values = {metric: last.value(metric) for metric in ("accuracy", "success", "return", "loss")}
        shown = ", ".join(f"{name} {show_value(name, value)}" for name, value in values.items() if value is not None)
        lines.append(
            f"training    {shown}, {last.tasks_per_second:.1f} tasks/s, {last.retries} shards redone, {age:.0f} s ago"
        )
        if state == "training":
            left = (steps - past.step) * past.config.train.meta_batch_size / last.tasks_per_second
            lines.append(f"time left   {left / 60:.1f} min without validations")
    for change in past.changes:
        lines.append(f"changed     at step {change.step:,}: {describe(change.changed)}")
    if past.validation:
        latest = past.validation[-1]
        lines.append(f"validation  {latest.metric} {_interval(latest, 'after')} at step {latest.step:,}")
    if past.summary and past.summary.test:
        lines.append(f"test        {past.summary.test.metric} {_interval(past.summary.test, 'after')}")
    return "\n".join(lines)


def _groups(histories: Sequence[History]) -> list[Picture]:
    """Metrics by group of tasks, where there are groups."""
    figure = draw_groups(histories)
    caption = "Unseen tasks by group: the parts of a mixture, and the sizes of tasks where they are drawn."
    return [] if figure is None else [Picture("groups", caption, figure, "")]


def _diversity(run: History) -> list[Picture]:
    """What ``distmeta diversity`` has found, if it has been asked."""
    path = run.run.path / DIVERSITY
    if not path.exists():
        return []
    try:
        found = Similarity.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        return [
            Picture(
                "diversity", "", None, f"{path} is damaged ({one_line(error)}); `distmeta diversity` writes it again"
            )
        ]
    caption = f"How alike {len(found.groups)} training tasks are at step {found.step}: {FORMULA}. {found.reading()}"
    return [Picture("diversity", caption, draw_similarity(found), "")]


def _episode(run: History, experiment: Experiment | None) -> Picture:
    """The first test task, adapted to; left out with the reason where it cannot be built here."""
    figure, missing = None, ""
    try:
        experiment = experiment or assemble(run.config)
        if isinstance(experiment.problem.tasks, Control):
            figure = paths.draw(paths.sample_first(run.run, experiment))
        else:
            figure = episode.draw(episode.adapt_first(run.run, experiment))
    except DistmetaError as error:
        missing = str(error)
    return Picture(
        "episode",
        "The first test task, adapted to from the best checkpoint.",
        figure,
        missing,
    )


def _table(histories: Sequence[History]) -> str:
    """A column for each run; rows that say nothing of any run are left out."""
    columns = [_cells(run) for run in histories]
    headings = dict.fromkeys(heading for column in columns for heading in column)
    rows = [[heading, *(column.get(heading, "") for column in columns)] for heading in headings]
    return table(["", *(run.name for run in histories)], [row for row in rows if any(row[1:])])


def _cells(run: History) -> dict[str, str]:
    """What the table says of a run, by the heading of the row; an empty string where there is nothing to say."""
    options, summary, seconds = run.config.tasks.options, run.summary, MetricsLog(run.run, run.step)
    test = summary.test if summary else None
    untrained = summary.untrained if summary else None
    neighbour = summary.nearest_neighbour if summary else None
    validation = run.validation[-1] if run.validation else None
    state = "finished" if summary else "unfinished" if run.train or run.validation else "unfinished, no metrics yet"
    if not summary and run.step >= run.config.train.steps > 0:  # as the winner of a search
        state = "trained, not judged on test tasks"
    sizes = [_size(options[key], word) for key, word in (("ways", "way"), ("shots", "shot")) if key in options]
    if "of" in options:
        sizes = ["of", ", ".join(options["of"])]
    kind = f" ({'transductive' if test.transductive else 'inductive'})" if test and test.metric == "accuracy" else ""
    return {
        "state": state,
        "algorithm": run.config.algorithm.use,
        "tasks": " ".join([run.config.tasks.use, *sizes]),
        "model": run.config.model.use,
        "outer steps": f"{run.step:,} of {run.config.train.steps:,}",
        "test tasks": f"{test.tasks:,} unseen, checkpoint of step {summary.checkpoint}" if summary and test else "",
        "test metric": test.metric if test else "",
        "before adaptation": _interval(test, "before"),
        "after adaptation": _interval(test, "after") + kind,
        "after adaptation, inductive": _interval(test, "inductive"),
        **{f"after adaptation, {name}": _group(test, name) for name in (test.groups if test else ())},
        "untrained model, after adaptation": _interval(untrained, "after"),
        "nearest neighbour on raw inputs": show("accuracy", neighbour.model_dump()) if neighbour else "",
        "last validation": f"{validation.metric} {_interval(validation, 'after')}" if validation else "",
        "seconds of meta-training": f"{seconds.total_seconds():,.1f}" if run.train else "",
        "tasks per second": f"{seconds.tasks_per_second():,.1f}" if run.train else "",
        "tasks skipped": str(sum(len(line.skipped) for line in run.train) or ""),
        "seed": str(run.config.seed),
        "versions": ", ".join(f"{name} {number}" for name, number in summary.versions.items()) if summary else "",
        "folder": run.run.address,
    }


def _size(sizes: Any, word: str) -> str:
    """``5-way``, or ``5/20-way`` where sizes are drawn."""
    return f"{'/'.join(map(str, sizes)) if isinstance(sizes, list | tuple) else sizes}-{word}"


def _group(scores: Scores | None, name: str) -> str:
    return show(scores.metric, scores.groups[name].after.model_dump()) if scores else ""


def _interval(scores: Scores | None, when: Literal["before", "after", "inductive"]) -> str:
    interval: Interval | None = getattr(scores, when, None)
    return show(scores.metric, interval.model_dump()) if scores and interval else ""
