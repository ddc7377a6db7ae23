"""The cluster: joining one or starting one, and what is said of its resources."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import ray
import torch
from ray._private.state import state as gcs
from ray.exceptions import AuthenticationError

from distmeta.config import Scaling
from distmeta.errors import ResourceError, one_line

log = logging.getLogger("distmeta")

INLINE = 4 * 2**20
"""Bytes of a result up to which a cluster started here sends it in the answer itself and not by the object store, which
takes about a millisecond longer for half a megabyte (docs/results.md): a tenth of what a small task computes."""


def connect(scaling: Scaling, log_to_driver: bool = True) -> None:
    """Joins the cluster that ``scaling`` or the environment names, or starts one on this machine.

    Raises:
        ResourceError: The cluster cannot be reached.
    """
    address = scaling.address or os.environ.get("RAY_ADDRESS")
    if address and address.startswith("ray://"):
        raise ResourceError(
            f"{address} is an address for Ray's client, by which workers cannot be followed; submit a job, or run on a "
            "node of the cluster with scaling.address=HOST:6379 (docs/cluster.md)"
        )
    quiet: dict[str, Any] = {"logging_level": "warning", "log_to_driver": log_to_driver, "namespace": "distmeta"}
    start = time.perf_counter()
    before = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            logging.getLogger("ray._private.authentication").setLevel("ERROR")  # which explains tokens at each start
            # A worker per core is the rule; who asks for more on one machine gets them, sharing the cores.
            wanted = 0 if scaling.num_workers == "auto" else scaling.num_workers * scaling.cpus_per_worker
            cores = int(np.ceil(wanted)) if wanted > len(os.sched_getaffinity(0)) else None
            gpus = torch.cuda.device_count() if scaling.use_gpu else None  # Ray misses those whose NVML it cannot find
            local: dict[str, Any] = {"num_cpus": cores, "num_gpus": gpus, "include_dashboard": False}
            inline = {"max_direct_call_object_size": INLINE}
            ray.init(address="local", _system_config=inline, **local, **quiet)
    except SystemExit:  # the handlers of SIGTERM that ray.init sets end so, with codes of their own
        raise KeyboardInterrupt from None
    except (ConnectionError, AuthenticationError, ValueError, RuntimeError) as error:
        where = address or "of this machine"
        raise ResourceError(f"the Ray cluster {where} cannot be joined ({one_line(error)}); {_advice()}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    seconds = time.perf_counter() - start
    if address:
        nodes = sum(node["Alive"] for node in ray.nodes())
        size = "one node" if nodes == 1 else f"{nodes} nodes"
        log.info("joined the Ray cluster %s of %s after %.1f s", address, size, seconds)
    else:
        log.info("Ray is ready after %.1f s", seconds)


def _advice() -> str:
    """What to do about a cluster that cannot be joined: a token is the likeliest reason after its not being up."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode != "token":
        return (
            "is it up? If it uses tokens, set RAY_AUTH_MODE=token here and copy ~/.ray/auth_token from its head "
            f"(RAY_AUTH_MODE is {mode or 'not set'})"
        )
    return "is it up, and is the token here (~/.ray/auth_token, or RAY_AUTH_TOKEN) that of its head?"


def demand(scaling: Scaling) -> dict[str, float]:
    """What one worker is given."""
    gpus = {"GPU": scaling.gpus_per_worker} if scaling.use_gpu else {}
    return {"CPU": scaling.cpus_per_worker} | gpus | scaling.resources


def amounts(resources: Mapping[str, float]) -> str:
    """Resources for messages."""
    return ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items())


def capacity(need: Mapping[str, float]) -> int:
    """How many bundles of ``need`` the nodes can hold when idle, but for those that are about to go."""
    going = draining()
    staying = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in going]
    return sum(_holds(node["Resources"], need) for node in staying)


def draining() -> Collection[str]:
    """The nodes that are about to go: a spot instance that has been given notice, one that is taken down."""
    return gcs.get_draining_nodes()  # which Ray Train asks too: there is no public name for it


def check_room(driver: Mapping[str, float], worker: Mapping[str, float], workers: int) -> None:
    """Raises `ResourceError` if the cluster as it stands, even when idle, cannot hold a trial's driver and workers."""
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    for chosen in nodes:
        if _holds(chosen, driver) == 0:
            continue
        left = [{k: v - driver.get(k, 0) for k, v in node.items()} if node is chosen else node for node in nodes]
        if not workers or sum(_holds(node, worker) for node in left) >= workers:
            return
    kinds = dict.fromkeys(["CPU", "GPU", *driver, *worker])
    have = "; ".join(f"({amounts({kind: node.get(kind, 0) for kind in kinds})})" for node in nodes)
    asked = f"({amounts(driver)})" + (f" and {workers} times ({amounts(worker)})" if workers else "")
    raise ResourceError(
        f"this cluster can never place a trial: it needs {asked}; the nodes have {have}. Lower "
        "set.scaling.num_workers, driver_cpus, or what a worker is given; autoscaling=true waits for nodes to come"
    )


def _holds(node: Mapping[str, float], need: Mapping[str, float]) -> int:
    """How many times ``need`` fits into the resources of a node."""
    wanted = {kind: amount for kind, amount in need.items() if amount > 0} or {"CPU": 1.0}
    return min(int(node.get(kind, 0) / amount + 1e-6) for kind, amount in wanted.items())
