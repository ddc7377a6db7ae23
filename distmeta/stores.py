"""Files below a URL of any protocol that fsspec knows, and what its errors say to people."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import posixpath
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import fsspec

from distmeta.errors import ConfigError, DistmetaError, RunError, one_line

OBJECTS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "r2")
"""Protocols without folders, whose writes are whole or absent; elsewhere a file is written aside and renamed."""
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs",
            "abfss": "adlfs", "sftp": "sshfs", "ssh": "sshfs", "smb": "smbprotocol"}  # fmt: skip
SSH = {"known_hosts": (), "connect_timeout": 30, "keepalive_interval": 15}
"""How sshfs connects: to hosts in ``~/.ssh/known_hosts`` alone, and with an end to waiting for one that is gone."""
GOOGLE = ("gs", "gcs")
TALKATIVE = ("gcsfs", "google.auth", "azure")
"""Loggers that say at length what is raised as well."""


class Gone(Exception):
    """A file is not there, or no longer."""


class Store:
    """The files below ``url``. A password in it is used, and neither said nor written down.

    Its methods raise what the protocol does; within `reaching` that becomes one line.

    Raises:
        ConfigError: The protocol is unknown, or its package is not installed.
        RunError: The URL cannot be used.
    """

    def __init__(self, url: str) -> None:
        url = url.rstrip("/")
        self._secret = _password(url)
        self.url = url.replace(f":{self._secret}@", "@", 1) if self._secret else url
        """The URL without its password."""
        self._protocol = self.url.partition("://")[0]
        self._folders = self._protocol not in OBJECTS
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        options: dict[str, Any] = SSH if self._protocol in ("sftp", "ssh") else {}
        if self._protocol in GOOGLE and os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            options = {"token": "google_default"}  # gcsfs would go on as nobody if they cannot be read
        # Where a protocol keeps a connection, the one that fsspec gives to all who ask may have been lost.
        self._connect = functools.partial(fsspec.core.url_to_fs, url, **options, skip_instance_cache=self._folders)
        package = PACKAGES.get(self._protocol)
        try:
            if package:
                importlib.import_module(package)  # for sftp fsspec would make do with another, which trusts any host
            self._fs, self._root = self._connect()
            if self._protocol in GOOGLE:
                self._sign_in()
        except ImportError as error:
            missing = f"the package {package}: pip install {package}" if package else "another package"
            raise ConfigError(f"{self.url} needs {missing} ({one_line(error)})") from error
        except Exception as error:  # each protocol has exceptions of its own
            if "Protocol not known" in str(error):
                raise ConfigError(
                    f"{self.url}: no protocol {self._protocol!r} is known; give a folder, or a URL such as "
                    "s3://bucket/run"
                ) from error
            raise self._unreachable(error) from error

    def _sign_in(self) -> None:
        """Asks Google for a token, once: gcsfs by itself asks a server that refuses for two minutes."""
        try:
            self._fs.credentials.maybe_refresh()
        except Exception as error:
            raise error.__cause__ or error from None  # gcsfs says less than Google does

    def reconnect(self) -> None:
        """Makes a new connection where the protocol keeps one, which may have been lost."""
        if self._folders:
            self._fs, self._root = self._connect()

    def names(self) -> set[str]:
        """All files by their names below the URL."""
        self._fs.invalidate_cache()
        return {name[len(self._root) :].lstrip("/") for name in self._fs.find(self._root)}

    def get(self, name: str) -> bytes:
        """What a file holds; raises `Gone` if there is none."""
        self._fs.invalidate_cache()
        try:
            return self._fs.cat_file(f"{self._root}/{name}")
        except FileNotFoundError as error:
            raise Gone(name) from error

    def put(self, name: str, content: bytes) -> None:
        """Writes a file whole, or leaves the one before."""
        final = f"{self._root}/{name}"
        if not self._folders:
            self._fs.pipe_file(final, content)
            return
        aside = f"{posixpath.dirname(final)}/.sending-{posixpath.basename(final)}"
        self._fs.makedirs(posixpath.dirname(final), exist_ok=True)
        self._fs.pipe_file(aside, content)
        self._fs.mv(aside, final)

    def remove(self, name: str) -> None:
        """Removes a file, which need not be there."""
        try:
            self._fs.rm_file(f"{self._root}/{name}")
        except Exception:  # what FTP raises does not tell a file that is not there from another reason
            self._fs.invalidate_cache()
            if self._fs.exists(f"{self._root}/{name}"):
                raise

    def remove_folder(self, name: str) -> None:
        """Removes a folder with all that it holds, where there are folders."""
        if self._folders:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(f"{self._root}/{name}", recursive=True)

    @contextmanager
    def reaching(self) -> Generator[None]:
        """Turns what a protocol raises into a `RunError`."""
        try:
            yield
        except (DistmetaError, Gone):
            raise
        except Exception as error:
            raise self._unreachable(error) from error

    def reason(self, error: Exception) -> str:
        """What has happened, in one line without a password."""
        # Azure's messages go on with identifiers and the answer's XML, Google's with the answer as a second argument.
        said = error.args[0] if len(error.args) > 1 and isinstance(error.args[0], str) else error
        text = re.sub(r"\s*RequestId:.*", "", str(said), flags=re.DOTALL)
        text = f"{type(error).__name__}: {' '.join(text.split()).rstrip('.')}".removesuffix(": ")
        text = text.replace(self._secret, "…") if self._secret else text
        return text if len(text) <= 300 else f"{text[:300]} …"

    def _unreachable(self, error: Exception) -> RunError:
        advice = "check the address and the credentials"
        if type(error).__name__ == "HostKeyNotVerifiable":
            advice = "if it is the right host, connect to it by ssh once, and take its key"
        elif not self._folders and isinstance(error, FileNotFoundError):
            advice = f"is there a bucket {self._root.partition('/')[0]!r}?"
        return RunError(f"{self.url} cannot be used: {self.reason(error)}; {advice}")


def _password(url: str) -> str:
    """The password in ``protocol://user:password@host/path``, or nothing."""
    user = url.partition("://")[2].partition("/")[0].rpartition("@")[0]
    return user.partition(":")[2]
