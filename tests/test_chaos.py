"""The harness of tests/chaos: each kind of fault once, on real runs with real workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_each_fault_once_changes_no_bit() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--once", "--gap", "1"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    print(done.stdout)  # shown where a disk could not be filled
    found = json.loads(done.stdout.splitlines()[-1])
    expected = {
        "worker killed",
        "all workers killed",
        "worker stopped",
        "worker slowed",
        "node killed",
        "driver killed",
    }
    assert found["survived"].keys() >= expected | {"driver interrupted", "checkpoint damaged"}
