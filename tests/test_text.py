"""Few-shot classification of texts: readers, tokens, splits, and the way from a file to predictions."""

from __future__ import annotations

import csv
import json
import logging
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import commands
import numpy as np
import pytest
import torch

import distmeta
from distmeta.core.seeds import stream
from distmeta.errors import ConfigError, DataError
from distmeta.tasks.splits import SPLITS
from distmeta.tasks.tables import texts
from distmeta.tasks.text import Clinc150, OwnText
from distmeta.tasks.tokens import PADDING, Bytes, Words, normal, tokenizer_of

SUBJECTS = ["cats", "dogs", "rain", "snow", "bread", "cheese", "trains", "planes", "songs", "books", "rivers", "stars"]


def sentences(subject: str, count: int = 12) -> list[str]:
    """Different sentences about one thing."""
    words = "I really like seldom see often want never need some old new red".split()  # noqa: SIM905
    rng = random.Random(subject)
    return [f"{' '.join(rng.sample(words, 4))} {subject} {number}" for number in range(count)]


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def things(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "things.csv", [(text, subject) for subject in SUBJECTS for text in sentences(subject)])


def own(path: Path, **options: object) -> OwnText:
    return OwnText(**({"path": str(path), "ways": 2, "queries": 3, "fractions": (0.5, 0.25, 0.25)} | options))


# readers


def test_odd_but_right_csv(tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    content = '\ufefflabel,text\r\nü,"line one\nline ""two"", with a comma"\r\n\r\nα,  日本語 🎉 e\u0301 \r\n'
    path.write_bytes(content.encode())
    read = list(texts(path, "text", "label", labelled=True))
    assert [(r.text, r.label) for r in read] == [
        ('line one\nline "two", with a comma', "ü"),
        ("  日本語 🎉 e\u0301 ", "α"),
    ]
    assert [r.place for r in read] == [f"{path}, line 2", f"{path}, line 5"]


def test_the_same_from_every_kind_of_file(tmp_path: Path) -> None:
    rows = [(text, subject) for subject in SUBJECTS for text in sentences(subject)]
    write_csv(tmp_path / "a.csv", rows)
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "label": c}) + "\n\n" for t, c in rows))
    for number, (text, label) in enumerate(rows):
        (tmp_path / "folder" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / label / f"{number:04d}.txt").write_text(text + "\n")
    sets = [own(tmp_path / name).build() for name in ("a.csv", "a.tsv", "a.jsonl", "folder")]
    for one in sets[1:]:
        assert one.names == sets[0].names == tuple(sorted(SUBJECTS))
        assert np.array_equal(one.examples, sets[0].examples) and np.array_equal(one.counts, sets[0].counts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"", r"x\.csv is empty"),
        ("x.csv", b"text,class\na,b\n", r"x\.csv has no column 'label'; its first line names 'text', 'class'"),
        ("x.csv", b"text,label\na,b\nc\n", r"x\.csv, line 3 has 1 cells where the first line names 2 columns"),
        ("x.csv", b'text,label\na,b\n"c,d\ne,f\n', r"x\.csv, line 3 cannot be read as a record: unexpected end"),
        ("x.csv", b"text,label\na,b\n\xff\xfe,d\n", r"x\.csv, line 3 is not UTF-8 \(byte 15: 0xff\); save it as UTF-8"),
        ("x.csv", b"text,label\na,\n", r"x\.csv, line 2 has no label"),
        ("x.csv", b"text,label\n ,a\n", r"x\.csv holds no texts"),
        ("x.jsonl", b'{"text": "a", "label": "b"}\n{"text": \n', r"x\.jsonl, line 2 is no JSON: "),
        ("x.jsonl", b'{"text": "a"}\n', r"x\.jsonl, line 1 has no key 'label'; it has 'text'"),
        ("x.jsonl", b"[1, 2]\n", r"x\.jsonl, line 1 holds no object with the keys 'text', 'label'"),
        ("x.jsonl", b'{"text": ["a"], "label": "b"}\n', r"x\.jsonl, line 1 has \[\"a\"\] where a text is expected"),
        ("x.jsonl", b'{"text": null, "label": "b"}\n', r"x\.jsonl, line 1 has null where a text is expected"),
        ("x.docx", b"PK", r"x\.docx is neither a \.csv, a \.tsv nor a \.jsonl file"),
    ],
)
def test_broken_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        own(tmp_path / name).build()
    assert "\n" not in str(caught.value)


def nothing(folder: Path) -> None:
    pass


def stray(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "readme.txt").write_text("x")


def empty_class(folder: Path) -> None:
    (folder / "a").mkdir()


def other_file(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "x.pdf").write_text("x")


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (nothing, "one folder of .txt files for each class; it holds nothing"),
        (stray, r"it holds a file beside them \(readme.txt\)"),
        (empty_class, "the class folder .*a holds no .txt files"),
        (other_file, r"x\.pdf is no \.txt file"),
    ],
)
def test_broken_folders_are_named(fill: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(DataError, match=message):
        own(tmp_path).build()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tasks\.path: there is no file or folder .*nowhere\.csv"):
        own(tmp_path / "nowhere.csv").prepare()


def test_empty_and_repeated_texts_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("good", "a"), (" \n", "a"), ("GOOD ", "a"), ("ｇｏｏｄ", "a"), ("good", "b"), ("other", "b")]
    with caplog.at_level(logging.WARNING):
        found = own(write_csv(tmp_path / "x.csv", rows)).build()
    assert found.counts.tolist() == [1, 2]
    said = " ".join(caplog.messages)
    assert "1 text is empty and left out: " in said and "x.csv, line 3" in said
    assert "2 texts stand more than once in a class; one of each is taken, the first: " in said and "'GOOD'" in said


def test_a_text_in_two_splits_is_told(things: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert own(things).prepare() is None and not caplog.messages
    with things.open("a") as file:
        file.writelines(f"The same for all!,{subject}\n" for subject in SUBJECTS)
    with caplog.at_level(logging.WARNING):
        own(things).prepare()
    assert len(caplog.messages) == 1
    assert "6 texts stand in classes of two splits" in caplog.messages[0]


def test_classes_with_too_few_texts_are_named(things: Path) -> None:
    with things.open("a") as file:
        file.write("alone,single\n")
    with pytest.raises(DataError, match=r"class single of text .* has 1 examples, fewer than 1 shots \+ 3 queries"):
        own(things, fractions=(0.34, 0.33, 0.33)).prepare()


def test_a_hundred_thousand_rows(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = [f"word{number}" for number in range(5000)]
    rows = [(" ".join(rng.choices(words, k=12)), f"class{number % 100:02d}") for number in range(100_000)]
    tasks = own(write_csv(tmp_path / "large.csv", rows), fractions=(0.6, 0.2, 0.2))
    start = time.perf_counter()
    tasks.prepare()
    assert time.perf_counter() - start < 60
    assert tasks.dataset.examples.shape == (100_000, 32) and tasks.dataset.counts.tolist() == [1000] * 100
    start = time.perf_counter()
    for index in range(200):
        tasks.sample(stream(index), "train")
    assert (time.perf_counter() - start) / 200 < 0.05


# tokens


def test_words_are_hashed_alike_everywhere() -> None:
    (one,), (other,) = Words(8192)(["Don't STOP, ｆriend!"], 32), Words(8192)(["don't stop, friend!"], 32)
    assert one == other and len(one) == 7 and all(0 <= token < 8192 for token in one)
    assert Words(8192)(["stop"], 32) == [[5814]], "CRC-32 of the word, the same on every machine"
    assert Words(8192)(["a b c d"], 2) == [Words(8192)(["a"], 9)[0] + Words(8192)(["b"], 9)[0]]


def test_bytes_are_those_of_composed_utf8() -> None:
    assert Bytes()(["e\u0301a"], 9) == [[0xC3, 0xA9, ord("a")]]
    assert normal("  Ａ\t\nB ß ") == "a b ss"


def test_unknown_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'wordpieces' is not known; give words, bytes or hf:SOURCE"):
        tokenizer_of("wordpieces", 10)
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json"):
        tokenizer_of(f"hf:{tmp_path}", 10)
    with pytest.raises(ConfigError, match="the Python package 'no_such_package' is not installed"):
        tokenizer_of("hf:no_such_package:model", 10)
    with pytest.raises(ConfigError, match="there is no folder /nowhere"):
        tokenizer_of("hf:/nowhere", 10)


# tasks and splits


@pytest.mark.parametrize("split", SPLITS)
def test_episodes(split: str, things: Path) -> None:
    tasks = own(things, shots=2, train_queries=4, length=8)
    queries = 4 if split == "train" else 3
    where = {row.tobytes(): place for place, row in enumerate(tasks.dataset.examples)}
    bounds = np.cumsum(tasks.dataset.counts)
    for index in range(30):
        episode = tasks.sample(stream(index), split)
        (x, y), (query_x, query_y) = episode
        assert x.shape == (4, 8) and query_x.shape == (2 * queries, 8) and x.dtype == y.dtype == torch.int64
        assert (x >= PADDING).all() and (x < 8192).all()
        rows = [where[row.astype(np.int32).tobytes()] for row in torch.cat([x, query_x]).numpy()]
        assert len(set(rows)) == len(rows), "a text came twice"
        classes = np.searchsorted(bounds, rows, side="right")
        assert set(classes.tolist()) <= set(tasks.members[split].tolist())
        labels = torch.cat([y, query_y]).tolist()
        assert len({*zip(classes.tolist(), labels, strict=True)}) == 2, "one label for each class"


def test_fractions_divide_all_classes(things: Path) -> None:
    members = own(things).members
    assert [len(members[split]) for split in SPLITS] == [6, 3, 3]
    assert sorted(np.concatenate(list(members.values())).tolist()) == list(range(12))
    other = own(things, split_seed=1).members
    assert not np.array_equal(np.sort(members["test"]), np.sort(other["test"]))


def test_split_file_and_domains(things: Path, tmp_path: Path) -> None:
    pets, food = {"animals": SUBJECTS[:4], "food": SUBJECTS[4:8]}, {"rest": SUBJECTS[8:]}
    domains, lists = tmp_path / "domains.json", tmp_path / "split.json"
    domains.write_text(json.dumps(pets | food))
    lists.write_text(json.dumps({"train": ["food"], "val": ["animals"], "test": ["rest"]}))
    tasks = own(things, domains=str(domains), split_file=str(lists))
    assert {tasks.dataset.names[i] for i in tasks.members["test"]} == set(SUBJECTS[8:])
    shuffled = own(things, domains=str(domains), fractions=(0.34, 0.33, 0.33)).members
    assert sorted(len(groups) for groups in shuffled.values()) == [4, 4, 4]
    for listed, message in (
        ({"train": ["food"], "val": ["animals"]}, "has no list 'test'"),
        ({"train": ["food"], "val": ["animals"], "test": ["cars"]}, "test names 'cars', which the data do not have"),
        ({"train": ["food"], "val": ["food"], "test": ["rest"]}, "'food' is both in train and in val"),
        ({"train": "food", "val": [], "test": []}, "'train' must be a list of strings"),
    ):
        lists.write_text(json.dumps(listed))
        with pytest.raises(DataError, match=message):
            own(things, domains=str(domains), split_file=str(lists)).prepare()
    domains.write_text(json.dumps(pets))
    with pytest.raises(DataError, match="has no domain of the class"):
        own(things, domains=str(domains)).prepare()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "tasks.length is 0"),
        ({"buckets": 0}, "tasks.buckets is 0"),
        ({"ways": 1}, "tasks.ways is 1"),
        ({"fractions": (0.5, 0.0, 0.5)}, "tasks.fractions"),
        ({"fractions": (0.9, 0.9, 0.9)}, "tasks.fractions"),
    ],
)
def test_settings_out_of_range(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        own(tmp_path, **options)


def test_clinc150(clinc_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    tasks = Clinc150(data_root=str(clinc_root))
    with caplog.at_level(logging.WARNING):
        tasks.prepare()
    names, members = tasks.dataset.names, tasks.members
    assert {name for i, name in enumerate(names) if i not in np.concatenate([*members.values()])} == {
        "oos/train",
        "oos/val",
        "oos/test",
    }, "texts out of scope are in no task"
    counts = tasks.dataset.counts[np.concatenate([*members.values()])]
    assert len(counts) == 150 and counts.min() >= 149 and counts.max() == 150
    assert tasks.describe().endswith("of 150 classes (train 75, val 15, test 60); 1,200 that fit none")
    domains = {split: {names[i].split("/")[0] for i in members[split]} for split in SPLITS}
    assert {split: len(found) for split, found in domains.items()} == {"train": 5, "val": 1, "test": 4}
    assert len(set.union(*domains.values())) == 10, "no domain is in two splits"
    assert "classes of two splits" in " ".join(caplog.messages), "one text is both in meta and in small talk"
    intents = Clinc150(data_root=str(clinc_root), split="random").members
    assert [len(intents[split]) for split in SPLITS] == [90, 15, 45]
    assert sorted(np.concatenate(list(intents.values()))) == sorted(np.concatenate(list(members.values())))


def test_damaged_clinc150(clinc_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clinc150"
    folder.mkdir()
    (folder / "domains.json").write_bytes((clinc_root / "clinc150" / "domains.json").read_bytes())
    whole = json.loads((clinc_root / "clinc150" / "data_full.json").read_text())
    for change, message in (
        ({"train": whole["train"][1:]}, "holds 23699 texts instead of 23700; delete it to have it downloaded again"),
        ({"val": [["only a text"], *whole["val"][1:]]}, r"val\[0\] is no pair of a text and an intent"),
        (
            {"test": [["a", "dance"], *whole["test"][1:]]},
            r"test\[0\]: .*domains.json has no domain of the intent 'dance'",
        ),
    ):
        (folder / "data_full.json").write_text(json.dumps(whole | change))
        with pytest.raises(DataError, match=message):
            Clinc150(data_root=str(tmp_path)).prepare()


# from a file to predictions


TINY = [
    "train.steps=30", "train.meta_batch_size=4", "train.shard_size=2", "validation.every=10", "validation.tasks=4",
    "checkpoint.every=10", "evaluation.tasks=12", "model.width=32", "outer.lr=0.01",
]  # fmt: skip


def recipe(path: Path, model: str, algorithm: dict) -> dict:
    tasks = {"use": "text", "path": str(path), "ways": 3, "queries": 3, "length": 10, "buckets": 512}
    tasks["fractions"] = [0.5, 0.25, 0.25]
    return {"tasks": tasks, "model": {"use": model}, "algorithm": algorithm}


@pytest.mark.parametrize(
    ("model", "algorithm"),
    [
        ("text-cnn", {"use": "maml", "inner_lr": 0.4, "inner_steps": 2}),
        ("text-transformer", {"use": "protomaml", "inner_lr": 0.1}),
    ],
)
def test_same_bits_on_any_layout(model: str, algorithm: dict, things: Path, tmp_path: Path, ray_cluster: None) -> None:
    found = []
    for workers, strategy in ((0, "loop"), (2, "loop")):
        more = [f"scaling.num_workers={workers}", f"run_dir={tmp_path / str(workers)}", f"train.strategy={strategy}"]
        run = distmeta.train(recipe(things, model, algorithm), *TINY, *more, "evaluation.tasks=0")
        found.append((run.checkpoints / "step-00000030" / "meta.safetensors").read_bytes())
    assert found[0] == found[1]
    vectorised = ["scaling.num_workers=0", f"run_dir={tmp_path / 'vmap'}", "train.strategy=vmap", "evaluation.tasks=0"]
    distmeta.train(recipe(things, model, algorithm), *TINY, *vectorised)


def test_command_line_from_training_to_predictions(things: Path, tmp_path: Path) -> None:
    cli = partial(commands.cli, cwd=tmp_path)

    (tmp_path / "recipe.yaml").write_text(
        json.dumps(recipe(things, "text-cnn", {"use": "protomaml", "inner_steps": 1}))
    )
    done = cli("train", "recipe.yaml", *TINY, "scaling.num_workers=0", "run_dir=run")
    assert done.returncode == 0, done.stderr
    assert "nearest neighbour" not in done.stderr, "there is none on numbers of tokens"
    support = write_csv(tmp_path / "support.csv", [(text, c) for c in ("ships", "cars") for text in sentences(c, 5)])
    (tmp_path / "query.txt").write_text("\ufeffthese old ships\nred cars, big\n\n")
    done = cli("adapt", "run", "--support", support, "--query", "query.txt", "--out", "plain")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "plain" / "predictions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == ["these old ships", "red cars, big"]
    for row in rows:
        assert float(row["p(cars)"]) + float(row["p(ships)"]) == pytest.approx(1, abs=1e-5)
    assert [row["class"] for row in rows] == ["ships", "cars"]
    assert json.loads((tmp_path / "plain" / "classes.json").read_text()) == {"classes": ["cars", "ships"]}["classes"]

    labelled = write_csv(tmp_path / "labelled.csv", [("ships ships", "ships"), ("my cars", "cars")])
    done = cli("adapt", "run", "--support", support, "--query", labelled, "--out", "scored")
    assert "accuracy 100.00% of 2 whose truth is given" in done.stdout, done.stderr

    many = write_csv(tmp_path / "many.csv", [(f"text {c}", c) for c in "abcd"])
    done = cli("adapt", "run", "--support", many, "--query", "query.txt", "--out", "more")
    assert done.returncode == 0 and len(json.loads((tmp_path / "more" / "classes.json").read_text())) == 4, done.stderr
    for support_file, query_file, message in (
        ("nowhere.csv", "query.txt", "there is no file nowhere.csv"),
        (support, "nowhere.txt", "there is no file nowhere.txt"),
        ("query.txt", "query.txt", "query.txt is neither a .csv, a .tsv nor a .jsonl file"),
    ):
        done = cli("adapt", "run", "--support", support_file, "--query", query_file, "--out", "bad")
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "bad").exists()
