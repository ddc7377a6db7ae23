"""Reptile (Nichol, Achiam, Schulman, "On first-order meta-learning algorithms", 2018)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from distmeta.core.algorithm import MetaAlgorithm
from distmeta.core.inner import InnerStep, last, optimizer_of, unroll
from distmeta.core.seeds import stream
from distmeta.core.types import Batch, MetaGradient, MetaParams, Params, Support, Task, TaskLoss
from distmeta.errors import at_least, positive

MANY = 10**9  # updates after which Adam's bias correction is 1


@dataclass(frozen=True)
class Reptile(MetaAlgorithm):
    """Moves the initialisation towards the parameters that the tasks adapt to.

    Each task i runs k steps of SGD or Adam on mini-batches of its support set, theta_i' = U_i^k(theta). The batched
    update (their algorithm 2) is theta ← theta + ε (mean_i theta_i' − theta), that is: descend the mean of
    theta − theta_i' with plain SGD of rate ε (``outer: {use: SGD, lr: ε}``). The query set is not used in training.

    As in the authors' code, Adam's second moment lives on from task to task. Theirs passes through the tasks in the
    order in which one process meets them; here all tasks of a meta-batch start from the same one, and it moves to the
    mean of theirs just as theta does, so that nothing depends on the order or on who computes what.

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

    def init(self, params: Params) -> MetaParams:
        """theta, and the second moment v̂ of Adam, which is 0 before the first step."""
        if self.inner_optimizer == "sgd":
            return MetaParams(params, {})
        return MetaParams(params, {f"v.{name}": torch.zeros_like(tensor) for name, tensor in params.items()})

    def _unroll(
        self, meta: MetaParams, task: Task, loss: TaskLoss, steps: int, batch_size: int | None, count: int
    ) -> Iterator[InnerStep]:
        optimizer = optimizer_of(self.inner_optimizer, self.inner_lr)
        batches = mini_batches(task, batch_size)
        return unroll(loss, meta.model, batches, optimizer, steps, state=meta.extra, count=count)

    def phase(self, step: int) -> Hashable:
        """Adam counts its steps."""
        return step if self.inner_optimizer == "adam" else None

    def trajectory(self, meta: MetaParams, task: Task, loss: TaskLoss) -> Iterator[InnerStep]:
        """theta_0, theta_1, …"""
        steps = self.inner_steps if self.test_inner_steps is None else self.test_inner_steps
        # Before any training v̂ is 0, which is no estimate of anything: Adam then starts afresh.
        count = MANY if any(bool(moment.any()) for moment in meta.extra.values()) else 0
        return self._unroll(meta, task, loss, steps, self.test_batch_size, count)

    def meta_gradient(self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int) -> MetaGradient:
        """theta − theta'; the metrics are those of the last mini-batch of the inner loop."""
        done = step * self.inner_steps
        end = last(self._unroll(meta, task, loss, self.inner_steps, self.batch_size, done))
        assert end.loss is not None  # inner_steps >= 1
        difference = MetaParams(
            {name: tensor - end.params[name] for name, tensor in meta.model.items()},
            {name: tensor - end.state[name] for name, tensor in meta.extra.items()},
        )
        return MetaGradient(difference, end.metrics | {"loss": end.loss})


def mini_batches(task: Task, size: int | None) -> Support:
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
