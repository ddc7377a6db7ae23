"""Where the time of an outer step goes, as shares of the workers' time (wall time of the step × workers).

    python benchmarks/overhead.py [CONFIG] [key=value ...]

The default is omniglot-5way-1shot-maml with two workers. ``adapt`` is the workers' own computing; all else is what
distribution and bookkeeping cost: building tasks (``sample``), parameters out, results back and waiting for the last
worker (``transfer``), and on the driver, while workers can only build tasks ahead, ``reduce``, ``outer`` and
``checkpoint``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import distmeta

WARM_UP, STEPS = 10, 60  # steps left out while caches fill, and steps in all


def main(arguments: list[str]) -> None:
    names = [word for word in arguments if "=" not in word] or ["omniglot-5way-1shot-maml"]
    settings = ["scaling.num_workers=2", *(word for word in arguments if "=" in word), f"train.steps={STEPS}"]
    settings += ["evaluation.tasks=0", "validation.every=0", "train.log_every=10", "checkpoint.every=50"]
    with tempfile.TemporaryDirectory() as folder:
        run = distmeta.train(names[0], *settings, f"run_dir={Path(folder) / 'run'}")
        lines = [record for record in run.records() if record["step"] > WARM_UP]
        workers = run.config().scaling.num_workers
    seconds = {part: sum(line["seconds"].get(part, 0.0) for line in lines) for part in lines[0]["seconds"]}
    seconds["checkpoint"] = sum(line["seconds"].get("checkpoint", 0.0) for line in lines)
    steps = sum(line["steps"] for line in lines)
    assert isinstance(workers, int)
    wall = sum(seconds[part] for part in ("map", "reduce", "outer", "checkpoint"))
    shares = {"adapt": seconds["adapt"], "sample": seconds["sample"]}
    shares["transfer"] = workers * seconds["map"] - seconds["adapt"] - seconds["sample"]
    shares |= {part: workers * seconds[part] for part in ("reduce", "outer", "checkpoint")}
    print(f"{names[0]}, {workers} workers: {1000 * wall / steps:.1f} ms a step over {steps} steps")
    for part, value in shares.items():
        print(f"{part:12} {1000 * value / workers / steps:8.2f} ms {100 * value / workers / wall:6.2f}%")
    print(f"{'overhead':12} {'':11} {100 * (1 - shares['adapt'] / workers / wall):6.2f}%")


if __name__ == "__main__":
    main(sys.argv[1:])
