"""The exceptions that distmeta raises on purpose.

Every message says what was given, what was expected and what to change, in one line: the command line prints it as
it is and exits with the class's ``exit_code`` (2: the user's to mend, 1: anything else).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class DistmetaError(Exception):
    """Base of all exceptions of this package."""

    exit_code = 1


class ConfigError(DistmetaError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""

    exit_code = 2


class DataError(DistmetaError):
    """Data is missing, damaged, or holds too few classes or examples for the tasks asked of it."""

    exit_code = 2


class RunError(DistmetaError):
    """A run folder exists already, is missing, or is in use."""

    exit_code = 2


class CheckpointError(DistmetaError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    exit_code = 2


class ResourceError(DistmetaError):
    """The cluster cannot give the processors or accelerators that the configuration asks for."""

    exit_code = 2


class NumericalError(DistmetaError):
    """A loss or a gradient is not finite."""


class WorkerError(DistmetaError):
    """A worker failed in a way that giving its shard to another worker does not mend."""


class StorageError(DistmetaError):
    """A file could not be written: the disk is full, or the folder is read-only."""


class Stopped(Exception):
    """A signal has asked a run or a search to stop; its state is saved, and the message says how to go on with it."""


def one_line(error: BaseException) -> str:
    """The message of any exception without line breaks; its type's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def positive(key: str, value: float) -> None:
    """Raises `ConfigError` unless ``value`` is a finite number above 0."""
    if not 0 < value < float("inf"):
        raise ConfigError(f"{key} must be a number above 0; given: {value}")


def at_least(key: str, value: float, least: float) -> None:
    """Raises `ConfigError` unless ``value`` is at least ``least``."""
    if not value >= least:
        raise ConfigError(f"{key} must be at least {least}; given: {value}")


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the known name most like ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def told(places: Sequence[str], one: str, more: str) -> tuple[str, str]:
    """How many there are, and where (the first of them), for messages."""
    return (
        (f"1 {one}", f": {places[0]}") if len(places) == 1 else (f"{len(places)} {more}", f", the first: {places[0]}")
    )


def some(things: Iterable[object], most: int = 10) -> str:
    """A list for messages; of a long one the beginning, and how many are left."""
    shown = [str(thing) for thing in things]
    rest = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {rest} more" if rest > 0 else "")
