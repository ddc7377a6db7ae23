"""A small transformer from one sequence of tokens to another."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from distmeta.errors import at_least
from distmeta.models.text import Block, embedding


class Seq2Seq(nn.Module):
    """Encoder and decoder (Vaswani et al., NeurIPS 2017), normalised before each part, with one matrix of token vectors
    for sources, targets and outputs (Press & Wolf, EACL 2017) and learned positions."""

    def __init__(
        self,
        input_shape: tuple[int, ...],
        outputs: int,
        vocabulary: int | None,
        width: Annotated[int, "length of a token's vector"] = 128,
        layers: Annotated[int, "layers of the encoder, and of the decoder"] = 2,
        heads: Annotated[int, "heads of attention"] = 4,
    ) -> None:
        super().__init__()
        at_least("model.layers", layers, 1)
        at_least("model.heads", heads, 1)
        self.embedding = embedding(input_shape, vocabulary, width)
        self.source_positions, self.target_positions = (
            nn.Parameter(torch.randn(input_shape[0], width) * width**-0.5) for _ in range(2)
        )
        self.encoder = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.decoder = nn.ModuleList(Block(width, heads, decoder=True) for _ in range(layers))
        self.source_norm, self.target_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, source_BL: Tensor, prefix_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of the token that follows each of the first T tokens of the target; T is at most L."""
        there_BL = (source_BL >= 0)[:, None, None]
        x_BLW = self.embedding(source_BL.clamp(min=0)) + self.source_positions[: source_BL.shape[1]]
        for block in self.encoder:
            x_BLW = block(x_BLW, there_BL)
        memory_BLW = self.source_norm(x_BLW)
        steps = prefix_BT.shape[1]
        past_TT = torch.ones(steps, steps, dtype=torch.bool, device=prefix_BT.device).tril()
        y_BTW = self.embedding(prefix_BT.clamp(min=0)) + self.target_positions[:steps]
        for block in self.decoder:
            y_BTW = block(y_BTW, past_TT, memory_BLW, there_BL)
        return self.target_norm(y_BTW) @ self.embedding.weight.T
