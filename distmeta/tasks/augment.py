"""Augmentation of images by torchvision's transforms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import isclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmeta.errors import ConfigError, nearest, one_line

Transform = Callable[[Tensor], Tensor]


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

    transform = v2.Compose([_build(step, v2) for step in steps])
    try:
        with torch.random.fork_rng([]):
            made = transform(torch.rand(shape))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"tasks.augment cannot be applied to images {shape}: {one_line(error)}") from error
    if made.shape != shape or made.dtype != torch.float32:
        raise ConfigError(
            f"tasks.augment makes {made.dtype} {tuple(made.shape)} of images {shape} of numbers from 0 to 1; it may "
            "change neither their shape nor their type"
        )
    return transform


def augmented(images_NCHW: Tensor, transform: Transform, rng: np.random.Generator) -> Tensor:
    """Each image transformed by itself, by the random numbers of ``rng`` alone."""
    with torch.random.fork_rng([]):  # what the transforms draw from is the global generator, which is then set back
        torch.default_generator.manual_seed(int(rng.integers(2**63 - 1)))
        return torch.stack([transform(image) for image in images_NCHW])


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
