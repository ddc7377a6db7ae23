"""The pictures of tasks that differ: metrics by group, and how alike the gradients of tasks are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distmeta.history import GroupScores, History, Interval
from distmeta.pictures import (
    GREY,
    RUN_COLOURS,
    Floats,
    blank,
    legend,
    metric_axis,
    run_handle,
    tidy,
)
from distmeta.similarity import Similarity

SPLITS = {"train": "Training", "val": "Validation", "test": "Test"}


def draw_groups(runs: Sequence[History]) -> Figure | None:
    """Each group's metric on unseen tasks, before and after adaptation, and for one run over outer steps; None where no
    run has groups. Groups are of one metric: that of the first run that has any."""
    judged = [(i, run, scores) for i, run in enumerate(runs) if (scores := run.scores) is not None and scores.groups]
    if not judged:
        return None
    metric = judged[0][2].metric
    judged = [entry for entry in judged if entry[2].metric == metric]
    names = list(dict.fromkeys(name for _, _, scores in judged for name in scores.groups))
    single = len(runs) == 1
    curves = single and len(judged[0][1].validation) > 1 and len(names) <= len(RUN_COLOURS)
    figure = blank(12 if curves else 7.5, max(3.6, 1.6 + 0.3 * len(names) * (1 if single else len(judged) ** 0.5)))
    *left, right = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
    for panel in left:
        for colour, name in zip(RUN_COLOURS, names, strict=False):
            lines = [(line.step, line.groups[name]) for line in judged[0][1].validation if name in line.groups]
            step = [at for at, _ in lines]
            mean, ci95 = (np.array([getattr(_end(g, metric)[1], part) for _, g in lines]) for part in ("mean", "ci95"))
            panel.errorbar(step, mean, ci95, color=colour, fmt="o-", markersize=4, elinewidth=0.8, capsize=2)
        panel.set_title("Validation after adaptation by group (95% CI), colours as on the right")
        panel.set_xlabel("outer steps")
        panel.set_xlim(left=0)
        metric_axis(panel, metric, f"{metric} (mean over tasks)")
        if metric == "loss":
            panel.set_yscale("log")
    for place, (i, _, scores) in enumerate(judged):
        shift = 0.0 if single else 0.6 * ((place + 0.5) / len(judged) - 0.5)
        for row, name in enumerate(names):
            if name not in scores.groups:
                continue
            before, after = _end(scores.groups[name], metric)
            colour = RUN_COLOURS[row if curves else i % len(RUN_COLOURS)]
            y = row + shift
            right.plot([before.mean, after.mean], [y, y], color=colour, alpha=0.3, linewidth=1)
            right.errorbar(before.mean, y, xerr=before.ci95, color=GREY, fmt="o", mfc="white", markersize=5, capsize=2)
            right.errorbar(after.mean, y, xerr=after.ci95, color=colour, fmt="o", markersize=6, capsize=3)
    right.set_yticks(range(len(names)), [_counted(name, judged[0][2].groups.get(name)) for name in names])
    right.set_ylim(len(names) - 0.5, -0.5)
    right.set_title(f"{SPLITS[judged[0][2].split]} tasks by group (95% CI)")
    metric_axis(right, metric, metric, horizontal=True)
    if metric == "loss":
        right.set_xscale("log")
    tidy(right)
    handles = [
        Line2D([], [], color=GREY, marker="o", mfc="white", linestyle="", label="before adaptation"),
        Line2D([], [], color="black", marker="o", linestyle="", label="after adaptation"),
    ]
    if not single:
        handles += [run_handle(RUN_COLOURS[i % len(RUN_COLOURS)], run.name) for i, run, _ in judged]
    legend(figure, handles)
    return figure


def _end(group: GroupScores, metric: str) -> tuple[Interval, Interval]:
    """The metric before and after adaptation."""
    ends = group.judged.get(metric)
    return (ends.before, ends.after) if ends else (group.by_inner_step[metric][0], group.by_inner_step[metric][-1])


def _counted(name: str, group: GroupScores | None) -> str:
    return f"{name} ({group.tasks} tasks)" if group else name


def draw_similarity(similarity: Similarity) -> Figure:
    """The matrix of cosines, tasks in the order of their groups, and the distribution of its entries."""
    names = similarity.names
    order = sorted(range(len(similarity.groups)), key=lambda i: names.index(similarity.groups[i]))
    matrix = similarity.matrix[np.ix_(order, order)]
    distinct = ~np.eye(len(order), dtype=bool)
    most = float(np.abs(matrix[distinct]).max()) or 1.0
    figure = blank(11.5, 5.0)
    squares, curves = figure.subplots(1, 2, width_ratios=(1.15, 1))
    shown = np.where(distinct, matrix, np.nan)
    image = squares.imshow(shown, cmap="RdBu", vmin=-most, vmax=most, interpolation="nearest")
    figure.colorbar(image, ax=squares, label="cosine of the meta-gradients", shrink=0.85)
    squares.set_title("Pairs of tasks")
    if len(names) > 1:
        counts = np.array([similarity.groups.count(name) for name in names])
        ends = counts.cumsum()
        for end in ends[:-1]:
            squares.axhline(end - 0.5, color="black", linewidth=0.8)
            squares.axvline(end - 0.5, color="black", linewidth=0.8)
        squares.set_yticks(ends - counts / 2 - 0.5, names)
        squares.set_xticks(ends - counts / 2 - 0.5, names, rotation=35, ha="right")
        squares.tick_params(length=0)
    else:
        squares.set_xlabel("task")
        squares.set_ylabel("task")
    kinds = {"pairs of one group": similarity.same & distinct, "pairs of different groups": ~similarity.same}
    if len(names) < 2:
        kinds = {"all pairs": distinct}
    bins = np.linspace(-most, most, 41)
    for (label, mask), colour in zip(kinds.items(), RUN_COLOURS, strict=False):
        values: Floats = similarity.matrix[mask]
        mean = f"mean {values.mean():+.3f}"
        curves.hist(
            values, bins=bins, density=True, histtype="step", linewidth=1.6, color=colour, label=f"{label} ({mean})"
        )
        curves.axvline(values.mean(), color=colour, linewidth=1.2, linestyle="--")
    curves.axvline(0, color="black", linewidth=0.8, linestyle=":")
    curves.set_title("Their cosines")
    curves.set_xlabel("cosine (below 0: in conflict)")
    curves.set_ylabel("density of pairs")
    tidy(curves)
    curves.legend(fontsize=8, framealpha=0.8)
    return figure
