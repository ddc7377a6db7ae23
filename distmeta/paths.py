"""Where a policy goes in one unseen task of control, before adaptation and after it, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from distmeta.core.policy import Rollouts
from distmeta.core.types import MetaParams, Params, Task
from distmeta.distributed.work import Problem, reproducible
from distmeta.episode import first_test_task
from distmeta.errors import DataError
from distmeta.experiment import Experiment
from distmeta.pictures import BLUE, GREY, VERMILLION, Floats, blank, legend, tidy
from distmeta.runs import RunFolder
from distmeta.tasks.control import ControlTask


@dataclass(frozen=True)
class Paths:
    """The episodes of the first test task of a run."""

    goal: Floats | None
    """Where in the plane the goal is, if it is anywhere."""
    positions: list[list[Floats]]
    """Before adaptation, and after each inner step, for each episode where it went: (T, 2)."""
    returns: list[float]
    """The mean return of each of ``positions``."""


def follow(problem: Problem, meta: MetaParams, task: Task) -> list[tuple[Params, Rollouts]]:
    """Adapts to ``task``: the parameters before adaptation and after each inner step, and a query set of each."""
    with reproducible(problem.threads, 0):
        steps = problem.algorithm.trajectory(meta, task, problem.loss)
        return [(step.params, Rollouts(*task.query(step.params))) for step in steps]


def sample_first(run: RunFolder, experiment: Experiment) -> Paths:
    """Adapts to the first of the test tasks that the run is evaluated on, and samples it with every policy on the way.

    Raises:
        CheckpointError: There is no checkpoint yet, or it is damaged or of another model.
        DataError: The observations do not say where something is.
    """
    meta, task = first_test_task(run, experiment)
    assert isinstance(task, ControlTask)
    return of(task, [data for _, data in follow(experiment.problem, meta, task)])


def of(task: ControlTask, sampled: Sequence[Rollouts]) -> Paths:
    """The paths of episodes that were sampled before adaptation and after each inner step.

    Raises:
        DataError: The observations do not say where something is.
    """
    positions: list[list[Floats]] = []
    for data in sampled:
        at = task.tasks.position(data.observation_ETO.numpy())
        if at is None:
            raise DataError("only tasks whose observations hold a position in the plane can be drawn")
        lengths = data.valid_ET.sum(1).int().tolist()
        positions.append([path[:length] for path, length in zip(at, lengths, strict=True)])
    returns = [float(data.score_EM[:, 0].mean()) for data in sampled]
    return Paths(task.tasks.goal_position(task.goal), positions, returns)


def draw(paths: Paths) -> Figure:
    """The paths before adaptation and after all inner steps, side by side on the same scale."""
    figure = blank(9.0, 4.9)
    panels = figure.subplots(1, 2)
    goals = [] if paths.goal is None else [paths.goal[None]]
    drawn = np.concatenate([*paths.positions[0], *paths.positions[-1], *goals])
    middle, half = (drawn.max(0) + drawn.min(0)) / 2, 0.55 * float(np.ptp(drawn, axis=0).max())
    steps = len(paths.positions) - 1
    titles = ("before adaptation", f"after {steps} inner step{'s' if steps != 1 else ''}")
    for panel, title, k, colour in zip(panels, titles, (0, -1), (GREY, BLUE), strict=True):
        for path in paths.positions[k]:
            panel.plot(*path.T, color=colour, linewidth=1.0, alpha=0.6)
        start = np.mean([path[0] for path in paths.positions[k]], axis=0)
        panel.scatter(*start, color="black", s=30, zorder=4, label="start")
        if paths.goal is not None:
            panel.scatter(*paths.goal, color=VERMILLION, marker="*", s=160, zorder=5, edgecolor="white", label="goal")
        panel.set_title(f"{title}: mean return {paths.returns[k]:.1f}")
        panel.set_xlim(middle[0] - half, middle[0] + half)
        panel.set_ylim(middle[1] - half, middle[1] + half)
        panel.set_aspect("equal")
        panel.set_xlabel("x")
        panel.set_ylabel("y")
        tidy(panel)
    legend(figure, panels[0].get_legend_handles_labels()[0])
    return figure
