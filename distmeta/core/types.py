"""The vocabulary of the package: parameters, tasks, distributions over tasks, and what a meta-gradient is.

Shapes in names: ``x_BCHW`` is a batch of images; ``N`` ways, ``K`` shots, ``Q`` queries a class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
from torch import Tensor

from distmeta.errors import ConfigError

Params = dict[str, Tensor]
"""Named tensors, as ``dict(module.named_parameters())`` gives them."""

Metrics = dict[str, Tensor]
"""Named scalars of one evaluation of a loss, for example ``{"accuracy": ...}``."""

Batch = tuple[Tensor, ...]
"""Inputs and, last, targets; the first axis of every tensor counts examples."""

TaskLoss = Callable[[Params, Batch], tuple[Tensor, Metrics]]
"""L_T(theta; D): a pure function of parameters and data to a scalar loss and metrics."""

Support = Callable[[Params, int], Batch]
"""From parameters and the number of the inner step (from 0) to support data."""

Split = Literal["train", "val", "test"]
"""Meta-training, meta-validation and meta-test: disjoint sets of tasks, not of examples of one task."""


class Task(Protocol):
    """One task T: data to adapt on (support) and data to judge the adapted parameters by (query).

    Both are methods of the parameters because in reinforcement learning they are sampled with a policy.
    """

    def support(self, params: Params, inner_step: int) -> Batch:
        """Data of inner step ``inner_step`` (from 0), at parameters ``params``."""
        ...

    def query(self, params: Params) -> Batch:
        """Data that judges the adapted parameters ``params``."""
        ...


class Episode(NamedTuple):
    """The supervised task: a fixed support set and a fixed query set."""

    support_set: Batch
    query_set: Batch

    def support(self, params: Params, inner_step: int) -> Batch:
        """The whole support set, at every step."""
        return self.support_set

    def query(self, params: Params) -> Batch:
        """The whole query set."""
        return self.query_set


Judge = Callable[[Callable[..., Tensor], Batch], dict[str, float]]
"""From a model, ``predict(x, …)``, and a query set to metrics that no gradient is taken of, such as chrF."""


class TaskDistribution(Protocol):
    """p(T), the distribution that tasks come from.

    ``sample`` must be a pure function of the state of ``rng`` and ``split``: the same task then comes out on whichever
    worker it is built, which is what makes results independent of the hardware.
    """

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draws one task of ``split`` with the random numbers of ``rng`` alone."""
        ...


@runtime_checkable
class Portable(Protocol):
    """A distribution over tasks that can send its data to a node that does not have them."""

    def at_hand(self) -> bool:
        """Whether the data are on this node."""
        ...

    def data(self) -> Any:
        """The data; arrays in it arrive without a copy, read-only."""
        ...

    def attach(self, data: Any) -> None:
        """Takes what `data` has given elsewhere."""
        ...


@runtime_checkable
class Grouped(Protocol):
    """A distribution whose tasks fall into groups that metrics tell apart: the parts of a mixture, the ways of a task.

    A driver asks it about tasks that workers build: both draw from streams of the same name.
    """

    def groups_of(self, rng: np.random.Generator, split: Split) -> tuple[str, ...]:
        """The names of the groups of the task that ``sample(rng, split)`` draws; of a split, none for all tasks or
        some for each."""
        ...


@runtime_checkable
class OpenSet(Protocol):
    """A distribution over classification tasks that has examples of none of their classes, too."""

    def outside(self, rng: np.random.Generator, split: Split) -> tuple[Tensor, ...]:
        """The inputs of some examples that belong to no class of any task of ``split``.

        Raises:
            ConfigError: There are none.
        """
        ...


class Recorded:
    """A task whose data are sampled once, and are the same afterwards at whatever parameters they are asked for.

    The outer loop can so go over the data of one outer step several times.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self._support: dict[int, Batch] = {}
        self._query: Batch | None = None

    def support(self, params: Params, inner_step: int) -> Batch:
        """The data of inner step ``inner_step``, sampled at the parameters of the first call."""
        if inner_step not in self._support:
            self._support[inner_step] = self.task.support(params, inner_step)
        return self._support[inner_step]

    def query(self, params: Params) -> Batch:
        """The query data, sampled at the parameters of the first call."""
        if self._query is None:
            self._query = self.task.query(params)
        return self._query


class MetaParams(NamedTuple):
    """All that the outer loop learns."""

    model: Params
    """theta, the initialisation."""
    extra: Params
    """Whatever else is meta-learned: learning rates, curvature, an update rule. Empty for MAML and Reptile."""


class MetaGradient(NamedTuple):
    """What one task contributes to the outer update."""

    gradient: MetaParams
    """The direction that the outer optimizer descends, of the same structure as the meta-parameters."""
    metrics: Metrics
    """Scalars to average over the meta-batch; ``loss`` is always among them."""


class TaskSpec(NamedTuple):
    """What a model must know of the tasks to be built for them."""

    input_shape: tuple[int, ...]
    """Shape of one input, without the axis that counts examples, for example ``(1, 28, 28)``."""
    outputs: int
    """Number of outputs: the ways of a classification, the targets of a regression."""
    loss: Any
    """``loss(output, target)``: the tasks' own loss (see `distmeta.core.loss`)."""
    vocabulary: int | None = None
    """Number of different tokens, where the inputs are texts: whole numbers from 0, and −1 for padding."""
    judge: Judge | None = None
    """What evaluation measures beside the metrics of the loss."""
    metric: str | None = None
    """The metric that counts in evaluation, the higher the better; None: accuracy if there is one, else the loss."""
    variable_ways: bool = False
    """Whether a classification has as many classes as its labels show, ``outputs`` at most: its loss and its accuracy
    are then those of its own classes, the outputs beyond them left out."""


def check_batch(batch: object, whose: str) -> None:
    """Raises `ConfigError`, which begins with ``whose``, unless ``batch`` is a `Batch` with examples."""
    parts: Sequence[Any] = cast("Sequence[Any]", batch) if isinstance(batch, tuple | list) else ()
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        given = (
            type(cast(object, batch)).__name__ + " of " * bool(parts) + ", ".join(type(part).__name__ for part in parts)
        )
        raise ConfigError(f"{whose} must be a tuple of tensors, inputs and, last, targets; given: a {given}")
    if any(part.dim() and not len(part) for part in parts):
        raise ConfigError(f"{whose} is empty: shapes {', '.join(str(tuple(part.shape)) for part in parts)}")
