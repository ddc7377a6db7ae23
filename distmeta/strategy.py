"""How the tasks of a shard are computed (``train.strategy``): whether it is right, and which way is fastest."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import statistics
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from distmeta.config import Config
from distmeta.core.params import join, split
from distmeta.distributed.compiled import check_phases
from distmeta.distributed.hardware import hardware
from distmeta.distributed.passes import vectorise
from distmeta.distributed.work import Problem, Shard, Strategy, named, reproducible, shards_of
from distmeta.errors import ConfigError, DistmetaError, StorageError, one_line
from distmeta.experiment import Experiment, of_objects
from distmeta.tasks.files import atomic_write, cache_dir

log = logging.getLogger("distmeta")

STRATEGIES: tuple[Strategy, ...] = ("loop", "vmap", "compiled")  # the simplest first
REPEATS, ENOUGH = 3, 2.0  # times that a shard is computed for its time, unless so many seconds have gone before
MARGIN = 1.2  # how many times as fast a strategy must be to take the place of a simpler one
SMALL = 2.0  # times as fast as the loop that vmap must be: else the time goes where no compiler saves any
LONG = 60.0  # seconds of training below which nobody wants to wait for a compiler


class Timing(NamedTuple):
    """What a trial has shown of a strategy."""

    start: float
    """Seconds that the first shard takes longer than others, for a compiler."""
    shard: float
    """Seconds of a shard."""
    fails: str = ""
    """Why it cannot be used, if it cannot."""

    def __str__(self) -> str:
        late = f" after {self.start:.0f} s" if self.start >= 1 else ""
        return f"{1000 * self.shard:.3g} ms{late}"

    def whole(self, shards: int) -> float:
        """Seconds of a training with so many shards, one after the other."""
        return float("inf") if self.fails else self.start + shards * self.shard


def settled(experiment: Experiment) -> Experiment:
    """The experiment with a strategy that is right for it; where ``auto`` stands, with the fastest.

    From here on the configuration names the strategy, so that whoever goes on with the run, with any workers, takes the
    same.

    Raises:
        ConfigError: Vectorising, where it is asked for, is wrong for the model, or impossible.
    """
    config = experiment.config
    strategy = config.train.strategy
    if strategy == "auto":
        strategy = choose(experiment)
    elif strategy != "loop":
        check_vectorised(experiment, strategy)
    elif experiment.problem.device == "cuda":
        log.info(
            "train.strategy: loop computes one task after the other, which leaves a GPU idle most of the time; try "
            "compiled, vmap or auto, with dozens of tasks in train.shard_size"
        )
    train = config.train.model_copy(update={"strategy": strategy})
    config = config.model_copy(update={"train": train})
    return replace(experiment, config=config, problem=replace(experiment.problem, strategy=strategy))


def check_vectorised(experiment: Experiment, strategy: Strategy) -> None:
    """Compares the meta-gradient of a task as the loop computes it with the vectorised one, which ``strategy`` takes.

    Vectorising is wrong for some layers of torch, and impossible for others.

    Raises:
        ConfigError: They differ by more than rounding, or the task cannot be vectorised.
        WorkerError: The task, the model or the loss raised in the loop as well.
    """
    loss = copy.copy(experiment.problem.loss)
    loss.precision = "float32"  # in which both are equal; what rounding makes of either is no fault of theirs
    # what is compiled is compared where it is compiled
    problem = replace(experiment.problem, strategy="vmap", loss=loss)
    first = _shards(experiment.config)[0]
    tasks = problem.build(first)[:2]
    meta = split({name: parameter.detach() for name, parameter in experiment.initial.items()})
    loop = lambda: problem.algorithm.meta_gradient(meta, tasks[0], problem.loss_of(tasks[0]), step=0)  # noqa: E731
    problem.loss.module.eval()  # dropout would draw other masks
    with reproducible(problem.threads, 0):
        try:
            both = join(vectorise(problem, meta, tasks, 0).gradient)
            if experiment.problem.loss.precision != loss.precision:
                vectorise(replace(problem, loss=experiment.problem.loss), meta, tasks, 0)
        except DistmetaError:
            raise
        except Exception as error:
            with named(f"the meta-gradient of {problem.name(first, first.first)}"):
                loop()
            precision = experiment.problem.loss.precision
            rounded = "" if precision == loss.precision else f" in {precision}"
            raise ConfigError(
                f"train.strategy: {strategy} cannot be used, since these tasks or this model cannot be vectorised"
                f"{rounded} ({type(error).__name__}: {one_line(error)}); set train.strategy=loop"
            ) from error
        one = join(loop().gradient)
    problem.loss.module.train()
    difference = problem.layout.pack({name: both[name][0] - tensor for name, tensor in one.items()})
    error = float(np.linalg.norm(difference) / (np.linalg.norm(problem.layout.pack(one)) + 1e-12))
    if error > 1e-2:
        raise ConfigError(
            f"train.strategy: {strategy} gives another meta-gradient than the loop does (relative difference "
            f"{error:.1e}); set train.strategy=loop"
        )


def choose(experiment: Experiment) -> Strategy:
    """The strategy with which the whole training takes the least time, by a trial of its first shard in this process.

    The trial is kept in the cache, and a simpler strategy stays unless another is `MARGIN` times as fast. How many
    workers there are makes no difference.

    Raises:
        ConfigError: The workers have GPUs, and this process has none.
        DistmetaError: The loop fails: so would the run.
    """
    config, problem = experiment.config, replace(experiment.problem, strategy="loop")
    if problem.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "train.strategy: auto tries the strategies in this process, where torch sees no GPU as scaling.use_gpu "
            "asks for: set loop, vmap or compiled"
        )
    shards = _shards(config)
    try:
        check_vectorised(experiment, "vmap")
    except ConfigError as error:
        log.info("train.strategy: loop; vmap and compiled are left out: %s", error)
        return "loop"
    kept = _kept_at(experiment)
    timings = _read(kept)
    known = set(timings)
    vector = problem.layout.pack(experiment.initial)
    chosen: Strategy = "loop"
    told: list[str] = []
    seconds = lambda name: timings[name].whole(config.train.steps * len(shards))  # noqa: E731
    for name in STRATEGIES:
        reason = _in_vain(experiment, seconds("loop"), seconds("vmap")) if name == "compiled" else ""
        if not reason:
            if name not in timings:
                if name == "compiled":
                    log.info("train.strategy: auto tries the compiler, for some seconds or minutes")
                timings[name] = _measure(replace(problem, strategy=name), vector, shards[0])
            reason = timings[name].fails
            if MARGIN * seconds(name) < seconds(chosen):
                chosen = name
        told.append(f"{name} is left out: {reason}" if reason else f"{name} takes {timings[name]}")
    where = "not kept, for parts that are Python objects" if kept is None else f"kept in {kept}"
    if kept is not None and set(timings) != known:
        _write(kept, experiment, timings)
    log.info("train.strategy: %s, by a trial of %d tasks: %s (%s)", chosen, shards[0].size, "; ".join(told), where)
    return chosen


def _shards(config: Config) -> list[Shard]:
    """Those of the first outer step."""
    return shards_of("train", 0, config.train.meta_batch_size, config.train.shard_size)


def _in_vain(experiment: Experiment, loop: float, vmap: float) -> str:
    """Why there is no point in trying the compiler, if there is none; the training takes so many seconds without it."""
    if SMALL * vmap > loop:
        return f"it pays where vmap is at least {SMALL:g} times as fast as loop"
    if vmap < LONG:
        return f"a training of {vmap:.0f} s is too short for a compiler"
    try:
        check_phases(experiment.problem.algorithm, experiment.config.train.steps)
    except ConfigError as error:
        return str(error)
    return ""


def _measure(problem: Problem, vector: np.ndarray, shard: Shard) -> Timing:
    """Computes a shard several times."""
    tasks = problem.build(shard)

    def seconds() -> float:
        start = time.perf_counter()
        problem.run("meta_gradient", vector, shard, tasks)
        return time.perf_counter() - start

    try:
        first = seconds()
        others: list[float] = []
        while len(others) < REPEATS and sum(others) < ENOUGH:
            others.append(seconds())
    except DistmetaError as error:
        if problem.strategy == "loop":
            raise
        return Timing(0.0, 0.0, one_line(error))
    usual = statistics.median(others)
    return Timing(max(first - usual, 0.0), usual)


def _kept_at(experiment: Experiment) -> Path | None:
    """The file of the trial of equal work on equal hardware; None where nobody knows what is equal."""
    return None if of_objects(experiment.config) else cache_dir() / "strategies" / f"{_digest(experiment)}.json"


def _digest(experiment: Experiment) -> str:
    text = json.dumps(_work(experiment), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _work(experiment: Experiment) -> dict[str, object]:
    """All that a trial's times depend on."""
    config, problem = experiment.config, experiment.problem
    parts = config.model_dump(mode="json", include={"tasks", "model", "loss", "algorithm"})
    return parts | {
        "shard_size": _shards(config)[0].size,
        "precision": config.train.precision,
        "threads": problem.threads,
        "hardware": hardware(problem.device),
        "distmeta": version("distmeta"),
    }


def _read(path: Path | None) -> dict[str, Timing]:
    if path is None or not path.exists():
        return {}
    try:
        return {name: Timing(**timing) for name, timing in json.loads(path.read_text())["timings"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%s): the strategies are tried again", path, one_line(error))
        return {}


def _write(path: Path, experiment: Experiment, timings: dict[str, Timing]) -> None:
    kept = {"work": _work(experiment), "timings": {name: timing._asdict() for name, timing in timings.items()}}
    try:
        with atomic_write(path) as file:
            file.write(json.dumps(kept, indent=2).encode())
    except StorageError as error:
        log.warning("the trial of strategies is not kept: %s", error)
