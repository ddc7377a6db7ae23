"""The harness of tests/chaos: each kind of fault once, on real runs with real workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.timeout(600)  # a minute or two where nothing else runs
def test_each_fault_once_changes_no_bit() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--once", "--gap", "1"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    expected = {
        "worker killed",
        "all workers killed",
        "worker stopped",
        "worker slowed",
        "node killed",
        "node drained",
        "driver killed",
    }
    assert found["survived"].keys() >= expected | {"driver interrupted", "checkpoint damaged"}
    if "disk full" not in found["survived"]:
        warnings.warn(next(line for line in done.stdout.splitlines() if "no disk is filled" in line), stacklevel=1)
