"""Tasks that differ: meta-batches of tasks of different ways, shots and queries, and how much tasks pull apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import Blobs, HeadedMLP, algorithms, problem_of, relative_error
from test_tasks import Numbered
from typer.testing import CliRunner

import distmeta
from distmeta import MAML, R2D2, Episode, ProtoMAML, RunFolder, TaskSpec
from distmeta.cli import app
from distmeta.core.params import join, split
from distmeta.core.seeds import stream
from distmeta.distributed.executor import InProcess, reduce_mean
from distmeta.distributed.work import Shard, shards_of
from distmeta.errors import ConfigError, DataError
from distmeta.evaluation import by_group, evaluate_tasks, mean_ci
from distmeta.experiment import assemble
from distmeta.similarity import Similarity, similarity
from distmeta.tasks.glyphs import Glyphs
from distmeta.tasks.sinusoid import Sinusoid

DOUBLE = torch.float64


class Ragged(Blobs):
    """Blobs of 2, 3 or 5 classes with 1 or 3 examples of each."""

    def __init__(self, dtype: torch.dtype = DOUBLE) -> None:
        super().__init__((3,), 5, 3, dtype)

    @property
    def spec(self) -> TaskSpec:
        return super().spec._replace(variable_ways=True)

    def groups_of(self, rng: np.random.Generator, split: str) -> tuple[str, ...]:
        return (f"{rng.choice([2, 3, 5])}-way", f"{rng.choice([1, 3])}-shot")

    def sample(self, rng: np.random.Generator, split: str) -> Episode:
        ways, shots = rng.choice([2, 3, 5]), rng.choice([1, 3])
        return Blobs(self.shape, int(ways), int(shots), self.dtype).sample(rng, split)


def ragged(algorithm: Any, **options: Any):
    torch.manual_seed(0)
    model = HeadedMLP(3, 5).to(DOUBLE)
    return problem_of(algorithm, model, Ragged(), variable_ways=True, **options)


# tasks of different sizes


def test_episodes_of_drawn_sizes() -> None:
    tasks = Numbered(ways=(2, 4), shots=(1, 3), queries=(1, 2), train_ways=3, train_queries=2)
    assert tasks.spec == TaskSpec((1, 4, 4), 4, "cross_entropy", variable_ways=True)
    seen = set()
    for index in range(100):
        (_, y), (_, target) = tasks.sample(stream(index), "test")
        ways, shots, queries = int(y.max()) + 1, int((y == 0).sum()), int((target == 0).sum())
        assert torch.bincount(y).tolist() == [shots] * ways and torch.bincount(target).tolist() == [queries] * ways
        assert tasks.groups_of(stream(index), "test") == (f"{ways}-way {shots}-shot",)
        seen.add((ways, shots, queries))
        (_, y), _ = tasks.sample(stream(index), "train")
        assert int(y.max()) == 2 and tasks.groups_of(stream(index), "train") == (f"{int((y == 0).sum())}-shot",)
    assert len(seen) == 8 and {s[:1] for s in seen} == {(2,), (4,)}
    fixed = Numbered(ways=2, shots=1, queries=1), Numbered(ways=(2,), shots=(1,), queries=1)
    assert torch.equal(*(one.sample(stream(5), "val").support_set[0] for one in fixed)) and not fixed[1].groups_of(
        stream(5), "val"
    )
    assert {len(Sinusoid(shots=(2, 9)).sample(stream(i), "val").support_set[0]) for i in range(20)} == {2, 9}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Numbered(ways=()), ConfigError, "tasks.ways is an empty list"),
        (lambda: Numbered(ways=(5, 1)), ConfigError, r"tasks.ways is \[5, 1\]; it must be 2 or more"),
        (lambda: Numbered(train_ways=1), ConfigError, "tasks.train_ways is 1; it must be 2"),
        (lambda: Sinusoid(shots=(5, 0)), ConfigError, r"tasks.shots is \[5, 0\]"),
        (
            lambda: Numbered(queries=1, train_ways=(2, 9)).prepare(),
            DataError,
            "than the 9 ways.*lower tasks.train_ways",
        ),
        (lambda: Numbered(shots=(1, 6), queries=1).prepare(), DataError, r"fewer than 6 shots \+ 1 queries"),
    ],
)
def test_drawn_sizes_out_of_range(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("name", algorithms())
def test_tasks_of_different_sizes_are_vectorised_in_buckets(name: str) -> None:
    """The sum over a shard, and each task's metrics in task order, are those of the loop."""
    algorithm = algorithms()[name]
    shard = Shard("train", 2, 0, 12)
    (loop, theta), (vmap, _) = (ragged(algorithm, strategy=strategy) for strategy in ("loop", "vmap"))
    assert len({tuple(task.support_set[1].shape) for task in loop.build(shard)}) >= 4
    one, other = (problem.run("meta_gradient", theta, shard) for problem in (loop, vmap))
    assert relative_error(other.total, one.total) < 1e-9
    for metric, values in one.metrics.items():
        assert np.allclose(other.metrics[metric], values, rtol=1e-9)


@pytest.mark.parametrize(
    "algorithm",
    [MAML(inner_lr=0.1, inner_steps=2), ProtoMAML(inner_lr=0.1), ProtoMAML(inner_steps=0), R2D2()],
    ids=["maml", "protomaml", "protonet", "r2d2"],
)
def test_a_task_is_as_to_a_model_of_its_own_classes_alone(algorithm: Any) -> None:
    """The oracle: a model whose head has just so many rows. Beyond them, the meta-gradient is 0."""
    problem, theta = ragged(algorithm)
    meta = split(problem.layout.unpack(theta))
    for index in range(8):
        shard = Shard("train", 0, index, 1)
        (task,) = problem.build(shard)
        ways = int(task.support_set[1].max()) + 1
        own, _ = problem_of(algorithm, HeadedMLP(3, ways).to(DOUBLE), Ragged())
        cut = meta._replace(model={n: t[:ways] if n.startswith("classifier") else t for n, t in meta.model.items()})
        theirs = own.run("meta_gradient", own.layout.pack(join(cut)), shard)
        ours = problem.run("meta_gradient", theta, shard)
        gradient = problem.layout.unpack(ours.total)
        for name, tensor in own.layout.unpack(theirs.total).items():
            rows = ways if name.startswith("model.classifier") else len(tensor)
            assert torch.allclose(gradient[name][:rows], tensor, rtol=1e-9, atol=1e-12)
            assert not gradient[name][rows:].any()
        assert np.allclose(
            [ours.metrics[m] for m in ("loss", "accuracy")], [theirs.metrics[m] for m in ("loss", "accuracy")]
        )
        tested, expected = (
            p.run("evaluate", v, shard).metrics for p, v in ((problem, theta), (own, own.layout.pack(join(cut))))
        )
        assert np.allclose(tested["accuracy"], expected["accuracy"]) and np.allclose(tested["loss"], expected["loss"])


def test_the_mean_is_that_over_tasks_whatever_their_sizes() -> None:
    problem, theta = ragged(MAML(inner_lr=0.1), strategy="vmap")
    mean = reduce_mean(InProcess(problem).map("meta_gradient", theta, shards_of("train", 0, 10, 4)))
    singles = [problem.run("meta_gradient", theta, Shard("train", 0, i, 1)).total for i in range(10)]
    assert relative_error(mean, np.mean(singles, 0)) < 1e-10


SETTINGS = [
    "model.filters=4", "train.steps=6", "train.meta_batch_size=4", "train.shard_size=2", "validation.every=3",
    "validation.tasks=6", "evaluation.tasks=8", "checkpoint.every=3", "train.log_every=2", "outer.schedule=null",
]  # fmt: skip


def train(folder: Path, *more: str) -> RunFolder:
    return distmeta.train("glyphs-mixed-ways-protomaml", *SETTINGS, f"run_dir={folder}", *more)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(tmp_path_factory.mktemp("mixed") / "run", "scaling.num_workers=0")


def test_mixed_ways_keep_the_law(mixed: RunFolder, tmp_path: Path, ray_cluster: None) -> None:
    stopped = train(tmp_path / "stopped", "scaling.num_workers=0", "train.steps=3")
    distmeta.resume(stopped.path, "train.steps=6", "scaling.num_workers=2")
    one, other = ((run.checkpoints / "step-00000006" / "meta.safetensors").read_bytes() for run in (mixed, stopped))
    assert one == other
    assert mixed.summary()["test"] == stopped.summary()["test"]


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return f"exit {result.exit_code}\n{result.output}"


def test_a_run_on_mixed_ways_is_evaluated_on_fixed_ones(mixed: RunFolder) -> None:
    evaluate = lambda *more: invoke("evaluate", mixed.path, "--episodes", 4, "scaling.num_workers=0", *more)  # noqa: E731
    figures = json.loads(evaluate("--json", "tasks.ways=3", "tasks.shots=2").removeprefix("exit 0\n"))
    assert figures["tasks"] == 4 and "groups" not in figures
    # a task with fewer classes than the model has outputs for: predictions are of its own
    x, y = Glyphs(ways=3).sample(stream(1), "test").support_set
    assert distmeta.adapt(mixed, (x, y)).predict(x).shape == (3, 3)


# metrics by group


def test_metrics_by_group_are_those_of_its_tasks_alone() -> None:
    """Against the same evaluation of each task by itself."""
    problem, theta = ragged(MAML(inner_lr=0.1, inner_steps=2))
    whole = evaluate_tasks(InProcess(problem), problem, theta, "test", 20, 7)
    named = problem.groups(shards_of("test", 0, 20, 7))
    assert list(whole["groups"]) == ["1-shot", "2-way", "3-shot", "3-way", "5-way"]
    singles = [problem.run("evaluate", theta, Shard("test", 0, i, 1)).metrics for i in range(20)]
    for name, group in whole["groups"].items():
        own = [single for single, names in zip(singles, named, strict=True) if name in names]
        assert group["tasks"] == len(own)
        accuracy = np.concatenate([single["accuracy"] for single in own])
        assert group["after"] == pytest.approx(mean_ci(accuracy[:, -1]))
        assert group["by_inner_step"]["loss"][0]["mean"] == pytest.approx(np.mean([s["loss"][0, 0] for s in own]))
    assert sum(whole["groups"][name]["tasks"] for name in ("2-way", "3-way", "5-way")) == whole["tasks"] == 20


def test_groups_without_the_tasks_that_were_skipped() -> None:
    problem, _ = ragged(MAML())
    shards = shards_of("test", 0, 6, 4)
    everything = problem.groups(shards)
    assert problem.groups(shards, {1, 4}) == [everything[i] for i in (0, 2, 3, 5)]
    assert by_group({"loss": np.arange(6.0)}, everything).keys() == {name for names in everything for name in names}


def test_a_run_reports_its_groups(mixed: RunFolder) -> None:
    lines = mixed.records()
    (first, *_), validations = ([line for line in lines if line["kind"] == kind] for kind in ("train", "val"))
    groups = first["groups"]
    assert groups.keys() <= {f"{ways}-way {shots}-shot" for ways in (5, 10, 20) for shots in (1, 5)}
    assert sum(group["tasks"] for group in groups.values()) == first["tasks"] == 8
    weighted = sum(group["tasks"] * group["accuracy"]["mean"] for group in groups.values()) / 8
    assert weighted == pytest.approx(first["accuracy"])
    assert sum(group["tasks"] for group in validations[0]["groups"].values()) == 6
    test = mixed.summary()["test"]
    assert all("inductive" in group for group in test["groups"].values())
    page = (mixed.path / "report" / "index.html").read_text("utf-8")
    assert "glyphs 5/10/20-way 1/5-shot" in page
    assert all(f"after adaptation, {name}" in page for name in test["groups"])
    assert (mixed.path / "report" / "groups.png").stat().st_size > 10_000
    said = invoke("evaluate", mixed.path, "--episodes", 4, "scaling.num_workers=0")
    assert "accuracy by group of tasks" in said and " inductive " in said and " change " in said


# how alike tasks are


def test_cosines_of_gradients_and_their_intervals() -> None:
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((9, 50)) + 3.0 * np.repeat(rng.standard_normal((3, 50)), 3, 0)
    found = similarity(7, gradients, ["b", "b", "b", "a", "a", "a", "c", "c", "c"])
    tensor = torch.tensor(gradients)
    expected = torch.nn.functional.cosine_similarity(tensor[:, None], tensor[None], dim=-1)
    assert np.allclose(found.matrix, expected, atol=1e-6)
    assert found.names == ["a", "b", "c"]
    assert found.table()[0, 1] == pytest.approx(found.matrix[3:6, :3].mean())
    pairs = [found.matrix[i, j] for i in range(9) for j in range(i) if i // 3 == j // 3]
    within = found.mean(found.same)
    assert within["mean"] == pytest.approx(np.mean(pairs)) and within["mean"] > 0.7
    # the jackknife, by leaving out each task in turn and doing all again
    left = [similarity(7, np.delete(gradients, i, 0), np.delete(found.groups, i)) for i in range(9)]
    means = np.array([one.mean(one.same)["mean"] for one in left])
    assert within["ci95"] == pytest.approx(1.96 * (8 / 9 * ((means - means.mean()) ** 2).sum()) ** 0.5, rel=1e-4)
    assert found.gap()["mean"] == pytest.approx(within["mean"] - found.mean(~found.same)["mean"])


@pytest.mark.parametrize(
    ("directions", "said"),
    [
        ([1, 1], "no more apart than those of one"),
        ([1, -1], "pull the parameters apart"),
        ([0, 0], "in directions of their own, which are not opposed"),
    ],
)
def test_the_reading_says_what_is_so(directions: list[int], said: str) -> None:
    rng = np.random.default_rng(1)
    first, second = rng.standard_normal((2, 200))
    orthogonal = second - first * (first @ second) / (first @ first)
    base = [first, directions[1] * first if directions[0] else orthogonal]
    gradients = np.repeat(base, 10, 0) + rng.standard_normal((20, 200))
    assert said in similarity(0, gradients, ["a"] * 10 + ["b"] * 10).reading()
    assert "converged" in similarity(0, gradients, [""] * 20).reading()


def test_diversity_of_a_run(mixed: RunFolder, tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(mixed.path, tmp_path / "run"))
    said = invoke(
        "diversity", run.path, "--tasks", 8, "scaling.num_workers=0", "scaling.shard_timeout=200", "--checkpoint", "3"
    )
    assert said.startswith("exit 0\n8 training tasks at step 3") and "are in conflict" in said
    found = Similarity.model_validate_json((run.path / "diversity.json").read_bytes())
    # against gradients taken one by one
    problem = assemble(run.config()).problem
    saved = problem.layout.pack(run.checkpoint("3").params)
    gradients = [problem.run("meta_gradient", saved, Shard("train", 3, i, 1)).total for i in range(8)]
    size = sum(t.numel() for name, t in problem.layout.unpack(saved).items() if name.startswith("model."))
    assert size == problem.layout.size  # MAML's kind learns nothing else
    assert np.allclose(found.matrix, similarity(3, np.array(gradients, np.float64), found.groups).matrix, atol=1e-5)
    assert found.groups == [names[0] for names in problem.groups([Shard("train", 3, 0, 8)])]
    page = (run.path / "report" / "index.html").read_text("utf-8")
    assert "How alike 8 training tasks are at step 3" in page and (run.path / "report" / "diversity.png").exists()
    assert "exit 2" in (few := invoke("diversity", run.path, "--tasks", 2)) and "--tasks must be at least 3" in few
    (run.path / "diversity.json").write_text("{")
    assert invoke("report", run.path).startswith("exit 0")
    assert "is damaged" in (run.path / "report" / "index.html").read_text("utf-8")


def test_a_model_of_fixed_ways_is_evaluated_on_fewer(tmp_path: Path) -> None:
    run = distmeta.train(
        "glyphs-5way-1shot-maml", *SETTINGS, "train.steps=0", "evaluation.tasks=0", "scaling.num_workers=0",
        f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    two = distmeta.evaluate(run, "tasks.ways=2", "scaling.num_workers=0", episodes=60)
    assert two["after"]["mean"] > 0.4  # of two outputs, and not of five
