"""Few-shot translation: pairs, splits, greedy decoding, scores, and the way from a file to translations."""

from __future__ import annotations

import csv
import json
import logging
from functools import partial
from pathlib import Path

import commands
import numpy as np
import pytest
import sacrebleu
import torch
from torch import Tensor

import distmeta
from distmeta.core.seeds import stream
from distmeta.core.types import Split
from distmeta.errors import ConfigError, DataError
from distmeta.tasks.cldr import CLDRNames
from distmeta.tasks.splits import SPLITS
from distmeta.tasks.tokens import PADDING
from distmeta.tasks.translation import ParallelText, batch_of, decode, encode_pairs, greedy, pairs_of, scores

WORDS = [f"{a}{b}{c}" for a in "bdgk" for b in "aeiou" for c in "lmnr"]  # 80


def spoken(word: str, language: int) -> str:
    """A made-up language: another alphabet, and an ending."""
    return "".join(chr(ord("а") + (ord(letter) - 97 + language) % 26) for letter in word) + "s" * (language % 2)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(6):
        lines = "".join(f"{spoken(word, number)}\t{word}\r\n" for word in WORDS)
        (folder / f"l{number}.tsv").write_text("\ufeff" + lines + "\n", encoding="utf-8")
    return folder


def own(folder: Path, **options: object) -> ParallelText:
    settings = {"path": str(folder), "val": ("l4",), "test": ("l5",), "shots": 8, "queries": 6, "length": 12}
    return ParallelText(**(settings | options))


def test_batches_shift_the_target_by_one() -> None:
    source, prefix, target = batch_of(encode_pairs([("ab", "xyz"), ("é", "")], 4))
    begin, end, pad = 256, 257, PADDING
    assert source.tolist() == [[97, 98, end, pad, pad], [0xC3, 0xA9, end, pad, pad]]
    assert target.tolist() == [[120, 121, 122, end, pad], [end, pad, pad, pad, pad]]
    assert prefix.tolist() == [[begin, 120, 121, 122, pad], [begin, pad, pad, pad, pad]]
    assert decode(target) == ["xyz", ""] and decode(source) == ["ab", "é"]
    full = batch_of(encode_pairs([("abcd", "wxyz")], 4))
    assert full[1].tolist() == [[begin, 119, 120, 121, 122]] and decode(full[2]) == ["wxyz"]


def test_greedy_takes_the_likeliest_token_until_all_have_ended() -> None:
    wanted = batch_of(encode_pairs([("a", "hello"), ("b", "hi")], 8))[2]
    seen: list[int] = []

    def predict(source: Tensor, prefix: Tensor) -> Tensor:
        seen.append(prefix.shape[1])
        logits = torch.randn(*prefix.shape, 258)
        at = wanted[:, : prefix.shape[1]].clamp(min=0)
        return logits.scatter(2, at[..., None], 100.0)

    assert decode(greedy(predict, torch.zeros(2, 9, dtype=torch.int64))) == ["hello", "hi"]
    assert seen == [1, 2, 3, 4, 5, 6]
    never_ends = lambda source, prefix: torch.nn.functional.one_hot(prefix * 0 + 65, 258).float()  # noqa: E731
    assert decode(greedy(never_ends, torch.zeros(1, 5, dtype=torch.int64))) == ["AAAAA"]


def test_scores_are_those_of_sacrebleu() -> None:
    one, other = ["the cat sat on the mat", "a dog"], ["the cat sat on a mat", "a dog"]
    found = scores(one, other)
    assert found["chrf"] == sacrebleu.CHRF().corpus_score(one, [other]).score
    assert found["bleu"] == pytest.approx(sacrebleu.BLEU(force=True).corpus_score(one, [other]).score)
    assert found["exact"] == 0.5
    assert scores(["same words in all"], ["same words in all"])["chrf"] == pytest.approx(100)


@pytest.mark.parametrize("split", SPLITS)
def test_queries_of_unseen_languages_have_targets_that_training_never_sees(split: Split, corpus: Path) -> None:
    tasks = own(corpus)
    trained = {
        target for index in range(150) for batch in tasks.sample(stream(index), "train") for target in decode(batch[2])
    }
    languages = {"train": range(4), "val": [4], "test": [5]}[split]
    for index in range(20):
        support, query = tasks.sample(stream("a", index), split)
        known, asked = ([*zip(decode(b[0]), decode(b[2]), strict=True)] for b in (support, query))
        assert len({*known, *asked}) == 8 + 6, "a pair came twice"
        assert any(all(spoken(target, n) == source for source, target in known + asked) for n in languages)
        if split == "train":
            assert {target for _, target in asked} <= trained
        else:
            assert not {target for _, target in asked} & trained
    again = own(corpus).sample(stream("a", 3), split)
    for one, other in zip(tasks.sample(stream("a", 3), split), again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_all_targets_may_be_seen(corpus: Path) -> None:
    tasks = own(corpus, new_targets=0.0, shots=40, queries=40)
    support, query = tasks.sample(stream(0), "test")
    assert sorted(decode(support[2]) + decode(query[2])) == sorted(WORDS)


def test_what_cannot_be_used_is_told(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (corpus / "l0.tsv").open("a", encoding="utf-8") as file:
        file.write("\tempty\n" + "x" * 13 + "\tlong\nbal\t" + "y" * 13 + "\n")
    with caplog.at_level(logging.WARNING):
        own(corpus).prepare()
    said = " ".join(caplog.messages)
    assert "1 pair with an empty sentence is left out: " in said and "l0.tsv, line 82" in said
    assert "2 pairs longer than tasks.length = 12 bytes are left out, the first: " in said and "line 83" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tb\nno tab here\n", r"x\.tsv, line 2 has 1 cells; a sentence, a tab and its translation are expected"),
        (b"a\tb\tc\n", r"x\.tsv, line 1 has 3 cells"),
        (b"a\tb\n\xff\tb\n", r"x\.tsv, line 2 is not UTF-8"),
    ],
)
def test_broken_corpora_are_named(content: bytes, message: str, corpus: Path) -> None:
    (corpus / "x.tsv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        own(corpus).prepare()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": ("l9",)}, "tasks.test names 'l9', of which parallel has no pairs"),
        ({"test": ("l4",)}, "l4 is both in tasks.val and in tasks.test"),
        ({"val": ()}, "the val split of parallel has no language; name some by tasks.val"),
        ({"shots": 79, "train_shots": 8}, "l4 of parallel (val) has "),
        ({"train_queries": 79}, "l0 of parallel (train) has "),
        ({"path": "/nowhere"}, "tasks.path: there is no folder /nowhere"),
        ({"shots": 0}, "tasks.shots is 0; it must be 1 or more"),
        ({"new_targets": 1.0}, "tasks.new_targets is 1.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict, message: str, corpus: Path) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        own(corpus, **options).prepare()
    assert message in str(caught.value)


@pytest.mark.parametrize(("pair", "what"), [("x\t\n", "translation"), ("\tx\n", "sentence")])
def test_an_empty_half_of_a_pair_is_named(pair: str, what: str, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "known.tsv").write_text(f"a\tb\n{pair}")
    with pytest.raises(DataError, match=rf"known.tsv, line 2 has an empty {what}"):
        own(corpus).own_task(tmp_path / "known.tsv", tmp_path / "known.tsv")


def test_pairs_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"source": "a\\tb", "target": "c"}\n{"source": "d"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl, line 2 has no key 'target'"):
        list(pairs_of(path))
    assert [pair[:2] for pair in pairs_of(path, optional=True)] == [("a\tb", "c"), ("d", "")]


def test_names_of_cldr() -> None:
    tasks = CLDRNames(shots=150, queries=60)
    tasks.prepare()
    names = [name for name in tasks.dataset.names if not name.endswith(" (new)")]
    assert len(names) > 150 and {"de", "nl", "el", "zh", "sw"} <= set(names) and "en" not in names
    assert [len(tasks.members[split]) for split in ("val", "test")] == [4, 8]
    at = names.index("nl") * 2
    first, pairs = tasks.dataset.starts[at], int(tasks.dataset.counts[at : at + 2].sum())
    rows = torch.from_numpy(tasks.dataset.examples[first : first + pairs].astype(np.int64))
    known = set(zip(decode(rows[:, 0]), decode(rows[:, 1]), strict=True))
    assert {("Duitsland", "Germany"), ("maandag", "Monday"), ("Zweedse kroon", "Swedish Krona")} <= known


SMALL = [
    "train.steps=60", "train.meta_batch_size=4", "train.shard_size=2", "validation.every=30", "validation.tasks=2",
    "checkpoint.every=30", "evaluation.tasks=4", "evaluation.shard_size=2", "model.width=32", "model.layers=1",
]  # fmt: skip


def recipe(corpus: Path, algorithm: dict) -> dict:
    tasks = {
        "use": "parallel",
        "path": str(corpus),
        "val": ["l4"],
        "test": ["l5"],
        "shots": 12,
        "queries": 8,
        "length": 12,
    }
    return {"tasks": tasks, "model": {"use": "seq2seq"}, "algorithm": algorithm}


def test_same_bits_on_any_layout(corpus: Path, tmp_path: Path, ray_cluster: None) -> None:
    algorithm = {"use": "maml", "inner_lr": 0.1, "first_order": True}
    found = []
    for workers in (0, 2):
        more = [f"scaling.num_workers={workers}", f"run_dir={tmp_path / str(workers)}", "evaluation.tasks=0"]
        run = distmeta.train(recipe(corpus, algorithm), *SMALL, *more, "train.steps=10", "validation.every=5")
        (path,) = run.checkpoints.glob("step-00000010")
        found.append((path / "meta.safetensors").read_bytes())
    assert found[0] == found[1]


def test_command_line_from_training_to_translations(corpus: Path, tmp_path: Path) -> None:
    cli = partial(commands.cli, cwd=tmp_path)

    algorithm = {"use": "joint", "inner_lr": 0.003, "inner_steps": 10, "batch_size": None}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(corpus, algorithm)))
    done = cli("train", "recipe.yaml", *SMALL, "scaling.num_workers=0", "run_dir=run", "outer.lr=0.01")
    assert done.returncode == 0, done.stderr
    assert "validation chrf " in done.stderr
    run = distmeta.RunFolder.open(tmp_path / "run")
    test = run.summary()["test"]
    assert test["metric"] == "chrf" and test["judged"]["chrf"]["after"] == test["after"]
    assert {"chrf", "bleu", "exact"} == set(test["judged"])
    assert test["after"]["mean"] > test["before"]["mean"] >= 0, "an unseen alphabet is learned from the support set"
    assert len(test["by_inner_step"]["loss"]) == 11
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "chrf" in page

    done = cli(
        "evaluate", "run", "--episodes", 2, "tasks.shots=20", "algorithm.test_inner_steps=2", "scaling.num_workers=0"
    )
    assert done.returncode == 0 and "chrf " in done.stdout, done.stderr

    (tmp_path / "support.tsv").write_text("".join(f"{spoken(word, 5)}\t{word}\n" for word in WORDS[:30]))
    (tmp_path / "sources.txt").write_text(f"{spoken('bal', 5)}\n\n{spoken('dem', 5)}\n")
    (tmp_path / "support.tsv").write_text("".join(f"{spoken(word, 5)}  \t {word}\n" for word in WORDS[:30]))
    done = cli("adapt", "run", "--support", "support.tsv", "--query", "sources.txt", "--out", "spaced")
    (tmp_path / "support.tsv").write_text("".join(f"{spoken(word, 5)}\t{word}\n" for word in WORDS[:30]))
    done = cli("adapt", "run", "--support", "support.tsv", "--query", "sources.txt", "--out", "plain")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "spaced" / "adapted.safetensors").read_bytes() == (
        tmp_path / "plain" / "adapted.safetensors"
    ).read_bytes(), "spaces count as little as in training"
    with (tmp_path / "plain" / "predictions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["source"] for row in rows] == [spoken("bal", 5), spoken("dem", 5)] and "translation" in rows[0]
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["adapted.safetensors", "predictions.csv"]

    done = cli("adapt", "run", "--support", "support.tsv", "--query", "support.tsv", "--out", "scored")
    assert done.returncode == 0 and "chrf " in done.stdout, done.stderr

    (tmp_path / "long.txt").write_text("short\nfar too long for this\n")
    for query, message in (
        ("long.txt", "long.txt, line 2 has 21 bytes, more than tasks.length = 12"),
        ("nowhere.txt", "there is no file nowhere.txt"),
        (
            "recipe.yaml",
            "recipe.yaml is neither a .tsv, .jsonl, .po nor .mo file of pairs, nor a .txt file of sentences",
        ),
    ):
        done = cli("adapt", "run", "--support", "support.tsv", "--query", query, "--out", "bad")
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
