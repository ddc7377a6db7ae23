"""python -m tests.chaos [--minutes 30] [--seed S]: as long as is asked for; with --once each kind of fault once."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from .faults import FAULTS, WEIGHTS, mount
from .ordeal import Failed, Ordeal, cluster, undisturbed
from .tasks import PAUSE


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--minutes", type=float, default=30, help="how long new faults are begun")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule")
    parser.add_argument("--once", action="store_true", help="each kind of fault once, in an order drawn by the seed")
    parser.add_argument("--gap", type=float, default=2.0, help="seconds between faults, on average")
    parser.add_argument("--steps", type=int, default=0, help="outer steps of each run")
    given = parser.parse_args()
    steps = given.steps or (100 if given.once else 600)
    begun = time.monotonic()
    survived: Counter[str] = Counter()
    recoveries: dict[str, list[float]] = defaultdict(list)
    runs = 0

    def say(line: str) -> None:
        print(f"{time.monotonic() - begun:7.1f} s  {line}", flush=True)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        own = {
            "DISTMETA_CACHE": str(folder / "cache"), PAUSE: str(folder / "pause"), "RAY_worker_niceness": "0",
            "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "RAY_DEDUP_LOGS": "0",
        }  # fmt: skip
        os.environ.update(own)  # which the nodes have from here
        disk = folder / "disk"
        reason = mount(disk, "16m")
        kinds = [kind for kind in FAULTS if reason is None or kind != "disk full"]
        if reason is not None:
            say(f"no disk is filled: a small one cannot be mounted here ({reason})")
        try:
            expected = undisturbed(folder, own, steps)
            say("the undisturbed runs are done")
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the cluster ends with this
            with cluster() as made:
                while runs == 0 or (not given.once and time.monotonic() - begun < 60 * given.minutes):
                    seed = f"{given.seed}-{runs}"
                    home = None if reason else disk
                    ordeal = Ordeal(seed, folder, made, expected, steps, own, home, say)
                    order = _once(kinds, seed) if given.once else _forever(kinds, seed, begun + 60 * given.minutes)
                    missed = ordeal.suffer(order, given.gap)
                    ordeal.end()
                    runs += 1
                    say(f"MAML and Reptile ended with the bytes of the undisturbed runs; {len(ordeal.hits)} faults")
                    for _, kind, _, _ in ordeal.hits:
                        survived[kind] += 1
                    for kind, seconds in ordeal.recoveries().items():
                        recoveries[kind] += seconds
                    if given.once and missed:
                        raise Failed(f"there was nothing to hit for {', '.join(missed)}")
        except Failed as failure:
            print(f"FAILED with seed {given.seed}: {failure}", file=sys.stderr)
            return 1
        finally:
            if reason is None:
                subprocess.run(["umount", "-l", disk], check=True)
    print(f"\n{runs} of each training, {sum(survived.values())} faults, all survived, same parameters to the bit\n")
    print("| fault | survived | recoveries timed | median s | longest s |\n|---|---|---|---|---|")
    for kind in kinds:
        seconds = recoveries[kind]
        timed = f"{statistics.median(seconds):.1f} | {max(seconds):.1f}" if seconds else "– | –"
        print(f"| {kind} | {survived[kind]} | {len(seconds)} | {timed} |")
    print(json.dumps({"survived": survived, "seconds": round(time.monotonic() - begun)}))
    return 0


def _once(kinds: list[str], seed: str) -> Iterator[str]:
    yield from random.Random(seed).sample(kinds, len(kinds))


def _forever(kinds: list[str], seed: str, end: float) -> Iterator[str]:
    rng = random.Random(f"{seed} kinds")
    weights = [WEIGHTS[list(FAULTS).index(kind)] for kind in kinds]
    while time.monotonic() < end:
        yield rng.choices(kinds, weights)[0]


if __name__ == "__main__":
    sys.exit(main())
