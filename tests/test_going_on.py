"""Runs that are gone on with after something has gone wrong, or with other settings, are what they say they are."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import Blobs, HeadedMLP

import distmeta
from distmeta import MAML, RunFolder, checkpoint
from distmeta.core.types import Episode, Split
from distmeta.errors import ConfigError, NumericalError, WorkerError
from distmeta.replay import replay
from distmeta.training import Training

SETTINGS = [
    "train.meta_batch_size=2", "train.shard_size=2", "train.log_every=1", "scaling.num_workers=0", "evaluation.tasks=4",
    "evaluation.baselines=false", "validation.tasks=4", "outer.lr=0.3",
]  # fmt: skip


class Flaky(Blobs):
    """Blobs whose validation fails once, where ``fail`` has been set."""

    fail = False

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        if split == "val" and self.fail:
            self.fail = False
            raise OSError("the disk has a hiccup")
        return super().sample(rng, split)


def parts(**more: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return {"model": HeadedMLP(3, 3), "tasks": Flaky(), "algorithm": MAML(inner_lr=0.05)} | more


def train(folder: Path, *more: str, **objects: Any) -> RunFolder:
    return distmeta.train({}, *SETTINGS, *more, f"run_dir={folder}", **parts(**objects))


class FlakyAt(Flaky):
    """Its validation fails in the ``count``-th evaluation."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.seen = count, 0

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        self.seen += split == "val"
        self.fail = split == "val" and self.seen == 4 * (self.count - 1) + 1
        return super().sample(rng, split)


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_validation_that_fails_is_made_up_for(failing: int, tmp_path: Path) -> None:
    steps = ["train.steps=8", "validation.every=2", "checkpoint.every=100"]
    straight = train(tmp_path / "straight", *steps)
    with pytest.raises(WorkerError, match="hiccup"):
        train(tmp_path / "failed", *steps, tasks=FlakyAt(failing))
    again = distmeta.resume(tmp_path / "failed", **parts())
    lines = lambda run: [  # noqa: E731
        {key: value for key, value in record.items() if key not in ("seconds", "tasks_per_second")}
        for record in run.records()
    ]
    by_step = lambda records: sorted(records, key=lambda record: (record["step"], record["kind"]))  # noqa: E731
    assert by_step(lines(again)) == by_step(lines(straight))
    for key in ("checkpoint", "test"):
        assert again.summary()[key] == straight.summary()[key]
    assert again.checkpoint("last").state == straight.checkpoint("last").state


def test_allowed_changes_outlive_a_process_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tmp_path / "run", "train.steps=6", "validation.every=0", "checkpoint.every=6")
    step = Training._step

    def killed(self: Training, *given: Any) -> Any:
        if self.outer.step == 8:
            os._exit(9)
        return step(self, *given)

    monkeypatch.setattr(Training, "_step", killed)
    if (child := os.fork()) == 0:
        distmeta.resume(run.path, "train.steps=12", "outer.lr=0.5", allow=["outer.lr"], **parts())
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL << 8
    monkeypatch.undo()
    distmeta.resume(run.path, **parts())
    rates = {record["step"]: record["lr"] for record in run.records() if record["kind"] == "train"}
    assert rates == {step: 0.3 if step <= 6 else 0.5 for step in range(1, 13)}
    assert sum(record["kind"] == "change" for record in run.records()) == 1


def test_a_checkpoint_without_settings_has_those_of_its_run(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "train.steps=2", "validation.every=0")
    outer = run.checkpoint("last").state["outer"]
    checkpoint.amend(run.checkpoints, 2, {"outer": {key: outer[key] for key in outer if key != "settings"}})
    assert run.checkpoint("last").state["outer"] == outer
    distmeta.resume(run.path, "train.steps=3", "outer.lr=0.5", allow=["outer.lr"], **parts())
    assert [record["lr"] for record in run.records() if record["kind"] == "train"] == [0.3, 0.3, 0.5]


def test_a_task_of_before_a_change_is_not_replayed_with_what_came_after(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "train.steps=4", "validation.every=0", "checkpoint.every=100")
    before = replay(run.path, 2, 0, **parts())
    distmeta.resume(run.path, "train.steps=8", "outer.lr=0.01", allow=["outer.lr"], **parts())
    with pytest.raises(ConfigError, match=r"since step 4 changed outer.lr: 0.3 → 0.01: the parameters of step 0"):
        replay(run.path, 2, 0, **parts())
    assert replay(run.path, 6, 0, **parts()).rerun == 2, "from the checkpoint of step 4, before which nothing matters"
    assert before.rerun == 2


def test_going_back_finds_what_was_best_then(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    best = {3: 2, 4: 4}
    for step in range(1, 5):
        state = {"best": {"step": best[step]} if step in best else None}
        checkpoint.save(folder, step, checkpoint.Checkpoint({"w": torch.zeros(1)}, {}, state))
    checkpoint.prune(folder, keep_last=2)
    assert checkpoint.steps(folder) == [2, 3, 4]
    (folder / ".removing-step-00000002").mkdir()
    (folder / ".removing-step-00000002" / "meta.safetensors").touch()  # of a process that was killed at it
    checkpoint.prune(folder, keep_last=1)
    assert checkpoint.steps(folder) == [4] and not list(folder.glob(".removing*"))


class Counting(HeadedMLP):
    """Counts its calls in a buffer, in place or by a new one."""

    def __init__(self, in_place: bool) -> None:
        super().__init__(3, 3)
        self.in_place = in_place
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_place:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return super().forward(x)


def test_networks_that_change_when_they_are_called_are_refused(tmp_path: Path) -> None:
    normed = HeadedMLP(3, 3)
    torch.nn.utils.parametrizations.spectral_norm(normed.body[0])
    calls, vectors = "calls", r"body\.0\.parametrizations\.weight\.0\._[uv]"
    for i, (name, model) in enumerate(((calls, Counting(True)), (calls, Counting(False)), (vectors, normed))):
        with pytest.raises(ConfigError, match=rf"the model changes its buffer {name} when it is called"):
            train(tmp_path / str(i), "train.steps=2", model=model)


class Wrong(Blobs):
    """Blobs whose training tasks are not what they should be."""

    def __init__(self, change: Callable[[Episode], Any]) -> None:
        super().__init__()
        self.change = change

    def sample(self, rng: np.random.Generator, split: Split) -> Any:
        return self.change(super().sample(rng, split))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "the name of an algorithm": ({"algorithm": "maml"}, "algorithm='maml': an object of MetaAlgorithm is expected"),
    "the class of an algorithm": ({"algorithm": MAML}, "algorithm=the class MAML: an object"),
    "the class of a model": ({"model": torch.nn.Linear}, "model=the class Linear: an object of Module"),
    "a model without parameters": ({"model": torch.nn.Tanh()}, r"the model \(Tanh\) has no trainable parameters"),
    "the name of a loss": ({"loss": "mse"}, r"loss='mse': a function loss\(output, target\) is expected"),
    "the class of tasks": ({"tasks": Blobs}, r"tasks=the class Blobs: an object is expected, as in tasks=Blobs\(…\)"),
    "a number for a loss": ({"loss": lambda *_: 0.5}, "must give a scalar tensor, or one and metrics; it gave a float"),
    "losses": ({"loss": lambda output, _: output}, r"it gave the shape \(6, 3\)"),
    "other shapes": ({"loss": torch.nn.functional.mse_loss}, r"puts out the shape \(6, 3\) for targets of .* \(6,\)"),
    "no episode": (
        {"tasks": Wrong(tuple)},
        r"task 0 of step 0 .* is a tuple: sample\(rng, split\) must give an Episode",
    ),
    "no tensors": (
        {"tasks": Wrong(lambda e: Episode((1, 2), e.query_set))},
        "the support set of task 0 .* of tensors, .* a tuple of int, int",
    ),
    "no examples": (
        {"tasks": Wrong(lambda e: Episode(e.support_set, tuple(part[:0] for part in e.query_set)))},
        r"the query set of task 0 of step 0 \(split train, seed 0\) is empty: shapes \(0, 3\), \(0,\)",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_is_given_in_python_is_refused_in_its_own_words(case: str, tmp_path: Path) -> None:
    objects, message = MISTAKES[case]
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "run", "train.steps=1", "validation.every=0", **objects)


def test_data_that_are_not_finite_are_not_blamed_on_a_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = Wrong(
        lambda e: Episode(tuple(x * torch.nan if x.is_floating_point() else x for x in e.support_set), e.query_set)
    )
    with pytest.raises(NumericalError, match=r"is nan; its support set is not finite itself; train.on_failure=skip"):
        train(tmp_path / "run", "train.steps=1", "validation.every=0", tasks=bad)
    run = train(tmp_path / "sound", "train.steps=1", "validation.every=0")
    x, y = Blobs().sample(np.random.default_rng(0), "test").support_set
    assert distmeta.adapt(run, (x, y), **parts()).predict(x).isfinite().all()
    for support, error, message in (
        ((x * torch.nan, y), NumericalError, "not finite after adaptation .*: nor is the support set"),
        ((x[:0], y[:0]), ConfigError, r"the support set is empty: shapes \(0, 3\), \(0,\)"),
        (x, ConfigError, "the support set must be a tuple of tensors, .*; given: a Tensor"),
    ):
        with pytest.raises(error, match=message):
            distmeta.adapt(run, support, **parts())
    caplog.clear()
    bad = Wrong(
        lambda e: Episode(e.support_set, tuple(x * torch.nan if x.is_floating_point() else x for x in e.query_set))
    )
    distmeta.evaluate(run, **parts(tasks=bad))
    assert "4 of 4 test tasks have a loss that is not finite before any adaptation" in caplog.text


@pytest.mark.parametrize(
    ("steps", "said"), [(3, "checkpoint of step 2; none after step 2 was validated"), (4, "(checkpoint of step ")]
)
def test_steps_that_no_validation_has_seen_are_said(
    steps: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They cannot be the best, so that what is judged is an earlier checkpoint."""
    train(tmp_path / "run", f"train.steps={steps}", "validation.every=2", "outer.lr=0.01")
    told = "".join(capsys.readouterr())
    assert said in told and ("none after" in told) == (steps == 3)
