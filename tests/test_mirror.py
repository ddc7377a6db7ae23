"""Run folders at URLs: S3 by a server that speaks its protocol, FTP, and a folder of another disk."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import boto3
import pytest
import s3fs
from botocore.config import Config as Options
from problems import Blobs
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import ThreadedFTPServer

import distmeta
from distmeta import RunFolder, checkpoint, mirror
from distmeta.errors import ConfigError, RunError, StorageError
from distmeta.models import MLP
from distmeta.report import report, status

SETTINGS = [
    "tasks.use=problems:Blobs", "model.use=mlp", "model.hidden=[8]", "scaling.num_workers=0", "train.steps=6",
    "train.meta_batch_size=4", "train.shard_size=2", "checkpoint.every=2", "validation.every=2", "validation.tasks=6",
    "evaluation.tasks=12",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server of S3, which can be ended and started again; what it holds is lost with it."""

    def __init__(self, **environment: str) -> None:
        self.port = free_port()
        self.environment = os.environ | environment
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-p", str(self.port)]
        self.process = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError("the server has not come up")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def client(self):
        url, few = f"http://127.0.0.1:{self.port}", Options(retries={"max_attempts": 1})
        return boto3.client("s3", endpoint_url=url, region_name="us-east-1", config=few)


@pytest.fixture(scope="module")
def keys() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield


@pytest.fixture(scope="module")
def s3_server(keys: None) -> Iterator[Server]:
    server = Server()
    server.client().create_bucket(Bucket="bucket")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        yield server
    server.end()


@pytest.fixture(scope="module")
def ftp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    users = DummyAuthorizer()
    users.add_user("user", "secret", str(tmp_path_factory.mktemp("ftp")), perm="elradfmwMT")
    handler = type("Handler", (FTPHandler,), {"authorizer": users})
    server = ThreadedFTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"ftp://user:secret@127.0.0.1:{server.address[1]}"
    server.close_all()
    thread.join(10)


@pytest.fixture(params=["s3", "ftp", "file"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URL below which there is nothing yet."""
    if request.param == "file":
        return (tmp_path / "elsewhere").as_uri()
    if request.param == "ftp":
        return request.getfixturevalue("ftp") + "/runs"
    request.getfixturevalue("s3_server")
    return "s3://bucket/runs"


@pytest.fixture
def other_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Makes this look like a machine that has no working copy of any run."""

    def move() -> None:
        name = f"machine-{time.monotonic_ns()}"
        monkeypatch.setenv("DISTMETA_CACHE", str(tmp_path / name))
        monkeypatch.setattr(socket, "gethostname", lambda: name)

    return move


def weights(run: RunFolder, step: int) -> bytes:
    return (checkpoint.path_of(run.checkpoints, step) / "meta.safetensors").read_bytes()


def test_a_run_lives_at_a_url(base: str, other_machine, tmp_path: Path) -> None:
    """Trained here, gone on with on another machine, and used on a third: as if it lay on one disk."""
    url, longer = f"{base}/first", ["train.steps=10", "evaluation.tasks=0"]
    straight = distmeta.train({}, *SETTINGS, *longer, f"run_dir={tmp_path / 'straight'}")
    trained = distmeta.train({}, *SETTINGS, "checkpoint.keep_last=1", f"run_dir={url}")
    shown = url.replace(":secret@", "@")
    assert trained.config().run_dir == shown == trained.address
    with pytest.raises(RunError, match=f"{shown} exists already; `distmeta resume {shown}` goes on with it"):
        distmeta.train({}, *SETTINGS, f"run_dir={url}")

    other_machine()
    fetched = RunFolder.open(url)
    assert not fetched.path.samefile(trained.path)
    assert checkpoint.steps(fetched.checkpoints) == checkpoint.steps(trained.checkpoints)
    assert fetched.records() == trained.records() and fetched.summary() == trained.summary()
    assert distmeta.evaluate(url, "scaling.num_workers=0") == trained.summary()["test"]
    resumed = distmeta.resume(url, *longer)
    assert weights(resumed, 10) == weights(straight, 10)

    other_machine()
    assert "10 of 10 outer steps, finished" in status(RunFolder.open(url))
    third = RunFolder.open(url)
    steps = checkpoint.steps(third.checkpoints)
    assert steps[-1] == 10 and steps == checkpoint.steps(resumed.checkpoints), "what was pruned is gone there as well"
    assert weights(third, 10) == weights(straight, 10)
    assert "test" not in third.summary()
    page = report([third])
    assert shown in page.read_text()
    for file in [file for file in third.path.rglob("*") if file.is_file()]:
        assert b"secret" not in file.read_bytes(), f"the password is in {file}"
    there = set(third.mirror._list())
    assert {"config.yaml", "metrics.jsonl", "summary.json", "report/index.html"} <= there
    assert mirror.LOCK not in there and not [name for name in there if "/." in name or name.startswith(".")]


def test_a_checkpoint_at_a_url_is_whole_or_absent(base: str, other_machine) -> None:
    """A machine that is lost between any two writes leaves checkpoints that can all be read."""
    url = f"{base}/cut"
    run = RunFolder(url)
    complete = distmeta.train({}, *SETTINGS, "evaluation.tasks=0", f"run_dir={url}-whole")
    shutil.copytree(complete.path, run.path, ignore=shutil.ignore_patterns(".*", "report", "tensorboard"))
    there = run.mirror
    there._there, there._sent = set(), {}
    names = sorted(p.relative_to(run.path).as_posix() for p in run.path.rglob("*") if p.is_file())

    class Cut(Exception):
        pass

    write, writes = there._write, 0

    def cut(name: str, content: bytes) -> None:
        if writes == 0:
            raise Cut
        write(name, content)
        raise Cut

    there._write = cut
    other_machine()
    seen = set()
    for writes in [0] + [1] * len(names):
        with pytest.raises(Cut):
            there._send()
        if writes and "config.yaml" not in there._list():
            continue
        if writes:
            fetched = RunFolder.open(url)
            steps = checkpoint.steps(fetched.checkpoints)
            for step in steps:
                checkpoint.load(checkpoint.path_of(fetched.checkpoints, step))
            seen.add(len(steps))
            there._sent = {
                name: (stat.st_mtime_ns, stat.st_size)
                for name in there._list() if (stat := (run.path / name).stat())
            }  # fmt: skip
    assert seen == set(range(len(checkpoint.steps(run.checkpoints)) + 1))


def test_two_machines_do_not_share_a_url(base: str, other_machine, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{base}/shared"
    run = distmeta.train({}, *SETTINGS, "evaluation.tasks=0", f"run_dir={url}")
    with run.lock():
        assert "training" in status(run) or run.in_use()
        other_machine()
        with pytest.raises(RunError, match=r"is in use by process \d+ on .*, which has given a sign of life"):
            distmeta.resume(url)
        assert RunFolder.open(url).in_use()
        monkeypatch.setattr(mirror, "STALE", -1.0)  # the first one has said nothing for too long
        taking = RunFolder.open(url)
        with taking.lock():
            monkeypatch.setattr(mirror, "STALE", 300.0)
            run.mirror._beaten -= mirror.BEAT
            assert not run.mirror._try_to_send()
            with pytest.raises(RunError, match="was taken over by process"):
                run.check()
            run.mirror._lost = None
            run.mirror._own = taking.mirror._own


def cli(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parent)} | environment
    command = [sys.executable, "-m", "distmeta", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=here)


def test_what_is_wrong_with_a_url_is_one_line(s3_server: Server) -> None:
    done = cli("train", *SETTINGS, "run_dir=s3://no-bucket/run")
    assert done.returncode == 2, done.stderr
    assert "s3://no-bucket/run cannot be used: FileNotFoundError: The specified bucket does not exist" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    wrong = {
        "nowhere://host/run": "no protocol 'nowhere' is known; give a folder, or a URL such as s3://bucket/run",
        "gs://bucket/run": "gs://bucket/run needs the package gcsfs: pip install gcsfs",
        "ftp://127.0.0.1:1/run": "ftp://127.0.0.1:1/run cannot be used: ConnectionRefusedError",
        "ftp://me:hidden@127.0.0.1:1/run": "ftp://me@127.0.0.1:1/run cannot be used: ConnectionRefusedError",
    }
    for url, words in wrong.items():
        with pytest.raises((ConfigError, RunError), match=re.escape(words)) as caught:
            distmeta.train({}, *SETTINGS, f"run_dir={url}")
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value) and "hidden" not in str(caught.value)
    missing = cli("status", "s3://bucket/never")
    assert missing.returncode == 2
    assert "s3://bucket/never is not the folder of a run" in missing.stderr
    with pytest.raises(ConfigError, match="a search needs a folder"):
        from distmeta.tune.run import search

        search("glyphs", "run_dir=s3://bucket/search")


def test_no_permission_is_one_line(keys: None) -> None:
    server = Server(INITIAL_NO_AUTH_ACTION_COUNT="1")
    try:
        server.client().create_bucket(Bucket="bucket")
        url = f"http://127.0.0.1:{server.port}"
        done = cli("train", *SETTINGS, "run_dir=s3://bucket/run", AWS_ENDPOINT_URL=url)
    finally:
        server.end()
    assert done.returncode == 2, done.stderr
    assert "s3://bucket/run cannot be used: PermissionError" in done.stderr
    assert len(done.stderr.splitlines()) == 1


class Cable:
    """Leads to a server, and can be cut and mended."""

    def __init__(self, server: Server) -> None:
        self.server, self.port = server.port, free_port()
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
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)


class Slow(Blobs):
    """Blobs that take a while to come."""

    def sample(self, rng, split):
        time.sleep(0.02)
        return super().sample(rng, split)


def test_a_lost_connection_loses_no_training(
    s3_server: Server, monkeypatch: pytest.MonkeyPatch, other_machine, caplog: pytest.LogCaptureFixture
) -> None:
    """The cable is cut in the middle of a run and mended; then it is cut and stays so until after the end."""
    cable, url = Cable(s3_server), "s3://bucket/cable"
    s3fs.S3FileSystem.clear_instance_cache()  # one holds on to the address that it was made with
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{cable.port}")
    monkeypatch.setattr(mirror, "LOOK", 0.1)
    parts = {"tasks": Slow(), "model": MLP((3,), 3, (8,))}
    settings = ["scaling.num_workers=0", "train.meta_batch_size=4", "train.shard_size=2", "checkpoint.every=5"]
    settings += ["validation.every=0", "evaluation.tasks=0", "train.log_every=1"]

    def cut_and_mend() -> None:
        deadline = time.monotonic() + 60
        run = RunFolder(url)
        while len(run.records()) < 10 and time.monotonic() < deadline:
            time.sleep(0.05)
        cable.cut()
        while "cannot be written" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        cable.mend()

    helper = Thread(target=cut_and_mend)
    helper.start()
    run = distmeta.train({}, *settings, "train.steps=150", f"run_dir={url}", **parts)
    helper.join()
    assert f"{url} cannot be written (" in caplog.text
    assert f"{url} can be written again, and has all that is in {run.path}" in caplog.text
    assert run.mirror.failures >= 1
    counts = [record["upload_failures"] for record in run.records()]
    assert counts[0] == 0 and counts == sorted(counts)

    monkeypatch.setattr(mirror, "TRIES", 1)
    cut_soon = Thread(target=lambda: (time.sleep(1), cable.cut()))
    cut_soon.start()
    with pytest.raises(StorageError, match=rf"the run is whole in .*, and `distmeta resume {url}` on this machine"):
        distmeta.resume(url, "train.steps=200", **parts)
    cut_soon.join()
    assert checkpoint.steps(run.checkpoints)[-1] == 200
    cable.mend()
    sent = distmeta.resume(url, **parts)
    assert sent.checkpoint().state["outer"]["step"] == 200
    cache = os.environ["DISTMETA_CACHE"]
    other_machine()
    assert os.environ["DISTMETA_CACHE"] != cache
    assert weights(RunFolder.open(url), 200) == weights(sent, 200)
    s3fs.S3FileSystem.clear_instance_cache()
    cable.cut()


def test_a_run_that_was_killed_goes_on_from_what_this_machine_has(s3_server: Server) -> None:
    url = "s3://bucket/killed"
    settings = [*SETTINGS, "train.steps=100000", "evaluation.tasks=0", "validation.every=0", "train.log_every=1"]
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "distmeta", "train", *settings, f"run_dir={url}"], stderr=subprocess.DEVNULL, env=here
    )
    run = RunFolder(url)
    deadline = time.monotonic() + 120
    while not checkpoint.steps(run.checkpoints) or checkpoint.steps(run.checkpoints)[-1] < 50:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert "training" in cli("status", url).stdout
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = checkpoint.steps(run.checkpoints)[-1]
    said = cli("resume", url, f"train.steps={reached + 10}")
    assert said.returncode == 0, said.stderr
    assert f"run      {url}" in said.stderr
    records = [record["step"] for record in run.records()]
    assert records == list(range(1, reached + 11))
    assert json.loads((run.path / "summary.json").read_text())["steps"] == reached + 10
