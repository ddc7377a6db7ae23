"""Networks of policies: from observations to the parameters of a distribution over actions."""

from __future__ import annotations

import math
from itertools import pairwise
from math import prod
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from distmeta.errors import at_least, positive

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


class MLPPolicy(nn.Module):
    """A multi-layer perceptron; for actions of numbers it gives their means, and log standard deviations of its own.

    The standard deviation is a parameter for each number of an action, the same in every state, held above ``min_std``
    (1e-6 in the MAML paper's code). Layers start Xavier-uniform with zero bias, as there; the last one is scaled to a
    tenth, so that the first actions are little but noise.

    Args:
        input_shape: Shape of an observation.
        outputs: How many numbers an action has, or how many actions there are.
        categorical: Whether an action is one of ``outputs``: their logits are then put out.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        outputs: int,
        categorical: bool = False,
        hidden: Annotated[list[int] | tuple[int, ...], "units of each hidden layer"] = (100, 100),
        activation: Annotated[Literal["tanh", "relu"], "after each hidden layer"] = "tanh",
        initial_std: Annotated[float, "standard deviation of the actions at the start"] = 1.0,
        min_std: Annotated[float, "least standard deviation of the actions"] = 1e-6,
    ) -> None:
        super().__init__()
        positive("model.initial_std", initial_std)
        positive("model.min_std", min_std)
        at_least("model.initial_std", initial_std, min_std)
        for units in hidden:
            at_least("model.hidden", units, 1)
        sizes = [prod(input_shape), *hidden]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-1], outputs)
        for layer in [*self.body, self.head]:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.head.weight.mul_(0.1)
        self.log_std = None if categorical else nn.Parameter(torch.full((outputs,), math.log(initial_std)))
        self.floor = math.log(min_std)

    def forward(self, observation: Tensor) -> Tensor:
        """Parameters (…, P) for observations (…, O): means and log standard deviations, or logits."""
        mean = self.head(self.body(observation))
        if self.log_std is None:
            return mean
        return torch.cat([mean, self.log_std.clamp(min=self.floor).expand_as(mean)], -1)
