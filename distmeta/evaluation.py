"""How well a meta-learner adapts to unseen tasks: mean and 95% confidence interval over tasks."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distmeta.core.loss import uses_batch_statistics
from distmeta.core.scope import SCORES, auroc, false_positive_rate, threshold_at
from distmeta.core.types import Episode, Split
from distmeta.distributed.executor import Executor, gather
from distmeta.distributed.work import JUDGED, Problem, ShardResult, shards_of
from distmeta.errors import NumericalError

log = logging.getLogger("distmeta")

SHARES = ("accuracy", "success", "fpr95", "kept", "found", "in-scope recall", "out-of-scope recall")
"""Metrics that are shares of 1, for people in percent."""

INDUCTIVE = "accuracy_inductive"
MOST_TOLD = 8  # groups that a line for people tells one by one

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
        ``after`` adaptation, its mean and interval, and ``change``, those of what it has changed by in each task;
        ``by_inner_step``, for each metric the list of them, the first of whose steps makes the head from the support
        set where ``made_head`` says so (see `distmeta.core.algorithm.MetaAlgorithm.task_head`); where the tasks have
        a judge, ``judged``: for each of its metrics ``before`` and ``after``; and, for classifiers that normalise by
        batch statistics, ``inductive``: the accuracy when no query example sees another (``transductive`` then says
        that the other figures are not of that kind).
        Where tasks fall into groups (see `distmeta.core.types.Grouped`), ``groups`` holds, by the name of each, the
        number of its ``tasks`` and the same figures of these alone.
    """
    shards = shards_of(split, 0, tasks, shard_size)
    results = executor.map("evaluate", vector, shards)
    metrics, skipped = gather(results), _skipped(results, split, tasks)
    finite = np.isfinite(metrics["loss"])
    unsound, diverged = int((~finite[:, 0]).sum()), int((finite[:, 0] & ~finite.all(axis=1)).sum())
    if unsound:
        log.warning(
            "%d of %d %s tasks have a loss that is not finite before any adaptation: their data, or what the model "
            "puts out for them, are not finite", unsound, tasks, split,
        )  # fmt: skip
    if diverged:
        log.warning(
            "%d of %d %s tasks have a loss that is not finite: their adaptation diverges; lower algorithm.inner_lr",
            diverged, tasks, split,
        )  # fmt: skip
    metric = problem.metric or ("accuracy" if "accuracy" in metrics else "loss")
    evaluation: Evaluation = {
        "split": split,
        "tasks": tasks - len(skipped),
        "metric": metric,
        "transductive": uses_batch_statistics(problem.loss.module),
        "made_head": problem.algorithm.task_head is not None,
        **_figures(metrics, metric),
    }
    groups = by_group(metrics, problem.groups(shards, skipped))
    if groups:
        evaluation["groups"] = {
            name: {"tasks": len(own["loss"]), **_figures(own, metric)} for name, own in groups.items()
        }
    return evaluation


def _skipped(results: Sequence[ShardResult], split: Split, tasks: int) -> dict[int, str]:
    """The tasks that were skipped, of which there is a warning, with the reason.

    Raises:
        NumericalError: All were.
    """
    skipped = {index: why for result in results for index, why in result.skipped.items()}
    why = next(iter(skipped.values()), "")
    if len(skipped) == tasks:
        raise NumericalError(f"all {tasks} {split} tasks were skipped; the first one, since {why}")
    if skipped:
        log.warning("%d of %d %s tasks are left out; the first one, since %s", len(skipped), tasks, split, why)
    return skipped


def _figures(metrics: Mapping[str, np.ndarray], metric: str) -> Evaluation:
    """The figures of some tasks, from arrays whose first axis counts them."""
    curves = {name: [mean_ci(column) for column in values.T] for name, values in metrics.items() if name != INDUCTIVE}
    judged = {name.removeprefix(JUDGED): curves.pop(name) for name in metrics if name.startswith(JUDGED)}
    ends = judged.get(metric) or curves[metric]
    each = metrics[f"{JUDGED}{metric}" if metric in judged else metric]
    change = mean_ci(each[:, -1] - each[:, 0])
    figures: Evaluation = {"before": ends[0], "after": ends[-1], "change": change, "by_inner_step": curves}
    if judged:
        figures["judged"] = {name: {"before": first, "after": last} for name, (first, last) in judged.items()}
    if INDUCTIVE in metrics:
        figures["inductive"] = mean_ci(metrics[INDUCTIVE])
    return figures


def by_group(metrics: Mapping[str, np.ndarray], groups: Sequence[tuple[str, ...]]) -> dict[str, dict[str, np.ndarray]]:
    """The metrics of the tasks of each group; a task may be in several, ``groups`` says in which.

    Names are in alphabetical order, those that begin with a number behind the others, in the order of the numbers.
    """
    names = {name for names in groups for name in names}
    order = sorted(names, key=lambda name: [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in _parts(name)])
    chosen = {name: np.array([name in own for own in groups]) for name in order}
    return {name: {metric: values[mask] for metric, values in metrics.items()} for name, mask in chosen.items()}


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"(\d+)", name) if part]


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


def evaluate_scope(
    executor: Executor,
    vector: np.ndarray,
    recall: float,
    tasks: int,
    validation_tasks: int,
    shard_size: int,
) -> dict[str, Any]:
    """How well examples that belong to none of a task's classes are told from its queries, on ``tasks`` test tasks.

    Args:
        recall: The share of in-scope queries that is to be kept. For each score (`distmeta.core.scope.score_of`) the
            threshold is the greatest that keeps it over all queries of ``validation_tasks`` validation tasks.

    Returns:
        ``recall``, ``validation_tasks``, and by the name of each score in ``scores``: the ``threshold``; and of the
        test tasks, mean and interval of ``auroc`` and ``fpr95`` (see `distmeta.core.scope`), which no threshold has
        been chosen for, and at the threshold of ``kept``, the share of in-scope queries that are kept, ``found``, the
        share of examples out of scope that are not, and ``accuracy``, the share of in-scope queries that are kept and
        rightly classified (Larson et al., EMNLP 2019, report the last two).
    """
    pooled = _scopes(executor, vector, "val", validation_tasks, shard_size)
    tested = _scopes(executor, vector, "test", tasks, shard_size)
    scores: dict[str, Any] = {}
    for kind in SCORES:
        threshold = threshold_at(np.concatenate([task[f"inside.{kind}"] for task in pooled]), recall)
        figures: dict[str, list[float]] = defaultdict(list)
        for task in tested:
            inside, outside = task[f"inside.{kind}"], task[f"outside.{kind}"]
            kept = inside >= threshold
            figures["auroc"].append(auroc(inside, outside))
            figures["fpr95"].append(false_positive_rate(inside, outside))
            figures["kept"].append(float(kept.mean()))
            figures["found"].append(float((outside < threshold).mean()))
            figures["accuracy"].append(float((kept & task["right"]).mean()))
        scores[kind] = {"threshold": threshold} | {name: mean_ci(np.array(own)) for name, own in figures.items()}
    return {"recall": recall, "validation_tasks": len(pooled), "scores": scores}


def _scopes(
    executor: Executor, vector: np.ndarray, split: Split, tasks: int, shard_size: int
) -> list[dict[str, np.ndarray]]:
    """For each task that is not skipped what `Problem.run` with ``out_of_scope`` has found."""
    results = executor.map("out_of_scope", vector, shards_of(split, 0, tasks, shard_size))
    _skipped(results, split, tasks)
    found = gather(results)
    cuts = {place: np.cumsum(found.pop(place))[:-1] for place in ("inside", "outside")}
    pieces = {name: np.split(values, cuts[_place(name)]) for name, values in found.items()}
    return [dict(zip(pieces, task, strict=True)) for task in zip(*pieces.values(), strict=True)]


def _place(name: str) -> str:
    return "outside" if name.startswith("outside") else "inside"


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
    after = adapted(len(evaluation["by_inner_step"]["loss"]) - 1, evaluation.get("made_head", False))
    line = f"{metric} {show(metric, evaluation['before'])} before, {show(metric, evaluation['after'])} after {after}"
    if evaluation["transductive"]:
        line += " (transductive)"
    if "inductive" in evaluation:
        line += f", {show(metric, evaluation['inductive'])} (inductive)"
    groups = evaluation.get("groups", {})
    if len(groups) > MOST_TOLD:
        values = {name: group["after"]["mean"] for name, group in groups.items()}
        low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        ends = f"{low} {show(metric, groups[low]['after'])} to {high} {show(metric, groups[high]['after'])}"
        return f"{line}; of {len(groups)} groups, {ends}"
    told = ", ".join(f"{name} {show(metric, group['after'])}" for name, group in groups.items())
    return f"{line}; {told}" if told else line


def adapted(steps: int, made_head: bool) -> str:
    """What ``steps`` of adaptation do, for people; with ``made_head`` the first makes the head from the support set."""
    inner = steps - made_head
    words = f"{inner} inner step{'s' if inner != 1 else ''}"
    return words if not made_head else f"making the head and {words}" if inner else "making the head"


def show(metric: str, value: dict[str, float]) -> str:
    """A mean and its interval for people: shares of 1 in percent."""
    interval = f"{100 * value['ci95']:.2f}" if metric in SHARES else f"{value['ci95']:.{_decimals(value['mean'])}f}"
    return f"{show_value(metric, value['mean'])} ± {interval}"


def show_value(metric: str, value: float) -> str:
    """One figure for people."""
    return f"{100 * value:.2f}%" if metric in SHARES else f"{value:.{_decimals(value)}f}"


def _decimals(value: float) -> int:
    """How many say something of a mean of tasks: a loss has a few before the point, a return many."""
    return 4 if abs(value) < 10 else 2
