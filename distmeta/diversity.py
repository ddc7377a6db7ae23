"""How diverse the tasks of a run are, by the gradients that they give the outer loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

from distmeta.adaptation import restore
from distmeta.core.loss import Criterion
from distmeta.core.types import TaskDistribution
from distmeta.distributed.work import Shard
from distmeta.errors import ConfigError
from distmeta.experiment import MetaAlgorithm, assemble
from distmeta.report import DIVERSITY, report
from distmeta.runs import RunFolder
from distmeta.similarity import Similarity, similarity
from distmeta.training import executor_of


def diversity(
    path: str | Path,
    *overrides: str,
    tasks_compared: int = 64,
    checkpoint: str = "best",
    model: nn.Module | None = None,
    loss: Criterion | None = None,
    tasks: TaskDistribution | None = None,
    algorithm: MetaAlgorithm | None = None,
) -> Similarity:
    """Compares the meta-gradients of training tasks, at the parameters of a checkpoint, in pairs.

    The tasks are those of the outer step that would come next. The result is kept in the folder of the run, whose
    report shows it from then on.

    Args:
        path: The folder of the run, or its URL.
        overrides: ``"key.subkey=value"`` strings of the section ``scaling`` and of ``data_root``.
        tasks_compared: How many tasks.
        checkpoint: ``best`` by validation, ``last``, or a step.
        model, loss, tasks, algorithm: The Python objects that the run was started with, if any.

    Raises:
        ConfigError: There are too few tasks to compare.
        DistmetaError: See `distmeta.errors`.
    """
    if tasks_compared < 3:
        raise ConfigError(f"--tasks must be at least 3, for there to be pairs and an interval; given: {tasks_compared}")
    run = RunFolder.open(path)
    settings = run.config(overrides, may_change=("scaling", "data_root"))
    experiment = assemble(settings, model=model, loss=loss, tasks=tasks, algorithm=algorithm)
    problem = experiment.problem
    vector = problem.layout.pack(restore(run, experiment, checkpoint))
    step = int(run.checkpoint(checkpoint).state["outer"]["step"])
    shards = [
        Shard("train", step, index, 1) for index in range(tasks_compared)
    ]  # one task each: its sum is its gradient
    with executor_of(experiment.config, problem, len(shards)) as executor:
        results = executor.map("meta_gradient", vector, shards)
    skipped = {index for result in results for index in result.skipped}
    sizes = [int(np.prod(shape)) for shape in problem.layout.shapes]
    learned = np.repeat([name.startswith("model.") for name in problem.layout.names], sizes)
    gradients = np.stack([result.total[learned] for result in results if result.tasks and result.total is not None])
    groups = [names[0] for names in problem.groups(shards, skipped)] or [""] * len(gradients)
    result = similarity(step, gradients.astype(np.float64), groups)
    run.write(DIVERSITY, result.model_dump_json())
    report([run], experiment=experiment)
    return result
