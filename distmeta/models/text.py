"""Small encoders of texts, trained from scratch, which classify by a linear layer ``classifier``.

Their inputs are numbers of tokens (B, L), −1 behind the end of a text. Nothing in them is random or has state, and
attention is plain matrix products, which have second derivatives (fused kernels have none).
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmeta.errors import ConfigError, at_least, positive


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., NeurIPS 2017): softmax(Q Kᵀ / √d) V for each head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"model.width must be a multiple of model.heads; given: {width} and {heads}")
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BLW: Tensor, memory_BMW: Tensor, allowed: Tensor) -> Tensor:
        """What each position of x takes from the positions of the memory that it is allowed to see.

        ``allowed`` broadcasts to (B, heads, L, M).
        """
        q, k, v = (
            layer(at).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, at in ((self.query, x_BLW), (self.key, memory_BMW), (self.value, memory_BMW))
        )
        scores_BHLM = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        # not −inf: a row that may see nothing has no softmax then
        weights = torch.where(allowed, scores_BHLM, scores_BHLM.new_tensor(-1e9)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer of a transformer, normalised before each part (Xiong et al., ICML 2020): attention to itself, to a
    memory if it is a decoder's, and two linear layers with GELU."""

    def __init__(self, width: int, heads: int, *, decoder: bool = False) -> None:
        super().__init__()
        self.norm1, self.own = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.other = (nn.LayerNorm(width), Attention(width, heads)) if decoder else (None, None)
        self.norm3 = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self, x_BLW: Tensor, allowed: Tensor, memory_BMW: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """(B, L, W) to (B, L, W); ``seen`` says of the memory what ``allowed`` says of x itself."""
        x = self.norm1(x_BLW)
        x_BLW = x_BLW + self.own(x, x, allowed)
        if self.other is not None and self.norm2 is not None:
            assert memory_BMW is not None and seen is not None
            x_BLW = x_BLW + self.other(self.norm2(x_BLW), memory_BMW, seen)
        return x_BLW + self.narrow(F.gelu(self.wide(self.norm3(x_BLW))))


def mean_of(x_BLW: Tensor, there_BL: Tensor) -> Tensor:
    """The mean over the positions that are there: (B, W)."""
    weight = there_BL.to(x_BLW.dtype)
    return (x_BLW * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1)


class Classifier(nn.Module):
    """What all encoders end in: features of a fixed length, and a linear layer on them.

    The length is what gives distances between features, and with them ProtoMAML's first logits, their size.
    """

    classifier: nn.Linear

    def finish(self, width: int, outputs: int, feature_norm: float) -> None:
        """Adds the linear layer, N(0, 0.01²) with zero bias as `distmeta.models.Conv4` has it."""
        positive("model.feature_norm", feature_norm)
        self.feature_norm = feature_norm
        self.classifier = nn.Linear(width, outputs)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def classify(self, features_BW: Tensor) -> Tensor:
        """Logits (B, outputs)."""
        return self.classifier(F.normalize(features_BW, dim=-1, eps=1e-6) * self.feature_norm)


FeatureNorm = Annotated[float, "Euclidean length that features are brought to before the linear layer"]


def embedding(input_shape: tuple[int, ...], vocabulary: int | None, width: int) -> nn.Embedding:
    """Vectors of N(0, 1/width) for each token.

    Raises:
        ConfigError: The tasks give no texts.
    """
    at_least("model.width", width, 1)
    if vocabulary is None or len(input_shape) != 1:
        raise ConfigError(
            f"the model needs texts, numbers of tokens (L,); the tasks give inputs of shape {input_shape}"
        )
    made = nn.Embedding(vocabulary, width)
    nn.init.normal_(made.weight, std=width**-0.5)
    return made


class TextCNN(Classifier):
    """Convolutions over the tokens' vectors and the maximum of each over the text (Kim, EMNLP 2014)."""

    def __init__(
        self,
        input_shape: tuple[int, ...],
        outputs: int,
        vocabulary: int | None,
        width: Annotated[int, "length of a token's vector"] = 64,
        filters: Annotated[int, "filters of each size"] = 64,
        sizes: Annotated[tuple[int, ...], "tokens that a filter sees"] = (1, 2, 3),
        feature_norm: FeatureNorm = 4.0,
    ) -> None:
        super().__init__()
        at_least("model.filters", filters, 1)
        at_least("model.sizes", min(sizes, default=0), 1)
        self.embedding = embedding(input_shape, vocabulary, width)
        # without bias, so that a filter's maximum does not depend on how much padding it sees
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, filters, size, padding=size - 1, bias=False) for size in sizes
        )
        self.finish(filters * len(sizes), outputs, feature_norm)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits (B, outputs)."""
        there_BL = tokens_BL >= 0
        x_BWL = (self.embedding(tokens_BL.clamp(min=0)) * there_BL[..., None]).transpose(1, 2)
        maxima = [F.relu(convolution(x_BWL)).amax(-1) for convolution in self.convolutions]
        return self.classify(torch.cat(maxima, -1))


class LSTM(nn.Module):
    """A long short-term memory (Hochreiter and Schmidhuber, 1997; forget gates by Gers et al., 2000), read both ways.

    For each direction, with gates (i, f, g, o) = W x_t + U h_{t−1} + b and ⊙ the product of each number:

        c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(g),   h_t = σ(o) ⊙ tanh(c_t)

    There is one bias, where torch.nn.LSTM has two that are added. It is not that layer itself, which ``vmap`` does not
    know and which has no second derivatives on a GPU: each step is plain operations, on both directions together.
    """

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        bound = units**-0.5
        self.weight_x, self.weight_h, self.bias = (
            nn.Parameter(torch.empty(2, *shape).uniform_(-bound, bound))
            for shape in ((width, 4 * units), (units, 4 * units), (1, 4 * units))
        )

    def forward(self, x_BLW: Tensor, there_BL: Tensor) -> Tensor:
        """The states h of both directions at each position: (B, L, 2 × units). Padding leaves a state as it is, and
        so the direction from right to left starts where the text ends."""
        both = lambda x: torch.stack((x, x.flip(1)))  # noqa: E731
        inputs_2BLG = both(x_BLW) @ self.weight_x[:, None] + self.bias[:, None]
        there_2BL1 = both(there_BL)[..., None]
        h = c = inputs_2BLG.new_zeros(*inputs_2BLG.shape[:2], self.weight_h.shape[1])
        states: list[Tensor] = []
        for t in range(x_BLW.shape[1]):
            i, f, g, o = (inputs_2BLG[:, :, t] + h @ self.weight_h).chunk(4, -1)
            c_t = f.sigmoid() * c + i.sigmoid() * g.tanh()
            c = torch.where(there_2BL1[:, :, t], c_t, c)
            h = torch.where(there_2BL1[:, :, t], o.sigmoid() * c_t.tanh(), h)
            states.append(h)
        forward_BLU, backward_BLU = torch.stack(states, 2)
        return torch.cat((forward_BLU, backward_BLU.flip(1)), -1)


class TextLSTM(Classifier):
    """A bidirectional LSTM over the tokens' vectors and the maximum of each of its units over the text (Conneau et al.,
    "InferSent", EMNLP 2017)."""

    def __init__(
        self,
        input_shape: tuple[int, ...],
        outputs: int,
        vocabulary: int | None,
        width: Annotated[int, "length of a token's vector"] = 64,
        units: Annotated[int, "units of each direction"] = 64,
        feature_norm: FeatureNorm = 4.0,
    ) -> None:
        super().__init__()
        at_least("model.units", units, 1)
        self.embedding = embedding(input_shape, vocabulary, width)
        self.lstm = LSTM(width, units)
        self.finish(2 * units, outputs, feature_norm)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits (B, outputs)."""
        there_BL = tokens_BL >= 0
        states_BLU = self.lstm(self.embedding(tokens_BL.clamp(min=0)), there_BL)
        # a state is between -1 and 1, so that this one is never the greatest
        maxima_BU = torch.where(there_BL[..., None], states_BLU, states_BLU.new_tensor(-2.0)).amax(1)
        return self.classify(maxima_BU)


class TextTransformer(Classifier):
    """A small transformer encoder; features are the mean over the text. With ``layers: 0`` a bag of words."""

    def __init__(
        self,
        input_shape: tuple[int, ...],
        outputs: int,
        vocabulary: int | None,
        width: Annotated[int, "length of a token's vector"] = 64,
        layers: Annotated[int, "layers; 0: the mean of the tokens' vectors"] = 1,
        heads: Annotated[int, "heads of attention"] = 4,
        feature_norm: FeatureNorm = 4.0,
    ) -> None:
        super().__init__()
        at_least("model.layers", layers, 0)
        at_least("model.heads", heads, 1)
        self.embedding = embedding(input_shape, vocabulary, width)
        self.positions = nn.Parameter(torch.randn(input_shape[0], width) * 0.1 * width**-0.5) if layers else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.finish(width, outputs, feature_norm)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits (B, outputs)."""
        there_BL = tokens_BL >= 0
        x_BLW = self.embedding(tokens_BL.clamp(min=0))
        if self.positions is not None:
            x_BLW = x_BLW + self.positions[: tokens_BL.shape[1]]
        for block in self.blocks:
            x_BLW = block(x_BLW, there_BL[:, None, None])
        return self.classify(mean_of(x_BLW, there_BL))
