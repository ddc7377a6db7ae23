"""Runs that something has happened to: damaged checkpoints, full disks, losses that are not finite."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
from commands import TINY, cli, digest

import distmeta
from distmeta import RunFolder, checkpoint
from distmeta.errors import CheckpointError, RunError, StorageError


def test_a_checkpoint_of_another_model_is_refused(trained: RunFolder, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained.path, copy)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("filters: 8", "filters: 16"))
    with pytest.raises(
        CheckpointError, match=r"does not fit the model: model\.features\.0\.conv\.weight is \(8, 1, 3, 3\)"
    ):
        distmeta.resume(copy)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        distmeta.evaluate(copy)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "state", "version"])
def test_a_damaged_checkpoint_is_found_and_the_one_before_named(
    trained: RunFolder, tmp_path: Path, damage: str
) -> None:
    copy = shutil.copytree(trained.path, tmp_path / "a run")
    last = copy / "checkpoints" / "step-00000006"
    meta, state = last / "meta.safetensors", last / "state.json"
    data = bytearray(meta.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
        meta.write_bytes(data)
    elif damage == "truncate":
        meta.write_bytes(data[: len(data) // 2])
    elif damage == "delete":
        meta.unlink()
    elif damage == "state":
        state.write_text(state.read_text().replace('\\"step\\": 6', '\\"step\\": 7'))
    else:
        state.write_text(state.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError) as caught:
        distmeta.resume(copy)
    message = str(caught.value)
    said = {
        "flip": "the checksum of meta.safetensors differs",
        "truncate": "the checksum of meta.safetensors differs",
        "delete": "meta.safetensors is missing",
        "state": "the checksum of state.json differs",
        "version": f"has format 99, written by distmeta {version('distmeta')}; this is distmeta",
    }
    assert said[damage] in message and "step-00000006" in message
    command = message.split("`")[1]
    assert command == f"distmeta resume '{copy}' --checkpoint 4"
    assert "the one before it, of step 4, is whole" in message
    distmeta.resume(copy, checkpoint=command.split()[-1])
    assert digest(copy, 6) == digest(trained.path, 6)


def test_a_run_without_a_whole_checkpoint_can_begin_again(trained: RunFolder, tmp_path: Path) -> None:
    copy = shutil.copytree(trained.path, tmp_path / "copy")
    for file in copy.glob("checkpoints/*/outer.safetensors"):
        file.write_bytes(b"")
    done = cli("resume", copy)
    assert done.returncode == 2
    command = done.stderr.split("`")[1].split()
    assert command[:2] == ["distmeta", "train"] and command[-1] == "run_dir=…"
    again = cli("train", command[2], f"run_dir={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    assert digest(tmp_path / "again", 6) == digest(trained.path, 6)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], check=False).returncode:
        pytest.skip("this machine does not let its root mount a file system")
    try:
        run = disk / "run"
        settings = [*TINY, "train.steps=100", "evaluation.tasks=0", "validation.every=0", "train.log_every=100"]
        settings += ["model.filters=24", "checkpoint.every=1", "checkpoint.keep_last=100", f"run_dir={run}"]
        done = cli("train", *settings)
        assert done.returncode == 1
        assert "No space left on device" in done.stderr
        assert "is whole; free some space, then resume" in done.stderr
        assert "Traceback" not in done.stderr
        steps = checkpoint.steps(run / "checkpoints")
        assert len(steps) >= 1
        assert not list((run / "checkpoints").glob(".writing-*"))
        RunFolder.open(run).checkpoint("last")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_failing_step_saves_the_one_before(tmp_path: Path) -> None:
    settings = [s for s in TINY if not s.startswith("checkpoint")]
    done = cli("train", *settings, "algorithm.inner_lr=1e30", "validation.every=0", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the ")
    assert "task 0 of step 0 (split train, seed 0) is nan" in done.stderr
    assert "lower algorithm.inner_lr" in done.stderr
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [0]

    ruined = cli("train", *settings, "outer.use=SGD", "outer.lr=1e38", f"run_dir={tmp_path / 'ruined'}")
    assert ruined.returncode == 1
    assert "outer.lr" in ruined.stderr
    for step in checkpoint.steps(tmp_path / "ruined" / "checkpoints"):
        params = checkpoint.load(checkpoint.path_of(tmp_path / "ruined" / "checkpoints", step)).params
        assert all(bool(tensor.isfinite().all()) for tensor in params.values())


def test_storage_errors_name_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((StorageError, RunError), match="file"):
        distmeta.train(None, *TINY, f"run_dir={tmp_path / 'file' / 'run'}")
