"""Glyphs: printed characters of five scripts, rendered from the fonts that come with matplotlib. Needs no download."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from fontTools.ttLib import TTFont
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from distmeta.core.seeds import stream
from distmeta.core.types import Split
from distmeta.errors import DataError
from distmeta.tasks.cache import ExampleSet
from distmeta.tasks.images import FewShotImages
from distmeta.tasks.pictures import Pixels

_RECIPE = 3  # a new number for every change of what is rendered
EXAMPLES = 20
_SIZE = 28

_DEJAVU = tuple(
    f"DejaVu{family}"
    for family in (
        "Sans",
        "Sans-Bold",
        "Sans-BoldOblique",
        "Sans-Oblique",
        "SansMono",
        "SansMono-Bold",
        "SansMono-BoldOblique",
        "SansMono-Oblique",
        "Serif",
        "Serif-Bold",
        "Serif-BoldItalic",
        "Serif-Italic",
    )
)
_STIX = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta", "STIXGeneralItalic")
# Computer Modern: right for ASCII only, beyond it TeX's own encoding poses as Unicode
_ASCII_ONLY = ("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10")
_FONTS = _DEJAVU + _STIX + _ASCII_ONLY
_LEAST_FONTS = 8  # DejaVu Sans and Serif, 4 styles each, are the only ones with the old Georgian alphabets

# Scripts, as the first word of a character's Unicode name, in the order in which they claim characters that look alike.
SCRIPTS: dict[str, Split] = {
    "LATIN": "train",
    "DIGIT": "train",
    "GREEK": "train",
    "CYRILLIC": "val",
    "ARMENIAN": "test",
    "GEORGIAN": "test",
}

_SUPERSAMPLING = 4
_EM = 96  # font size rendered at, in pixels
_CAPITAL = 18.0  # height of a capital H in the 28 x 28 frame, in pixels
_REACH = 13.0  # how far a character may reach from the middle of the frame, in pixels
_ROTATION, _SHEAR, _STRETCH, _SHIFT = math.radians(15), 0.25, 0.15, 2.0  # largest distortions; the last in pixels
_ALIKE = 0.02  # |a - b|^2 / (|a|^2 + |b|^2) of two frames below which the eye finds no difference at this size


@dataclass(eq=False)
class Glyphs(FewShotImages):
    """Letters and digits of five scripts, 28 x 28, ink 1 on paper 0, 20 examples a class.

    The characters are those that at least 8 of the 21 text fonts of matplotlib have (12 DejaVu, 4 STIX, 5 Computer
    Modern). Those that look alike at this size, such as Latin A, Greek Alpha and Cyrillic A, are one class, which is of
    the first of its scripts in the order of ``SCRIPTS``. An example is drawn from one of the fonts, in turn, and
    turned (up to 15 degrees), sheared, stretched and moved at random; size tells o from O, as all characters of a font
    are drawn to one scale, except those too large for the frame. Nothing depends on anything but the fonts.

    Splits, by script, so that no script that is tested on was trained on: 1,100 classes for meta-training (Latin 869,
    Greek 221, digits 10), 143 for meta-validation (Cyrillic), 185 for meta-testing (Georgian 119, Armenian 66), counted
    with matplotlib 3.11. ``data_root`` is not used.
    """

    name: ClassVar[str] = "glyphs"
    licence: ClassVar[str] = "rendered here from the free fonts that come with matplotlib"
    image_shape: ClassVar[tuple[int, int, int]] = (1, _SIZE, _SIZE)

    def source_key(self) -> str:
        """The fonts' checksums, so that it is the same on every machine."""
        sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in _font_files().values()]
        return " ".join([str(_RECIPE), *sums])

    def build(self) -> ExampleSet:
        """Renders all classes, in the order of their scripts and code points."""
        drawn = _draw_all()
        names: list[str] = []
        pixels: list[Pixels] = []
        for members in _classes(drawn):
            character = members[0]
            names.append(unicodedata.name(character))
            shapes = list(drawn[character].values())
            pixels += [
                _distort(shapes[example % len(shapes)], stream("glyphs", character, example))
                for example in range(EXAMPLES)
            ]
        return ExampleSet(np.stack(pixels), tuple(names), np.full(len(names), EXAMPLES, np.int64))

    def split_groups(self, names: Sequence[str], split: Split) -> NDArray[np.int64]:
        """The classes of the scripts of ``split``."""
        return np.array([place for place, name in enumerate(names) if SCRIPTS[name.split()[0]] == split], np.int64)


@dataclass(frozen=True)
class _Shape:
    """A character of one font, cut out to its ink."""

    ink: Image.Image
    scale: float
    """Size in the frame, in pixels, of one pixel of ``ink``."""


def _font_files() -> dict[str, Path]:
    """The fonts' files by name.

    Raises:
        DataError: this matplotlib comes without one of them.
    """
    import matplotlib  # slow to import, and only needed where glyphs are rendered

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = {font: folder / f"{font}.ttf" for font in _FONTS}
    for file in files.values():
        if not file.is_file():
            raise DataError(
                f"matplotlib {matplotlib.__version__} lacks the font {file}, which the glyphs are rendered "
                f"from: install matplotlib anew"
            )
    return files


def _script(character: str) -> str:
    """The first word of a character's Unicode name."""
    return unicodedata.name(character).split()[0]


def _characters(font: str, file: Path) -> Iterator[str]:
    """The letters and digits of our scripts that a font has."""
    with TTFont(file, lazy=True) as opened:
        codes = sorted(opened.getBestCmap() or {})
    for character in map(chr, codes):
        category = unicodedata.category(character)
        wanted = category in ("Lu", "Ll", "Lt", "Lo", "Nd")  # Lm, modifier letters, are small copies of others
        if wanted and _script(character) in SCRIPTS and (character.isascii() or font not in _ASCII_ONLY):
            yield character


def _draw_all() -> dict[str, dict[str, _Shape]]:
    """Every character that enough fonts have, in the order of scripts and code points, as each font draws it."""
    drawn: defaultdict[str, dict[str, _Shape]] = defaultdict(dict)
    for font, file in _font_files().items():
        # the basic layout engine is in every build of Pillow
        face = ImageFont.truetype(file, _EM, layout_engine=ImageFont.Layout.BASIC)
        scale = _CAPITAL / _cut_out(face, "H").height
        for character in _characters(font, file):
            ink = _cut_out(face, character)
            if ink.width and ink.height:
                drawn[character][font] = _Shape(ink, scale)
    order = sorted(drawn, key=lambda character: (list(SCRIPTS).index(_script(character)), character))
    return {character: drawn[character] for character in order if len(drawn[character]) >= _LEAST_FONTS}


def _cut_out(face: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """The ink of a character, 255 on 0, without margins; 0 x 0 where it has none."""
    left, top, right, bottom = face.getbbox(character)
    canvas = Image.new("L", (math.ceil(right - left) + 2, math.ceil(bottom - top) + 2))
    ImageDraw.Draw(canvas).text((1 - left, 1 - top), character, fill=255, font=face)
    return canvas.crop(canvas.getbbox() or (0, 0, 0, 0))


def _into_frame(shape: _Shape, matrix: NDArray[np.float64], shift: NDArray[np.float64]) -> Pixels:
    """A character in the frame: uint8 [28, 28].

    Args:
        shape: the character.
        matrix: 2 x 2, what is done to (x, y) about the character's middle, less the scale of its font.
        shift: where its middle goes, in pixels from the middle of the frame, as a part of the room that it leaves.
    """
    size = np.array(shape.ink.size, float)
    forward = matrix * shape.scale
    reach = np.abs(forward) @ (size / 2)  # of the corners, in x and y
    forward *= min(1.0, _REACH / reach.max())
    room = np.minimum(_SHIFT, _SIZE / 2 - np.minimum(reach, _REACH))
    # Pillow wants the way back, from a pixel of the finely sampled frame to one of the character
    back = np.linalg.inv(forward * _SUPERSAMPLING)
    origin = size / 2 - back @ ((_SIZE / 2 + shift * room) * _SUPERSAMPLING)
    coefficients = (back[0, 0], back[0, 1], origin[0], back[1, 0], back[1, 1], origin[1])
    fine = (_SIZE * _SUPERSAMPLING, _SIZE * _SUPERSAMPLING)
    return np.asarray(
        shape.ink.transform(fine, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR).reduce(
            _SUPERSAMPLING
        )
    )


def _distort(shape: _Shape, rng: np.random.Generator) -> Pixels:
    """One example: the character turned, sheared, stretched and moved at random."""
    angle, shear = rng.uniform(-_ROTATION, _ROTATION), rng.uniform(-_SHEAR, _SHEAR)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    stretch = np.diag(np.exp(rng.uniform(-_STRETCH, _STRETCH, 2)))
    return _into_frame(shape, turn @ np.array([[1.0, shear], [0.0, 1.0]]) @ stretch, rng.uniform(-1, 1, 2))


def _classes(drawn: dict[str, dict[str, _Shape]]) -> list[list[str]]:
    """Groups the characters that look alike in at least half of the fonts that have both, in the given order."""
    characters = list(drawn)
    alike = np.zeros((len(characters), len(characters)), np.int64)
    shared = np.zeros_like(alike)
    for font in _FONTS:
        has = np.array([place for place, character in enumerate(characters) if font in drawn[character]])
        frames = np.stack([_into_frame(drawn[characters[place]][font], np.eye(2), np.zeros(2)) for place in has])
        # whole numbers below 2**53: the same on every machine, in whatever order they are summed
        ink = frames.reshape(len(has), -1).astype(np.float64)
        energy = (ink**2).sum(1)
        both = energy[:, None] + energy
        alike[np.ix_(has, has)] += both - 2 * ink @ ink.T < _ALIKE * both
        shared[np.ix_(has, has)] += 1
    same = (2 * alike >= shared) & (shared > 0)
    first = np.arange(len(characters))  # of the group that each is in
    for place in range(len(characters)):
        for other in np.flatnonzero(same[place, :place]):
            first[first == max(first[place], first[other])] = min(first[place], first[other])
    return [[characters[member] for member in np.flatnonzero(first == leader)] for leader in np.unique(first)]
