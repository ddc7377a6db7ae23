"""Small reference networks of the papers.

A model that a configuration can name is a class taking ``input_shape`` and ``outputs`` (and ``vocabulary``, if it is
for texts; see `distmeta.core.types.TaskSpec`) and settings of its own.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Annotated

from torch import Tensor, nn

from distmeta.models.conv import Conv4
from distmeta.models.policy import MLPPolicy
from distmeta.models.pretrained import PretrainedEncoder
from distmeta.models.resnet import ResNet12
from distmeta.models.text import TextCNN, TextLSTM, TextTransformer
from distmeta.models.translation import Seq2Seq


class MLP(nn.Module):
    """A multi-layer perceptron with ReLU; two layers of 40 for the sinusoid (Finn et al., 2017, section 5.1)."""

    def __init__(
        self,
        input_shape: tuple[int, ...],
        outputs: int,
        hidden: Annotated[list[int] | tuple[int, ...], "units of each hidden layer"] = (40, 40),
    ) -> None:
        super().__init__()
        sizes = [prod(input_shape), *hidden, outputs]
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (B, outputs) of inputs (B, *input_shape)."""
        return self.layers(x)


MODELS: dict[str, type[nn.Module]] = {
    "conv4": Conv4,
    "hf:": PretrainedEncoder,
    "mlp": MLP,
    "policy": MLPPolicy,
    "resnet12": ResNet12,
    "seq2seq": Seq2Seq,
    "text-cnn": TextCNN,
    "text-lstm": TextLSTM,
    "text-transformer": TextTransformer,
}
"""The models that a configuration can name; ``hf:`` stands before the name of a pretrained one."""
