"""One unseen task as a run adapts to it, for people to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from distmeta.core.params import split
from distmeta.core.types import Episode, MetaParams, Task
from distmeta.distributed.work import reproducible, shards_of
from distmeta.errors import DataError
from distmeta.evaluation import adapted
from distmeta.experiment import Experiment
from distmeta.outer import check_same
from distmeta.pictures import GREEN, GREY, VERMILLION, Floats, blank, legend, tidy
from distmeta.runs import RunFolder

UNDRAWABLE = "only classifications of images, and functions of one number, can be drawn"


@dataclass(frozen=True)
class Adaptation:
    """The first test task of a run, adapted to from its best checkpoint."""

    kind: Literal["images", "function"]
    """Classification of images, or regression of one number from one."""
    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    outputs: list[Tensor]
    """The model's outputs for the query before adaptation and after each inner step."""
    losses: list[float]
    """The query loss of each of ``outputs``."""
    made_head: bool
    """Whether the first step makes the head from the support set."""

    @property
    def after(self) -> str:
        """What adaptation has done, in words."""
        return adapted(len(self.outputs) - 1, self.made_head)


def first_test_task(run: RunFolder, experiment: Experiment) -> tuple[MetaParams, Task]:
    """The meta-parameters of the best checkpoint, and the first of the test tasks that the run is evaluated on.

    Raises:
        CheckpointError: There is no checkpoint yet, or it is damaged or of another model.
    """
    problem = experiment.problem
    params = run.checkpoint("best").params
    check_same(params, dict(zip(problem.layout.names, problem.layout.shapes, strict=True)))
    task = problem.build(shards_of("test", 0, 1, 1)[0])[0]
    problem.loss.module.to("cpu").eval()  # one task needs no accelerator; each shard places and sets the module anew
    return split(problem.layout.unpack(problem.layout.pack(params))), task


def adapt_first(run: RunFolder, experiment: Experiment) -> Adaptation:
    """Adapts to the first of the test tasks that the run is evaluated on, with the same outputs as there.

    Raises:
        CheckpointError: There is no checkpoint yet, or it is damaged or of another model.
        DataError: The tasks are of a kind that cannot be drawn.
    """
    problem = experiment.problem
    meta, task = first_test_task(run, experiment)
    if not isinstance(task, Episode) or not len(task.support_set) == len(task.query_set) == 2:
        raise DataError(UNDRAWABLE)
    (support_x, support_y), (query_x, query_y) = task
    outputs: list[Tensor] = []
    losses: list[float] = []
    loss = problem.loss_of(task)
    with reproducible(problem.threads, 0):
        for step in problem.algorithm.trajectory(meta, task, loss):
            with torch.no_grad():
                outputs.append(loss.predict(step.params, query_x))
                losses.append(float(loss(step.params, task.query_set)[0]))
    kind = _kind(query_x, query_y, outputs[-1])
    return Adaptation(
        kind, support_x, support_y, query_x, query_y, outputs, losses, problem.algorithm.task_head is not None
    )


def _kind(x: Tensor, y: Tensor, output: Tensor) -> Literal["images", "function"]:
    if x.ndim == 4 and x.shape[1] in (1, 3) and y.ndim == 1 and not y.is_floating_point() and output.ndim == 2:
        return "images"
    if y.is_floating_point() and len(x) == x.numel() == y.numel() == output.numel():
        return "function"
    raise DataError(UNDRAWABLE)


def draw(adaptation: Adaptation) -> Figure:
    """The picture that shows what adapting did."""
    return (_draw_images if adaptation.kind == "images" else _draw_function)(adaptation)


def _draw_images(adaptation: Adaptation) -> Figure:
    """A classification of images: each class's support images, and the query images that were taken for it."""
    support_x, support_y, query_x = (
        _numbers(x) for x in (adaptation.support_x, adaptation.support_y, adaptation.query_x)
    )
    truth, probability = _numbers(adaptation.query_y), _numbers(adaptation.outputs[-1].softmax(-1))
    guess, ways = probability.argmax(-1), probability.shape[-1]
    most_support, most_query, gap = 5, 12, 0.35
    support_columns = min(most_support, max(int((support_y == c).sum()) for c in range(ways)))
    query_columns = min(most_query, max(int((guess == c).sum()) for c in range(ways)))
    width, pitch = support_columns + gap + query_columns, 1.25  # a row is an image and the text below it
    figure = blank(max(0.85 * (width + 1.7), 6.5), 0.85 * (pitch * ways + 0.35) + 0.6)
    panel = figure.subplots()
    low, high = float(min(support_x.min(), query_x.min())), float(max(support_x.max(), query_x.max()))

    def place(image: Floats, x: float, y: float) -> None:
        grey = image.shape[0] == 1
        scaled = (image - low) / ((high - low) or 1.0)
        panel.imshow(
            scaled[0] if grey else np.moveaxis(scaled, 0, -1),
            extent=(x + 0.04, x + 0.96, y + 0.92, y),
            cmap="gray_r" if grey else None,
            vmin=0,
            vmax=1,
        )

    for c in range(ways):
        y = c * pitch
        panel.text(-0.15, y + 0.46, f"class {c + 1}", ha="right", va="center", fontsize=9)
        for column, i in enumerate(np.flatnonzero(support_y == c)[:most_support]):
            place(support_x[i], column, y)
            panel.add_patch(Rectangle((column + 0.04, y), 0.92, 0.92, fill=False, edgecolor=GREY, linewidth=0.8))
        taken = np.flatnonzero(guess == c)
        if len(taken) > most_query:  # those that went wrong are the ones to see
            wrong = taken[truth[taken] != c]
            taken = np.concatenate([wrong, taken[truth[taken] == c]])
            panel.text(width + 0.1, y + 0.46, f"+{len(taken) - most_query}", ha="left", va="center", fontsize=9)
        for column, i in enumerate(taken[:most_query]):
            x, right = support_columns + gap + column, truth[i] == c
            place(query_x[i], x, y)
            colour, line = (GREEN, "-") if right else (VERMILLION, (0, (3, 1.5)))  # told apart without colour as well
            panel.add_patch(
                Rectangle((x + 0.04, y), 0.92, 0.92, fill=False, edgecolor=colour, linewidth=2, linestyle=line)
            )
            text = f"✓ {probability[i, c]:.0%}" if right else f"✗ {probability[i, c]:.0%}, is {truth[i] + 1}"
            panel.text(x + 0.5, y + 0.98, text, ha="center", va="top", fontsize=7, color=colour)
    heading = {"ha": "left", "va": "bottom", "fontsize": 9, "color": "#333333"}
    panel.text(0, -0.08, "support", heading)
    panel.text(support_columns + gap, -0.08, "query images by predicted class, with its probability", heading)
    panel.set_xlim(-1.1, width + 0.6)
    panel.set_ylim(ways * pitch, -0.35)
    panel.set_aspect("equal")
    panel.set_axis_off()
    first, final = (
        float((_numbers(o).argmax(-1) == truth).mean()) for o in (adaptation.outputs[0], adaptation.outputs[-1])
    )
    panel.set_title(
        f"One test task: accuracy {first:.0%} before adaptation, {final:.0%} after {adaptation.after}", pad=10
    )
    return figure


def _draw_function(adaptation: Adaptation) -> Figure:
    """A regression with one input: the predicted function before adaptation and after a few inner steps."""
    figure = blank(7, 4.8)
    panel = figure.subplots()
    x, y = (_numbers(values).reshape(-1) for values in (adaptation.query_x, adaptation.query_y))
    order = np.argsort(x)
    panel.plot(x[order], y[order], color="black", linewidth=1, marker=".", markersize=5, label="true (query)")
    last = len(adaptation.outputs) - 1
    shown = sorted({0, min(1, last), last // 2, last})
    for k in shown[1:]:
        # from bright to dark; the brightest end of the map is too faint on white
        colour = colormaps["viridis"](0.8 - 0.7 * k / last)
        _fit(panel, x[order], adaptation.outputs[k], order, f"after {k} step{'s' if k > 1 else ''}", color=colour)
    _fit(panel, x[order], adaptation.outputs[0], order, "before adaptation", color=GREY, linestyle="--")
    support = [_numbers(values).reshape(-1) for values in (adaptation.support_x, adaptation.support_y)]
    panel.scatter(*support, color=VERMILLION, marker="^", s=55, zorder=5, label="support", edgecolor="white")
    panel.set_xlabel("input x")
    panel.set_ylabel("target y")
    panel.set_title(
        f"One test task: loss {adaptation.losses[0]:.3g} before adaptation, {adaptation.losses[-1]:.3g} "
        f"after {adaptation.after}"
    )
    tidy(panel)
    legend(figure, panel.get_legend_handles_labels()[0])
    return figure


def _fit(panel: Axes, x: Floats, output: Any, order: NDArray[np.intp], label: str, **style: Any) -> None:
    panel.plot(x, _numbers(output).reshape(-1)[order], linewidth=1.8, label=label, **style)


def _numbers(tensor: Any) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()
