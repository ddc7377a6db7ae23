"""Meta-training: the outer loop as it is run, logged, checkpointed and resumed."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, TypedDict

import numpy as np
from torch import nn

from distmeta import checkpoint as storage
from distmeta.config import Config, load
from distmeta.core.loss import Criterion
from distmeta.core.types import TaskDistribution
from distmeta.distributed.executor import Executor, InProcess, MetaBatch, gather, reduce_mean
from distmeta.distributed.work import Problem, Shard, reproducible, shards_of
from distmeta.errors import ConfigError, DistmetaError, Stopped
from distmeta.evaluation import Evaluation, better, by_group, describe, evaluate_tasks, nearest_neighbour, show
from distmeta.experiment import Experiment, MetaAlgorithm, assemble, complete
from distmeta.metrics import MetricsLog
from distmeta.outer import OuterLoop, check_constants
from distmeta.progress import Progress
from distmeta.runs import MAY_CHANGE, RunFolder, covered, differences
from distmeta.stopping import StopSignal
from distmeta.strategy import settled

log = logging.getLogger("distmeta")


class Best(TypedDict):
    """Where validation was best so far."""

    step: int
    metric: str
    value: float


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
    settings = load(config, overrides)
    run = RunFolder.new(settings)
    # The folder is made only when nothing in the configuration can be wrong.
    with Training(assemble(settings, **given)) as training, run.lock():
        run.create(training.config)
        training.run(run)
    return run


def resume(
    path: str | Path,
    *overrides: str,
    checkpoint: str = "last",
    allow: Sequence[str] = (),
    model: nn.Module | None = None,
    loss: Criterion | None = None,
    tasks: TaskDistribution | None = None,
    algorithm: MetaAlgorithm | None = None,
) -> RunFolder:
    """Goes on with an interrupted run, to the bit as if it had not been interrupted.

    Args:
        path: The folder of the run, or its URL.
        overrides: ``"key.subkey=value"`` strings of keys that may change, such as ``scaling.num_workers=8``.
        checkpoint: Where to go on from: ``last``, ``best`` or a step. Later ones are removed.
        allow: Further keys or sections that ``overrides`` may change, although the parameters are then those of neither
            configuration alone. What has changed is kept in ``metrics.jsonl``.
        model, loss, tasks, algorithm: The Python objects that the run was started with, if any.

    Raises:
        DistmetaError: See `distmeta.errors`.
        Stopped: SIGINT or SIGTERM came; the run can be resumed again.
    """
    run = RunFolder.open(path)
    with run.lock():
        config = run.config(overrides, allow=allow)
        changed = differences(complete(run.config()), complete(config)) if overrides else {}
        for key, (old, new) in changed.items():
            log.info("%s: %s → %s", key, old, new)
        counting = {key: both for key, both in changed.items() if not covered(key, MAY_CHANGE)}
        # Read before a cluster is waited for: it may be damaged.
        begun = storage.steps(run.checkpoints) or checkpoint not in ("last", "best")
        saved = run.checkpoint(checkpoint) if begun else None
        experiment = assemble(config, model=model, loss=loss, tasks=tasks, algorithm=algorithm)
        with Training(experiment) as training:
            training.restore(run, saved)
            run.write_config(training.config)
            if counting and training.outer.step:
                log.warning("from step %d on the parameters are those of neither configuration", training.outer.step)
                run.add_record({"kind": "change", "step": training.outer.step, "changed": counting})
            training.run(run)
    return run


@contextmanager
def executor_of(config: Config, problem: Problem, most: int) -> Generator[Executor]:
    """Those who compute shards, as the section ``scaling`` says."""
    if config.scaling.num_workers == 0:
        with InProcess(problem) as executor:
            yield executor
    else:
        from distmeta.distributed.ray import RayPool  # Ray is loaded by those only who use it

        with RayPool(problem, config.scaling, most, config.name or "run") as executor:
            yield executor


class Training:
    """One meta-training in progress: the outer loop, and those who compute its shards.

    Raises:
        ConfigError: The outer optimizer refuses its settings, or the tasks cannot be vectorised (`distmeta.strategy`).
        ResourceError: The cluster cannot give the workers what they need.
    """

    def __init__(self, experiment: Experiment) -> None:
        experiment = settled(experiment)
        self.config, self.problem, self._experiment = experiment.config, experiment.problem, experiment
        self.outer = OuterLoop(self.config.outer, experiment.initial, self.problem.layout)
        self.initial = self.outer.vector()
        self.best: Best | None = None
        self._due = False  # whether the state at hand is to be validated yet
        self._saved: int | None = None
        self._saving = 0.0  # seconds that checkpoints have held up since the last record, which stands before them

    def __enter__(self) -> Self:
        if self.problem.strategy == "compiled":
            log.info("the first step waits for the compiler, for some seconds or minutes")
        self._stack = ExitStack()
        self.executor = self._stack.enter_context(executor_of(self.config, self.problem, len(self._shards(0))))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def restore(self, run: RunFolder, saved: storage.Checkpoint | None) -> None:
        """Goes back to a checkpoint of ``run``, or without one to the start, and drops what came after it."""
        if saved is not None:
            check_constants(saved.state["constants"], self.problem)
            self.outer.restore(saved.params, saved.tensors, saved.state["outer"])
            self.best, self._due = saved.state["best"], saved.state.get("due", False)
        if self.outer.step > self.config.train.steps:
            raise ConfigError(
                f"train.steps={self.config.train.steps} is less than the {self.outer.step} steps that are done; "
                f"--checkpoint goes back to one of {', '.join(map(str, storage.steps(run.checkpoints)))}"
            )
        for step in storage.steps(run.checkpoints):
            if step > self.outer.step:
                storage.remove(run.checkpoints, step)
        run.forget_after(self.outer.step, validation=self._due)
        if self.config.outer.schedule and run.config().train.steps != self.config.train.steps:
            log.warning(
                "outer.schedule keeps its arguments, although train.steps is %d now: %s",
                self.config.train.steps,
                self.config.outer.schedule.model_dump(),
            )

    def run(self, run: RunFolder) -> None:
        """Trains to the end, then judges the result and writes summary and report.

        Raises:
            Stopped: A signal asked for it.
        """
        with (
            Progress(self.config, self.outer.step) as progress,
            StopSignal() as stop,
            MetricsLog(run, self.outer.step) as metrics,
        ):
            self._fit(run, metrics, progress, stop)
            stop.at_once = True  # all is saved; the judgement can be repeated
            run.write_summary(self._summary(run, metrics, progress))
        from distmeta.report import report  # matplotlib takes a second to load

        page = report([run], experiment=self._experiment)
        progress.say(f"run      {run.address}\npictures {page}")

    def fit(self, run: RunFolder, on_validation: Callable[[int, Evaluation], None]) -> None:
        """Trains to the end, and calls ``on_validation`` with each step that is validated, once it is saved."""
        with (
            Progress(self.config, self.outer.step) as progress,
            StopSignal() as stop,
            MetricsLog(run, self.outer.step) as metrics,
        ):
            self._fit(run, metrics, progress, stop, on_validation)

    def _fit(
        self,
        run: RunFolder,
        metrics: MetricsLog,
        progress: Progress,
        stop: StopSignal,
        on_validation: Callable[[int, Evaluation], None] | None = None,
    ) -> None:
        with storage.Writer() as self._writer:
            if self._due:  # the validation failed, behind which the run was to go on
                evaluation = self._validate(metrics, progress)
                storage.amend(run.checkpoints, self.outer.step, {"best": self.best, "due": False})
                if on_validation is not None:
                    on_validation(self.outer.step, evaluation)
            while self.outer.step < self.config.train.steps and not stop.requested:
                evaluation = self._step(run, metrics, progress)
                if evaluation is not None and on_validation is not None:
                    self._save(run, metrics)
                    self._writer.wait()
                    on_validation(self.outer.step, evaluation)
            self._save(run, metrics)
        if stop.requested:
            raise Stopped(f"stopped after step {self.outer.step}; `distmeta resume {run.address}` goes on from there")

    def _shards(self, step: int) -> list[Shard]:
        settings = self.config.train
        return shards_of("train", step, settings.meta_batch_size, settings.shard_size)

    def _step(self, run: RunFolder, metrics: MetricsLog, progress: Progress) -> Evaluation | None:
        """One outer step, and what falls due after it: the evaluation, if that is a validation."""
        config, outer, settings, clock = self.config, self.outer, self.config.train, Clock()
        upcoming = self._shards(outer.step + 1) if outer.step + 1 < settings.steps else []
        self._writer.check()
        run.check()
        try:
            theta, shards = outer.taken_at(), self._shards(outer.step)
            ahead = outer.vector() if outer.stale and upcoming else None
            results = self.executor.map("meta_gradient", theta, shards, upcoming, ahead=ahead)
            clock.lap("map")
            gradient = reduce_mean(results)
            clock.lap("reduce")
            batch = MetaBatch(self.executor, theta, shards)
            with reproducible(1, 0):
                record = outer.update(gradient, batch)
            clock.lap("outer")
        except DistmetaError:
            if outer.sound():
                self._save(run, metrics)  # what has been learned so far is not lost with the step that failed
            raise
        skipped = {index: why for result in results for index, why in result.skipped.items()}
        for index, reason in (batch.skipped | skipped).items():
            log.warning("task %d of step %d is skipped: %s", index, outer.step - 1, reason)
            metrics.skip(outer.step - 1, index, reason)
        values = gather(results)
        means = {name: float(np.mean(of_tasks)) for name, of_tasks in values.items()}
        groups = by_group(values, self.problem.groups(shards, skipped))
        for name, own in groups.items():
            metrics.group(name, own)
        for part in {part: None for result in results for part in result.seconds}:
            clock.seconds[part] = sum(result.seconds.get(part, 0.0) for result in results)
        clock.seconds["checkpoint"], self._saving = self._saving, 0.0
        lost = self.executor.retries, self.executor.duplicates
        metrics.add(outer.step, settings.meta_batch_size - len(skipped), means | record, clock.seconds, *lost)
        evaluation = None
        if config.validation.every and outer.step % config.validation.every == 0:
            self._due = True
            try:
                evaluation = self._validate(metrics, progress)
            except DistmetaError:
                self._save(run, metrics)  # what has been learned is not lost with the validation that failed
                raise
        is_best = self.best is not None and self.best["step"] == outer.step
        if is_best or outer.step % config.checkpoint.every == 0:
            self._save(run, metrics)
        elif outer.step % settings.log_every == 0:
            metrics.flush()
        shown = next(name for name in (self.problem.metric, "accuracy", "loss") if name in means)
        told = {name: float(np.mean(own[shown])) for name, own in groups.items()}
        progress.advance(outer.step, settings.meta_batch_size, means, told)
        return evaluation

    def _save(self, run: RunFolder, metrics: MetricsLog) -> None:
        """Begins to write a checkpoint of the state at hand, after the metrics up to there, if there is none yet."""
        if self._saved == self.outer.step:
            return
        clock = Clock()
        metrics.flush()
        tensors, plain = self.outer.state()
        params = {name: parameter.data for name, parameter in self.outer.params.items()}
        constants = self.problem.loss.constants()
        state = {"outer": plain, "best": self.best, "constants": constants, "due": self._due}
        saved = storage.Checkpoint(params, tensors, state)
        self._writer.save(run.checkpoints, self.outer.step, saved, self.config.checkpoint.keep_last)
        self._saved = self.outer.step
        clock.lap("checkpoint")
        self._saving += clock.seconds["checkpoint"]

    def _validate(self, metrics: MetricsLog, progress: Progress) -> Evaluation:
        tasks, shard_size, clock = self.config.validation.tasks, self.config.evaluation.shard_size, Clock()
        result = evaluate_tasks(self.executor, self.problem, self.outer.vector(), "val", tasks, shard_size)
        metrics.validation(self.outer.step, result)
        progress.say(f"step {self.outer.step}: validation {describe(result)}")
        if better(result, self.best["value"] if self.best else None):
            value = result["after"]["mean"]
            self.best = {"step": self.outer.step, "metric": result["metric"], "value": value}
        self._due = False
        clock.lap("validation")
        metrics.spent("validation", clock.seconds["validation"])
        return result

    def _summary(self, run: RunFolder, metrics: MetricsLog, progress: Progress) -> dict[str, Any]:
        """Judges the best checkpoint on test tasks, beside what any learner must beat."""
        config, problem, executor = self.config, self.problem, self.executor
        summary: dict[str, Any] = {
            "config": config.name,
            "steps": config.train.steps,
            "seconds": metrics.total_seconds(),
            "tasks_per_second": metrics.tasks_per_second(),
            "versions": {name: version(name) for name in ("distmeta", "torch", "numba", "numpy", "ray")}
            | {"python": platform.python_version()},
        }
        tasks, shard_size = config.evaluation.tasks, config.evaluation.shard_size
        if not tasks:
            return summary
        saved = run.checkpoint("best")
        vector = problem.layout.pack(saved.params)
        test: Evaluation = evaluate_tasks(executor, problem, vector, "test", tasks, shard_size)
        summary |= {"checkpoint": saved.state["outer"]["step"], "test": test}
        every, steps = config.validation.every, config.train.steps
        after = (
            f"; none after step {steps - steps % every} was validated" if self.best and every and steps % every else ""
        )
        progress.say(f"test on {tasks} unseen tasks (checkpoint of step {summary['checkpoint']}{after})")
        progress.say(f"  meta-trained        {describe(test)}")
        if config.evaluation.baselines:
            untrained = evaluate_tasks(executor, problem, self.initial, "test", tasks, shard_size)
            summary["untrained"] = untrained
            progress.say(f"  untrained           {describe(untrained)}")
            neighbour = nearest_neighbour(executor, problem, vector, "test", tasks, shard_size)
            if neighbour is not None:
                summary["nearest_neighbour"] = neighbour
                progress.say(f"  nearest neighbour   accuracy {show('accuracy', neighbour)} on raw inputs")
        return summary


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
