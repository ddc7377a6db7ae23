"""The report: pictures of one run or several, and one static page that shows and compares them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Literal, NamedTuple

from matplotlib.figure import Figure

from distmeta import episode, history, pictures
from distmeta.errors import DistmetaError
from distmeta.evaluation import show
from distmeta.experiment import Experiment, assemble
from distmeta.history import History, Interval, Scores
from distmeta.metrics import MetricsLog
from distmeta.runs import RunFolder, storage_errors

EXPLANATION = (
    "± is the half-width of the 95% confidence interval of the mean over tasks. Transductive: the query examples are "
    "classified in one batch and normalised by its statistics, so each prediction profits from the others; inductive: "
    "no query example sees another."
)
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #595959; --line: #d0d0d0; --back: #f4f4f4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #161616; --soft: #a8a8a8; --line: #444; --back: #222 }
}
body { margin: 0; color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 72rem; margin: auto; padding: 1.5rem }
h1 { font-size: 1.5rem; overflow-wrap: anywhere }
.wide { overflow-x: auto }
table { border-collapse: collapse }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums }
th[scope=row] { color: var(--soft); font-weight: normal; white-space: nowrap }
figure { margin: 2rem 0 }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px }
figcaption, .note { color: var(--soft); max-width: 48rem }
pre { padding: 1rem; background: var(--back); overflow-x: auto }
summary { cursor: pointer; padding: .3rem 0 }
"""


class Picture(NamedTuple):
    """A figure of the page, or the reason why it is left out."""

    name: str
    caption: str
    figure: Figure | None
    missing: str


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
        Picture(
            "throughput",
            "Tasks a second, and what the time of outer steps went to.",
            pictures.throughput(histories),
            "no metrics yet",
        ),
    ]
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    blocks = [_picture_block(picture, folder) for picture in drawn]
    page = folder / "index.html"
    with storage_errors(page):
        page.write_text(_page(histories, blocks), encoding="utf-8")
    return page


def _episode(run: History, experiment: Experiment | None) -> Picture:
    """The first test task, adapted to; left out with the reason where it cannot be built here."""
    figure, missing = None, ""
    try:
        figure = episode.draw(episode.adapt_first(run.run, experiment or assemble(run.config)))
    except DistmetaError as error:
        missing = str(error)
    return Picture(
        "episode",
        "The first test task, adapted to from the best checkpoint; its query examples are predicted in one batch.",
        figure,
        missing,
    )


def _picture_block(picture: Picture, folder: Path) -> str:
    """The picture as it stands in the page; its PNG is written to ``folder``."""
    if picture.figure is None:
        return f"<p class=note>No picture <code>{picture.name}.png</code>: {escape(picture.missing)}.</p>"
    path = folder / f"{picture.name}.png"
    pictures.save(picture.figure, path)
    # The page holds the bytes as well, so that it can be sent on by itself.
    data = base64.b64encode(path.read_bytes()).decode()
    caption = escape(picture.caption)
    return (
        f'<figure><a href="{path.name}"><img src="data:image/png;base64,{data}" alt="{caption}"></a>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _page(histories: Sequence[History], blocks: Sequence[str]) -> str:
    names = ", ".join(run.name for run in histories)
    title = escape(f"Comparison of {len(histories)} runs" if len(histories) > 1 else names)
    configurations = [
        f"<details><summary>Configuration of {escape(run.name)}</summary><pre>{escape(run.config_text)}</pre></details>"
        for run in histories
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title} – distmeta</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>",
            _table(histories),
            f"<p class=note>{escape(EXPLANATION)}</p>",
            *blocks,
            *configurations,
            "</main>\n</body>\n</html>\n",
        ]
    )


def _table(histories: Sequence[History]) -> str:
    """A column for each run; rows that say nothing of any run are left out."""
    columns = [_cells(run) for run in histories]
    lines = ["<tr><td></td>" + "".join(f'<th scope="col">{escape(run.name)}</th>' for run in histories) + "</tr>"]
    for heading in columns[0]:
        cells = [column[heading] for column in columns]
        if any(cells):
            row = "".join(f"<td>{escape(cell or '–')}</td>" for cell in cells)
            lines.append(f'<tr><th scope="row">{escape(heading)}</th>{row}</tr>')
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _cells(run: History) -> dict[str, str]:
    """What the table says of a run, by the heading of the row; an empty string where there is nothing to say."""
    options, summary, seconds = run.config.tasks.options, run.summary, MetricsLog(run.run, run.step)
    test = summary.test if summary else None
    untrained = summary.untrained if summary else None
    neighbour = summary.nearest_neighbour if summary else None
    validation = run.validation[-1] if run.validation else None
    state = "finished" if summary else "unfinished" if run.train or run.validation else "unfinished, no metrics yet"
    sizes = [f"{options[key]}-{word}" for key, word in (("ways", "way"), ("shots", "shot")) if key in options]
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
        "untrained model, after adaptation": _interval(untrained, "after"),
        "nearest neighbour on raw inputs": show("accuracy", neighbour.model_dump()) if neighbour else "",
        "last validation": f"{validation.metric} {_interval(validation, 'after')}" if validation else "",
        "seconds of meta-training": f"{seconds.total_seconds():,.1f}" if run.train else "",
        "tasks per second": f"{seconds.tasks_per_second():,.1f}" if run.train else "",
        "seed": str(run.config.seed),
        "versions": ", ".join(f"{name} {number}" for name, number in summary.versions.items()) if summary else "",
        "folder": str(run.run.path),
    }


def _interval(scores: Scores | None, when: Literal["before", "after", "inductive"]) -> str:
    interval: Interval | None = getattr(scores, when, None)
    return show(scores.metric, interval.model_dump()) if scores and interval else ""
