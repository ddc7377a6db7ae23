"""Mixtures: tasks that come from several distributions, each with a weight."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from distmeta.core.types import Grouped, Portable, Split, Task, TaskSpec
from distmeta.errors import ConfigError, DistmetaError, nearest
from distmeta.tasks.control import Control
from distmeta.tasks.own import OwnTask, ReadsOwnTasks
from distmeta.tasks.splits import SPLITS


@dataclass(eq=False)
class Mixture:
    """p(T) = Σ_m w_m p_m(T) / Σ_m w_m: each task is drawn from one of several distributions, its part.

    Which part that is comes from the task's own random stream, and so depends on (seed, split, outer step, index)
    alone. The parts must fit one model; classifications may differ in their ways (see `TaskSpec.variable_ways`). The
    splits of the mixture are those of its parts.

    Raises:
        ConfigError: there is no part, a weight is no share of anything, or a part's tasks are no supervised ones.
    """

    of: Annotated[dict[str, Any], "The parts, each by a name of your choice: a task distribution with its options."]
    weights: Annotated[
        dict[str, float] | None, "How often tasks come from a part, in relation to the others; 1 where none is given."
    ] = None
    each: Annotated[dict[str, Any] | None, "Options that are set in all parts, over their own."] = None
    reads: Annotated[
        str | None, "The part as whose examples `distmeta adapt` reads files of your own; null: the first."
    ] = None

    def __post_init__(self) -> None:
        if not self.of:
            raise ConfigError("tasks.of is empty; a mixture needs a part, for example of: {printed: {use: glyphs}}")
        if self.each:
            raise ConfigError("tasks.each is for parts that a configuration names; these are Python objects")
        for name, part in self.of.items():
            if isinstance(part, Control) or not callable(getattr(part, "sample", None)):
                raise ConfigError(
                    f"tasks.of.{name} is {type(part).__name__}; the parts of a mixture are distributions over "
                    "supervised tasks, with a method sample(rng, split)"
                )
        for key, names in (("weights", self.weights or {}), ("reads", [self.reads] if self.reads else [])):
            for name in names:
                if name not in self.of:
                    raise ConfigError(f"tasks.{key}: there is no part {name!r}{nearest(name, self.of)}")
        weights = np.array([(self.weights or {}).get(name, 1.0) for name in self.of])
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise ConfigError(
                f"tasks.weights are {self.weights}; they must be 0 or more and finite, and one of them above 0"
            )
        self._bounds = np.cumsum(weights / weights.sum())
        self._bounds[weights.nonzero()[0][-1] :] = 1.0  # whatever rounding makes of the sum

    @cached_property
    def spec(self) -> TaskSpec:
        """What a model for all parts is built for.

        Raises:
            ConfigError: the parts do not fit one model; the message says which differ, and in what.
            AttributeError: no part says what it needs (tasks of your own, with a model of your own).
        """
        specs = {name: part.spec for name, part in self.of.items() if hasattr(part, "spec")}
        if not specs:
            raise AttributeError("spec")
        for name in self.of:
            if name not in specs:
                raise ConfigError(
                    f"tasks.of.{name} has no `spec`, which the other parts of the mixture have; give it one"
                )
        (first, one), *others = specs.items()
        for name, other in others:
            if (what := _difference(one, other)) is not None:
                raise ConfigError(f"the parts of the mixture must fit one model, but {what.format(first, name)}")
        if len(specs) > 1 and one.judge is not None:
            raise ConfigError(
                f"the parts {first} and {others[0][0]} judge outputs each in its own way: they cannot be mixed"
            )
        ways = {spec.outputs for spec in specs.values()}
        variable = len(ways) > 1 or any(spec.variable_ways for spec in specs.values())
        return one._replace(outputs=max(ways), variable_ways=variable)

    def prepare(self, splits: Sequence[Split] = SPLITS) -> None:
        """Prepares the parts, once they are known to fit one model."""
        _ = getattr(self, "spec", None)
        for name, part in self.of.items():
            if callable(getattr(part, "prepare", None)):
                with naming(f"tasks.of.{name}"):
                    part.prepare(splits)

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draws a part by the weights, and a task from it."""
        return self.of[self._draw(rng)].sample(rng, split)

    def groups_of(self, rng: np.random.Generator, split: Split) -> tuple[str, ...]:
        """The name of the task's part, and the groups within it."""
        name = self._draw(rng)
        part = self.of[name]
        return (name, *(part.groups_of(rng, split) if isinstance(part, Grouped) else ()))

    def _draw(self, rng: np.random.Generator) -> str:
        return list(self.of)[int(np.searchsorted(self._bounds, rng.random(), side="right"))]

    def at_hand(self) -> bool:
        """Whether the data of all parts are on this node."""
        return all(part.at_hand() for part in self._portable().values())

    def data(self) -> dict[str, Any]:
        """The data of the parts that have any."""
        return {name: part.data() for name, part in self._portable().items()}

    def attach(self, data: Mapping[str, Any]) -> None:
        """Takes the parts' data from elsewhere."""
        for name, part in self._portable().items():
            part.attach(data[name])

    def _portable(self) -> dict[str, Portable]:
        return {name: part for name, part in self.of.items() if isinstance(part, Portable)}

    def own_task(self, support: Path, query: Path) -> OwnTask:
        """A user's own task, read as examples of the part ``reads``.

        Raises:
            ConfigError: the part reads no tasks from files.
        """
        name = self.reads or next(iter(self.of))
        part = self.of[name]
        if not isinstance(part, ReadsOwnTasks):
            raise ConfigError(f"tasks.of.{name} reads no tasks from files; set tasks.reads to a part that does")
        return part.own_task(support, query)


def _difference(one: TaskSpec, other: TaskSpec) -> str | None:
    """In what two parts differ that one model cannot serve, with their names left open; None if in nothing."""
    if one.input_shape != other.input_shape:
        images = len(one.input_shape) == len(other.input_shape) == 3
        remedy = (
            "set tasks.each.image_size and tasks.each.channels (1: grey, 3: colour)" if images else "make them equal"
        )
        return f"{{}} has inputs of shape {one.input_shape} and {{}} of {other.input_shape}: {remedy}"
    if one.loss != other.loss:
        return f"{{}} has the loss {one.loss} and {{}} {other.loss}"
    if one.vocabulary != other.vocabulary:
        return f"{{}} has {one.vocabulary} different tokens and {{}} {other.vocabulary}: set tasks.each.tokenizer"
    if one.outputs != other.outputs and one.loss != "cross_entropy":
        return f"{{}} has {one.outputs} outputs and {{}} {other.outputs}"
    if one.metric != other.metric:
        return (
            f"{{}} is measured by {one.metric or 'loss or accuracy'} and {{}} by {other.metric or 'loss or accuracy'}"
        )
    return None


@contextmanager
def naming(part: str) -> Generator[None]:
    """Within this context a message of ours begins with what it is about: the key of a part."""
    try:
        yield
    except DistmetaError as error:
        raise type(error)(f"{part}: {error}") from error
