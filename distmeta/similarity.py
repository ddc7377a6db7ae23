"""How alike tasks are to the outer loop: the cosines of the directions in which they pull the parameters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

FORMULA = "cos(g, h) = g·h / (‖g‖ ‖h‖) of two tasks' meta-gradients in the model's parameters"
Floats = NDArray[np.float64]


class Similarity(BaseModel):
    """The pairwise cosines of task gradients.

    With g_i the meta-gradient of task i in the model's parameters, c_ij = g_i·g_j / (‖g_i‖ ‖g_j‖). Tasks with c_ij < 0
    are in conflict: a step along the one's gradient raises the other's loss (Yu et al., "Gradient surgery for
    multi-task learning", NeurIPS 2020, definition 1). The diversity 1 − mean c_ij is the expected cosine distance
    between two tasks, as in the diversity coefficient of Miranda et al., "The curse of low task diversity", 2022, with
    the gradient in the place of their embedding of a task.
    """

    step: int
    """The outer steps that the parameters have been trained for."""
    groups: list[str]
    """The group of each task (the part of a mixture; its size, where that is drawn); all empty where there are none."""
    cosines: list[list[float]]
    """c_ij, (tasks, tasks)."""

    @property
    def matrix(self) -> Floats:
        """c_ij."""
        return np.array(self.cosines)

    @property
    def names(self) -> list[str]:
        """The groups, in alphabetical order."""
        return sorted(set(self.groups))

    @property
    def same(self) -> NDArray[np.bool_]:
        """Whether two tasks are of one group, (tasks, tasks)."""
        groups = np.array(self.groups)
        return groups[:, None] == groups

    def mean(self, pairs: NDArray[np.bool_]) -> dict[str, float]:
        """Mean and half-width of the 95% interval of c_ij over the pairs i ≠ j that are marked."""
        return _interval(*jackknife(self.matrix, pairs))

    def gap(self) -> dict[str, float]:
        """By how much tasks of one group are more alike than those of different groups, with its interval."""
        (one, one_without), (other, other_without) = (jackknife(self.matrix, m) for m in (self.same, ~self.same))
        return _interval(one - other, one_without - other_without)

    def table(self) -> Floats:
        """The mean cosine of the tasks of each pair of groups; NaN where there is no pair."""
        marks = [np.array([group == name for group in self.groups]) for name in self.names]
        return np.array([[self.mean(np.outer(a, b) | np.outer(b, a))["mean"] for b in marks] for a in marks])

    def conflicts(self) -> float:
        """The share of the pairs whose cosine is below 0."""
        return float((self.matrix[~np.eye(len(self.groups), dtype=bool)] < 0).mean())

    def reading(self) -> str:
        """What it means, in a sentence or two."""
        everything = self.mean(np.ones_like(self.same))
        line = (
            f"Diversity (1 − mean cosine) {1 - everything['mean']:.2f} ± {everything['ci95']:.2f}; "
            f"{self.conflicts():.0%} of the pairs of tasks are in conflict (cosine below 0)."
        )
        if len(self.names) < 2:
            return line + " Where training has converged, gradients cancel and their mean cosine is near 0."
        within, between, gap = self.mean(self.same), self.mean(~self.same), self.gap()
        line += f" Within a group {_told(within)}, between groups {_told(between)}: "
        if not np.isfinite(gap["ci95"]):
            return line + "too few tasks of one group to compare; ask for more with --tasks."
        if not gap["mean"] - gap["ci95"] > 0:
            return line + "tasks of different groups pull no more apart than those of one."
        if between["mean"] + between["ci95"] < 0:
            return line + "the groups pull the parameters apart, what helps the one hurts the others."
        return line + "the groups pull in directions of their own, which are not opposed."


def similarity(step: int, gradients: Floats, groups: Sequence[str]) -> Similarity:
    """From the gradients of tasks, (tasks, parameters); one that is 0 has the cosine 0 with every other."""
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    unit = np.divide(gradients, norms, out=np.zeros_like(gradients), where=norms > 0)
    return Similarity(step=step, groups=list(groups), cosines=np.clip(unit @ unit.T, -1, 1).round(6).tolist())


def jackknife(matrix: Floats, pairs: NDArray[np.bool_]) -> tuple[float, Floats]:
    """The mean over the pairs i ≠ j that are marked, and what it is without each of the tasks; NaN without pairs."""
    pairs = pairs & ~np.eye(len(matrix), dtype=bool)
    sums, counts = (matrix * pairs).sum(1), pairs.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(sums.sum() / counts.sum()), (sums.sum() - 2 * sums) / (counts.sum() - 2 * counts)


def _interval(mean: float, without: Floats) -> dict[str, float]:
    """With 1.96 standard errors by the jackknife (Efron and Stein, "The jackknife estimate of variance", 1981): pairs
    that share a task are not independent."""
    n = len(without)
    if not np.isfinite(without).all():  # a task is in all the pairs that there are
        return {"mean": mean, "ci95": float("nan")}
    return {"mean": mean, "ci95": 1.96 * float(np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()))}


def _told(value: dict[str, float]) -> str:
    return f"{value['mean']:+.2f} ± {value['ci95']:.2f}"
