"""``ray up`` of cluster/onprem.yaml, for real: a head, two workers and a laptop, all on this machine."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
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
UP = {"RAY_UP_enable_autoscaler_v2": "0", "RAY_AUTH_MODE": "token"}


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
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert config[key][1].count("RAY_AUTH_MODE=token") == 1
        config[key][1] = config[key][1].replace("RAY_AUTH_MODE=token", quick)
    return config


@pytest.mark.timeout(600)
def test_up_a_job_through_a_cut_cable_and_down(tmp_path: Path, job: Path) -> None:
    with Hosts(["head", "one", "two", "laptop"], tmp_path) as hosts:
        file = tmp_path / "cluster.yaml"
        file.write_text(yaml.safe_dump(config_for(hosts)))

        hosts.run("laptop", "ray get-auth-token --generate")
        hosts.run("laptop", f"ray up --yes --no-config-cache {file}", timeout=240, **UP)
        nodes, deadline = "", time.monotonic() + 120
        while not all(hosts.addresses[name] in nodes for name in ("head", "one", "two")):
            assert time.monotonic() < deadline, nodes
            time.sleep(1)
            nodes = hosts.run("head", f"python -c {shlex.quote(NODES)}", RAY_AUTH_MODE="token")

        # Who has no token is told so.
        for environment in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
            train = f"cd {job} && distmeta train lines.yaml scaling.address=10.77.0.1:6379 run_dir=/root/refused"
            refused = hosts.popen("two", train, **environment)
            said, _ = refused.communicate(timeout=120)
            assert refused.returncode == 2, said
            assert "the Ray cluster 10.77.0.1:6379 cannot be joined" in said
            assert "auth_token" in said and "Traceback" not in said

        tunnel = hosts.popen("laptop", f"ray dashboard {file}", **UP)
        try:
            submit = (
                f"ray job submit --address http://127.0.0.1:8265 --working-dir {job} -- distmeta train lines.yaml "
                "tasks.wait=0.05 scaling.num_workers=3 scaling.placement=spread run_dir=/root/runs/first"
            )
            deadline = time.monotonic() + 60
            while (asked := hosts.popen("laptop", "ray job list --address http://127.0.0.1:8265", **UP)).wait(60):
                assert tunnel.poll() is None and time.monotonic() < deadline, asked.communicate()[0]
                time.sleep(1)
            running = hosts.popen("laptop", submit, **UP)
            _wait_for_step(hosts, 10)
            hosts.link("two", "down")
            time.sleep(8)
            hosts.link("two", "up")
            said, _ = running.communicate(timeout=200)
            assert running.returncode == 0, said
            assert re.search(r"worker \d+ on 10\.77\.0\.3 was lost at tasks", said), said
            assert "succeeded" in said
        finally:
            tunnel.kill()

        seen = hosts.run("laptop", f"ray exec {file} 'distmeta status /root/runs/first'", **UP)
        assert "60 of 60 outer steps" in seen and "finished" in seen
        hosts.run("laptop", f"ray rsync-down {file} /root/runs/first/ {tmp_path}/first/", **UP)

        hosts.run("laptop", f"ray down --yes {file}", timeout=120, **UP)
        # Workers end when they have missed the head for long enough; what watches over them ends later still.
        deadline = time.monotonic() + 180
        for name in ("head", "one", "two"):
            while re.search("raylet|gcs_server|ray::", left := hosts.run(name, "ps -eo args")):
                assert time.monotonic() < deadline, left
                time.sleep(1)

    command = [sys.executable, "-m", "distmeta", "train", "lines.yaml", "scaling.num_workers=0", "run_dir=alone"]
    done = subprocess.run(command, cwd=job, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    weights = "checkpoints/step-00000060/meta.safetensors"
    assert (tmp_path / "first" / weights).read_bytes() == (job / "alone" / weights).read_bytes()


def _wait_for_step(hosts: Hosts, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = hosts.run("head", "cat /root/runs/first/metrics.jsonl 2>/dev/null | wc -l")
        if int(lines) >= step:
            return
        time.sleep(0.5)
    raise AssertionError(f"the job has not come to step {step}")
