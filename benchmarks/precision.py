"""What `train.precision=bfloat16` gains, and what it costs in accuracy of the meta-gradients.

    python benchmarks/precision.py CONFIG [key=value ...]

One shard after another is computed in both precisions, by turns, in this process: the ratio of processor times, and how
far the shard's meta-gradients lie from each other, as the relative distance ‖g' − g‖ / ‖g‖ and the cosine.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np

from distmeta.config import load
from distmeta.distributed.executor import InProcess
from distmeta.distributed.work import shards_of
from distmeta.experiment import assemble

TURNS = 10


def main(config: str, *overrides: str) -> None:
    sides = {}
    for precision in ("float32", "bfloat16"):
        experiment = assemble(load(config, [*overrides, f"train.precision={precision}"]))
        sides[precision] = InProcess(experiment.problem)
    vector, train = experiment.problem.layout.pack(experiment.initial), experiment.config.train
    ratios, distances, cosines, seconds = [], [], [], []
    for step in range(TURNS + 1):
        spent, gradients = [], []
        for executor in sides.values():
            start = time.process_time()
            (result,) = executor.map(
                "meta_gradient", vector, shards_of("train", step, train.shard_size, train.shard_size)
            )
            spent.append(time.process_time() - start)
            gradients.append(result.total)
        if step == 0:  # what is loaded at first use
            continue
        exact, rounded = gradients
        ratios.append(spent[0] / spent[1])
        seconds.append(spent[0] / train.shard_size)
        distances.append(np.linalg.norm(rounded - exact) / np.linalg.norm(exact))
        cosines.append(rounded @ exact / np.linalg.norm(rounded) / np.linalg.norm(exact))
    print(f"{' '.join([config, *overrides])}: {1000 * statistics.median(seconds):.1f} ms a task in float32")
    print(f"bfloat16 is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"distance of meta-gradients {statistics.median(distances):.4f} (at most {max(distances):.4f}), "
          f"cosine {statistics.median(cosines):.4f} (at least {min(cosines):.4f})")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
