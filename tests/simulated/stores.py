"""Servers that run folders at URLs are kept on, each a real one on this machine, and a cable that can be cut.

S3 is moto's server, Google Cloud Storage gcp-storage-emulator, Azure Azurite (where npm has installed it), SFTP
OpenSSH, and FTP pyftpdlib. What clients find them and prove themselves by is in the environment, as users have it.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import boto3
import fsspec
import pytest
from azure.storage.blob import BlobServiceClient
from azure.storage.blob.aio import ExponentialRetry
from botocore.config import Config as Options
from gcsfs.core import GCSFileSystem
from gcsfs.retry import retry_request
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import ThreadedFTPServer

from distmeta import RunFolder, checkpoint

SETTINGS = [
    "tasks.use=problems:Blobs", "model.use=mlp", "model.hidden=[8]", "scaling.num_workers=0", "train.steps=6",
    "train.meta_batch_size=4", "train.shard_size=2", "checkpoint.every=2", "validation.every=2", "validation.tasks=6",
    "evaluation.tasks=12",
]  # fmt: skip
"""Those of a short run."""
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The key of Azurite's account ``devstoreaccount1``, which its manual publishes."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def weights(run: RunFolder, step: int) -> bytes:
    return (checkpoint.path_of(run.checkpoints, step) / "meta.safetensors").read_bytes()


class Server:
    """A server with a bucket (or a folder) for runs, which is a process of its own."""

    needs: str | None = None
    """A program of which Debian or npm have it; tests skip without it."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.port, self.own = folder, free_port(), environment
        self.start()

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(self.command(), env=os.environ | self.own, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self.make_bucket()
            time.sleep(0.1)
        raise AssertionError((self.folder / "server.log").read_text())

    def make_bucket(self) -> None:
        """Makes what the URL of `base` stands in."""

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def base(self, port: int) -> str:
        """A URL below which runs are kept, for clients who reach the server at ``port``."""
        raise NotImplementedError

    def environment(self, port: int) -> dict[str, str]:
        """What such clients have in their environment."""
        return {}


class S3(Server):
    def command(self) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-p", str(self.port)]

    def make_bucket(self) -> None:
        url, few = f"http://127.0.0.1:{self.port}", Options(retries={"max_attempts": 1})
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
        boto3.client("s3", endpoint_url=url, region_name="us-east-1", config=few, **keys).create_bucket(Bucket="bucket")

    def base(self, port: int) -> str:
        return "s3://bucket/runs"

    def environment(self, port: int) -> dict[str, str]:
        url = f"http://127.0.0.1:{port}"
        return {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": url}


class Google(Server):
    def command(self) -> list[str]:
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--in-memory", "--default-bucket", "bucket"]
        return [sys.executable, "-m", "gcp_storage_emulator", "start", "--quiet", *options]

    def base(self, port: int) -> str:
        return "gs://bucket/runs"

    def environment(self, port: int) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}", "NO_GCE_CHECK": "true"}


class Azure(Server):
    needs = "azurite-blob"

    def command(self) -> list[str]:
        where = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--location", str(self.folder)]
        return ["azurite-blob", *where, "--silent", "--disableTelemetry", "--skipApiVersionCheck"]

    def make_bucket(self) -> None:
        connection = self.environment(self.port)["AZURE_STORAGE_CONNECTION_STRING"]
        BlobServiceClient.from_connection_string(connection).create_container("bucket")

    def base(self, port: int) -> str:
        return "az://bucket/runs"

    def environment(self, port: int) -> dict[str, str]:
        account = {
            "DefaultEndpointsProtocol": "http", "AccountName": "devstoreaccount1", "AccountKey": AZURE_KEY,
            "BlobEndpoint": f"http://127.0.0.1:{port}/devstoreaccount1",
        }  # fmt: skip
        return {"AZURE_STORAGE_CONNECTION_STRING": ";".join(f"{key}={value}" for key, value in account.items())}


class Sftp(Server):
    """An OpenSSH server of this user's own, and a home with the keys for it."""

    needs = "sshd"

    def __init__(self, folder: Path, **environment: str) -> None:
        self.home = folder / "home"
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        for key in (folder / "host", self.home / ".ssh" / "id_ed25519"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        super().__init__(folder, **environment)

    def command(self) -> list[str]:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where Debian's sshd wants its processes to stand
        options = {
            "Port": self.port, "ListenAddress": "127.0.0.1", "HostKey": self.folder / "host", "PidFile": "none",
            "AuthorizedKeysFile": self.home / ".ssh" / "id_ed25519.pub", "StrictModes": "no", "UsePAM": "no",
            "PasswordAuthentication": "no", "Subsystem": "sftp internal-sftp",
        }  # fmt: skip
        given = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        return [str(shutil.which("sshd")), "-D", "-e", "-f", "/dev/null", *given]

    def base(self, port: int) -> str:
        return f"sftp://{getpass.getuser()}@127.0.0.1:{port}{self.folder}/runs"

    def environment(self, port: int) -> dict[str, str]:
        kind, key, *_ = (self.folder / "host.pub").read_text().split()
        with (self.home / ".ssh" / "known_hosts").open("a") as known:
            known.write(f"[127.0.0.1]:{port} {kind} {key}\n")
        return {"HOME": str(self.home)}


class Ftp(Server):
    """A server in a thread of this process."""

    def start(self) -> None:
        users = DummyAuthorizer()
        (self.folder / "ftp").mkdir()
        users.add_user("user", "secret", str(self.folder / "ftp"), perm="elradfmwMT")
        handler = type("Handler", (FTPHandler,), {"authorizer": users})
        self.server = ThreadedFTPServer(("127.0.0.1", self.port), handler)
        self.thread = Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def end(self) -> None:
        self.server.close_all()
        self.thread.join(10)

    def base(self, port: int) -> str:
        return f"ftp://user:secret@127.0.0.1:{port}/runs"


def reach(patch: pytest.MonkeyPatch, server: Server, port: int | None = None, **instead: str) -> str:
    """Lets this process find ``server``, through ``port`` if given; the URL below which runs are kept.

    ``instead``: What else its environment has, or has other.
    """
    for name, value in (server.environment(port or server.port) | instead).items():
        patch.setenv(name, value)
    for kind in {fsspec.AbstractFileSystem, *fsspec.registry.values()}:
        kind.clear_instance_cache()  # connections are kept for those who come with the same URL
    return server.base(port or server.port)


STORES: dict[str, type[Server]] = {"s3": S3, "gs": Google, "az": Azure, "sftp": Sftp, "ftp": Ftp}


def impatient(patch: pytest.MonkeyPatch) -> None:
    """Lets gcsfs and adlfs give up after seconds instead of half a minute and a minute, which they cannot be told."""
    again = retry_request(retries=2)(GCSFileSystem._request.__wrapped__)
    patch.setattr(GCSFileSystem, "_request", again)
    patch.setattr(ExponentialRetry, "get_backoff_time", lambda *_: 0.3)


class Cable:
    """Leads to a server, and can be cut, mended, and stopped: then it carries nothing, and nobody is told."""

    def __init__(self, port: int) -> None:
        self.server, self.port, self.stopped = port, free_port(), False
        self.mend()

    def mend(self) -> None:
        self.ends: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", self.port))
        Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def cut(self) -> None:
        for end in [self.listener, *self.ends]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, there = listener.accept()[0], socket.create_connection(("127.0.0.1", self.server))
                self.ends += [here, there]
                for one, other in ((here, there), (there, here)):
                    Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                while self.stopped:
                    time.sleep(0.05)
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
