"""Run folders at URLs of every kind: trained here, gone on with there, and no two at one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import cli
from simulated.stores import SETTINGS, STORES, reach, weights

import distmeta
from distmeta import RunFolder, checkpoint, mirror
from distmeta.errors import RunError
from distmeta.report import report, status


@pytest.fixture(params=[*STORES, "file"])
def base(request: pytest.FixtureRequest, servers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A URL below which there is nothing yet."""
    if request.param == "file":
        return (tmp_path / "elsewhere").as_uri()
    return reach(monkeypatch, servers(request.param))


def test_a_run_lives_at_a_url(base: str, other_machine, tmp_path: Path) -> None:
    """Trained here, gone on with on another machine, and used on a third: as if it lay on one disk."""
    url, longer = f"{base}/first", ["train.steps=10", "evaluation.tasks=0"]
    straight = distmeta.train({}, *SETTINGS, *longer, f"run_dir={tmp_path / 'straight'}")
    trained = distmeta.train({}, *SETTINGS, "checkpoint.keep_last=1", f"run_dir={url}")
    shown = url.replace(":secret@", "@")
    assert trained.config().run_dir == shown == trained.address
    with pytest.raises(RunError, match=f"{shown} exists already; `distmeta resume {shown}` goes on with it"):
        distmeta.train({}, *SETTINGS, f"run_dir={url}")

    other_machine()
    fetched = RunFolder.open(url)
    assert not fetched.path.samefile(trained.path)
    assert checkpoint.steps(fetched.checkpoints) == checkpoint.steps(trained.checkpoints)
    assert fetched.records() == trained.records() and fetched.summary() == trained.summary()
    assert distmeta.evaluate(url, "scaling.num_workers=0") == trained.summary()["test"]
    resumed = distmeta.resume(url, *longer)
    assert weights(resumed, 10) == weights(straight, 10)

    other_machine()
    assert "10 of 10 outer steps, finished" in status(RunFolder.open(url))
    third = RunFolder.open(url)
    steps = checkpoint.steps(third.checkpoints)
    assert steps[-1] == 10 and steps == checkpoint.steps(resumed.checkpoints), "what was pruned is gone there as well"
    assert weights(third, 10) == weights(straight, 10)
    assert "test" not in third.summary()
    page = report([third])
    assert shown in page.read_text()
    for file in [file for file in third.path.rglob("*") if file.is_file()]:
        assert b"secret" not in file.read_bytes(), f"the password is in {file}"
    there = set(third.mirror._names())
    assert {"config.yaml", "metrics.jsonl", "summary.json", "report/index.html"} <= there
    assert mirror.LOCK not in there and not [name for name in there if "/." in name or name.startswith(".")]


def test_a_checkpoint_at_a_url_is_whole_or_absent(base: str, other_machine) -> None:
    """A machine that is lost between any two writes leaves checkpoints that can all be read."""
    url = f"{base}/cut"
    run = RunFolder(url)
    complete = distmeta.train({}, *SETTINGS, "evaluation.tasks=0", f"run_dir={url}-whole")
    shutil.copytree(complete.path, run.path, ignore=shutil.ignore_patterns(".*", "report", "tensorboard"))
    there = run.mirror
    there._there, there._sent = set(), {}
    names = sorted(p.relative_to(run.path).as_posix() for p in run.path.rglob("*") if p.is_file())

    class Cut(Exception):
        pass

    write, writes = there._store.put, 0

    def cut(name: str, content: bytes) -> None:
        if writes == 0:
            raise Cut
        write(name, content)
        raise Cut

    there._store.put = cut
    other_machine()
    seen = set()
    for writes in [0] + [1] * len(names):
        with pytest.raises(Cut):
            there._send()
        if writes and "config.yaml" not in there._names():
            continue
        if writes:
            fetched = RunFolder.open(url)
            steps = checkpoint.steps(fetched.checkpoints)
            for step in steps:
                checkpoint.load(checkpoint.path_of(fetched.checkpoints, step))
            seen.add(len(steps))
            there._sent = {
                name: (stat.st_mtime_ns, stat.st_size)
                for name in there._names() if (stat := (run.path / name).stat())
            }  # fmt: skip
    assert seen == set(range(len(checkpoint.steps(run.checkpoints)) + 1))


def test_two_machines_do_not_share_a_url(base: str, other_machine, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{base}/shared"
    run = distmeta.train({}, *SETTINGS, "evaluation.tasks=0", f"run_dir={url}")
    with run.lock():
        assert "training" in status(run) or run.in_use()
        other_machine()
        with pytest.raises(RunError, match=r"is in use by process \d+ on .*, which has given a sign of life"):
            distmeta.resume(url)
        assert RunFolder.open(url).in_use()
        monkeypatch.setattr(mirror, "STALE", -1.0)  # the first one has said nothing for too long
        taking = RunFolder.open(url)
        with taking.lock():
            monkeypatch.setattr(mirror, "STALE", 300.0)
            run.mirror._beaten -= mirror.BEAT
            assert not run.mirror._try_to_send()
            with pytest.raises(RunError, match="was taken over by process"):
                run.check()
            run.mirror._lost = None
            run.mirror._own = taking.mirror._own


def test_a_run_that_was_killed_goes_on_from_what_this_machine_has(servers, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{reach(monkeypatch, servers('s3'))}/killed"
    settings = [*SETTINGS, "train.steps=100000", "evaluation.tasks=0", "validation.every=0", "train.log_every=1"]
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "distmeta", "train", *settings, f"run_dir={url}"], stderr=subprocess.DEVNULL, env=here
    )
    run = RunFolder(url)
    deadline = time.monotonic() + 120
    while not checkpoint.steps(run.checkpoints) or checkpoint.steps(run.checkpoints)[-1] < 50:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert "training" in cli("status", url).stdout
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = checkpoint.steps(run.checkpoints)[-1]
    said = cli("resume", url, f"train.steps={reached + 10}")
    assert said.returncode == 0, said.stderr
    assert f"run      {url}" in said.stderr
    records = [record["step"] for record in run.records()]
    assert records == list(range(1, reached + 11))
    assert json.loads((run.path / "summary.json").read_text())["steps"] == reached + 10
