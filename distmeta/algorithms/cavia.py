"""CAVIA (Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson, "Fast context adaptation via meta-learning", ICML 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated

import torch

from distmeta.algorithms.unrolled import Unrolled
from distmeta.core.inner import InnerStep
from distmeta.core.params import join, split
from distmeta.core.types import Batch, MetaParams, Metrics, Params, Task, TaskLoss
from distmeta.errors import ConfigError, at_least

_CONTEXT = "context"  # all other names have a dot


@dataclass(frozen=True)
class CAVIA(Unrolled):
    """Adapts a few context parameters phi that modulate the network, and learns the network itself in the outer loop.

    Inner loop from phi_0 = 0 in every task, with theta fixed:

        phi_{k+1} = phi_k − α ∇_phi L(phi_k, theta; S)

    Meta-gradient: ∇_theta L(phi_K, theta; Q), through the adaptation.

    phi (n numbers) acts on the outputs h of the chosen layers, each affine with weight and bias (linear, convolution,
    normalisation), through matrices that are learned in the outer loop as theta is:

        h ← h + A phi,   or with ``film`` (Perez et al., 2018)   h ← (1 + G phi) ∘ h + A phi,   channel by channel.

    The first is phi concatenated to the layer's inputs, as in their regression; the second is what they do after the
    third convolution for images (their code has no "1 +"). Both are another weight and bias of the layer,
    which is how it is done here: any module can be adapted as it is, and what comes out of adaptation is an
    ordinary set of parameters of it. A and G start as the layer's additional inputs would, uniform in
    ± 1/√(n + inputs of an output).

    Raises:
        ConfigError: A setting is out of range (see `Unrolled`), or the model has no such layer.
    """

    inner_lr: Annotated[float, "learning rate of the context parameters, alpha"] = 1.0
    context: Annotated[int, "number of context parameters, n"] = 5
    layers: Annotated[tuple[str, ...], "name patterns of the layers that they modulate; none: the first one"] = ()
    film: Annotated[bool, "scale these layers' outputs as well as shift them"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("algorithm.context", self.context, 1)

    def init(self, params: Params) -> MetaParams:
        """theta, and for each layer (C outputs) A (C, n) under ``shift.*`` and G (C, n) under ``scale.*``."""
        extra: Params = {}
        for layer in self.modulated_layers(params):
            weight, bias = params[f"{layer}.weight"], params[f"{layer}.bias"]
            bound = (self.context + weight.numel() / len(bias)) ** -0.5
            for kind in ("shift", "scale") if self.film else ("shift",):
                extra[f"{kind}.{layer}"] = bias.new_empty(len(bias), self.context).uniform_(-bound, bound)
        return MetaParams(params, extra)

    def modulated_layers(self, params: Params) -> list[str]:
        """The names of the layers that the context acts on."""
        affine = [
            name.removesuffix(".weight")
            for name, weight in params.items()
            if name.endswith(".weight")
            and (bias := params.get(f"{name.removesuffix('.weight')}.bias")) is not None
            and weight.shape[:1] == bias.shape
        ]
        if not affine:
            raise ConfigError(
                "algorithm cavia modulates a layer by its weight and bias, and the model has none with both; its "
                f"parameters are {', '.join(params)}"
            )
        for pattern in self.layers:
            if not any(fnmatchcase(layer, pattern) for layer in affine):
                raise ConfigError(
                    f"algorithm.layers: {pattern!r} matches no layer with a weight and a bias; they are "
                    f"{', '.join(affine)}"
                )
        return [n for n in affine if any(fnmatchcase(n, pattern) for pattern in self.layers)] or affine[:1]

    def inner_loop(
        self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int | None = None
    ) -> Iterator[InnerStep]:
        """theta as phi_0, phi_1, …, phi_K make it."""

        def modulated_loss(params: Params, batch: Batch) -> tuple[torch.Tensor, Metrics]:
            return loss(_modulated(params), batch)

        like = next(iter(meta.extra.values()))
        steps = self.unroll(
            modulated_loss,
            join(meta) | {_CONTEXT: like.new_zeros(self.context)},
            lambda params, k: task.support(_modulated(params), k),
            step=step,
            adapted=[_CONTEXT],
        )
        for at in steps:
            with torch.set_grad_enabled(step is not None):
                yield at._replace(params=_modulated(at.params))


def _modulated(params: Params) -> Params:
    """theta with the weights and biases that the context gives to its layers."""
    phi = params[_CONTEXT]
    theta, extra = split(params)
    modulated = dict(theta)
    for name, matrix in extra.items():
        kind, _, layer = name.partition(".")
        if kind == "shift":
            weight, bias = theta[f"{layer}.weight"], theta[f"{layer}.bias"]
            if (gain := extra.get(f"scale.{layer}")) is not None:
                factor = 1 + gain @ phi
                modulated[f"{layer}.weight"] = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
                bias = bias * factor
            modulated[f"{layer}.bias"] = bias + matrix @ phi
    return modulated
