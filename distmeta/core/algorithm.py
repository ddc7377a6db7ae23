"""What a meta-learning algorithm is: an inner loop, and a direction for the outer loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from distmeta.core.inner import InnerStep, last
from distmeta.core.types import MetaGradient, MetaParams, Params, Task, TaskLoss


class MetaAlgorithm(ABC):
    """One algorithm; a subclass is a frozen dataclass whose fields are its settings.

    Its methods are pure functions of tensors, free of global state, and use `distmeta.core.gradients.grad_and_value`
    for every derivative, so that the same code runs task by task and vectorised over the tasks of a shard.
    """

    def init(self, params: Params) -> MetaParams:
        """The meta-parameters at the start of meta-training, from the model's initial parameters."""
        return MetaParams(params, {})

    @abstractmethod
    def trajectory(self, meta: MetaParams, task: Task, loss: TaskLoss) -> Iterator[InnerStep]:
        """The adaptation as it is done at test time: the state before the first and after each inner step."""

    def adapt(self, meta: MetaParams, task: Task, loss: TaskLoss) -> Params:
        """The parameters adapted to the support data of ``task``."""
        return last(self.trajectory(meta, task, loss)).params

    @abstractmethod
    def meta_gradient(self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int) -> MetaGradient:
        """What ``task`` contributes to the outer update of outer step ``step`` (from 0).

        The driver descends the *mean* of these over the meta-batch.
        """
