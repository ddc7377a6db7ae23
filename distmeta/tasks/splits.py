"""Dividing a user's classes (or domains, or tasks) among meta-training, validation and test."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from distmeta.core.seeds import stream
from distmeta.core.types import Split
from distmeta.errors import ConfigError, DataError
from distmeta.tasks.tables import read_text, rows

SPLITS: tuple[Split, ...] = ("train", "val", "test")
ALIASES: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "base"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "novel"), "test"),
}
"""What folders and files call the splits, in lower case."""

_FILE = ("filename", "file", "path", "image", "image_path", "file_name", "filepath")
_CLASS = ("label", "class", "class_name", "category")
_SPLIT = ("split", "set", "subset", "partition")

Fractions = Annotated[tuple[float, float, float], "Shares of train, val and test, where nothing else says them."]
USUAL: tuple[float, float, float] = (0.6, 0.15, 0.25)


def check_fractions(fractions: tuple[float, float, float]) -> None:
    """Raises `ConfigError` unless they are shares of a whole."""
    if min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
        raise ConfigError(f"tasks.fractions are {fractions}; they must be above 0 and at most 1 together")


def by_fractions(
    units: Sequence[str], fractions: tuple[float, float, float], seed: int, name: str
) -> dict[Split, set[str]]:
    """The units shuffled by the stream ``(name, seed)`` and divided in these shares."""
    shuffled = stream(name, seed).permutation(len(units))
    ends = [0, *np.rint(np.cumsum(fractions) * len(units)).astype(int).tolist()]
    parts: list[list[int]] = [shuffled[first:last].tolist() for first, last in pairwise(ends)]
    return {split: {units[i] for i in part} for split, part in zip(SPLITS, parts, strict=True)}


def listed(lists: Mapping[str, list[str]], units: Sequence[str], file: str) -> dict[Split, set[str]]:
    """The units that a split file lists for each split.

    Raises:
        DataError: It lacks a list, names something unknown, or names something twice.
    """
    owner: dict[str, str] = {}
    known = set(units)
    for part in SPLITS:
        if part not in lists:
            raise DataError(f"{file} has no list {part!r}")
        for unit in lists[part]:
            if unit not in known:
                raise DataError(f"{file}: {part} names {unit!r}, which the data do not have")
            if owner.setdefault(unit, part) != part:
                raise DataError(f"{file}: {unit!r} is both in {owner[unit]} and in {part}")
    return {part: set(lists[part]) for part in SPLITS}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        data = json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"{path} must hold a JSON object")
    return data


def read_lists(path: Path) -> dict[str, list[str]]:
    """A JSON object of lists of strings."""
    data = read_json(path)
    for key, values in data.items():
        if not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
            raise DataError(f"{path}: {key!r} must be a list of strings")
    return data


class Record(NamedTuple):
    """What a split file says of a class, or of one file of it."""

    place: str
    """File and line, for messages."""
    split: Split
    label: str | None
    """The class; None if the file's folder is to say it."""
    file: str | None
    """None: the whole class."""


def records(source: Path) -> Iterator[Record]:
    """What a split file says.

    It is a JSON object with lists of classes called train, val and test; or a table (CSV, TSV, JSON lines) with a
    column of splits and one of classes, of files, or both; or a folder with such a table, without the column of
    splits, for each split, called by its name.

    Raises:
        DataError: It cannot be read, or lacks what is needed.
    """
    if source.is_dir():
        tables = {ALIASES[path.stem.lower()]: path for path in sorted(source.iterdir()) if _is_table(path)}
        for split in SPLITS:
            if split not in tables:
                raise DataError(f"{source} has no table {split}.csv")
            yield from _table(tables[split], split)
    elif source.suffix.lower() == ".json":
        for key, names in read_lists(source).items():
            if key.lower() not in ALIASES:
                raise DataError(f"{source} has a list {key!r}; its lists are to be called {', '.join(SPLITS)}")
            for name in names:
                yield Record(f"{source}, {key}", ALIASES[key.lower()], name, None)
    else:
        yield from _table(source, None)


def _is_table(path: Path) -> bool:
    return path.stem.lower() in ALIASES and path.suffix.lower() in (".csv", ".tsv", ".jsonl")


def _table(source: Path, split: Split | None) -> Iterator[Record]:
    for place, cells in rows(source, [], [*_FILE, *_CLASS, *_SPLIT]):
        file = _first(cells[: len(_FILE)])
        label = _first(cells[len(_FILE) : -len(_SPLIT)])
        named = _first(cells[-len(_SPLIT) :])
        if file is None and label is None:
            raise DataError(
                f"{place} has neither a cell of files ({', '.join(_FILE)}) nor one of classes ({', '.join(_CLASS)})"
            )
        if split is None and (named is None or named.lower() not in ALIASES):
            given = f"has no cell of splits ({', '.join(_SPLIT)})" if named is None else f"has the split {named!r}"
            raise DataError(f"{place} {given}; splits are called {', '.join(SPLITS)}")
        yield Record(place, split or ALIASES[str(named).lower()], label, file)


def _first(cells: Sequence[str | None]) -> str | None:
    """The first cell that is there and not empty."""
    return next((cell.strip() for cell in cells if cell and cell.strip()), None)
