"""docs/cluster.md followed to the letter: a head, two workers and a laptop, all on this machine.

The laptop's ``cluster.yaml`` is cluster/onprem.yaml; its commands are those of the page, but for
what they train (`SHORTER`, `BY_HAND`).
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from simulated.hosts import PROJECT, Hosts, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

TASKS = '''
import time
import numpy as np, torch
import distmeta

class Slow:
    """Lines through the origin; each task takes a while to come."""

    spec = distmeta.TaskSpec((1,), 1, "mse")

    def __init__(self, wait: float = 0.0) -> None:
        self.wait = wait

    def sample(self, rng: np.random.Generator, split: str) -> distmeta.Episode:
        time.sleep(self.wait)
        x = torch.tensor(rng.uniform(-1, 1, (10, 1)), dtype=torch.float32)
        y = float(rng.uniform(-2, 2)) * x
        return distmeta.Episode((x[:5], y[:5]), (x[5:], y[5:]))
'''
RUN = {
    "tasks": {"use": "slow_tasks:Slow"},
    "model": {"use": "mlp", "hidden": [16]},
    "algorithm": {"use": "maml", "inner_lr": 0.1},
    "train": {"steps": 60, "meta_batch_size": 12, "shard_size": 2, "log_every": 1},
    "validation": {"every": 0},
    "evaluation": {"tasks": 0},
}
NODES = (
    "import ray; ray.init('auto', log_to_driver=False); "
    "print([node['NodeManagerAddress'] for node in ray.nodes() if node['Alive']])"
)
UP = {"RAY_UP_enable_autoscaler_v2": "0"}  # which the page asks for with machines of one's own
SHORTER = {
    "glyphs-5way-1shot-maml": "lines.yaml tasks.wait=0.2",
    "scaling.num_workers=8": "scaling.num_workers=3 scaling.placement=spread",
}
BY_HAND = {"glyphs-5way-1shot-maml": "lines.yaml train.steps=3", "num_workers=8": "num_workers=2"}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """What a user would have in a folder: a configuration and a module of his own."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "slow_tasks.py").write_text(TASKS)
    (folder / "lines.yaml").write_text(yaml.safe_dump(RUN))
    return folder


def config_for(hosts: Hosts) -> dict:
    """cluster/onprem.yaml with what a user would change, and what this machine has already."""
    config = yaml.safe_load((PROJECT / "cluster" / "onprem.yaml").read_text())
    config["provider"] |= {
        "head_ip": hosts.addresses["head"],
        "worker_ips": [hosts.addresses[n] for n in ("one", "two")],
    }
    config["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/id_ed25519"}
    assert "pip install --quiet ~/distmeta" in config["setup_commands"][0]
    config["setup_commands"] = [f"echo 'export PATH={sys.prefix}/bin:$PATH' >> ~/.bashrc"]
    quick = "RAY_AUTH_MODE=token RAY_health_check_period_ms=500 RAY_health_check_timeout_ms=2000"
    quick += " RAY_health_check_failure_threshold=3 RAY_gcs_rpc_server_reconnect_timeout_s=10"
    quick += " RAY_raylet_start_wait_time_s=120"  # a busy machine is no failure
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert config[key][1].count("RAY_AUTH_MODE=token") == 1
        config[key][1] = config[key][1].replace("RAY_AUTH_MODE=token", quick)
    return config


class Page:
    """The commands of docs/cluster.md, each of which is run once, on the laptop in the folder of the job."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder, self.environment = hosts, folder, dict(UP)
        text = (PROJECT / "docs" / "cluster.md").read_text()
        self.left: list[str] = []
        for section in ("Up, a job, down", "A shell on the head", "While it runs"):
            (block,) = re.findall(rf"^## {section}\n\n```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
            lines = (line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines())
            self.left += filter(None, lines)

    def take(self, start: str, **replaced: str) -> str:
        """The next command that begins with ``start``."""
        command = next(line for line in self.left if line.startswith(start))
        self.left.remove(command)
        for old, new in replaced.items():
            assert old in command, f"{old} is not in {command!r}"
            command = command.replace(old, new)
        return command.removesuffix("&")

    def popen(self, start: str, typed: str = "", **replaced: str) -> subprocess.Popen[str]:
        """Starts the next command that begins with ``start``, and types ``typed`` into it."""
        typing = f"printf %s {shlex.quote(typed)} | " if typed else ""
        command = f"cd {self.folder} && {typing}{self.take(start, **replaced)}"
        return self.hosts.popen("laptop", command, **self.environment)

    def run(self, start: str, timeout: float = 120, typed: str = "", **replaced: str) -> str:
        """Runs the next command that begins with ``start``, and returns what it says."""
        process = self.popen(start, typed, **replaced)
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{start!r} has not ended: {process.communicate()[0]}") from None
        assert process.returncode == 0, said
        return said

    def export(self) -> None:
        """Does the next export."""
        self.environment |= dict(pair.split("=") for pair in self.take("export ").split()[1:])


@pytest.mark.timeout(600)
def test_up_a_job_through_a_cut_cable_and_down(tmp_path: Path, job: Path) -> None:
    with Hosts(["head", "one", "two", "laptop"], tmp_path) as hosts:
        (job / "cluster.yaml").write_text(yaml.safe_dump(config_for(hosts)))
        page = Page(hosts, job)
        page.run("ray get-auth-token --generate")
        page.export()
        page.run("ray up", timeout=240)

        # Who has no token is told so.
        train = f"cd {job} && distmeta train lines.yaml scaling.address=10.77.0.1:6379 run_dir=/root/refused"
        strangers: list[dict[str, str]] = [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}]
        refused = [hosts.popen("one", train, **environment) for environment in strangers]
        nodes, deadline = "", time.monotonic() + 120
        while not all(hosts.addresses[name] in nodes for name in ("head", "one", "two")):
            assert time.monotonic() < deadline, nodes
            nodes = hosts.run("head", f"python -c {shlex.quote(NODES)}", RAY_AUTH_MODE="token")
        for process in refused:
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 2, said
            assert "the Ray cluster 10.77.0.1:6379 cannot be joined" in said
            assert "auth_token" in said and "Traceback" not in said

        tunnel = page.popen("ray dashboard")
        try:
            _wait_for("the tunnel", lambda: _succeeds(hosts, "laptop", "bash -c '</dev/tcp/127.0.0.1/8265'"))
            running = page.popen("ray job submit", **SHORTER)
            _wait_for("ten steps", lambda: len(_metrics(hosts)) >= 10)
            _wait_for("the worker on two", lambda: "ray::Worker" in hosts.run("two", "ps -eo args"))
            hosts.link("two", "down")
            time.sleep(8)
            hosts.link("two", "up")
            assert "of 60 outer steps" in page.run("ray exec")
            said, _ = running.communicate(timeout=200)
            assert running.returncode == 0, said
            noticed = r"lines worker \d+ on 10\.77\.0\.3.* was lost|take long on .*: an idle worker does them as well"
            assert re.search(noticed, said), said
            assert "succeeded" in said
            (name,) = set(re.findall(r"raysubmit_\w+", said))
            assert re.search(noticed, page.run("ray job logs", JOB=name))
        finally:
            tunnel.kill()

        seen = page.run("ray exec")
        assert "60 of 60 outer steps" in seen and "finished" in seen
        page.run("ray rsync-down")
        words = [page.take("export "), f"cd {job}", page.take("distmeta train", **BY_HAND), page.take("exit"), ""]
        said = page.run("ray attach", timeout=200, typed="\n".join(words))
        # Ray may have taken the host whose cable was pulled for dead.
        assert re.search("joined the Ray cluster auto of [23] nodes", said), said
        living = hosts.run("head", f"python -c {shlex.quote(NODES)}", RAY_AUTH_MODE="token")
        assert all(hosts.addresses[name] in living for name in ("head", "one")), "it ends no cluster that it joins"
        page.run("ray down")
        assert page.left == ['pip install "ray[default]" boto3'], "all that the page says has been done"

        command = [sys.executable, "-m", "distmeta", "train", "lines.yaml", "scaling.num_workers=0", "run_dir=alone"]
        done = subprocess.run(command, cwd=job, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        weights = "checkpoints/step-00000060/meta.safetensors"
        assert (job / "first" / weights).read_bytes() == (job / "alone" / weights).read_bytes()

        # Workers end when they have missed the head for long enough; what watches over them ends later still.
        for name in ("head", "one", "two"):
            _wait_for(
                f"the end of Ray on {name}",
                lambda name=name: not re.search("raylet|gcs_server|ray::", hosts.run(name, "ps -eo args")),
                seconds=180,
            )


def _wait_for(what: str, there: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, f"{what} has not come"
        time.sleep(0.5)


def _succeeds(hosts: Hosts, name: str, command: str) -> bool:
    return hosts.popen(name, command).wait(30) == 0


def _metrics(hosts: Hosts) -> list[str]:
    return hosts.run("head", "cat /home/ubuntu/runs/first/metrics.jsonl 2>/dev/null || true").splitlines()
