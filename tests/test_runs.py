"""Runs from the command line and from Python, end to end: train, stop, resume, evaluate, adapt."""

from __future__ import annotations

import csv
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from commands import TINY, cli, digest
from PIL import Image
from problems import Blobs

import distmeta
from distmeta import MAML, Reptile, RunFolder, checkpoint
from distmeta.core.loss import mse
from distmeta.core.seeds import stream
from distmeta.errors import CheckpointError, ConfigError, RunError
from distmeta.models import MLP
from distmeta.report import status
from distmeta.tasks.glyphs import Glyphs


def test_a_run_folder_holds_what_the_design_says(trained: RunFolder) -> None:
    names = {path.name for path in trained.path.iterdir() if not path.name.startswith(".")}
    assert names == {"config.yaml", "metrics.jsonl", "checkpoints", "summary.json", "report", "tensorboard"}
    summary = trained.summary()
    assert summary["steps"] == 6
    assert summary["tasks_per_second"] > 0
    assert {"torch", "ray", "distmeta", "numpy", "numba", "python"} == set(summary["versions"])
    test = summary["test"]
    assert test["tasks"] == 12
    assert test["transductive"] is True
    assert {"mean", "ci95"} == set(test["inductive"]) == set(test["before"]) == set(summary["nearest_neighbour"])
    assert len(test["by_inner_step"]["accuracy"]) == 4  # before and after each of 3 inner steps
    assert test["by_inner_step"]["accuracy"][3] == test["after"]
    assert test["change"]["mean"] == pytest.approx(test["after"]["mean"] - test["before"]["mean"])
    assert (trained.path / "report" / "index.html").stat().st_size > 1000
    kinds = [record["kind"] for record in trained.records()]
    assert kinds == ["val", "train"] * 3
    assert all(record["seconds"]["map"] > 0 for record in trained.records() if record["kind"] == "train")
    config = trained.config()
    assert config.tasks.options["rotations"] is False  # defaults are written out
    assert distmeta.config.load(trained.path / "config.yaml") == config


def test_status_says_how_far_a_run_has_come(trained: RunFolder, tmp_path: Path) -> None:
    said = cli("status", trained.path).stdout
    assert "6 of 6 outer steps, finished" in said
    assert "0 shards redone" in said and "validation  accuracy" in said and "test        accuracy" in said
    copy = RunFolder(shutil.copytree(trained.path, tmp_path / "copy"))
    (copy.path / "summary.json").unlink()
    assert "stopped; `distmeta resume` goes on with it" in status(copy)
    with copy.lock():
        assert "6 of 6 outer steps, training" in status(copy)
    assert cli("status", tmp_path).returncode == 2


def test_defaults_that_are_no_plain_data_are_left_to_the_class(tmp_path: Path) -> None:
    overrides = ["tasks.use=problems:Blobs", "train.steps=1", "scaling.num_workers=0", "evaluation.tasks=0"]
    run = distmeta.train({}, *overrides, f"run_dir={tmp_path / 'run'}", model=MLP((3,), 3, (4,)))
    assert run.config().tasks.options == {"shape": [3], "ways": 3, "shots": 2}  # dtype, a torch.dtype, is not written


def test_no_steps_judge_the_untrained_model(tmp_path: Path) -> None:
    run = distmeta.train(None, *TINY, "train.steps=0", f"run_dir={tmp_path / 'run'}")
    assert run.summary()["test"] == run.summary()["untrained"]
    assert checkpoint.steps(run.checkpoints) == [0]


def test_evaluation_repeats_the_summary(trained: RunFolder) -> None:
    again = distmeta.evaluate(trained, "scaling.num_workers=0")
    assert again == trained.summary()["test"]
    assert distmeta.evaluate(trained.path, episodes=5, checkpoint="4")["tasks"] == 5


def test_best_and_numbered_checkpoints(trained: RunFolder) -> None:
    validations = {r["step"]: r["after"]["mean"] for r in trained.records() if r["kind"] == "val"}
    best = max(validations, key=lambda step: (validations[step], -step))
    assert trained.checkpoint("best").state["outer"]["step"] == best
    assert trained.checkpoint("last").state["outer"]["step"] == 6
    assert set(checkpoint.steps(trained.checkpoints)) == {best, 4, 6}
    with pytest.raises(CheckpointError, match="no checkpoint '5'"):
        trained.checkpoint("5")


def test_best_is_kept_when_it_falls_between_checkpoints(tmp_path: Path) -> None:
    run = distmeta.train(None, *TINY, "validation.every=1", "checkpoint.every=100", f"run_dir={tmp_path / 'run'}")
    assert run.checkpoint("best").state["outer"]["step"] == run.summary()["checkpoint"]


def test_a_signal_saves_and_resuming_gives_the_same_bits(tmp_path: Path) -> None:
    settings = [*TINY, "train.steps=250", "evaluation.tasks=0", "validation.every=0", "checkpoint.every=1000"]
    straight = distmeta.train(None, *settings, f"run_dir={tmp_path / 'straight'}")
    stopped = tmp_path / "stopped"
    command = [sys.executable, "-m", "distmeta", "train", *settings, f"run_dir={stopped}", "train.log_every=1"]
    for number, (first, lines) in {
        signal.SIGINT: (command, 5),
        signal.SIGTERM: ([*command[:3], "resume", str(stopped)], 60),
    }.items():
        process = subprocess.Popen(first, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (stopped / "metrics.jsonl").exists() and len(RunFolder(stopped).records()) >= lines:
                break
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        assert f"`distmeta resume {stopped}` goes on from there" in errors
        assert "Traceback" not in errors
    assert 60 <= checkpoint.steps(stopped / "checkpoints")[-1] < 250
    resumed = cli("resume", stopped)
    assert resumed.returncode == 0, resumed.stderr
    assert digest(stopped, 250) == digest(straight.path, 250)
    steps = [record["step"] for record in RunFolder(stopped).records()]
    assert steps == list(range(1, 251))


def draw(folder: Path, classes: dict[str, int], images: int, first: int = 0) -> None:
    """Writes glyphs as a user would bring them: dark on white, larger, PNG."""
    tasks = Glyphs(ways=len(classes), shots=20 - 1, queries=1)
    episode = tasks.sample(stream("a user's classes"), "test")
    x, y = episode.support_set
    for name, label in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(x[y == label][first : first + images]):
            pixels = 255 - (picture[0] * 255).to(torch.uint8).numpy()
            Image.fromarray(pixels).resize((84, 84)).save(folder / name / f"{first + i}.png")


def test_adapt_to_a_users_own_pictures(trained: RunFolder, tmp_path: Path) -> None:
    classes = {"ani": 0, "bani": 1, "gani": 2}  # fewer than the five of training
    draw(tmp_path / "support", classes, 1)
    draw(tmp_path / "query", classes, 4, first=1)
    out = tmp_path / "out"
    done = cli("adapt", trained.path, "--support", tmp_path / "support", "--query", tmp_path / "query", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert rows[0]["file"] == "ani/1.png"
    for row in rows:
        probabilities = [float(row[f"p({name})"]) for name in classes]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert float(row["probability"]) == max(probabilities)
        assert probabilities[list(classes).index(row["class"])] == max(probabilities)
    assert json.loads((out / "classes.json").read_text()) == ["ani", "bani", "gani"]
    weights = safetensors.torch.load_file(out / "adapted.safetensors")
    assert {f"model.{name}" for name in weights} == set(trained.checkpoint().params)
    again = cli("adapt", trained.path, "--support", tmp_path / "support", "--query", tmp_path / "query", "--out", out)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_python_objects_train_resume_evaluate_adapt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = {"model": MLP((3,), 3, (16,)), "tasks": Blobs(), "algorithm": MAML(inner_lr=0.5, inner_steps=2)}
    settings = [
        "train.steps=150",
        "validation.every=0",
        "evaluation.tasks=100",
        "scaling.num_workers=0",
        "outer.lr=0.01",
    ]
    run = distmeta.train(None, *settings, f"run_dir={tmp_path / 'run'}", **parts)
    summary = run.summary()
    assert summary["test"]["after"]["mean"] > summary["untrained"]["after"]["mean"]
    assert summary["test"]["transductive"] is False
    assert "inductive" not in summary["test"]
    assert distmeta.evaluate(run, episodes=100, **parts) == summary["test"]
    with pytest.raises(ConfigError, match=r"tasks of this run was the Python object problems\.Blobs.*tasks="):
        distmeta.evaluate(run)

    episode = Blobs().sample(stream(5), "test")
    adapted = distmeta.adapt(run, episode.support_set, **parts)
    x, y = episode.query_set
    outputs = adapted.predict(x)
    assert torch.equal(outputs, adapted.module(x))
    assert (outputs.argmax(-1) == y).float().mean() > 0.6

    longer = distmeta.resume(run.path, "train.steps=160", **parts)
    assert longer.checkpoint().state["outer"]["step"] == 160


def test_an_adapted_model_predicts_each_example_by_itself(trained: RunFolder) -> None:
    episode = Glyphs(queries=3).sample(stream(9), "test")
    adapted = distmeta.adapt(trained, episode.support_set)
    x = episode.query_set[0]
    assert torch.equal(adapted.predict(x)[4:5], adapted.predict(x[4:5]))


def test_user_loss_and_frozen_parameters(tmp_path: Path) -> None:
    class Line:
        def sample(self, rng, split):
            slope = float(rng.uniform(-2, 2))
            x = torch.from_numpy(rng.uniform(-1, 1, (20, 1))).float()
            return distmeta.Episode((x[:10], slope * x[:10]), (x[10:], slope * x[10:]))

    model = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(model.bias).requires_grad_(False)
    run = distmeta.train(
        {"train": {"steps": 60}, "evaluation": {"tasks": 40}, "validation": {"every": 0}},
        "scaling.num_workers=0", "train.strategy=vmap", "outer.lr=0.05", f"run_dir={tmp_path / 'run'}",
        model=model, loss=mse, tasks=Line(), algorithm=MAML(inner_lr=1.0, inner_steps=1),
    )  # fmt: skip
    assert set(run.checkpoint().params) == {"model.weight"}
    test = run.summary()["test"]
    assert test["metric"] == "loss"
    assert test["after"]["mean"] < 0.3 * test["before"]["mean"]


def test_a_run_folder_is_used_once_and_by_one(trained: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="exists already; `distmeta resume"):
        distmeta.train(None, *TINY, f"run_dir={trained.path}")
    with trained.lock(), pytest.raises(RunError, match="in use by another process"):
        distmeta.resume(trained.path)
    with pytest.raises(RunError, match="not the folder of a run"):
        distmeta.resume(tmp_path)


def test_a_changed_configuration_is_shown_and_has_to_be_allowed(trained: RunFolder, tmp_path: Path) -> None:
    copy = shutil.copytree(trained.path, tmp_path / "copy")
    refused = cli("resume", copy, "outer.lr=0.5", "seed=1", "train.steps=8")
    assert refused.returncode == 2
    assert "outer.lr: 0.002 → 0.5" in refused.stderr and "seed: 0 → 1" in refused.stderr
    assert "--allow outer.lr" in refused.stderr and "train.steps" not in refused.stderr
    assert refused.stderr.count("\n") == 1
    for overrides, allow, message in (
        (["run_dir=elsewhere"], ["run_dir"], "run_dir of an existing run cannot be changed"),
        (["seed=1"], ["sead"], "--allow sead: there is no such key"),
        (["algorithm.inner_lrr=1"], [], "algorithm.inner_lrr: unknown key; did you mean 'inner_lr'"),
        (["train.steps=5"], [], r"train.steps=5 is less than the 6 steps that are done; --checkpoint goes back"),
    ):
        with pytest.raises(ConfigError, match=message):
            distmeta.resume(copy, *overrides, allow=allow)
    with pytest.raises(ConfigError, match=r"outer.lr: 0.002 → 3.0 would make this another run; only scaling"):
        distmeta.evaluate(copy, "outer.lr=3")
    assert RunFolder.open(copy).config() == trained.config(), "nothing has been written"

    distmeta.resume(copy, "seed=0", "outer.lr=0.5", "train.steps=8", "train.log_every=1", allow=["outer.lr"])
    records = RunFolder.open(copy).records()
    assert [r["changed"] for r in records if r["kind"] == "change"] == [{"outer.lr": [0.002, 0.5]}]
    last = next(r for r in reversed(records) if r["kind"] == "train")
    # the schedule's arguments are those of the run (T_max 6); its rates are as if 0.5 had been the first
    assert last["lr"] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 6)) / 2, rel=1e-6)
    assert "changed     at step 6: outer.lr: 0.002 → 0.5" in status(RunFolder(copy))
    distmeta.resume(copy, checkpoint="6")
    change = next(r for r in RunFolder.open(copy).records() if r["kind"] == "change")
    assert change["step"] == 6


def test_two_at_once_do_not_share_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distmeta", "train", *TINY, f"run_dir={tmp_path / 'run'}"]
    both = [subprocess.Popen([*command, f"seed={seed}"], stderr=subprocess.PIPE, text=True) for seed in (1, 2)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], errors
    assert RunFolder.open(tmp_path / "run").config().seed == codes.index(0) + 1


def test_frozen_parameters_of_other_values_are_refused(tmp_path: Path) -> None:
    def parts(seed: int) -> dict:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        model[0].requires_grad_(False)
        return {"model": model, "tasks": Blobs(), "algorithm": MAML(inner_lr=0.5)}

    settings = ["train.steps=2", "validation.every=0", "evaluation.tasks=0", "scaling.num_workers=0"]
    run = distmeta.train(None, *settings, f"run_dir={tmp_path / 'run'}", **parts(1))
    support = Blobs().sample(stream(1), "test").support_set
    distmeta.adapt(run, support, **parts(1))
    for use in (lambda: distmeta.adapt(run, support, **parts(2)), lambda: distmeta.resume(run.path, **parts(2))):
        with pytest.raises(CheckpointError, match="frozen parameters or buffers have other values"):
            use()


def test_vectorising_is_checked_but_not_refused_for_usual_layers(tmp_path: Path) -> None:
    from torch import nn

    norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(2, 1, 8, 8))
    parts = {"model": model, "tasks": Blobs((1, 8, 8)), "algorithm": MAML(inner_lr=0.1)}
    settings = ["train.steps=3", "validation.every=0", "evaluation.tasks=4", "scaling.num_workers=0"]
    run = distmeta.train(None, *settings, "train.strategy=vmap", f"run_dir={tmp_path / 'run'}", **parts)
    assert run.summary()["steps"] == 3


def test_reptile_through_the_command_line_with_outer_schedule(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = cli("train", "glyphs-5way-1shot-reptile", *TINY, "algorithm.test_inner_steps=3", f"run_dir={run}")
    assert done.returncode == 0, done.stderr
    rates = [r["lr"] for r in RunFolder(run).records() if r["kind"] == "train"]
    assert rates == pytest.approx([5.5 / 6, 3.5 / 6, 1.5 / 6])
    shown = cli("evaluate", run, "--episodes", 4)
    assert shown.returncode == 0
    assert "inductive" in shown.stdout
    assert isinstance(RunFolder(run).config().algorithm.options["batch_size"], int)
    assert Reptile().inner_steps == 5
