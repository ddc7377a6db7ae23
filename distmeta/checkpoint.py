"""Checkpoints: whole or absent, and checked when they are read.

A checkpoint is the folder ``step-XXXXXXXX`` with ``meta.safetensors`` (the meta-parameters), ``outer.safetensors`` (the
tensors of the outer optimizer) and ``state.json`` (the rest, and the others' checksums). It is written under another
name, flushed to disk and renamed. Nothing is ever unpickled.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self

import safetensors.torch
from torch import Tensor

from distmeta.core.types import Params
from distmeta.errors import CheckpointError, StorageError, one_line

log = logging.getLogger("distmeta")

FORMAT = 1
"""A new number where this package could not read what it writes now with the code of before, or the other way round."""


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    params: Params
    """Meta-parameters under their joined names."""
    tensors: dict[str, Tensor]
    """Of the outer optimizer."""
    state: dict[str, Any]
    """Plain data."""


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of outer step ``step`` lies."""
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    found = [path.name[5:] for path in folder.glob("step-*") if path.is_dir()]
    return sorted(int(name) for name in found if name.isdigit())


def save(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint; one of the same step is there already only if it holds the same.

    Raises:
        StorageError: It could not be written. Those before it are untouched.
    """
    final = path_of(folder, step)
    if final.exists():
        return final
    temporary = folder / f".writing-{final.name}"
    meta = safetensors.torch.save({name: tensor.detach().contiguous() for name, tensor in checkpoint.params.items()})
    outer = safetensors.torch.save({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()})
    try:
        content = json.dumps(checkpoint.state, sort_keys=True, allow_nan=True)
    except TypeError as error:
        raise StorageError(f"the state of the outer optimizer or its schedule cannot be saved: {error}") from error
    sums = {
        "meta.safetensors": _sha256(meta),
        "outer.safetensors": _sha256(outer),
        "content": _sha256(content.encode()),
    }
    about = {"format": FORMAT, "distmeta": version("distmeta")}
    record = json.dumps(about | {"sha256": sums, "content": content}, indent=1)
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        for name, data in (("meta.safetensors", meta), ("outer.safetensors", outer), ("state.json", record.encode())):
            write_durably(temporary / name, data)
        sync_folder(temporary)
        temporary.rename(final)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = steps(folder)
        raise StorageError(
            f"checkpoint {final} could not be written ({error.strerror or error}); "
            + (f"the one of step {kept[-1]} is whole" if kept else "there is none before it")
            + "; free some space, then resume"
        ) from error
    return final


class Writer:
    """Saves checkpoints from a thread of its own, so that training goes on meanwhile.

    It holds one copy of the state: a second checkpoint waits until the first is on disk. As a context manager it waits
    for the last one.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, folder: Path, step: int, checkpoint: Checkpoint, keep_last: int) -> None:
        """Copies ``checkpoint``, and begins to write it and then to `prune` what is older.

        Raises:
            StorageError: The one before could not be written.
        """
        self.wait()
        params, tensors = (
            {name: tensor.detach().clone() for name, tensor in part.items()}
            for part in (checkpoint.params, checkpoint.tensors)
        )
        kept = Checkpoint(params, tensors, copy.deepcopy(checkpoint.state))
        self._writing = self._thread.submit(_save_and_prune, folder, step, kept, keep_last)

    def check(self) -> None:
        """Raises the `StorageError` of a checkpoint that could not be written, if there is one; waits for none."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Returns once the checkpoint at hand is on disk.

        Raises:
            StorageError: It could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            self.wait()
        except StorageError as error:
            if kind is None:
                raise
            log.warning("%s", error)  # beside what has ended the run
        finally:
            self._thread.shutdown()


def _save_and_prune(folder: Path, step: int, checkpoint: Checkpoint, keep_last: int) -> None:
    save(folder, step, checkpoint)
    prune(folder, keep_last)


def amend(folder: Path, step: int, changes: dict[str, Any]) -> None:
    """Replaces parts of a checkpoint's plain data.

    Raises:
        CheckpointError: It is missing or damaged.
        StorageError: It could not be written, and is as it was.
    """
    path = path_of(folder, step)
    content = json.dumps(load(path).state | changes, sort_keys=True, allow_nan=True)
    record = json.loads((path / "state.json").read_text())
    record |= {"content": content, "sha256": record["sha256"] | {"content": _sha256(content.encode())}}
    temporary = path / ".writing-state.json"
    try:
        write_durably(temporary, json.dumps(record, indent=1).encode())
        temporary.replace(path / "state.json")
        sync_folder(path)
    except OSError as error:
        raise StorageError(f"checkpoint {path} could not be written ({error.strerror or error})") from error


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint.

    Raises:
        CheckpointError: It is missing or damaged, or of another version.
    """
    try:
        record = json.loads((path / "state.json").read_text())
        if record["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {path} has format {record['format']!r}, written by distmeta "
                f"{record.get('distmeta', 'of an unknown version')}; this is distmeta {version('distmeta')}, which "
                f"reads format {FORMAT}: use the version that has written it"
            )
        content = record["content"]
        files = {name: (path / name).read_bytes() for name in ("meta.safetensors", "outer.safetensors")}
        for name, data in {**files, "content": content.encode()}.items():
            if _sha256(data) != record["sha256"][name]:
                raise ValueError(f"the checksum of {name.replace('content', 'state.json')} differs")
        meta, outer = (safetensors.torch.load(files[name]) for name in ("meta.safetensors", "outer.safetensors"))
        return Checkpoint(meta, outer, json.loads(content))
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, safetensors.SafetensorError) as e:
        reason = f"state.json has no {e}" if isinstance(e, KeyError) else one_line(e)
        raise CheckpointError(f"checkpoint {path} is damaged: {reason}") from e


def newest_whole(folder: Path, before: int) -> int | None:
    """The newest step below ``before`` whose checkpoint can be read; damaged ones on the way are said."""
    for step in reversed([step for step in steps(folder) if step < before]):
        try:
            load(path_of(folder, step))
        except CheckpointError as error:
            log.warning("%s", error)
        else:
            return step
    return None


def prune(folder: Path, keep_last: int) -> None:
    """Removes all but the ``keep_last`` newest checkpoints, and those that were the best when one of them was saved."""
    found = steps(folder)
    newest = found[-keep_last:]
    best = {_best_of(path_of(folder, step)) for step in newest}
    for step in found:
        if step not in best and step not in newest:
            remove(folder, step)


def _best_of(path: Path) -> int | None:
    """The step that validation had found best when the checkpoint was saved."""
    try:
        best = json.loads(json.loads((path / "state.json").read_text())["content"])["best"]
        return None if best is None else int(best["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged, which whoever goes back to it is told


def remove(folder: Path, step: int) -> None:
    """Removes a checkpoint, never leaving half of one under its name.

    Raises:
        StorageError: It cannot be removed.
    """
    doomed = folder / f".removing-{path_of(folder, step).name}"
    try:
        if doomed.exists():  # of a process that was killed here
            shutil.rmtree(doomed)
        path_of(folder, step).rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        raise StorageError(f"checkpoint {doomed} could not be removed: {error.strerror or error}") from error


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file and flushes it to disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flushes the entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
