"""The strategy that a trial at the start of a run chooses, once for all that goes on with it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from problems import Blobs
from torch import Tensor, nn
from torch._inductor import config as inductor

import distmeta
from distmeta import MAML, RunFolder
from distmeta.config import load
from distmeta.errors import ConfigError, WorkerError
from distmeta.experiment import assemble
from distmeta.strategy import choose, settled
from distmeta.tune.files import load_search

SETTINGS = [
    "tasks.use=problems:Blobs", "model={use: mlp, hidden: [4]}", "algorithm.inner_lr=0.1",
    "train.meta_batch_size=6", "train.shard_size=3", "train.steps=4", "validation.every=0", "evaluation.tasks=0",
    "scaling.num_workers=0", "outer.schedule=null",
]  # fmt: skip


@pytest.fixture(autouse=True)
def trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Path:
    """The folder in which the trials of one test are kept."""
    monkeypatch.setenv("DISTMETA_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "distmeta")
    return tmp_path / "cache" / "strategies"


def train(folder: Path, strategy: str, *settings: str) -> RunFolder:
    return distmeta.train(
        "glyphs-5way-1shot-maml", *SETTINGS, f"train.strategy={strategy}", f"run_dir={folder}", *settings
    )


def favour(trials: Path, favoured: str) -> Path:
    """Rewrites the one trial that is kept as if ``favoured`` had been the fastest."""
    (kept,) = trials.iterdir()
    timings = {name: {"start": 0.0, "shard": 0.01 if name == favoured else 1.0} for name in ("loop", "vmap")}
    kept.write_text(json.dumps({"timings": timings}))
    return kept


def parameters(run: RunFolder, step: int) -> bytes:
    return (run.checkpoints / f"step-{step:08}" / "meta.safetensors").read_bytes()


def test_the_choice_is_stored_and_kept(trials: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = train(tmp_path / "first", "auto")
    chosen = run.config().train.strategy
    assert chosen in ("loop", "vmap")
    (kept,) = trials.iterdir()
    timings = json.loads(kept.read_text())["timings"]
    assert set(timings) == {"loop", "vmap"} and all(timing["shard"] > 0 for timing in timings.values())
    (line,) = [text for text in caplog.messages if "by a trial" in text]
    assert line.startswith(f"train.strategy: {chosen}, by a trial of 3 tasks: loop takes ")
    assert "compiled is left out: " in line and line.endswith(f"(kept in {kept})")

    # A new run does what the kept trial says; the old one goes on as it began, on a machine that has changed its mind.
    other = {"loop": "vmap", "vmap": "loop"}[chosen]
    written = favour(trials, other).read_text()
    assert train(tmp_path / "second", "auto").config().train.strategy == other
    assert kept.read_text() == written, "nothing is measured twice"
    resumed = distmeta.resume(run.path, "train.steps=6", "scaling.num_workers=0")
    assert resumed.config().train.strategy == chosen
    assert parameters(resumed, 6) == parameters(train(tmp_path / "straight", chosen, "train.steps=6"), 6)
    with pytest.raises(ConfigError, match=f"train.strategy: {chosen} → auto would make this another run"):
        distmeta.resume(run.path, "train.strategy=auto")


def test_parameters_do_not_depend_on_the_workers(trials: Path, tmp_path: Path, ray_cluster: None) -> None:
    train(tmp_path / "trial", "auto")
    favour(trials, "vmap")
    runs = [train(tmp_path / str(n), "auto", f"scaling.num_workers={n}") for n in (0, 1, 2)]
    assert {run.config().train.strategy for run in runs} == {"vmap"}
    assert {parameters(run, 4) for run in runs} == {parameters(train(tmp_path / "given", "vmap"), 4)}


class Branching(nn.Module):
    """A network that looks at its numbers, which cannot be vectorised."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y if bool(y.sum() > 0) else 2 * y


class Broken(Branching):
    """One that works in no way."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken")


def test_what_cannot_be_vectorised_is_computed_in_a_loop(
    trials: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def attempt(model: nn.Module, strategy: str) -> RunFolder:
        parts = {"model": model, "tasks": Blobs(), "algorithm": MAML(inner_lr=0.1)}
        settings = [*SETTINGS[3:], f"train.strategy={strategy}", f"run_dir={tmp_path / strategy}"]
        return distmeta.train({}, *settings, **parts)

    assert attempt(Branching(), "auto").config().train.strategy == "loop"
    (line,) = [text for text in caplog.messages if text.startswith("train.strategy")]
    assert line.startswith("train.strategy: loop; vmap and compiled are left out: ") and "data-dependent" in line
    with pytest.raises(ConfigError, match=r"vmap cannot be used, .* \(RuntimeError: .*; set train\.strategy=loop"):
        attempt(Branching(), "vmap")
    with pytest.raises(WorkerError, match=r"the meta-gradient of task 0 .* failed: RuntimeError: broken"):
        attempt(Broken(), "vmap")
    assert not trials.exists(), "the name of an object does not say what it is"


def test_a_strategy_that_fails_is_left_out(trials: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path / "trial", "auto")
    kept = favour(trials, "vmap")
    experiment = assemble(load("glyphs-5way-1shot-maml", [*SETTINGS, "train.strategy=auto", "train.steps=1000000"]))
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        for _ in range(2):
            assert choose(experiment) == "vmap"
    assert caplog.text.count("auto tries the compiler") == 1, "the second time the reason is known"
    assert caplog.text.count("needs a C++ compiler") == 2
    kept.write_text("{")
    assert choose(assemble(load("glyphs-5way-1shot-maml", [*SETTINGS, "train.strategy=auto"]))) in ("loop", "vmap")
    assert f"{kept} cannot be read" in caplog.text
    assert set(json.loads(kept.read_text())["timings"]) == {"loop", "vmap"}


def test_a_cache_that_cannot_be_written_is_done_without(
    trials: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trials.parent.mkdir()
    trials.write_text("a file where the folder should be")
    assert train(tmp_path / "run", "auto").config().train.strategy in ("loop", "vmap")
    assert "the trial of strategies is not kept: " in caplog.text


def test_a_gpu_wants_more_than_a_loop(caplog: pytest.LogCaptureFixture) -> None:
    def told(strategy: str, *settings: str) -> list[str]:
        caplog.clear()
        settled(assemble(load("glyphs-5way-1shot-maml", [*SETTINGS, f"train.strategy={strategy}", *settings])))
        return caplog.messages

    (line,) = told("loop", "scaling.use_gpu=true")
    assert "leaves a GPU idle" in line and "train.shard_size" in line
    assert not told("loop") and not told("vmap", "scaling.use_gpu=true")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a driver without a GPU")
def test_a_driver_without_a_gpu_cannot_try(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.strategy: auto tries the strategies in this process, .* no GPU"):
        train(tmp_path / "run", "auto", "scaling.use_gpu=true")


def test_trials_of_a_search_are_all_computed_alike(tmp_path: Path) -> None:
    search = tmp_path / "search.yaml"
    search.write_text("space: {outer.lr: {loguniform: [0.001, 0.1]}}\nset: {train.strategy: auto, train.steps: 200}\n")
    with pytest.raises(ConfigError, match=r"train\.strategy: auto could choose another one for each trial"):
        load_search(str(search))
