"""The convolutional network that few-shot image classification is measured with."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from distmeta.errors import ConfigError, at_least
from distmeta.models.fused import conv2d, norm_relu_pool


class ConvBlock(nn.Module):
    """3×3 convolution, batch-norm by the statistics of the batch at hand, ReLU, and ``window`` × ``window`` pooling.

    ``conv`` and ``norm`` hold parameters; they are not called themselves, and neither are hooks on them.
    """

    def __init__(self, channels: int, filters: int, stride: int, window: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, filters, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(filters, track_running_stats=False)
        self.stride, self.window = stride, window

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, filters, H', W') of images or features (B, channels, H, W)."""
        y_BCHW = conv2d(x_BCHW, self.conv.weight, self.stride, padding=1)
        return norm_relu_pool(y_BCHW, self.norm.weight, self.norm.bias, self.norm.eps, self.window)


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
        stride, window = (2, 1) if downsample == "stride" else (1, 2)
        channels = (input_shape[0], filters, filters, filters)
        self.features = nn.Sequential(*(ConvBlock(inputs, filters, stride, window) for inputs in channels))
        self.mean = head == "mean"
        height, width = self.features(torch.zeros(2, *input_shape)).shape[2:]
        self.classifier = nn.Linear(filters if self.mean else filters * height * width, outputs)
        for layer in self.features.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, outputs) of images (B, C, H, W)."""
        features = self.features(x_BCHW)
        return self.classifier(features.mean((2, 3)) if self.mean else features.flatten(1))
