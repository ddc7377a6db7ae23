"""The rendered characters: what a class is, the splits by script, and that the fonts alone decide."""

from __future__ import annotations

import time
import unicodedata
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from distmeta.core.seeds import stream
from distmeta.errors import DataError
from distmeta.tasks import glyphs
from distmeta.tasks.glyphs import EXAMPLES, SCRIPTS, Glyphs
from distmeta.tasks.splits import SPLITS


@pytest.fixture(scope="module")
def tasks() -> Glyphs:
    tasks = Glyphs()
    tasks.prepare()
    return tasks


def test_classes_and_splits(tasks: Glyphs) -> None:
    names = tasks.dataset.names
    assert len(set(names)) == len(names) and len(names) > 1400
    assert tasks.dataset.examples.shape == (EXAMPLES * len(names), 28, 28)
    scripts = {split: {names[place].split()[0] for place in tasks.split_groups(names, split)} for split in SPLITS}
    sizes = {split: len(tasks.split_groups(names, split)) for split in SPLITS}
    assert scripts == {"train": {"LATIN", "GREEK", "DIGIT"}, "val": {"CYRILLIC"}, "test": {"ARMENIAN", "GEORGIAN"}}
    assert sum(sizes.values()) == len(names) and sizes["train"] > 1000 and min(sizes.values()) > 140


@pytest.mark.parametrize(
    "twin",
    [
        "GREEK CAPITAL LETTER ALPHA",
        "CYRILLIC CAPITAL LETTER A",
        "CYRILLIC SMALL LETTER O",
        "ARMENIAN SMALL LETTER OH",
        "CYRILLIC CAPITAL LETTER IO",
        "GREEK SMALL LETTER OMICRON",
    ],
)
def test_twins_of_latin_letters_are_no_classes(tasks: Glyphs, twin: str) -> None:
    assert unicodedata.lookup(twin)
    assert twin not in tasks.dataset.names
    assert {"LATIN CAPITAL LETTER A", "LATIN SMALL LETTER O", "CYRILLIC CAPITAL LETTER ZHE"} <= set(tasks.dataset.names)


def test_splits_share_no_shapes(tasks: Glyphs) -> None:
    drawn = {
        name: shapes
        for name, shapes in ((unicodedata.name(character), shapes) for character, shapes in glyphs._draw_all().items())
        if name in tasks.dataset.names
    }
    same: Counter[tuple[str, str]] = Counter()
    for font in glyphs._FONTS:
        by_shape: defaultdict[bytes, list[str]] = defaultdict(list)
        for name, shapes in drawn.items():
            if font in shapes:
                by_shape[glyphs._into_frame(shapes[font], np.eye(2), np.zeros(2)).tobytes()].append(name)
        same.update(pair for names in by_shape.values() for pair in combinations(names, 2))
    for (one, other), count in same.items():
        if SCRIPTS[one.split()[0]] != SCRIPTS[other.split()[0]]:
            assert 2 * count < len(drawn[one].keys() & drawn[other].keys()), f"{one} and {other}"


def test_pictures_are_white_ink_inside_the_frame(tasks: Glyphs) -> None:
    pixels = tasks.dataset.examples
    assert (pixels.reshape(len(pixels), -1).max(1) > 150).all(), "an example has hardly any ink"
    assert 0.05 < pixels.mean() / 255 < 0.25
    border = np.concatenate([pixels[:, [0, -1]].reshape(-1), pixels[:, :, [0, -1]].reshape(-1)])
    assert (border > 128).mean() < 0.01, "characters are cut off"
    # the examples of a class differ
    assert all(
        len({image.tobytes() for image in pixels[first : first + EXAMPLES]}) == EXAMPLES
        for first in tasks.dataset.starts
    )


def test_size_is_kept(tasks: Glyphs) -> None:
    def height(name: str) -> float:
        first = tasks.dataset.starts[tasks.dataset.names.index(name)]
        return (tasks.dataset.examples[first : first + EXAMPLES].max(2) > 60).sum(1).mean()

    assert height("LATIN SMALL LETTER O") < 0.85 * height("LATIN CAPITAL LETTER O")


def test_rendering_is_the_same_again_and_fast_enough(tasks: Glyphs) -> None:
    start = time.process_time()
    again = Glyphs().build()
    assert time.process_time() - start < 25
    assert again.names == tasks.dataset.names and np.array_equal(again.examples, tasks.dataset.examples)


@pytest.mark.usefixtures("tasks")
def test_episode() -> None:
    (x, y), (query_x, query_y) = Glyphs(ways=20, shots=2, queries=3).sample(stream(0), "test")
    assert x.shape == (40, 1, 28, 28) and query_x.shape == (60, 1, 28, 28)
    assert y.bincount().tolist() == [2] * 20 and query_y.bincount().tolist() == [3] * 20


def test_scripts_claim_in_the_order_of_splits() -> None:
    order = [SPLITS.index(split) for split in SCRIPTS.values()]
    assert order == sorted(order)


def test_missing_font_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(DataError, match=r"matplotlib .* lacks the font .*DejaVuSans.ttf"):
        Glyphs().prepare()
