"""Archives and pictures made to do harm: nothing is written outside, and nothing large is unpacked."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import psutil
import pytest
from PIL import Image

from distmeta.errors import DataError
from distmeta.tasks import cifar, omniglot
from distmeta.tasks.pictures import character_pixels


def peak() -> float:
    """Megabytes of this process."""
    return psutil.Process().memory_info().rss / 2**20


def tar_of(folder: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    path = folder / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT, compresslevel=1) as made:
        for info, data in members:
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return path


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


def test_a_tar_archive_writes_nothing(tmp_path: Path) -> None:
    """Paths that leave the folder, links and devices: nothing of an archive is ever put on disk."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    path = tar_of(inside, [
        (info("../../escaped"), b"x"), (info("/tmp/distmeta-escaped"), b"x"),
        (info("cifar-100-binary/train.bin", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (info("cifar-100-binary/test.bin", tarfile.LNKTYPE, "../../../etc/passwd"), b""),
        (info("cifar-100-binary/fine_label_names.txt", tarfile.CHRTYPE), b""),
    ])  # fmt: skip
    with pytest.raises(DataError, match=r"train.bin in .* has 0 bytes instead of"):
        cifar._from_archive(path)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", inside, path]
    assert not Path("/tmp/distmeta-escaped").exists()


@pytest.mark.parametrize("bomb", ["member", "many", "name"])
def test_a_tar_bomb_ends_before_it_fills_the_memory(tmp_path: Path, bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "_UNPACKED", 1 << 20)
    path = tmp_path / "cifar-100-binary.tar.gz"
    zeros = bytes(8 << 20)
    if bomb == "member":
        tar_of(tmp_path, [(info("cifar-100-binary/huge.bin"), zeros)])
    elif bomb == "many":
        tar_of(tmp_path, [(info("cifar-100-binary/fine_label_names.txt"), b"a" * 4000) for _ in range(400)])
    else:  # the name of a member, which tarfile reads as a whole
        header = info("././@LongLink", tarfile.GNUTYPE_LONGNAME)
        header.size = 4 << 30
        path.write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + zeros, 1))
    before = peak()
    with pytest.raises(DataError, match=r"cannot be read: it unpacks to more than 1048576 bytes; delete it"):
        cifar._from_archive(path)
    assert peak() - before < 100


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(omniglot.PARTS, "images_background", omniglot.PARTS["images_background"]._replace(characters=1))
    path = tmp_path / "images_background.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("images_background/../../escaped.png", b"x")
        for drawer in range(1, 21):
            size = 64 << 20 if drawer == 1 else 10
            made.writestr(f"images_background/A/character01/0001_{drawer:02}.png", bytes(size))
    before = peak()
    with pytest.raises(DataError, match="67108864 bytes, more than any drawing of Omniglot"):
        list(omniglot._zip_drawings(path))
    assert peak() - before < 32
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    Image.new("1", (12_000, 12_000)).save(path)
    assert path.stat().st_size < 100_000
    before = peak()
    with pytest.raises(DataError, match="has 12000 x 12000 pixels, more than 50000000: make it smaller"):
        character_pixels(path, 28)
    assert peak() - before < 100
