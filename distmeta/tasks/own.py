"""A user's own task: what is adapted to and what is then predicted, from files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, Self, runtime_checkable

from torch import Tensor

from distmeta.core.types import Batch
from distmeta.errors import DataError

Predict = Callable[..., Tensor]
"""The outputs of an adapted model for inputs whose first axis counts examples."""


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

    def check(self, source: Path, ways: int) -> Self:
        """Raises `DataError` unless the classes are no more than the model has outputs for."""
        if len(self.classes) > ways:
            raise DataError(
                f"{source} holds {len(self.classes)} classes; this run tells {ways} apart: leave some out, or train "
                f"with tasks.ways={len(self.classes)}"
            )
        return self

    def predictions(self, predict: Predict) -> Predictions:
        """For each query its class, the probability of that and of every class; and the accuracy."""
        probability = predict(self.inputs)[:, : len(self.classes)].softmax(-1)
        best = [self.classes[k] for k in probability.argmax(-1).tolist()]
        rows = [
            [query, name, f"{max(row):.6f}", *(f"{p:.6f}" for p in row)]
            for query, name, row in zip(self.queries, best, probability.tolist(), strict=True)
        ]
        columns = [self.kind, "class", "probability", *(f"p({name})" for name in self.classes)]
        scores: dict[str, float] = {}
        if self.labels is not None:
            right = [name == label for name, label in zip(best, self.labels, strict=True)]
            scores["accuracy"] = sum(right) / len(right)
        return Predictions(columns, rows, scores)
