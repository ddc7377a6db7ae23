"""Runs a search on a cluster of three nodes of two cores (`test_tune_survival`), and says what became of them."""

import json
import sys
import threading
import time

import ray
from problems import lasting_workers
from ray.cluster_utils import Cluster

from distmeta.tune.run import search

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2}, connect=True)
for _ in range(2):
    cluster.add_node(num_cpus=2)
cluster.wait_for_nodes()
total, used, done = ray.cluster_resources()["CPU"], [], threading.Event()


def watch() -> None:
    while not done.wait(0.5):
        used.append(total - ray.available_resources().get("CPU", 0))


watcher = threading.Thread(target=watch)
watcher.start()
search(json.loads(sys.argv[1]), f"run_dir={sys.argv[2]}")
done.set()
watcher.join()
deadline = time.monotonic() + 20
while ray.available_resources().get("CPU") != total and time.monotonic() < deadline:
    time.sleep(0.2)
groups = ray.util.placement_group_table().values()
found = {
    "nodes": len([node for node in ray.nodes() if node["Alive"]]),
    "cpus": total,
    "most_used": max(used),
    "utilisation": sum(used) / len(used) / total,
    "free": ray.available_resources()["CPU"],
    "groups": [group["state"] for group in groups],
    "spread": [len(set(group["bundles_to_node_id"].values())) for group in groups],
    "workers": lasting_workers(),
}
print(json.dumps(found))
ray.shutdown()
cluster.shutdown()
