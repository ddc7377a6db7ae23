"""Tasks over one array of all examples of a data set, and few-shot classification over it.

A data set is decoded once into a single array in the cache (pixels of images, numbers of tokens), which every worker of
a node maps into its memory: the pages are shared, and an episode is a few thousand bytes copied out of it. The array
may be larger than the memory: it can be written piece by piece (`Block`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distmeta.core.types import Episode, Split
from distmeta.errors import DataError, StorageError
from distmeta.tasks.files import atomic_write, cache_dir, default_data_root
from distmeta.tasks.own import OwnClasses
from distmeta.tasks.sizes import Sizes, check_sizes, choices, draw
from distmeta.tasks.splits import SPLITS

log = logging.getLogger(__name__)

_FORMAT = 2  # of the cached files; a new number makes every cache be built anew
_WHOLE = 1 << 30  # bytes; of larger arrays the checksum takes evenly spaced pieces, this much together
_PIECE = 1 << 20
_LARGE_CLASS = 1 << 12  # examples; from larger classes a few are drawn without ordering all


class Twin(NamedTuple):
    """Two examples that are equal."""

    first: int
    """The row of the first of all that are equal to this one."""
    later: int
    first_place: str
    """What messages call the first: its file, or its class."""
    later_place: str


class Block(NamedTuple):
    """Some examples of one group; the blocks of a group come one after the other."""

    group: str
    examples: NDArray[Any]
    """[n, …]; n may be 0, for a group without examples."""
    places: Sequence[str]
    """What messages call each of them."""


class ExampleSet(NamedTuple):
    """All examples of a data set, group after group; a group is a class, or a language."""

    examples: NDArray[Any]
    """[n, …], for example uint8 [n, H, W] of grey images or int32 [n, L] of texts."""
    names: tuple[str, ...]
    """A name for each group."""
    counts: NDArray[np.int64]
    """The number of examples of each group; the first group's come first."""
    twins: tuple[Twin, ...] = ()
    """Examples that are equal, found when the data set is cached."""

    @property
    def starts(self) -> NDArray[np.int64]:
        """The row of each group's first example."""
        return np.cumsum(self.counts) - self.counts

    @staticmethod
    def cached(name: str, key: str, build: Callable[[], ExampleSet | Iterator[Block]]) -> ExampleSet:
        """The data set ``name``, from the cache or from ``build``, whose result is cached.

        Args:
            name: the data set; part of the files' names.
            key: a hash of all that the result of ``build`` depends on. Several processes may build the same key at
                once, since they write the same bytes.
            build: makes the examples when the cache lacks them, or holds them damaged.

        Raises:
            StorageError: the cache cannot be written.
        """
        stem = _stem(name, key)
        found = _open(stem)
        if found is None:
            _save(stem, build())
            found = _open(stem)
        if found is None:
            raise StorageError(
                f"{stem}.npy cannot be read back as it was written; set DISTMETA_CACHE to a folder on a sound disk"
            )
        return found


def _stem(name: str, key: str) -> Path:
    return cache_dir() / f"{name}-{key}"


def _paths(stem: Path) -> tuple[Path, Path]:
    return stem.with_name(stem.name + ".npy"), stem.with_name(stem.name + ".json")


def _checksum(path: Path) -> str:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= _WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest, pieces = hashlib.sha256(str(size).encode()), _WHOLE // _PIECE
        for piece in range(pieces):
            file.seek((size - _PIECE) * piece // (pieces - 1))
            digest.update(file.read(_PIECE))
        return digest.hexdigest()


def _open(stem: Path) -> ExampleSet | None:
    """The cached examples, memory-mapped and read-only; None if there are none, or if they are damaged."""
    array, index = _paths(stem)
    if not (array.exists() and index.exists()):
        return None
    try:
        entry: dict[str, Any] = json.loads(index.read_text("utf-8"))
        if _checksum(array) != entry["sha256"]:
            raise ValueError("the checksum differs")
        # a plain view: np.memmap costs microseconds at each indexing
        examples = np.asarray(np.load(array, mmap_mode="r", allow_pickle=False))
        twins = tuple(Twin(*twin) for twin in entry["twins"])
        found = ExampleSet(examples, tuple(entry["names"]), np.asarray(entry["counts"], np.int64), twins)
        if found.counts.sum() != len(examples) or len(found.names) != len(found.counts):
            raise ValueError("the index does not fit the array")
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        log.warning("the cached data in %s is damaged (%s): building it anew", array, error)
        return None
    return found


def _save(stem: Path, built: ExampleSet | Iterator[Block]) -> None:
    array, index = _paths(stem)
    names: list[str] = []
    counts: list[int] = []
    places: list[str] = []
    marks: list[bytes] = []  # a hash of each example
    last: Block | None = None
    with atomic_write(array) as file:
        for block in _blocks(built) if isinstance(built, ExampleSet) else built:
            if not names:
                _write_header(file, block.examples, 0)
            if not names or names[-1] != block.group:
                names.append(block.group)
                counts.append(0)
            counts[-1] += len(block.examples)
            places += block.places
            rows = np.ascontiguousarray(block.examples)
            marks += [hashlib.blake2b(row, digest_size=8).digest() for row in rows]
            file.write(rows.data)
            last = block
        assert last is not None  # no data set has no groups
        file.seek(0)
        _write_header(file, last.examples, len(marks))  # of the same length: NumPy leaves room for any number
    twins = _twins(np.frombuffer(b"".join(marks), np.uint64), places)
    entry = {"sha256": _checksum(array), "names": names, "counts": counts, "twins": twins}
    with atomic_write(index) as file:  # last: an index stands for a whole array
        file.write(json.dumps(entry).encode())


def _blocks(dataset: ExampleSet) -> Iterator[Block]:
    """The groups of a whole data set."""
    for name, start, count in zip(dataset.names, dataset.starts, dataset.counts, strict=True):
        yield Block(name, dataset.examples[start : start + count], [name] * int(count))


def _write_header(file: BinaryIO, examples: NDArray[Any], rows: int) -> None:
    """The head of a ``.npy`` file of so many rows like ``examples``."""
    about = {"descr": examples.dtype.str, "fortran_order": False, "shape": (rows, *examples.shape[1:])}
    np.lib.format.write_array_header_1_0(file, about)


def _twins(marks: NDArray[np.uint64], places: Sequence[str]) -> list[Twin]:
    """The examples whose marks are equal, each with the first of them."""
    order = np.argsort(marks, kind="stable")
    same = np.flatnonzero(marks[order[1:]] == marks[order[:-1]]) + 1
    first = np.arange(len(order))
    first[same] = 0
    first = np.maximum.accumulate(first)  # where in the order the run of equal marks begins
    pairs = ((int(order[first[at]]), int(order[at])) for at in same)
    return [Twin(a, b, places[a], places[b]) for a, b in pairs]


def told(places: Sequence[str], one: str, more: str) -> tuple[str, str]:
    """How many there are, and where (the first of them)."""
    return (
        (f"1 {one}", f": {places[0]}") if len(places) == 1 else (f"{len(places)} {more}", f", the first: {places[0]}")
    )


def some(things: Iterable[object], most: int = 10) -> str:
    """A list for messages; of a long one the beginning, and how many are left."""
    shown = [str(thing) for thing in things]
    rest = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {rest} more" if rest > 0 else "")


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

    def prepare(self) -> None:
        """Downloads, decodes and caches the data set where that has not been done, and checks that each split can give
        the tasks asked for. The driver calls it once; without it the first `sample` does the same.

        Raises:
            DataError: the data is missing, damaged or too small for the tasks.
            StorageError: the data or the cache cannot be written.
        """
        _ = self.members

    @cached_property
    def _key(self) -> str:
        """Kept when pickled: a worker then finds the driver's cache without looking at the source files."""
        return hashlib.sha256(f"{_FORMAT} {self.source_key()}".encode()).hexdigest()[:16]

    @cached_property
    def dataset(self) -> ExampleSet:
        """The whole data set, memory-mapped."""
        return ExampleSet.cached(self.name, self._key, self.build)

    @cached_property
    def members(self) -> dict[Split, NDArray[np.int64]]:
        """The groups of each split, checked."""
        members: dict[Split, NDArray[np.int64]] = {
            split: self.split_groups(self.dataset.names, split) for split in SPLITS
        }
        for split, groups in members.items():
            self.check(split, groups)
        return members

    def at_hand(self) -> bool:
        """Whether the decoded data set is in this node's cache."""
        return all(path.exists() for path in _paths(_stem(self.name, self._key)))

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

    def prepare(self) -> None:
        """See `DataTasks.prepare`; equal examples in classes of two splits are reported."""
        super().prepare()
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
        members = self.members[split]
        # distinct (class, variant) pairs
        drawn = rng.choice(len(members) * self.variants, ways, replace=False)
        classes = members[drawn // self.variants]
        # distinct examples of each class: the first few of a random order
        counts = self.dataset.counts[classes]
        if counts.max() > _LARGE_CLASS:
            examples = np.stack([rng.choice(count, shots + queries, replace=False) for count in counts])
        else:
            order = rng.random((ways, int(counts.max())))
            order[np.arange(order.shape[1]) >= counts[:, None]] = np.inf
            examples = np.argsort(order, axis=1, kind="stable")[:, : shots + queries]
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
        total = f"{len(self.dataset.examples):,} {self.examples} of {len(self.dataset.names):,} classes"
        return f"{total} ({', '.join(parts)}{counted})"


def _flat(values: NDArray[Any]) -> NDArray[Any]:
    """Joins the first two axes, classes and examples, in an array of its own."""
    return np.ascontiguousarray(values).reshape(-1, *values.shape[2:])
