"""R2-D2: ridge regression as the inner loop (Bertinetto, Henriques, Torr, Vedaldi, "Meta-learning with differentiable
closed-form solvers", ICLR 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from typing import Annotated, cast

import torch
from torch import Tensor

from distmeta.core.algorithm import Bilevel
from distmeta.core.heads import check_head, features, one_hot
from distmeta.core.inner import InnerStep
from distmeta.core.types import MetaParams, Params, Task, TaskLoss
from distmeta.errors import positive


@dataclass(frozen=True)
class R2D2(Bilevel):
    """Learns features on which ridge regression, solved exactly, classifies a new task.

    With X the features (S, F) of the support set and Y its one-hot labels, the head of a task is (in
    the Woodbury form, whose system is as large as the support set and not as the features)

        W = Xᵀ (X Xᵀ + λ I)⁻¹ Y,   logits of features f:  a Wᵀ f + b

    λ, a and b are meta-learned with the features; λ as its logarithm, so that it stays positive. The
    head's own parameters in theta are not used. There is one inner "step", the solution itself.

    Raises:
        ConfigError: A setting is out of range, or the model has no such head.
    """

    ridge: Annotated[float, "lambda at the start, the strength of regularisation"] = 1.0
    scale: Annotated[float, "a at the start, which scales the logits"] = 1.0
    head: Annotated[str, "name of the model's last layer, an nn.Linear with bias"] = "classifier"

    def __post_init__(self) -> None:
        positive("algorithm.ridge", self.ridge)
        positive("algorithm.scale", self.scale)

    def init(self, params: Params) -> MetaParams:
        """theta, log λ, a and b."""
        check_head(params, self.head)
        like = params[f"{self.head}.weight"]
        starts = {"log_ridge": log(self.ridge), "scale": self.scale, "bias": 0.0}
        return MetaParams(params, {name: torch.full((1,), value, dtype=like.dtype) for name, value in starts.items()})

    @property
    def task_head(self) -> str:
        """`head`."""
        return self.head

    def inner_loop(
        self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int | None = None
    ) -> Iterator[InnerStep]:
        """theta, and theta with the head of ridge regression."""
        yield InnerStep(meta.model, None, {}, {})
        with torch.set_grad_enabled(step is not None):
            *inputs, label_S = task.support(meta.model, 0)
            weight_NF = meta.model[f"{self.head}.weight"]
            x_SF = features(loss, meta.model, self.head, *inputs)
            y_SN = one_hot(label_S, len(weight_NF), x_SF.dtype)
            identity_SS = torch.eye(len(y_SN), dtype=x_SF.dtype, device=x_SF.device)
            system_SS = x_SF @ x_SF.T + meta.extra["log_ridge"].exp() * identity_SS
            solution_SN = cast(Tensor, torch.linalg.solve(system_SS, y_SN))  # pyright: ignore[reportUnknownMemberType]
            adapted: Params = meta.model | {
                f"{self.head}.weight": meta.extra["scale"] * (solution_SN.T @ x_SF),
                f"{self.head}.bias": meta.extra["bias"].expand(len(weight_NF)),
            }
        yield InnerStep(adapted, None, {}, {})
