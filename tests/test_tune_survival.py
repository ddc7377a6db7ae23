"""Searches that lose the process that drives them, and searches on several nodes."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import yaml
from ray.tune import ExperimentAnalysis
from test_search_space import BASE

import distmeta
from distmeta.tune.run import resume_search

HERE = Path(__file__).resolve().parent
SPEC = {
    "base": BASE,
    "set": {"train.steps": 40},
    "space": {"outer.lr": {"loguniform": [1e-3, 1e-1]}},
    "samples": 5,
    "max_concurrent": 2,
}


def environment() -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return inherited | {"PYTHONPATH": str(HERE)}


def tune(*arguments: object, **more: str) -> subprocess.Popen[str]:
    """The command, on a Ray of its own unless ``more`` of the environment names one."""
    command = [sys.executable, "-m", "distmeta", "tune", *map(str, arguments)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment() | more
    )


@pytest.fixture(scope="module")
def shared(ray_cluster: None) -> dict[str, str]:
    """The environment that leads to the session's Ray."""
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def figures(folder: Path) -> list[tuple[str, ...]]:
    with (folder / "results.csv").open() as file:
        return [
            tuple(row[k] for k in ("trial", "state", "outer.lr", "step", "best_accuracy"))
            for row in csv.DictReader(file)
        ]


def wait_for(process: subprocess.Popen[str], pattern: str) -> str:
    """What the process says until a line has ``pattern``."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if re.search(pattern, line):
            return said
    raise AssertionError(f"it has ended without {pattern!r}: {said}")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("search") / "rates.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    return path


@pytest.fixture(scope="module")
def undisturbed(file: Path, shared: dict[str, str]) -> list[tuple[str, ...]]:
    folder = file.parent / "undisturbed"
    process = tune(file, f"run_dir={folder}", **shared)
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "5 trials: 5 finished" in said
    return figures(folder)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_search_goes_on_after_its_driver_is_lost(
    number: signal.Signals,
    file: Path,
    undisturbed: list[tuple[str, ...]],
    shared: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The process that is lost takes its Ray with it; the search goes on, and on, on another one."""
    folder = tmp_path / "search"
    process = tune(file, f"run_dir={folder}")
    said = wait_for(process, "trial-002 finished")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    ended = set(re.findall(r"(trial-\d+) finished", said + errors))
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert f"`distmeta tune --resume {folder}` goes on with it" in errors
        assert "Traceback" not in errors
    time.sleep(1)
    assert not (folder / "results.csv").exists()
    results = {path.parent.name: path.read_text() for path in folder.glob("trials/trial-*/result.json")}
    assert 3 <= len(ended) < 5
    if number == signal.SIGKILL:
        _let_the_state_lag(folder)

    resumed = tune("--resume", folder, **shared)
    said, errors = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, errors
    assert "5 trials: 5 finished" in said
    assert figures(folder) == undisturbed
    # A second or two of what the driver has seen may have gone with it: those trials are looked at again, at most.
    again = set(re.findall(r"(trial-\d+) finished", errors))
    assert len(again & ended) <= 2, "what has ended is not run again"
    for name in ended - again:
        assert (folder / "trials" / name / "result.json").read_text() == results[name]

    capfd.readouterr()
    resume_search(folder)  # there is nothing left to do, and what was found is still there
    second = capfd.readouterr()
    assert "5 trials: 5 finished" in second.out
    assert "finished at step" not in second.err
    assert figures(folder) == undisturbed


def _let_the_state_lag(folder: Path) -> None:
    """What a kill at the wrong moment leaves: the state names a checkpoint that newer ones have replaced."""
    moved = 0
    for trial in ExperimentAnalysis(str(folder / "trials")).trials:
        named = Path(trial.checkpoint.path) if trial.checkpoint else None
        if trial.status != "TERMINATED" and named is not None and named.is_dir():
            named.rename(named.with_name("checkpoint_000090"))
            (named.with_name("checkpoint_000091") / "checkpoints").mkdir(parents=True)  # and one that was cut off
            moved += 1
    assert moved, "a trial was under way"


def test_trials_of_three_bundles_on_three_nodes(tmp_path: Path) -> None:
    """A trial holds 3 cores and a node has 2, so that each trial spans nodes, and two of the three fit at a time."""
    spec = SPEC | {
        "set": {"train.steps": 40, "scaling.num_workers": 2},
        "samples": 3,
        "max_concurrent": None,
        "test": False,
    }
    command = [sys.executable, str(HERE / "simulated" / "search.py"), json.dumps(spec), str(tmp_path / "search")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment())
    assert done.returncode == 0, done.stderr
    assert "3 trials: 3 finished" in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"utilisation of 6 cores by 3 trials of 3: {found['utilisation']:.0%} on average")
    assert (found["nodes"], found["cpus"], found["most_used"]) == (3, 6, 6)
    assert max(found["spread"]) == 2
    assert (found["free"], set(found["groups"]), found["workers"]) == (6, {"REMOVED"}, []), "nothing is left behind"

    alone = tmp_path / "alone"
    best = tmp_path / "search" / "best.yaml"
    distmeta.train(best, f"run_dir={alone}", "scaling.num_workers=0", "evaluation.tasks=0")
    weights = "checkpoints/step-00000040/meta.safetensors"
    assert (alone / weights).read_bytes() == (tmp_path / "search" / "best_run" / weights).read_bytes()
