"""The command line as users run it, a process of its own; and what it leaves of a small run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

TINY = [
    "scaling.num_workers=0", "model.filters=8", "train.steps=6", "train.meta_batch_size=4", "train.shard_size=2",
    "validation.every=2", "validation.tasks=6", "evaluation.tasks=12", "checkpoint.every=2",
]  # fmt: skip
"""Settings of a run that takes seconds."""


def cli(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``distmeta`` with ``arguments`` in the folder ``cwd``; it finds the modules that are beside the tests."""
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parent)} | environment
    command = [sys.executable, "-m", "distmeta", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=here, cwd=cwd)


def digest(run: Path, step: int) -> str:
    return hashlib.sha256((run / "checkpoints" / f"step-{step:08d}" / "meta.safetensors").read_bytes()).hexdigest()
