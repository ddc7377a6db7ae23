"""Sizes of tasks that are one number, or are drawn for each task from a list of them."""

from __future__ import annotations

import numpy as np

from distmeta.errors import ConfigError

Sizes = int | tuple[int, ...]
"""One number, or those that are drawn from, each as often as the others (one that is given twice, twice as often)."""


def choices(sizes: Sizes) -> tuple[int, ...]:
    """All numbers that may be drawn."""
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)


def draw(rng: np.random.Generator, sizes: Sizes) -> int:
    """One of them; where there is no choice, no random number is drawn."""
    options = choices(sizes)
    return options[int(rng.integers(len(options))) if len(options) > 1 else 0]


def check_sizes(key: str, sizes: Sizes | None, least: int) -> None:
    """Raises `ConfigError` unless all of ``sizes``, if they are given, are at least ``least``."""
    if sizes is None:
        return
    if not choices(sizes):
        raise ConfigError(f"{key} is an empty list; give a number, or a list of those to draw from")
    if min(choices(sizes)) < least:
        given = sizes if isinstance(sizes, int) else list(sizes)
        raise ConfigError(f"{key} is {given}; it must be {least} or more")
