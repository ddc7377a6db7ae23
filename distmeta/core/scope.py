"""Which examples belong to none of a task's classes: how sure a classifier is of them, and how well that tells.

A detector takes an example as in scope where its score is at least a threshold; the in-scope ones are the positives.
"""

from __future__ import annotations

from math import ceil
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Score = Literal["probability", "logit"]
SCORES: tuple[Score, ...] = get_args(Score)

Floats = NDArray[np.floating]


class Scope(NamedTuple):
    """Where the scope of a task ends: an example whose score is below the threshold is of none of its classes."""

    score: Score
    threshold: float


def score_of(kind: Score, logits_BN: Tensor) -> Tensor:
    """How sure a classifier is that each example is of one of its N classes, from its logits z: (B,), in float64.

    ``probability``: max_n softmax(z)_n (Hendrycks and Gimpel, ICLR 2017), from 1/N to 1.

    ``logit``: max_n z_n (Hendrycks et al., ICML 2022), which does not ask how the other classes compare. Where the head
    is of prototypes c_n and features f have a fixed length, z_n = ‖f‖² − ‖f − c_n‖²: a constant less the squared
    distance to the nearest prototype.
    """
    logits_BN = logits_BN.double()  # in float32 many probabilities would be just 1
    return (logits_BN.softmax(-1) if kind == "probability" else logits_BN).amax(-1)


def auroc(inside: Floats, outside: Floats) -> float:
    """Area under the ROC curve: P(s > s') + P(s = s') / 2 for the scores s of an in-scope and s' of another example.

    1: the scores tell them apart without error; 0.5: not at all.
    """
    ordered = np.sort(outside)
    below, up_to = (np.searchsorted(ordered, inside, side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(ordered)))


def threshold_at(inside: Floats, recall: float) -> float:
    """The greatest threshold that at least the share ``recall`` of in-scope scores reach."""
    kept = max(1, ceil(recall * len(inside) - 1e-9))  # 0.9 * 10 may be a little more than 9
    return float(np.sort(inside)[-kept])


def false_positive_rate(inside: Floats, outside: Floats, recall: float = 0.95) -> float:
    """The share of out-of-scope examples taken as in scope at the threshold that keeps the share ``recall`` of the
    in-scope ones: FPR at 95% TPR (Liang et al., ICLR 2018)."""
    return float((outside >= threshold_at(inside, recall)).mean())
