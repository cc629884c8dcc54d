"""What a model is asked: the next token, a masked token, a class, or the span of an answer. One head a config."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import ACTIVATIONS, Norm, contract, dropout, parameter
from llm_jax.sharding import constrain


class Outputs(NamedTuple):
    """What a forward pass gives. Logits over the vocabulary are `hidden @ kernel.T + bias`: losses take them in chunks from these."""

    hidden: Float[Array, "B S D"]
    """last hidden state as the head reads it; (B, M, D) where the batch names M positions to predict"""
    logits: Array | None
    """(B, S, V), (B, M, V), (B, labels), (B, M, labels) or (B, S, 2), by the head and by whether the batch names M positions"""
    kernel: Float[Array, "V D"] | None = None
    bias: Float[Array, " V"] | None = None
    hidden_states: Float[Array, "L B S D"] | None = None
    """the residual stream after each layer of the last stack, on request"""
    attentions: Float[Array, "L B H S T"] | None = None
    """weights of self-attention in the last stack, on request"""
    cache: Any = None
    inputs: Any = None
    """what each weight of a product in the layers is multiplied with, (L, B, S, ...) under the path of the weight, on request"""


class Head(nn.Module):
    """Maps the last hidden state to logits, as `config.head` says."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        table: Float[Array, "V D"] | None,
        batch: dict[str, Any],
        logits: bool = True,
        key: Array | None = None,
    ) -> Outputs:
        c = self.config
        pooled = self.pool(x, batch) if c.pooler != "none" else None
        if c.head == "none":
            return Outputs(x, pooled)
        if c.head in ("lm", "mlm"):
            return self.vocabulary(x, table, batch, logits)
        if c.head == "span":
            return Outputs(x, self.product("span", x, 2))
        first = pooled if pooled is not None else self.summary(x, batch)
        return Outputs(x, self.product("classification", dropout(first, c.dropout, key), c.labels))

    def product(self, name: str, x: Float[Array, "... D"], labels: int) -> Float[Array, "... C"]:
        """x W + b in float32; a decoder's class scores have no b (Llama, GPT-2)."""
        kernel = parameter(self, name, (self.config.dim, labels), ("embed", "labels"))
        y = jnp.einsum("...d,dc->...c", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        if name == "span" or self.config.architecture != "decoder":
            y = y + parameter(self, f"{name}_bias", (labels,), ("labels",), value=0.0)
        return y

    def summary(self, x: Float[Array, "B S D"], batch: dict[str, Any]) -> Float[Array, "B D"] | Float[Array, "B M D"]:
        """The first token of an encoder, the last real token of a decoder; those of M examples a row where `predict` says where each begins."""
        encoder, segments, first = self.config.architecture == "encoder", batch.get("segments"), batch.get("predict")
        if first is None:
            if encoder or segments is None:
                return x[:, 0]
            last = jnp.sum(segments > 0, axis=1) - 1
            return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        if not encoder:
            assert segments is not None
            own = jnp.take_along_axis(segments, first, axis=1)
            first = jnp.max(jnp.where(segments[:, None] == own[..., None], jnp.arange(x.shape[1]), 0), axis=-1)
        return jnp.take_along_axis(x, first[..., None], axis=1)

    def pool(self, x: Float[Array, "B S D"], batch: dict[str, Any]) -> Float[Array, "B D"] | Float[Array, "B M D"]:
        """act(x_first W + b) (BERT, section 3.1)."""
        c = self.config
        kernel = parameter(self, "pooler", (c.dim, c.dim), ("embed", "hidden"), fan_in=c.dim)
        bias = parameter(self, "pooler_bias", (c.dim,), ("hidden",), value=0.0)
        x = self.summary(x, batch)
        return ACTIVATIONS[c.pooler](contract(x, kernel) + bias.astype(x.dtype))

    def vocabulary(
        self, x: Float[Array, "B S D"], table: Float[Array, "V D"] | None, batch: dict[str, Any], logits: bool
    ) -> Outputs:
        """Logits over the vocabulary, at the positions to predict where the batch names them."""
        c = self.config
        if batch.get("predict") is not None:
            x = jnp.take_along_axis(x, batch["predict"][..., None], axis=1)
        if c.head == "mlm":
            dense = parameter(self, "dense", (c.dim, c.dim), ("embed", "hidden"), fan_in=c.dim)
            x = contract(x, dense) + parameter(self, "dense_bias", (c.dim,), ("hidden",), value=0.0).astype(x.dtype)
            x = Norm(c, name="norm")(ACTIVATIONS[c.mlp.removeprefix("gated_")](x))
        if c.logits_scale and c.tie_embeddings:
            x = x * c.dim**-0.5
        assert table is not None or not c.tie_embeddings
        kernel: Any = (
            table if c.tie_embeddings else parameter(self, "kernel", (c.vocab_size, c.dim), ("vocab", "embed"))
        )
        bias = None
        if c.head == "mlm" or c.logits_bias:
            bias = parameter(self, "bias", (c.vocab_size,), ("vocab",), value=0.0)
        out = None
        if logits:
            out = jnp.einsum("bsd,vd->bsv", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
            out = constrain(out if bias is None else out + bias, "batch", "length", "vocab")
        return Outputs(x, out, kernel, bias)
