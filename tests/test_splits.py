"""The splits of a folder of images: by sub-folders, by files that name them, and by fractions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from images_of_things import fill, own, picture

from distmeta.errors import DataError
from distmeta.tasks.splits import SPLITS, by_fractions


def test_subfolders_are_the_splits(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "valid", "Test")):
        fill(tmp_path / "data" / split, [f"{split}{k}" for k in range(3)], first=10 * number)
    tasks = own(tmp_path / "data")
    tasks.prepare()
    assert {split: [tasks.dataset.names[g] for g in tasks.members[split]] for split in SPLITS} == {
        "train": ["train/train0", "train/train1", "train/train2"],
        "val": ["val/valid0", "val/valid1", "val/valid2"],
        "test": ["test/Test0", "test/Test1", "test/Test2"],
    }
    fill(tmp_path / "data" / "Test", ["train1"])
    with pytest.raises(DataError, match=r"the class train1 of .* is both in train and in test: few-shot tasks are of"):
        own(tmp_path / "data").prepare()


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "data" / "train", ["a", "b"])
    fill(tmp_path / "data" / "test", ["c", "d"])
    with pytest.raises(DataError, match="has no folder val beside test, train: move some classes there"):
        own(tmp_path / "data").prepare()


DIVISION = {"train": ["klaß 0", "klaß 5"], "val": ["klaß 1", "klaß 2"], "test": ["klaß 9", "klaß 3"]}


def as_json(folder: Path) -> Path:
    (folder / "split.json").write_text(json.dumps(DIVISION), "utf-8")
    return folder / "split.json"


def as_class_table(folder: Path) -> Path:
    lines = [f"{name},{split}" for split, names in DIVISION.items() for name in names]
    (folder / "split.csv").write_bytes(("\ufeffclass,split\r\n" + "\r\n".join(lines) + "\r\n").encode())
    return folder / "split.csv"


def as_file_table(folder: Path) -> Path:
    synonym = {"train": "base", "val": "validation", "test": "Novel"}
    lines = [
        f'"{k}.png",{name},{synonym[split]}' for split, names in DIVISION.items() for name in names for k in range(4)
    ]
    (folder / "files.csv").write_text("filename,label,split\n" + "\n".join(lines), "utf-8")
    return folder / "files.csv"


def as_paths(folder: Path) -> Path:
    lines = [f"{name}/{k}.png\t{split}" for split, names in DIVISION.items() for name in names for k in range(4)]
    (folder / "files.tsv").write_text("path\tsplit\n" + "\n".join(lines), "utf-8")
    return folder / "files.tsv"


def as_three_tables(folder: Path) -> Path:
    (folder / "tables").mkdir()
    for split, names in DIVISION.items():
        lines = [f"{k}.png,{name}" for name in names for k in range(4)]
        (folder / "tables" / f"{split}.csv").write_text("filename,label\n" + "\n".join(lines), "utf-8")
    return folder / "tables"


@pytest.mark.parametrize("write", [as_json, as_class_table, as_file_table, as_paths, as_three_tables])
def test_split_files(write: Callable[[Path], Path], things: Path, tmp_path: Path) -> None:
    tasks = own(things, split_file=str(write(tmp_path)))
    tasks.prepare()
    found = {split: {tasks.dataset.names[g] for g in tasks.members[split]} for split in SPLITS}
    assert found == {split: {f"{split}/{name}" for name in names} for split, names in DIVISION.items()}
    assert len(tasks.dataset.examples) == 24


def test_a_split_file_may_give_the_classes_of_files_beside_each_other(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    lines = []
    for number, split in enumerate(["train", "train", "val", "val", "test", "test"]):
        for k in range(3):
            picture(100 * number + k).save(tmp_path / "flat" / f"{number}-{k}.jpg")
            lines.append(f"{number}-{k}.jpg,{number},{split}")
    (tmp_path / "flat" / "split.csv").write_text("image,label,split\n" + "\n".join(lines))
    tasks = own(tmp_path / "flat", split_file=str(tmp_path / "flat" / "split.csv"))
    tasks.prepare()
    assert tasks.dataset.names == ("test/4", "test/5", "train/0", "train/1", "val/2", "val/3")


def test_a_split_file_may_name_some_of_the_images(things: Path, tmp_path: Path) -> None:
    path = as_file_table(tmp_path)
    path.write_text(path.read_text("utf-8").replace('"3.png",klaß 0,base\n', ""), "utf-8")
    tasks = own(things, split_file=str(path))
    assert tasks.dataset.counts[tasks.dataset.names.index("train/klaß 0")] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "class,split\nklaß 0,train\nklaß 0,test\n",
            r"line 3 has the class 'klaß 0' in test, and a line before has it in",
        ),
        ("class,split\nklaß 0,train\nklaß 77,test\n", r"line 3 names the class 'klaß 77', and .* has no folder"),
        ("class,split\nklaß 0,trian\n", "line 2 has the split 'trian'; splits are called train, val, test"),
        ("class\nklaß 0\n", r"line 2 has no cell of splits \(split, set"),
        ("a,b\n1,2\n", "line 2 has neither a cell of files"),
        ("file,split\nx.png,train\n", "names 'x.png', which is not the name of a class"),
        ("file,label,split\nx.png,klaß 0,train\n", "1 files that .* names are not in .*things: x.png"),
    ],
)
def test_broken_split_files_are_named(content: str, message: str, things: Path, tmp_path: Path) -> None:
    (tmp_path / "split.csv").write_text(content, "utf-8")
    with pytest.raises(DataError, match=message):
        own(things, split_file=str(tmp_path / "split.csv")).prepare()


@given(
    units=st.lists(st.text(min_size=1), unique=True, max_size=60),
    shares=st.tuples(*[st.floats(0.05, 0.9)] * 3),
    seed=st.integers(0, 2**31),
)
def test_fractions_never_share_a_class(units: list[str], shares: tuple[float, float, float], seed: int) -> None:
    total = sum(shares)
    fractions = (shares[0] / total, shares[1] / total, shares[2] / total)
    found = by_fractions(units, fractions, seed, "any")
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == len(units)
    assert found == by_fractions(units, fractions, seed, "any")
