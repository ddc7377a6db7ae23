"""Regression of a user's table: reading, scaling by the support, splits, and the way to predictions."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from distmeta.cli import app
from distmeta.core.seeds import stream
from distmeta.errors import ConfigError, DataError
from distmeta.tasks.splits import SPLITS
from distmeta.tasks.tabular import Scale, Tabular


def write(path: Path, tasks: int = 12, rows: int = 30, order: int = 0) -> Path:
    """y = a x1 + b + 1000 n, with the task's own a and b, x2 of no use; rows of all tasks mixed."""
    table = []
    for task in range(tasks):
        rng = np.random.default_rng(task)
        a, b = rng.uniform(1, 3), rng.uniform(-5, 5)
        for x1, x2 in rng.uniform(-1, 1, (rows, 2)):
            table.append([f"sensor {task}", x1, x2, a * x1 + b + 1000 * task])
    np.random.default_rng(order).shuffle(table)
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["who", "x1", "x2", "y"], *table])
    return path


def own(source: Path, **options: Any) -> Tabular:
    given = {"path": str(source), "task": "who", "features": ("x1", "x2"), "targets": ("y",), "shots": 8, "queries": 6}
    return Tabular(**{**given, **options})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write(tmp_path / "table.csv")


def test_episodes_are_scaled_by_their_support(table: Path) -> None:
    tasks = own(table)
    tasks.prepare()
    assert tasks.describe() == "360 rows of 12 tasks (train 7, val 2, test 3)"
    for seed in range(20):
        (x, y), (query_x, query_y) = tasks.sample(stream(seed), "train")
        assert x.shape == (8, 2) and y.shape == (8, 1) and query_x.shape == (6, 2) and query_y.shape == (6, 1)
        for scaled in (x, y):
            assert torch.allclose(scaled.mean(0), torch.zeros(scaled.shape[1]), atol=1e-5)
            assert torch.allclose(scaled.std(0, correction=0), torch.ones(scaled.shape[1]), atol=1e-5)
        # y is a line of x1, and its scale does not come from the query
        slope = (x[:, :1].T @ y) / (x[:, :1].T @ x[:, :1])
        assert torch.allclose(query_x[:, :1] @ slope, query_y, atol=1e-3)


def test_the_order_of_rows_and_tasks_of_other_splits_do_not_matter(tmp_path: Path, table: Path) -> None:
    (a, _), _ = own(table).sample(stream(1), "test")
    (b, _), _ = own(table).sample(stream(1), "test")
    assert torch.equal(a, b)
    names = [{own(table).dataset.names[g] for g in own(table).members[split]} for split in SPLITS]
    assert sum(map(len, names)) == 12 and not names[0] & names[1] | names[0] & names[2] | names[1] & names[2]


@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2), min_size=2, max_size=9))
def test_scaling_is_finite(rows: list[list[float]]) -> None:
    support = np.array(rows)
    scaled = Scale.of(support).apply(support)
    assert np.isfinite(scaled).all() and np.abs(scaled).max() < 10
    constant = np.ones((4, 1)) * 0.1
    assert np.array_equal(Scale.of(constant).apply(constant + 1), np.ones((4, 1))), "a constant column is only shifted"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sensor 0,1,,3", r"table.csv, line 362 has '' in the column 'x2', where a number is expected"),
        ("sensor 0,1,2,three", r"line 362 has 'three' in the column 'y'"),
        ("sensor 0,inf,2,3", r"line 362 has 'inf' in the column 'x1'"),
        (",1,2,3", r"line 362 names no task: its cell 'who' is empty"),
        ("sensor 0,1,2", r"line 362 has 3 cells where the first line names 4 columns"),
        ("alone,1,2,3", r"tasks of .* have fewer rows than 8 shots \+ 6 queries: alone \(1\); lower tasks.shots"),
    ],
)
def test_broken_rows_are_named(line: str, message: str, table: Path) -> None:
    with table.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        own(table).prepare()


def test_small_tasks_can_be_left_out(table: Path) -> None:
    with table.open("a") as file:
        file.write("alone,1,2,3\n")
    tasks = own(table, skip_small=True)
    tasks.prepare()
    assert sum(map(len, tasks.members.values())) == 12


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"features": ("x1", "z")}, DataError, r"has no column 'z'; its first line names 'who', 'x1', 'x2', 'y'"),
        ({"features": ("x1", "y")}, ConfigError, r"each once: who, x1, y, y"),
        ({"features": ()}, ConfigError, r"tasks.features and tasks.targets must name columns"),
        ({"shots": 1}, ConfigError, r"tasks.shots must be at least 2"),
        ({"path": "gone.csv"}, DataError, r"tasks.path: there is no file gone.csv"),
        ({"fractions": (0.98, 0.01, 0.01)}, DataError, r"the val split of .* has no tasks"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], error: type[Exception], message: str, table: Path) -> None:
    with pytest.raises(error, match=message):
        own(table, **options).prepare()


def test_split_file(table: Path, tmp_path: Path) -> None:
    lists = {"train": ["sensor 3"], "val": ["sensor 4"], "test": ["sensor 5", "sensor 6"]}
    (tmp_path / "split.json").write_text(json.dumps(lists))
    tasks = own(table, split_file=str(tmp_path / "split.json"))
    assert {s: [tasks.dataset.names[g] for g in tasks.members[s]] for s in SPLITS} == lists


@pytest.mark.parametrize(
    ("known", "asked", "message"),
    [
        ("x1,x1,x2,y\n1,1,2,3\n2,2,2,4\n", "x1,x2\n1,2\n", r"has 2 columns called 'x1'; rename all but one"),
        ("who,x1,x2,y\na,1,2,3\nb,2,2,4\n", "x1,x2\n1,2\n", r"rows of 2 tasks by their column 'who': a, b"),
        ("who,x1,x2,y\na,1,2,3\na,2,2,4\n", "who,x1,x2\nb,1,2\n", r"rows of 2 tasks by their column 'who': a, b"),
        ("x1,x2,y\n1,2,1e300\n2,2,-1e300\n", "x1,x2\n1,2\n", r"numbers up to 1e\+300 are too large"),
    ],
)
def test_a_task_of_ones_own_that_cannot_be(known: str, asked: str, message: str, table: Path, tmp_path: Path) -> None:
    (tmp_path / "known.csv").write_text(known)
    (tmp_path / "asked.csv").write_text(asked)
    with pytest.raises(DataError, match=message):
        own(table).own_task(tmp_path / "known.csv", tmp_path / "asked.csv").support  # noqa: B018


def test_command_line_from_training_to_predictions(table: Path, tmp_path: Path, caplog: Any) -> None:
    def run(*words: object) -> str:
        with caplog.at_level(logging.WARNING):
            done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exit_code == 0, done.output
        return done.output

    options = [f"path={table}", "task=who", "features=[x1,x2]", "targets=[y]"]
    card = run("data", "tabular", *options)
    assert "tabular is complete: 360 rows of 12 tasks" in card and "train 7 tasks of 30, 210 in all" in card
    settings = [*(f"tasks.{option}" for option in options), f"run_dir={tmp_path / 'run'}", "scaling.num_workers=0"]
    settings += [
        "train.steps=100",
        "train.meta_batch_size=8",
        "train.shard_size=8",
        "validation.every=0",
        "evaluation.tasks=20",
        "evaluation.shard_size=20",
    ]
    run("train", "tabular-maml", *settings)
    x = np.random.default_rng(5).uniform(-1, 1, (30, 2))
    y = 2 * x[:, 0] + 77  # in units of its own
    for name, rows in (("known", slice(0, 10)), ("asked", slice(10, 30))):
        with (tmp_path / f"{name}.csv").open("w") as file:
            file.write("x1,x2,y\n" + "".join(f"{a},{b},{c}\n" for (a, b), c in zip(x[rows], y[rows], strict=True)))
    files = ["--support", tmp_path / "known.csv", "--query", tmp_path / "asked.csv"]
    out = run("adapt", tmp_path / "run", *files, "--out", tmp_path / "out")
    assert "rmse of y" in out and "of 20 whose truth is given" in out
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["line"] for row in rows] == [str(line) for line in range(2, 22)]
    error = np.array([float(row["y"]) for row in rows]) - y[10:]
    assert np.sqrt((error**2).mean()) < 0.5 * y[10:].std(), "it has learned that y follows x1, in the table's units"
    (tmp_path / "asked.csv").write_text("x1,x2,y\n0.5,0.1,78\n0.5,0.2,\n")
    assert "rmse" not in run("adapt", tmp_path / "run", *files, "--out", tmp_path / "out3")
    assert "asked.csv: for 1 of 2 queries the truth is not given, so that nothing is scored" in caplog.text
    with (tmp_path / "known.csv").open("w") as file:
        file.write("x1,x2,y\n" + "".join(f"{a},{b},{1.7e9 + 2 * a}\n" for a, b in x))
    run("adapt", tmp_path / "run", *files, "--out", tmp_path / "out4")
    with (tmp_path / "out4" / "predictions.csv").open() as file:
        one, other = (float(row["y"]) for row in csv.DictReader(file))
    assert abs(one - 1.7e9) < 3 and one != other, "large numbers keep what they differ by"
    (tmp_path / "asked.csv").write_text("x2,x1\n0.5,0.1\n")
    out = run("adapt", tmp_path / "run", *files, "--out", tmp_path / "out2")
    assert "rmse" not in out, "without truth there is no error"
