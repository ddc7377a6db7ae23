"""Run folders elsewhere: any URL that fsspec knows (``s3://``, ``gs://``, ``sftp://``, ``file://``, …).

A run works in a folder of its own machine, the working copy, as every run does, and a thread sends what has changed:
stores of objects know neither renaming nor appending, and a step should wait for no network. Each object is replaced
whole. A checkpoint is sent with ``state.json`` last and removed with ``state.json`` first, so that one without it is
none; the checksums in it tell a damaged one. Whoever opens the URL fetches a working copy.

What has not been sent yet is marked in the working copy (``.unsent``), which then counts for more than the URL: a run
whose last words were lost goes on from it on the same machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import posixpath
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distmeta.errors import DistmetaError, RunError, StorageError
from distmeta.stores import Gone, Store
from distmeta.tasks.files import cache_dir

log = logging.getLogger("distmeta")

LOCK = "lock.json"
SMALL = ("config.yaml", "metrics.jsonl", "summary.json")
"""What is fetched beside the checkpoints; TensorBoard's files and the report are sent only."""
LOOK = 15.0  # seconds between looks at what has changed
BEAT = 60.0  # seconds between signs of life in the lock
STALE = 300.0  # seconds without one after which its holder counts as lost
TRIES = 5  # at the end, before a run is left unsent
PATIENCE = 300.0  # seconds at the end without a file sent, for a connection that neither works nor breaks


def is_url(path: str | Path) -> bool:
    """Whether a run folder is given by its URL."""
    return "://" in str(path)


class Mirror:
    """A run folder at ``url``, and its working copy.

    Raises:
        ConfigError: The protocol is unknown, or its package is not installed.
        RunError: The URL cannot be used.
    """

    def __init__(self, url: str) -> None:
        self._store = Store(url)
        self.url = self._store.url
        name = f"{posixpath.basename(self.url)}-{hashlib.sha256(self.url.encode()).hexdigest()[:8]}"
        self.path = (cache_dir() / "runs" / name).absolute()
        self.failures = 0
        """How many times the URL could not be written."""
        self._unsent = self.path / ".unsent"
        self._own = {"host": socket.gethostname(), "process": os.getpid(), "folder": str(self.path)}
        self._own |= {"id": secrets.token_hex(8)}
        self._lost: DistmetaError | None = None
        self._silent = False  # whether the last attempt has failed

    # What is there

    def used(self) -> bool:
        """Whether there is a run at the URL, or one in the working copy that could not be sent.

        Raises:
            RunError: The URL cannot be reached.
        """
        return (self._unsent.exists() and (self.path / "config.yaml").exists()) or bool(self._names() - {LOCK})

    def forget(self) -> None:
        """Removes a working copy, of a run that is no longer at the URL."""
        shutil.rmtree(self.path, ignore_errors=True)

    def fetch(self) -> None:
        """Makes the working copy what is at the URL, unless it is ahead of that.

        Raises:
            RunError: The URL cannot be reached.
            StorageError: The working copy cannot be written.
        """
        there = self._names()
        steps = {
            name.split("/")[1] for name in there if name.startswith("checkpoints/") and name.endswith("/state.json")
        }
        if self._unsent.exists():
            if max(steps, default="") <= max((p.name for p in self.path.glob("checkpoints/step-*")), default=""):
                return
            log.warning("%s holds what was not sent to %s, where the run has gone on since: it is replaced",
                        self.path, self.url)  # fmt: skip
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            for folder in (self.path / "checkpoints").iterdir():
                if folder.name not in steps:
                    shutil.rmtree(folder)
            for name in SMALL:
                self._take(name)
            for step in sorted(steps):
                with contextlib.suppress(Gone):
                    self._take_checkpoint(f"checkpoints/{step}", there)
            self._unsent.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{self.path} could not be written: {error.strerror or error}") from error

    def _take_checkpoint(self, name: str, there: set[str]) -> None:
        """Fetches a checkpoint that is not here yet, whole or not at all (`Gone`: it has been pruned meanwhile)."""
        state = self._get(f"{name}/state.json")
        final, aside = self.path / name, self.path / "checkpoints" / f".fetching-{posixpath.basename(name)}"
        if (final / "state.json").is_file() and (final / "state.json").read_bytes() == state:
            return  # it holds the checksums of the others
        for folder in (aside, final):
            shutil.rmtree(folder, ignore_errors=True)
        aside.mkdir()
        for file in there:
            if posixpath.dirname(file) == name:
                (aside / posixpath.basename(file)).write_bytes(self._get(file))
        aside.rename(final)

    def _take(self, name: str) -> None:
        """Makes a file what it is at the URL; if there is none, there is none here."""
        aside = self.path / f".fetching-{name}"
        try:
            aside.write_bytes(self._get(name))
        except Gone:
            (self.path / name).unlink(missing_ok=True)
        else:
            aside.replace(self.path / name)

    def _get(self, name: str) -> bytes:
        with self._store.reaching():
            return self._store.get(name)

    def _names(self) -> set[str]:
        with self._store.reaching():
            return self._store.names()

    # Who may write

    def holder(self) -> dict[str, Any] | None:
        """Whoever is at the run, by its signs of life; None if nobody is.

        Raises:
            RunError: The URL cannot be reached.
        """
        with self._store.reaching():
            return self._holder()

    def _holder(self) -> dict[str, Any] | None:
        try:
            held = json.loads(self._store.get(LOCK))
            held["age"] = max(0.0, time.time() - held["time"])
        except (Gone, ValueError, KeyError, TypeError):
            return None
        mine = all(held.get(key) == self._own[key] for key in ("host", "folder")) and held.get("id") != self._own["id"]
        return None if held["age"] > STALE or mine else held  # of this machine, whose own lock is ours: it is dead

    @contextmanager
    def held(self) -> Generator[None]:
        """Within this context the URL is this process's, and gets what changes in the working copy.

        The caller holds the lock of the working copy. Between machines the lock is an object with signs of life: two
        that start within the same second may both believe that they hold it where the store has no exclusive writes;
        one of them then finds out at its next sign, and stops.

        Raises:
            RunError: Another process is at it, or it cannot be written.
            StorageError: At the end, what has been written could not be sent. It is whole in the working copy.
        """
        if holder := self.holder():
            raise RunError(
                f"{self.url} is in use by process {holder['process']} on {holder['host']}, which has given a sign of "
                f"life {holder['age']:.0f} s ago; wait for it, or stop it (if it is lost: wait {STALE:.0f} s)"
            )
        with self._store.reaching():
            self._store.reconnect()  # it may be long since it was made
            self._write_lock()
        self._there = self._names() - {LOCK}
        if "config.yaml" in self._there:
            self.fetch()  # another machine may have gone on with the run until now
        self._sent: dict[str, tuple[int, int]] = {}
        self._unsent.touch()
        self._end, self._tries, self._whole, self._lost = threading.Event(), TRIES, False, None
        thread = threading.Thread(target=self._follow, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            self._tries = 1 if isinstance(error, KeyboardInterrupt) else TRIES
            with contextlib.suppress(StorageError, RunError):  # has been said already
                self._finish(thread)
            raise
        self._finish(thread)

    def check(self) -> None:
        """Raises `RunError` if another process has taken the URL over."""
        if self._lost is not None:
            raise self._lost

    def _write_lock(self) -> None:
        self._store.put(LOCK, json.dumps(self._own | {"time": time.time()}).encode())
        self._beaten = time.monotonic()

    def _beat(self) -> None:
        """Gives a sign of life when it is time."""
        if time.monotonic() - self._beaten < BEAT:
            return
        holder = self._holder()
        if holder is not None and holder.get("id") != self._own["id"]:
            self._lost = RunError(
                f"{self.url} was taken over by process {holder.get('process')} on {holder.get('host')}; this one ends, "
                f"and what it has learned since is in {self.path}"
            )
            raise self._lost
        self._write_lock()

    # Sending

    def _follow(self) -> None:
        while not self._end.wait(LOOK) and self._lost is None:
            self._try_to_send()
        for attempt in range(self._tries):
            if attempt:
                time.sleep(2.0 ** (attempt - 1))
            self._whole = self._lost is None and self._try_to_send()
            if self._whole or self._lost is not None:
                return

    def _finish(self, thread: threading.Thread) -> None:
        """Waits until what is left has been sent, and lets go of the lock."""
        self._moved = time.monotonic()
        self._end.set()
        while thread.is_alive() and time.monotonic() - self._moved < PATIENCE:
            thread.join(1.0)
        self.check()
        if not self._whole:
            tried = f"{PATIENCE:.0f} s without an answer" if thread.is_alive() else f"{self.failures} attempts"
            self._lost = StorageError(  # so that a thread which wakes up later sends no more
                f"{self.url} could not be written after {tried}; the run is whole in {self.path}, and "
                f"`distmeta resume {self.url}` on this machine sends it"
            )
            raise self._lost
        self._unsent.unlink(missing_ok=True)
        with contextlib.suppress(Exception):  # it goes stale by itself
            self._store.remove(LOCK)

    def _try_to_send(self) -> bool:
        try:
            if self._silent:
                self._store.reconnect()
            self._beat()
            self._send()
        except Exception as error:  # each protocol has exceptions of its own; whatever it is, it is said and counted
            if error is self._lost:
                return False
            self.failures += 1
            if not self._silent:
                log.warning(
                    "%s cannot be written (%s): the run goes on; what it writes is in %s, and is sent when it can be",
                    self.url, self._store.reason(error), self.path,
                )  # fmt: skip
            self._silent = True
            return False
        if self._silent:
            log.warning("%s can be written again, and has all that is in %s", self.url, self.path)
        self._silent = False
        return True

    def _send(self) -> None:
        """Sends what has changed, in an order that leaves each checkpoint whole or absent."""
        here = {
            path.relative_to(self.path).as_posix(): path
            for path in self.path.rglob("*")
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(self.path).parts)
        }
        for name in sorted(here, key=_rank):
            try:
                about = here[name].stat()
                version = about.st_mtime_ns, about.st_size
                if self._sent.get(name) == version:
                    continue
                content = here[name].read_bytes()
            except FileNotFoundError:
                continue  # a checkpoint that was removed meanwhile
            self.check()
            self._there.add(name)
            self._store.put(name, content)
            self._sent[name] = version
            self._moved = time.monotonic()
        gone = {name for name in self._there if name not in here and (name.startswith("checkpoints/") or name in SMALL)}
        for name in sorted(gone, key=_rank, reverse=True):
            self._store.remove(name)
            self._there.discard(name)
            self._sent.pop(name, None)
        for folder in {posixpath.dirname(name) for name in gone} - {""}:
            if not (self.path / folder).exists():
                self._store.remove_folder(folder)


def _rank(name: str) -> tuple[int, str]:
    """The order of sending: metrics before a checkpoint, its state after its tensors, the summary last."""
    if name.endswith("/state.json"):
        return 2, name
    return (3 if name == "summary.json" else 1 if name.startswith("checkpoints/") else 0), name
