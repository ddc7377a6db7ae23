"""Using a trained run: fast adaptation to a new task, and evaluation on unseen ones."""

from __future__ import annotations

import copy
import csv
import io
import json
from dataclasses import replace
from math import isfinite
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from distmeta import checkpoint as storage
from distmeta.config import Config
from distmeta.core.loss import Criterion, predict_alone, uses_batch_statistics
from distmeta.core.params import split
from distmeta.core.policy import PolicyLoss
from distmeta.core.scope import SCORES, Scope
from distmeta.core.seeds import stream
from distmeta.core.types import Batch, Episode, OpenSet, Params, Split, TaskDistribution, check_batch
from distmeta.distributed.work import Problem, Shard, named, reproducible
from distmeta.errors import ConfigError, NumericalError, RunError
from distmeta.evaluation import Evaluation, evaluate_scope, evaluate_tasks
from distmeta.experiment import Experiment, MetaAlgorithm, assemble, build_part, complete, of_ways, widened
from distmeta.outer import check_constants, check_same
from distmeta.runs import RunFolder, storage_errors
from distmeta.tasks.control import ControlTask
from distmeta.tasks.own import OUT_OF_SCOPE, OwnClasses, OwnTask, Predictions, ReadsOwnTasks
from distmeta.training import executor_of


class Adapted:
    """A model adapted to one task.

    Args:
        module: The adapted network, in evaluation mode.
        support: The inputs that it was adapted on.
        classes: How many of the outputs are classes of the task; None: all.
    """

    def __init__(self, module: nn.Module, support: tuple[Tensor, ...], classes: int | None = None) -> None:
        self.module = module
        self._support, self._classes = support, classes
        self._alone = not uses_batch_statistics(module)

    @torch.no_grad()
    def predict(self, *inputs: Tensor) -> Tensor:
        """The network's outputs for ``inputs``, the first axis of which counts examples; of the task's own classes.

        Where the network normalises by batch statistics, each example is predicted in one batch with the support set
        (inductively): a prediction then does not depend on which other examples are asked for beside it.
        """
        if self._alone:
            return self.module(*inputs)[..., : self._classes]
        return predict_alone(self.module, self._support, inputs)[..., : self._classes]


def restore(run: RunFolder, experiment: Experiment, which: str) -> Params:
    """The meta-parameters of a checkpoint under their joined names, for as many classes as the experiment is.

    Raises:
        CheckpointError: It is missing or damaged, or does not fit the experiment's model.
    """
    saved = run.checkpoint(which)
    layout, head, params = experiment.problem.layout, experiment.problem.algorithm.task_head, saved.params
    if head is not None:
        params = widened(params, head, len(experiment.initial[f"model.{head}.weight"]))
    check_same(params, dict(zip(layout.names, layout.shapes, strict=True)))
    check_constants(saved.state["constants"], experiment.problem)
    return params


def adapt(
    run: RunFolder | str | Path,
    support: Batch,
    *,
    checkpoint: str = "best",
    model: nn.Module | None = None,
    loss: Criterion | None = None,
    tasks: TaskDistribution | None = None,
    algorithm: MetaAlgorithm | None = None,
) -> Adapted:
    """Adapts a meta-trained model to a new task.

    Args:
        run: A run, or its folder.
        support: Inputs and, last, targets of the new task; classes are numbered from 0, and may be more than in
            training where the algorithm makes the head from the support set (protomaml, r2d2).
        checkpoint: ``best`` by validation, ``last``, or a step.
        model, loss, tasks, algorithm: The Python objects that the run was started with, if any.

    Raises:
        DistmetaError: See `distmeta.errors`.
    """
    run = run if isinstance(run, RunFolder) else RunFolder.open(run)
    experiment = assemble(run.config(), model=model, loss=loss, tasks=tasks, algorithm=algorithm, prepare=())
    return _adapt(run, experiment, checkpoint, support, "the support set has")


def _adapt(run: RunFolder, experiment: Experiment, checkpoint: str, support: Batch, whose: str) -> Adapted:
    check_batch(support, "the support set")
    labels = support[-1]
    if experiment.outputs is not None or experiment.problem.algorithm.task_head is not None:  # it classifies
        if labels.numel() and int(labels.min()) < 0:
            raise ConfigError(f"the support set has the label {int(labels.min())}: classes are numbered from 0")
        experiment = of_ways(experiment, 1 + int(labels.max()) if labels.numel() else 0, whose)
        experiment = replace(experiment, problem=replace(experiment.problem, variable_ways=True))
    problem, params = experiment.problem, restore(run, experiment, checkpoint)
    module = copy.deepcopy(problem.loss.module).eval()
    problem.loss.module.eval()
    task = Episode(support, support)
    loss = problem.loss_of(task)
    with reproducible(problem.threads, 0), named("adapting to the support set"):
        adapted = problem.algorithm.adapt(split(params), task, loss)
    for name, tensor in adapted.items():
        if not tensor.isfinite().all():
            sound = all(part.isfinite().all() for part in support)
            why = "lower algorithm.inner_lr, by which the run was trained" if sound else "nor is the support set"
            raise NumericalError(f"{name} is not finite after adaptation to the support set: {why}")
    module.load_state_dict(adapted, strict=False)
    return Adapted(module, support[:-1], getattr(loss, "classes", None))


def evaluate(
    run: RunFolder | str | Path,
    *overrides: str,
    episodes: int | None = None,
    checkpoint: str = "best",
    out_of_scope: float | None = None,
    model: nn.Module | None = None,
    loss: Criterion | None = None,
    tasks: TaskDistribution | None = None,
    algorithm: MetaAlgorithm | None = None,
) -> Evaluation:
    """Judges a run by unseen test tasks, the same ones each time, before adaptation and after each inner step.

    Args:
        run: A run, or its folder.
        overrides: ``"key.subkey=value"`` strings of keys that may change, such as ``scaling.num_workers=8``,
            ``tasks.shots=5`` or ``algorithm.test_inner_steps=20``.
        episodes: Number of tasks; None for the configuration's ``evaluation.tasks``.
        checkpoint: ``best`` by validation, ``last``, or a step.
        out_of_scope: The share of in-scope queries that is to be kept when those out of scope are rejected, by a
            threshold that validation tasks choose; None: do not judge that.
        model, loss, tasks, algorithm: The Python objects that the run was started with, if any.

    Returns:
        See `distmeta.evaluation.evaluate_tasks`; ``out_of_scope`` is what `distmeta.evaluation.evaluate_scope` gives.

    Raises:
        DistmetaError: See `distmeta.errors`.
    """
    run = run if isinstance(run, RunFolder) else RunFolder.open(run)
    settings = run.config(overrides, may_change=("scaling", "evaluation", "data_root", "tasks", "algorithm.test_"))
    outputs = None  # the model stays the one that was trained, whatever the tasks
    if tasks is None and any(override.startswith("tasks.") for override in overrides):
        outputs = getattr(getattr(build_part(complete(run.config()), "tasks"), "spec", None), "outputs", None)
    drawn: tuple[Split, ...] = ("test",) if out_of_scope is None else ("val", "test")
    experiment = assemble(
        settings, model=model, loss=loss, tasks=tasks, algorithm=algorithm, outputs=outputs, prepare=drawn
    )
    config, problem = experiment.config, experiment.problem
    count = config.evaluation.tasks if episodes is None else episodes
    if count < 2:
        raise ConfigError(f"episodes must be at least 2, for there to be an interval; given: {count}")
    if out_of_scope is not None:
        _check_scope(problem, config, out_of_scope)
    vector, size = problem.layout.pack(restore(run, experiment, checkpoint)), config.evaluation.shard_size
    with executor_of(config, problem, -(-count // size)) as executor:
        evaluation = evaluate_tasks(executor, problem, vector, "test", count, size)
        if out_of_scope is not None:
            evaluation["out_of_scope"] = evaluate_scope(
                executor, vector, out_of_scope, count, config.validation.tasks, size
            )
    return evaluation


def _check_scope(problem: Problem, config: Config, recall: float) -> None:
    if not 0 < recall <= 1:
        raise ConfigError(
            f"--out-of-scope is the share of in-scope queries to keep, more than 0 and 1 at most; given: {recall}"
        )
    if not isinstance(problem.tasks, OpenSet):
        raise ConfigError(
            f"{config.tasks.use} has no examples out of scope of its classes; clinc150 has, and text with "
            "tasks.out_of_scope=LABEL"
        )
    problem.tasks.outside(stream(0), "test")  # raises where there are none


def adapt_files(
    run: RunFolder, support: Path, query: Path, out: Path, *, checkpoint: str = "best", scope: Scope | None = None
) -> Predictions:
    """Adapts to a user's own task, read from files, and predicts.

    Args:
        run: A run on tasks that can be read from files (images, texts, pairs of sentences).
        support: What is adapted to; the tasks say in which form (see their ``own_task``).
        query: What is asked for, with or without the truth.
        out: A new folder for ``predictions.csv``, ``adapted.safetensors`` (the adapted weights) and, for classes,
            ``classes.json`` (the class of each output).
        checkpoint: ``best`` by validation, ``last``, or a step.
        scope: What is taken as a query of none of the classes; None: nothing.

    Raises:
        DistmetaError: See `distmeta.errors`.
    """
    refuse_used(out)
    experiment = assemble(run.config(), prepare=())
    tasks = experiment.problem.tasks
    if not isinstance(tasks, ReadsOwnTasks):
        raise ConfigError(
            f"{run.address} was trained on {experiment.config.tasks.use}, which reads no tasks from files; use "
            "distmeta.adapt in Python"
        )
    own = tasks.own_task(support, query)
    if scope is not None:
        own = _within(own, scope, run)
    adapted = _adapt(run, experiment, checkpoint, own.support, f"{support} holds")
    predictions = own.predictions(adapted.predict)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(predictions.columns)
    writer.writerows(predictions.rows)
    params = {name: tensor.detach() for name, tensor in adapted.module.named_parameters()}
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        storage.write_durably(out / "predictions.csv", text.getvalue().encode())
        storage.write_durably(out / "adapted.safetensors", safetensors.torch.save(params))
        if own.classes:
            storage.write_durably(out / "classes.json", json.dumps(own.classes, ensure_ascii=False).encode())
    return predictions


def scope_of(score: str | None, threshold: float | None) -> Scope | None:
    """What ``--score`` and ``--out-of-scope`` of the command line mean; None for neither.

    Raises:
        ConfigError: The score is not known, the threshold is no number, or one is given without the other.
    """
    if threshold is None:
        if score is not None:
            raise ConfigError(f"--score {score} says what --out-of-scope is compared with; give that as well")
        return None
    if not isfinite(threshold):
        raise ConfigError(f"--out-of-scope must be a finite number; given: {threshold}")
    for known in SCORES:
        if score in (None, known):
            return Scope(known, threshold)
    raise ConfigError(f"--score is {score!r}; it must be {' or '.join(SCORES)}")


def _within(own: OwnTask, scope: Scope, run: RunFolder) -> OwnClasses:
    """The task with the scope that its queries may be out of."""
    if not isinstance(own, OwnClasses):
        raise ConfigError(f"--out-of-scope is for a run that tells classes apart, which {run.address} does not")
    if OUT_OF_SCOPE in own.classes:
        raise ConfigError(f"--out-of-scope: a class of the support set is called {OUT_OF_SCOPE!r} itself; rename it")
    return replace(own, scope=scope)


def adapt_policy(
    run: RunFolder, number: int, out: Path, *, checkpoint: str = "best", film: bool = False
) -> list[dict[str, float]]:
    """Adapts a policy to one of the unseen test tasks of a run on control.

    Args:
        run: The run.
        number: Which of the test tasks, from 0; those that the run is evaluated on come first.
        out: A new folder for ``adapted.safetensors`` (the adapted policy), ``rollouts.safetensors`` (the episodes
            sampled before adaptation and after each inner step, see `distmeta.core.policy.Rollouts`), ``paths.png``
            where observations hold a position, and with ``film`` an episode as ``before.gif`` and ``after.gif``.
        checkpoint: ``best`` by validation, ``last``, or a step.

    Returns:
        The mean scores before adaptation and after each inner step.

    Raises:
        DistmetaError: See `distmeta.errors`.
    """
    refuse_used(out)
    experiment = assemble(run.config())
    problem = experiment.problem
    meta = split(restore(run, experiment, checkpoint))
    (task,) = problem.build(Shard("test", 0, number, 1))
    if not isinstance(task, ControlTask) or not isinstance(problem.loss, PolicyLoss):
        raise ConfigError(
            f"{run.address} was trained on {experiment.config.tasks.use}, which is no control; give --support and "
            "--query, or use distmeta.adapt in Python"
        )
    problem.loss.module.eval()
    from distmeta import paths  # and with it matplotlib, which no worker needs

    path = paths.follow(problem, meta, task)
    sampled = [data for _, data in path]
    films = {name: task.film(data) for name, data in (("before", sampled[0]), ("after", sampled[-1]))} if film else {}
    tensors = {f"{k}.{name}": tensor for k, data in enumerate(sampled) for name, tensor in data._asdict().items()}
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        storage.write_durably(out / "adapted.safetensors", safetensors.torch.save(path[-1][0]))
        storage.write_durably(out / "rollouts.safetensors", safetensors.torch.save(tensors))
        for name, frames in films.items():
            first, *others = [Image.fromarray(frame) for frame in frames]
            first.save(out / f"{name}.gif", save_all=True, append_images=others, duration=40, loop=0)
        if task.tasks.position(sampled[0].observation_ETO.numpy()) is not None:
            paths.draw(paths.of(task, sampled)).savefig(out / "paths.png", dpi=120)
    return [{name: float(value) for name, value in problem.loss.scores(data).items()} for data in sampled]


def refuse_used(out: Path) -> None:
    """Raises `RunError` unless ``out`` is new or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already; choose another folder with --out")
