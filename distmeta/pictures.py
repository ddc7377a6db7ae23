"""The pictures of a report that are drawn from what runs have written of themselves.

Nothing here touches the state of pyplot, so that a training script's own figures are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from distmeta.evaluation import SHARES
from distmeta.history import History, Scores

Floats = NDArray[np.floating[Any]]

# The palette of Okabe and Ito (2008), which people with any colour vision can tell apart.
BLUE, ORANGE, GREEN, PINK, SKY, VERMILLION, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#777777",
)  # fmt: skip
RUN_COLOURS = (BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY, "black")
PARTS = {  # of an outer step: what it is called, and its colour
    "map": ("waiting for workers", BLUE),
    "reduce": ("summing shards", SKY),
    "outer": ("outer update", GREEN),
    "validation": ("validation", ORANGE),
    "checkpoint": ("checkpoint", PINK),
}
WORKER_PARTS = {
    "sample": ("workers: building tasks", YELLOW),
    "adapt": ("workers: adapting", VERMILLION),
    "environment": ("workers: environments", GREY),
    "policy": ("workers: acting", "black"),
}
KINDS: dict[str, dict[str, Any]] = {
    "training": {"linewidth": 1.2, "linestyle": "-"},
    "after": {"linewidth": 1.8, "linestyle": "-", "marker": "o", "markersize": 4},
    "before": {"linewidth": 1.2, "linestyle": ":", "marker": ".", "markersize": 5},
}
TRAINED, UNTRAINED, NEIGHBOUR = "meta-trained", "untrained", "nearest neighbour on raw inputs"
BASES: dict[str, dict[str, Any]] = {
    TRAINED: {"linewidth": 1.8, "linestyle": "-"},
    UNTRAINED: {"linewidth": 1.3, "linestyle": "--"},
    NEIGHBOUR: {"linewidth": 1.3, "linestyle": ":"},
}
KIND_COLOURS = {"training": BLUE, "after": VERMILLION, "before": GREY}


def learning_curve(runs: Sequence[History]) -> Figure | None:
    """Training and validation over outer steps, a panel for each metric; None without any metrics."""
    metrics = [
        metric
        for metric in dict.fromkeys(["accuracy", *(x.metric for run in runs for x in run.validation), "return", "loss"])
        if any(_series(run, kind, metric)[0].size for run in runs for kind in KINDS)
    ]
    if "return" in metrics:
        metrics.remove("loss")  # a policy's loss is relative to the policy at hand: its value says nothing
    if not metrics:
        return None
    figure = blank(max(7.0, 5.5 * len(metrics)), 4.4)
    for panel, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        positive: list[float] = []
        for i, run in enumerate(runs):
            for kind, style in KINDS.items():
                steps, mean, ci95 = _series(run, kind, metric)
                if not steps.size:
                    continue
                colour = KIND_COLOURS[kind] if len(runs) == 1 else _colour(i)
                if kind == "training":
                    smooth = _smoothed(panel, steps, mean, color=colour, **style)
                    positive += smooth[smooth > 0].tolist()
                else:
                    _band(panel, steps, mean, ci95, colour)
                    panel.plot(steps, mean, color=colour, **style)
                    positive += mean[mean > 0].tolist()
        panel.set_title(f"{metric.capitalize()} over meta-training")
        panel.set_xlabel("outer steps")
        panel.set_xlim(left=0)
        metric_axis(panel, metric, f"{metric} (mean over tasks)")
        if metric == "loss" and positive and max(positive) > 20 * min(positive):
            panel.set_yscale("log")
    labels = {
        "training": "training tasks (running mean)",
        "after": "validation, after adaptation (95% CI)",
        "before": "validation, before adaptation (95% CI)",
    }
    drawn = [kind for kind in KINDS if any(_series(run, kind, m)[0].size for run in runs for m in metrics)]
    kinds = [
        Line2D([], [], color=KIND_COLOURS[kind] if len(runs) == 1 else "black", label=labels[kind], **KINDS[kind])
        for kind in drawn
    ]
    if len(runs) > 1:
        kinds += [run_handle(_colour(i), run.name) for i, run in enumerate(runs)]
    legend(figure, kinds, columns=3 if len(metrics) > 1 else 2)
    return figure


def _series(run: History, kind: str, metric: str) -> tuple[Floats, Floats, Floats]:
    """Steps, means and half-widths of the 95% intervals of one curve of `learning_curve`; empty if there is none."""
    points: list[tuple[float, float, float]] = []
    if kind == "training":
        values = [(line.step, line.value(metric)) for line in run.train]
        points = [(step, value, 0.0) for step, value in values if value is not None]
    else:
        for line in run.validation:
            if known := line.points(metric):
                _, interval = known[-1 if kind == "after" else 0]
                points.append((line.step, interval.mean, interval.ci95))
    steps, mean, ci95 = np.array(points, float).reshape(-1, 3).T
    return steps, mean, ci95


def _smoothed(panel: Axes, steps: ArrayLike, values: Floats, *, color: str, **style: Any) -> Floats:
    """Draws the running mean over about a tenth of ``values``, which lie faint behind it, and returns it."""
    half = len(values) // 20
    if half:
        panel.plot(steps, values, color=color, alpha=0.25, linewidth=0.7)
    if len(values) == 1:
        style["marker"] = "s"  # a line through one point cannot be seen
    mean = running_mean(values, half)
    panel.plot(steps, mean, color=color, **style)
    return mean


def _band(panel: Axes, x: ArrayLike, mean: Floats, ci95: Floats, colour: str) -> None:
    """A 95% confidence band, or bar where there is only one point."""
    if len(mean) == 1:
        panel.errorbar(x, mean, ci95, color=colour, capsize=3, linestyle="", alpha=0.6)
    else:
        panel.fill_between(x, mean - ci95, mean + ci95, color=colour, alpha=0.2, linewidth=0)


def running_mean(values: Floats, half: int) -> Floats:
    """Each value's mean with its ``half`` neighbours on each side; with fewer, but as many on both, near the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(half, np.minimum(place, place[::-1]))
    return (sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1)


def inner_steps(runs: Sequence[History]) -> Figure | None:
    """The metric of unseen tasks by inner step, beside what any learner must beat; None where no run was judged."""
    judged = [(_colour(i), run, run.scores) for i, run in enumerate(runs)]
    metrics = sorted({scores.metric for *_, scores in judged if scores is not None})
    if not metrics:
        return None
    single = len(runs) == 1
    figure = blank(max(7.0, 6.4 * len(metrics)), 4.6)
    of = "unseen tasks"
    drawn: set[str] = set()
    for panel, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        most, made_head = 0, False
        for colour, run, scores in judged:
            if scores is None or scores.metric != metric:
                continue
            made_head = made_head or scores.made_head
            of = _sample(run, scores) if single else of
            other = GREY if single else colour
            most = max(most, _inner_curve(panel, scores, metric, TRAINED, colour))
            drawn.add(TRAINED)
            if run.summary is None or run.summary.test is None:
                continue
            if run.summary.untrained is not None:
                _inner_curve(panel, run.summary.untrained, metric, UNTRAINED, other)
                drawn.add(UNTRAINED)
            neighbour = run.summary.nearest_neighbour
            if neighbour is not None:
                panel.axhspan(
                    neighbour.mean - neighbour.ci95,
                    neighbour.mean + neighbour.ci95,
                    color=other,
                    alpha=0.12,
                    linewidth=0,
                )
                panel.axhline(neighbour.mean, color=other, **BASES[NEIGHBOUR])
                drawn.add(NEIGHBOUR)
        step = "step of adaptation" if made_head else "inner step"
        panel.set_title(f"{metric.capitalize()} on {of} by {step} (95% CI)")
        _inner_axis(panel, most, made_head)
        metric_axis(panel, metric, f"{metric} on query examples")
    handles = [
        Line2D([], [], color="black" if not single else BLUE if base == TRAINED else GREY, label=base, **style)
        for base, style in BASES.items()
        if base in drawn
    ]
    if not single:
        handles += [
            run_handle(colour, f"{run.name} ({_sample(run, scores)})") for colour, run, scores in judged if scores
        ]
    legend(figure, handles, columns=3 if single or len(metrics) > 1 else 2)
    return figure


def _sample(run: History, scores: Scores) -> str:
    """What tasks ``scores`` are of."""
    if scores.split == "test":
        return f"{scores.tasks} test tasks"
    return f"{scores.tasks} validation tasks, step {run.validation[-1].step}"


def _inner_curve(panel: Axes, scores: Scores, metric: str, base: str, colour: str) -> int:
    """Draws a metric by inner step; returns the number of steps."""
    points = scores.points(metric)
    mean, ci95 = (np.array([getattr(point, part) for _, point in points]) for part in ("mean", "ci95"))
    place = np.array([step for step, _ in points])
    _band(panel, place, mean, ci95, colour)
    marker = "o" if len(points) <= 21 else ""  # more of them would run into a thick line
    panel.plot(place, mean, color=colour, marker=marker, markersize=4, **BASES[base])
    return max(place.tolist(), default=0)


def _inner_axis(panel: Axes, most: int, made_head: bool) -> None:
    """The axis of inner steps: most happens in the first few, so that many are drawn to a logarithmic scale."""
    label = "inner steps (gradient steps on the support set"
    if made_head:
        label = "steps of adaptation (the first makes the head, if one is made"
    if most > 12:
        panel.set_xscale("symlog", linthresh=3)
        panel.set_xlim(-0.2, 1.15 * most)
        panel.set_xticks([tick for tick in (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= most])
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.xaxis.set_minor_locator(NullLocator())
        label += "; logarithmic from 3 on"
    else:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel(f"{label})")


def throughput(runs: Sequence[History]) -> Figure | None:
    """Tasks a second over outer steps, and what the seconds went to; None without training metrics."""
    timed = [(i, run) for i, run in enumerate(runs) if run.train]
    if not timed:
        return None
    figure = blank(11, 3.4 + 0.55 * len(timed))
    speed, shares = figure.subplots(1, 2)
    for i, run in timed:
        rates = np.array([line.tasks_per_second for line in run.train])
        label = _short(_plain(run.name))
        _smoothed(speed, [line.step for line in run.train], rates, color=_colour(i), linewidth=1.5, label=label)
    speed.set_title("Speed of meta-training")
    speed.set_xlabel("outer steps")
    speed.set_ylabel("tasks per second")
    speed.set_xlim(left=0)
    speed.set_ylim(bottom=0)
    tidy(speed)
    if len(runs) > 1:
        speed.legend(fontsize=8, framealpha=0.8)
    labels: list[str] = []
    for _, run in timed:
        for who, parts in (("driver", PARTS), ("workers (sum)", WORKER_PARTS)):
            _share_bar(shares, len(labels), run, parts)
            labels.append(f"{_short(_plain(run.name))}\n{who}" if len(timed) > 1 else who)
    shares.set_yticks(range(len(labels)), labels)
    shares.invert_yaxis()
    shares.set_title("Where the time went")
    shares.set_xlabel("share of the time")
    shares.set_xlim(0, 1)
    shares.xaxis.set_major_formatter(PercentFormatter(1.0))
    for side in ("top", "right"):
        shares.spines[side].set_visible(False)
    optional = {"environment", "policy"} - {part for _, run in timed for line in run.train for part in line.seconds}
    handles = [
        Patch(color=c, label=label) for part, (label, c) in (PARTS | WORKER_PARTS).items() if part not in optional
    ]
    legend(figure, handles, columns=4)
    return figure


def _share_bar(panel: Axes, row: int, run: History, parts: dict[str, tuple[str, str]]) -> None:
    """One bar of 100% in ``row``, in the order of ``parts``."""
    spent = {part: sum(line.seconds.get(part, 0.0) for line in run.train) for part in parts}
    total, left = sum(spent.values()) or 1.0, 0.0
    for part, seconds in spent.items():
        share = seconds / total
        panel.barh(row, share, left=left, color=parts[part][1], edgecolor="white", linewidth=0.5, height=0.7)
        if share > 0.07:
            ink = "white" if part in ("map", "adapt", "environment", "policy") else "black"
            panel.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", color=ink, fontsize=9)
        left += share


def blank(width: float, height: float) -> Figure:
    """A figure of so many inches."""
    return Figure(figsize=(width, height), layout="constrained")


def tidy(panel: Axes) -> None:
    """A faint grid and no frame."""
    panel.grid(alpha=0.25)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def metric_axis(panel: Axes, metric: str, label: str, horizontal: bool = False) -> None:
    """The axis of a metric: shares of 1 in percent."""
    if metric in SHARES:
        (panel.xaxis if horizontal else panel.yaxis).set_major_formatter(PercentFormatter(1.0))
    (panel.set_xlabel if horizontal else panel.set_ylabel)(label)
    tidy(panel)


def legend(figure: Figure, handles: Sequence[Artist], columns: int = 3) -> None:
    """A legend below all panels."""
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def run_handle(colour: str, label: str) -> Line2D:
    """A legend entry for the colour of a run."""
    return Line2D([], [], color=colour, linewidth=4, label=_plain(label))


def _colour(i: int) -> str:
    return RUN_COLOURS[i % len(RUN_COLOURS)]


def _plain(name: str) -> str:
    """A run's name as matplotlib shows it as it is: a dollar would begin a formula, an underscore hide a label."""
    return name.replace("$", r"\$").lstrip("_")


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"
