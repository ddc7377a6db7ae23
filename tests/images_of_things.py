"""Folders of pictures of made-up classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distmeta.tasks.folders import ImageFolder

SIDE = 16


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A smooth pattern of the class (tens) with some noise of its own."""
    rng, (width, height) = np.random.default_rng(seed), size
    hue = np.random.default_rng(seed // 100).integers(40, 200, 3)
    noise = rng.integers(0, 40, (height, width, 3))
    return Image.fromarray((hue + noise).astype(np.uint8))


def fill(folder: Path, classes: Sequence[str], images: int = 4, first: int = 0) -> Path:
    for number, name in enumerate(classes, first):
        (folder / name).mkdir(parents=True)
        for k in range(images):
            picture(100 * number + k).save(folder / name / f"{k}.png")
    return folder


def own(folder: Path, **options: Any) -> ImageFolder:
    return ImageFolder(**{"path": str(folder), "ways": 2, "queries": 2, "size": SIDE, **options})
