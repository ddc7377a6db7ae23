"""The sinusoid of Finn et al. (2017): meta-training beats joint training by far."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import distmeta
from distmeta.experiment import assemble


def test_meta_training_beats_joint_training_by_far(tmp_path: Path) -> None:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "sinusoid_joint.py"
    spec = importlib.util.spec_from_file_location("sinusoid_joint", path)
    joint = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(joint)

    # A sixth of the packaged configuration's steps, with four times its tasks in each and three times its outer rate.
    settings = ["train.steps=2500", "train.meta_batch_size=100", "train.shard_size=100", "outer.lr=0.003"]
    settings += ["scaling.num_workers=0", "validation.every=0", "evaluation.tasks=300", "evaluation.baselines=false"]
    run = distmeta.train("sinusoid-maml", *settings, f"run_dir={tmp_path / 'run'}")
    after_one = run.summary()["test"]["by_inner_step"]["loss"][1]["mean"]
    assert after_one <= 0.5

    problem = joint.joint_initialisation(assemble(run.config()), 1000)
    best = min(values[1] for values in joint.joint_errors(problem, 300, 1).values())
    assert after_one < best / 3
    assert best == pytest.approx(2.5, abs=1)  # what the mean of all waves leaves of A²/2 and its variance
