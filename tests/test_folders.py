"""Folders of images: odd pictures, broken ones, duplicates, and the way to predictions."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from images_of_things import SIDE, fill, own, picture
from PIL import Image
from typer.testing import CliRunner

from distmeta.cli import app
from distmeta.core.seeds import stream
from distmeta.errors import ConfigError, DataError
from distmeta.tasks import cache, datasets, folders
from distmeta.tasks.folders import ImageFolder
from distmeta.tasks.pictures import photo_pixels
from distmeta.tasks.splits import SPLITS

# pictures


def test_pictures_of_any_kind_come_out_alike(tmp_path: Path) -> None:
    plain = picture(1, (32, 32)).convert("P", palette=Image.Palette.ADAPTIVE, colors=16).convert("RGB")

    def pixels(image: Image.Image, name: str, **options: Any) -> np.ndarray:
        image.save(tmp_path / name, **options)
        return photo_pixels(tmp_path / name, SIDE).astype(int)

    expected = pixels(plain, "plain.png")
    assert expected.shape == (SIDE, SIDE, 3) and expected.std() > 1
    assert np.array_equal(expected, pixels(plain.convert("P", palette=Image.Palette.ADAPTIVE), "palette.gif"))
    assert np.array_equal(expected, pixels(plain.convert("RGBA"), "alpha.png"))
    turned = plain.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    assert np.array_equal(expected, pixels(turned, "turned.png", exif=exif))
    assert np.abs(expected - pixels(plain.convert("CMYK"), "print.tif")).max() <= 1
    clear = Image.new("RGBA", (32, 32), (200, 10, 10, 0))
    assert pixels(clear, "clear.png").min() == 255, "transparency is laid on white"
    clear.putalpha(128)
    assert pixels(clear.convert("LA"), "half.png").min() > 128


@pytest.mark.parametrize("colour", [True, False])
def test_sixteen_bits_keep_their_highest_eight(colour: bool, tmp_path: Path) -> None:
    grey = np.linspace(0, 255, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "8.png")
    expected = photo_pixels(tmp_path / "8.png", SIDE, colour=colour)
    assert expected.shape == ((SIDE, SIDE, 3) if colour else (SIDE, SIDE)) and expected.max() > 240
    for name in ("16.png", "16.tif"):
        Image.fromarray(grey * 257).save(tmp_path / name)
        assert np.array_equal(expected, photo_pixels(tmp_path / name, SIDE, colour=colour))
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match=r"f.tif holds fractions instead of 8 or 16 bits"):
        photo_pixels(tmp_path / "f.tif", SIDE)


def test_oblong_pictures(tmp_path: Path) -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    wide.save(tmp_path / "wide.png")
    fits = {fit: photo_pixels(tmp_path / "wide.png", SIDE, fit=fit) for fit in ("crop", "pad", "stretch")}
    red = {fit: (pixels[:, :, 0] > 200).mean() for fit, pixels in fits.items()}
    assert red["crop"] < 0.1 and 0.1 < red["pad"] < 0.3 and 0.5 < red["stretch"] < 0.8
    assert not fits["pad"][0].any() and fits["stretch"][0].any()


# what is in a folder


def test_a_folder_of_classes(things: Path) -> None:
    (things / ".DS_Store").write_text("")
    (things / "klaß 3" / "deeper").mkdir()
    picture(399).save(things / "klaß 3" / "deeper" / "ünï.PNG")
    tasks = own(things)
    tasks.prepare()
    assert tasks.dataset.examples.shape == (49, SIDE, SIDE, 3) and tasks.dataset.examples.dtype == np.uint8
    assert sorted(tasks.dataset.counts.tolist()) == [4] * 11 + [5]
    at = tasks.dataset.names.index("klaß 7")
    rows = tasks.dataset.examples[tasks.dataset.starts[at] :][:4]
    assert np.array_equal(rows[2], photo_pixels(things / "klaß 7" / "2.png", SIDE))
    assert {name for split in SPLITS for name in tasks.divide(tasks.dataset.names)[split]} == set(tasks.dataset.names)
    (x, y), (query, _) = tasks.sample(stream(0), "train")
    assert x.shape == (2, 3, SIDE, SIDE) and query.shape == (4, 3, SIDE, SIDE) and y.tolist() in ([0, 1], [1, 0])
    grey = own(things, colour=False)
    assert grey.sample(stream(0), "train").support_set[0].shape == (2, 1, SIDE, SIDE) and grey.spec.input_shape[0] == 1


def test_no_worker_has_a_copy(things: Path) -> None:
    """What is sent to workers is small; what they open is the file, of which they copy an episode."""
    tasks = own(things)
    tasks.prepare()
    blob = pickle.dumps(tasks)
    assert len(blob) < 2000
    copy: ImageFolder = pickle.loads(blob)
    expected = tasks.sample(stream(1), "test")
    things.rename(things.with_name("gone"))  # a worker never looks at the files
    assert all(
        torch.equal(a, b) for a, b in zip(copy.sample(stream(1), "test").query_set, expected.query_set, strict=True)
    )
    base: Any = copy.dataset.examples
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap) or type(base).__name__ == "mmap"


def test_pieces_make_the_whole(things: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = own(things).dataset
    monkeypatch.setenv("DISTMETA_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(folders, "_BLOCK", 3)
    monkeypatch.setattr(cache, "_WHOLE", 1 << 12)  # as if the array were large
    monkeypatch.setattr(cache, "_PIECE", 1 << 10)
    pieces = own(things).dataset
    assert np.array_equal(whole.examples, pieces.examples) and whole.names == pieces.names
    damaged = next((tmp_path / "other").glob("*.npy"))
    damaged.write_bytes(damaged.read_bytes()[:-5])
    assert np.array_equal(own(things).dataset.examples, whole.examples), "it is built anew"


def test_the_cache_follows_the_files(things: Path) -> None:
    keys = [own(things)._key, own(things, size=20)._key, own(things, colour=False)._key, own(things, ways=5)._key]
    (things / "klaß 0" / "0.png").unlink()
    keys.append(own(things)._key)
    assert keys[0] == keys[3] and len(set(keys)) == 4


def test_broken_files_are_named(things: Path, caplog: pytest.LogCaptureFixture) -> None:
    (things / "klaß 0" / "empty.jpg").write_bytes(b"")
    whole = (things / "klaß 1" / "0.png").read_bytes()
    (things / "klaß 1" / "half.png").write_bytes(whole[: len(whole) // 2])
    (things / "klaß 2" / "text.webp").write_text("not an image")
    (things / "klaß 2" / "notes.txt").write_text("no image by its name")
    with pytest.raises(DataError, match="3 files cannot be read as images in ") as error:
        own(things).prepare()
    for name in ("klaß 0/empty.jpg", "klaß 1/half.png", "klaß 2/text.webp", "tasks.skip_corrupt=true"):
        assert name in str(error.value)
    assert "\n" not in str(error.value)
    caplog.clear()
    tasks = own(things, skip_corrupt=True)
    tasks.prepare()
    assert len(tasks.dataset.examples) == 48
    said = " ".join(caplog.messages)
    assert "3 files cannot be read as images" in said and "left out" in said and "notes.txt" in said


def test_small_classes_are_named_or_left_out(things: Path, caplog: pytest.LogCaptureFixture) -> None:
    (things / "nobody").mkdir()
    fill(things, ["one image"], images=1, first=50)
    everyone = {split: own(things).divide(sorted(path.name for path in things.iterdir()))[split] for split in SPLITS}
    with pytest.raises(DataError) as error:
        own(things, fractions=(0.5, 0.25, 0.25), split_seed=3).prepare()
    assert "one image" in str(error.value) or "nobody" in str(error.value)
    tasks = own(things, skip_small=True)
    tasks.prepare()
    assert "2 classes have too few images and are left out: nobody (0), one image (1)" in caplog.text
    for split in SPLITS:
        names = {tasks.dataset.names[group] for group in tasks.members[split]}
        assert names == everyone[split] - {"nobody", "one image"}, "leaving classes out moves no other class"
    more = own(things, skip_small=True, shots=2)
    for split in SPLITS:
        assert set(more.members[split]) <= set(tasks.members[split])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, r"there is no folder .*data"),
        (lambda folder: folder.write_text(""), r"data is not a folder"),
        (lambda folder: folder.mkdir(), r"data holds no folders"),
        (lambda folder: (fill(folder, ["a"]), picture(0).save(folder / "x.png")), r"images beside folders \(x.png\)"),
        (lambda folder: fill(folder, ["a", "b", "c"]), r"fewer than the 2 ways .* or change tasks.fractions"),
    ],
)
def test_broken_folders_are_named(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        own(tmp_path / "data").prepare()


def test_settings_out_of_range(things: Path) -> None:
    with pytest.raises(ConfigError, match=r"tasks.fractions are \(0.9, 0.2, 0.1\)"):
        own(things, fractions=(0.9, 0.2, 0.1))
    with pytest.raises(ConfigError, match=r"tasks.size must be at least 1"):
        own(things, size=0)
    with pytest.raises(DataError, match=r"tasks.split_file: there is no file or folder .*gone.csv"):
        own(things, split_file=str(things / "gone.csv")).prepare()


@settings(max_examples=25)
@given(st.data())
def test_images_of_test_classes_are_in_no_training_task(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """The whole way: files to episodes; each image says its class."""
    folder = tmp_path_factory.mktemp("random")
    classes = data.draw(st.integers(6, 12))
    for number in range(classes):
        (folder / f"c{number}").mkdir()
        for k in range(data.draw(st.integers(2, 3))):
            Image.new("L", (8, 8), 20 * number + k).save(folder / f"c{number}" / f"{k}.png")
    tasks = own(
        folder, colour=False, size=8, queries=1, split_seed=data.draw(st.integers(0, 99)), fractions=(0.4, 0.3, 0.3)
    )
    try:
        tasks.prepare()
    except DataError as error:
        assert "fewer than the 2 ways" in str(error)
        return
    seen: dict[str, set[int]] = {}
    for split in SPLITS:
        episodes = [tasks.sample(stream(seed), split) for seed in range(20)]
        values = torch.cat([x for episode in episodes for x in (episode.support_set[0], episode.query_set[0])])
        seen[split] = {round(float(value) * 255) // 20 for value in values[:, 0, 0, 0]}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"] and not seen["val"] & seen["test"]


def test_equal_images_are_told(things: Path, caplog: pytest.LogCaptureFixture) -> None:
    own(things).prepare()
    assert not caplog.messages
    names = sorted(path.name for path in things.iterdir())
    division = own(things).divide(names)
    train, test = sorted(division["train"])[0], sorted(division["test"])[0]
    os.link(things / train / "0.png", things / test / "copy.png")
    Image.open(things / train / "1.png").save(things / train / "again.bmp")  # the same pixels from another file
    with caplog.at_level(logging.WARNING):
        own(things).prepare()
    across, within = sorted(caplog.messages, key=lambda line: "more than once" in line)
    assert (
        f"1 image stands in classes of two splits, so that unseen classes are not wholly unseen: {test}/copy.png (test)"
        in across
    )
    assert f"{train}/0.png (train)" in across
    assert f"1 image stands more than once in a class: {train}/1.png and {train}/again.bmp" in within


def test_large_classes_are_drawn_from_without_ordering_them(monkeypatch: pytest.MonkeyPatch, things: Path) -> None:
    tasks = own(things, queries=3)
    monkeypatch.setattr(datasets, "_LARGE_CLASS", 3)
    for seed in range(20):
        (x, _), (query, _) = tasks.sample(stream(seed), "train")
        assert len(torch.cat([x, query]).flatten(1).unique(dim=0)) == 8, "all images of both classes, each once"


# the command line


def test_command_line_from_training_to_predictions(things: Path, tmp_path: Path) -> None:
    def run(*words: object) -> str:
        done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exit_code == 0, done.output
        return done.output

    options = [f"path={things}", f"size={SIDE}", "ways=2", "queries=2"]
    card = run("data", "image_folder", *options)
    assert "image_folder is complete: 48 images of 12 classes (train 7, val 2, test 3)" in card
    assert "train 7 classes of 4, 28 in all" in card and "sha256 of the lists of each split: " in card
    settings = [*(f"tasks.{option}" for option in options), f"run_dir={tmp_path / 'run'}", "model.filters=4"]
    settings += ["train.steps=3", "train.meta_batch_size=2", "validation.every=0", "evaluation.tasks=5"]
    run("train", "image-folder-5way-1shot-protonet", *settings, "scaling.num_workers=0")
    fill(tmp_path / "mine", ["left", "right"], images=2, first=70)
    fill(tmp_path / "asked", ["left", "right"], images=2, first=70)
    files = ["--support", tmp_path / "mine", "--query", tmp_path / "asked", "--out", tmp_path / "out"]
    assert re.search(r"accuracy \d+.* of 4 whose truth is given", run("adapt", tmp_path / "run", *files))
    assert (tmp_path / "out" / "predictions.csv").read_text().count("right/0.png,") == 1
    failed = CliRunner().invoke(app, ["data", "image_folder", f"path={tmp_path / 'nowhere'}"])
    assert failed.exit_code == 2 and f"there is no folder {tmp_path / 'nowhere'}" in failed.output
