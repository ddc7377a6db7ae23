"""Pools on clusters of several nodes: growth, loss, placement, GPUs, hardware, data; and the files of cluster/."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws import config as aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from simulated.hosts import Hosts, missing

from distmeta.config import Scaling
from distmeta.distributed.cluster import connect
from distmeta.errors import ResourceError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


class Nodes:
    """A Ray cluster of three nodes a, b and c, of 8 cores and 1, 2 and 4 GPUs (tests/simulated/nodes.py)."""

    def __init__(self, folder: Path) -> None:
        inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.errors = folder / "errors"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "simulated" / "nodes.py"), str(folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=inherited | {"PYTHONPATH": str(HERE)},
            )  # fmt: skip

    def run(self, scenario: str) -> dict:
        """What a scenario reports, and under ``said`` what distmeta has logged meanwhile."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(scenario, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("{"):
                found = json.loads(line)
                assert "failed" not in found, found["failed"] + self.errors.read_text()
                return found
        raise AssertionError(self.errors.read_text())


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    started = Nodes(tmp_path_factory.mktemp("nodes"))
    yield started
    _, _ = started.process.communicate(timeout=60)  # the end of its input is the end of the cluster
    assert started.process.returncode == 0, started.errors.read_text()


def test_an_autoscaler_adds_eight_nodes_and_three_are_lost(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """On a host of its own, since the cluster of this test stops every Ray that it sees."""
    if reason := missing():
        pytest.skip(reason)
    with Hosts(["alone"], tmp_path) as hosts:
        command = f"{sys.executable} tests/simulated/nodes.py autoscale"
        said = hosts.run("alone", command, timeout=250, PYTHONPATH=str(HERE))
    found = json.loads(said.splitlines()[-1])
    assert found["first"] >= 1, "it begins before all are there"
    assert found["most"] == 8
    assert found["lost"] == 3 and found["retries"] >= 1
    assert found["same_bits"]
    idle = 1 - found["utilisation"]
    with capsys.disabled():
        print(f"\n8 workers on 8 nodes: {found['utilisation']:.0%} of their time was work, {idle:.0%} idle")


def test_automatic_workers_follow_a_cluster_that_grows(nodes: Nodes) -> None:
    found = nodes.run("grow")
    assert (found["before"], found["after"], found["same_bits"]) == (2, 5, True)


def test_workers_leave_a_node_that_is_drained_and_lose_nothing(nodes: Nodes) -> None:
    found = nodes.run("drain")
    assert found["accepted"]
    assert found["gone"], "the node ends by itself, long before the end of its notice"
    assert (found["workers"], found["stayed"]) == (2, 0)
    assert found["retries"] == 0, "no shard was lost"
    assert found["same_bits"]
    assert sum("leaves: its node is drained" in line for line in found["said"]) == 2


def test_each_worker_sees_the_gpu_that_it_was_given(nodes: Nodes) -> None:
    """Nodes that declare 1, 2 and 4 GPUs, of which this machine has none: what counts is what an actor is told."""
    found = nodes.run("gpus")
    whole, halves = found["whole"], found["halves"]
    assert len(whole) == 7, "automatically one for each GPU of the cluster"
    assert all(len(devices.split(",")) == 1 for _, devices in whole)
    assert sorted(whole) == [["a", "0"], ["b", "0"], ["b", "1"], ["c", "0"], ["c", "1"], ["c", "2"], ["c", "3"]]
    assert sorted(halves) == [["b", "0"], ["b", "0"], ["b", "1"], ["b", "1"]]
    assert "4 workers need 20 CPU, 4 GPU; the cluster has 24 CPU, 7 GPU and holds 3 of them" in found["refused"]


def test_workers_go_where_they_are_wanted(nodes: Nodes) -> None:
    found = nodes.run("placement")
    assert found["spread"] == 3, "one on each node"
    assert found["pack"] < 3
    assert found["special"] == ["b"], "the node that has the custom resource"
    assert "7 workers need 7 CPU, 7 special; the cluster has 24 CPU, 2 special and holds 2 of them" in found["refused"]
    assert "of 3 workers have started within 4 s; each needs 1 CPU, 1 scarce, free in" in found["late"]
    waiting = re.compile("waiting for the cluster: [01] of 3 workers are there; each needs 1 CPU, 1 scarce, free are ")
    assert any(waiting.match(line) for line in found["said"])


def test_different_hardware_is_refused_or_left_out_or_allowed(nodes: Nodes) -> None:
    found = nodes.run("hardware")
    assert "results would depend on who computes what" in found["refused"]
    assert found["left_out"] in (1, 2), "the first to come decides"
    assert any("left out" in line for line in found["said"])
    assert found["allowed"] == 3


def test_data_reach_nodes_that_do_not_have_them(nodes: Nodes) -> None:
    found = nodes.run("data")
    assert found["same_bits"]
    assert not found["made"], "the node b has no cache of its own, and makes none"
    assert "the data of the tasks are sent to the nodes that do not have them" in found["said"]
    assert re.fullmatch(r"on the node [\d.]+: .*/data/blobs.csv does not exist", found["refused"]), found["refused"]


def test_an_address_of_rays_client_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"ray://head:10001 is an address for Ray's client.* submit a job"):
        connect(Scaling(address="ray://head:10001"))


@pytest.mark.parametrize("file", ["cluster.yaml", "cluster/gcp.yaml", "cluster/onprem.yaml"])
def test_files_are_what_ray_up_takes(file: str) -> None:
    config = yaml.safe_load((ROOT / file).read_text())
    whole = prepare_config(config)
    validate_config(whole)
    starts = [*whole["head_start_ray_commands"], *whole["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in whole["head_start_ray_commands"][-1]
    assert "ray-wheels/latest" not in json.dumps(whole), "no nightly build, as Ray's own defaults would install"
    assert whole["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


class Metadata(BaseHTTPRequestHandler):
    """What an instance of EC2 asks about itself (IMDS, version 2)."""

    def answer(self, header: str, value: str, body: str) -> None:
        self.send_response(200 if self.headers[header] == value else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        self.answer("X-aws-ec2-metadata-token-ttl-seconds", "60", "a token")

    def do_GET(self) -> None:
        assert self.path == "/latest/meta-data/ami-id"
        self.answer("X-aws-ec2-metadata-token", "a token", "ami-0123456789abcdef0")


@mock_aws(config={"iam": {"load_aws_managed_policies": True}})
def test_aws_gets_what_the_file_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own way from the file to instances, by the laptop and by the head, on an AWS that moto plays."""
    for key, value in {"ACCESS_KEY_ID": "any", "SECRET_ACCESS_KEY": "any", "DEFAULT_REGION": "us-west-2"}.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    monkeypatch.setattr(aws.time, "sleep", lambda _: None)  # until IAM knows everywhere what it has been told
    given = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    config = aws.bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(given))
    head, gpu = (config["available_node_types"][kind] for kind in ("head", "gpu"))
    assert head["resources"] == {"CPU": 0}
    assert {"CPU": 4, "GPU": 1, "accelerator_type:A10G": 1}.items() <= gpu["resources"].items()
    assert len(set(gpu["node_config"]["SubnetIds"])) == 3, "one in each zone"

    # The role of the head may start instances, but not look up an image by name; so its copy of the file has none.
    (role,) = boto3.client("iam").list_roles()["Roles"]
    attached = boto3.client("iam").list_attached_role_policies(RoleName=role["RoleName"])["AttachedPolicies"]
    assert {policy["PolicyName"] for policy in attached} == {"AmazonEC2FullAccess", "AmazonS3FullAccess"}
    (file := tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(config))
    (command,) = (command for command in config["head_start_ray_commands"] if "sed " in command)
    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        Thread(target=server.serve_forever).start()
        here = f"127.0.0.1:{server.server_port}"
        subprocess.run(["bash", "-c", command.replace("169.254.169.254", here)], check=True, timeout=60)
        server.shutdown()
    on_head = json.loads(file.read_text())
    for kind in ("head", "gpu"):
        found = on_head["available_node_types"][kind]["node_config"].pop("ImageId")
        assert found == "ami-0123456789abcdef0"
        config["available_node_types"][kind]["node_config"].pop("ImageId")
    assert on_head == config, "nothing else has changed"

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for kind, node in (("head", head), ("gpu", gpu)):
        provider.create_node(node["node_config"] | {"ImageId": found}, {"ray-user-node-type": kind}, 1)
    started = {node.instance_type: node for node in boto3.resource("ec2").instances.all()}
    assert started["m6i.xlarge"].instance_lifecycle is None, "on demand"
    assert started["g5.xlarge"].instance_lifecycle == "spot"


def test_the_kubernetes_files_have_the_published_structure() -> None:
    job, claim = yaml.safe_load_all((ROOT / "cluster" / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    # Names of KubeRay's own (ray-operator/apis/ray/v1) alone, since misspelt ones would be dropped unsaid.
    assert spec.keys() <= {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert {"rayVersion", "headGroupSpec", "workerGroupSpecs"} <= cluster.keys()
    assert cluster.keys() <= {"rayVersion", "headGroupSpec", "workerGroupSpecs", "authOptions"} | {
        "enableInTreeAutoscaling", "autoscalerOptions"
    }  # fmt: skip
    assert cluster["headGroupSpec"].keys() <= {"serviceType", "rayStartParams", "template"}
    replicas = {"replicas", "minReplicas", "maxReplicas"}
    assert all(g.keys() == {"groupName", "rayStartParams", "template"} | replicas for g in cluster["workerGroupSpecs"])
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name", "image", "resources"} <= container.keys()
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "Kubernetes wants strings"
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    (volume,) = cluster["headGroupSpec"]["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]

    from distmeta.config import load

    words = spec["entrypoint"].split()
    assert words[:2] == ["distmeta", "train"]
    assert load(words[2], words[3:]).scaling.min_workers == 1


def test_the_dashboard_draws_metrics_that_exist() -> None:
    panels = json.loads((ROOT / "cluster" / "grafana.json").read_text())["panels"]
    from distmeta.distributed import gauges

    source = Path(gauges.__file__).read_text()
    for panel in panels:
        for target in panel["targets"]:
            name = target["expr"].split("ray_")[1].split("{")[0]
            base = name.removesuffix("_total").removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
            assert f'"{base}"' in source, name
