"""Few-shot classification of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from distmeta.core.types import Episode, Split, TaskSpec
from distmeta.errors import at_least
from distmeta.tasks.augment import Transform, augmented, transform_of
from distmeta.tasks.datasets import FewShotClasses
from distmeta.tasks.own import OwnClasses
from distmeta.tasks.pictures import (
    character_pixels,
    folder_of_classes,
    folder_of_images,
    photo_pixels,
    quietly,
    to_floats,
)

_TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda images: images.swapaxes(1, 2)[:, ::-1],
    2: lambda images: images[:, ::-1, ::-1],
    3: lambda images: images.swapaxes(1, 2)[:, :, ::-1],
}
"""Views of images [n, H, W, …] turned by so many quarters, as `numpy.rot90` turns them."""


@dataclass(eq=False)
class FewShotImages(FewShotClasses):
    """N-way K-shot classification of images, which the data set holds as uint8 [n, H, W] (grey) or [n, H, W, 3].

    With ``rotations`` each class turned by 90, 180 and 270 degrees is a class of its own. ``image_size`` and
    ``channels`` bring data sets of different images to one form, so that they can be mixed.

    Raises:
        ConfigError: a field is out of range, or ``augment`` names no transform.
    """

    rotations: Annotated[bool, "Whether a class turned by 90, 180 or 270 degrees counts as another class."] = False
    augment: Annotated[
        tuple[dict[str, Any], ...],
        "Transforms of torchvision.transforms.v2 for training tasks, each {use: NAME, argument: value, …}.",
    ] = ()
    image_size: Annotated[int | None, "Height and width that images are resized to; null: as they are."] = None
    channels: Annotated[Literal[1, 3] | None, "1: made grey, 3: made colour; null: as they are."] = None

    examples: ClassVar[str] = "images"
    image_shape: ClassVar[tuple[int, int, int]] = (1, 28, 28)
    """The ``shape`` of a data set that has only one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None:
            at_least("tasks.image_size", self.image_size, 1)
        if self.augment:
            _ = self.transform

    @cached_property
    def transform(self) -> Transform:
        """What augments an image."""
        return transform_of(self.augment, self.input_shape)

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        """Draws an episode of ``split`` (see `FewShotClasses.sample`); images of training tasks are augmented."""
        episode = super().sample(rng, split)
        if split != "train" or not self.augment:
            return episode
        (x, y), (query_x, query_y) = episode
        return Episode((augmented(x, self.transform, rng), y), (augmented(query_x, self.transform, rng), query_y))

    @property
    def spec(self) -> TaskSpec:
        """What a model is built for: images of one shape, one output a class, cross-entropy."""
        return TaskSpec(self.input_shape, self.most_ways, "cross_entropy", variable_ways=self.variable_ways)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what a model is given."""
        channels, height, width = self.shape
        return self.channels or channels, self.image_size or height, self.image_size or width

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image as the data set has it."""
        return self.image_shape

    @property
    def variants(self) -> int:
        """The quarter turns that count as classes."""
        return 4 if self.rotations else 1

    def vary(self, examples: NDArray[Any], variants: NDArray[np.int64]) -> None:
        """Turns the images of each class."""
        for each, turn in zip(examples, variants.tolist(), strict=True):
            if turn:
                each[:] = _TURNS[turn](each.copy())

    def inputs(self, examples: NDArray[Any]) -> Tensor:
        """float32 [n, C, H, W] from 0 to 1."""
        return self._converted(to_floats(examples))

    def _converted(self, x_BCHW: Tensor) -> Tensor:
        """Images in the form that ``image_size`` and ``channels`` ask for: resized by antialiased bilinear
        interpolation, made grey by their luma (ITU-R BT.601), made colour by three equal channels."""
        size = self.input_shape[1:]
        if x_BCHW.shape[2:] != size:
            x_BCHW = F.interpolate(x_BCHW, size, mode="bilinear", antialias=True)
        if self.channels == 1 and x_BCHW.shape[1] == 3:
            x_BCHW = (x_BCHW * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        return x_BCHW.repeat(1, 3, 1, 1) if self.channels == 3 and x_BCHW.shape[1] == 1 else x_BCHW

    def own_task(self, support: Path, query: Path) -> OwnClasses:
        """From a folder with one folder of images for each class, and a folder of images (or of one for each class)."""
        names, x, y = folder_of_classes(support, self.read_image)
        pictures = folder_of_images(query, self.read_image)
        files = [str(path.relative_to(query)) for path in pictures.paths]
        return OwnClasses(names, (x, y), "file", files, pictures.x, pictures.labels)

    def read_image(self, path: Path) -> Tensor:
        """A user's own picture, prepared as the images of the data set (grey ones: characters, colour: photographs):
        float32 [C, H, W] from 0 to 1.

        Raises:
            DataError: the file is missing or is not an image.
        """
        read = character_pixels if self.shape[0] == 1 else photo_pixels
        with quietly():
            return self._converted(to_floats(read(path, self.shape[1])[None]))[0]
