"""Mutated inputs: each is refused with one clear message and exit code 2, or means what it says. Nothing else.

A few hundred examples each in CI; thousands with ``python -m pytest tests/test_fuzz.py --hypothesis-profile=long``.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import distmeta
from distmeta import RunFolder, checkpoint
from distmeta.checkpoint import Checkpoint
from distmeta.config import Config, load, packaged
from distmeta.errors import CheckpointError, DataError, DistmetaError
from distmeta.experiment import assemble, complete
from distmeta.report import status
from distmeta.tasks import cifar, omniglot
from distmeta.tasks.pictures import character_pixels, folder_of_images, to_floats
from distmeta.tasks.tables import Text, texts
from distmeta.tasks.text import OwnText


def outcome(call: Callable[[], Any], names: Sequence[str] = ()) -> Any:
    """What ``call`` returns, or the error with which it refuses; anything else fails the test."""
    try:
        return call()
    except DistmetaError as error:
        assert error.exit_code == 2, error
        assert str(error).strip()
        assert "\n" not in str(error) or any("\n" in name for name in names), repr(str(error))
        return error


# Damage of files

PIECES = [b"", b"\0", b"\xff\xfe", b"\n", b'"', b"{", b"[" * 2000, b"}", b"NaN", b"1e999", b"null", b"-1", b",", b": "]
PIECES += [b"\xef\xbb\xbf", "ÿ\u2028".encode(), b"!!python/name:os.system", b"&a *a", b"${oc.env:HOME}", b"0" * 5000]
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "splice", "double", "zero"]),
        st.floats(0, 1), st.floats(0, 0.2), st.sampled_from(PIECES),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


def mutate(data: bytes, mutations: list[tuple[str, float, float, bytes]]) -> bytes:
    """``data`` with damage at the places given, as fractions of its length."""
    for way, where, width, piece in mutations:
        at = min(int(where * len(data)), max(0, len(data) - 1))
        end = min(len(data), at + max(1, int(width * len(data))))
        if way == "flip" and data:
            data = data[:at] + bytes([data[at] ^ 1 << len(piece) % 8]) + data[at + 1 :]
        elif way == "cut":
            data = data[:at] if width < 0.1 else data[:at] + data[end:]
        elif way == "splice":
            data = data[:at] + piece + data[at:]
        elif way == "double":
            data = data[:end] + data[at:]
        else:
            data = data[:at] + bytes(end - at) + data[end:]
    return data


# Configurations

SECTIONS = {name: fields for name, fields in Config().model_dump().items() if isinstance(fields, dict)}
KEYS = sorted({f"{section}.{key}" for section, fields in SECTIONS.items() for key in fields} | set(Config.model_fields))
KEYS += ["tasks.ways", "tasks.shots", "model.filters", "algorithm.inner_lr", "algorithm.inner_steps", "train.stepz"]
KEYS += ["outer.schedule.use", "outer.schedule.T_max", "outer.options.betas", "outer.trust_region.max_kl", "a.b.c"]
KEYS += ["scaling.resources.a", "tasks..", ".", "tasks.use.x", "train.steps.x"]
ODD = """null true no nan .inf -1 0 1 2.5 1e-3 1_000 0x10 0o7 1e400 [] {} [1,2] {use:maml} maml SGD x:y os:system ${
??? builtins:exec ${train.steps} ${nope} ${oc.env:HOME} !!python/object:os.system &a *a % @
` ' " auto 1970-01-01 12:30:00 ℵ"""
VALUES = st.one_of(
    st.sampled_from([*ODD.split(), "", "{a: 1}", "{use: maml}", "9" * 400, "\x00", "\ud800", "- -", "? a"]),
    st.integers().map(str), st.floats().map(str), st.text(max_size=8),
)  # fmt: skip


@settings(max_examples=settings().max_examples * 4)
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
def test_overrides(pairs: list[tuple[str, str]]) -> None:
    overrides = [f"{key}={value}" for key, value in pairs]
    found = outcome(lambda: complete(load(None, overrides)))
    if not isinstance(found, Config):
        return
    plain = found.model_dump(mode="json")
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    assert load(yaml.safe_load(text)).model_dump(mode="json") == plain, "config.yaml says what was meant"
    last = dict(pairs)
    for key, kind in (("train.steps", int), ("seed", int), ("train.shard_size", int), ("outer.lr", float)):
        if key in last and not any(other in last for other in key.split(".")[:-1]):
            asked = yaml.safe_load(last[key])
            got = found.seed if key == "seed" else getattr(getattr(found, key.split(".")[0]), key.split(".")[1])
            if not isinstance(asked, str):
                assert not isinstance(asked, bool), f"{key}={asked} was taken as a number"
                assert got == kind(asked), (key, asked, got)


@given(st.sampled_from(["glyphs-5way-1shot-maml", "navigation-maml-trpo", "sinusoid-maml"]), MUTATIONS)
def test_configuration_files(tmp_path_factory: pytest.TempPathFactory, name: str, mutations: list) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.yaml"
    path.write_bytes(mutate(packaged()[name].read_bytes(), mutations))
    found = outcome(lambda: complete(load(path)))
    if isinstance(found, Config):
        plain = found.model_dump(mode="json")
        assert load(plain).model_dump(mode="json") == plain


# Checkpoints and run folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(1)
    checkpoint.save(folder, 3, Checkpoint({"w": torch.randn(40)}, {"0.m": torch.randn(40)}, {"outer": {"x": [1.5]}}))
    return checkpoint.path_of(folder, 3)


@given(st.sampled_from(["meta.safetensors", "outer.safetensors", "state.json"]),
       st.sampled_from(["mutate", "mutate", "mutate", "remove", "folder", "swap", "empty"]), MUTATIONS)  # fmt: skip
def test_checkpoints(saved: Path, name: str, way: str, mutations: list) -> None:
    """What can be read is what was written."""
    copy = saved.parent.parent / "mutated" / saved.name
    shutil.rmtree(copy.parent, ignore_errors=True)
    shutil.copytree(saved, copy)
    file = copy / name
    data = file.read_bytes()
    file.unlink()
    if way == "folder":
        file.mkdir()
    elif way == "mutate":
        file.write_bytes(mutate(data, mutations))
    elif way == "swap":
        shutil.copy(saved / ("meta.safetensors" if name != "meta.safetensors" else "outer.safetensors"), file)
    elif way == "empty":
        file.touch()
    found, whole = outcome(lambda: checkpoint.load(copy)), checkpoint.load(saved)
    if not isinstance(found, CheckpointError):
        assert torch.equal(found.params["w"], whole.params["w"]) and found.state == whole.state
        assert torch.equal(found.tensors["0.m"], whole.tensors["0.m"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return distmeta.train(
        "sinusoid-maml", "model.hidden=[4]", "train.steps=4", "train.log_every=2", "checkpoint.every=2",
        "validation.every=2", "validation.tasks=2", "evaluation.tasks=2", "scaling.num_workers=0",
        f"run_dir={tmp_path_factory.mktemp('runs') / 'run'}",
    )  # fmt: skip


@given(st.sampled_from(["config.yaml", "metrics.jsonl", "summary.json"]), MUTATIONS)
def test_run_folders(finished: RunFolder, name: str, mutations: list) -> None:
    file, summary = finished.path / name, (finished.path / "summary.json").read_bytes()
    data = file.read_bytes()
    try:
        file.write_bytes(mutate(data, mutations))
        found = outcome(lambda: status(finished))
        assert isinstance(found, str | DistmetaError)
        outcome(lambda: finished.summary())
        outcome(lambda: finished.forget_after(2))
        outcome(lambda: assemble(finished.config(), prepare=False))
    finally:
        file.write_bytes(data)
        (finished.path / "summary.json").write_bytes(summary)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 10**20), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


STATE = ["step", "optimizer", "state", "param_groups", "schedule", "metric", "value", "0.step"]


@given(st.sampled_from(["outer", "best", "constants"]), st.lists(st.sampled_from(STATE), max_size=2), JSON)
def test_states_with_checksums_that_fit(finished: RunFolder, part: str, path: list[str], value: Any) -> None:
    """A checkpoint made by somebody else: anything may stand in it, and it is refused or gone on from."""
    from distmeta.training import Training

    whole = finished.checkpoint("4")
    state = json.loads(json.dumps(whole.state))
    place = state
    for key in [part, *path][:-1]:
        inner = place.get(key) if isinstance(place, dict) else None
        place = inner if isinstance(inner, dict) else place
    place[[part, *path][-1]] = value
    folder = finished.path.parent / "other"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished.path, folder, ignore=shutil.ignore_patterns("step-*", "report", "tensorboard"))
    run = RunFolder(folder)
    checkpoint.save(run.checkpoints, 4, Checkpoint(whole.params, whole.tensors, state))

    outcome(lambda: run.checkpoint("best"))

    def go_on() -> None:
        with Training(assemble(run.config(["train.steps=5", "validation.every=1"]))) as training:
            training.restore(run, run.checkpoint())
            training.fit(run, lambda step, evaluation: None)

    outcome(go_on)


# A user's data


def drawing(size: int = 20) -> Image.Image:
    picture = Image.new("L", (size, size), 255)
    picture.paste(0, (size // 4, 2, size // 3, size - 2))
    return picture


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    drawing().save(file, kind)
    return file.getvalue()


PICTURES = {kind: encoded(kind) for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp")}
NAMES = st.one_of(st.sampled_from(["a.png", "b", ".hidden", "-x", "a b.png", "ÿ.png", "%s", "a\nb.png", "$(id)"]),
                  st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8)
                  .filter(lambda name: name not in (".", "..") and len(name.encode()) < 200))  # fmt: skip


def read_drawing(path: Path) -> torch.Tensor:
    return to_floats(character_pixels(path, 28)[None])[0]


@given(st.dictionaries(NAMES, st.one_of(
    st.tuples(st.sampled_from(sorted(PICTURES)), st.one_of(st.none(), MUTATIONS)),
    st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(PICTURES)), st.one_of(st.none(), MUTATIONS)), max_size=3),
    st.sampled_from(["link", "loop", "dangling"]),
), max_size=3))  # fmt: skip
def test_trees_of_pictures(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    folder = tmp_path_factory.getbasetemp() / "tree"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def write(place: Path, content: Any) -> None:
        if isinstance(content, dict):
            place.mkdir()
            for name, inner in content.items():
                write(place / name, inner)
        elif isinstance(content, str):
            place.symlink_to({"link": "/etc", "loop": ".", "dangling": "nowhere"}[content])
        else:
            kind, mutations = content
            place.write_bytes(mutate(PICTURES[kind], mutations) if mutations else PICTURES[kind])

    for name, content in tree.items():
        write(folder / name, content)
    names = [*tree, *(inner for content in tree.values() if isinstance(content, dict) for inner in content)]
    found = outcome(lambda: folder_of_images(folder, read_drawing), names)
    if not isinstance(found, DistmetaError):
        assert found.x.shape[1:] == (1, 28, 28) and found.x.min() >= 0 and found.x.max() <= 1


TABLE = "text,label\n" + "".join(f'"a, b {i} ÿ",{"xy"[i % 2]}\nword{i},z\n' for i in range(6))
LINES = "".join(json.dumps({"text": f"a b {i}", "label": "xyz"[i % 3]}) + "\n" for i in range(9))


@given(st.sampled_from([("a.csv", TABLE), ("a.tsv", TABLE.replace(",", "\t")), ("a.jsonl", LINES), ("a.txt", LINES)]),
       MUTATIONS, st.booleans())  # fmt: skip
def test_texts(
    tmp_path_factory: pytest.TempPathFactory, file: tuple[str, str], mutations: list, labelled: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / file[0]
    content = mutate(file[1].encode(), mutations)
    path.write_bytes(content)
    found = outcome(lambda: list(texts(path, "text", "label", labelled=labelled)))
    if isinstance(found, list):
        assert all(isinstance(one, Text) for one in found)
        plain = content.decode("utf-8-sig")
        assert all(line in plain for one in found for line in one.text.split("\n") if path.suffix == ".txt")
    outcome(lambda: OwnText(ways=2, shots=1, queries=1, path=str(path)).prepare())


@given(st.lists(st.tuples(st.text(max_size=9), st.text(max_size=3)), min_size=1, max_size=5))
def test_what_is_written_as_a_table_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    rows = [tuple(cell.encode("utf-8", "ignore").decode() for cell in row) for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    found = outcome(lambda: list(texts(path, "text", "label", labelled=True)))
    if isinstance(found, list):
        assert [(one.text, one.label) for one in found] == rows


# Archives


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Omniglot's structure with two characters."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for character in (1, 2):
            for drawer in range(1, 21):
                made.writestr(
                    f"images_background/A/character{character:02}/{character:04}_{drawer:02}.png", PICTURES["png"]
                )
    return file.getvalue()


@given(MUTATIONS)
def test_zip_archives(archive: bytes, tmp_path_factory: pytest.TempPathFactory, mutations: list) -> None:
    path = tmp_path_factory.getbasetemp() / "images_background.zip"
    path.write_bytes(mutate(archive, mutations))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(omniglot.PARTS, "images_background", omniglot.PARTS["images_background"]._replace(characters=2))

        def read() -> list[Any]:
            return [character_pixels(data, 28, label) for _, data, label in omniglot._zip_drawings(path)]

        found = outcome(read)
    if isinstance(found, list):
        expected = character_pixels(PICTURES["png"], 28)
        assert len(found) == 40 and all(np.array_equal(one, expected) for one in found)


@given(MUTATIONS)
def test_tar_archives(tmp_path_factory: pytest.TempPathFactory, mutations: list) -> None:
    path = tmp_path_factory.getbasetemp() / "cifar.tar.gz"
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as made:
        for name, size in (("train.bin", 5 * 3074), ("test.bin", 3074), ("fine_label_names.txt", 90)):
            info = tarfile.TarInfo(f"cifar-100-binary/{name}")
            info.size = size
            made.addfile(info, io.BytesIO(b"a" * size))
    inside = len(mutations) % 2  # of the compression
    packed = gzip.compress(mutate(plain.getvalue(), mutations) if inside else plain.getvalue(), 1)
    data = packed if inside else mutate(packed, mutations)
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar, "_IMAGES", {"train.bin": 5, "test.bin": 1})
        found = outcome(lambda: cifar._from_archive(path))
    assert isinstance(found, dict | DataError)
