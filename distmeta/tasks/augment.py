"""Augmentation of images by torchvision's transforms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import isclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmeta.errors import ConfigError, nearest, one_line

Transform = Callable[[Tensor], Tensor]
"""Of a batch of images [n, C, H, W], each by random numbers of its own."""


def transform_of(steps: Sequence[Mapping[str, Any]], shape: tuple[int, int, int]) -> Transform:
    """The transforms of ``torchvision.transforms.v2`` that a configuration names, one after the other.

    Args:
        steps: for each the name of its class as ``use``, and its arguments. A list of such mappings as an argument is a
            list of transforms, for those that choose among others.
        shape: channels, height and width of the images, which must not change.

    Raises:
        ConfigError: A transform is unknown, refuses its arguments, or changes the images' shape or type.
    """
    from torchvision.transforms import v2  # slow to import, and only needed where images are augmented

    batched = {v2.RandomCrop: _cropped, v2.RandomHorizontalFlip: _flipped}
    made = [_build(step, v2) for step in steps]
    transforms: list[Transform] = [partial(batched.get(type(one), _one_by_one), one) for one in made]

    def transform(images_NCHW: Tensor) -> Tensor:
        for each in transforms:
            images_NCHW = each(images_NCHW)
        return images_NCHW

    try:
        with torch.random.fork_rng([]):
            tried = transform(torch.rand(1, *shape))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"tasks.augment cannot be applied to images {shape}: {one_line(error)}") from error
    if tried.shape[1:] != shape or tried.dtype != torch.float32:
        raise ConfigError(
            f"tasks.augment makes {tried.dtype} {tuple(tried.shape[1:])} of images {shape} of numbers from 0 to 1; it "
            "may change neither their shape nor their type"
        )
    return transform


def augmented(images_NCHW: Tensor, transform: Transform, rng: np.random.Generator) -> Tensor:
    """The images transformed by the random numbers of ``rng`` alone."""
    with torch.random.fork_rng([]):  # what the transforms draw from is the global generator, which is then set back
        torch.default_generator.manual_seed(int(rng.integers(2**63 - 1)))
        return transform(images_NCHW)


def _one_by_one(transform: Any, images_NCHW: Tensor) -> Tensor:
    """Each image by itself: of a batch, torchvision transforms all images alike."""
    return torch.stack([transform(image) for image in images_NCHW])


# The two transforms that most augmentations have, on the whole batch: some ten times as fast as one by one.


def _cropped(crop: Any, images_NCHW: Tensor) -> Tensor:
    """``RandomCrop``: all images padded together, and each cut out at a place of its own."""
    params = crop.make_params([images_NCHW])
    padded = crop.transform(images_NCHW, params | {"needs_crop": False}).numpy()
    n, channels, height, width = *padded.shape[:2], params["height"], params["width"]
    tops, lefts = (
        torch.randint(there - kept + 1, (n,)).tolist()
        for there, kept in zip(padded.shape[2:], (height, width), strict=True)
    )
    made = np.empty((n, channels, height, width), padded.dtype)
    for image, out, top, left in zip(padded, made, tops, lefts, strict=True):
        out[:] = image[:, top : top + height, left : left + width]
    return torch.from_numpy(made)


def _flipped(flip: Any, images_NCHW: Tensor) -> Tensor:
    """``RandomHorizontalFlip``."""
    turned_N = (torch.rand(len(images_NCHW)) < flip.p).numpy()
    made = images_NCHW.numpy().copy()
    made[turned_N] = made[turned_N, ..., ::-1]
    return torch.from_numpy(made)


def _build(step: Any, v2: Any) -> Any:
    if not isinstance(step, Mapping) or not isinstance(step.get("use"), str):
        raise ConfigError(f"tasks.augment is a list of {{use: Transform, argument: value, …}}; it holds {step!r}")
    known = {name: kind for name, kind in vars(v2).items() if isclass(kind) and issubclass(kind, v2.Transform)}
    name = step["use"]
    if name not in known:
        raise ConfigError(f"tasks.augment: torchvision.transforms.v2 has no {name!r}{nearest(name, known)}")
    arguments = {key: _argument(value, v2) for key, value in step.items() if key != "use"}
    try:
        return known[name](**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"tasks.augment: {name} refused its arguments: {one_line(error)}") from error


def _argument(value: Any, v2: Any) -> Any:
    if isinstance(value, list | tuple) and value and all(isinstance(part, Mapping) for part in value):
        return [_build(part, v2) for part in value]
    return value
