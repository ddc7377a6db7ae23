"""How well a meta-learner adapts to unseen tasks: mean and 95% confidence interval over tasks."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

from distmeta.core.loss import uses_batch_statistics
from distmeta.core.types import Episode, Split
from distmeta.distributed.executor import Executor, gather
from distmeta.distributed.work import JUDGED, Problem, shards_of
from distmeta.errors import NumericalError

log = logging.getLogger("distmeta")

SHARES = ("accuracy", "success")
"""Metrics that are shares of 1, for people in percent."""

Evaluation = dict[str, Any]
"""Plain data, as it is written to ``summary.json`` (see `evaluate_tasks`)."""


def mean_ci(values: np.ndarray) -> dict[str, float]:
    """``mean`` and ``ci95``, the half-width 1.96 s/√n of the normal 95% interval, of one value for each task."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "ci95": 1.96 * spread / len(values) ** 0.5}


def evaluate_tasks(
    executor: Executor, problem: Problem, vector: np.ndarray, split: Split, tasks: int, shard_size: int
) -> Evaluation:
    """Adapts to ``tasks`` tasks of ``split`` and judges each by its query set.

    Returns:
        ``metric``, the name of the metric that counts (see `distmeta.core.types.TaskSpec.metric`); ``before`` and
        ``after`` adaptation, its mean and interval; ``by_inner_step``, for each metric the list of them; where the
        tasks have a judge, ``judged``: for each of its metrics ``before`` and ``after``; and, for classifiers that
        normalise by batch statistics, ``inductive``: the accuracy when no query example sees another
        (``transductive`` then says that the other figures are not of that kind).
    """
    results = executor.map("evaluate", vector, shards_of(split, 0, tasks, shard_size))
    metrics = gather(results)
    skipped = {index: why for result in results for index, why in result.skipped.items()}
    why = next(iter(skipped.values()), "")
    if len(skipped) == tasks:
        raise NumericalError(f"all {tasks} {split} tasks were skipped; the first one, since {why}")
    if skipped:
        log.warning("%d of %d %s tasks are left out; the first one, since %s", len(skipped), tasks, split, why)
    diverged = int((~np.isfinite(metrics["loss"])).any(axis=1).sum())
    if diverged:
        log.warning(
            "%d of %d %s tasks have a loss that is not finite: their adaptation diverges; lower algorithm.inner_lr",
            diverged, tasks, split,
        )  # fmt: skip
    inductive = metrics.pop("accuracy_inductive", None)
    curves = {name: [mean_ci(column) for column in values.T] for name, values in metrics.items()}
    judged = {name.removeprefix(JUDGED): curves.pop(name) for name in metrics if name.startswith(JUDGED)}
    metric = problem.metric or ("accuracy" if "accuracy" in curves else "loss")
    ends = judged.get(metric) or curves[metric]
    evaluation: Evaluation = {
        "split": split,
        "tasks": tasks - len(skipped),
        "metric": metric,
        "transductive": uses_batch_statistics(problem.loss.module),
        "before": ends[0],
        "after": ends[-1],
        "by_inner_step": curves,
    }
    if judged:
        evaluation["judged"] = {name: {"before": first, "after": last} for name, (first, last) in judged.items()}
    if inductive is not None:
        evaluation["inductive"] = mean_ci(inductive)
    return evaluation


def nearest_neighbour(
    executor: Executor, problem: Problem, vector: np.ndarray, split: Split, tasks: int, shard_size: int
) -> dict[str, float] | None:
    """The accuracy of nearest neighbours on raw inputs on the same tasks; None if they are no classification."""
    probe = problem.build(shards_of(split, 0, 1, 1)[0])[0]
    if not isinstance(probe, Episode) or len(probe.support_set) != 2:
        return None
    x, y = probe.support_set
    if not x.is_floating_point() or y.is_floating_point():
        return None
    results = executor.map("nearest_neighbour", vector, shards_of(split, 0, tasks, shard_size))
    return mean_ci(gather(results)["accuracy"])


def better(evaluation: Evaluation, than: float | None) -> bool:
    """Whether the metric after adaptation is better than an earlier value of it (True if there is none)."""
    value = evaluation["after"]["mean"]
    if not math.isfinite(value):
        return False
    if than is None:
        return True
    return value < than if evaluation["metric"] == "loss" else value > than


def finals(evaluation: Evaluation) -> dict[str, float]:
    """The mean of each metric after adaptation."""
    means = {name: curve[-1]["mean"] for name, curve in evaluation["by_inner_step"].items()}
    return means | {name: ends["after"]["mean"] for name, ends in evaluation.get("judged", {}).items()}


def describe(evaluation: Evaluation) -> str:
    """One line for people."""

    metric = evaluation["metric"]
    steps = len(evaluation["by_inner_step"]["loss"]) - 1
    line = f"{metric} {show(metric, evaluation['before'])} before, {show(metric, evaluation['after'])} after "
    line += f"{steps} inner step{'s' if steps != 1 else ''}"
    if evaluation["transductive"]:
        line += " (transductive)"
    if "inductive" in evaluation:
        line += f", {show(metric, evaluation['inductive'])} (inductive)"
    return line


def show(metric: str, value: dict[str, float]) -> str:
    """A mean and its interval for people: shares of 1 in percent."""
    interval = f"{100 * value['ci95']:.2f}" if metric in SHARES else f"{value['ci95']:.4f}"
    return f"{show_value(metric, value['mean'])} ± {interval}"


def show_value(metric: str, value: float) -> str:
    """One figure for people."""
    return f"{100 * value:.2f}%" if metric in SHARES else f"{value:.4f}"
