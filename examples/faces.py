"""Telling unseen people apart by one photograph of each: an image folder in which people are the classes.

python examples/faces.py [FOLDER [KNOWN UNKNOWN]]

FOLDER has one folder of photographs for each person to learn from (any size, 6 photographs or more); KNOWN one for each
of up to five new people; UNKNOWN the photographs to find them in. Without folders, faces are drawn: the same from run
to run, and no more than a stand-in for photographs.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import distmeta
from distmeta.adaptation import adapt_files

SETTINGS = [
    "tasks.size=32", "model.filters=16", "train.steps=40", "train.meta_batch_size=4", "validation.every=20",
    "validation.tasks=20", "evaluation.tasks=50", "evaluation.baselines=false", "scaling.num_workers=0",
]  # fmt: skip


def draw(person: int, photograph: int) -> Image.Image:
    """A face: its features are the person's, its pose and light the photograph's."""
    who, how = np.random.default_rng(person), np.random.default_rng((person, photograph))
    skin, hair = who.integers(90, 240, 3), who.integers(0, 160, 3)
    wide, tall, eyes, mouth, fringe = who.uniform((24, 30, 6, 6, 2), (34, 42, 14, 16, 18))
    light, x, y = how.uniform((0.8, 44, 46), (1.15, 56, 54))
    shade = [tuple(int(v) for v in np.clip(colour * light, 0, 255)) for colour in (skin, hair)]
    picture = Image.new("RGB", (100, 110), tuple(int(v) for v in how.integers(120, 200, 3)))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((x - wide - 3, y - tall - 6, x + wide + 3, y + tall), fill=shade[1])
    pen.ellipse((x - wide, y - tall + fringe, x + wide, y + tall), fill=shade[0])
    for side in (-eyes, eyes):
        pen.ellipse((x + side - 4, y - 8, x + side + 4, y - 2), fill="white", outline="black")
    pen.line((x, y, x, y + 8), fill="black", width=2)
    pen.line((x - mouth, y + 18, x + mouth, y + 18), fill=(160, 30, 40), width=4)
    return picture.rotate(float(how.uniform(-12, 12)), fillcolor=picture.getpixel((0, 0)))


def draw_people(folder: Path, people: range, photographs: range) -> Path:
    """A folder of people."""
    for person in people:
        place = folder / f"person {person}"
        place.mkdir(parents=True)
        for photograph in photographs:
            draw(person, photograph).save(place / f"{photograph}.jpg")
    return folder


def main(folder: Path, known: Path, unknown: Path) -> None:
    run = distmeta.train("image-folder-5way-1shot-protonet", f"tasks.path={folder}", *SETTINGS)
    found = adapt_files(run, known, unknown, run.path / "identified")
    for name, person, probability, *_ in found.rows[:5]:
        print(f"{name}: {person} ({float(probability):.0%})")
    for score, value in found.scores.items():
        print(f"{score} {value:.0%} on {len(found.rows)} photographs of people never trained on")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        main(*map(Path, sys.argv[1:]))
    else:
        with tempfile.TemporaryDirectory() as drawn:
            faces = Path(sys.argv[1]) if len(sys.argv) == 2 else draw_people(Path(drawn, "faces"), range(40), range(8))
            known = draw_people(Path(drawn, "known"), range(100, 105), range(1))
            main(faces, known, draw_people(Path(drawn, "unknown"), range(100, 105), range(1, 7)))
