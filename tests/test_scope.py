"""Queries that belong to none of a task's classes: scores, figures, thresholds, and the command line."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Blobs, problem_of
from torch import Tensor, nn
from typer.testing import CliRunner

import distmeta
from distmeta import MAML, Split
from distmeta.adaptation import restore
from distmeta.cli import app
from distmeta.core.params import split as split_params
from distmeta.core.scope import SCORES, auroc, false_positive_rate, score_of, threshold_at
from distmeta.core.seeds import stream
from distmeta.distributed.work import Shard, shards_of
from distmeta.errors import NumericalError
from distmeta.evaluation import evaluate_scope, mean_ci
from distmeta.experiment import assemble
from distmeta.runs import RunFolder

GRID = st.integers(0, 12).map(lambda k: k / 4)  # so that many are equal
VALUES = st.lists(GRID, min_size=1, max_size=30).map(np.array)


def pairs(inside: np.ndarray, outside: np.ndarray) -> float:
    """AUROC as it is defined: every pair of an in-scope and an out-of-scope example, equal ones counting half."""
    return float(np.mean([(a > b) + (a == b) / 2 for a in inside for b in outside]))


@given(VALUES, VALUES)
def test_auroc_counts_pairs(inside: np.ndarray, outside: np.ndarray) -> None:
    assert auroc(inside, outside) == pytest.approx(pairs(inside, outside), abs=1e-12)
    assert auroc(outside, inside) == pytest.approx(1 - auroc(inside, outside), abs=1e-12)


@given(VALUES, VALUES, st.floats(0.01, 1))
def test_thresholds_keep_what_they_are_to_keep(inside: np.ndarray, outside: np.ndarray, recall: float) -> None:
    threshold = threshold_at(inside, recall)
    assert np.mean(inside >= threshold) >= recall - 1e-9
    assert all(np.mean(inside >= higher) < recall for higher in inside[inside > threshold]), (
        "none keeps it and is higher"
    )
    allowed = [t for t in inside if np.mean(inside >= t) >= recall - 1e-9]
    least = min(np.mean([score >= t for score in outside]) for t in allowed)
    assert false_positive_rate(inside, outside, recall) == least, "the best point of the ROC curve at that recall"


def test_a_share_is_not_a_rounding_error() -> None:
    assert threshold_at(np.arange(10.0), 0.9) == 1 and threshold_at(np.arange(20.0), 0.95) == 1
    assert threshold_at(np.arange(10.0), 1.0) == 0 and threshold_at(np.arange(10.0), 1e-6) == 9
    assert false_positive_rate(np.array([1.0, 2]), np.array([0.0, 0.5])) == 0
    assert auroc(np.array([1.0, 2]), np.array([0.0, 0.5])) == 1


def test_scores() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0], [300.0, 200.0, 0.0]])
    assert score_of("logit", logits).tolist() == [2, 300]
    odds = 1 / (1 + np.exp(-1) + np.exp(-3))
    assert score_of("probability", logits).tolist() == pytest.approx([odds, 1])
    near = torch.tensor([[20.0, 0.0], [24.0, 0.0]])
    first, second = score_of("probability", near).tolist()
    assert first < second, "in float32 both are 1"


def test_the_logit_of_prototypes_is_their_distance() -> None:
    from test_text_models import LENGTH, VOCABULARY, WAYS, Phrases

    from distmeta import ProtoMAML
    from distmeta.core.heads import features
    from distmeta.models import TextTransformer

    problem, theta = problem_of(
        ProtoMAML(inner_steps=0), TextTransformer((LENGTH,), WAYS, VOCABULARY, layers=0), Phrases()
    )
    meta = split_params(problem.layout.unpack(theta, "cpu"))
    task = Phrases().sample(stream(0), "test")
    params = problem.algorithm.adapt(meta, task, problem.loss)
    (support, label), (query, _) = task
    of = lambda x: features(problem.loss, meta.model, "classifier", x)  # noqa: E731
    prototypes = torch.stack([of(support)[label == n].mean(0) for n in range(WAYS)])
    nearest = torch.cdist(of(query), prototypes).amin(1) ** 2
    length = problem.loss.module.feature_norm**2  # pyright: ignore[reportAttributeAccessIssue]
    score = score_of("logit", problem.loss.predict(params, query))
    assert torch.allclose(score, length - nearest.double(), atol=1e-4)


# tasks with examples out of scope


class OpenBlobs(Blobs):
    """Blobs, and examples from far away."""

    def outside(self, rng: np.random.Generator, split: Split) -> tuple[Tensor, ...]:
        return (torch.from_numpy(rng.normal(5, 1, (4, *self.shape)).astype(np.float32)),)


class Normalised(nn.Module):
    """A perceptron with batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(3, 8), nn.BatchNorm1d(8, track_running_stats=False)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.body(x)).relu())


def test_batch_statistics_are_those_of_the_support_set() -> None:
    """Else an example out of scope would change how in-scope ones score, and the threshold would not be adapt's."""
    problem, theta = problem_of(MAML(inner_lr=0.1, inner_steps=2), Normalised(), OpenBlobs())
    found = problem.run("out_of_scope", theta, Shard("test", 0, 0, 2)).metrics
    (task,) = problem.build(Shard("test", 0, 1, 1))
    meta = split_params(problem.layout.unpack(theta, "cpu"))
    problem.loss.module.eval()
    params = problem.algorithm.adapt(meta, task, problem.loss)
    x, y = task.query(params)
    alone = [problem.loss.predict(params, torch.cat([task.support(params, 0)[0], one[None]]))[-1] for one in x]
    count = found["inside"][0]
    assert found["inside.logit"][count:] == pytest.approx(score_of("logit", torch.stack(alone)).numpy(), abs=1e-6)
    assert found["right"][count:].tolist() == (torch.stack(alone).argmax(-1) == y).tolist()
    assert found["outside"].tolist() == [4, 4]


def test_outputs_that_are_not_finite_are_named() -> None:
    problem, theta = problem_of(MAML(inner_lr=0.1), nn.Linear(3, 3), OpenBlobs())
    with pytest.raises(NumericalError, match=r"task 3 of step 0 \(split test, seed 1\): the adapted .* not finite"):
        problem.run("out_of_scope", np.full_like(theta, np.nan), Shard("test", 0, 3, 1))
    problem.on_failure = "skip"
    assert list(problem.run("out_of_scope", np.full_like(theta, np.nan), Shard("test", 0, 3, 1)).skipped) == [3]


# texts, from a file to predictions

SUBJECTS = ["cats", "dogs", "rain", "snow", "bread", "cheese", "trains", "planes", "songs", "books", "rivers", "stars"]
WORDS = "I really like seldom see often want never need some old new red".split()  # noqa: SIM905
NONE = "something else"


def rows_of(subject: str, count: int = 12) -> list[tuple[str, str]]:
    rng = random.Random(subject)
    return [(f"{' '.join(rng.sample(WORDS, 4))} {subject} {number}", subject) for number in range(count)]


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A small run on texts, of which some are labelled as out of scope; tasks have 2 or 3 classes."""
    folder = tmp_path_factory.mktemp("scope")
    rng = random.Random("outside")
    strange = [(" ".join(f"{rng.choice(WORDS)}{rng.randrange(99)}" for _ in range(5)), NONE) for _ in range(15)]
    path = write(folder / "things.csv", [row for subject in SUBJECTS for row in rows_of(subject)] + strange)
    tasks = {"use": "text", "path": str(path), "ways": [2, 3], "queries": 3, "length": 10, "buckets": 512}
    recipe = {
        "tasks": tasks | {"fractions": [0.5, 0.25, 0.25], "out_of_scope": NONE},
        "model": {"use": "text-transformer", "layers": 0, "width": 32},
        "algorithm": {"use": "protomaml", "inner_lr": 0.1, "inner_steps": 1},
        "train": {"steps": 20, "meta_batch_size": 4},
        "validation": {"every": 0, "tasks": 7},
        "evaluation": {"tasks": 0, "shard_size": 3},
        "outer": {"lr": 0.01},
    }
    return distmeta.train(recipe, "scaling.num_workers=0", f"run_dir={folder / 'run'}")


def by_hand(run: RunFolder, recall: float, tasks: int, validation_tasks: int) -> dict[str, Any]:
    """What evaluation has to find, task by task and pair by pair."""
    experiment = assemble(run.config())
    problem = experiment.problem
    meta = split_params(restore(run, experiment, "last"))
    problem.loss.module.eval()
    scored: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"val": [], "test": []}
    for split, count in (("val", validation_tasks), ("test", tasks)):
        for index in range(count):
            (task,) = problem.build(Shard(split, 0, index, 1))  # pyright: ignore[reportArgumentType]
            loss = problem.loss_of(task)
            params = problem.algorithm.adapt(meta, task, loss)
            (x,) = problem.tasks.outside(stream(0, "out_of_scope", split, index), split)  # pyright: ignore
            query, target = task.query(params)
            with torch.no_grad():
                scored[split].append((loss.predict(params, query), target, loss.predict(params, x)))
    expected: dict[str, Any] = {}
    for kind in SCORES:
        of = lambda logits: score_of(kind, logits).numpy()  # noqa: B023, E731
        known = sorted((s for inside, *_ in scored["val"] for s in of(inside)), reverse=True)
        threshold = next(t for t in known if sum(s >= t for s in known) >= recall * len(known))
        rows: dict[str, list[float]] = {name: [] for name in ("auroc", "kept", "found", "accuracy")}
        for inside, target, outside in scored["test"]:
            kept, right = of(inside) >= threshold, (inside.argmax(-1) == target).numpy()
            rows["auroc"].append(pairs(of(inside), of(outside)))
            rows["kept"].append(float(kept.mean()))
            rows["found"].append(float(np.mean([s < threshold for s in of(outside)])))
            rows["accuracy"].append(float((kept * right).mean()))
        expected[kind] = {"threshold": threshold} | {name: mean_ci(np.array(row)) for name, row in rows.items()}
    return expected


def test_evaluation_is_what_it_says(run: RunFolder) -> None:
    found = distmeta.evaluate(run, episodes=8, out_of_scope=0.8)["out_of_scope"]
    assert found["recall"] == 0.8 and found["validation_tasks"] == 7
    for kind, expected in by_hand(run, 0.8, 8, 7).items():
        for name, value in expected.items():
            assert found["scores"][kind][name] == pytest.approx(value, abs=1e-9), (kind, name)
    assert 0 <= found["scores"]["logit"]["fpr95"]["mean"] <= 1
    assert "out_of_scope" not in distmeta.evaluate(run, episodes=2)


def test_the_same_by_workers_and_shards(run: RunFolder, ray_cluster: None) -> None:
    alone = distmeta.evaluate(run, episodes=5, out_of_scope=0.8)
    assert distmeta.evaluate(run, "scaling.num_workers=2", episodes=5, out_of_scope=0.8) == alone
    assert distmeta.evaluate(run, "evaluation.shard_size=1", episodes=5, out_of_scope=0.8) == alone


def test_texts_out_of_scope_are_in_no_task(run: RunFolder) -> None:
    tasks: Any = assemble(run.config()).problem.tasks
    group = tasks.dataset.names.index(NONE)
    assert all(group not in groups for groups in tasks.members.values())
    assert "of 12 classes (train 6, val 3, test 3); 15 that fit none" in tasks.describe()
    start = tasks.dataset.starts[group]
    (texts,) = tasks.outside(stream(1), "test")
    assert len(texts) == 9, "as many as the largest task has queries"
    there = {row.tobytes() for row in tasks.dataset.examples[start : start + 15].astype(np.int64)}
    assert len({row.numpy().tobytes() for row in texts} & there) == 9, "all different, all of that label"


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_line_from_evaluation_to_predictions(run: RunFolder, tmp_path: Path) -> None:
    done = invoke("evaluate", run.path, "--episodes", 8, "--out-of-scope", 0.9, "scaling.num_workers=0")
    assert done.exit_code == 0, done.output
    assert "AUROC" in done.output and "adapt: --score" in done.output
    words = done.output.split("adapt: ")[1].split()[:4]
    assert words[0] == "--score" and words[2] == "--out-of-scope"

    support = write(tmp_path / "support.csv", rows_of("ships", 5) + rows_of("cars", 5))
    strange = [(f"xyz{n} zyx{n}", "neither") for n in range(3)]
    query = write(tmp_path / "query.csv", [("these old ships", "ships"), ("red cars", "cars"), *strange])
    adapt = lambda out, *more: invoke("adapt", run.path, "--support", support, "--query", query, "--out", out, *more)  # noqa: E731
    done = adapt(tmp_path / "plain")
    assert "accuracy 40.00% of 5 whose truth is given" in done.output
    plain = list(csv.DictReader((tmp_path / "plain" / "predictions.csv").open()))
    adapted = distmeta.adapt(run, assemble(run.config()).problem.tasks.own_task(support, query).support)  # pyright: ignore
    own = assemble(run.config()).problem.tasks.own_task(support, query)  # pyright: ignore
    for kind in SCORES:
        scores = score_of(kind, adapted.predict(own.inputs)).tolist()
        ordered = sorted(scores)
        threshold = (ordered[2] + ordered[3]) / 2
        done = adapt(tmp_path / kind, "--score", kind, "--out-of-scope", threshold)
        assert done.exit_code == 0, done.output
        rows = list(csv.DictReader((tmp_path / kind / "predictions.csv").open()))
        out = [score < threshold for score in scores]
        named = ["out of scope" if o else row["class"] for o, row in zip(out, plain, strict=True)]
        assert [row["class"] for row in rows] == named and sum(out) == 3
        assert [float(row[kind]) for row in rows] == pytest.approx(scores, abs=1e-6)
        assert [row["p(cars)"] for row in rows] == [row["p(cars)"] for row in plain], "probabilities stay what they are"
        assert list(rows[0])[:3] == ["text", "class", kind]
        right = [name == true for name, true in zip(named, ["ships", "cars"] + ["out of scope"] * 3, strict=True)]
        kept, found = 2 - sum(out[:2]), sum(out[2:])
        assert f"accuracy {sum(right) / 5:.2%} of 5 whose truth is given" in done.output
        assert (
            f"in-scope recall {kept / 2:.2%}" in done.output and f"out-of-scope recall {found / 3:.2%}" in done.output
        )
    done = adapt(tmp_path / "all", "--out-of-scope", 2)  # probability is what is compared if nothing is said
    assert "accuracy 60.00%" in done.output and "in-scope recall 0.00%" in done.output
    assert json.loads((tmp_path / "all" / "classes.json").read_text()) == ["cars", "ships"]


def test_mistakes_are_one_clear_line(run: RunFolder, tmp_path: Path) -> None:
    support = write(tmp_path / "support.csv", [*rows_of("ships", 2), ("it is", "out of scope")])
    files = ["--support", support, "--query", support, "--out", tmp_path / "out"]
    evaluate, adapt = ("evaluate", run.path, "--episodes", 2), ("adapt", run.path, *files)
    things = run.config().tasks.options["path"]
    for words, message in (
        (
            (*evaluate, "--out-of-scope", 0),
            "the share of in-scope queries to keep, more than 0 and 1 at most; given: 0.0",
        ),
        ((*evaluate, "--out-of-scope", 95), "more than 0 and 1 at most; given: 95.0"),
        ((*evaluate, "--out-of-scope", "nan"), "more than 0 and 1 at most; given: nan"),
        (
            (*evaluate, "--out-of-scope", 0.9, "tasks.out_of_scope=null"),
            "text has no texts out of scope here: clinc150 has, and your own with tasks.out_of_scope=LABEL",
        ),
        (
            (*evaluate, "--out-of-scope", 0.9, "tasks.out_of_scope=nobody"),
            f"tasks.out_of_scope: no text of {things} has the label 'nobody'",
        ),
        ((*adapt, "--score", "logit"), "--score logit says what --out-of-scope is compared with; give that as well"),
        ((*adapt, "--out-of-scope", 1, "--score", "energy"), "--score is 'energy'; it must be probability or logit"),
        ((*adapt, "--out-of-scope", "nan"), "--out-of-scope must be a finite number; given: nan"),
        ((*adapt, "--out-of-scope", 1), "a class of the support set is called 'out of scope' itself; rename it"),
    ):
        done = invoke(*words)
        assert done.exit_code == 2 and message in done.output.replace("\n", " "), done.output
        assert not (tmp_path / "out").exists()


def test_tasks_without_examples_out_of_scope(tmp_path: Path) -> None:
    small = ["train.steps=1", "evaluation.tasks=0", "validation.every=0", "scaling.num_workers=0"]
    run = distmeta.train("sinusoid-maml", *small, f"run_dir={tmp_path / 'run'}")
    done = invoke("evaluate", run.path, "--episodes", 2, "--out-of-scope", 0.9)
    assert done.exit_code == 2 and "sinusoid has no examples out of scope of its classes" in done.output


def test_all_tasks_skipped_is_an_error(run: RunFolder) -> None:
    experiment = assemble(run.config())
    problem = experiment.problem
    problem.on_failure = "skip"
    from distmeta.distributed.executor import InProcess

    vector = np.full_like(problem.layout.pack(experiment.initial), np.nan)
    with InProcess(problem) as executor, pytest.raises(NumericalError, match="all 3 val tasks were skipped"):
        evaluate_scope(executor, vector, 0.9, 3, 3, 2)
    assert len(shards_of("val", 0, 3, 2)) == 2
