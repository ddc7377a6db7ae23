"""A user's own task: what is adapted to and what is then predicted, from files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from distmeta.core.scope import Scope, score_of
from distmeta.core.types import Batch

log = logging.getLogger("distmeta")

T = TypeVar("T")

OUT_OF_SCOPE = "out of scope"
"""What stands for the class of a query that belongs to none."""

Predict = Callable[..., Tensor]
"""The outputs of an adapted model for inputs whose first axis counts examples."""


def truth_of_all(query: Path, truth: Sequence[T | None]) -> list[T] | None:
    """The truth of the queries of a file, where it is given for each; if only for some, there is a warning."""
    known = [one for one in truth if one is not None]
    if known and len(known) < len(truth):
        log.warning("%s: for %d of %d queries the truth is not given, so that nothing is scored",
                    query, len(truth) - len(known), len(truth))  # fmt: skip
    return known if len(known) == len(truth) else None


class Predictions(NamedTuple):
    """What an adapted model says of the user's queries."""

    columns: list[str]
    rows: list[list[str]]
    scores: dict[str, float]
    """Where the truth is known: for example ``{"accuracy": 0.9}``."""


class OwnTask(Protocol):
    """A task read from a user's files."""

    support: Batch
    """What the model is adapted to."""

    @property
    def classes(self) -> list[str]:
        """The class of each output; empty where the outputs are no classes."""
        ...

    def predictions(self, predict: Predict) -> Predictions:
        """What the adapted model says of the queries."""
        ...


@runtime_checkable
class ReadsOwnTasks(Protocol):
    """A distribution over tasks that can read a user's own one from files."""

    def own_task(self, support: Path, query: Path) -> OwnTask:
        """The task whose support set and whose queries are in the files or folders given.

        Raises:
            DataError: A file cannot be read, or holds what the tasks cannot take.
        """
        ...


@dataclass
class OwnClasses:
    """A user's classes: the support set, and examples that are to be classified."""

    classes: list[str]
    """Their names, as the support's labels number them."""
    support: Batch
    kind: str
    """What a query is known by: the name of the table's first column."""
    queries: list[str]
    """What each query is known by."""
    inputs: Tensor
    labels: list[str] | None
    """The true class of each query, where it is known."""
    scope: Scope | None = None
    """Where the scope of the classes ends; None: every query is of one of them."""

    def predictions(self, predict: Predict) -> Predictions:
        """For each query its class, the probability of the likeliest and of every class; and the accuracy.

        With a `scope`, the class of what is beyond it is `OUT_OF_SCOPE`, and so is the true one of a label that no
        class has; the score, where it is another than the probability, is a column of its own.
        """
        logits = predict(self.inputs)[:, : len(self.classes)]
        probability = logits.softmax(-1)
        best = [self.classes[k] for k in probability.argmax(-1).tolist()]
        columns = [self.kind, "class", "probability", *(f"p({name})" for name in self.classes)]
        rows = [
            [query, name, f"{max(row):.6f}", *(f"{p:.6f}" for p in row)]
            for query, name, row in zip(self.queries, best, probability.tolist(), strict=True)
        ]
        if self.scope is not None:
            values = score_of(self.scope.score, logits).tolist()
            best = [
                name if value >= self.scope.threshold else OUT_OF_SCOPE
                for name, value in zip(best, values, strict=True)
            ]
            for row, name, value in zip(rows, best, values, strict=True):
                row[1:3] = [name, *([] if self.scope.score == "probability" else [f"{value:.6f}"]), row[2]]
            if self.scope.score != "probability":
                columns.insert(2, self.scope.score)
        return Predictions(columns, rows, {} if self.labels is None else self._judge(best, self.labels))

    def _judge(self, best: list[str], labels: list[str]) -> dict[str, float]:
        """The share of queries that are rightly classified; and, where there is a scope, of those in it and of those
        out of it the shares that are taken so."""
        unknown = sorted(set(labels) - set(self.classes))
        if unknown and self.scope is None:
            count = sum(label not in self.classes for label in labels)
            log.warning("%d of %d queries have labels that the support set has not (%s): they count as wrong",
                        count, len(labels), ", ".join(unknown[:5]))  # fmt: skip
        outside = [self.scope is not None and label not in self.classes for label in labels]
        truth = [OUT_OF_SCOPE if out else label for out, label in zip(outside, labels, strict=True)]
        right = [name == true for name, true in zip(best, truth, strict=True)]
        scores = {"accuracy": sum(right) / len(right)}
        for place, where in (("in-scope recall", False), ("out-of-scope recall", True)):
            taken = [(name == OUT_OF_SCOPE) == where for name, out in zip(best, outside, strict=True) if out == where]
            if taken and self.scope is not None:
                scores[place] = sum(taken) / len(taken)
        return scores
