"""Files of the data sets: where they lie, how they are written whole or not at all, how they are downloaded."""

from __future__ import annotations

import hashlib
import http.client
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from distmeta.errors import DataError, StorageError

_BLOCK = 1 << 20  # bytes read at a time
_TIMEOUT = 60.0  # seconds without a byte after which a download is given up


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

    Raises:
        DataError: the server cannot be reached or refuses, the connection breaks off, or the checksum differs.
        StorageError: the file cannot be written.
    """
    by_hand = f"download it by hand to {path}, or name another folder by data_root or $DISTMETA_DATA"
    digest, size = hashlib.md5(usedforsecurity=False), 0
    with atomic_write(path) as file:
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
                promised = response.headers.get("Content-Length")
                for block in iter(lambda: response.read(_BLOCK), b""):
                    digest.update(block)
                    size += len(block)
                    try:
                        file.write(block)
                    except OSError as error:  # a full disk is not to be mistaken for a network failure
                        raise _cannot_write(path, error) from error
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: not an address at all
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
            raise DataError(f"cannot download {url}: {error}; {by_hand}") from error
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
