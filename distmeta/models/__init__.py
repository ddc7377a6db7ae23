"""Small reference networks of the papers.

A model that a configuration can name is a class taking ``input_shape`` and ``outputs`` (and ``vocabulary``, if it is
for texts; see `distmeta.core.types.TaskSpec`) and settings of its own.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from distmeta.errors import ConfigError, at_least
from distmeta.models.policy import MLPPolicy
from distmeta.models.pretrained import PretrainedEncoder
from distmeta.models.text import TextCNN, TextTransformer
from distmeta.models.translation import Seq2Seq


class Conv4(nn.Module):
    """Four 3×3 convolutions, each followed by batch-norm and ReLU, and a linear layer.

    ``downsample="pool"`` is the network of Vinyals et al. (2016): stride 1 and 2×2 max-pooling. ``"stride"`` is that
    of the MAML and Reptile papers for Omniglot: stride 2 and no pooling. ``head="mean"`` averages over the positions
    left before the linear layer, as MAML's code does; ``"flatten"`` keeps them, as Reptile's does.

    Batch-norm always normalises by the statistics of the batch at hand, in training and in evaluation, as both papers'
    code does. Convolutions start Xavier-uniform and the linear layer at N(0, 0.01²) with zero bias, as in MAML's code.
    They have no bias, which batch-norm would subtract again. Padding is symmetric, where TensorFlow's "SAME" pads an
    even image on one side only.

    Raises:
        ConfigError: The inputs are not images, or too small for four halvings.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        outputs: int,
        filters: Annotated[int, "filters of each convolution"] = 64,
        downsample: Annotated[Literal["pool", "stride"], "2x2 max-pooling or stride 2"] = "stride",
        head: Annotated[Literal["flatten", "mean"], "what the linear layer sees of the positions left"] = "mean",
    ) -> None:
        super().__init__()
        at_least("model.filters", filters, 1)
        if len(input_shape) != 3 or min(input_shape[1:]) < 16:
            raise ConfigError(f"model conv4 needs images of 16x16 or more (C, H, W); the tasks give {input_shape}")
        stride = 2 if downsample == "stride" else 1
        blocks: list[nn.Module] = []
        for channels in (input_shape[0], filters, filters, filters):
            blocks.append(nn.Conv2d(channels, filters, 3, stride=stride, padding=1, bias=False))
            blocks.append(nn.BatchNorm2d(filters, track_running_stats=False))
            blocks.append(nn.ReLU())
            if downsample == "pool":
                blocks.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*blocks)
        self.mean = head == "mean"
        height, width = self.features(torch.zeros(2, *input_shape)).shape[2:]
        self.classifier = nn.Linear(filters if self.mean else filters * height * width, outputs)
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, outputs) of images (B, C, H, W)."""
        features = self.features(x_BCHW)
        return self.classifier(features.mean((2, 3)) if self.mean else features.flatten(1))


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
    "seq2seq": Seq2Seq,
    "text-cnn": TextCNN,
    "text-transformer": TextTransformer,
}
"""The models that a configuration can name; ``hf:`` stands before the name of a pretrained one."""
