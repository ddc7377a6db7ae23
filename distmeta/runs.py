"""The folder of a run: ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``summary.json``, ``report/``."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import yaml

from distmeta import checkpoint
from distmeta.config import Config, load, read_yaml
from distmeta.errors import CheckpointError, ConfigError, RunError, StorageError, one_line
from distmeta.experiment import complete
from distmeta.mirror import Mirror, is_url

MAY_CHANGE = (
    "scaling.num_workers", "scaling.min_workers", "scaling.resources", "scaling.placement", "scaling.cpus_per_worker",
    "scaling.gpus_per_worker", "scaling.address", "scaling.start_timeout", "scaling.shard_timeout", "evaluation",
    "checkpoint", "validation", "train.steps", "train.log_every", "train.on_failure", "tasks.step_timeout",
    "data_root", "name",
)  # fmt: skip
"""Keys and sections that may be changed when a run is resumed: none changes the parameters after a given step."""


ABSENT = "absent"
BEGUN = (".lock", ".writing-config.yaml")
"""What a folder may hold that is not a run yet."""


class Named(Protocol):
    """What says how a folder is to be called."""

    @property
    def name(self) -> str | None: ...

    @property
    def run_dir(self) -> str | None: ...


class RunFolder:
    """A run on disk, new or not.

    Args:
        path: Its folder, or a URL that fsspec knows; ``self.path`` is then its working copy (see `distmeta.mirror`).
    """

    def __init__(self, path: str | Path) -> None:
        self.mirror = Mirror(str(path)) if is_url(path) else None
        self.path = self.mirror.path if self.mirror else Path(path).absolute()
        self.address = self.mirror.url if self.mirror else str(self.path)
        """What commands and messages call it by."""

    @classmethod
    def new(cls, config: Named) -> RunFolder:
        """The folder that ``config``, of a run or of a search, asks for, not made yet.

        Raises:
            RunError: The folder exists already.
        """
        name = config.name or "run"
        folder = cls(config.run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        folder.refuse_used()
        return folder

    def refuse_used(self) -> None:
        """Raises `RunError` if the folder holds anything but what one who has died while beginning has left."""
        path = self.path
        if self.mirror is not None:
            if self.mirror.used():
                if self.in_use():
                    raise RunError(f"{self.address} is in use by another process; wait for it, or stop it")
                raise RunError(
                    f"{self.address} exists already; `distmeta resume {self.address}` goes on with it, run_dir=… takes "
                    "another folder"
                )
            self.mirror.forget()
        elif path.exists() and (not path.is_dir() or any(entry.name not in BEGUN for entry in path.iterdir())):
            go_on = {"config.yaml": "distmeta resume", "search.yaml": "distmeta tune --resume"}
            command = next((text for file, text in go_on.items() if (path / file).exists()), None)
            hint = f"`{command} {path}` goes on with it, " if command else ""
            raise RunError(f"{path} exists already; {hint}run_dir=… takes another folder")

    def create(self, config: Config) -> None:
        """Fills a new folder, whose lock is held, with its ``config.yaml``.

        Raises:
            RunError: Another process has used the folder since it was found to be new.
            StorageError: It cannot be written.
        """
        if self.mirror is None:
            self.refuse_used()
        elif (self.path / "config.yaml").exists():
            raise RunError(f"{self.address} exists already; run_dir=… takes another folder")
        self.write_config(config.model_copy(update={"run_dir": self.address}))  # from now on it can be resumed
        with storage_errors(self.path):
            self.checkpoints.mkdir()

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run.

        Raises:
            RunError: There is none at ``path``.
        """
        folder = cls(path)
        if folder.mirror is not None:
            folder.mirror.fetch()
        folder.check_exists()
        return folder

    def check_exists(self) -> None:
        """Raises `RunError` if this is not the folder of a run."""
        if not (self.path / "config.yaml").is_file():
            raise RunError(f"{self.address} is not the folder of a run: it holds no config.yaml")

    def check(self) -> None:
        """Raises `RunError` if another process has taken over the URL that this run is kept at."""
        if self.mirror is not None:
            self.mirror.check()

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The file of metrics, one JSON object a line."""
        return self.path / "metrics.jsonl"

    def config(
        self,
        overrides: Sequence[str] = (),
        may_change: Sequence[str] = MAY_CHANGE,
        allow: Sequence[str] | None = None,
    ) -> Config:
        """The run's complete configuration, with ``overrides`` of keys that do not make it another run.

        Args:
            overrides: ``"key.subkey=value"`` strings.
            may_change: Keys and sections whose values may be others than those that the run was begun with.
            allow: More of them; None where no more can be asked for.

        Raises:
            ConfigError: A value would be another one that may not be; the message gives both.
        """
        data = read_yaml(self.path / "config.yaml")
        config = load(data, overrides)
        if not overrides and not allow:
            return config
        changed = differences(complete(load(data)), config := complete(config))
        for key in allow or ():
            if not any(covered(one, [key]) for one in _flat(config.model_dump(mode="json"))):
                raise ConfigError(f"--allow {key}: there is no such key or section in this run's configuration")
        refused = {key: both for key, both in changed.items() if not covered(key, may_change)}
        if "run_dir" in refused:
            raise ConfigError(f"run_dir of an existing run cannot be changed: move the folder {self.address} itself")
        refused = {key: both for key, both in refused.items() if not covered(key, allow or ())}
        if refused and allow is None:
            raise ConfigError(f"{describe(refused)} would make this another run; only {', '.join(may_change)} may be "
                              "changed here: start a new run for the rest")  # fmt: skip
        if refused:
            raise ConfigError(
                f"{describe(refused)} would make this another run; to go on with it nevertheless, with parameters that "
                f"neither configuration alone gives: {' '.join(f'--allow {key}' for key in refused)}"
            )
        return config

    def write_config(self, config: Config) -> None:
        """Replaces ``config.yaml``."""
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        self.write("config.yaml", text)

    def checkpoint(self, which: str = "last") -> checkpoint.Checkpoint:
        """The checkpoint called ``last``, ``best`` (by validation; the last one without it) or by its step.

        Raises:
            CheckpointError: There is none, or it is damaged.
        """
        steps = checkpoint.steps(self.checkpoints)
        if not steps:
            raise CheckpointError(f"{self.address} holds no checkpoint yet")
        if which == "last":
            step = steps[-1]
        elif which == "best":
            best = self.checkpoint("last").state["best"]
            step = best["step"] if best else steps[-1]
        elif which.isdigit() and int(which) in steps:
            step = int(which)
        else:
            raise CheckpointError(
                f"{self.address} has no checkpoint {which!r}; it has best, last and the steps "
                + ", ".join(map(str, steps))
            )
        path = checkpoint.path_of(self.checkpoints, step)
        try:
            found = checkpoint.load(path)
            if not _is_state(found.state):
                raise CheckpointError(f"checkpoint {path} holds something else than the state of a run")
            if "settings" not in found.state["outer"]:  # earlier code did not save them
                found.state["outer"]["settings"] = self.config().outer.model_dump(mode="json")
            return found
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._offer(step)}") from error

    def _offer(self, damaged: int) -> str:
        """What to do about a checkpoint that cannot be read."""
        address = shlex.quote(self.address)
        if (whole := checkpoint.newest_whole(self.checkpoints, damaged)) is not None:
            return (
                f"the one before it, of step {whole}, is whole: `distmeta resume {address} --checkpoint {whole}` goes "
                "on from there, to the same bits"
            )
        config = shlex.quote(str(self.path / "config.yaml"))
        return f"no whole one is before it: `distmeta train {config} run_dir=…` begins again, with the same bits"

    def summary(self) -> dict[str, Any]:
        """The final metrics; empty while the run is not finished."""
        path = self.path / "summary.json"
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise RunError(f"{path} is damaged ({error}); `distmeta resume` writes it again") from error

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replaces ``summary.json``."""
        self.write("summary.json", json.dumps(summary, indent=2))

    def records(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; a last one that was cut off while it was written is left out."""
        if not self.metrics.exists():
            return []
        records: list[dict[str, Any]] = []
        with self.metrics.open(errors="replace") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith("\n"):
                    break
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict) or not {"kind", "step"} <= record.keys():
                        raise ValueError("it is no record with a kind and a step")
                    records.append(record | {"step": int(record["step"])})
                except (ValueError, TypeError, OverflowError, RecursionError) as error:
                    raise RunError(
                        f"line {number} of {self.metrics} is damaged ({one_line(error)}); delete that line to go on"
                    ) from error
        return records

    def add_record(self, record: dict[str, Any]) -> None:
        """Adds a line to ``metrics.jsonl``."""
        with storage_errors(self.metrics), self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def forget_after(self, step: int, validation: bool = False) -> None:
        """Drops the summary, and the metrics of steps after ``step``, which a resumed run computes again.

        With ``validation`` it makes that of ``step`` again. What was changed later has its effect from ``step`` on.
        """
        with storage_errors(self.path):
            (self.path / "summary.json").unlink(missing_ok=True)
        if self.metrics.exists():
            records = [
                record | {"step": min(record["step"], step)} if record["kind"] == "change" else record
                for record in self.records()
            ]
            again = ("val",) if validation else ()
            kept = [r for r in records if r["step"] < step or (r["step"] == step and r["kind"] not in again)]
            self.write(self.metrics.name, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, name: str, text: str) -> None:
        """Writes a file of the folder whole, or leaves the one before."""
        temporary = self.path / f".writing-{name}"
        with storage_errors(self.path / name):
            checkpoint.write_durably(temporary, text.encode())
            temporary.replace(self.path / name)
            checkpoint.sync_folder(self.path)

    def in_use(self) -> bool:
        """Whether a process is at this run, on this machine; on any, for a URL."""
        try:
            with self._lock_here():
                return self.mirror is not None and self.mirror.holder() is not None
        except RunError:
            return True

    @contextmanager
    def lock(self) -> Generator[None]:
        """Holds the run, whose folder is made if it is not there, against a second process.

        Raises:
            RunError: Another process is at it, or its URL cannot be written.
            StorageError: The folder cannot be written, or at the end its URL cannot.
        """
        with self._lock_here(), self.mirror.held() if self.mirror else nullcontext():
            yield

    @contextmanager
    def _lock_here(self) -> Generator[None]:
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / ".lock", "w")  # noqa: SIM115
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(f"{self.address} is in use by another process; wait for it, or stop it") from error
            yield


def _is_state(state: Any) -> bool:
    """Whether this is the plain part of a checkpoint of a run, as far as it is read without its optimizer."""
    if not isinstance(state, dict) or not isinstance(state.get("outer"), dict) or "best" not in state:
        return False
    best, kinds = state["best"], {"step": int, "metric": str, "value": (int, float)}
    known = best is None or (isinstance(best, dict) and all(isinstance(best.get(k), kind) for k, kind in kinds.items()))
    return known and isinstance(state["outer"].get("step"), int) and isinstance(state.get("constants"), str)


def differences(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """Each dotted key whose value differs, with both values; `ABSENT` where one has no such key."""
    old, new = (_flat(config.model_dump(mode="json")) for config in (before, after))
    pairs = {key: (old.get(key, ABSENT), new.get(key, ABSENT)) for key in [*old, *new]}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def describe(changed: dict[str, tuple[Any, Any]]) -> str:
    """What `differences` gives, for messages."""
    return ", ".join(f"{key}: {old} → {new}" for key, (old, new) in changed.items())


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def covered(key: str, patterns: Sequence[str]) -> bool:
    """Whether ``key`` is one of ``patterns``, is in the section called so, or begins so with an underscore."""
    return f"{key}.".startswith(tuple(one if one.endswith("_") else f"{one}." for one in patterns))


@contextmanager
def storage_errors(path: Path) -> Generator[None]:
    """Turns an ``OSError`` into a `StorageError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} could not be written: {error.strerror or error}") from error
