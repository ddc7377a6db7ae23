"""CIFAR-FS: the split, both ways in which the files may lie, broken files, and a user's own photographs."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distmeta.core.seeds import stream
from distmeta.errors import DataError
from distmeta.tasks import cifar
from distmeta.tasks.cache import ExampleSet
from distmeta.tasks.cifar import CifarFS
from distmeta.tasks.splits import SPLITS


@pytest.fixture(scope="module")
def images(cifar_root: Path) -> ExampleSet:
    return CifarFS(data_root=str(cifar_root)).dataset


def test_whole_set(images: ExampleSet, cifar_source: Path) -> None:
    assert images.examples.shape == (60000, 32, 32, 3) and images.examples.dtype == np.uint8
    assert images.names[:2] == ("apple", "aquarium_fish") and set(images.counts.tolist()) == {600}
    # The mosaics that the data come as are another way to the same pixels: class 1, its first training image.
    mosaic = np.asarray(Image.open(cifar_source / "images" / "01_aquarium_fish.webp").convert("RGB"))
    assert np.array_equal(images.examples[600], mosaic[:32, :32])
    assert np.array_equal(images.examples[600 + 26], mosaic[32:64, 32:64])


def test_split_is_the_published_one(images: ExampleSet, cifar_source: Path) -> None:
    published = json.loads((cifar_source / "splits" / "cifar_fs.json").read_text())
    for split in SPLITS:
        found = {images.names[place] for place in CifarFS().split_groups(images.names, split)}
        assert found == set(published[split])
    assert [len(published[split]) for split in SPLITS] == [64, 16, 20]


def test_episode(cifar_root: Path) -> None:
    (x, y), (query_x, query_y) = CifarFS(data_root=str(cifar_root)).sample(stream(0), "test")
    assert x.shape == (5, 3, 32, 32) and query_x.shape == (75, 3, 32, 32)
    assert x.dtype == torch.float32 and 0 <= float(x.min()) < float(x.max()) <= 1
    assert sorted(y.tolist()) == [0, 1, 2, 3, 4] and query_y.bincount().tolist() == [15] * 5


def test_the_archive_gives_the_same(cifar_root: Path, images: ExampleSet, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "cifar-100-binary.tar.gz", "w:gz", compresslevel=1) as tar:
        tar.add(cifar_root / "cifar-100-binary", "cifar-100-binary")
        outside = tarfile.TarInfo("../outside")
        outside.size = 3
        tar.addfile(outside, io.BytesIO(b"bad"))
    found = CifarFS(data_root=str(tmp_path)).build()
    assert found.names == images.names and np.array_equal(found.examples, images.examples)
    assert {path.name for path in tmp_path.iterdir()} == {"cifar-100-binary.tar.gz"}, "nothing is unpacked"


def test_broken_files_are_named(cifar_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    for name in ("train.bin", "test.bin", "fine_label_names.txt"):
        (folder / name).write_bytes((cifar_root / "cifar-100-binary" / name).read_bytes())
    tasks = CifarFS(data_root=str(tmp_path))
    whole = (folder / "test.bin").read_bytes()
    (folder / "test.bin").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"test.bin in .* has 30739999 bytes instead of 30740000"):
        tasks.build()
    (folder / "test.bin").write_bytes(whole[:1] + b"\x07" + whole[2:])  # an image that says it is of another class
    with pytest.raises(DataError, match="does not hold 600 images of each of 100 classes"):
        tasks.build()
    (folder / "test.bin").unlink()
    with pytest.raises(DataError, match=r"test.bin is not there; delete"):
        tasks.prepare()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cifar-100-binary.tar.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"cannot be read: .*; delete it to have it downloaded again"):
        CifarFS(data_root=str(tmp_path / "other")).build()


def test_download_needs_the_right_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "wrong.tar.gz"
    wrong.write_bytes(b"something else")
    with pytest.raises(DataError, match="and not 03b5dce01913d631647c71ecec9e9cb8: it is not the file expected"):
        CifarFS(data_root=str(tmp_path / "root"), url=wrong.as_uri()).prepare()
    assert not (tmp_path / "root" / "cifar-100-binary.tar.gz").exists()
    assert cifar._ARCHIVE_MD5 == "03b5dce01913d631647c71ecec9e9cb8"


def test_own_photographs(tmp_path: Path) -> None:
    """Any size and kind of picture: its middle square in colour."""
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    wide.save(tmp_path / "wide.png")
    x = CifarFS().read_image(tmp_path / "wide.png")
    assert x.shape == (3, 32, 32)
    assert x[2].min() > 0.9 and x[0].max() < 0.1, "the blue middle"
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert CifarFS().read_image(tmp_path / "clear.png").min() == 1, "transparency is laid on white"
    Image.new("L", (50, 50), 128).save(tmp_path / "grey.png")
    assert CifarFS().read_image(tmp_path / "grey.png").unique().numel() == 1
