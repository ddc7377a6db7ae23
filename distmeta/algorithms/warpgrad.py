"""WarpGrad (Flennerhag et al., "Meta-learning with warped gradient descent", ICLR 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated

import torch
from torch import Tensor

from distmeta.core.algorithm import MetaAlgorithm
from distmeta.core.gradients import grad_and_value
from distmeta.core.inner import SGD, InnerStep, last, unroll
from distmeta.core.params import join, split
from distmeta.core.types import Batch, MetaGradient, MetaParams, Metrics, Params, Recorded, Task, TaskLoss
from distmeta.errors import ConfigError, at_least, positive


@dataclass(frozen=True)
class WarpGrad(MetaAlgorithm):
    """Learns layers between the network's own that warp the gradients of the inner loop, for inner loops of any length.

    The inner loop moves the network's own parameters theta and leaves the warp parameters phi alone:

        theta_{k+1} = theta_k − α ∇_theta L(theta_k, phi; S)

    The outer loop descends in phi what one step achieves from each point of the path,

        1/K Σ_k L(theta_k − α ∇_theta L(theta_k, phi; S), phi; Q),   k = 0 … K−1

    in which the theta_k are constants: no derivative goes from step to step, and the memory is that of one step. The
    initialisation is learned beside it (for which they take any algorithm) by first-order MAML's ∇_theta L(theta_K; Q).

    ``warp_params`` names the parameters of the model's warp layers, of any kind. If it names none, each layer with a
    weight of two axes or more gets a linear one behind it, a matrix T (C, C) over its C outputs or channels that
    starts as the identity: the transforms of T-nets (Lee, Choi, ICML 2018). T W and T b are a weight and a bias again,
    so that any module can be used as it is, and what comes out of adaptation is an ordinary set of its parameters.

    Raises:
        ConfigError: A setting is out of range, a pattern matches no parameter, or nothing is left to adapt or to warp.
    """

    inner_lr: Annotated[float, "inner learning rate, alpha"] = 0.1
    inner_steps: Annotated[int, "gradient steps of the inner loop in meta-training, K"] = 5
    test_inner_steps: Annotated[int | None, "inner steps in evaluation and adaptation; null: inner_steps"] = None
    warp_params: Annotated[tuple[str, ...], "name patterns of the model's warp layers; none: makes its own"] = ()

    def __post_init__(self) -> None:
        positive("algorithm.inner_lr", self.inner_lr)
        at_least("algorithm.inner_steps", self.inner_steps, 1)
        if self.test_inner_steps is not None:
            at_least("algorithm.test_inner_steps", self.test_inner_steps, 0)

    def init(self, params: Params) -> MetaParams:
        """theta (with the model's warp layers), and otherwise T (C, C) of each layer under ``warp.*``."""
        for pattern in self.warp_params:
            if not any(fnmatchcase(name, pattern) for name in params):
                raise ConfigError(
                    f"algorithm.warp_params: {pattern!r} matches no parameter of the model; they are "
                    f"{', '.join(params)}"
                )
        if not self._moving(params):
            raise ConfigError("algorithm.warp_params leaves no parameter for the inner loop to move")
        if self.warp_params:
            return MetaParams(params, {})
        extra = {
            f"warp.{name.removesuffix('.weight')}": torch.eye(len(weight), dtype=weight.dtype)
            for name, weight in params.items()
            if name.endswith(".weight") and weight.ndim > 1
        }
        if not extra:
            raise ConfigError(
                "algorithm warpgrad puts a warp layer behind each layer with a weight of two axes, and the model has "
                "none; name warp layers of its own by algorithm.warp_params"
            )
        return MetaParams(params, extra)

    def _moving(self, params: Params) -> list[str]:
        return [name for name in params if not any(fnmatchcase(name, pattern) for pattern in self.warp_params)]

    def trajectory(self, meta: MetaParams, task: Task, loss: TaskLoss) -> Iterator[InnerStep]:
        """theta_0, theta_1, …, as the warp layers make them."""
        steps = self.inner_steps if self.test_inner_steps is None else self.test_inner_steps
        for at in self._path(meta, task, loss, steps):
            yield at._replace(params=_warped(at.params, meta.extra))

    def _path(self, meta: MetaParams, task: Task, loss: TaskLoss, steps: int) -> Iterator[InnerStep]:
        return unroll(
            lambda params, batch: loss(_warped(params, meta.extra), batch),
            meta.model,
            lambda params, k: task.support(_warped(params, meta.extra), k),
            SGD(self.inner_lr),
            steps,
            adapted=self._moving(meta.model),
        )

    def meta_gradient(self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int) -> MetaGradient:
        """What is descended in phi and in theta_0; the metrics are those of the query set at theta_K."""
        if isinstance(task, Recorded):
            raise ConfigError(
                "algorithm warpgrad judges every inner step by one query set, which control samples for the last one "
                "alone; take maml"
            )
        *path, end = [at.params for at in self._path(meta, task, loss, self.inner_steps)]
        moving = self._moving(meta.model)
        query = task.query(_warped(end, meta.extra))
        warp = join(MetaParams({n: t for n, t in meta.model.items() if n not in moving}, meta.extra))
        total: Params = {}
        for k, params in enumerate(path):
            support = task.support(_warped(params, meta.extra), k)
            gradient, *_ = grad_and_value(
                lambda w, p=params, s=support: self._ahead(p, split(w), s, query, loss), warp, create_graph=False
            )
            total = {name: total[name] + g if total else g for name, g in gradient.items()}
        first, value, metrics = grad_and_value(
            lambda p: loss(_warped(end | p, meta.extra), query), {n: end[n] for n in moving}, create_graph=False
        )
        of_warp = split({name: g / len(path) for name, g in total.items()})
        theta = {name: first[name] if name in first else of_warp.model[name] for name in meta.model}
        return MetaGradient(MetaParams(theta, of_warp.extra), metrics | {"loss": value})

    def _ahead(
        self, params: Params, warp: MetaParams, support: Batch, query: Batch, loss: TaskLoss
    ) -> tuple[Tensor, Metrics]:
        """The query loss after one step from ``params``, a function of the warp parameters."""
        step = unroll(
            lambda p, batch: loss(_warped(p, warp.extra), batch),
            params | warp.model,
            lambda _p, _k: support,
            SGD(self.inner_lr),
            1,
            order=2,
            adapted=self._moving(params),
        )
        return loss(_warped(last(step).params, warp.extra), query)


def _warped(params: Params, extra: Params) -> Params:
    """T W and T b in the place of the weight W and the bias b of each layer that has a T."""
    warped = dict(params)
    for name, matrix in extra.items():
        layer = name.removeprefix("warp.")
        weight = params[f"{layer}.weight"]
        warped[f"{layer}.weight"] = (matrix @ weight.flatten(1)).reshape(weight.shape)
        if f"{layer}.bias" in params:
            warped[f"{layer}.bias"] = matrix @ params[f"{layer}.bias"]
    return warped
