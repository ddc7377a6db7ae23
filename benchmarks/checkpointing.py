"""What checkpoints cost: throughput with one at every 100 outer steps, against none, in one run.

    python benchmarks/checkpointing.py [--pairs 10] [CONFIG] [key=value ...]

Stretches of 100 steps that begin with a checkpoint and stretches without one take turns, so that both see the same
machine. A stretch holds all that its checkpoint costs: the copy of the state, and what writing it aside takes from the
workers. The default is glyphs-5way-1shot-maml with two workers. On a machine that is busy with other things, where the
stretches differ by more than a checkpoint can cost, the processor time of both parts says how much that is.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from distmeta import checkpoint
from distmeta.checkpoint import Checkpoint, Writer
from distmeta.config import load
from distmeta.distributed.executor import MetaBatch, reduce_mean
from distmeta.distributed.work import reproducible, shards_of
from distmeta.experiment import assemble
from distmeta.training import Training

STEPS = 100  # outer steps of a stretch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10, help="stretches of each kind, 2 or more")
    parser.add_argument("config", nargs="*")
    given = parser.parse_args()
    arguments, pairs = given.config, given.pairs
    names = [word for word in arguments if "=" not in word] or ["glyphs-5way-1shot-maml"]
    config = load(names[0], ["scaling.num_workers=2", *(word for word in arguments if "=" in word)])
    size = config.train.meta_batch_size

    def shards(step: int) -> list:
        return shards_of("train", step, size, config.train.shard_size)

    seconds: dict[bool, list[float]] = {True: [], False: []}
    copying: list[float] = []
    writing: list[float] = []  # processor seconds of the thread that writes
    save_and_prune = checkpoint._save_and_prune

    def timed(*arguments: Any) -> None:
        start = time.thread_time()
        save_and_prune(*arguments)
        writing.append(time.thread_time() - start)

    checkpoint._save_and_prune = timed
    with tempfile.TemporaryDirectory() as folder, Training(assemble(config)) as training, Writer() as writer:
        outer = training.outer
        for stretch in range(-1, 2 * pairs):  # the first one warms up
            saves = stretch % 2 == 1
            start = time.perf_counter()
            if saves:
                tensors, plain = outer.state()
                params = {name: parameter.data for name, parameter in outer.params.items()}
                writer.save(Path(folder), outer.step, Checkpoint(params, tensors, {"outer": plain}), 2, None)
                copying.append(time.perf_counter() - start)
            for _ in range(STEPS):
                results = training.executor.map(
                    "meta_gradient", outer.vector(), shards(outer.step), shards(outer.step + 1)
                )
                batch = MetaBatch(training.executor, outer.vector(), shards(outer.step))
                with reproducible(1, 0):
                    outer.update(reduce_mean(results), batch)
            if stretch >= 0:
                seconds[saves].append(time.perf_counter() - start)
        writer.wait()
        kept = sum(file.stat().st_size for file in Path(folder).glob("*/*"))
    ratios = [one / other - 1 for one, other in zip(seconds[True], seconds[False], strict=True)]
    without = statistics.median(seconds[False])
    print(f"{names[0]}: {1000 * without / STEPS:.1f} ms a step, {kept / 2e6:.2f} MB a checkpoint")
    wait, busy = statistics.median(copying), statistics.median(writing)
    print(
        f"the step waits {1000 * wait:.2f} ms for a checkpoint, writing it takes {1000 * busy:.1f} ms of a processor, "
        f"together {100 * (wait + busy) / without:.3f}% of {STEPS} steps"
    )
    print(
        f"a checkpoint at every {STEPS} steps costs {100 * statistics.median(ratios):.2f}% of throughput "
        f"(median of {pairs} pairs of neighbours; quartiles "
        + ", ".join(f"{100 * q:.2f}%" for q in statistics.quantiles(ratios, n=4)[::2])
        + ")"
    )


if __name__ == "__main__":
    main()
