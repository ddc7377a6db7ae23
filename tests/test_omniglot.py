"""Omniglot: both layouts, both splits, downloads, and every way in which the files can be broken."""

from __future__ import annotations

import hashlib
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest

from distmeta.core.seeds import stream
from distmeta.errors import DataError
from distmeta.tasks import omniglot
from distmeta.tasks.cache import ExampleSet
from distmeta.tasks.omniglot import DRAWERS, PARTS, Omniglot
from distmeta.tasks.splits import SPLITS


@pytest.fixture(scope="module")
def images(omniglot_root: Path) -> ExampleSet:
    return Omniglot(data_root=str(omniglot_root)).dataset


def test_whole_set(images: ExampleSet) -> None:
    assert images.examples.shape == (32460, 28, 28) and images.examples.dtype == np.uint8
    assert len(images.names) == 1623 and set(images.counts.tolist()) == {DRAWERS}
    assert images.names[0] == "Alphabet_of_the_Magi/character01" and images.names[-1] == "ULOG/character26"
    assert images.names[963] == "Tifinagh/character55" and images.names[964] == "Angelic/character01"
    assert 0.04 < images.examples.mean() / 255 < 0.1 and (images.examples.reshape(32460, -1).max(1) > 100).all()


def test_folders_give_the_same_array_as_archives(omniglot_root: Path, images: ExampleSet, tmp_path: Path) -> None:
    (tmp_path / "omniglot-py").mkdir()
    for part in PARTS:
        (tmp_path / "omniglot-py" / part).symlink_to(omniglot_root / "omniglot-py" / part)
    found = Omniglot(data_root=str(tmp_path)).build()
    assert found.names == images.names and np.array_equal(found.examples, images.examples)


def test_reading_a_drawing_gives_what_the_set_holds(omniglot_root: Path, images: ExampleSet) -> None:
    tasks = Omniglot(data_root=str(omniglot_root))
    for place in (0, 500, 1622):
        part = "images_background" if place < 964 else "images_evaluation"
        folder = omniglot_root / "omniglot-py" / part / images.names[place]
        for example, path in enumerate(sorted(folder.iterdir())[:3]):
            expected = images.examples[images.starts[place] + example] / np.float32(255)
            assert np.array_equal(tasks.read_image(path)[0].numpy(), expected)


def test_random_split(images: ExampleSet) -> None:
    members = {split: Omniglot().split_groups(images.names, split) for split in SPLITS}
    assert [len(members[split]) for split in SPLITS] == [1100, 100, 423]
    assert sorted(np.concatenate(list(members.values()))) == list(range(1623))
    again, other = (Omniglot(split_seed=seed).split_groups(images.names, "val") for seed in (0, 1))
    assert np.array_equal(again, members["val"]) and not np.array_equal(other, members["val"])


def test_vinyals_split_is_that_of_the_lists(images: ExampleSet, omniglot_lists: Path) -> None:
    tasks = Omniglot(split="vinyals")
    for split in SPLITS:
        lines = (omniglot_lists / f"vinyals_{split}.txt").read_text().split()
        listed = {line.rsplit("/", 1)[0] for line in lines}
        assert {images.names[place] for place in tasks.split_groups(images.names, split)} == listed
        assert len(lines) == 4 * len(listed)  # four rotations each, as `rotations` makes them


def test_episode_with_rotations(omniglot_root: Path) -> None:
    tasks = Omniglot(ways=20, shots=5, queries=15, data_root=str(omniglot_root), split="vinyals")
    (x, y), (query_x, query_y) = tasks.sample(stream(0), "test")
    assert x.shape == (100, 1, 28, 28) and query_x.shape == (300, 1, 28, 28)
    assert y.bincount().tolist() == [5] * 20 and query_y.bincount().tolist() == [15] * 20
    with pytest.raises(DataError, match=r"has 20 examples, fewer than 5 shots \+ 16 queries"):
        Omniglot(shots=5, queries=16, data_root=str(omniglot_root)).prepare()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, omniglot_root: Path, tmp_path: Path) -> Path:
    """A data root of two characters in each half, as archives, which is taken for the whole set."""
    (tmp_path / "omniglot-py").mkdir()
    monkeypatch.setenv("DISTMETA_CACHE", str(tmp_path / "cache"))
    for part in PARTS:
        source = omniglot_root / "omniglot-py" / part
        with zipfile.ZipFile(tmp_path / "omniglot-py" / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for folder in sorted(source.glob("*/character*"))[:2]:
                for path in sorted(folder.iterdir()):
                    archive.write(path, path.relative_to(source.parent))
            archive.writestr(f"__MACOSX/{part}/._x.png", b"rubbish")
            archive.writestr(f"{part}/.DS_Store", b"rubbish")
        md5 = hashlib.md5((tmp_path / "omniglot-py" / f"{part}.zip").read_bytes()).hexdigest()
        monkeypatch.setitem(omniglot.PARTS, part, PARTS[part]._replace(characters=2, md5=md5))
    return tmp_path


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Keeps the tests' output clean."""


@pytest.fixture
def mirror(small: Path) -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(small / "omniglot-py"))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_download_from_a_mirror(small: Path, mirror: str, tmp_path: Path) -> None:
    local = Omniglot(data_root=str(small)).build()
    fresh = Omniglot(data_root=str(tmp_path / "fresh"), url=mirror)
    assert np.array_equal(fresh.dataset.examples, local.examples) and fresh.dataset.names == local.names
    folder = tmp_path / "fresh" / "omniglot-py"
    assert sorted(path.name for path in folder.iterdir()) == ["images_background.zip", "images_evaluation.zip"]


def test_wrong_checksum_leaves_no_archive(mirror: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(omniglot.PARTS, "images_background", PARTS["images_background"]._replace(md5="0" * 32))
    with pytest.raises(DataError, match=r"images_background\.zip has the checksum"):
        Omniglot(data_root=str(tmp_path / "fresh"), url=mirror).prepare()
    assert not list((tmp_path / "fresh" / "omniglot-py").iterdir())


def test_no_network_says_where_to_put_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot download .*by hand to .*omniglot-py/images_background\.zip"):
        Omniglot(data_root=str(tmp_path), url="http://127.0.0.1:1").prepare()


def test_changed_files_are_read_anew(small: Path) -> None:
    before = Omniglot(data_root=str(small)).source_key()
    os.utime(small / "omniglot-py" / "images_background.zip", (1, 1))
    assert Omniglot(data_root=str(small)).source_key() != before


def rewrite(archive: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Replaces the content of each member, or drops it."""
    with zipfile.ZipFile(archive) as opened:
        members = {name: opened.read(name) for name in opened.namelist()}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in members.items():
            changed = change(name, data)
            if changed is not None:
                opened.writestr(name, changed)


LAST = "20.png"  # of each character


def not_a_zip(archive: Path) -> None:
    archive.write_bytes(b"<html>not found</html>")


def cut_short(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:5000])


def bad_block(archive: Path) -> None:
    content = bytearray(archive.read_bytes())
    content[90:130] = b"\xff" * 40
    archive.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (not_a_zip, r"images_evaluation\.zip cannot be read as a zip archive"),
        (cut_short, r"images_evaluation\.zip cannot be read as a zip archive"),
        (bad_block, r"character01/0965_01\.png in .*images_evaluation\.zip cannot be unpacked"),
        (
            partial(rewrite, change=lambda name, data: None if "character02" in name else data),
            r"images_evaluation\.zip holds 1 characters instead of 2: delete it",
        ),
        (
            partial(rewrite, change=lambda name, data: None if name.endswith(LAST) else data),
            r"images_evaluation\.zip holds 19 drawings of Angelic/character01 instead of 20",
        ),
        (
            partial(rewrite, change=lambda name, data: b"GIF" if name.endswith(LAST) else data),
            r"0965_20\.png in .*images_evaluation\.zip cannot be read as an image",
        ),
        (
            partial(rewrite, change=lambda name, data: data[:-40] if name.endswith(LAST) else data),
            r"0965_20\.png in .*images_evaluation\.zip cannot be read as an image",
        ),
        (
            partial(rewrite, change=lambda name, data: bytes(10**7) if name.endswith(LAST) else data),
            r"0965_20\.png in .*images_evaluation\.zip has 10000000 bytes, more than any drawing",
        ),
    ],
)
def test_broken_archives(small: Path, damage: Callable[[Path], None], message: str) -> None:
    Omniglot(data_root=str(small)).build()
    damage(small / "omniglot-py" / "images_evaluation.zip")
    with pytest.raises(DataError, match=message) as caught:
        Omniglot(data_root=str(small)).prepare()
    assert "\n" not in str(caught.value)


def test_broken_folder(small: Path) -> None:
    folder = small / "omniglot-py"
    for part in PARTS:
        with zipfile.ZipFile(folder / f"{part}.zip") as archive:
            archive.extractall(folder)
        (folder / f"{part}.zip").unlink()
    Omniglot(data_root=str(small)).build()
    drawing = sorted(folder.glob("images_background/*/character01/*.png"))[0]
    drawing.write_bytes(drawing.read_bytes()[:50])
    with pytest.raises(DataError, match=rf"{drawing} cannot be read as an image"):
        Omniglot(data_root=str(small)).prepare()
    drawing.unlink()
    with pytest.raises(DataError, match=r"images_background holds 19 drawings of .*character01 instead of 20"):
        Omniglot(data_root=str(small)).prepare()
