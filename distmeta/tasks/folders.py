"""Images that lie in files of their own: any folder of class folders, and what data sets of photographs share."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distmeta.core.types import Split
from distmeta.errors import DataError, at_least, some, told
from distmeta.tasks.cache import Block
from distmeta.tasks.images import FewShotImages
from distmeta.tasks.pictures import Fit, Pixels, is_picture, photo_pixels, quietly, to_floats
from distmeta.tasks.splits import (
    ALIASES,
    SPLITS,
    USUAL,
    Fractions,
    by_fractions,
    check_fractions,
    records,
)

log = logging.getLogger("distmeta")

Files = dict[str, list[str]]
"""The files of each class. Where the data say the splits, a class is called by its split, a slash and its name."""

_BLOCK = 256  # images decoded together
_NEWS = 30.0  # seconds between lines that say how far decoding has come


@dataclass(eq=False, kw_only=True)
class FolderImages(FewShotImages):
    """Images in files of their own, decoded and resized once into one array in the cache.

    Pictures of any size and kind that Pillow reads: grey, palettes, transparency (laid on white), 16 bits; turned
    upright as their EXIF data say.
    """

    size: Annotated[int, "Height and width that images are resized to, in pixels."] = 84
    colour: Annotated[bool, "Red, green and blue; false: grey."] = True
    fit: Annotated[Fit, "Of oblong images: crop (the middle square), pad (black bars) or stretch."] = "crop"
    skip_corrupt: Annotated[bool, "Leave out files that are no whole images, instead of stopping at them."] = False
    skip_small: Annotated[bool, "Leave out classes that have too few images for a task, instead of stopping."] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("tasks.size", self.size, 1)

    @abstractmethod
    def find_files(self) -> Files:
        """The files of each class, each list in an order that is always the same.

        Raises:
            DataError: there is no data set, or it is not as it should be.
        """

    @property
    @abstractmethod
    def folder(self) -> Path:
        """What files are named from, in messages and in the cache's key."""

    @cached_property
    def files(self) -> Files:
        """See `find_files`; not on workers, which have no need of the files."""
        return self.find_files()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        return (3 if self.colour else 1, self.size, self.size)

    def source_key(self) -> str:
        """The classes, their files' names, sizes and times, and what is made of them."""
        digest = hashlib.sha256()
        for name, files in self.files.items():
            digest.update(f"\n{name}\n".encode(errors="surrogateescape"))
            for file in files:
                stat = Path(file).stat()
                digest.update(os.fsencode(f"{self._label(file)} {stat.st_size} {stat.st_mtime_ns}\n"))
        return f"{self.size} {self.colour} {self.fit} {self.skip_corrupt} {digest.hexdigest()}"

    def build(self) -> Iterator[Block]:
        """The images of all classes, a few hundred at a time."""
        total, done, said = sum(map(len, self.files.values())), 0, time.monotonic()
        nothing = np.empty((0, self.size, self.size, 3) if self.colour else (0, self.size, self.size), np.uint8)
        broken: list[tuple[str, str]] = []
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # Pillow lets other threads run
            for name, files in self.files.items():
                yield Block(name, nothing, [])
                for at in range(0, len(files), _BLOCK):
                    chunk = files[at : at + _BLOCK]
                    with quietly():
                        read = dict(zip(chunk, pool.map(self._try_pixels, chunk), strict=True))
                    broken += [(self._label(file), found) for file, found in read.items() if isinstance(found, str)]
                    whole = {file: found for file, found in read.items() if not isinstance(found, str)}
                    if whole:
                        yield Block(name, np.stack(list(whole.values())), list(map(self._label, whole)))
                    done += len(chunk)
                    if time.monotonic() - said > _NEWS:
                        said = time.monotonic()
                        log.info("decoded %s of %s images", f"{done:,}", f"{total:,}")
        if broken:
            one = "1 file cannot be read as an image"
            count = one if len(broken) == 1 else f"{len(broken)} files cannot be read as images"
            where = f"{count} in {self.folder}: {some(name for name, _ in broken)}"
            if not self.skip_corrupt:
                raise DataError(
                    f"{where} (the first: {broken[0][1]}); mend or delete what is broken, or set "
                    "tasks.skip_corrupt=true to leave it out"
                )
            log.warning("%s; left out", where)

    def _pixels(self, path: Path) -> Pixels:
        return photo_pixels(path, self.size, colour=self.colour, fit=self.fit)

    def _try_pixels(self, file: str) -> Pixels | str:
        """The pixels of a file, or why it has none."""
        try:
            return self._pixels(Path(file))
        except DataError as error:
            return str(error)

    def _label(self, file: str) -> str:
        """What messages call a file."""
        return os.path.relpath(file, self.folder)

    def read_image(self, path: Path) -> Tensor:
        """A user's own picture, prepared as those of the data set: float32 [C, H, W] from 0 to 1.

        Raises:
            DataError: the file is missing or is not an image.
        """
        with quietly():
            return to_floats(self._pixels(path)[None])[0]

    def divide(self, names: Sequence[str]) -> Mapping[Split, set[str]]:
        """The classes of each split, where their names do not say it."""
        raise DataError(f"{self.folder} does not say which classes are for training, validation and test")

    def split_groups(self, names: Sequence[str], split: Split) -> NDArray[np.int64]:
        """The classes of ``split``; with ``skip_small`` those that have enough images."""
        # A class's split never depends on how many images it has, or a run judged with more shots would be judged by
        # classes that it was trained on.
        divided = "/" in names[0]
        own = set() if divided else self.divide(names)[split]
        chosen = (name.startswith(f"{split}/") if divided else name in own for name in names)
        members = np.flatnonzero(list(chosen)).astype(np.int64)
        return members[self._enough(split, members)] if self.skip_small else members

    def _enough(self, split: Split, members: NDArray[np.int64]) -> NDArray[np.bool_]:
        return self.dataset.counts[members] >= sum(self._most(split)[1:])

    def prepare(self, splits: Sequence[Split] = SPLITS) -> None:
        """See `FewShotClasses.prepare`; what is left out, and images that a class has twice, are reported."""
        super().prepare(splits)
        if self.skip_small:
            used = {int(group) for groups in self.members.values() for group in groups}
            counts = zip(self.dataset.names, self.dataset.counts, strict=True)
            least = min(sum(self._most(split)[1:]) for split in SPLITS)
            left = [f"{name} ({count})" for i, (name, count) in enumerate(counts) if i not in used and count < least]
            if left:
                log.warning("%d classes have too few images and are left out: %s", len(left), some(left))
        starts = self.dataset.starts
        rows = np.array([[twin.first, twin.later] for twin in self.dataset.twins], np.int64).reshape(-1, 2)
        groups = np.searchsorted(starts, rows, "right")
        twice = [
            f"{twin.first_place} and {twin.later_place}"
            for twin, (first, later) in zip(self.dataset.twins, groups, strict=True)
            if first == later
        ]
        if twice:
            log.warning("%s more than once in a class%s", *told(twice, "image stands", "images stand"))

    def check(self, split: Split, members: NDArray[np.int64]) -> None:
        """Enough classes, and enough images of each; all classes that have too few are named."""
        few = members[~self._enough(split, members)]
        if len(few) > 1:
            _, shots, queries = self._most(split)
            found = some(f"{self.dataset.names[group]} ({self.dataset.counts[group]})" for group in few)
            raise DataError(
                f"{len(few)} classes of {self.name} ({split}) have fewer images than {shots} shots + {queries} "
                f"queries: {found}; lower tasks.shots or tasks.queries, or set tasks.skip_small=true to leave them out"
            )
        super().check(split, members)


@dataclass(eq=False, kw_only=True)
class ImageFolder(FolderImages):
    """Images of your own: a folder with one folder of images for each class (for faces: each person).

    Which classes are for training, validation and test say, in this order: ``split_file``; sub-folders train, val and
    test, which hold the class folders; ``fractions`` of the classes, shuffled by ``split_seed``. No class is in two
    splits: a folder that has the same class in train and in test is refused.
    """

    path: Annotated[str, "The folder."]
    split_file: Annotated[
        str | None,
        "JSON lists of classes called train, val, test; or a CSV with columns class,split or filename,label,split; or "
        "a folder of train.csv, val.csv, test.csv; null: sub-folders or fractions.",
    ] = None
    fractions: Fractions = USUAL
    split_seed: Annotated[int, "The seed that shuffles the classes before they are divided by fractions."] = 0

    name: ClassVar[str] = "image_folder"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self.fractions)

    @property
    def folder(self) -> Path:
        """The folder."""
        return Path(self.path).expanduser()

    def find_files(self) -> Files:
        """The files of each class."""
        if self.split_file is not None:
            return listed_files(self.folder, Path(self.split_file).expanduser())
        places = subfolders(self.folder)
        by_split: dict[Split, Path] = {ALIASES[p.name.lower()]: p for p in places if p.name.lower() in ALIASES}
        if not {"train", "test"} <= by_split.keys():
            return {place.name: images_below(place) for place in places}
        return divided_files(self.folder, by_split)

    def divide(self, names: Sequence[str]) -> Mapping[Split, set[str]]:
        """By the fractions."""
        return by_fractions(names, self.fractions, self.split_seed, self.name)


def divided_files(folder: Path, by_split: Mapping[Split, Path]) -> Files:
    """The files of each class of folders for the splits, which hold the class folders.

    Raises:
        DataError: A split has no folder, a folder is of no split, or a class is in two splits.
    """
    for split in SPLITS:
        if split not in by_split:
            raise DataError(f"{folder} has no folder {split} beside {some(sorted(by_split))}: move some classes there")
    stray = [place.name for place in subfolders(folder) if place not in by_split.values()]
    if stray:
        log.warning("%s of %s is no split and left out", some(stray), folder)
    owner: dict[str, Split] = {}
    found: Files = {}
    for split in SPLITS:
        for place in subfolders(by_split[split]):
            if owner.setdefault(place.name, split) != split:
                raise DataError(
                    f"the class {place.name} of {folder} is both in {owner[place.name]} and in {split}: few-shot tasks "
                    "are of unseen classes, so that each class belongs to one split; divide the classes, not the "
                    "images of a class"
                )
            found[f"{split}/{place.name}"] = images_below(place)
    return found


def _below(folder: Path, label: str, file: str) -> Path | None:
    """A file by the path or name that a list gives it."""
    tried = (folder / file, folder / label / file, folder / "images" / file)
    return next((path for path in tried if path.is_file()), None)


def listed_files(folder: Path, source: Path, find: Callable[[Path, str, str], Path | None] = _below) -> Files:
    """The files of each class that a split file names (see `records`).

    Args:
        folder: where the class folders are.
        source: the split file.
        find: from the folder, a class and what the split file calls an image of it, to its path; None: there is none.

    Raises:
        DataError: The file cannot be read, names something that is not there, or has a class in two splits.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    if not source.exists():
        raise DataError(f"tasks.split_file: there is no file or folder {source}")
    owner: dict[str, Split] = {}
    by_class: dict[str, dict[str, None]] = {}
    missing: list[str] = []
    for place, split, given, file in records(source):
        label = given or Path(file or "").parent.name
        if not label or "/" in label:
            raise DataError(f"{place} names {label or file!r}, which is not the name of a class")
        if owner.setdefault(label, split) != split:
            raise DataError(
                f"{place} has the class {label!r} in {split}, and a line before has it in {owner[label]}: few-shot "
                "tasks are of unseen classes, so that each class belongs to one split"
            )
        members = by_class.setdefault(f"{split}/{label}", {})
        if file is None:
            if not (folder / label).is_dir():
                raise DataError(f"{place} names the class {label!r}, and {folder} has no folder of that name")
            members |= dict.fromkeys(images_below(folder / label))
            continue
        at = find(folder, label, file)
        if at is None:
            missing.append(file)
        else:
            members[str(at)] = None
    if missing:
        raise DataError(f"{len(missing)} files that {source} names are not in {folder}: {some(missing)}")
    return {name: list(by_class[name]) for name in sorted(by_class)}


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, hidden ones left out.

    Raises:
        DataError: There is no folder, it holds no folders, or it has images beside them.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}" if not folder.exists() else f"{folder} is not a folder")
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    stray = [entry.name for entry in entries if is_picture(entry.name) and entry.is_file()]
    places = [entry for entry in entries if entry.is_dir()]
    if stray:
        raise DataError(f"{folder} holds images beside folders ({some(stray, 3)}): put each in its class's folder")
    if not places:
        raise DataError(f"{folder} holds no folders: put the images of each class in a folder named after it")
    return places


def images_below(folder: Path) -> list[str]:
    """The files below a class's folder whose names end as images' do, hidden ones left out; others are told."""
    found: list[str] = []
    others: list[str] = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(name for name in files if not name.startswith(".")):
            (found if is_picture(file) else others).append(f"{place}/{file}")
    if others:
        log.warning("%s no image by its name and left out%s", *told(others, "file is", "files are"))
    return found
