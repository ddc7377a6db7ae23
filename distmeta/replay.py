"""Going back to one task of a run, to see what happened in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from distmeta import checkpoint as storage
from distmeta.core.loss import Criterion
from distmeta.core.params import join, split
from distmeta.core.types import TaskDistribution
from distmeta.distributed.executor import InProcess, MetaBatch, reduce_mean
from distmeta.distributed.work import Problem, reproducible, shards_of, to_device
from distmeta.errors import ConfigError, DistmetaError, one_line
from distmeta.experiment import MetaAlgorithm, assemble
from distmeta.outer import OuterLoop
from distmeta.runs import RunFolder, describe


@dataclass(frozen=True)
class Replay:
    """What happened in one task of one outer step."""

    rerun: int
    """How many outer steps had to be done again, from the checkpoint before."""
    rows: list[dict[str, float]]
    """Before adaptation and after each inner step, as many as in evaluation: ``query loss`` and the query metrics,
    ``support loss`` (of the step that has led there), and ``change``, the Euclidean norm of theta_k − theta."""
    gradients: dict[str, float]
    """The norm of the meta-gradient of each tensor; empty where it could not be taken."""
    failure: str | None
    """What went wrong, if anything was raised; ``rows`` are those before it."""


def replay(
    path: str | Path,
    step: int,
    task: int,
    *,
    model: nn.Module | None = None,
    loss: Criterion | None = None,
    tasks: TaskDistribution | None = None,
    algorithm: MetaAlgorithm | None = None,
) -> Replay:
    """Adapts to task ``task`` (its index in the meta-batch) of outer step ``step`` (from 0) once more, as it was then.

    The parameters of that step are those of a checkpoint, or come of the outer steps after the newest one before it,
    which are done again in this process, with the same bits. A network with dropout draws other masks than then.

    Args:
        path: The folder of the run, or its URL.
        step, task: Which task.
        model, loss, tasks, algorithm: The Python objects that the run was started with, if any.

    Raises:
        ConfigError: There is no such step or task, or settings have changed since (`distmeta resume --allow`).
        DistmetaError: See `distmeta.errors`.
    """
    run = RunFolder.open(path)
    experiment = assemble(run.config(), model=model, loss=loss, tasks=tasks, algorithm=algorithm)
    config, problem = experiment.config, experiment.problem
    settings = config.train
    for key, value, bound in (("--step", step, settings.steps), ("--task", task, settings.meta_batch_size)):
        if not 0 <= value < bound:
            raise ConfigError(f"{key} must be between 0 and {bound - 1} in this run; given: {value}")
    outer = OuterLoop(config.outer, experiment.initial, problem.layout)
    before = storage.newest_whole(run.checkpoints, step + 1)
    if before is not None:
        saved = run.checkpoint(str(before))
        outer.restore(saved.params, saved.tensors, saved.state["outer"])
    begun = outer.step
    for record in run.records():
        if record["kind"] == "change" and record["step"] > begun:
            raise ConfigError(
                f"--step {step} would be done with other settings than then, since step {record['step']} changed "
                f"{describe(record['changed'])}: the parameters of step {begun} are the newest before it that are kept"
            )
    executor = InProcess(problem)
    while outer.step < step:
        theta = outer.taken_at()
        shards = shards_of("train", outer.step, settings.meta_batch_size, settings.shard_size)
        gradient = reduce_mean(executor.map("meta_gradient", theta, shards))
        with reproducible(1, 0):
            outer.update(gradient, MetaBatch(executor, theta, shards))
    return _look(problem, outer, task, step - begun)


def _look(problem: Problem, outer: OuterLoop, task: int, rerun: int) -> Replay:
    (shard,) = [one._replace(first=task) for one in shards_of("train", outer.step, 1, 1)]
    (chosen,) = (to_device(one, problem.device) for one in problem.build(shard))
    problem.loss.module.to(problem.device).train()
    loss = problem.loss_of(chosen)
    meta = split(problem.layout.unpack(outer.taken_at(), problem.device))
    rows: list[dict[str, float]] = []
    gradients: dict[str, float] = {}
    failure: str | None = None
    with reproducible(problem.threads, 0):
        try:
            for at in problem.algorithm.trajectory(meta, chosen, loss):
                with torch.no_grad():
                    moved = [(at.params[name] - tensor).square().sum() for name, tensor in meta.model.items()]
                    row = {"change": float(torch.stack(moved).sum().sqrt())}
                    rows.append(row | ({} if at.loss is None else {"support loss": float(at.loss)}))
                    value, metrics = loss(at.params, chosen.query(at.params))
                rows[-1] |= {"query loss": float(value)} | {f"query {name}": float(m) for name, m in metrics.items()}
            result = problem.algorithm.meta_gradient(meta, chosen, loss, step=outer.step)
            gradients = {name: float(tensor.norm()) for name, tensor in join(result.gradient).items()}
        except DistmetaError as error:
            failure = one_line(error)
    return Replay(rerun, rows, gradients, failure)
