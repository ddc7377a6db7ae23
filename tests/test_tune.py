"""Searches, run for real: every searcher and scheduler, their tables and pages, and trials that are themselves runs."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from problems import lasting_workers
from ray.tune import Checkpoint
from test_report import Page, pictures_of
from test_search_space import BASE, RATE

import distmeta
from distmeta import RunFolder, checkpoint, config
from distmeta.experiment import assemble
from distmeta.training import Training
from distmeta.tune.files import load_search
from distmeta.tune.run import search
from distmeta.tune.trial import take_over

pytestmark = pytest.mark.usefixtures("ray_cluster")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_a_grid_with_seeds(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = {
        "name": "rates & <seeds>",
        "base": BASE,
        "space": {"outer.lr": {"grid_search": [0.001, 0.1]}, "algorithm.inner_lr": {"choice": [0.5]}},
        "samples": 1,
        "seeds": [3, 4],
    }
    folder = search(spec, f"run_dir={tmp_path / 'search'}")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names == {"search.yaml", "trials", "results.csv", "best.yaml", "best_run", "summary.json", "report"}

    table = rows(folder)
    assert {(row["outer.lr"], row["seed"]) for row in table} == {(r, s) for r in ("0.001", "0.1") for s in ("3", "4")}
    assert all(row["state"] == "finished" and row["step"] == "8" and float(row["train_seconds"]) > 0 for row in table)
    means = {
        rate: sum(float(row["best_accuracy"]) for row in table if row["outer.lr"] == rate) / 2
        for rate in ("0.001", "0.1")
    }
    best = summary(folder)["best"]
    assert best["validation"]["mean"] == pytest.approx(max(means.values()))
    assert best["settings"]["outer.lr"] == float(max(means, key=lambda rate: means[rate]))
    assert len(best["trials"]) == 2

    # The best configuration is one that `train` takes, and trains to the same bits; its run can be used as any other.
    winner = config.load(folder / "best.yaml")
    assert winner.seed == 3 and winner.run_dir is None and winner.scaling.num_workers == "auto"
    again = distmeta.train(folder / "best.yaml", "scaling.num_workers=0", f"run_dir={tmp_path / 'again'}")
    kept = RunFolder.open(folder / "best_run")
    one, other = (run.checkpoint("last").params for run in (again, kept))
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert again.summary()["test"] == best["test"] == distmeta.evaluate(kept, "scaling.num_workers=0")
    assert best["test"]["split"] == "test" and best["test"]["tasks"] == 40

    page = folder / "report" / "index.html"
    assert pictures_of(page) == {"budget", "parallel"}
    text = Page(page).text
    assert "Search rates & <seeds>" in text and "it needs 8 trials with a score" in text
    said = capfd.readouterr()
    assert "4 trials: 4 finished" in said.out and "on 40 unseen tasks, evaluated once" in said.out
    assert said.err.count("finished at step 8, best accuracy") == 4


def test_asha_stops_the_worse_and_a_diverging_trial_fails_alone(tmp_path: Path) -> None:
    spec = {
        "base": BASE,
        "set": {"train.steps": 12},
        "space": {"algorithm.inner_lr": {"choice": [0.1, 1e30]}, **RATE},
        "samples": 7,
        "seed": 1,
        "scheduler": {"use": "asha", "reduction_factor": 2},
    }
    folder = search(spec, f"run_dir={tmp_path / 'search'}", "test=false")
    table = rows(folder)
    assert len(table) == 7
    for row in table:
        assert (row["state"] == "failed") == (float(row["algorithm.inner_lr"]) > 1)
        assert ("is nan; lower algorithm.inner_lr" in row["failure"]) == (row["state"] == "failed")
    result = summary(folder)
    assert result["failed"] >= 2 and result["pruned"] >= 1 and result["finished"] >= 1
    assert result["outer_steps"] < result["outer_steps_without_pruning"] == 7 * 12
    assert result["best"]["settings"]["algorithm.inner_lr"] == 0.1 and "test" not in result["best"]
    assert not (folder / "best_run" / "summary.json").exists()
    assert pictures_of(folder / "report" / "index.html") >= {"budget", "parallel"}


def test_optuna_weighs_accuracy_against_seconds(tmp_path: Path) -> None:
    spec = {
        "base": BASE,
        "space": {"model.hidden": {"choice": [[4], [64, 64]]}, "algorithm": {"choice": {
            "maml": {"inner_steps": {"randint": [1, 3]}},
            "meta-sgd": {"use": "meta-sgd", "inner_lr": {"uniform": [0.05, 0.5]}},
        }}},
        "samples": 8,
        "metric": ["accuracy", "seconds"],
        "mode": ["max", "min"],
        "searcher": {"use": "optuna", "startup": 3},
    }  # fmt: skip
    folder = search(spec, f"run_dir={tmp_path / 'search'}", "test=false")
    table = {row["trial"]: row for row in rows(folder)}
    assert len(table) == 8
    for row in table.values():
        steps, rate = row["algorithm[maml].inner_steps"], row["algorithm[meta-sgd].inner_lr"]
        assert (steps == "") == (row["algorithm"] == "meta-sgd") == (rate != "")
    front = [table[name] for (name,) in summary(folder)["pareto_front"]]
    for one in front:
        assert not any(
            float(other["best_accuracy"]) > float(one["best_accuracy"])
            and float(other["seconds"]) < float(one["seconds"])
            for other in table.values()
        )
    assert len(front) >= 1
    assert max(float(r["best_accuracy"]) for r in table.values()) == summary(folder)["best"]["validation"]["mean"]
    assert pictures_of(folder / "report" / "index.html") == {"budget", "parallel", "importance", "front"}


@pytest.mark.parametrize("scheduler", ["hyperband", "median"])
def test_other_schedulers(scheduler: str, tmp_path: Path) -> None:
    spec = {"base": BASE, "space": RATE, "samples": 4, "metric": "loss", "mode": "min", "test": False}
    folder = search(spec, f"scheduler.use={scheduler}", f"run_dir={tmp_path / 'search'}")
    table = rows(folder)
    assert {row["state"] for row in table} <= {"finished", "pruned"} and len(table) == 4
    assert (
        min(float(row["best_loss"]) for row in table if row["state"] == "finished")
        == summary(folder)["best"]["validation"]["mean"]
    )


def test_population_based_training_changes_rates_of_live_runs(tmp_path: Path) -> None:
    """Four trials that run beside each other: the worse half goes on from the better one's state, with other rates."""
    (tmp_path / "met").mkdir()
    tasks = {"use": "problems:Together", "folder": str(tmp_path / "met"), "processes": 4, "wait": 0.02}
    spec = {
        "base": BASE | {"tasks": tasks},
        "set": {"train.steps": 12, "outer.schedule": None, "validation.tasks": 10},
        "space": {"outer.lr": {"loguniform": [1e-5, 0.1]}},
        "samples": 4,
        "scheduler": {"use": "pbt", "interval": 4, "quantile": 0.5},
        "test": False,
    }
    folder = search(spec, f"run_dir={tmp_path / 'search'}")
    assert [(row["step"], row["state"]) for row in rows(folder)] == [("12", "finished")] * 4
    rates = []
    for trial in (folder / "trials").glob("*/result.json"):
        results = [json.loads(line) for line in trial.read_text().splitlines()]
        rates.append({result["config"]["outer.lr"] for result in results})
        assert all(1e-5 <= rate <= 0.1 for rate in rates[-1])
    assert any(len(seen) > 1 for seen in rates), "a live run has had more than one rate"


def test_a_clone_is_exact_to_the_bit(tmp_path: Path) -> None:
    """What population based training does: a trial takes over the folder of another and goes on from its bits."""
    common = ["evaluation.tasks=0", "scaling.num_workers=0", "outer.schedule=null"]
    donor = distmeta.train(BASE, *common, "train.steps=4", f"run_dir={tmp_path / 'donor'}")
    saved = Checkpoint.from_directory(donor.path)

    def clone(name: str, *overrides: str) -> Training:
        run = RunFolder(tmp_path / name)
        settings = config.load(BASE, [*common, f"run_dir={run.path}", *overrides])
        with Training(assemble(settings)) as training, run.lock():
            take_over(saved, run, training)
            assert (training.outer.vector() == donor_vector).all()
            training.fit(run, lambda step, evaluation: None)
        return training

    packed = assemble(donor.config())
    donor_vector = packed.problem.layout.pack(donor.checkpoint("last").params)
    straight = distmeta.train(BASE, *common, f"run_dir={tmp_path / 'straight'}")
    assert (clone("same").outer.vector() == packed.problem.layout.pack(straight.checkpoint("last").params)).all()
    doubled = clone("doubled", "outer.lr=0.006")
    assert not (doubled.outer.vector() == clone("same again").outer.vector()).any()
    used = [
        {r["step"]: r["lr"] for r in RunFolder(tmp_path / name).records() if r["kind"] == "train"}
        for name in ("same", "doubled")
    ]
    assert used[0].keys() == used[1].keys() >= {4, 8}
    assert used[1] == pytest.approx({step: rate * (2 if step > 4 else 1) for step, rate in used[0].items()})
    assert checkpoint.steps(RunFolder(tmp_path / "doubled").checkpoints)[-1] == 8


def test_lost_processes_change_no_result(tmp_path: Path) -> None:
    """The process of a trial, or a worker of one, is killed: the trial goes on, and its figures are the same."""

    def figures(folder: str, workers: int) -> list[tuple[str, ...]]:
        tasks = {"use": "problems:Mortal", "marker": str(tmp_path / f"marker-{workers}"), "after": 60}
        spec = {
            "base": BASE | {"tasks": tasks},
            "set": {"scaling.num_workers": workers},
            "space": {"outer.lr": {"grid_search": [0.001, 0.1]}},
            "samples": 1,
            "test": False,
        }
        table = rows(search(spec, f"run_dir={tmp_path / folder}"))
        assert (tmp_path / f"marker-{workers}").exists(), "a process was killed, in this search or before"
        return [tuple(row[key] for key in ("trial", "state", "outer.lr", "step", "best_accuracy")) for row in table]

    trial_killed = figures("trial", 0)
    assert [state for _, state, *_ in trial_killed] == ["finished"] * 2
    assert trial_killed == figures("worker", 1) == figures("undisturbed", 0)
    assert not lasting_workers(), "no worker is left behind"


def test_workers_of_stopped_and_failed_trials_are_gone(tmp_path: Path) -> None:
    spec = {
        "base": BASE,
        "set": {"scaling.num_workers": 2, "scaling.cpus_per_worker": 0.5},
        "space": {"algorithm.inner_lr": {"choice": [0.1, 1e30]}, **RATE},
        "samples": 4,
        "driver_cpus": 0.5,
        "scheduler": {"use": "asha", "reduction_factor": 4},
        "test": False,
    }
    folder = search(spec, f"run_dir={tmp_path / 'search'}")
    assert {row["state"] for row in rows(folder)} >= {"failed"}
    assert all(math.isfinite(float(r["best_accuracy"])) for r in rows(folder) if r["state"] != "failed")
    assert not lasting_workers()
    groups = ray.util.placement_group_table().values()
    assert {group["state"] for group in groups} <= {"REMOVED"}


def test_a_name_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_search({"base": BASE, "space": RATE})
    assert loaded.name == "search" and RunFolder.new(loaded).path.parent == tmp_path / "runs"
