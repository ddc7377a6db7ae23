"""Using a trained run: fast adaptation to a new task, and evaluation on unseen ones."""

from __future__ import annotations

import copy
import csv
import io
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from distmeta import checkpoint as storage
from distmeta.core.loss import Criterion, uses_batch_statistics
from distmeta.core.params import split
from distmeta.core.types import Batch, Episode, Params, TaskDistribution
from distmeta.distributed.work import reproducible
from distmeta.errors import ConfigError, RunError
from distmeta.evaluation import Evaluation, evaluate_tasks
from distmeta.experiment import Experiment, MetaAlgorithm, assemble
from distmeta.outer import check_constants, check_same
from distmeta.runs import RunFolder, storage_errors
from distmeta.tasks.images import FewShotImages
from distmeta.tasks.pictures import folder_of_classes, folder_of_images
from distmeta.training import executor_of


class Adapted:
    """A model adapted to one task.

    Args:
        module: The adapted network, in evaluation mode.
        support: The inputs that it was adapted on.
    """

    def __init__(self, module: nn.Module, support: tuple[Tensor, ...]) -> None:
        self.module = module
        self._support = support
        self._alone = not uses_batch_statistics(module)

    @torch.no_grad()
    def predict(self, *inputs: Tensor) -> Tensor:
        """The network's outputs for ``inputs``, the first axis of which counts examples.

        Where the network normalises by batch statistics, each example is predicted in one batch with the support set
        (inductively): a prediction then does not depend on which other examples are asked for beside it.
        """
        if self._alone:
            return self.module(*inputs)
        rows = [
            self.module(*(torch.cat([s, x[i : i + 1]]) for s, x in zip(self._support, inputs, strict=True)))[-1]
            for i in range(len(inputs[0]))
        ]
        return torch.stack(rows)


def restore(run: RunFolder, experiment: Experiment, which: str) -> Params:
    """The meta-parameters of a checkpoint under their joined names.

    Raises:
        CheckpointError: It is missing or damaged, or does not fit the experiment's model.
    """
    saved = run.checkpoint(which)
    layout = experiment.problem.layout
    check_same(saved.params, dict(zip(layout.names, layout.shapes, strict=True)))
    check_constants(saved.state["constants"], experiment.problem)
    return saved.params


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
        support: Inputs and, last, targets of the new task.
        checkpoint: ``best`` by validation, ``last``, or a step.
        model, loss, tasks, algorithm: The Python objects that the run was started with, if any.

    Raises:
        DistmetaError: See `distmeta.errors`.
    """
    run = run if isinstance(run, RunFolder) else RunFolder.open(run)
    experiment = assemble(run.config(), model=model, loss=loss, tasks=tasks, algorithm=algorithm, prepare=False)
    return _adapt(experiment, restore(run, experiment, checkpoint), support)


def _adapt(experiment: Experiment, params: Params, support: Batch) -> Adapted:
    problem = experiment.problem
    meta = split(params)
    module = copy.deepcopy(problem.loss.module).eval()
    problem.loss.module.eval()
    with reproducible(problem.threads, 0):
        adapted = problem.algorithm.adapt(meta, Episode(support, support), problem.loss)
    module.load_state_dict(adapted, strict=False)
    return Adapted(module, support[:-1])


def evaluate(
    run: RunFolder | str | Path,
    *overrides: str,
    episodes: int | None = None,
    checkpoint: str = "best",
    model: nn.Module | None = None,
    loss: Criterion | None = None,
    tasks: TaskDistribution | None = None,
    algorithm: MetaAlgorithm | None = None,
) -> Evaluation:
    """Judges a run by unseen test tasks, the same ones each time, before adaptation and after each inner step.

    Args:
        run: A run, or its folder.
        overrides: ``"key.subkey=value"`` strings of keys that may change, such as ``scaling.num_workers=8``.
        episodes: Number of tasks; None for the configuration's ``evaluation.tasks``.
        checkpoint: ``best`` by validation, ``last``, or a step.
        model, loss, tasks, algorithm: The Python objects that the run was started with, if any.

    Returns:
        See `distmeta.evaluation.evaluate_tasks`.

    Raises:
        DistmetaError: See `distmeta.errors`.
    """
    run = run if isinstance(run, RunFolder) else RunFolder.open(run)
    settings = run.config(overrides, may_change=("scaling.", "evaluation.", "data_root="))
    experiment = assemble(settings, model=model, loss=loss, tasks=tasks, algorithm=algorithm)
    config, problem = experiment.config, experiment.problem
    count = config.evaluation.tasks if episodes is None else episodes
    if count < 2:
        raise ConfigError(f"episodes must be at least 2, for there to be an interval; given: {count}")
    vector = problem.layout.pack(restore(run, experiment, checkpoint))
    shards = -(-count // config.evaluation.shard_size)
    with executor_of(config, problem, shards) as executor:
        return evaluate_tasks(executor, problem, vector, "test", count, config.evaluation.shard_size)


def adapt_folder(run: RunFolder, support: Path, query: Path, out: Path, *, checkpoint: str = "best") -> dict[str, Any]:
    """Adapts to a user's own images and classifies others.

    Args:
        run: A run on images.
        support: A folder with one folder of images for each class.
        query: A folder of images, or of one folder for each class, whose names are then the truth.
        out: A new folder for ``predictions.csv`` (for each image the class, its probability and that of every class),
            ``adapted.safetensors`` (the adapted weights) and ``classes.json`` (the class of each output).
        checkpoint: ``best`` by validation, ``last``, or a step.

    Returns:
        ``classes``, ``predictions`` (rows of the file) and, where the truth is known, ``accuracy``.

    Raises:
        DistmetaError: See `distmeta.errors`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already; choose another folder with --out")
    experiment = assemble(run.config(), prepare=False)
    tasks = experiment.problem.tasks
    if not isinstance(tasks, FewShotImages):
        raise ConfigError(
            f"{run.address} was trained on {experiment.config.tasks.use}, not on images; use distmeta.adapt in Python"
        )
    names, x, y = folder_of_classes(support, tasks.read_image)
    if len(names) > tasks.ways:
        raise ConfigError(
            f"{support} holds {len(names)} classes; this run tells {tasks.ways} apart: leave some out, or train with "
            f"tasks.ways={len(names)}"
        )
    pictures = folder_of_images(query, tasks.read_image)
    adapted = _adapt(experiment, restore(run, experiment, checkpoint), (x, y))
    probability = adapted.predict(pictures.x)[:, : len(names)].softmax(-1)
    best = probability.argmax(-1).tolist()
    rows = [
        [str(path.relative_to(query)), names[k], f"{row[k]:.6f}", *(f"{p:.6f}" for p in row.tolist())]
        for path, k, row in zip(pictures.paths, best, probability, strict=True)
    ]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "class", "probability", *(f"p({name})" for name in names)])
    writer.writerows(rows)
    params = {name: tensor.detach() for name, tensor in adapted.module.named_parameters()}
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        storage.write_durably(out / "predictions.csv", text.getvalue().encode())
        storage.write_durably(out / "classes.json", json.dumps(names).encode())
        storage.write_durably(out / "adapted.safetensors", safetensors.torch.save(params))
    result: dict[str, Any] = {"classes": names, "predictions": rows}
    if pictures.labels is not None:
        right = [names[k] == label for k, label in zip(best, pictures.labels, strict=True)]
        result["accuracy"] = sum(right) / len(right)
    return result
