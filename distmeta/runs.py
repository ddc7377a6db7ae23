"""The folder of a run: ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``summary.json``, ``report/``."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from distmeta import checkpoint
from distmeta.config import Config, read_yaml, validate
from distmeta.errors import CheckpointError, RunError, StorageError


class RunFolder:
    """A run on disk, new or not."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """Makes the folder that ``config`` asks for and writes its ``config.yaml``.

        Raises:
            RunError: The folder exists already.
            StorageError: It cannot be written.
        """
        name = config.name or "run"
        path = Path(config.run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(
                f"{path} exists already; `distmeta resume {path}` goes on with it, run_dir=… takes another folder"
            )
        folder = cls(path)
        config = config.model_copy(update={"run_dir": str(path)})
        with storage_errors(path):
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            checkpoint.write_durably(path / "config.yaml", text.encode())
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run.

        Raises:
            RunError: There is none at ``path``.
        """
        folder = cls(path)
        if not (folder.path / "config.yaml").is_file():
            raise RunError(f"{folder.path} is not the folder of a run: it holds no config.yaml")
        return folder

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The file of metrics, one JSON object a line."""
        return self.path / "metrics.jsonl"

    def config(self) -> Config:
        """The run's complete configuration."""
        return validate(read_yaml(self.path / "config.yaml"))

    def checkpoint(self, which: str = "last") -> checkpoint.Checkpoint:
        """The checkpoint called ``last``, ``best`` (by validation; the last one without it) or by its step.

        Raises:
            CheckpointError: There is none, or it is damaged.
        """
        steps = checkpoint.steps(self.checkpoints)
        if not steps:
            raise CheckpointError(f"{self.path} holds no checkpoint yet")
        if which == "last":
            step = steps[-1]
        elif which == "best":
            best = self.checkpoint("last").state["best"]
            step = best["step"] if best else steps[-1]
        elif which.isdigit() and int(which) in steps:
            step = int(which)
        else:
            raise CheckpointError(
                f"{self.path} has no checkpoint {which!r}; it has best, last and the steps {', '.join(map(str, steps))}"
            )
        return checkpoint.load(checkpoint.path_of(self.checkpoints, step))

    def summary(self) -> dict[str, Any]:
        """The final metrics; empty while the run is not finished."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replaces ``summary.json``."""
        with storage_errors(self.path):
            temporary = self.path / ".summary.json"
            checkpoint.write_durably(temporary, json.dumps(summary, indent=2).encode())
            os.replace(temporary, self.path / "summary.json")

    def records(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; a last one that was cut off while it was written is left out."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def forget_after(self, step: int) -> None:
        """Drops the metrics of steps after ``step``, which a resumed run computes again."""
        if self.metrics.exists():
            kept = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= step]
            temporary = self.path / ".metrics.jsonl"
            with storage_errors(self.path):
                checkpoint.write_durably(temporary, "".join(kept).encode())
                os.replace(temporary, self.metrics)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run against a second process.

        Raises:
            RunError: Another process is at it.
        """
        with storage_errors(self.path), open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(f"{self.path} is in use by another process; wait for it, or stop it") from error
            yield


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` into a `StorageError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} could not be written: {error.strerror or error}") from error
