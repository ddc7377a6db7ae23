"""Few-shot image classification over one array of all images of a data set.

A data set is decoded once into a single ``uint8`` array in the cache, which every worker of a node maps into its
memory: the pages are shared, and an episode is a few thousand bytes copied out of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distmeta.core.types import Episode, Split, TaskSpec
from distmeta.errors import ConfigError, DataError, StorageError
from distmeta.tasks.files import atomic_write, cache_dir, default_data_root
from distmeta.tasks.pictures import Pixels, character_pixels, photo_pixels, to_floats

log = logging.getLogger(__name__)

SPLITS: tuple[Split, ...] = ("train", "val", "test")
_FORMAT = 1  # of the cached files; a new number makes every cache be built anew


class ImageSet(NamedTuple):
    """All images of a data set, class after class."""

    pixels: Pixels
    """[n, H, W] (grey) or [n, H, W, 3], 0 to 255."""
    names: tuple[str, ...]
    """A name for each class."""
    counts: NDArray[np.int64]
    """The number of images of each class; the first class's come first."""

    @property
    def starts(self) -> NDArray[np.int64]:
        """The row of each class's first image."""
        return np.cumsum(self.counts) - self.counts

    @staticmethod
    def cached(name: str, key: str, build: Callable[[], ImageSet]) -> ImageSet:
        """The data set ``name``, from the cache or from ``build``, whose result is cached.

        Args:
            name: the data set; part of the files' names.
            key: a hash of all that the result of ``build`` depends on. Several processes may build the same key at
                once, since they write the same bytes.
            build: makes the images when the cache lacks them, or holds them damaged.

        Raises:
            StorageError: the cache cannot be written.
        """
        stem = _stem(name, key)
        found = _open(stem)
        if found is None:
            _save(stem, build())
            found = _open(stem)
        if found is None:
            raise StorageError(
                f"{stem}.npy cannot be read back as it was written; set DISTMETA_CACHE to a folder on a sound disk"
            )
        return found


def _stem(name: str, key: str) -> Path:
    return cache_dir() / f"{name}-{key}"


def _paths(stem: Path) -> tuple[Path, Path]:
    return stem.with_name(stem.name + ".npy"), stem.with_name(stem.name + ".json")


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(stem: Path) -> ImageSet | None:
    """The cached images, memory-mapped and read-only; None if there are none, or if they are damaged."""
    array, index = _paths(stem)
    if not (array.exists() and index.exists()):
        return None
    try:
        entry: dict[str, Any] = json.loads(index.read_text("utf-8"))
        if _checksum(array) != entry["sha256"]:
            raise ValueError("the checksum differs")
        # a plain view: np.memmap costs microseconds at each indexing
        pixels = np.asarray(np.load(array, mmap_mode="r", allow_pickle=False))
        found = ImageSet(pixels, tuple(entry["names"]), np.asarray(entry["counts"], np.int64))
        if found.counts.sum() != len(pixels) or len(found.names) != len(found.counts):
            raise ValueError("the index does not fit the array")
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        log.warning("the cached data in %s is damaged (%s): building it anew", array, error)
        return None
    return found


def _save(stem: Path, images: ImageSet) -> None:
    array, index = _paths(stem)
    with atomic_write(array) as file:
        np.save(file, images.pixels, allow_pickle=False)
    entry = {"sha256": _checksum(array), "names": images.names, "counts": images.counts.tolist()}
    with atomic_write(index) as file:  # last: an index stands for a whole array
        file.write(json.dumps(entry).encode())


@dataclass(eq=False)
class FewShotImages(ABC):
    """N-way K-shot classification of images: an episode draws N classes, and K + Q distinct images of each.

    With ``rotations`` each class turned by 90, 180 and 270 degrees is a class of its own. Subclasses say what the
    images are made from and which classes belong to which split.

    Raises:
        ConfigError: a field is out of range.
    """

    ways: Annotated[int, "Classes in each task (N)."] = 5
    shots: Annotated[int, "Support examples of each class (K)."] = 1
    queries: Annotated[int, "Query examples of each class (Q)."] = 15
    train_shots: Annotated[
        int | None,
        "Support examples of each class in meta-training, where they are to differ (Reptile); null: as shots.",
    ] = None
    train_queries: Annotated[int | None, "Query examples of each class in meta-training; null: as queries."] = None
    rotations: Annotated[bool, "Whether a class turned by 90, 180 or 270 degrees counts as another class."] = False
    data_root: Annotated[str | None, "Folder of the data sets; null: $DISTMETA_DATA, else ~/.cache/distmeta/data."] = (
        None
    )

    name: ClassVar[str]
    """The data set, as the cache's files are named."""
    image_shape: ClassVar[tuple[int, int, int]] = (1, 28, 28)
    """Channels, height and width of one image."""

    def __post_init__(self) -> None:
        least = {"ways": 2, "shots": 1, "queries": 1, "train_shots": 1, "train_queries": 1}
        for key, low in least.items():
            value = getattr(self, key)
            if value is not None and value < low:
                raise ConfigError(f"tasks.{key} is {value}; it must be {low} or more")

    # what a subclass says

    @abstractmethod
    def source_key(self) -> str:
        """Names all that `build` depends on: files with sizes and times, versions, settings."""

    @abstractmethod
    def build(self) -> ImageSet:
        """Reads (where necessary downloads) the data set and decodes it.

        Raises:
            DataError: the data is missing or damaged.
        """

    @abstractmethod
    def split_classes(self, names: Sequence[str], split: Split) -> NDArray[np.int64]:
        """The classes of ``split``, as positions in ``names``, in an order that is always the same."""

    # what all share

    @property
    def spec(self) -> TaskSpec:
        """What a model is built for: images of ``image_shape``, one output a class, cross-entropy."""
        return TaskSpec(self.image_shape, self.ways, "cross_entropy")

    @property
    def root(self) -> Path:
        """The folder of the data sets."""
        return Path(self.data_root).expanduser() if self.data_root else default_data_root()

    def prepare(self) -> None:
        """Downloads, decodes and caches the data set where that has not been done, and checks that each split can give
        the tasks asked for. The driver calls it once; without it the first `sample` does the same.

        Raises:
            DataError: the data is missing, damaged or too small for the tasks.
            StorageError: the data or the cache cannot be written.
        """
        _ = self._classes

    @cached_property
    def _key(self) -> str:
        """Kept when pickled: a worker then finds the driver's cache without looking at the source files."""
        return hashlib.sha256(f"{_FORMAT} {self.source_key()}".encode()).hexdigest()[:16]

    @cached_property
    def images(self) -> ImageSet:
        """The whole data set, memory-mapped."""
        return ImageSet.cached(self.name, self._key, self.build)

    @cached_property
    def _classes(self) -> dict[Split, NDArray[np.int64]]:
        """The classes of each split, checked."""
        classes: dict[Split, NDArray[np.int64]] = {
            split: self.split_classes(self.images.names, split) for split in SPLITS
        }
        for split, members in classes.items():
            shots, queries = self._sizes(split)
            available, turns = len(members) * self._turns, " (rotations counted)" if self.rotations else ""
            if available < self.ways:
                raise DataError(
                    f"the {split} split of {self.name} has {available} classes{turns}, fewer than the "
                    f"{self.ways} ways of a task: lower tasks.ways"
                )
            smallest = members[np.argmin(self.images.counts[members])]
            if self.images.counts[smallest] < shots + queries:
                prefix = "train_" if split == "train" and (self.train_shots or self.train_queries) else ""
                raise DataError(
                    f"class {self.images.names[smallest]} of {self.name} ({split}) has "
                    f"{self.images.counts[smallest]} examples, fewer than {shots} shots + {queries} "
                    f"queries: lower tasks.{prefix}shots or tasks.{prefix}queries"
                )
        return classes

    def at_hand(self) -> bool:
        """Whether the decoded data set is in this node's cache."""
        return all(path.exists() for path in _paths(_stem(self.name, self._key)))

    def data(self) -> ImageSet:
        """The whole data set."""
        return self.images

    def attach(self, data: ImageSet) -> None:
        """Takes the data set from elsewhere, where this node does not have it."""
        self.images = data

    @property
    def _turns(self) -> int:
        return 4 if self.rotations else 1

    def _sizes(self, split: Split) -> tuple[int, int]:
        """Shots and queries of a class in ``split``."""
        if split != "train":
            return self.shots, self.queries
        return self.train_shots or self.shots, self.train_queries or self.queries

    def __getstate__(self) -> dict[str, Any]:
        """The settings and the cache's key, not the data: whoever unpickles it opens the cache, or builds it."""
        kept = {field.name for field in fields(self)} | {"_key"}
        return {key: value for key, value in self.__dict__.items() if key in kept}

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        """Draws an episode of ``split``: support (x, y) in random order, query (x, y) class by class.

        x is float32 [N * K, C, H, W] or [N * Q, C, H, W] from 0 to 1, y int64 from 0 to N - 1.
        """
        shots, queries = self._sizes(split)
        members = self._classes[split]
        # distinct (class, rotation) pairs
        drawn = rng.choice(len(members) * self._turns, self.ways, replace=False)
        classes, turns = members[drawn // self._turns], drawn % self._turns
        # distinct examples of each class: the first few of a random order
        counts = self.images.counts[classes]
        order = rng.random((self.ways, int(counts.max())))
        order[np.arange(order.shape[1]) >= counts[:, None]] = np.inf
        examples = np.argsort(order, axis=1, kind="stable")[:, : shots + queries]
        block = self.images.pixels[self.images.starts[classes][:, None] + examples]
        for turn in range(1, self._turns):
            chosen = turns == turn
            block[chosen] = np.rot90(block[chosen], turn, axes=(2, 3))
        labels = np.arange(self.ways)
        shuffled = rng.permutation(self.ways * shots)
        return Episode(
            (to_floats(_flat(block[:, :shots])[shuffled]), torch.from_numpy(labels.repeat(shots)[shuffled])),
            (to_floats(_flat(block[:, shots:])), torch.from_numpy(labels.repeat(queries))),
        )

    def describe(self) -> str:
        """How many classes each split has, for people."""
        parts = [f"{split} {len(self._classes[split]) * self._turns:,}" for split in SPLITS]
        turned = ", rotations counted" if self.rotations else ""
        return f"{len(self.images.pixels):,} images of {len(self.images.names):,} classes ({', '.join(parts)}{turned})"

    def read_image(self, path: Path) -> Tensor:
        """A user's own picture, prepared as the images of the data set (grey ones: characters, colour: photographs):
        float32 [C, H, W] from 0 to 1.

        Raises:
            DataError: the file is missing or is not an image.
        """
        read = character_pixels if self.image_shape[0] == 1 else photo_pixels
        return to_floats(read(path, self.image_shape[1])[None])[0]


def _flat(values: Pixels) -> Pixels:
    """Joins the first two axes, classes and examples, in an array of its own."""
    return np.ascontiguousarray(values).reshape(-1, *values.shape[2:])
