"""MAML++ (Antoniou, Edwards, Storkey, "How to train your MAML", ICLR 2019)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated

import torch
from torch import Tensor

from distmeta.algorithms.maml import MAML
from distmeta.core.inner import InnerOptimizer, InnerStep, Order, unroll
from distmeta.core.types import MetaParams, Metrics, Params, Recorded, Task, TaskLoss
from distmeta.errors import ConfigError, at_least


@dataclass(frozen=True)
class MAMLpp(MAML):
    """MAML made stable and quicker; each part can be switched on alone.

    Multi-step loss ("MSL"): the outer loop descends Σ_k v_k L(theta_k; Q) over the steps k = 1 … K. The v_k start as
    1/K, and those of k < K fall linearly to 0 over ``multi_step_until`` outer steps while v_K rises to 1. (The authors'
    code keeps them above 0.03/K until then; here they fall to 0 itself.)

    Learned rates ("LSLR"): theta_{k+1} = theta_k − α_{l,k} ∇L(theta_k; S), one rate for each parameter tensor l and
    step k, all ``inner_lr`` at the start. Steps beyond K, at test time, use the rates of step K.

    Derivative-order annealing ("DA"): no second derivatives in the first ``first_order_until`` outer steps.

    Per-step batch-norm weights and biases ("BNWB", ``per_step_norm``): normalisation layers have a weight and a bias
    for each inner step, learned in the outer loop and not adapted in the inner one, as in the authors' configurations.
    Step k and the query loss after it use those of step k. Layers of normalisation are all whose weight is a vector;
    their own weights and biases in theta are not used. Steps beyond K use those of step K.

    Its cosine annealing ("CA") is a schedule of the section ``outer``. Per-step running statistics ("BNRS") have no
    setting: the authors' code collects them, but normalises by the batch at hand throughout, as networks here do.

    Raises:
        ConfigError: A setting is out of range (see `MAML`), or the model has no layers of normalisation to learn.
    """

    inner_steps: Annotated[int, "gradient steps of the inner loop in meta-training, K"] = 5
    learn_rates: Annotated[bool, "learn a rate for each parameter tensor and inner step"] = True
    multi_step_until: Annotated[
        int, "outer steps over which the multi-step loss fades into the last step's; 0: off"
    ] = 0
    per_step_norm: Annotated[bool, "learn normalisation weights and biases for each inner step, and adapt none"] = False
    first_order_until: Annotated[int, "outer steps before second derivatives are taken; 0: from the start"] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("algorithm.multi_step_until", self.multi_step_until, 0)
        at_least("algorithm.first_order_until", self.first_order_until, 0)

    def init(self, params: Params) -> MetaParams:
        """theta, rates (K,) of adapted tensors under ``lr.*``, and ``norm.*``, (K, C) for the C channels of a layer."""
        names = self.moving(params)
        extra: Params = {}
        if self.learn_rates:
            extra |= {f"lr.{name}": params[name].new_full((self.inner_steps,), self.inner_lr) for name in names}
        if self.per_step_norm:
            if not (own := _normalisation(params)):
                raise ConfigError(
                    "algorithm.per_step_norm: the model has no layer of normalisation (weight and bias vectors); "
                    f"its parameters are {', '.join(params)}"
                )
            extra |= {f"norm.{name}": params[name].repeat(self.inner_steps, 1) for name in own}
        return MetaParams(params, extra)

    def moving(self, params: Params) -> list[str]:
        """See `MAML.moving`; what is learned for each step is not adapted."""
        own = _normalisation(params) if self.per_step_norm else []
        names = [name for name in super().moving(params) if name not in own]
        if not names:
            raise ConfigError("algorithm.per_step_norm leaves no parameter for the inner loop to move")
        return names

    def inner_loop(
        self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int | None = None
    ) -> Iterator[InnerStep]:
        """theta_0, theta_1, …, theta_K, each with the normalisation of the step that has led to it."""
        if not self.per_step_norm:
            yield from super().inner_loop(meta, task, loss, step=step)
            return
        own = {name[5:]: rows for name, rows in meta.extra.items() if name.startswith("norm.")}
        at = InnerStep(meta.model | {name: rows[0] for name, rows in own.items()}, None, {}, meta.extra)
        yield at
        for k in range(self.steps(step)):
            row = min(k, self.inner_steps - 1)
            path = unroll(
                loss,
                at.params | {name: rows[row] for name, rows in own.items()},
                lambda params, _, k=k: task.support(params, k),
                self.optimizer(),
                1,
                order=0 if step is None else self.order(step),
                adapted=self.moving(meta.model),
                state=at.state,
                count=k,
                recompute=self.recompute,
            )
            for at in islice(path, 1, None):
                yield at

    def optimizer(self) -> InnerOptimizer:
        """theta_l ← theta_l − α_{l,k} g_l."""
        if not self.learn_rates:
            return super().optimizer()
        return self.rule(lambda state, name, count: state[f"lr.{name}"][min(count, self.inner_steps) - 1])

    def phase(self, step: int) -> Hashable:
        """Order and weights."""
        return self.order(step), tuple(self.weights(step))

    def order(self, step: int) -> Order:
        """See `MAML.order`; first the order is 1 if it is annealed."""
        return 1 if step < self.first_order_until else super().order(step)

    def weights(self, step: int) -> list[float]:
        """v_1, …, v_K in outer step ``step``."""
        others = 0.0
        if step < self.multi_step_until:
            others = (1 - step / self.multi_step_until) / self.inner_steps
        return [others] * (self.inner_steps - 1) + [1 - others * (self.inner_steps - 1)]

    def objective(self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int) -> tuple[Tensor, Metrics]:
        """Σ_k v_k L(theta_k; Q), and the metrics of the query set at theta_K."""
        path = islice(self.inner_loop(meta, task, loss, step=step), 1, None)
        weighted = [(v, at.params) for v, at in zip(self.weights(step), path, strict=True) if v]
        if len(weighted) > 1 and isinstance(task, Recorded):
            raise ConfigError(
                "algorithm.multi_step_until judges every inner step by one query set, which control samples for "
                "the last one alone: leave it at 0"
            )
        values = [(v, *loss(params, task.query(params))) for v, params in weighted]
        return torch.stack([v * value for v, value, _ in values]).sum(), values[-1][2]


def _normalisation(params: Params) -> list[str]:
    """The names of weights that are vectors, and of the biases beside them."""
    layers = [name[: -len(".weight")] for name, t in params.items() if name.endswith(".weight") and t.ndim == 1]
    return [name for layer in layers for name in (f"{layer}.weight", f"{layer}.bias") if name in params]
