"""Joint training and fine-tuning: the baseline that says whether meta-learning helps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distmeta.algorithms.reptile import Reptile
from distmeta.core.gradients import grad_and_value
from distmeta.core.types import MetaGradient, MetaParams, Params, Task, TaskLoss


@dataclass(frozen=True)
class Joint(Reptile):
    """Trains on the examples of all tasks as on one data set, and fine-tunes on a new task.

    The outer loop descends the mean over tasks of L(theta; S ∪ Q), support and query set together, without any inner
    loop; ``inner_steps`` and ``batch_size`` are those of evaluation and adaptation alone, where their ``test_``
    counterparts do not say otherwise. A new task is adapted to by the inner loop of `Reptile`, with SGD or Adam from
    its start. Where the same inputs have other targets in each task (classes in random order), it learns nothing.

    Raises:
        ConfigError: A setting is out of range.
    """

    def init(self, params: Params) -> MetaParams:
        """theta alone."""
        return MetaParams(params, {})

    def meta_gradient(self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int) -> MetaGradient:
        """∇L(theta; S ∪ Q)."""
        sets = task.support(meta.model, 0), task.query(meta.model)
        pooled = tuple(torch.cat(of_one_length(*both)) for both in zip(*sets, strict=True))
        gradient, value, metrics = grad_and_value(lambda p: loss(p, pooled), meta.model, create_graph=False)
        return MetaGradient(MetaParams(gradient, {}), metrics | {"loss": value})


def of_one_length(*sets: Tensor) -> list[Tensor]:
    """Tokens (N, T) of sets that were trimmed each to its longest text, padded by −1 as within a set; else as it is."""
    if sets[0].dim() != 2 or sets[0].is_floating_point():
        return list(sets)
    longest = max(tokens.shape[1] for tokens in sets)
    return [F.pad(tokens, (0, longest - tokens.shape[1]), value=-1) for tokens in sets]
