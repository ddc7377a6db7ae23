"""Pretrained encoders of texts from the library transformers: ``model: {use: "hf:SOURCE"}``."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from torch import Tensor, nn

from distmeta.core.pretrained import MISSING, locate
from distmeta.errors import ConfigError, at_least
from distmeta.models.text import Classifier, FeatureNorm, mean_of


class LowRank(nn.Module):
    """A linear layer with an update of low rank beside it, W x + b + B A x (Hu et al., "LoRA", ICLR 2022).

    A starts at N(0, 1/inputs) and B at zero, so that at first the layer is what it was.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """W x + b + B A x."""
        return self.base(x) + (x @ self.lora_a.T) @ self.lora_b.T


class PretrainedEncoder(Classifier):
    """A pretrained encoder, the mean (or first) of its last layer's states, and a linear layer ``classifier``.

    ``learned`` says what is theta, which the outer loop learns; what the inner loop moves of it says the algorithm:
    ``adapted_params: ["classifier.*"]`` is the head alone (ANIL), ``["*lora*", "classifier.*"]`` the adapters. Dropout
    is off, and attention is that without fused kernels, which have no second derivative.

    Args:
        source: A folder, ``PACKAGE:FOLDER`` inside an installed Python package, or a name of the Hugging Face hub.

    Raises:
        ConfigError: The library transformers is not installed, the model is not there, or it does not fit the tasks.
    """

    def __init__(
        self,
        source: str,
        input_shape: tuple[int, ...],
        outputs: int,
        vocabulary: int | None,
        learned: Annotated[
            Literal["all", "adapters", "head"], "what the outer loop learns; the rest stays as it was pretrained"
        ] = "all",
        adapters: Annotated[int, "rank of the adapters (LoRA); 0: none"] = 0,
        adapted_layers: Annotated[tuple[str, ...], "name patterns of the linear layers that have adapters"] = (
            "*query", "*value", "*q_proj", "*v_proj", "*q_lin", "*v_lin",
        ),
        pooling: Annotated[Literal["mean", "first"], "features: mean over the text, or its first state"] = "mean",
        feature_norm: FeatureNorm = 4.0,
    ) -> None:  # fmt: skip
        super().__init__()
        at_least("model.adapters", adapters, 0)
        if (learned == "adapters") != (adapters > 0):
            raise ConfigError(
                f"model.learned: {learned} does not go with model.adapters: {adapters}; adapters are what is learned, "
                "in place of the layers that they stand beside, where their rank is above 0"
            )
        self.encoder, config = _load(source)
        if vocabulary is None or len(input_shape) != 1:
            raise ConfigError(f"model hf:{source} needs texts; the tasks give inputs of shape {input_shape}")
        if vocabulary > config.vocab_size or input_shape[0] > getattr(config, "max_position_embeddings", 10**9):
            raise ConfigError(
                f"model hf:{source} takes {config.vocab_size} different tokens, and texts of "
                f"{getattr(config, 'max_position_embeddings', 'any number of')} of them; the tasks give {vocabulary} "
                f"and {input_shape[0]}: set tasks.tokenizer to hf:{source} and tasks.length to fewer"
            )
        self.first = pooling == "first"
        if learned != "all":
            self.encoder.requires_grad_(False)
        if adapters:
            self._add_adapters(adapters, adapted_layers)
        self.finish(config.hidden_size, outputs, feature_norm)

    def _add_adapters(self, rank: int, patterns: tuple[str, ...]) -> None:
        modules = cast(Iterable[tuple[str, nn.Module]], list(self.encoder.named_modules()))
        linear = {name: layer for name, layer in modules if isinstance(layer, nn.Linear)}
        chosen = [name for name in linear if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if not chosen:
            raise ConfigError(f"model.adapted_layers match no linear layer; they are {', '.join(linear)}")
        for name in chosen:
            self.encoder.set_submodule(name, LowRank(linear[name], rank))

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits (B, outputs)."""
        there_BL = tokens_BL >= 0
        dtype = self.classifier.weight.dtype
        # the whole mask: made from a short one, the library looks at its values, which vmap forbids
        unseen = ~there_BL[:, None, None, :]
        bias_B1LL = torch.zeros_like(unseen, dtype=dtype).masked_fill(unseen, torch.finfo(dtype).min)
        bias_B1LL = bias_B1LL.expand(-1, -1, tokens_BL.shape[1], -1)
        states_BLW = self.encoder(input_ids=tokens_BL.clamp(min=0), attention_mask=bias_B1LL).last_hidden_state
        return self.classify(states_BLW[:, 0] if self.first else mean_of(states_BLW, there_BL))


def _load(source: str) -> tuple[nn.Module, Any]:
    """The encoder in float32 with its dropout off, and its configuration."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"model hf:{source} needs the library transformers; {MISSING}") from error
    place = locate(source)
    transformers.utils.logging.disable_progress_bar()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        config = transformers.AutoConfig.from_pretrained(place)
        if config.is_encoder_decoder:
            raise ConfigError(f"model hf:{source} is no encoder alone but a {config.model_type}")
        for key, value in config.to_dict().items():
            if isinstance(value, float) and "dropout" in key:
                setattr(config, key, 0.0)
        encoder: Any = transformers.AutoModel.from_pretrained(
            place, config=config, attn_implementation="eager", dtype=torch.float32
        )
    except ConfigError:
        raise
    except Exception as error:  # the library raises many kinds, all about the model that was asked for
        what = "folder" if Path(place).is_dir() else "name"
        raise ConfigError(
            f"model hf:{source}: {what} {place} cannot be loaded: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    for module in encoder.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # it makes the gradient of one token's vector zero, wherever that token stands
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # the features are taken before it
    return encoder, config
