"""The sizes and choices that define a Transformer of any family. Plain data: no arrays, no flax, no defaults of a family."""

import dataclasses
import re
from typing import Any

from llm_jax.errors import ConfigError, choose, suggest
from llm_jax.models.remat import REMAT

ARCHITECTURES = ("encoder", "decoder", "encoder-decoder")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
MLPS = ACTIVATIONS + tuple(f"gated_{name}" for name in ACTIVATIONS)
POSITIONS = ("none", "sinusoidal", "sinusoidal_split", "learned", "rotary", "relative")
HEADS = ("none", "lm", "mlm", "classification", "span")
LORA_TARGETS = ("(attention|cross)/(query|value)",)
"""The products that Hu et al. 2021 adapt (section 4.2)"""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the parameter tree and the forward pass of a Transformer.

    The presets of `llm_jax.models.presets` are points of this space. Letters in comments are those of the array annotations.

    >>> ModelConfig(dim=64, heads=4).head_size
    16
    """

    architecture: str = "decoder"
    """encoder, decoder or encoder-decoder"""
    vocab_size: int = 32000
    """V: entries of the embedding table"""
    max_length: int = 1024
    """longest row; rows of the table when positions are learned"""
    layers: int = 6
    """L: layers of the stack, and of the encoder in an encoder-decoder"""
    decoder_layers: int = 0
    """layers of the decoder in an encoder-decoder; 0 for as many as the encoder has"""
    dim: int = 384
    """D: width of the residual stream"""
    heads: int = 6
    """H: query heads"""
    kv_heads: int = 0
    """K: key-value heads, a divisor of heads; 0 for as many as query heads"""
    head_dim: int = 0
    """E: size of a head; 0 for dim / heads"""
    mlp_dim: int = 0
    """F: width of the hidden layer of the MLP; 0 for 4 * dim"""
    mlp: str = "gelu_tanh"
    """relu, gelu, gelu_tanh or silu, each also gated_: act(x W) * (x U)"""
    norm: str = "layer"
    """layer or rms"""
    norm_place: str = "pre"
    """pre: x + f(norm(x)), with a last norm; post: norm(x + f(x))"""
    norm_epsilon: float = 1e-5
    """added to the variance"""
    positions: str = "rotary"
    """none, sinusoidal, sinusoidal_split (sines before cosines, as in Marian), learned, rotary or relative (buckets of T5)"""
    position_offset: int = 0
    """learned: rows of the table before that of the first token; 2 in RoBERTa"""
    rotary_base: float = 10000.0
    """rotary: base of the wavelengths"""
    relative_buckets: int = 32
    """relative: number of buckets of distance"""
    relative_distance: int = 128
    """relative: distance from which all share the last bucket"""
    bias: str = "none"
    """none, qkv (those three products) or all (every product and, with norm=layer, every norm)"""
    qk_norm: bool = False
    """RMS-normalise each head of queries and keys"""
    attention_scale: bool = True
    """divide the scores by sqrt(E)"""
    tie_embeddings: bool = True
    """the unembedding is the embedding table"""
    embedding_scale: bool = False
    """multiply token embeddings by sqrt(D)"""
    embedding_norm: bool = False
    """normalise the sum of the embeddings"""
    logits_scale: bool = False
    """multiply the last hidden state by 1/sqrt(D) before the unembedding"""
    logits_bias: bool = False
    """add a learned bias to the logits"""
    token_types: int = 0
    """entries of the token-type table"""
    head: str = "lm"
    """none, lm, mlm, classification or span"""
    pooler: str = "none"
    """none, tanh or relu: a dense layer over the first token"""
    labels: int = 2
    """classes of the classification head"""
    patch_size: int = 0
    """pixels along a side of a patch; 0 for no images"""
    image_size: int = 224
    """pixels along a side of an image"""
    dropout: float = 0.0
    """rate on embeddings, attention weights and branch outputs while training"""
    dtype: str = "auto"
    """dtype of the computation: auto is bfloat16 on TPU and GPU, float32 on CPU"""
    remat: str = "none"
    """what the backward pass computes again: none, full (each layer), or less, or with values on the host, by a name of `models/remat.py`"""
    lora_rank: int = 0
    """R: rank of the factors beside some weights of the layers; 0 for none"""
    lora_alpha: float = 16.0
    """their product is multiplied by alpha / R"""
    lora_rank_stabilised: bool = False
    """by alpha / sqrt(R) instead"""
    lora_targets: tuple[str, ...] = LORA_TARGETS
    """regexes of the weights that have factors beside them, by their path in a layer, such as mlp/up"""
    lora_dropout: float = 0.0
    """rate on what the factors read, and not on what the weight beside them reads, while training"""

    def __post_init__(self):
        choose("architecture", self.architecture, ARCHITECTURES)
        choose("mlp", self.mlp, MLPS)
        choose("norm", self.norm, ("layer", "rms"))
        choose("norm_place", self.norm_place, ("pre", "post"))
        choose("positions", self.positions, POSITIONS)
        choose("bias", self.bias, ("none", "qkv", "all"))
        choose("head", self.head, HEADS)
        choose("pooler", self.pooler, ("none", "tanh", "relu"))
        choose("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        choose("remat", self.remat, REMAT)
        for name in ("vocab_size", "max_length", "layers", "dim", "heads", "labels", "image_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}: it must be at least 1")
        for name in (
            "decoder_layers",
            "kv_heads",
            "head_dim",
            "mlp_dim",
            "token_types",
            "patch_size",
            "position_offset",
            "lora_rank",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.{name} is {getattr(self, name)}: it must not be negative")
        if not self.head_dim and self.dim % self.heads:
            raise ConfigError(
                f"model.dim {self.dim} is not a multiple of model.heads {self.heads}; or set model.head_dim"
            )
        if self.heads % self.kv_size:
            raise ConfigError(f"model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}")
        if self.positions == "rotary" and self.head_size % 2:
            raise ConfigError(f"rotary positions need an even head size, not {self.head_size}")
        if self.positions.startswith("sinusoidal") and self.dim % 2:
            raise ConfigError(f"sinusoidal positions need an even model.dim, not {self.dim}")
        if self.positions == "relative" and (
            self.relative_buckets < 4 or self.relative_distance <= self.relative_buckets // 2
        ):
            raise ConfigError(
                f"relative positions need at least 4 buckets, not {self.relative_buckets}, and a distance of more than half of "
                f"them, not {self.relative_distance}"
            )
        for name in ("dropout", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}: it must lie in [0, 1)")
        if self.patch_size and self.image_size % self.patch_size:
            raise ConfigError(
                f"model.image_size {self.image_size} is not a multiple of model.patch_size {self.patch_size}"
            )
        if self.head == "mlm" and self.architecture != "encoder":
            raise ConfigError(f"the mlm head is for an encoder, not for a {self.architecture}")
        self._check_lora()

    def _check_lora(self) -> None:
        """Make a tuple of the targets, which JSON gives back as a list, and raise for one that matches nothing."""
        given: Any = self.lora_targets
        targets = (given,) if isinstance(given, str) else tuple(given)
        object.__setattr__(self, "lora_targets", targets)
        if not self.lora_rank:
            return
        if not 0 < self.lora_alpha < float("inf"):
            raise ConfigError(f"model.lora_alpha is {self.lora_alpha}: it must be above 0 and finite")
        if not targets:
            raise ConfigError("model.lora_targets is empty: name the weights of the layers that get factors")
        for regex in targets:
            try:
                found = any(re.fullmatch(regex, path) for path in self.products)
            except re.error as e:
                raise ConfigError(f"model.lora_targets has {regex!r}, which is no regex: {e}") from e
            if not found:
                raise ConfigError(f"model.lora_targets {regex!r} matches no weight{suggest(regex, self.products)}")

    @property
    def head_size(self) -> int:
        """E: the size of a head."""
        return self.head_dim or self.dim // self.heads

    @property
    def kv_size(self) -> int:
        """K: the number of key-value heads."""
        return self.kv_heads or self.heads

    @property
    def mlp_size(self) -> int:
        """F: the width of the hidden layer of the MLP."""
        return self.mlp_dim or 4 * self.dim

    @property
    def decoder_depth(self) -> int:
        """The number of layers of the decoder; 0 in an encoder."""
        return {"encoder": 0, "decoder": self.layers, "encoder-decoder": self.decoder_layers or self.layers}[
            self.architecture
        ]

    @property
    def encoder_depth(self) -> int:
        """The number of layers of the encoder; 0 in a decoder."""
        return 0 if self.architecture == "decoder" else self.layers

    @property
    def products(self) -> tuple[str, ...]:
        """The weights of products in a layer, by their path in it."""
        attentions = ("attention", "cross") if self.architecture == "encoder-decoder" else ("attention",)
        gate = ("mlp/gate",) if self.mlp.startswith("gated_") else ()
        heads = (f"{attention}/{name}" for attention in attentions for name in ("query", "key", "value", "out"))
        return (*heads, "mlp/up", *gate, "mlp/down")

    @property
    def drops(self) -> bool:
        """Whether training drops anything at random."""
        return self.dropout > 0 or (self.lora_rank > 0 and self.lora_dropout > 0)

    @property
    def lora_scale(self) -> float:
        """alpha / R, or alpha / sqrt(R) (rank-stabilised; Kalajdzievski 2023, section 4)."""
        return self.lora_alpha / (self.lora_rank**0.5 if self.lora_rank_stabilised else self.lora_rank)

    def adapted(self, path: str) -> bool:
        """Whether the weight of this path in a layer has factors of low rank beside it.

        >>> ModelConfig(lora_rank=4).adapted("attention/value"), ModelConfig().adapted("attention/value")
        (True, False)
        """
        return self.lora_rank > 0 and any(re.fullmatch(regex, path) for regex in self.lora_targets)

    @property
    def patches(self) -> int:
        """The number of patches of an image; 0 for a model of text."""
        return (self.image_size // self.patch_size) ** 2 if self.patch_size else 0

    def replace(self, **changes) -> "ModelConfig":
        """A copy with other values."""
        return dataclasses.replace(self, **changes)
