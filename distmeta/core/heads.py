"""What algorithms need that make a model's last layer, its head, from the support set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distmeta.core.loss import ModuleLoss
from distmeta.core.types import Params, TaskLoss
from distmeta.errors import ConfigError


def check_head(params: Params, head: str) -> None:
    """Raises `ConfigError` unless ``params`` have the weight (N, F) and the bias (N,) of a linear layer ``head``."""
    weight, bias = params.get(f"{head}.weight"), params.get(f"{head}.bias")
    if weight is None or bias is None or weight.ndim != 2 or bias.ndim != 1:
        raise ConfigError(
            f"algorithm.head: the model has no trainable linear layer with bias called {head!r}; its parameters are "
            f"{', '.join(params)}"
        )


def features(loss: TaskLoss, params: Params, head: str, *inputs: Tensor) -> Tensor:
    """What the layer ``head`` is given when the model sees ``inputs``: (B, F).

    Raises:
        ConfigError: The loss is not one of a module, or the model does not call ``head`` just once with a matrix.
    """
    if not isinstance(loss, ModuleLoss):
        raise ConfigError("an algorithm that makes the head from the support set needs the loss of a module")
    seen: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0])

    handle = loss.module.get_submodule(head).register_forward_pre_hook(keep)
    try:
        loss.predict(params, *inputs)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].ndim != 2:
        raise ConfigError(f"algorithm.head: the model must call {head!r} once, with features (examples, features)")
    return seen[0].to(params[f"{head}.weight"].dtype)  # torch.autocast may have rounded them


def one_hot(label_B: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """1 where the label is the class, else 0: (B, N). (torch's own looks at the values, which ``vmap`` forbids.)

    Raises:
        ConfigError: The targets are no class labels.
    """
    if label_B.ndim != 1 or label_B.is_floating_point():
        raise ConfigError(
            "algorithm.use: an algorithm that makes the head from the support set needs class labels as targets; the "
            f"tasks give {label_B.dtype} of shape {tuple(label_B.shape)}; take an algorithm such as maml"
        )
    return (label_B[:, None] == torch.arange(classes, device=label_B.device)).to(dtype)
