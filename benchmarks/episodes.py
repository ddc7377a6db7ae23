"""What building episodes costs, as a share of a training step; and how fast a very large folder plans its splits.

    python benchmarks/episodes.py [--seconds 5] [--images 2000000] [CONFIG ...]

For each packaged configuration (those named, else all whose data can be had) one process with one thread builds the
episodes of a shard and computes its meta-gradient, in turns, for some seconds: printed are the medians of both, in
seconds of processor time a task (a busy machine changes these least), and the share of building in their sum. Data sets
are looked for in $DISTMETA_DATA; what is not there is downloaded or left out.

The folder is an index alone, with as many images as asked for in classes of 20: it is divided, its classes are counted,
and episodes are drawn from an array that takes no memory (one image, seen as many times as there are images).
"""

from __future__ import annotations

import argparse
import pickle
import resource
import statistics
import time

import numpy as np
import torch

from distmeta.config import load, packaged
from distmeta.core.seeds import stream
from distmeta.distributed.work import Shard
from distmeta.errors import DistmetaError
from distmeta.experiment import assemble
from distmeta.tasks.cache import ExampleSet
from distmeta.tasks.datasets import DataTasks
from distmeta.tasks.folders import ImageFolder

CLASS = 20
SIDE = 84


def share(name: str, seconds: float) -> str:
    """A line of the table."""
    experiment = assemble(load(name, ["scaling.num_workers=0"]))
    problem, train = experiment.problem, experiment.config.train
    if not isinstance(problem.tasks, DataTasks):
        return "no data set"
    vector = problem.layout.pack(experiment.initial)
    size = min(train.shard_size, train.meta_batch_size)
    built: list[float] = []
    computed: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(built) < 3:
        shard = Shard("train", len(built), 0, size)
        start = time.process_time()
        tasks = problem.build(shard)
        middle = time.process_time()
        problem.run("meta_gradient", vector, shard, tasks)
        built.append(middle - start)
        computed.append(time.process_time() - middle)
    a, b = statistics.median(built[1:]) / size, statistics.median(computed[1:]) / size
    return f"{1e3 * a:8.2f} ms {1e3 * b:9.1f} ms {a / (a + b):8.2%}"


def large_folder(images: int) -> None:
    """An index of ``images`` images, divided and drawn from."""
    classes = images // CLASS
    names = tuple(f"class{number:07}" for number in range(classes))
    pixels = np.broadcast_to(np.zeros((1, SIDE, SIDE, 3), np.uint8), (images, SIDE, SIDE, 3))
    data = ExampleSet(pixels, names, np.full(classes, CLASS, np.int64))
    tasks = ImageFolder(path="simulated")
    tasks.attach(data)
    tasks._key = "simulated"  # pyright: ignore[reportAttributeAccessIssue]
    start = time.perf_counter()
    tasks.prepare()
    planned = time.perf_counter() - start
    start = time.process_time()
    for index in range(200):
        tasks.sample(stream(0, index), "train")
    drawn = (time.process_time() - start) / 200
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = sum(tasks.sample(stream(0), "train")[part][0].shape[0] for part in (0, 1))
    print(f"{images:,} images of {SIDE} x {SIDE} in an array of {pixels.size / 1e9:.0f} GB: {tasks.describe()}")
    print(f"  splits planned and checked in {planned:.1f} s; an episode of {size} images in {1e3 * drawn:.2f} ms")
    print(f"  {len(pickle.dumps(tasks))} bytes sent to a worker; this process at its peak, with torch: {memory:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each configuration")
    parser.add_argument("--images", type=int, default=2_000_000)
    parser.add_argument("configs", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'configuration':42} {'building':>11} {'computing':>12}  share of building (a task)")
    for name in given.configs or packaged():
        try:
            print(f"{name:42} {share(name, given.seconds)}", flush=True)
        except DistmetaError as error:
            print(f"{name:42} left out: {str(error)[:70]}…", flush=True)
    large_folder(given.images)


if __name__ == "__main__":
    main()
