"""The jobs of docs/cluster.md that tests/test_ray_up.py does not submit, on a Ray cluster of one node: uv, a search."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from simulated.hosts import PROJECT
from simulated.stores import free_port

PATH = f"{sys.prefix}/bin:{os.environ['PATH']}"
PORTS = (
    "port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port",
    "metrics-export-port", "ray-client-server-port", "node-manager-port", "object-manager-port",
)  # fmt: skip
TASKS = '''
import json, os, sys, time
import numpy as np, torch
import distmeta

class Lines:
    """Lines through the origin, which take a while to come; each process says by which Python it is run."""

    spec = distmeta.TaskSpec((1,), 1, "mse")

    def __init__(self, said: str, wait: float = 0.0) -> None:
        self.said, self.wait = said, wait

    def sample(self, rng: np.random.Generator, split: str) -> distmeta.Episode:
        with open(f"{self.said}/{os.getpid()}", "w") as file:
            json.dump([sys.prefix, os.getcwd()], file)
        time.sleep(self.wait)
        x = torch.tensor(rng.uniform(-1, 1, (10, 1)), dtype=torch.float32)
        return distmeta.Episode((x[:5], 2 * x[:5]), (x[5:], 2 * x[5:]))
'''
RUN = {
    "tasks": {"use": "own_tasks:Lines", "wait": 0.1}, "model": {"use": "mlp", "hidden": [8]},
    "algorithm": {"use": "maml", "inner_lr": 0.1}, "train": {"steps": 20, "meta_batch_size": 4, "shard_size": 2},
    "validation": {"every": 0}, "evaluation": {"tasks": 0}, "scaling": {"num_workers": 1},
}  # fmt: skip
SEARCH = {
    "base": "lines.yaml", "set": {"train.steps": 2, "validation": {"every": 1, "tasks": 2}}, "samples": 2,
    "space": {"outer.lr": {"loguniform": [1e-3, 1e-1]}}, "metric": "loss", "mode": "min",
}  # fmt: skip


class Head:
    """A Ray cluster of one node, with a dashboard, and with a token and ports of its own."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets in it must not have long names
        self.ports = {name: free_port() for name in PORTS}
        self.environment = {
            key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "VIRTUAL_ENV")
        }
        self.environment |= {
            "PATH": PATH, "PYTHONPATH": str(Path(torch.__file__).parents[1]), "UV_PYTHON": sys.executable,
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_metrics_report_interval_ms": "1000",
            "RAY_agent_register_timeout_ms": "120000",  # a busy machine is no failure
        }  # fmt: skip
        options = [f"--{name}={port}" for name, port in self.ports.items()]
        options += [f"--temp-dir={self.folder}", "--num-cpus=4", "--min-worker-port=0", "--max-worker-port=0"]
        with (self.folder / "said").open("w") as said:
            self.process = subprocess.Popen(
                [f"{sys.prefix}/bin/ray", "start", "--head", "--block", "--disable-usage-stats", *options],
                env=self.environment, stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while not self.get(f"http://127.0.0.1:{self.ports['dashboard-port']}/api/version"):
            assert time.monotonic() < deadline and self.process.poll() is None, (self.folder / "said").read_text()
            time.sleep(0.5)

    def get(self, url: str) -> str:
        """What is at ``url``; nothing if nobody answers."""
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
                return answer.read().decode()
        except OSError:
            return ""

    def metrics(self) -> str:
        return self.get(f"http://127.0.0.1:{self.ports['metrics-export-port']}/metrics")

    def submit(self, command: str, folder: Path, **replaced: str) -> subprocess.Popen[str]:
        """Starts a command of the page in ``folder``."""
        replaced = {"http://127.0.0.1:8265": f"http://127.0.0.1:{self.ports['dashboard-port']}"} | replaced
        for old, new in replaced.items():
            assert old in command, f"{old} is not in {command!r}"
            command = command.replace(old, new)
        return subprocess.Popen(
            command, shell=True, cwd=folder, env=self.environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    started = Head()
    yield started
    started.end()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """What a user would have in a folder."""
    folder = tmp_path / "job"
    for made in (folder, tmp_path / "said"):
        made.mkdir()
    (folder / "own_tasks.py").write_text(TASKS)
    tasks = RUN["tasks"] | {"said": str(tmp_path / "said")}
    (folder / "lines.yaml").write_text(yaml.safe_dump(RUN | {"tasks": tasks}))
    return folder


def blocks(section: str, kind: str) -> list[str]:
    """The blocks of code of a section of the page."""
    text = (PROJECT / "docs" / "cluster.md").read_text()
    (found,) = re.findall(rf"^## {section}\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    return re.findall(rf"```{kind}\n(.*?)```", found, re.DOTALL)


def without_downloads() -> str:
    """What spares uv minutes: torch and the rest come from this environment, by ``PYTHONPATH``."""
    ours = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    never = [re.sub(r"^([\w-]+).*", r"\1; sys_platform == 'never'", one) for one in ours]
    return f"\n[tool.uv]\noverride-dependencies = {json.dumps(never)}\n"


@pytest.mark.skipif(shutil.which("uv", path=PATH) is None, reason="uv is not installed here")
def test_a_job_brings_its_environment_by_uv(head: Head, job: Path, tmp_path: Path) -> None:
    (project,), (command,) = blocks("uv", "toml"), blocks("uv", "sh")
    for old, new in {"/home/ubuntu/distmeta": str(PROJECT), ', "ray[default]==2.60.0"': ""}.items():
        assert old in project
        project = project.replace(old, new)
    (job / "pyproject.toml").write_text(project + without_downloads())
    running = head.submit(
        command, job, **{"distmeta train": "distmeta train lines.yaml", "/home/ubuntu/runs/second": f"{tmp_path}/run"}
    )
    said, _ = running.communicate(timeout=200)
    if "Failed to fetch" in said:
        pytest.skip("uv reaches no packages from here")
    assert running.returncode == 0 and "succeeded" in said, said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 20
    seen = [json.loads(file.read_text()) for file in (tmp_path / "said").iterdir()]
    assert len(seen) >= 2, "the driver, which draws a test task, and its worker"
    for prefix, folder in seen:
        assert Path(prefix) == Path(folder) / ".venv", (
            "the environment that uv has made in the copy of the job's folder"
        )


def test_a_search_is_a_job(head: Head, job: Path, tmp_path: Path) -> None:
    (command,) = blocks("A search as a job", "sh")
    (job / "search.yaml").write_text(yaml.safe_dump(SEARCH))
    running = head.submit(
        command.replace("\\\n", " "), job,
        **{"omniglot-cluster set.data_root=/shared/data": "search.yaml", "/shared/searches/first": f"{tmp_path}/found"},
    )  # fmt: skip
    said, _ = running.communicate(timeout=200)
    assert running.returncode == 0 and "succeeded" in said, said
    assert len((tmp_path / "found" / "results.csv").read_text().splitlines()) == 3


def test_the_dashboard_draws_what_a_run_exports(head: Head, job: Path, tmp_path: Path) -> None:
    """Grafana's queries name what Ray's exporter gives to Prometheus while a job runs, with the name of the run."""
    (command,) = blocks("uv", "sh")
    running = head.submit(
        command, job,
        **{"uv run distmeta train": "distmeta train lines.yaml train.steps=200",
           "/home/ubuntu/runs/second": f"{tmp_path}/run"},
    )  # fmt: skip
    panels = json.loads((PROJECT / "cluster" / "grafana.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    wanted = {name for query in queries for name in re.findall(r"ray_distmeta_\w+", query)}
    retries = "ray_distmeta_retries_total"
    assert len(wanted) >= 5 and retries in wanted

    def wait_for(names: set[str]) -> None:
        deadline, exported = time.monotonic() + 90, ""
        while not all(re.search(rf'^{name}{{.*run="lines"', exported, re.MULTILINE) for name in names):
            assert running.poll() is None and time.monotonic() < deadline, exported
            time.sleep(0.5)
            exported = "".join(line for line in head.metrics().splitlines(True) if line.startswith("ray_distmeta"))

    try:
        wait_for(wanted - {retries})
        (worker,) = (tmp_path / "said").iterdir()
        os.kill(int(worker.name), signal.SIGKILL)
        wait_for({retries})
    finally:
        os.killpg(running.pid, signal.SIGKILL)  # the shell and what it has started; the job ends with the cluster
        running.communicate()
