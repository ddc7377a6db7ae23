"""Whether memory stays flat in a long run: 2 workers on a small model, for as long as is asked for.

    python benchmarks/soak.py [--minutes 60] [CONFIG] [key=value ...]

Trains, with a checkpoint at every 100 steps, until the time is over, and samples meanwhile the memory of the driver and
of each worker that is theirs alone (USS), and what Ray's object store holds. The first fifth counts as warming up; the
table gives the medians of what is left cut into four, and the growth by a line through it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import ray
from ray._private.internal_api import memory_summary

import distmeta
from distmeta.errors import Stopped

SETTINGS = ["scaling.num_workers=2", "validation.every=500", "checkpoint.every=100"]
EVERY = 10.0  # seconds between samples


def sample() -> dict[str, float]:
    """Megabytes of the driver, of the workers (by process) and of the object store; objects in it."""
    own = psutil.Process()
    found = {"driver": own.memory_full_info().uss / 2**20, "threads of the driver": own.num_threads()}
    for process in own.children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Worker"):
                found[f"worker {process.pid}"] = process.memory_full_info().uss / 2**20
        except psutil.NoSuchProcess:
            continue
    store = re.search(
        r"Plasma memory usage ([\d.]+) MiB, (\d+) objects",
        memory_summary(ray.get_runtime_context().gcs_address, stats_only=True),
    )
    if store:
        found |= {"object store": float(store[1]), "objects in it": float(store[2])}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("config", nargs="*", default=["glyphs-5way-1shot-maml"])
    given = parser.parse_args()
    name, *overrides = given.config
    run = Path(tempfile.mkdtemp()) / "run"
    end = threading.Event()
    samples: list[tuple[float, dict[str, float]]] = []

    def watch() -> None:
        start = time.monotonic()
        while not end.wait(EVERY):
            if not ray.is_initialized() or not (run / "metrics.jsonl").exists():
                start = time.monotonic()
                continue
            now = time.monotonic() - start
            samples.append((now, sample()))
            if now > 60 * given.minutes:
                os.kill(os.getpid(), signal.SIGINT)  # ends as Ctrl-C does, with the state saved
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        distmeta.train(name, *SETTINGS, "train.steps=100000000", f"run_dir={run}", *overrides)
    except Stopped as stopped:
        print(stopped)
    finally:
        end.set()
        watcher.join()
    shutil.rmtree(run.parent)
    show(samples)


def show(samples: list[tuple[float, dict[str, float]]]) -> None:
    """Prints the table."""
    last = samples[-1][0]
    kept = [(at, found) for at, found in samples if at > last / 5]
    names = dict.fromkeys(name for _, found in kept for name in found)
    print(f"{len(samples)} samples in {last / 60:.0f} min; megabytes but for numbers of objects and threads")
    print(f"{'':24}{'median of each quarter':^40}{'growth an hour':>16}")
    for name in names:
        at, values = np.array([(at, found[name]) for at, found in kept if name in found]).T
        quarters = [float(np.median(part)) for part in np.array_split(values, 4)]
        slope = float(np.polyfit(at, values, 1)[0]) * 3600
        print(f"{name:24}" + "".join(f"{value:10.1f}" for value in quarters) + f"{slope:16.1f}")


if __name__ == "__main__":
    main()
