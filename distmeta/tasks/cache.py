"""The cache of decoded data sets: one array of all examples, written once and mapped into memory by every worker."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distmeta.errors import StorageError
from distmeta.tasks.files import atomic_write, cache_dir

log = logging.getLogger("distmeta")

FORMAT = 2
"""Of the cached files; a new number makes every cache be built anew."""
_WHOLE = 1 << 30  # bytes; of larger arrays the checksum takes evenly spaced pieces, this much together
_PIECE = 1 << 20


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


@dataclass(frozen=True, eq=False)
class ExampleSet:
    """All examples of a data set, group after group; a group is a class, or a language."""

    examples: NDArray[Any]
    """[n, …], for example uint8 [n, H, W] of grey images or int32 [n, L] of texts."""
    names: tuple[str, ...]
    """A name for each group."""
    counts: NDArray[np.int64]
    """The number of examples of each group; the first group's come first."""
    twins: tuple[Twin, ...] = ()
    """Examples that are equal, found when the data set is cached."""

    @cached_property
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

    @staticmethod
    def is_cached(name: str, key: str) -> bool:
        """Whether this node's cache has the data set."""
        return all(path.exists() for path in _paths(_stem(name, key)))


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
