"""What happens at each kind of URL when it cannot be used: one line at the start, and nothing lost on the way."""

from __future__ import annotations

import json
import shutil
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from commands import cli
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from problems import Blobs
from simulated.stores import S3, SETTINGS, STORES, Cable, impatient, reach, weights

import distmeta
from distmeta import RunFolder, checkpoint, mirror, stores
from distmeta.errors import ConfigError, RunError, StorageError
from distmeta.models import MLP


def refused(url: str) -> str:
    """What a run is refused with that is to be kept at ``url``."""
    with pytest.raises((ConfigError, RunError)) as caught:
        distmeta.train({}, *SETTINGS, f"run_dir={url}")
    said = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in said and len(said) < 500, said
    return said


def test_what_is_wrong_with_a_url_is_one_line(servers, monkeypatch: pytest.MonkeyPatch) -> None:
    reach(monkeypatch, servers("s3"))
    done = cli("train", *SETTINGS, "run_dir=s3://no-bucket/run")
    assert done.returncode == 2, done.stderr
    assert "s3://no-bucket/run cannot be used: FileNotFoundError: The specified bucket does not exist" in done.stderr
    assert "is there a bucket 'no-bucket'?" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    wrong = {
        "nowhere://host/run": "no protocol 'nowhere' is known; give a folder, or a URL such as s3://bucket/run",
        "ftp://127.0.0.1:1/run": "ftp://127.0.0.1:1/run cannot be used: ConnectionRefusedError",
        "ftp://me:hidden@127.0.0.1:1/run": "ftp://me@127.0.0.1:1/run cannot be used: ConnectionRefusedError",
        "sftp://127.0.0.1:1/run": "sftp://127.0.0.1:1/run cannot be used: ConnectionRefusedError",
    }
    for url, words in wrong.items():
        said = refused(url)
        assert words in said and "hidden" not in said
    missing = cli("status", "s3://bucket/never")
    assert missing.returncode == 2
    assert "s3://bucket/never is not the folder of a run" in missing.stderr
    with pytest.raises(ConfigError, match="a search needs a folder"):
        from distmeta.tune.run import search

        search("glyphs", "run_dir=s3://bucket/search")


@pytest.mark.parametrize(
    ("url", "package"),
    {
        "s3://bucket/run": "s3fs", "gs://bucket/run": "gcsfs", "az://bucket/run": "adlfs",
        "abfss://bucket@account.dfs.core.windows.net/run": "adlfs", "sftp://host/run": "sshfs",
    }.items(),
)  # fmt: skip
def test_a_missing_package_is_named(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # so that Python's own import fails
    assert f"{url} needs the package {package}: pip install {package} (" in refused(url)


def test_a_protocol_of_which_only_fsspec_knows_the_package() -> None:
    """None of our extras has it, and it is not installed here."""
    assert "oci://bucket/run needs another package (Install ocifs to access OCI" in refused("oci://bucket/run")


def test_wrong_credentials_for_s3_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = S3(tmp_path, INITIAL_NO_AUTH_ACTION_COUNT="1")  # which the making of the bucket is
    try:
        assert "/run cannot be used: PermissionError" in refused(f"{reach(monkeypatch, server)}/run")
    finally:
        server.end()


class Refusal(BaseHTTPRequestHandler):
    """Answers to a request for a token as Google does to one that is signed with a key that it does not know."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1
        answer = json.dumps({"error": "invalid_grant", "error_description": "Invalid JWT Signature."}).encode()
        self.send_response(400)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


def test_wrong_credentials_for_google_are_one_line(tmp_path: Path, servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only Google's own server knows true ones; here is what a client does with its refusal, and how often it asks."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    (file := tmp_path / "account.json").write_text("not JSON")
    url = f"{reach(monkeypatch, servers('gs'), GOOGLE_APPLICATION_CREDENTIALS=str(file))}/run"
    assert f"{url} cannot be used: DefaultCredentialsError: File {file} is not a valid json file" in refused(url)
    with HTTPServer(("127.0.0.1", 0), Refusal) as server:
        server.asked = 0
        account = {"type": "service_account", "client_email": "me@there", "private_key": pem, "private_key_id": "1",
                   "token_uri": f"http://127.0.0.1:{server.server_port}/token"}  # fmt: skip
        file.write_text(json.dumps(account))
        Thread(target=server.serve_forever).start()
        try:
            said = refused(url)
        finally:
            server.shutdown()
    assert f"{url} cannot be used: RefreshError: invalid_grant: Invalid JWT Signature; check the address and" in said
    assert server.asked == 1, "gcsfs alone asks six times, in two minutes"


def test_wrong_credentials_for_azure_are_one_line(servers, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "AZURE_STORAGE_CONNECTION_STRING"
    right = (server := servers("az")).environment(server.port)[variable]
    base = reach(monkeypatch, server, **{variable: right.replace("AccountKey=Eby8", "AccountKey=Eby9")})
    assert "Server failed to authenticate the request" in (said := refused(f"{base}/run"))
    assert "RequestId" not in said
    base = reach(monkeypatch, server)
    monkeypatch.delenv(variable)
    assert "/run cannot be used: ValueError: " in refused(f"{base}/run")


def test_wrong_credentials_for_ftp_are_one_line(servers, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(reach(monkeypatch, servers("ftp")).replace("secret", "mistake") + "/run")
    assert "cannot be used: error_perm: 530" in said and "mistake" not in said


def test_wrong_keys_for_sftp_are_one_line(servers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = servers("sftp")
    shutil.copytree(server.home, home := tmp_path / "home")
    url = f"{reach(monkeypatch, server, HOME=str(home))}/run"
    shutil.copy(server.home / ".ssh" / "known_hosts", home / ".ssh")
    (home / ".ssh" / "id_ed25519").unlink()
    assert f"{url} cannot be used: PermissionError: Permission denied for user" in refused(url)
    (home / ".ssh" / "known_hosts").unlink()
    said = refused(url)
    assert "Host key is not trusted for host 127.0.0.1; if it is the right host, connect to it by ssh once" in said


@pytest.mark.parametrize("protocol", ["gs", "az"])
def test_a_bucket_that_does_not_exist_is_one_line(protocol: str, servers, monkeypatch: pytest.MonkeyPatch) -> None:
    reach(monkeypatch, servers(protocol))
    url = f"{protocol}://no-bucket/run"
    said = refused(url)
    assert said.startswith(f"{url} cannot be used: ")
    assert "; is there a bucket 'no-bucket'?" in said or "The specified container does not exist; check" in said


def test_a_folder_that_may_not_be_made_is_one_line(servers, monkeypatch: pytest.MonkeyPatch) -> None:
    base = reach(monkeypatch, servers("sftp"))
    host = base.removesuffix(str(servers("sftp").folder) + "/runs")
    assert f"{host}/proc/run cannot be used: " in refused(f"{host}/proc/run")


class Slow(Blobs):
    """Blobs that take a while to come."""

    def sample(self, rng, split):
        time.sleep(0.02)
        return super().sample(rng, split)


PARTS = {"tasks": Slow(), "model": MLP((3,), 3, (8,))}
LONG = [
    "scaling.num_workers=0", "train.meta_batch_size=4", "train.shard_size=2", "checkpoint.every=5",
    "validation.every=0", "evaluation.tasks=0", "train.log_every=1",
]  # fmt: skip


@pytest.mark.parametrize("protocol", STORES)
def test_a_lost_connection_loses_no_training(
    protocol: str, servers, monkeypatch: pytest.MonkeyPatch, other_machine, caplog: pytest.LogCaptureFixture
) -> None:
    """The cable is cut in the middle of a run and mended; then it is cut and stays so until after the end."""
    impatient(monkeypatch)
    server = servers(protocol)
    cable = Cable(server.port)
    url = f"{reach(monkeypatch, server, cable.port)}/cable"
    shown = url.replace(":secret@", "@")
    monkeypatch.setattr(mirror, "LOOK", 0.1)

    folder = RunFolder(url)

    def cut_after(steps: int) -> None:
        deadline = time.monotonic() + 60
        while len(folder.records()) < steps and time.monotonic() < deadline:
            time.sleep(0.05)
        cable.cut()

    def cut_and_mend() -> None:
        cut_after(10)
        deadline = time.monotonic() + 240
        while "cannot be written" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        cable.mend()

    helper = Thread(target=cut_and_mend)
    helper.start()
    run = distmeta.train({}, *LONG, "train.steps=40", f"run_dir={url}", **PARTS)
    helper.join()
    assert f"{shown} cannot be written (" in caplog.text
    assert f"{shown} can be written again, and has all that is in {run.path}" in caplog.text
    assert run.mirror.failures >= 1
    counts = [record["upload_failures"] for record in run.records()]
    assert counts[0] == 0 and counts == sorted(counts)

    monkeypatch.setattr(mirror, "TRIES", 1)
    cut_soon = Thread(target=cut_after, args=(45,))
    cut_soon.start()
    with pytest.raises(StorageError, match=rf"the run is whole in .*, and `distmeta resume {shown}` on this machine"):
        distmeta.resume(url, "train.steps=60", **PARTS)
    cut_soon.join()
    assert checkpoint.steps(run.checkpoints)[-1] == 60
    cable.mend()
    sent = distmeta.resume(url, **PARTS)
    assert sent.checkpoint().state["outer"]["step"] == 60
    other_machine()
    assert weights(RunFolder.open(url), 60) == weights(sent, 60)
    cable.cut()


@pytest.mark.parametrize("protocol", STORES)
def test_a_connection_that_goes_silent_holds_nobody_up(
    protocol: str, servers, monkeypatch: pytest.MonkeyPatch, other_machine
) -> None:
    """The cable carries nothing from the middle of a run on, and no end is told: the run ends all the same."""
    impatient(monkeypatch)
    server = servers(protocol)
    cable = Cable(server.port)
    monkeypatch.setitem(stores.SSH, "keepalive_interval", 1)
    url = f"{reach(monkeypatch, server, cable.port)}/silent"
    monkeypatch.setattr(mirror, "LOOK", 0.1)
    monkeypatch.setattr(mirror, "TRIES", 1)
    monkeypatch.setattr(mirror, "PATIENCE", 3.0)

    run = RunFolder(url)

    def stop() -> None:
        deadline = time.monotonic() + 60
        while len(run.records()) < 10 and time.monotonic() < deadline:
            time.sleep(0.05)
        cable.stopped = True

    helper = Thread(target=stop)
    helper.start()
    with pytest.raises(StorageError, match=r"could not be written after .*; the run is whole in .*, and `distmeta"):
        distmeta.train({}, *LONG, "train.steps=30", f"run_dir={url}", **PARTS)
    helper.join()
    assert checkpoint.steps(run.checkpoints)[-1] == 30
    cable.stopped = False
    reach(monkeypatch, server, cable.port)
    sent = distmeta.resume(url, **PARTS)
    other_machine()
    assert weights(RunFolder.open(url), 30) == weights(sent, 30)
    cable.cut()
