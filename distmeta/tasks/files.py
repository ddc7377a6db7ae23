"""Files of the data sets: where they lie, how they are written whole or not at all, how they are downloaded."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from distmeta.errors import DataError, StorageError

log = logging.getLogger("distmeta")

_BLOCK = 1 << 20  # bytes read at a time
_TIMEOUT = 60.0  # seconds without a byte after which a connection is given up
_CONNECTIONS = 10  # most for one download, each of which must bring something
_EVERY = 5.0  # seconds between lines that say how far it has come


def default_data_root() -> Path:
    """The folder that data sets are looked for in and downloaded to: ``$DISTMETA_DATA``, else
    ``~/.cache/distmeta/data``."""
    given = os.environ.get("DISTMETA_DATA")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "distmeta" / "data"


def cache_dir() -> Path:
    """The folder of decoded data sets, which can be deleted at any time: ``$DISTMETA_CACHE``, else
    ``$XDG_CACHE_HOME/distmeta``, else ``~/.cache/distmeta``."""
    given, shared = os.environ.get("DISTMETA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given).expanduser()
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "distmeta"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that becomes ``path`` when the block ends without an exception, and vanishes otherwise.

    Readers see the old file or the new one, never a part. Several processes may write the same path: the last wins.

    Raises:
        StorageError: the folder cannot be made or written, or the disk is full.
    """
    # a name of its own for each writer, made by open() so that the umask holds (mkstemp would hide it from the group)
    aside = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "xb") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                aside.replace(path)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise _cannot_write(path, error) from error


def download(url: str, path: Path, md5: str) -> None:
    """Downloads ``url`` to ``path``, which appears only once the whole of it has arrived with checksum ``md5``.

    Where a connection breaks off, another goes on from there, if the server can (``Range``).

    Raises:
        DataError: the server cannot be reached or refuses, the connection breaks off for good, or the checksum differs.
        StorageError: the file cannot be written.
    """
    by_hand = f"download it by hand to {path}, or name another folder by data_root or $DISTMETA_DATA"
    digest, size, promised, said = hashlib.md5(usedforsecurity=False), 0, None, time.monotonic()
    with atomic_write(path) as file:
        for _ in range(_CONNECTIONS):
            before = size
            try:
                request = urllib.request.Request(url, headers={"Range": f"bytes={size}-"} if size else {})
                with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                    if size and response.status != http.client.PARTIAL_CONTENT:
                        break  # it would begin again
                    if not size:
                        promised = response.headers.get("Content-Length")
                    for block in iter(lambda: response.read(_BLOCK), b""):
                        digest.update(block)
                        size += len(block)
                        try:
                            file.write(block)
                        except OSError as error:  # a full disk is not to be mistaken for a network failure
                            raise _cannot_write(path, error) from error
                        if time.monotonic() - said > _EVERY:
                            said = time.monotonic()
                            of = f" of {int(promised) / 1e6:.1f}" if promised else ""
                            log.info("%s: %.1f%s MB", path.name, size / 1e6, of)
            except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: not an address at all
                if isinstance(error, urllib.error.HTTPError):
                    error.close()  # it holds the connection
                if size == before:
                    raise DataError(f"cannot download {url}: {error}; {by_hand}") from error
            else:
                if size == before or promised is None or size >= int(promised):
                    break
        if promised is not None and size != int(promised):
            raise DataError(
                f"the download of {url} broke off after {size} of {promised} bytes: try again, or {by_hand}"
            )
        if digest.hexdigest() != md5:
            raise DataError(
                f"{url} has the checksum {digest.hexdigest()} and not {md5}: it is not the file expected; {by_hand}"
            )


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}; free some space or name another folder")
