"""Scenarios on a Ray cluster of several nodes, simulated on this machine; each prints what it found as a line of JSON.

python nodes.py FOLDER       reads the names of scenarios, one a line; one cluster serves them all
python nodes.py autoscale    a cluster of its own, which needs a host of its own
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ray
from problems import Blobs, problem_of
from ray._raylet import GcsClient
from ray.cluster_utils import AutoscalingCluster, Cluster
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

from distmeta import MAML
from distmeta.config import Scaling
from distmeta.distributed import ray as pools
from distmeta.distributed import worker
from distmeta.distributed.executor import InProcess, reduce_mean
from distmeta.distributed.ray import RayPool
from distmeta.distributed.work import shards_of
from distmeta.errors import DataError, ResourceError
from distmeta.models import MLP
from distmeta.tasks import TASKS

logging.basicConfig(format="%(message)s", level=logging.INFO)
TASKS_OF_STEP = 16


class Slow(Blobs):
    """Blobs that take a while to come, so that workers have something to share."""

    def sample(self, rng, split):
        time.sleep(0.05)
        return super().sample(rng, split)


class Told(Blobs):
    """Blobs that write down which GPU their process was given, on which node."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def sample(self, rng, split):
        devices, name = os.environ.get("CUDA_VISIBLE_DEVICES", ""), node_name()
        (self.folder / str(os.getpid())).write_text(json.dumps([name, devices]))
        return super().sample(rng, split)


def node_name() -> str:
    """The custom resource ``node-…`` of the node of this process."""
    own = ray.get_runtime_context().get_node_id()
    (resources,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == own)
    return next(kind.removeprefix("node-") for kind in resources if kind.startswith("node-"))


def problem(tasks):
    return problem_of(MAML(inner_lr=0.1), MLP((3,), 3, (16,)), tasks)


def step(pool, theta, number: int) -> np.ndarray:
    return reduce_mean(pool.map("meta_gradient", theta, shards_of("train", number, TASKS_OF_STEP, 1)))


def expected(theta, number: int) -> np.ndarray:
    return step(InProcess(problem(Blobs())[0]), theta, number)


def message(call) -> str:
    try:
        call()
    except (ResourceError, DataError) as error:
        return str(error)
    return ""


class Autoscaling(AutoscalingCluster):
    """Ray's autoscaler with a provider whose nodes are processes. It stops every Ray that it sees: give it a host."""

    def _generate_config(self, head_resources, worker_node_types, autoscaler_v2=False, **options) -> dict:
        head = {"ray.head.default": {"resources": head_resources, "node_config": {}, "max_workers": 0}}
        lists = ["cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands",
                 "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude",
                 "rsync_filter"]  # fmt: skip
        return {
            "cluster_name": "fake", "max_workers": 8, "upscaling_speed": 8.0, "idle_timeout_minutes": 10,
            "provider": {"type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True,
                         "disable_launch_config_check": True},
            "available_node_types": worker_node_types | head, "head_node_type": "ray.head.default", "auth": {},
            "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False, **{name: [] for name in lists},
        }  # fmt: skip


def autoscale() -> dict:
    kinds = {"cpu": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 8}}
    made = Autoscaling(head_resources={"CPU": 0}, worker_node_types=kinds)
    made.start()
    ray.init("auto", namespace="distmeta")
    given, theta = problem(Slow())
    found: dict = {"same_bits": True, "lost": 0}
    with RayPool(given, Scaling(num_workers=8, min_workers=1, start_timeout=120), most=TASKS_OF_STEP) as pool:
        found["first"] = found["most"] = len(pool._workers)
        number, deadline, busy, wall = 0, time.monotonic() + 150, 0.0, 0.0
        while time.monotonic() < deadline:
            results = pool.map("meta_gradient", theta, shards_of("train", number, TASKS_OF_STEP, 1))
            found["same_bits"] &= bool(np.array_equal(reduce_mean(results), expected(theta, number)))
            found["most"] = max(found["most"], len(pool._workers))
            number += 1
            if found["most"] == 8 and not found["lost"]:
                for _ in range(5):  # how well eight workers share the work
                    start = time.perf_counter()
                    results = pool.map("meta_gradient", theta, shards_of("train", number, TASKS_OF_STEP, 1))
                    wall += 8 * (time.perf_counter() - start)
                    busy += sum(sum(result.seconds.values()) for result in results)
                for pid in sorted(int(path.name) for path in Path("/proc").glob("[0-9]*") if _is_raylet(path))[-3:]:
                    os.kill(pid, signal.SIGKILL)
                    found["lost"] += 1
                left = number + 8
            if found["lost"] and number >= left and pool.retries:  # of which Ray tells the driver when it knows
                break
        found |= {"retries": pool.retries, "utilisation": busy / max(wall, 1e-9)}
    ray.shutdown()
    made.shutdown()
    return found


def _is_raylet(process: Path) -> bool:
    """Whether a process is the raylet of a node with one core, which the autoscaler has added."""
    try:
        command = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return command[0].endswith(b"/raylet") and any(b"CPU,1" in word for word in command)


def grow(made: Cluster, folder: Path) -> dict:
    given, theta = problem(Blobs())
    with RayPool(given, Scaling(resources={"grow": 1}), most=TASKS_OF_STEP) as pool:
        found = {"before": len(pool._workers) + len(pool._starting), "same_bits": True}
        added = made.add_node(num_cpus=3, resources={"grow": 3})
        number, deadline = 0, time.monotonic() + 60
        while len(pool._workers) < 5 and time.monotonic() < deadline:
            found["same_bits"] &= bool(np.array_equal(step(pool, theta, number), expected(theta, number)))
            number += 1
            time.sleep(0.2)
        found["after"] = len(pool._workers)
    made.remove_node(added)
    made.wait_for_nodes()
    return found


def drain(made: Cluster, folder: Path) -> dict:
    """Both workers are on a node that is given notice, while another one comes."""
    given, theta = problem(Slow())
    first = made.add_node(num_cpus=2, resources={"drain": 2})
    with RayPool(given, Scaling(num_workers=2, resources={"drain": 1}), most=TASKS_OF_STEP) as pool:
        pool._wait_for(2)
        old = {state.process for state in pool._workers.values()}
        second = made.add_node(num_cpus=2, resources={"drain": 2})
        accepted, _ = GcsClient(address=made.address).drain_node(
            first.node_id, DRAIN_NODE_REASON_PREEMPTION, "notice", int((time.time() + 120) * 1000)
        )
        raylet = next(info.process for info in first.all_processes["raylet"])
        number, same, deadline = 0, True, time.monotonic() + 60
        while (raylet.poll() is None or len(pool._workers) < 2) and time.monotonic() < deadline:
            same &= bool(np.array_equal(step(pool, theta, number), expected(theta, number)))
            number += 1
        new = {state.process for state in pool._workers.values()}
        found = {"accepted": accepted, "gone": raylet.poll() is not None, "workers": len(new), "stayed": len(old & new),
                 "retries": pool.retries, "same_bits": same, "steps": number}  # fmt: skip
    for node in (first, second):
        made.remove_node(node)
    return found


def gpus(made: Cluster, folder: Path) -> dict:
    large = Scaling(num_workers=4, use_gpu=True, cpus_per_worker=5)
    halves = Scaling(num_workers=4, use_gpu=True, gpus_per_worker=0.5, resources={"node-b": 0.1})
    return {
        "whole": _told(Scaling(use_gpu=True), folder, 7),
        "halves": _told(halves, folder, 4),
        "refused": message(lambda: RayPool(problem(Blobs())[0], large, 4)),
    }


def _told(scaling: Scaling, folder: Path, workers: int) -> list[list[str]]:
    """What each worker of a pool of so many was told; the problem itself computes on the CPU."""
    folder = folder / f"told-{time.monotonic_ns()}"
    folder.mkdir()
    given, theta = problem(Told(folder))
    with RayPool(given, scaling, most=TASKS_OF_STEP) as pool:
        pool._wait_for(workers)
        assert pool.size == workers
        step(pool, theta, 0)
    return [json.loads(path.read_text()) for path in folder.iterdir()]


def placement(made: Cluster, folder: Path) -> dict:
    given, _ = problem(Blobs())
    found: dict = {}
    for kind in ("spread", "pack"):
        with RayPool(given, Scaling(num_workers=3, placement=kind), most=3) as pool:
            pool._wait_for(3)
            found[kind] = len(set(where_ids(pool)))
    told = _told(Scaling(num_workers=2, resources={"special": 1}), folder, 2)
    found["special"] = sorted({name for name, _ in told})
    found["refused"] = message(lambda: RayPool(given, Scaling(num_workers=7, resources={"special": 1}), 7))
    scarce = Scaling(num_workers=3, min_workers=3, resources={"scarce": 1}, start_timeout=4)
    pools.SAY = 1.0
    found["late"] = message(lambda: RayPool(given, scarce, 3))
    return found


def where_ids(pool) -> list[str]:
    return ray.get(
        [actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()) for actor in pool._workers]
    )


class Elsewhere(Blobs):
    """Blobs; unpickled on the node b they make it look like another processor."""

    def __setstate__(self, state):
        self.__dict__.update(state)
        if node_name() == "b":
            worker.hardware = lambda device: "another processor"


def hardware(made: Cluster, folder: Path) -> dict:
    given, theta = problem(Elsewhere())

    def started(**settings) -> int:
        with RayPool(given, Scaling(num_workers=3, resources={"mixed": 1}, **settings), most=3) as pool:
            while pool._starting:
                pool._admit(ray.wait(list(pool._starting))[0])
            step(pool, theta, 0)
            return len(pool._workers)

    return {
        "refused": message(started),
        "left_out": started(min_workers=1),
        "allowed": started(mixed_hardware=True),
    }


class Missing(Blobs):
    """Blobs whose file the node b does not see."""

    def sample(self, rng, split):
        if node_name() == "b":
            raise DataError("/data/blobs.csv does not exist")
        return super().sample(rng, split)


def data(made: Cluster, folder: Path) -> dict:
    """The node b has a cache folder of its own, which is empty, and a data root with nothing in it."""
    tasks = TASKS["glyphs"](ways=3, queries=1)
    tasks.prepare()
    given, theta = problem_of(MAML(inner_lr=0.1), MLP((1, 28, 28), 3, (8,)), tasks)
    with RayPool(given, Scaling(num_workers=2, resources={"data": 1}), most=TASKS_OF_STEP) as pool:
        pool._wait_for(2)
        same = all(np.array_equal(step(pool, theta, n), step(InProcess(given), theta, n)) for n in range(3))
    missing, theta = problem(Missing())
    with RayPool(missing, Scaling(num_workers=1, resources={"node-b": 0.1}), most=1) as pool:
        refused = message(lambda: step(pool, theta, 0))
    return {"same_bits": same, "made": (folder / "cache-b").exists(), "refused": refused}


def serve(folder: Path) -> None:
    """Runs the scenarios that standard input names on one cluster; what distmeta logs meanwhile is ``said``."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("distmeta").addHandler(handler)
    os.environ["DISTMETA_CACHE"] = str(folder / "cache-a")
    kinds = {
        "a": {"num_gpus": 1, "resources": {"grow": 2, "mixed": 2, "data": 1}},
        "b": {"num_gpus": 2, "resources": {"special": 2, "mixed": 1, "data": 1},
              "env_vars": {"DISTMETA_CACHE": str(folder / "cache-b")}},
        "c": {"num_gpus": 4, "resources": {"scarce": 1}},
    }  # fmt: skip
    head, *others = (
        kind | {"num_cpus": 8, "resources": kind["resources"] | {f"node-{name}": 1}} for name, kind in kinds.items()
    )
    made = Cluster(initialize_head=True, head_node_args=head, connect=True)
    for arguments in others:
        made.add_node(**arguments)
    made.wait_for_nodes()
    scenarios: dict[str, Callable[[Cluster, Path], dict]] = {
        scenario.__name__: scenario for scenario in (grow, drain, gpus, placement, hardware, data)
    }
    for name in sys.stdin:
        lines.clear()
        try:
            found = scenarios[name.strip()](made, folder)
        except Exception:
            found = {"failed": traceback.format_exc()}
        print(json.dumps(found | {"said": lines}), flush=True)
    ray.shutdown()
    made.shutdown()


if sys.argv[1] == "autoscale":
    print(json.dumps(autoscale()))
else:
    serve(Path(sys.argv[1]))
