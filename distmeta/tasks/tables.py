"""Rows of users' files (CSV, TSV, JSON lines, plain text, class folders of texts), each with the place it stands at."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distmeta.errors import DataError

csv.field_size_limit(1 << 24)  # characters of one cell


class Row(NamedTuple):
    """Some cells of one record."""

    place: str
    """File and line, for messages."""
    cells: tuple[str | None, ...]
    """In the order they were asked for; None: a cell that was optional and is not there."""


class Text(NamedTuple):
    """A text of a file."""

    text: str
    label: str | None
    place: str


def read_text(path: Path) -> str:
    """A whole file of UTF-8, with or without a byte order mark.

    Raises:
        DataError: It cannot be read, or a line of it is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line} is not UTF-8 (byte {error.start}: 0x{content[error.start]:02x}); save it as UTF-8"
        ) from error


def rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """The cells of ``columns`` and ``optional`` of each record of a ``.csv``, ``.tsv`` or ``.jsonl`` file.

    CSV and TSV files begin with a line of column names; a quoted cell may hold line breaks. Blank lines are no records.

    Raises:
        DataError: The file cannot be read, lacks a column, or has a broken record, which is named by its line.
    """
    readers = {".csv": _separated, ".tsv": _separated, ".jsonl": _json_lines}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} is neither a .csv, a .tsv nor a .jsonl file")
    return readers[path.suffix.lower()](path, columns, optional)


def _separated(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    wanted: list[int | None] = []
    first = 1
    try:
        for cells in reader:
            place, first = f"{path}, line {first}", reader.line_num + 1
            if not cells or cells == [""]:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                for name in (*columns, *optional):
                    if header.count(name) > 1:
                        raise DataError(f"{path} has {header.count(name)} columns called {name!r}; rename all but one")
                for name in columns:
                    if name not in header:
                        raise DataError(
                            f"{path} has no column {name!r}; its first line names {', '.join(map(repr, header))}"
                        )
                wanted = [header.index(name) if name in header else None for name in (*columns, *optional)]
                continue
            if len(cells) != len(header):
                raise DataError(f"{place} has {len(cells)} cells where the first line names {len(header)} columns")
            yield Row(place, tuple(None if at is None else cells[at] for at in wanted))
    except csv.Error as error:
        raise DataError(f"{path}, line {first} cannot be read as a record: {error}") from error
    if header is None:
        raise DataError(f"{path} is empty")


def _json_lines(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines: U+2028 may stand in a string
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record: Any = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{place} holds no object with the keys {', '.join(map(repr, columns))}")
        for name in columns:
            if name not in record:
                raise DataError(f"{place} has no key {name!r}; it has {', '.join(map(repr, record)) or 'none'}")
        cells = [record.get(name) for name in (*columns, *optional)]
        for cell in cells:
            if isinstance(cell, dict | list) or (cell is None and cells.index(cell) < len(columns)):
                raise DataError(f"{place} has {json.dumps(cell)} where a text is expected")
        yield Row(place, tuple(None if cell is None else str(cell) for cell in cells))


def texts(path: Path, text_column: str, label_column: str, *, labelled: bool) -> Iterator[Text]:
    """The texts of a file (see `rows`), of a folder with one folder of ``.txt`` files for each class, or, where no
    label is needed, the lines of a ``.txt`` file.

    Raises:
        DataError: A file cannot be read, or lacks what is asked for.
    """
    if path.is_dir():
        yield from _class_folders(path)
    elif path.suffix.lower() == ".txt" and not labelled:
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if line.strip():
                yield Text(line, None, f"{path}, line {number}")
    else:
        if not path.exists():
            raise DataError(f"there is no file {path}")
        columns, optional = ([text_column, label_column], []) if labelled else ([text_column], [label_column])
        for place, (text, label) in rows(path, columns, optional):
            assert text is not None  # a column that is needed
            yield Text(text, label, place)


def _class_folders(folder: Path) -> Iterator[Text]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    stray = [entry for entry in entries if not entry.is_dir()]
    if stray or not entries:
        what = f"a file beside them ({stray[0].name})" if stray else "nothing"
        raise DataError(f"{folder} should hold one folder of .txt files for each class; it holds {what}")
    for place in entries:
        files = sorted(file for file in place.iterdir() if not file.name.startswith("."))
        if not files:
            raise DataError(f"the class folder {place} holds no .txt files")
        for file in files:
            if file.suffix.lower() != ".txt":
                raise DataError(f"{file} is no .txt file")
            yield Text(read_text(file), place.name, str(file))
