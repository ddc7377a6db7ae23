"""Tasks over one array of all examples of a data set, and few-shot classification over it.

A data set is decoded once into a single array in the cache (pixels of images, numbers of tokens), which every worker of
a node maps into its memory: the pages are shared, and an episode is a few thousand bytes copied out of it. The array
may be larger than the memory: it can be written piece by piece (`Block`).
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distmeta.core.types import Episode, Split
from distmeta.errors import DataError, told
from distmeta.tasks.cache import FORMAT, Block, ExampleSet
from distmeta.tasks.files import default_data_root
from distmeta.tasks.own import OwnClasses
from distmeta.tasks.sizes import Sizes, check_sizes, choices, draw
from distmeta.tasks.splits import SPLITS

log = logging.getLogger(__name__)

_LARGE_CLASS = 1 << 12  # examples; from larger classes a few are drawn without ordering all


@dataclass(eq=False)
class DataTasks(ABC):
    """Tasks drawn from a data set whose groups of examples are divided among the splits.

    Subclasses say what the examples are made from, which groups belong to which split, and how a task is drawn.
    """

    data_root: Annotated[str | None, "Folder of the data sets; null: $DISTMETA_DATA, else ~/.cache/distmeta/data."] = (
        None
    )

    name: ClassVar[str]
    """The data set, as the cache's files are named."""
    licence: ClassVar[str] = ""
    """Under which terms the data may be used."""
    groups: ClassVar[str] = "groups"
    """What the groups are, for people."""

    # what a subclass says

    @abstractmethod
    def source_key(self) -> str:
        """Names all that `build` depends on: files with sizes and times, versions, settings."""

    @abstractmethod
    def build(self) -> ExampleSet | Iterator[Block]:
        """Reads (where necessary downloads) the data set and decodes it: whole, or piece by piece.

        Raises:
            DataError: the data is missing or damaged.
        """

    @abstractmethod
    def split_groups(self, names: Sequence[str], split: Split) -> NDArray[np.int64]:
        """The groups of ``split``, as positions in ``names``, in an order that is always the same."""

    @abstractmethod
    def check(self, split: Split, members: NDArray[np.int64]) -> None:
        """Raises `DataError` unless tasks of ``split`` can be drawn from the groups ``members``."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        """Draws an episode of ``split``."""

    @abstractmethod
    def describe(self) -> str:
        """How much there is of what, for people."""

    # what all share

    def card(self) -> list[str]:
        """What else is to be known of the data set, for people: a line for each split, the licence, and a checksum of
        the lists of groups, by which two can tell whether they have divided the same data in the same way."""
        digest = hashlib.sha256()
        lines: list[str] = []
        for split, groups in self.members.items():
            counts = self.dataset.counts[groups]
            each = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
            lines.append(f"{split:5} {len(groups):,} {self.groups} of {each}, {counts.sum():,} in all")
            digest.update("".join(f"{split} {self.dataset.names[group]}\n" for group in groups).encode())
        licence = [f"licence: {self.licence}"] if self.licence else []
        return [*lines, *licence, f"sha256 of the lists of each split: {digest.hexdigest()[:16]}"]

    @property
    def root(self) -> Path:
        """The folder of the data sets."""
        return Path(self.data_root).expanduser() if self.data_root else default_data_root()

    def prepare(self, splits: Sequence[Split] = SPLITS) -> None:
        """Downloads, decodes and caches the data set where that has not been done, and checks that ``splits`` can give
        the tasks asked for. The driver calls it once; without it the first `sample` of a split does the same.

        Raises:
            DataError: the data is missing, damaged or too small for the tasks.
            StorageError: the data or the cache cannot be written.
        """
        for split in splits:
            self.checked(split)

    @cached_property
    def _key(self) -> str:
        """Kept when pickled: a worker then finds the driver's cache without looking at the source files."""
        return hashlib.sha256(f"{FORMAT} {self.source_key()}".encode()).hexdigest()[:16]

    @cached_property
    def dataset(self) -> ExampleSet:
        """The whole data set, memory-mapped."""
        return ExampleSet.cached(self.name, self._key, self.build)

    @cached_property
    def members(self) -> dict[Split, NDArray[np.int64]]:
        """The groups of each split."""
        return {split: self.split_groups(self.dataset.names, split) for split in SPLITS}

    @cached_property
    def _checked(self) -> set[Split]:
        return set()

    def checked(self, split: Split) -> NDArray[np.int64]:
        """The groups of ``split``, from which its tasks can be drawn.

        Raises:
            DataError: They are too few, or too small.
        """
        if split not in self._checked:
            self.check(split, self.members[split])
            self._checked.add(split)
        return self.members[split]

    def at_hand(self) -> bool:
        """Whether the decoded data set is in this node's cache."""
        return ExampleSet.is_cached(self.name, self._key)

    def data(self) -> ExampleSet:
        """The whole data set."""
        return self.dataset

    def attach(self, data: ExampleSet) -> None:
        """Takes the data set from elsewhere, where this node does not have it."""
        self.dataset = data

    def __getstate__(self) -> dict[str, Any]:
        """The settings and the cache's key, not the data: whoever unpickles it opens the cache, or builds it."""
        kept = {field.name for field in fields(self)} | {"_key"}
        return {key: value for key, value in self.__dict__.items() if key in kept}


@dataclass(eq=False)
class FewShotClasses(DataTasks):
    """N-way K-shot classification: an episode draws N classes, and K + Q distinct examples of each.

    N, K and Q may each be a list, from which every task draws its own number. The model then has outputs for the most
    ways, of which a task's loss sees its own alone (see `TaskSpec.variable_ways`).

    Raises:
        ConfigError: a field is out of range.
    """

    ways: Annotated[Sizes, "Classes in each task (N); a list, such as [5, 20]: each task draws one of them."] = 5
    shots: Annotated[Sizes, "Support examples of each class (K), or a list to draw from."] = 1
    queries: Annotated[Sizes, "Query examples of each class (Q), or a list to draw from."] = 15
    train_ways: Annotated[
        Sizes | None, "Classes in each task of meta-training, where they are to differ; null: as ways."
    ] = None
    train_shots: Annotated[
        Sizes | None,
        "Support examples of each class in meta-training, where they are to differ (Reptile); null: as shots.",
    ] = None
    train_queries: Annotated[Sizes | None, "Query examples of each class in meta-training; null: as queries."] = None

    examples: ClassVar[str]
    """What the examples are called, for people."""
    groups: ClassVar[str] = "classes"

    def __post_init__(self) -> None:
        for key, least in (("ways", 2), ("shots", 1), ("queries", 1)):
            check_sizes(f"tasks.{key}", getattr(self, key), least)
            check_sizes(f"tasks.train_{key}", getattr(self, f"train_{key}"), least)

    @abstractmethod
    def inputs(self, examples: NDArray[Any]) -> Tensor:
        """What a model is given of the rows ``examples`` of the data set."""

    @abstractmethod
    def own_task(self, support: Path, query: Path) -> OwnClasses:
        """A user's own classes and what is to be classified, from files.

        Raises:
            DataError: a file is missing or cannot be read, or there are more classes than ways.
        """

    @property
    def variants(self) -> int:
        """How many classes each class of the data set counts for."""
        return 1

    def vary(self, examples: NDArray[Any], variants: NDArray[np.int64]) -> None:
        """Turns each class's examples (first axis) into those of the variant given for it (0: as it is), in place."""

    def prepare(self, splits: Sequence[Split] = SPLITS) -> None:
        """See `DataTasks.prepare`; equal examples in classes of two splits are reported."""
        super().prepare(splits)
        split_of = {int(group): split for split, groups in self.members.items() for group in groups}
        starts = self.dataset.starts
        equal: dict[int, dict[int, str]] = defaultdict(dict)
        for twin in self.dataset.twins:
            equal[twin.first] |= {twin.first: twin.first_place, twin.later: twin.later_place}
        found: list[str] = []
        for rows in equal.values():
            groups = np.searchsorted(starts, list(rows), "right") - 1
            owned = [
                (SPLITS.index(split_of[int(group)]), place)
                for group, place in zip(groups, rows.values(), strict=True)
                if int(group) in split_of
            ]
            first, *others = sorted(owned) or [(0, "")]
            found += [
                f"{place} ({SPLITS[at]}) and {first[1]} ({SPLITS[first[0]]})" for at, place in others if at != first[0]
            ]
        if found:
            one = self.examples.removesuffix("s")
            log.warning(
                "%s in classes of two splits, so that unseen classes are not wholly unseen%s",
                *told(found, f"{one} stands", f"{self.examples} stand"),
            )

    def check(self, split: Split, members: NDArray[np.int64]) -> None:
        """Enough classes, and enough examples of each."""
        ways, shots, queries = self._most(split)
        available, counted = len(members) * self.variants, " (rotations counted)" if self.variants > 1 else ""
        if available < ways:
            prefix = "train_" if split == "train" and self.train_ways else ""
            raise DataError(
                f"the {split} split of {self.name} has {available} classes{counted}, fewer than the "
                f"{ways} ways of a task: lower tasks.{prefix}ways"
                + (" or change tasks.fractions" if hasattr(self, "fractions") else "")
            )
        smallest = members[np.argmin(self.dataset.counts[members])]
        if self.dataset.counts[smallest] < shots + queries:
            prefix = "train_" if split == "train" and (self.train_shots or self.train_queries) else ""
            raise DataError(
                f"class {self.dataset.names[smallest]} of {self.name} ({split}) has "
                f"{self.dataset.counts[smallest]} examples, fewer than {shots} shots + {queries} "
                f"queries: lower tasks.{prefix}shots or tasks.{prefix}queries"
            )

    def _sizes(self, split: Split) -> tuple[Sizes, Sizes, Sizes]:
        """What ways, shots and queries are drawn from in ``split``."""
        if split != "train":
            return self.ways, self.shots, self.queries
        return self.train_ways or self.ways, self.train_shots or self.shots, self.train_queries or self.queries

    def _most(self, split: Split) -> tuple[int, int, int]:
        """The most ways, shots and queries that are drawn in ``split``."""
        ways, shots, queries = (max(choices(sizes)) for sizes in self._sizes(split))
        return ways, shots, queries

    @property
    def most_ways(self) -> int:
        """The ways of the largest task of any split."""
        return max(*choices(self.ways), *choices(self.train_ways or self.ways))

    @property
    def variable_ways(self) -> bool:
        """Whether any task has fewer."""
        return min(*choices(self.ways), *choices(self.train_ways or self.ways)) < self.most_ways

    def groups_of(self, rng: np.random.Generator, split: Split) -> tuple[str, ...]:
        """The task's ways and shots, as far as they are drawn: ``("5-way 1-shot",)``, or nothing."""
        ways, shots, _ = self._sizes(split)
        drawn = {"way": (draw(rng, ways), ways), "shot": (draw(rng, shots), shots)}
        told = [f"{size}-{word}" for word, (size, sizes) in drawn.items() if len(set(choices(sizes))) > 1]
        return (" ".join(told),) if told else ()

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        """Draws an episode of ``split``: support (x, y) in random order, query (x, y) class by class.

        x are the inputs of N * K or N * Q examples, y int64 from 0 to N - 1.
        """
        ways, shots, queries = (draw(rng, sizes) for sizes in self._sizes(split))
        members = self.checked(split)
        # distinct (class, variant) pairs
        drawn = rng.choice(len(members) * self.variants, ways, replace=False)
        classes = members[drawn // self.variants]
        # distinct examples of each class: the first few of a random order
        counts = self.dataset.counts[classes]
        largest = int(counts.max())
        if largest > _LARGE_CLASS:
            examples = np.stack([rng.choice(count, shots + queries, replace=False) for count in counts])
        else:
            order = rng.random((ways, largest))
            if counts.min() < largest:
                order[np.arange(largest) >= counts[:, None]] = np.inf
            # a stable sort takes three times as long, and among numbers of 53 random bits there are no equal ones
            examples = np.argsort(order, axis=1)[:, : shots + queries]
        block = self.dataset.examples[self.dataset.starts[classes][:, None] + examples]
        self.vary(block, drawn % self.variants)
        labels = np.arange(ways)
        shuffled = rng.permutation(ways * shots)
        return Episode(
            (self.inputs(_flat(block[:, :shots])[shuffled]), torch.from_numpy(labels.repeat(shots)[shuffled])),
            (self.inputs(_flat(block[:, shots:])), torch.from_numpy(labels.repeat(queries))),
        )

    def describe(self) -> str:
        """How many classes each split has."""
        parts = [f"{split} {len(self.members[split]) * self.variants:,}" for split in SPLITS]
        counted = ", rotations counted" if self.variants > 1 else ""
        classes = np.concatenate([*self.members.values()])
        total = f"{self.dataset.counts[classes].sum():,} {self.examples} of {len(classes):,} classes"
        return f"{total} ({', '.join(parts)}{counted})"


def _flat(values: NDArray[Any]) -> NDArray[Any]:
    """Joins the first two axes, classes and examples, in an array of its own."""
    return np.ascontiguousarray(values).reshape(-1, *values.shape[2:])
