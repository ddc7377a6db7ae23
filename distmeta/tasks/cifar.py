"""CIFAR-FS and FC100: few-shot classification of small colour photographs.

The 100 classes of CIFAR-100 (Krizhevsky, "Learning multiple layers of features from tiny images", 2009), 600 images of
32 x 32 each, in the split of Bertinetto et al., "Meta-learning with differentiable closed-form solvers", ICLR 2019, or
that of Oreshkin et al., "TADAM", NeurIPS 2018.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray

from distmeta.core.types import Split
from distmeta.errors import DataError
from distmeta.tasks.cache import ExampleSet
from distmeta.tasks.files import download
from distmeta.tasks.images import FewShotImages

_SIDE = 32
_RECORD = 2 + 3 * _SIDE * _SIDE  # superclass, class, and the red, green and blue planes
_IMAGES = {"train.bin": 50_000, "test.bin": 10_000}  # the files of the binary version, whose split is not used here
_UNPACKED = 256 << 20  # bytes of the archive, unpacked, at most
_NAMES = "fine_label_names.txt"
_FILES = {file: _RECORD * images for file, images in _IMAGES.items()} | {_NAMES: 1 << 12}  # bytes at most
_ARCHIVE_MD5 = "03b5dce01913d631647c71ecec9e9cb8"  # as Krizhevsky's page gives it
_BROKEN_TAR = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError)

_FS_VAL = (
    "beaver", "otter", "flatfish", "shark", "lamp", "television", "beetle", "butterfly", "sea", "camel", "cattle",
    "crab", "crocodile", "maple_tree", "motorcycle", "tractor",
)  # fmt: skip
_FS_TEST = (
    "whale", "poppy", "rose", "sweet_pepper", "telephone", "bed", "table", "wardrobe", "leopard", "plain",
    "chimpanzee", "fox", "snail", "worm", "baby", "man", "woman", "bicycle", "pickup_truck", "rocket",
)  # fmt: skip
# Super-classes 8, 11, 13, 16: large carnivores, large omnivores and herbivores, invertebrates, small mammals.
_FC_VAL = (
    "bear", "leopard", "lion", "tiger", "wolf", "camel", "cattle", "chimpanzee", "elephant", "kangaroo",
    "crab", "lobster", "snail", "spider", "worm", "hamster", "mouse", "rabbit", "shrew", "squirrel",
)  # fmt: skip
# 0, 7, 12 and 14: aquatic mammals, insects, medium-sized mammals, people.
_FC_TEST = (
    "beaver", "dolphin", "otter", "seal", "whale", "bee", "beetle", "butterfly", "caterpillar", "cockroach",
    "fox", "porcupine", "possum", "raccoon", "skunk", "baby", "boy", "girl", "man", "woman",
)  # fmt: skip


@dataclass(eq=False)
class CifarFS(FewShotImages):
    """Colour photographs of CIFAR-100, 32 x 32: 64 classes for training, 16 for validation, 20 for test.

    Read from the binary version of the data set, ``data_root/cifar-100-binary`` or the archive of it beside that
    folder, which is downloaded if there are neither. (The other version consists of Python pickles, which are code.)
    """

    url: Annotated[str, "Where the archive is downloaded from; change it for a mirror."] = (
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
    )

    name: ClassVar[str] = "cifar_fs"
    licence: ClassVar[str] = "none stated by its authors; free use in research is customary"
    image_shape: ClassVar[tuple[int, int, int]] = (3, _SIDE, _SIDE)
    held_out: ClassVar[dict[str, tuple[str, ...]]] = {"val": _FS_VAL, "test": _FS_TEST}

    @property
    def folder(self) -> Path:
        """Where the unpacked files lie."""
        return self.root / "cifar-100-binary"

    @property
    def archive(self) -> Path:
        """The archive, which need not be there."""
        return self.root / "cifar-100-binary.tar.gz"

    def source_key(self) -> str:
        """Names, sizes and times of the files that are read."""
        if not self.folder.is_dir() and not self.archive.exists():
            download(self.url, self.archive, _ARCHIVE_MD5)
        files = [self.folder / file for file in _FILES] if self.folder.is_dir() else [self.archive]
        try:
            stats = [file.stat() for file in files]
        except OSError as error:
            raise DataError(
                f"{error.filename} is not there; delete {self.folder} to have it downloaded again"
            ) from error
        pairs = zip(files, stats, strict=True)
        return "\n".join(f"{file.name} {stat.st_size} {stat.st_mtime_ns}" for file, stat in pairs)

    def build(self) -> ExampleSet:
        """All 60,000 images, class by class in the order of the list of names."""
        read = _from_folder(self.folder) if self.folder.is_dir() else _from_archive(self.archive)
        names = read[_NAMES].decode("ascii", "replace").split()
        records = [np.frombuffer(read[file], np.uint8).reshape(-1, _RECORD) for file in _IMAGES]
        labels = np.concatenate([part[:, 1] for part in records])
        counts = np.bincount(labels, minlength=len(names))
        if len(names) != 100 or counts.tolist() != [600] * 100:
            raise DataError(f"{self.folder} does not hold 600 images of each of 100 classes; delete it to read it anew")
        pixels = np.concatenate([part[:, 2:] for part in records])[np.argsort(labels, kind="stable")]
        images = pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
        return ExampleSet(np.ascontiguousarray(images), tuple(names), counts.astype(np.int64))

    def split_groups(self, names: Sequence[str], split: Split) -> NDArray[np.int64]:
        """The classes of ``split``, in the order of the data set."""
        owner = {name: part for part, members in self.held_out.items() for name in members}
        return np.flatnonzero([owner.get(name, "train") == split for name in names]).astype(np.int64)


@dataclass(eq=False)
class FC100(CifarFS):
    """Colour photographs of CIFAR-100, 32 x 32, divided by super-classes: 60, 20 and 20 classes of 12, 4 and 4.

    Test classes are so less like those trained on than in CIFAR-FS. Read as `CifarFS` is.
    """

    name: ClassVar[str] = "fc100"
    held_out: ClassVar[dict[str, tuple[str, ...]]] = {"val": _FC_VAL, "test": _FC_TEST}


def _from_folder(folder: Path) -> dict[str, bytes]:
    try:
        read = {file: (folder / file).read_bytes() for file in _FILES}
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    return _checked(read, folder)


def _from_archive(archive: Path) -> dict[str, bytes]:
    """The files out of the archive, without unpacking anything else that it may hold."""
    read: dict[str, bytes] = {}
    try:
        with gzip.open(archive) as unpacked, tarfile.open(fileobj=_Limited(unpacked), mode="r|") as tar:
            for member in tar:
                file = member.name.removeprefix("cifar-100-binary/")
                if file in _FILES and file not in read and member.isfile() and member.size <= _FILES[file]:
                    opened = tar.extractfile(member)
                    assert opened is not None  # it is a file
                    read[file] = opened.read()
    except _BROKEN_TAR as error:
        raise DataError(f"{archive} cannot be read: {error}; delete it to have it downloaded again") from error
    return _checked(read, archive)


class _Limited(io.RawIOBase):
    """What an archive unpacks to, no more than the data set can have: a bomb goes off outside of memory, and ends."""

    def __init__(self, unpacked: gzip.GzipFile) -> None:
        self._unpacked, self._left = unpacked, _UNPACKED

    def read(self, size: int = -1, /) -> bytes:
        """As of any file; all at once is never asked for."""
        data = self._unpacked.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"it unpacks to more than {_UNPACKED} bytes")
        return data


def _checked(read: dict[str, bytes], place: Path) -> dict[str, bytes]:
    for file, images in _IMAGES.items():
        size = len(read.get(file, b""))
        if size != images * _RECORD:
            raise DataError(
                f"{file} in {place} has {size} bytes instead of {images * _RECORD}; delete {place} to have it "
                "downloaded again"
            )
    if _NAMES not in read:
        raise DataError(f"{place} holds no {_NAMES}; delete it to have it downloaded again")
    return read
