"""Memory and time of an outer step by inner steps, with and without recomputation.

    python benchmarks/memory.py [CONFIG] [key=value ...]

Each figure is of a process of its own: the most memory that one task's meta-gradient adds to it, and the seconds of the
quicker of two. The default is 20-way 1-shot tasks of glyphs on the pooled network.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

from distmeta.config import load
from distmeta.distributed.work import Shard
from distmeta.experiment import assemble

DEFAULT = ["glyphs-5way-1shot-maml", "tasks.ways=20", "model.downsample=pool", "model.filters=64"]


def measure(arguments: list[str]) -> None:
    names = [word for word in arguments if "=" not in word]
    experiment = assemble(load(names[0], [word for word in arguments if "=" in word]))
    problem = experiment.problem
    vector = problem.layout.pack(experiment.initial)
    tasks = problem.build(Shard("train", 0, 0, 1))
    seconds = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        start = time.perf_counter()
        problem.run("meta_gradient", vector, Shard("train", 0, 0, 1), tasks)
        seconds.append(time.perf_counter() - start)
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{added:6.0f} MB {min(seconds):6.2f} s")


def main(arguments: list[str]) -> None:
    for recompute in ("false", "true"):
        for steps in (2, 10):
            settings = [*(arguments or DEFAULT), f"algorithm.inner_steps={steps}", f"algorithm.recompute={recompute}"]
            command = [sys.executable, __file__, "measure", *settings]
            print(f"recompute {recompute:5} inner steps {steps:2}", end=" ", flush=True)
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2:])
    else:
        main(sys.argv[1:])
