"""Data sets of photographs that the few-shot literature compares on, which their licences let nobody pass on: they are
put in place by hand, and each says which file belongs where."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar

from distmeta.core.types import Split
from distmeta.errors import DataError
from distmeta.tasks.folders import Files, FolderImages, divided_files, images_below, listed_files, subfolders
from distmeta.tasks.pictures import Fit
from distmeta.tasks.splits import ALIASES, SPLITS

_IMAGENET = "images: ImageNet's terms of access, for research and teaching that is not commercial"


@dataclass(eq=False, kw_only=True)
class Published(FolderImages):
    """A data set with a published division of its classes."""

    classes: ClassVar[tuple[int, int, int]]
    """How many are for training, validation and test."""
    layout: ClassVar[str]
    """What is to be put where; ``{folder}`` stands for `folder`."""

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.root / self.name

    def find_files(self) -> Files:
        """The files of each class, whose division is checked."""
        if not self.folder.is_dir():
            raise DataError(
                f"{self.name} is not in {self.folder}, and its licence forbids to download it for you: {self._how()}"
            )
        try:
            found = self.published()
        except DataError as error:
            raise DataError(f"{error}; {self._how()}") from error
        names = list(found)
        divided = Counter(name.split("/")[0] for name in names) if "/" in names[0] else None
        counts = tuple(divided[split] for split in SPLITS) if divided else (len(names),)
        if counts not in (self.classes, (sum(self.classes),)):
            raise DataError(
                f"{self.folder} has {', '.join(map(str, counts))} classes instead of "
                f"{', '.join(map(str, self.classes))} for training, validation and test: {self._how()}"
            )
        return found

    def _how(self) -> str:
        return self.layout.format(folder=self.folder) + " (another place: data_root or $DISTMETA_DATA)"

    @abstractmethod
    def published(self) -> Files:
        """The files of each class, as they lie in `folder`."""


def _by_folders(folder: Path) -> Files:
    places: dict[Split, Path] = {
        ALIASES[place.name.lower()]: place for place in subfolders(folder) if place.name.lower() in ALIASES
    }
    return divided_files(folder, places)


@dataclass(eq=False, kw_only=True)
class MiniImageNet(Published):
    """Mini-ImageNet: 100 classes of ImageNet, 600 images each (Vinyals et al., 2016), 84 x 84.

    In the split of Ravi and Larochelle, "Optimization as a model for few-shot learning", ICLR 2017: 64 classes for
    training, 16 for validation, 20 for test. Images are stretched to a square, as in the code of Finn et al. (2017).

    Read from ``data_root/mini_imagenet``: folders ``train``, ``val`` and ``test`` of class folders; or the lists of the
    split (``train.csv``, ``val.csv``, ``test.csv``: filename,label), with the files that they name in ``images``, or
    ``imagenet`` for ImageNet itself. The lists then number the images of a class from 1, in the order of the numbers in
    ImageNet's file names, as the tools around the lists take it; their authors do not say so.
    """

    fit: Annotated[Fit, "Of oblong images: crop (the middle square), pad (black bars) or stretch."] = "stretch"
    imagenet: Annotated[
        str | None, "ImageNet's folder of class folders (train), if the files are there; null: none."
    ] = None

    name: ClassVar[str] = "mini_imagenet"
    licence: ClassVar[str] = _IMAGENET
    classes: ClassVar[tuple[int, int, int]] = (64, 16, 20)
    layout: ClassVar[str] = (
        "make {folder} with train.csv, val.csv and test.csv of Ravi and Larochelle (filename,label), and put the files "
        "that they name in {folder}/images or give ImageNet's training folder by tasks.imagenet; or make "
        "{folder}/train, val and test with a folder of images for each class"
    )

    def published(self) -> Files:
        """By the lists, or by folders."""
        if not (self.folder / "train.csv").exists():
            return _by_folders(self.folder)
        if self.imagenet is None:
            return listed_files(self.folder, self.folder)
        return listed_files(Path(self.imagenet).expanduser(), self.folder, _of_imagenet)


def _of_imagenet(folder: Path, label: str, file: str) -> Path | None:
    """The image of ImageNet that ``n0153282900000005.jpg`` stands for: the 5th of n01532829."""
    number = Path(file).stem[len(label) :]
    images = _numbered(folder / label)
    return images[int(number) - 1] if number.isdigit() and 1 <= int(number) <= len(images) else None


@cache
def _numbered(folder: Path) -> list[Path]:
    """The images of a class of ImageNet (n01532829_1234.JPEG) by their numbers."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    files = [Path(file) for file in images_below(folder)]
    strange = [file for file in files if not file.stem.split("_")[-1].isdigit()]
    if strange:
        raise DataError(f"{strange[0]} is not called as ImageNet's images are (n01532829_1234.JPEG)")
    return sorted(files, key=lambda file: int(file.stem.split("_")[-1]))


@dataclass(eq=False, kw_only=True)
class TieredImageNet(Published):
    """Tiered-ImageNet: 608 classes of ImageNet, divided by their 34 categories (Ren et al., ICLR 2018), 84 x 84.

    351 classes for training, 97 for validation, 160 for test. Read from ``data_root/tiered_imagenet``: folders
    ``train``, ``val`` and ``test`` of class folders. (The files of its authors are Python pickles, which are code.)
    """

    fit: Annotated[Fit, "Of oblong images: crop (the middle square), pad (black bars) or stretch."] = "stretch"

    name: ClassVar[str] = "tiered_imagenet"
    licence: ClassVar[str] = _IMAGENET
    classes: ClassVar[tuple[int, int, int]] = (351, 97, 160)
    layout: ClassVar[str] = (
        "make {folder}/train, {folder}/val and {folder}/test, and put the folder of each class (n01532829, …) of "
        "ImageNet's training images into the one that Ren et al. list it in"
    )

    def published(self) -> Files:
        """By folders."""
        return _by_folders(self.folder)


@dataclass(eq=False, kw_only=True)
class CUB(Published):
    """Caltech-UCSD Birds 200-2011: 11,788 photographs of 200 species (Wah et al., 2011), 84 x 84.

    Divided as by Chen et al., "A closer look at few-shot classification", ICLR 2019: of the species in the order of
    their folders the 1st, 3rd, 5th, … for training (100), the 2nd, 6th, 10th, … for validation (50), the others for
    test (50). Read from ``data_root/CUB_200_2011``, as its archive unpacks.
    """

    name: ClassVar[str] = "cub"
    licence: ClassVar[str] = "for research and teaching that is not commercial; the photographs belong to others"
    classes: ClassVar[tuple[int, int, int]] = (100, 50, 50)
    layout: ClassVar[str] = (
        "download CUB_200_2011.tgz from the pages of Caltech's vision group and unpack it, so that there is "
        "{folder}/images/001.Black_footed_Albatross"
    )

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.root / "CUB_200_2011"

    def published(self) -> Files:
        """All species."""
        return {place.name: images_below(place) for place in subfolders(self.folder / "images")}

    def divide(self, names: Sequence[str]) -> Mapping[Split, set[str]]:
        """By the order of the species."""
        return {"train": set(names[0::2]), "val": set(names[1::4]), "test": set(names[3::4])}
