"""Checkpoints that are written aside: what they hold, when training waits for them, and what becomes of errors."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from distmeta import checkpoint
from distmeta.checkpoint import Checkpoint, Writer
from distmeta.errors import StorageError


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that flushes nothing until the event is set."""
    free, flush = threading.Event(), os.fsync

    def fsync(descriptor: int) -> None:
        assert free.wait(60)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return free


def state(value: float) -> Checkpoint:
    plain = {"rates": [value], "best": {"step": 1}}
    return Checkpoint({"w": torch.full((3,), value)}, {"m": torch.full((3,), -value)}, plain)


def test_training_goes_on_while_a_checkpoint_is_written(slow_disk: threading.Event, tmp_path: Path) -> None:
    with Writer() as writer:
        saved = state(1.0)
        writer.save(tmp_path, 1, saved, keep_last=1)
        saved.params["w"].fill_(9)  # the next steps change all of it in place
        saved.tensors["m"].fill_(9)
        saved.state["rates"].append(9)
        writer.check()  # which waits for nothing
        assert checkpoint.steps(tmp_path) == []

        second = threading.Thread(target=writer.save, args=(tmp_path, 2, state(2.0), 1))
        second.start()
        time.sleep(0.2)
        assert second.is_alive(), "one copy at a time: the second checkpoint waits for the first"
        slow_disk.set()
        second.join(60)
    assert checkpoint.steps(tmp_path) == [1, 2], "the best one is kept, and leaving the writer waits for the last"
    for step in (1, 2):
        found, wanted = checkpoint.load(checkpoint.path_of(tmp_path, step)), state(float(step))
        assert torch.equal(found.params["w"], wanted.params["w"])
        assert torch.equal(found.tensors["m"], wanted.tensors["m"])
        assert found.state == wanted.state


def test_an_error_is_raised_at_the_next_step_or_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    writer = Writer()
    writer.save(tmp_path / "file", 1, state(1.0), keep_last=1)
    deadline = time.monotonic() + 60
    with pytest.raises(StorageError, match=r"checkpoint .*step-00000001 could not be written \(Not a directory\)"):
        while time.monotonic() < deadline:
            writer.check()
    writer.check()  # it is said once
    with pytest.raises(StorageError, match="could not be written"), writer:
        writer.save(tmp_path / "file", 2, state(2.0), keep_last=1)


def test_an_error_beside_what_ends_the_run_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KeyboardInterrupt), Writer() as writer:
        writer.save(tmp_path / "file", 1, state(1.0), keep_last=1)
        raise KeyboardInterrupt
    assert "step-00000001 could not be written" in caplog.text
