"""One trial: a whole distributed run, in the resources that Tune gives it.

The run's folder is what Tune keeps as the trial's checkpoint, so that a trial whose process is lost, one that is paused
and one that takes over the state of another all go on as a resumed run does: from the bits that were saved.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Checkpoint, PlacementGroupFactory

from distmeta.distributed.cluster import demand
from distmeta.errors import CheckpointError, ConfigError, DataError, NumericalError
from distmeta.evaluation import Evaluation, finals
from distmeta.experiment import assemble
from distmeta.metrics import MetricsLog
from distmeta.runs import RunFolder
from distmeta.training import Training
from distmeta.tune.search import Search

COSTS = ("seconds", "tasks_per_second")
"""What a trial reports beside the metrics of its validation: seconds of meta-training so far, and its speed."""
FINAL = (NumericalError, ConfigError, DataError, CheckpointError)
"""Errors that would come again in a second attempt: the trial fails at once, with its reason in the table."""


def resources(search: Search) -> PlacementGroupFactory:
    """What one trial holds: a bundle for its driver, and one for each of its workers.

    Without workers the driver computes, so that the GPU, if there is one, is its own.
    """
    scaling = search.trial_config(search.parsed.first()).scaling
    driver, worker = {"CPU": search.driver_cpus}, demand(scaling)
    if not scaling.num_workers:
        return PlacementGroupFactory([{kind: amount for kind, amount in (worker | driver).items() if amount}])
    strategy = "SPREAD" if scaling.placement == "spread" else "PACK"
    return PlacementGroupFactory([driver, *[worker] * int(scaling.num_workers)], strategy=strategy)


def run_trial(sample: dict[str, Any], search: Search, path: Sequence[str], home: Path) -> None:
    """Trains the configuration that ``sample`` means, and reports each validation with the run's folder.

    Args:
        sample: A value for each dimension of the space.
        search: The search.
        path: Where the search's process finds modules: those that ``use`` keys name must be found here too.
        home: Its working directory, which relative paths start from, if this node has it.
    """
    sys.path += [entry for entry in path if entry not in sys.path]
    reported: dict[str, Any] = {}
    try:
        # Below the working directory that Tune gives each trial; the name is ours alone, wherever that is.
        run = RunFolder(Path.cwd() / f"distmeta-{tune.get_context().get_trial_id()}")
        if home.is_dir():
            os.chdir(home)
        shutil.rmtree(run.path, ignore_errors=True)  # what an attempt before this one has left
        config = search.trial_config(sample, run_dir=str(run.path))
        with Training(assemble(config)) as training, run.lock():
            if (saved := tune.get_checkpoint()) is None:
                run.create(training.config)
            else:
                take_over(saved, run, training)

            def report(step: int, evaluation: Evaluation) -> None:
                reported.update(measures(run, step, evaluation))
                tune.report(reported, checkpoint=Checkpoint.from_directory(run.path))

            training.fit(run, report)
            if not reported:  # it has taken over a run that had come to its end: what that has reached is its own now
                *_, last = (record for record in run.records() if record["kind"] == "val")
                report(last["step"], last)
    except FINAL as error:
        worst = {
            m: -math.inf if mode == "max" else math.inf for m, mode in zip(search.metrics, search.modes, strict=True)
        }
        tune.report({"step": 0, **reported, **worst, "failure": str(error)})


def take_over(saved: Checkpoint, run: RunFolder, training: Training) -> None:
    """Goes on from a run that Tune has kept: this trial's own, or in population based training another's."""
    saved.to_directory(run.path)
    training.restore(run, run.checkpoint())
    run.write_config(training.config)


def measures(run: RunFolder, step: int, evaluation: Evaluation) -> Mapping[str, Any]:
    """What a trial reports of a validation: its metrics after adaptation, and what they have cost."""
    metrics = MetricsLog(run, step)
    return finals(evaluation) | {
        "step": step,
        "validations": sum(record["kind"] == "val" for record in run.records()),
        "ci95": evaluation["after"]["ci95"],
        **dict(zip(COSTS, (metrics.total_seconds(), metrics.tasks_per_second()), strict=True)),
    }
