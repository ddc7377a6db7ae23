"""ResNet-12, the residual network of few-shot learning on photographs."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmeta.errors import ConfigError, at_least

_SLOPE = 0.1  # of the leaky ReLU


class DropBlock(nn.Module):
    """In training, sets squares of neighbouring activations to zero (Ghiasi, Lin and Le, NeurIPS 2018).

    Each square of ``block`` × ``block`` positions of a channel begins with probability
    rate / block² · H W / ((H − block + 1) (W − block + 1)), so that about ``rate`` of all is dropped; what is left is
    scaled by (number of all) / (number left), example by example.
    """

    def __init__(self, rate: float, block: int) -> None:
        super().__init__()
        self.rate, self.block = rate, block

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Of the shape of ``x_BCHW``."""
        if not self.training or not self.rate:
            return x_BCHW
        batch, channels, height, width = x_BCHW.shape
        block = min(self.block, height, width)
        begins = (batch, channels, height - block + 1, width - block + 1)
        gamma = self.rate / block**2 * height * width / (begins[2] * begins[3])
        seeds = (torch.rand(begins, dtype=x_BCHW.dtype, device=x_BCHW.device) < gamma).to(x_BCHW.dtype)
        dropped = F.max_pool2d(F.pad(seeds, [block - 1] * 4), block, stride=1)
        kept = 1 - dropped
        return x_BCHW * kept * (kept[0].numel() / kept.sum((1, 2, 3), keepdim=True).clamp(min=1))


class Block(nn.Module):
    """Three 3×3 convolutions beside one of 1×1, each with batch-norm; leaky ReLU, and 2×2 max-pooling of the sum."""

    def __init__(self, channels: int, width: int, drop: nn.Module) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, width, 3, padding=1, bias=False) for inputs in (channels, width, width)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, track_running_stats=False) for _ in range(3))
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width, track_running_stats=False)
        )
        self.drop = drop

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, width, H // 2, W // 2)."""
        y = x_BCHW
        for k, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            y = norm(convolution(y if k == 0 else F.leaky_relu(y, _SLOPE)))
        return self.drop(F.max_pool2d(F.leaky_relu(y + self.shortcut(x_BCHW), _SLOPE), 2))


class ResNet12(nn.Module):
    """Four residual blocks of three convolutions, and a linear layer on the mean over positions.

    With widths 64, 160, 320 and 640 it is the network of Lee et al. ("Meta-learning with differentiable convex
    optimization", CVPR 2019), with 64, 128, 256 and 512 that of Oreshkin et al. ("TADAM", NeurIPS 2018): leaky ReLU of
    slope 0.1, a projection beside every block, max-pooling after it. Convolutions start as He et al. (2015) have it for
    this slope, fan-out; the linear layer at N(0, 0.01²) with zero bias.

    Batch-norm always normalises by the statistics of the batch at hand. DropBlock is off unless ``drop_rate`` is set;
    Lee et al. use it in the last two blocks, as here, though with a rate that grows in training, where this one stays.

    Raises:
        ConfigError: The inputs are not images, or too small for four halvings.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        outputs: int,
        widths: Annotated[
            tuple[int, int, int, int], "filters of each block: 64, 160, 320, 640 (Lee) or 64, 128, 256, 512 (Oreshkin)"
        ] = (64, 160, 320, 640),
        head: Annotated[Literal["flatten", "mean"], "what the linear layer sees of the positions left"] = "mean",
        drop_rate: Annotated[float, "DropBlock: share of the last two blocks' outputs dropped in training"] = 0.0,
        drop_block: Annotated[int, "DropBlock: side of the squares dropped"] = 5,
    ) -> None:
        super().__init__()
        for width in widths:
            at_least("model.widths", width, 1)
        at_least("model.drop_block", drop_block, 1)
        if not 0 <= drop_rate < 1:
            raise ConfigError(f"model.drop_rate must be from 0 to less than 1; given: {drop_rate}")
        if len(input_shape) != 3 or min(input_shape[1:]) < 16:
            raise ConfigError(f"model resnet12 needs images of 16x16 or more (C, H, W); the tasks give {input_shape}")
        channels = (input_shape[0], *widths[:-1])
        drops = [nn.Identity() if k < 2 else DropBlock(drop_rate, drop_block) for k in range(4)]
        self.features = nn.Sequential(*(Block(*layer) for layer in zip(channels, widths, drops, strict=True)))
        self.mean = head == "mean"
        places = (input_shape[1] // 16) * (input_shape[2] // 16)
        self.classifier = nn.Linear(widths[-1] if self.mean else widths[-1] * places, outputs)
        for layer in self.features.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, a=_SLOPE, mode="fan_out", nonlinearity="leaky_relu")
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, outputs) of images (B, C, H, W)."""
        features = self.features(x_BCHW)
        return self.classifier(features.mean((2, 3)) if self.mean else features.flatten(1))
