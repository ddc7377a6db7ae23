"""Where the time of a run has gone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import distmeta
from distmeta.profiling import profile

QUICK = ("scaling.num_workers=0", "evaluation.tasks=0", "validation.every=0", "train.steps=3")


def test_a_profile_accounts_for_the_time_of_a_step(tmp_path: Path) -> None:
    run = distmeta.train("sinusoid-maml", *QUICK, f"run_dir={tmp_path / 'run'}")
    seen = profile(run.path)
    lines = [line for line in run.records() if line["kind"] == "train"]
    assert seen.steps == 3
    assert sum(seen.driver.values()) * 3 == pytest.approx(
        sum(line["tasks"] / line["tasks_per_second"] for line in lines)
    )
    assert seen.workers.keys() == {"sample", "adapt"}
    assert 0 < seen.concurrency < 1  # one process: what is not computing is the driver's
    assert seen.operations == sorted(seen.operations, key=lambda operation: -operation[2])
    assert any(name == "aten::addmm" or "aten::mm" in name or "bmm" in name for name, *_ in seen.operations)
    assert json.loads(seen.trace.read_text())["traceEvents"]
    command = [sys.executable, "-m", "distmeta", "profile", str(run.path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "waiting for shards" in said.stdout
    assert str(seen.trace) in said.stdout.replace("\n", "")
    assert not said.stderr


def test_a_run_that_has_not_begun_has_no_profile(tmp_path: Path) -> None:
    run = distmeta.train("sinusoid-maml", *QUICK, f"run_dir={tmp_path / 'run'}")
    run.metrics.write_text("")
    with pytest.raises(distmeta.DistmetaError, match="no outer step yet"):
        profile(run.path)
