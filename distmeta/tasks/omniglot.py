"""Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn once by 20 people (Lake, Salakhutdinov and
Tenenbaum, "Human-level concept learning through probabilistic program induction", Science 2015; MIT licence)."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distmeta.core.seeds import stream
from distmeta.core.types import Split
from distmeta.errors import DataError
from distmeta.tasks.cache import ExampleSet
from distmeta.tasks.files import download
from distmeta.tasks.images import FewShotImages
from distmeta.tasks.pictures import character_pixels

DRAWERS = 20
_SIZE = 28
_MEMBER_LIMIT = 1 << 16  # bytes; the drawings have less than 1 kB


class _Part(NamedTuple):
    characters: int
    md5: str


PARTS = {
    "images_background": _Part(964, "68d2efa1b9178cc56df9314c21c6e718"),
    "images_evaluation": _Part(659, "6b91aef0f799c5bb55b94e3f2daec811"),
}
"""The two halves, as downloaded."""

# The split of Vinyals et al., "Matching networks for one shot learning", NeurIPS 2016, as the lists that come with
# Snell et al., "Prototypical networks for few-shot learning", NeurIPS 2017 (github.com/jakesnell/prototypical-networks)
# have it: 172 characters for validation and 423 for testing by alphabets, the last being the last four of Gurmukhi.
_VINYALS_VAL = frozenset({"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"})
_VINYALS_TEST = frozenset(
    {
        "Kannada",
        "Keble",
        "Malayalam",
        "Manipuri",
        "Mongolian",
        "Old_Church_Slavonic_(Cyrillic)",
        "Oriya",
        "Sylheti",
        "Syriac_(Serto)",
        "Tengwar",
        "Tibetan",
        "ULOG",
    }
)
_VINYALS_TEST_CHARACTERS = frozenset(f"Gurmukhi/character{number}" for number in range(42, 46))


def _vinyals(name: str) -> Split:
    """The split of a character (``Alphabet/characterNN``)."""
    alphabet = name.split("/")[0]
    if alphabet in _VINYALS_TEST or name in _VINYALS_TEST_CHARACTERS:
        return "test"
    return "val" if alphabet in _VINYALS_VAL else "train"


@dataclass(eq=False)
class Omniglot(FewShotImages):
    """Omniglot characters, 28 x 28, ink 1 on paper 0.

    Read from ``data_root/omniglot-py``, from ``images_background.zip`` and ``images_evaluation.zip`` or the folders
    they unpack to, and downloaded there if there are neither. Drawings are resized from 105 x 105 by Pillow's
    antialiased Lanczos filter.

    Splits: ``random`` shuffles the 1,623 characters by ``split_seed``; the first 1,200 are for meta-training, as in
    Finn et al. 2017, of which 100 are kept for meta-validation (1,100/100), and 423 for meta-testing. ``vinyals`` is
    the fixed split of 1,028/172/423 characters by alphabets of Vinyals et al. 2016. A character and its rotations are
    always in the same split.
    """

    rotations: Annotated[bool, "Whether a character turned by 90, 180 or 270 degrees counts as another one."] = True
    split: Annotated[
        Literal["random", "vinyals"],
        "Which characters are meta-trained on and tested on: random "
        "(1,100/100/423, shuffled by split_seed) or vinyals (1,028/172/423, by alphabets).",
    ] = "random"
    split_seed: Annotated[int, "The seed that shuffles the characters of the random split."] = 0
    url: Annotated[str, "The folder on the web that the two archives are downloaded from; change it for a mirror."] = (
        "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
    )

    name: ClassVar[str] = "omniglot"
    licence: ClassVar[str] = "MIT"
    image_shape: ClassVar[tuple[int, int, int]] = (1, _SIZE, _SIZE)

    @property
    def folder(self) -> Path:
        """Where the archives lie."""
        return self.root / "omniglot-py"

    def source_key(self) -> str:
        """The name, size and time of the archives, or of every drawing where there are folders only."""
        files: list[Path] = []
        for part in PARTS:
            archive = self._archive(part)
            files += [archive] if archive else _tree_files(self.folder / part).values()
        stats = [file.stat() for file in files]
        return "\n".join(
            f"{file.relative_to(self.folder)} {stat.st_size} {stat.st_mtime_ns}"
            for file, stat in zip(files, stats, strict=True)
        )

    def _archive(self, part: str) -> Path | None:
        """The zip of one half; None if only its folder is there. Downloads the zip where both are missing."""
        archive = self.folder / f"{part}.zip"
        if archive.exists():
            return archive
        if (self.folder / part).is_dir():
            return None
        download(f"{self.url.rstrip('/')}/{part}.zip", archive, PARTS[part].md5)
        return archive

    def build(self) -> ExampleSet:
        """All 32,460 drawings: the background set's characters by name, then the evaluation set's."""
        names: list[str] = []
        pixels: list[NDArray[np.uint8]] = []
        for part in PARTS:
            archive = self._archive(part)
            for drawing, data, label in _zip_drawings(archive) if archive else _tree_drawings(self.folder / part):
                character = drawing.rsplit("/", 1)[0]
                if not names or names[-1] != character:
                    names.append(character)
                pixels.append(character_pixels(data, _SIZE, label))
        return ExampleSet(np.stack(pixels), tuple(names), np.full(len(names), DRAWERS, np.int64))

    def split_groups(self, names: Sequence[str], split: Split) -> NDArray[np.int64]:
        """The characters of ``split``, in the order of the data set."""
        if self.split == "vinyals":
            return np.array([place for place, name in enumerate(names) if _vinyals(name) == split], np.int64)
        shuffled = stream("omniglot", self.split_seed).permutation(len(names))
        first, last = {"train": (0, 1100), "val": (1100, 1200), "test": (1200, len(names))}[split]
        return np.sort(shuffled[first:last])


_DRAWING = re.compile(r"([^/.][^/]*/character\d\d/\d{4}_\d\d\.png)")  # Alphabet/characterNN/class_drawer.png
_BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError)


def _check_counts(place: Path, part: str, drawings: Iterable[str]) -> None:
    """Raises DataError unless the drawings are those of the whole half, 20 for each character."""
    counts = Counter(drawing.rsplit("/", 1)[0] for drawing in drawings)
    if len(counts) != PARTS[part].characters:
        raise DataError(
            f"{place} holds {len(counts)} characters instead of {PARTS[part].characters}: delete it to "
            f"have it downloaded again"
        )
    for character, count in counts.items():
        if count != DRAWERS:
            raise DataError(
                f"{place} holds {count} drawings of {character} instead of {DRAWERS}: delete it to have it "
                f"downloaded again"
            )


def _zip_drawings(archive: Path) -> Iterator[tuple[str, bytes, str]]:
    """Each drawing of an archive in order: its path below the half's folder, its bytes, and what to call it."""
    part = archive.stem
    try:
        opened = zipfile.ZipFile(archive)
    except _BROKEN_ZIP as error:
        raise DataError(
            f"{archive} cannot be read as a zip archive: {error}; delete it to have it downloaded again"
        ) from error
    with opened:
        members = {
            found[1]: info
            for info in opened.infolist()
            if (found := re.fullmatch(f"{part}/{_DRAWING.pattern}", info.filename))
        }
        _check_counts(archive, part, members)
        for drawing, info in sorted(members.items()):
            label = f"{info.filename} in {archive}"
            if info.file_size > _MEMBER_LIMIT:
                raise DataError(
                    f"{label} has {info.file_size} bytes, more than any drawing of Omniglot: delete the "
                    f"archive to have it downloaded again"
                )
            try:
                data = opened.read(info)
            except _BROKEN_ZIP as error:
                raise DataError(
                    f"{label} cannot be unpacked: {error}; delete the archive to have it downloaded again"
                ) from error
            yield drawing, data, label


def _tree_files(folder: Path) -> dict[str, Path]:
    """The drawings below the folder of one half, in order, by their paths in it."""
    below = {file.relative_to(folder).as_posix(): file for file in folder.glob("*/character*/*.png")}
    return {drawing: below[drawing] for drawing in sorted(below) if _DRAWING.fullmatch(drawing)}


def _tree_drawings(folder: Path) -> Iterator[tuple[str, bytes, str]]:
    """As `_zip_drawings`, from the folder that the archive unpacks to."""
    files = _tree_files(folder)
    _check_counts(folder, folder.name, files)
    for drawing, file in files.items():
        try:
            data = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
        yield drawing, data, str(file)
