"""ProtoMAML (Triantafillou et al., "Meta-Dataset", ICLR 2020), and prototypical networks as its case of no steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from distmeta.algorithms.maml import MAML
from distmeta.core.heads import check_head, features, one_hot
from distmeta.core.inner import InnerStep
from distmeta.core.types import MetaParams, Params, Task, TaskLoss

ABSENT = -1e4  # a logit whose probability is 0, and which is finite


@dataclass(frozen=True)
class ProtoMAML(MAML):
    """MAML whose linear head starts, in each task, as the nearest-prototype classifier of its support set.

    With c_n the mean of the features of class n's support examples, −‖f − c_n‖² = 2 c_n·f − ‖c_n‖² − ‖f‖² (Snell et
    al., NeurIPS 2017), so that the head

        w_n = 2 c_n,   b_n = −‖c_n‖²

    gives prototypical networks' probabilities. From there the inner loop moves head and body; the meta-gradient flows
    through the prototypes. The head's own parameters in theta are not used. ``inner_steps: 0`` is a prototypical
    network.

    Raises:
        ConfigError: A setting is out of range (see `MAML`), or the model has no such head.
    """

    inner_steps: Annotated[int, "gradient steps of the inner loop in meta-training, K; 0: prototypical network"] = 1
    head: Annotated[str, "name of the model's last layer, an nn.Linear with bias"] = "classifier"

    least_steps: ClassVar[int] = 0

    def init(self, params: Params) -> MetaParams:
        """theta alone."""
        check_head(params, self.head)
        return super().init(params)

    @property
    def task_head(self) -> str:
        """`head`."""
        return self.head

    def inner_loop(
        self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int | None = None
    ) -> Iterator[InnerStep]:
        """theta, then theta with the head of prototypes, then the gradient steps from there."""
        yield InnerStep(meta.model, None, {}, {})
        yield from super().inner_loop(meta, task, loss, step=step)

    def start(self, meta: MetaParams, task: Task, loss: TaskLoss) -> Params:
        """theta with the head made from prototypes."""
        *inputs, label_S = task.support(meta.model, 0)
        weight_NF = meta.model[f"{self.head}.weight"]
        features_SF = features(loss, meta.model, self.head, *inputs)
        member_SN = one_hot(label_S, len(weight_NF), weight_NF.dtype)
        count_N = member_SN.sum(0)
        prototype_NF = member_SN.T @ features_SF / count_N.clamp(min=1)[:, None]
        # a class without examples, where a user has fewer than the model has outputs for, is never the answer
        bias_N = torch.where(count_N > 0, -prototype_NF.square().sum(1), ABSENT)
        head = {f"{self.head}.weight": 2 * prototype_NF, f"{self.head}.bias": bias_N}
        return meta.model | head
