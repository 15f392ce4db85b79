"""The numbers of a decoder that decide its memory and its arithmetic. They come from the model's `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.errors import ModelError


class Linear(NamedTuple):
    """One projection of a decoder layer."""

    inputs: int
    outputs: int
    bias: bool

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        return self.weights + self.outputs * self.bias


class _Family(NamedTuple):
    """Facts about a model type that are fixed in Transformers' code, not in a model's config."""

    qkv_bias: bool = False
    output_bias: bool = False
    biases_by_config: bool = False
    """Whether the config's `attention_bias` (for q, k, v and o) and `mlp_bias` decide which biases exist."""
    qk_norm: bool = False
    norms_per_layer: int = 2
    head_dim: int | None = None
    """The default if the config has none. Without it, the default is hidden size / heads."""
    tie_word_embeddings: bool = False
    """The default if the config has none."""
    upcast_norms: bool = False
    """Whether RMSNorm multiplies by its weight in float32, before the cast back."""
    gelu: bool = False


FAMILIES: Mapping[str, _Family] = {
    "mistral": _Family(),
    "llama": _Family(biases_by_config=True),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(biases_by_config=True, qk_norm=True, head_dim=128),
    "gemma": _Family(
        biases_by_config=True, head_dim=256, tie_word_embeddings=True, upcast_norms=True, gelu=True
    ),
    "gemma2": _Family(
        biases_by_config=True,
        norms_per_layer=4,
        head_dim=256,
        tie_word_embeddings=True,
        upcast_norms=True,
        gelu=True,
    ),
    "gemma3_text": _Family(
        biases_by_config=True,
        qk_norm=True,
        norms_per_layer=4,
        head_dim=256,
        tie_word_embeddings=True,
        upcast_norms=True,
        gelu=True,
    ),
}
"""By `model_type`: https://github.com/huggingface/transformers, src/transformers/models/*/modeling_*.py."""
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


class Architecture(BaseModel):
    """A decoder with gated feed-forward layers, RMSNorm and rotary positions, such as Llama."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str
    """Hub id or path, for messages."""
    model_type: str
    """Transformers' name of the architecture: `mistral`, `llama` …"""
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Whether q, k and v have a bias."""
    output_bias: bool = False
    """Whether o has a bias."""
    mlp_bias: bool = False
    sliding_window: int | None = None
    """Tokens that a layer looks back, if limited. The prediction of memory does not use it."""
    dtype: str | None = None
    """The dtype of the published weights."""

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> Architecture:
        """Build an architecture from a model's `config.json`.

        Raises:
            ModelError: the model type is not in `FAMILIES`, or the config lacks a number.
        """
        kind = str(config.get("model_type"))
        family = FAMILIES.get(kind)
        if family is None:
            raise ModelError(
                f"{name} is a `{kind}` model, and the memory of this type cannot be predicted",
                hint=f"supported types: {', '.join(FAMILIES)}",
            )
        # Without these numbers the counts would be wrong, so there is no default for them.
        if missing := [key for key in NEEDED if not isinstance(config.get(key), int)]:
            raise ModelError(
                f"the config.json of {name} has no {', '.join(missing)}",
                hint="use a model with a complete config.json",
            )
        try:
            return cls(name=name, model_type=kind, **_numbers(config, family))
        except ValidationError as error:
            first = error.errors()[0]
            raise ModelError(
                f"the config.json of {name}: `{first['loc'][0]}`: {first['msg']} (value {first['input']})",
                hint="correct the config.json, or use another model",
            ) from None

    def __copy__(self) -> Architecture:
        """Return a copy without cached properties, because `model_copy` may change the numbers they were computed from."""
        return Architecture(**self.model_dump())

    @property
    def family(self) -> _Family:
        """Facts about the model type."""
        return FAMILIES[self.model_type]

    @property
    def query_size(self) -> int:
        """Elements of a token's queries, over all heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Elements of a token's keys, and of its values. Smaller than `query_size` with grouped queries (arXiv:2305.13245)."""
        return self.num_key_value_heads * self.head_dim

    @cached_property
    def linears(self) -> Mapping[str, Linear]:
        """The projections of one layer, by the last part of their module names."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": Linear(hidden, self.query_size, self.attention_bias),
            "k_proj": Linear(hidden, self.key_value_size, self.attention_bias),
            "v_proj": Linear(hidden, self.key_value_size, self.attention_bias),
            "o_proj": Linear(self.query_size, hidden, self.output_bias),
            "gate_proj": Linear(hidden, inner, self.mlp_bias),
            "up_proj": Linear(hidden, inner, self.mlp_bias),
            "down_proj": Linear(inner, hidden, self.mlp_bias),
        }

    @property
    def norm_parameters(self) -> int:
        """Parameters of the norms of one layer."""
        return self.family.norms_per_layer * self.hidden_size + 2 * self.head_dim * self.family.qk_norm

    @cached_property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        return sum(linear.parameters for linear in self.linears.values()) + self.norm_parameters

    @cached_property
    def linear_weights(self) -> int:
        """Elements of the projections of all layers. Loading in 4 bits quantises these."""
        return self.num_hidden_layers * sum(linear.weights for linear in self.linears.values())

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Parameters of the head. 0 if it shares the embedding's weights."""
        return 0 if self.tie_word_embeddings else self.embedding_parameters

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model. Tied weights count once."""
        layers = self.num_hidden_layers * self.layer_parameters
        return layers + self.embedding_parameters + self.head_parameters + self.hidden_size


def _numbers(config: Mapping[str, Any], family: _Family) -> dict[str, Any]:
    """Return the fields of an `Architecture` from a config, with Transformers' defaults for missing keys."""
    heads = config["num_attention_heads"]
    by_config = family.biases_by_config
    attention_bias = bool(config.get("attention_bias")) if by_config else family.qkv_bias
    tied = config.get("tie_word_embeddings")
    windowed = config.get("use_sliding_window", True)
    return {
        **{key: config[key] for key in NEEDED},
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or family.head_dim or config["hidden_size"] // heads,
        "tie_word_embeddings": family.tie_word_embeddings if tied is None else tied,
        "attention_bias": attention_bias,
        "output_bias": attention_bias if by_config else family.output_bias,
        "mlp_bias": bool(config.get("mlp_bias")) if config["model_type"] == "llama" else False,
        "sliding_window": config.get("sliding_window") if windowed else None,
        "dtype": config.get("dtype") or config.get("torch_dtype"),
    }
