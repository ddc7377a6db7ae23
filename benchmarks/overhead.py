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
from distmeta.profiling import per_step

WARM_UP, STEPS = 10, 60  # steps left out while caches fill, and steps in all


def main(arguments: list[str]) -> None:
    names = [word for word in arguments if "=" not in word] or ["omniglot-5way-1shot-maml"]
    settings = ["scaling.num_workers=2", *(word for word in arguments if "=" in word), f"train.steps={STEPS}"]
    settings += ["evaluation.tasks=0", "validation.every=0", "train.log_every=10", "checkpoint.every=50"]
    with tempfile.TemporaryDirectory() as folder:
        run = distmeta.train(names[0], *settings, f"run_dir={Path(folder) / 'run'}")
        lines = [record for record in run.records() if record["step"] > WARM_UP]
        workers = run.config().scaling.num_workers
    driver, computed = per_step(lines)
    steps = sum(line["steps"] for line in lines)
    assert isinstance(workers, int)
    wall = sum(driver.values())
    shares = {"adapt": computed["adapt"], "sample": computed["sample"]}
    shares["transfer"] = workers * driver["map"] - computed["adapt"] - computed["sample"]
    shares |= {part: workers * driver[part] for part in ("reduce", "outer", "checkpoint")}
    print(f"{names[0]}, {workers} workers: {1000 * wall:.1f} ms a step over {steps} steps")
    for part, value in shares.items():
        print(f"{part:12} {1000 * value / workers:8.2f} ms {100 * value / workers / wall:6.2f}%")
    print(f"{'overhead':12} {'':11} {100 * (1 - shares['adapt'] / workers / wall):6.2f}%")


if __name__ == "__main__":
    main(sys.argv[1:])
