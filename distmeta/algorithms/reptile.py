"""Reptile (Nichol, Achiam, Schulman, "On first-order meta-learning algorithms", 2018)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from distmeta.core.algorithm import MetaAlgorithm
from distmeta.core.inner import SGD, Adam, InnerStep, last, unroll
from distmeta.core.seeds import stream
from distmeta.core.types import Batch, MetaGradient, MetaParams, Params, Task, TaskLoss
from distmeta.errors import at_least, positive


@dataclass(frozen=True)
class Reptile(MetaAlgorithm):
    """Moves the initialisation towards the parameters that the tasks adapt to.

    Each task i runs k steps of SGD or Adam on mini-batches of its support set, theta_i' = U_i^k(theta). The batched
    update (their algorithm 2) is theta ← theta + ε (mean_i theta_i' − theta), that is: descend the mean of
    theta − theta_i' with plain SGD of rate ε (``outer: {use: SGD, lr: ε}``). The query set is not used in training.

    Differences from the authors' code: Adam's second moment starts afresh for each task, where theirs is carried from
    task to task in the order in which one process meets them, which would make a result depend on the workers.

    Raises:
        ConfigError: A setting is out of range.
    """

    inner_optimizer: Annotated[Literal["adam", "sgd"], "inner update rule; adam has beta1 = 0"] = "adam"
    inner_lr: Annotated[float, "inner learning rate"] = 1e-3
    inner_steps: Annotated[int, "mini-batches a task in meta-training, k"] = 5
    batch_size: Annotated[int | None, "support examples a mini-batch; null: the whole support set"] = 10
    test_inner_steps: Annotated[int | None, "inner steps in evaluation and adaptation; null: inner_steps"] = None
    test_batch_size: Annotated[int | None, "mini-batch in evaluation and adaptation; null: the whole set"] = None

    def __post_init__(self) -> None:
        positive("algorithm.inner_lr", self.inner_lr)
        at_least("algorithm.inner_steps", self.inner_steps, 1)
        for key in ("batch_size", "test_batch_size", "test_inner_steps"):
            if getattr(self, key) is not None:
                at_least(f"algorithm.{key}", getattr(self, key), 0 if key == "test_inner_steps" else 1)

    def _unroll(
        self, meta: MetaParams, task: Task, loss: TaskLoss, steps: int, batch_size: int | None
    ) -> Iterator[InnerStep]:
        optimizer = Adam(self.inner_lr) if self.inner_optimizer == "adam" else SGD(self.inner_lr)
        return unroll(loss, meta.model, mini_batches(task, batch_size), optimizer, steps)

    def trajectory(self, meta: MetaParams, task: Task, loss: TaskLoss) -> Iterator[InnerStep]:
        """theta_0, theta_1, …"""
        steps = self.inner_steps if self.test_inner_steps is None else self.test_inner_steps
        return self._unroll(meta, task, loss, steps, self.test_batch_size)

    def meta_gradient(self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int) -> MetaGradient:
        """theta − theta'; the metrics are those of the last mini-batch of the inner loop."""
        end = last(self._unroll(meta, task, loss, self.inner_steps, self.batch_size))
        assert end.loss is not None  # inner_steps >= 1
        difference = {name: tensor - end.params[name] for name, tensor in meta.model.items()}
        return MetaGradient(MetaParams(difference, {}), end.metrics | {"loss": end.loss})


def mini_batches(task: Task, size: int | None) -> Callable[[Params, int], Batch]:
    """The support set of ``task`` in mini-batches of ``size``, shuffled anew at each pass through it.

    The shuffle of pass e is one permutation for all tasks, drawn from a stream named by e: tasks come in random order
    themselves, and so the inner loop needs no random state.
    """

    def support(params: Params, inner_step: int) -> Batch:
        batch = task.support(params, inner_step)
        examples = batch[0].shape[0]
        if size is None or size >= examples:
            return batch
        positions = range(inner_step * size, (inner_step + 1) * size)
        order = {e: stream("mini-batches", e).permutation(examples) for e in {p // examples for p in positions}}
        index = torch.tensor([int(order[p // examples][p % examples]) for p in positions], device=batch[0].device)
        return tuple(tensor[index] for tensor in batch)

    return support
