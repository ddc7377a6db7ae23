"""Meta-training: the outer loop as it is run, logged, checkpointed and resumed."""

from __future__ import annotations

import platform
import signal
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from torch import nn

from distmeta import checkpoint
from distmeta.config import Config, load
from distmeta.core.loss import Criterion
from distmeta.core.types import TaskDistribution
from distmeta.distributed.executor import Executor, InProcess, reduce_mean
from distmeta.distributed.work import Problem, reproducible, shards_of
from distmeta.errors import ConfigError, DistmetaError
from distmeta.evaluation import Evaluation, better, describe, evaluate_tasks, gather, nearest_neighbour, show
from distmeta.experiment import Experiment, MetaAlgorithm, assemble
from distmeta.metrics import MetricsLog
from distmeta.outer import OuterLoop
from distmeta.progress import Progress
from distmeta.runs import RunFolder


class Best(TypedDict):
    """Where validation was best so far."""

    step: int
    metric: str
    value: float


class Stopped(Exception):
    """Training was asked to stop by a signal; the state has been saved."""

    def __init__(self, run: RunFolder, step: int) -> None:
        super().__init__(f"stopped after step {step}; `distmeta resume {run.path}` goes on from there")
        self.run = run


def train(
    config: str | Path | Mapping[str, Any] | None = None,
    *overrides: str,
    model: nn.Module | None = None,
    loss: Criterion | None = None,
    tasks: TaskDistribution | None = None,
    algorithm: MetaAlgorithm | None = None,
) -> RunFolder:
    """Meta-trains from the start.

    Args:
        config: A packaged name, a YAML file or a mapping; None for the offline default. Left out together with a
            Python object given below: the defaults of every section.
        overrides: ``"key.subkey=value"`` strings that change it.
        model: A network that takes the place of the configuration's; its weights are where theta starts.
        loss: ``loss(output, target)``, a scalar or a scalar and metrics.
        tasks: A distribution over tasks: ``sample(rng, split)`` gives an `Episode`.
        algorithm: A meta-learning algorithm.

    Returns:
        The folder of the run, with its summary and checkpoints.

    Raises:
        DistmetaError: See `distmeta.errors`.
        Stopped: SIGINT or SIGTERM came; the run can be resumed.
    """
    given = {"model": model, "loss": loss, "tasks": tasks, "algorithm": algorithm}
    if config is None and any(part is not None for part in given.values()):
        config = {}
    experiment = assemble(load(config, overrides), **given)
    run = RunFolder.create(experiment.config)
    with run.lock():
        _train(run, experiment)
    return run


def resume(
    path: str | Path,
    *overrides: str,
    model: nn.Module | None = None,
    loss: Criterion | None = None,
    tasks: TaskDistribution | None = None,
    algorithm: MetaAlgorithm | None = None,
) -> RunFolder:
    """Goes on with an interrupted run, to the bit as if it had not been interrupted.

    Args:
        path: The folder of the run.
        overrides: ``"key.subkey=value"`` strings of keys that may change, such as ``scaling.num_workers=8``.
        model, loss, tasks, algorithm: The Python objects that the run was started with, if any.

    Raises:
        DistmetaError: See `distmeta.errors`.
        Stopped: SIGINT or SIGTERM came; the run can be resumed again.
    """
    run = RunFolder.open(path)
    with run.lock():
        config = run.config(overrides)
        experiment = assemble(config, model=model, loss=loss, tasks=tasks, algorithm=algorithm)
        run.write_config(experiment.config)
        _train(run, experiment)
    return run


@contextmanager
def executor_of(config: Config, problem: Problem, most: int) -> Generator[Executor]:
    """Those who compute shards, as the section ``scaling`` says."""
    if config.scaling.num_workers == 0:
        with InProcess(problem) as executor:
            yield executor
    else:
        from distmeta.distributed.ray import RayPool  # Ray is loaded by those only who use it

        with RayPool(problem, config.scaling, most) as executor:
            yield executor


def _train(run: RunFolder, experiment: Experiment) -> None:
    config, problem = experiment.config, experiment.problem
    outer = OuterLoop(config.outer, experiment.initial, problem.layout)
    initial = outer.vector()
    best: Best | None = None
    if checkpoint.steps(run.checkpoints):
        saved = run.checkpoint("last")
        outer.restore(saved.params, saved.tensors, saved.state["outer"])
        best = saved.state["best"]
    run.forget_after(outer.step)
    if problem.strategy == "vmap":
        _check_vectorised(problem, outer)
    shards = -(-config.train.meta_batch_size // config.train.shard_size)
    with (
        Progress(config, outer.step) as progress,
        executor_of(config, problem, max(shards, 1)) as executor,
        StopSignal() as stop,
        MetricsLog(run, outer.step) as log,
    ):
        best = _outer_loop(run, experiment, outer, executor, best, progress, log, stop)
        if stop.requested:
            raise Stopped(run, outer.step)
        summary = _summarise(run, experiment, executor, initial, log, progress)
    run.write_summary(summary)
    from distmeta.report import report  # matplotlib takes a second to load

    page = report([run], experiment=experiment)
    progress.say(f"run      {run.path}\npictures {page}")


def _outer_loop(
    run: RunFolder,
    experiment: Experiment,
    outer: OuterLoop,
    executor: Executor,
    best: Best | None,
    progress: Progress,
    log: MetricsLog,
    stop: StopSignal,
) -> Best | None:
    """Trains up to the last step; returns where validation was best."""
    config, problem = experiment.config, experiment.problem
    settings = config.train

    def shards(step: int):
        if step >= settings.steps:
            return []
        return shards_of("train", step, settings.meta_batch_size, settings.shard_size)

    def save() -> None:
        tensors, plain = outer.state()
        params = {name: parameter.data for name, parameter in outer.params.items()}
        state = {"outer": plain, "best": best, "seed": config.seed}
        checkpoint.save(run.checkpoints, outer.step, checkpoint.Checkpoint(params, tensors, state))
        checkpoint.prune(run.checkpoints, config.checkpoint.keep_last, best["step"] if best else None)

    while outer.step < settings.steps and not stop.requested:
        step, clock = outer.step, Clock()
        try:
            results = executor.map("meta_gradient", outer.vector(), shards(step), upcoming=shards(step + 1))
        except DistmetaError:
            save()  # what has been learned so far is not lost with the step that failed
            raise
        clock.lap("map")
        gradient = reduce_mean(results, settings.meta_batch_size)
        clock.lap("reduce")
        with reproducible(1, 0):
            record = outer.update(gradient)
        clock.lap("outer")
        means = {name: float(np.mean(values)) for name, values in gather(results).items()}
        final = outer.step == settings.steps
        if config.validation.every and outer.step % config.validation.every == 0:
            best = _validate(config, problem, outer, executor, best, progress, log)
            clock.lap("validation")
        is_best = best is not None and best["step"] == outer.step
        if outer.step % config.checkpoint.every == 0 or is_best or final or stop.requested:
            save()
            clock.lap("checkpoint")
        for part in ("sample", "adapt"):
            clock.seconds[part] = sum(result.seconds[part] for result in results)
        log.add(outer.step, settings.meta_batch_size, means | record, clock.seconds, executor.retries)
        if outer.step % settings.log_every == 0 or final or stop.requested:
            log.flush()
        progress.advance(outer.step, settings.meta_batch_size, means)
    return best


def _validate(
    config: Config,
    problem: Problem,
    outer: OuterLoop,
    executor: Executor,
    best: Best | None,
    progress: Progress,
    log: MetricsLog,
) -> Best | None:
    result = evaluate_tasks(
        executor, problem, outer.vector(), "val", config.validation.tasks, config.evaluation.shard_size
    )
    log.validation(outer.step, result)
    progress.say(f"step {outer.step}: validation {describe(result)}")
    if better(result, best["value"] if best else None):
        return {"step": outer.step, "metric": result["metric"], "value": result["after"]["mean"]}
    return best


def _summarise(
    run: RunFolder,
    experiment: Experiment,
    executor: Executor,
    initial: np.ndarray,
    log: MetricsLog,
    progress: Progress,
) -> dict[str, Any]:
    """Judges the best checkpoint on test tasks, beside what any learner must beat."""
    config, problem = experiment.config, experiment.problem
    summary: dict[str, Any] = {
        "config": config.name,
        "steps": config.train.steps,
        "seconds": log.total_seconds(),
        "tasks_per_second": log.tasks_per_second(),
        "versions": {name: version(name) for name in ("distmeta", "torch", "numpy", "ray")}
        | {"python": platform.python_version()},
    }
    tasks, shard_size = config.evaluation.tasks, config.evaluation.shard_size
    if not tasks:
        return summary
    saved = run.checkpoint("best")
    vector = problem.layout.pack(saved.params)
    test: Evaluation = evaluate_tasks(executor, problem, vector, "test", tasks, shard_size)
    summary |= {"checkpoint": saved.state["outer"]["step"], "test": test}
    progress.say(f"test on {tasks} unseen tasks (checkpoint of step {summary['checkpoint']})")
    progress.say(f"  meta-trained        {describe(test)}")
    if config.evaluation.baselines:
        untrained = evaluate_tasks(executor, problem, initial, "test", tasks, shard_size)
        summary["untrained"] = untrained
        progress.say(f"  untrained           {describe(untrained)}")
        neighbour = nearest_neighbour(executor, problem, vector, "test", tasks, shard_size)
        if neighbour is not None:
            summary["nearest_neighbour"] = neighbour
            progress.say(f"  nearest neighbour   accuracy {show('accuracy', neighbour)} on raw inputs")
    return summary


def _check_vectorised(problem: Problem, outer: OuterLoop) -> None:
    """Compares the two strategies on a few tasks, since vectorising is wrong for some layers of torch.

    Raises:
        ConfigError: They differ by more than rounding.
    """
    from distmeta.core.params import join, split

    tasks = problem.build(shards_of("train", 0, 2, 2)[0])
    meta = split({name: parameter.detach() for name, parameter in outer.params.items()})
    with reproducible(problem.threads, 0):
        both = join(problem.vectorised(meta, tasks, 0).gradient)
        one = join(problem.algorithm.meta_gradient(meta, tasks[1], problem.loss, step=0).gradient)
    for name, tensor in one.items():
        error = float((both[name][1] - tensor).norm() / (tensor.norm() + 1e-12))
        if error > 0.05:
            raise ConfigError(
                f"train.strategy: vmap gives another meta-gradient for {name} than the loop does (relative difference "
                f"{error:.1e}); set train.strategy=loop"
            )


class Clock:
    """Seconds of the parts of an outer step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Counts the time since the last lap to ``part``."""
        now = time.perf_counter()
        self.seconds[part] = now - self._last
        self._last = now


class StopSignal:
    """SIGINT and SIGTERM ask for a stop after the step at hand; a second SIGINT interrupts at once."""

    requested = False

    def __enter__(self) -> StopSignal:
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._stop)
        return self

    def _stop(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
