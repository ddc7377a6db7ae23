"""Reading users' pictures, one by one and by folders."""

from __future__ import annotations

import io
import logging
import struct
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from distmeta.errors import DataError, some, told

log = logging.getLogger("distmeta")

Pixels = NDArray[np.uint8]
Fit = Literal["crop", "pad", "stretch"]
_PIXELS = 50_000_000  # of one picture, at most
_BROKEN_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def to_floats(pixels: Pixels) -> Tensor:
    """uint8 [n, H, W] or [n, H, W, 3] to float32 [n, C, H, W] from 0 to 1."""
    view = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    # NumPy's operations start several times as fast as torch's, which is what counts with a few small images
    return torch.from_numpy(np.divide(view, np.float32(255), out=np.empty(view.shape, np.float32)))


def is_picture(name: str) -> bool:
    """Whether a file's name ends as those of the pictures do that Pillow can read."""
    return name[name.rfind(".") :].lower() in _endings()


@cache
def _endings() -> frozenset[str]:
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN)


@contextmanager
def quietly() -> Generator[None]:
    """Without Pillow's warnings of what it does not understand: a picture can be read, or it cannot.

    For the thread that has others decode, and not for these: filters of warnings are the whole process's.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_image(source: Path | bytes, label: str) -> Image.Image:
    """Decodes a picture, a file or the bytes of one, upright as its EXIF data says; messages call it ``label``.

    Raises:
        DataError: there is no such file, it is not a whole image, or its pixels are neither of 8 nor of 16 bits.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            if picture.width * picture.height > _PIXELS:  # a file of some kilobytes may hold any number of them
                raise DataError(
                    f"{label} has {picture.width} x {picture.height} pixels, more than {_PIXELS}: make it smaller"
                )
            picture.load()
            # the copy that a transposition makes is worth sparing where there is nothing to transpose
            upright = ImageOps.exif_transpose(picture) if picture.getexif() else picture
    except FileNotFoundError as error:
        raise DataError(f"there is no file {label}") from error
    except _BROKEN_IMAGE as error:
        raise DataError(f"{label} cannot be read as an image: {error}") from error
    return _eight_bits(upright, label)


def character_pixels(source: Path | bytes, size: int, label: str | None = None) -> Pixels:
    """Reads a written character as the data sets of characters show it: uint8 [size, size], ink 255 on paper 0.

    Transparency is laid on white. The paper is the median grey, the ink whatever lies furthest from it, so dark on
    light and light on dark come out alike. The picture is padded with paper to a square and resized with Pillow's
    antialiased Lanczos filter. A drawing should fill its frame, with strokes about as wide as a fortieth of it, as
    Omniglot's are.

    Args:
        source: a file, or the bytes of one.
        size: height and width of the result.
        label: what messages call it; a path names itself.

    Raises:
        DataError: there is no such file, it is not a whole image, or it has one colour only.
    """
    label = label or str(source)
    picture = _opaque(load_image(source, label))
    grey = np.asarray(picture.convert("L"), np.float32)
    contrast = grey - np.median(grey)
    furthest = contrast.flat[np.abs(contrast).argmax()]
    if furthest == 0:
        raise DataError(f"{label} has one colour only: it shows no character")
    ink = Image.fromarray(np.rint(np.clip(contrast / furthest, 0, 1) * 255).astype(np.uint8))
    if ink.width != ink.height:
        side = max(ink.size)
        square = Image.new("L", (side, side), 0)
        square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
        ink = square
    return np.array(ink.resize((size, size), Image.Resampling.LANCZOS))


def photo_pixels(
    source: Path | bytes, size: int, label: str | None = None, *, colour: bool = True, fit: Fit = "crop"
) -> Pixels:
    """Reads a photograph: uint8 [size, size, 3], or [size, size] in grey, by Pillow's antialiased Lanczos filter.

    Transparency is laid on white; 16-bit pictures keep their 8 highest bits.

    Args:
        source: a file, or the bytes of one.
        size: height and width of the result.
        label: what messages call it; a path names itself.
        colour: red, green and blue, or grey.
        fit: what becomes of an oblong picture: its middle square, the whole between black bars, or the whole deformed.

    Raises:
        DataError: there is no such file or it is not a whole image.
    """
    label = label or str(source)
    picture = _opaque(load_image(source, label)).convert("RGB" if colour else "L")
    if fit == "stretch":
        return np.array(picture.resize((size, size), Image.Resampling.LANCZOS))
    reshape = ImageOps.fit if fit == "crop" else ImageOps.pad
    return np.array(reshape(picture, (size, size), Image.Resampling.LANCZOS))


def _opaque(picture: Image.Image) -> Image.Image:
    """Transparency laid on white."""
    if not picture.has_transparency_data:
        return picture
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


def _eight_bits(picture: Image.Image, label: str) -> Image.Image:
    """A picture of more than 8 bits a pixel by its 8 highest; Pillow would cut off all above 255."""
    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        kind = "fractions" if picture.mode == "F" else f"values from {values.min()} to {values.max()}"
        raise DataError(f"{label} holds {kind} instead of 8 or 16 bits a pixel: save it as such")
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))


class Pictures(NamedTuple):
    """The pictures of a folder."""

    paths: list[Path]
    x: Tensor
    """float32 [n, C, H, W]."""
    labels: list[str] | None
    """The name of the class folder that each lies in; None if the folder has no class folders."""


def _entries(folder: Path) -> list[Path]:
    """The folders and pictures in a folder by name, hidden ones left out; other files are told."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}" if not folder.exists() else f"{folder} is not a folder")
    found: list[Path] = []
    others: list[str] = []
    for entry in sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
        if is_picture(entry.name) or entry.is_dir():
            found.append(entry)
        else:
            others.append(str(entry))
    if others:
        log.warning("%s no picture by its name and left out%s", *told(others, "file is", "files are"))
    return found


def folder_of_images(folder: Path, reader: Callable[[Path], Tensor]) -> Pictures:
    """Reads a folder of pictures, or of one folder of pictures for each class.

    Args:
        folder: the folder; files that are hidden, or no pictures by their names, are left out.
        reader: reads one picture, for example `FewShotImages.read_image`.

    Raises:
        DataError: no such folder, an empty one (or an empty class), pictures beside class folders, or unreadable
            pictures, all of which are named.
    """
    entries = _entries(folder)
    classes = [entry for entry in entries if entry.is_dir()]
    if not entries:
        raise DataError(f"{folder} holds no pictures: it should, or hold one folder of pictures for each class")
    if classes and len(classes) < len(entries):
        stray = next(entry for entry in entries if not entry.is_dir())
        raise DataError(
            f"{folder} holds both folders and files ({stray.name}): put every picture in a class's folder, "
            f"or all of them beside each other"
        )
    paths: list[Path] = []
    for place in classes or [folder]:
        found = _entries(place)
        if not found:
            raise DataError(f"the class folder {place} holds no pictures")
        paths += found
    read: list[Tensor] = []
    broken: list[str] = []
    for path in paths:
        try:
            read.append(reader(path))
        except DataError as error:
            broken.append(str(error))
    if broken:
        raise DataError(f"{some(broken)}; mend or take away what is broken")
    return Pictures(paths, torch.stack(read), [path.parent.name for path in paths] if classes else None)


def folder_of_classes(folder: Path, reader: Callable[[Path], Tensor]) -> tuple[list[str], Tensor, Tensor]:
    """Reads a folder that has one folder of pictures for each class.

    Returns:
        the classes' names in order, x float32 [n, C, H, W], and y int64 [n], positions in the names.

    Raises:
        DataError: as `folder_of_images`, and if there are no class folders.
    """
    pictures = folder_of_images(folder, reader)
    if pictures.labels is None:
        raise DataError(f"{folder} holds no class folders: put the pictures of each class in a folder named after it")
    names = sorted(set(pictures.labels))
    return names, pictures.x, torch.tensor([names.index(label) for label in pictures.labels])
