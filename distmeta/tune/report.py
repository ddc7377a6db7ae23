"""The page of a search: its table, and pictures of what was tried, what it cost and what mattered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from distmeta.evaluation import describe
from distmeta.page import Picture, folded, note, table, write_page
from distmeta.pictures import BLUE, GREY, ORANGE, VERMILLION, blank, legend, tidy
from distmeta.runs import RunFolder
from distmeta.tune.results import Trial, groups_of, importances
from distmeta.tune.search import Search
from distmeta.tune.space import Dimension

STATES = {"finished": (BLUE, 1.2), "pruned": (ORANGE, 0.9), "unfinished": (GREY, 0.9), "failed": ("black", 0.9)}
BEST = "best configuration"
SELECTION = (
    "Trials are compared by their validations, on tasks of classes that are neither in training nor in test; a trial's "
    "score is that of its best checkpoint. The best configuration is the best of those that were trained to their end. "
    "Test tasks were used for it alone, after the search."
)


def write_report(search: Search, run: RunFolder, trials: Sequence[Trial], summary: Mapping[str, Any]) -> Path:
    """Writes ``report/index.html``.

    Returns:
        Its path.
    """
    best = set(summary["best"]["trials"])
    pictures = [
        Picture("budget", "Validation over the outer steps of each trial.", _budget(search, trials, best), "no trials"),
        Picture(
            "parallel",
            "Every trial's settings and score; settings of an alternative that was not chosen are left out.",
            _parallel(search, trials, best),
            "no trial has a score",
        ),
        Picture(
            "importance",
            "How much of being among the best quarter of the trials each setting explains (PED-ANOVA, Watanabe et al., "
            "2023). Trials that were stopped early count as they stood. Settings of an alternative, which only some "
            "trials have, are left out.",
            _importance(importances(trials, search)),
            "it needs 8 trials with a score",
        ),
    ]
    if len(search.metrics) > 1:
        front = {name for names in summary["pareto_front"] for name in names}
        caption = "The first two metrics of each trial; no other trial is better than a marked one in every metric."
        pictures.append(Picture("front", caption, _front(search, trials, front), ""))
    blocks = [
        _facts(search, summary),
        note(SELECTION),
        *pictures,
        _table(search, trials),
        folded("The search", (run.path / "search.yaml").read_text("utf-8")),
        folded("The best configuration", (run.path / "best.yaml").read_text("utf-8")),
    ]
    return write_page(run.path / "report", f"Search {search.name}", blocks)


def show(value: Any) -> str:
    """A value for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings on a line."""
    return " ".join(f"{key}={show(value)}" for key, value in settings.items())


def _facts(search: Search, summary: Mapping[str, Any]) -> str:
    best = summary["best"]
    rows = [
        [
            "trials",
            ", ".join(f"{summary[s]} {s}" for s in ("finished", "pruned", "failed", "unfinished") if summary[s]),
        ],
        ["searcher, scheduler", f"{search.searcher.use}, {search.scheduler.use}"],
        ["outer steps, all trials", f"{summary['outer_steps']:,} of {summary['outer_steps_without_pruning']:,}"],
        ["seconds of meta-training, all trials", f"{summary['seconds_of_training']:,.1f}"],
        ["best", ", ".join(best["trials"])],
        ["its settings", settings_text(best["settings"])],
        [f"its validation {search.metrics[0]}", show(best["validation"]["mean"])],
    ]
    if "test" in best:
        rows.append([f"its test on {best['test']['tasks']:,} unseen tasks", describe(best["test"])])
    return table(["", "value"], rows)


def _table(search: Search, trials: Sequence[Trial]) -> str:
    """A row for each trial, the best first."""
    rows: list[list[str]] = []
    for group in groups_of(trials, search):
        for trial in group.trials:
            scores = [show(trial.score(metric)) for metric in search.metrics]
            settings = settings_text(search.parsed.short(trial.sample))
            state = f"{trial.state}: {trial.failure}" if trial.failure else trial.state
            seed = str(search.trial_config(trial.sample).seed)
            rows.append([trial.name, state, f"{trial.step:,}", *scores, f"{trial.seconds:,.1f}", seed, settings])
    return table(["", "state", "steps", *search.metrics, "seconds of training", "seed", "settings"], rows)


def _budget(search: Search, trials: Sequence[Trial], best: set[str]) -> Figure | None:
    metric = search.metrics[0]
    if not any(trial.reports for trial in trials):
        return None
    figure = blank(9, 4.8)
    panel = figure.subplots()
    for trial in sorted(trials, key=lambda trial: trial.name in best):
        steps = [row["step"] for row in trial.reports]
        colour, width = (VERMILLION, 2.2) if trial.name in best else STATES[trial.state]
        values = [row[metric] for row in trial.reports]
        panel.plot(steps, values, color=colour, linewidth=width, marker=".", alpha=1 if trial.name in best else 0.7)
    panel.set_xlabel("outer steps")
    panel.set_ylabel(f"validation {metric}")
    tidy(panel)
    states = [state for state in STATES if any(t.state == state and t.name not in best for t in trials)]
    handles = [Line2D([], [], color=VERMILLION, linewidth=2.2, label=BEST)]
    handles += [Line2D([], [], color=STATES[s][0], label=f"{s} ({_count(trials, s, best)})") for s in states]
    legend(figure, handles, columns=len(handles))
    return figure


def _count(trials: Sequence[Trial], state: str, best: set[str]) -> int:
    return sum(trial.state == state and trial.name not in best for trial in trials)


def _parallel(search: Search, trials: Sequence[Trial], best: set[str]) -> Figure | None:
    """Parallel coordinates: an axis for each dimension, and the first metric last."""
    metric, mode = search.metrics[0], search.modes[0]
    scored = [trial for trial in trials if math.isfinite(trial.score(metric))]
    if not scored:
        return None
    dimensions = search.parsed.dimensions
    scores = np.array([trial.score(metric) for trial in scored])
    figure = blank(min(14.0, max(7.0, 2.0 * (len(dimensions) + 1))), 5.2)
    axis = figure.subplots()
    colours = ScalarMappable(
        Normalize(float(scores.min()), float(scores.max())), "viridis" if mode == "max" else "viridis_r"
    )
    ends = (float(scores.min()), float(scores.max()))
    for trial, score in sorted(zip(scored, scores, strict=True), key=lambda pair: (pair[0].name in best, pair[1])):
        active = {dimension.label for dimension in search.parsed.active(trial.sample)}
        places = [_place(d, trial.sample[d.label]) if d.label in active else math.nan for d in dimensions]
        places.append((score - ends[0]) / ((ends[1] - ends[0]) or 1))
        style: dict[str, Any] = {"color": colours.to_rgba(score), "linewidth": 1.2, "alpha": 0.8}  # pyright: ignore[reportArgumentType]
        if trial.name in best:
            style = {"color": VERMILLION, "linewidth": 2.4}
        known = [i for i, place in enumerate(places) if not math.isnan(place)]
        axis.plot(known, [places[i] for i in known], linestyle="", marker="o", markersize=3, color=style["color"])
        for one, other in pairwise(
            known
        ):  # faint where it passes the axes of alternatives that the trial does not have
            passing = {"linestyle": ":", "alpha": 0.35} if other > one + 1 else {}
            axis.plot([one, other], [places[one], places[other]], **(style | passing))
    for i, dimension in enumerate(dimensions):
        _ruler(axis, i, [(_place(dimension, value), show(value)) for value in _ticks(dimension)])
    _ruler(axis, len(dimensions), [(share, show(ends[0] + share * (ends[1] - ends[0]))) for share in (0, 0.5, 1)])
    names = [_broken(d.label) + ("\n(logarithmic)" if d.logarithmic else "") for d in dimensions]
    axis.set_xticks(range(len(dimensions) + 1), [*names, f"validation\n{metric}"], fontsize=7)
    axis.set_xlim(-0.2, len(dimensions) + 0.5)
    axis.yaxis.set_visible(False)
    for side in ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)
    figure.colorbar(colours, ax=axis, label=f"validation {metric}")
    legend(figure, [Line2D([], [], color=VERMILLION, linewidth=2.4, label=BEST)])
    return figure


def _ruler(axis: Axes, place: float, ticks: Sequence[tuple[float, str]]) -> None:
    axis.axvline(place, color="black", linewidth=0.8)
    for height, text in ticks:
        axis.annotate(text, (place, height), (4, 2), textcoords="offset points", fontsize=7,
                      bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5})  # fmt: skip


def _ticks(dimension: Dimension) -> list[Any]:
    if dimension.values is not None:
        return dimension.values
    low, high = float(min(dimension.probes())), float(max(dimension.probes()))
    middle = math.sqrt(low * high) if dimension.logarithmic else (low + high) / 2
    return [low, middle, high]


def _place(dimension: Dimension, value: Any) -> float:
    """Where a value stands on the axis of its dimension, from 0 to 1."""
    if dimension.values is not None:
        return dimension.values.index(value) / max(len(dimension.values) - 1, 1)
    low, high = min(dimension.probes()), max(dimension.probes())
    scale = math.log if dimension.logarithmic else float
    return (scale(value) - scale(low)) / ((scale(high) - scale(low)) or 1)


def _broken(label: str) -> str:
    """A label over several lines, so that it does not run into its neighbours."""
    return label.replace(".", ".\n").replace("[", "\n[").replace("$", r"\$")


def _importance(shares: Mapping[str, float]) -> Figure | None:
    if not shares:
        return None
    figure = blank(8, max(2.6, 1.2 + 0.4 * len(shares)))
    panel = figure.subplots()
    panel.barh([label.replace("$", r"\$") for label in shares], list(shares.values()), color=BLUE, height=0.6)
    panel.invert_yaxis()
    panel.set_xlabel("share of importance")
    panel.set_xlim(0, 1)
    for row, share in enumerate(shares.values()):
        panel.annotate(f"{share:.0%}", (share, row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    tidy(panel)
    return figure


def _front(search: Search, trials: Sequence[Trial], front: set[str]) -> Figure:
    figure = blank(7, 4.6)
    panel = figure.subplots()
    (x, x_mode), (y, y_mode) = list(zip(search.metrics, search.modes, strict=True))[1::-1]
    for trial in trials:
        colour, size = (VERMILLION, 60) if trial.name in front else (GREY, 25)
        panel.scatter(trial.score(x), trial.score(y), color=colour, s=size)
    panel.set_xlabel(f"{x} ({x_mode})")
    panel.set_ylabel(f"{y} ({y_mode})")
    panel.xaxis.set_major_locator(MaxNLocator(6))
    tidy(panel)
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=label)
        for colour, label in ((VERMILLION, "Pareto front"), (GREY, "others"))
    ]
    legend(figure, handles)
    return figure
