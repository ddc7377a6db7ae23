"""From an ``nn.Module`` and a criterion to the pure loss L_T(theta; D) that algorithms differentiate."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase  # pyright: ignore[reportPrivateUsage]

from distmeta.core.types import Batch, Metrics, Params
from distmeta.errors import ConfigError

Precision = Literal["float32", "bfloat16"]

Criterion = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Metrics]]
"""``criterion(output, target)`` gives a scalar, or a scalar and metrics."""


def cross_entropy(output_NC: Tensor, target_N: Tensor) -> tuple[Tensor, Metrics]:
    """Mean cross-entropy in nats, and ``accuracy``, the share of examples whose greatest logit is the target's."""
    accuracy = (output_NC.argmax(-1) == target_N).to(output_NC.dtype).mean()
    return F.cross_entropy(output_NC, target_N), {"accuracy": accuracy}


def mse(output: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
    """Mean squared error."""
    return F.mse_loss(output, target), {}


def token_cross_entropy(output_BTV: Tensor, target_BT: Tensor) -> tuple[Tensor, Metrics]:
    """Mean cross-entropy in nats of the tokens of all targets, which end in −1; and ``token_accuracy``."""
    there = (target_BT >= 0).to(output_BTV.dtype)
    log_probability = output_BTV.log_softmax(-1).gather(-1, target_BT.clamp(min=0)[..., None])[..., 0]
    tokens = there.sum().clamp(min=1)
    right = (output_BTV.argmax(-1) == target_BT).to(output_BTV.dtype).sum() / tokens
    return -(log_probability * there).sum() / tokens, {"token_accuracy": right}


ELEMENTWISE = (mse, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
ELEMENTWISE_MODULES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)

CRITERIA: dict[str, Criterion] = {
    "cross_entropy": cross_entropy,
    "mse": mse,
    "token_cross_entropy": token_cross_entropy,
}
"""The criteria that a configuration can name."""


def check_module(module: nn.Module) -> None:
    """Refuses layers that have no meaning in an inner loop.

    Running statistics are state that a forward pass changes: the inner loop of one task would leak into the next and
    the result would depend on which worker ran which task.

    Raises:
        ConfigError: A normalisation layer keeps running statistics.
    """
    for name, layer in cast(Iterable[tuple[str, nn.Module]], module.named_modules()):
        if isinstance(layer, _NormBase) and layer.track_running_stats:
            raise ConfigError(
                f"layer {name or '(the model)'} ({type(layer).__name__}) keeps running statistics, which an inner loop "
                "would change from task to task; build it with track_running_stats=False (statistics of the batch), "
                "or use GroupNorm or LayerNorm"
            )


def predict_alone(predict: Callable[..., Tensor], support: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """The outputs for ``inputs``, each example predicted in one batch with the support set's inputs and no other.

    Where a network normalises by batch statistics, no prediction depends then on which other examples are asked for.
    """
    rows = [
        predict(*(torch.cat([s, x[i : i + 1]]) for s, x in zip(support, inputs, strict=True)))[-1]
        for i in range(len(inputs[0]))
    ]
    return torch.stack(rows)


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether a prediction depends on the other examples of its batch, which makes evaluation transductive."""
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


class PureModule(ABC):
    """A network f as a pure function of its parameters, and the loss L_T(theta; D) of tasks that it is used for.

    Parameters with ``requires_grad=False`` are constants; all others are theta.

    With ``precision="bfloat16"`` products of matrices and convolutions round what they multiply to 8 bits
    (`torch.autocast`), backwards as well; theta, what is summed and normalised, the loss and the gradients stay as they
    are.

    Args:
        module: f, whose own parameter values are only the initial theta.
        precision: How exactly f multiplies.

    Raises:
        ConfigError: The module cannot be used in an inner loop (see `check_module`).
    """

    def __init__(self, module: nn.Module, precision: Precision = "float32") -> None:
        check_module(module)
        self.module = module
        self.precision: Precision = precision

    def init(self) -> Params:
        """The initial theta: copies of the module's trainable parameters.

        Raises:
            ConfigError: It has none.
        """
        theta = {n: tensor.detach().clone() for n, tensor in self.module.named_parameters() if tensor.requires_grad}
        if not theta:
            raise ConfigError(f"the model ({type(self.module).__name__}) has no trainable parameters to learn")
        return theta

    def constants(self) -> str:
        """A checksum of all that f depends on beside theta: frozen parameters and buffers."""
        digest = hashlib.sha256()
        fixed = [(name, tensor) for name, tensor in self.module.named_parameters() if not tensor.requires_grad]
        for name, tensor in [*fixed, *self.module.named_buffers()]:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def buffers(self) -> dict[str, tuple[Tensor, int]]:
        """The module's buffers, and how often each has been written."""
        return {name: (tensor, tensor._version) for name, tensor in self.module.named_buffers()}

    def predict(self, params: Params, *inputs: Tensor) -> Tensor:
        """f_theta(x)."""
        if self.precision == "float32":
            return functional_call(self.module, params, inputs)
        device = next(iter(params.values())).device.type
        # torch would keep rounded weights for as long as the context lasts, also those of an outer transform
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            return functional_call(self.module, params, inputs).float()

    @abstractmethod
    def __call__(self, params: Params, batch: Batch) -> tuple[Tensor, Metrics]:
        """L_T(theta; D) and metrics."""


class ModuleLoss(PureModule):
    """L_T(theta; D) = criterion(f_theta(x), y), a pure function of theta and D = (x, …, y).

    Args:
        module: f (see `PureModule`).
        criterion: From output and target to a scalar, or to a scalar and metrics.
        precision: How exactly f multiplies.
    """

    def __init__(self, module: nn.Module, criterion: Criterion, precision: Precision = "float32") -> None:
        super().__init__(module, precision)
        self.criterion = criterion
        self.classes: int | None = None

    def of_classes(self, classes: int) -> ModuleLoss:
        """The loss of a task of so many classes: the outputs beyond them are left out."""
        own = copy.copy(self)
        own.classes = classes
        return own

    def predict(self, params: Params, *inputs: Tensor) -> Tensor:
        """f_theta(x), of the task's own classes."""
        output = super().predict(params, *inputs)
        return output if self.classes is None else output[..., : self.classes]

    def __call__(self, params: Params, batch: Batch) -> tuple[Tensor, Metrics]:
        """L_T(theta; D) and metrics; ``batch`` is ``(x, …, y)``."""
        output, target = self.predict(params, *batch[:-1]), batch[-1]
        elementwise = self.criterion in ELEMENTWISE or isinstance(self.criterion, ELEMENTWISE_MODULES)
        if elementwise and output.shape != target.shape:  # which torch stretches to each other, with a warning
            raise ConfigError(
                f"the model puts out the shape {tuple(output.shape)} for targets of the shape {tuple(target.shape)}; "
                "the loss compares them element by element, and needs equal ones"
            )
        result: Any = self.criterion(output, target)
        value, metrics = cast("tuple[Any, Metrics]", result if isinstance(result, tuple) else (result, {}))
        if not isinstance(value, Tensor) or value.dim():
            given = f"the shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ConfigError(f"loss(output, target) must give a scalar tensor, or one and metrics; it gave {given}")
        return value, metrics
