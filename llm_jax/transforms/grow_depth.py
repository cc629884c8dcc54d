"""More layers: a deeper model, whose layers are copies of those it had."""

import re

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from llm_jax import tree
from llm_jax.errors import ConfigError, choose
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Params
from llm_jax.transforms.base import Change, Growth, Transform, removed, take

HOW = ("stack", "interleave", "zero")
LAST = r".*/(out|down)(_bias|_lora_b)?"
"""The last products of the residual branches: where they are zero, a layer adds nothing."""


def origins(old: int, new: int, how: str) -> Int[np.ndarray, " L"]:
    """Of each new layer the old one that it copies.

    >>> origins(2, 5, "stack").tolist(), origins(2, 5, "interleave").tolist()
    ([0, 1, 0, 1, 0], [0, 0, 0, 1, 1])
    """
    each = np.arange(new)
    return each % old if how == "stack" else each * old // new


def grow_depth(layers: int, *, decoder_layers: int = 0, how: str = "stack") -> Transform:
    """Layer i of the deeper stack is a copy of layer i mod L, or of layer i L // L'.

    stack repeats the stack as a whole (Gong et al. 2019, section 3); interleave puts the copies of a layer beside it; zero does so with
    copies that add nothing at first, since the last product of each of their branches is zero, so that the function is kept exactly
    (LLaMA Pro; Wu et al. 2024, section 3.2). That takes a pre-norm model: in a post-norm one a branch of zero still normalises, and
    norm(x) is x only where the norm before it has equal scales and no bias. Copies of pruned weights are pruned.

    Moments: the copies of a layer begin with those of the layer. Under zero their first moments are zero, as is at first the gradient of
    all but their last products; second moments are those of the layer even so, lest the first steps be larger than the rule's.

    Args:
        layers: of the stack, and of the encoder in an encoder-decoder.
        decoder_layers: of the decoder in an encoder-decoder; 0 for as many as it has.
        how: stack, interleave or zero.

    Raises:
        ConfigError: fewer layers than there are, a decoder's layers where there is none beside an encoder, or zero in a post-norm model.
    """
    choose("how", how, HOW)
    if layers < 1 or decoder_layers < 0:
        raise ConfigError(f"grow_depth(layers={layers}, decoder_layers={decoder_layers}): layers must be at least 1")

    def stacks(sizes: ModelConfig) -> dict[str, tuple[int, int]]:
        """(layers before, layers after) of each stack."""
        both = sizes.architecture == "encoder-decoder"
        if decoder_layers and not both:
            raise ConfigError(f"grow_depth: decoder_layers is for an encoder-decoder, not for a {sizes.architecture}")
        found = {"encoder": (sizes.encoder_depth, layers), "decoder": (sizes.decoder_depth, layers)}
        if both:
            found["decoder"] = (sizes.decoder_depth, decoder_layers or sizes.decoder_depth)
        found = {side: depths for side, depths in found.items() if depths[0]}
        for side, (old, new) in found.items():
            if new < old:
                raise ConfigError(f"grow_depth: {new} layers are fewer than the {old} of the {side}: shrink takes away")
            if new > old and how == "zero" and sizes.norm_place == "post":
                raise ConfigError(
                    "grow_depth(how='zero') does not keep the function of a post-norm model: a layer that adds nothing still "
                    "normalises; say how='stack' or how='interleave'"
                )
        return found

    def config(sizes: ModelConfig) -> ModelConfig:
        depth = stacks(sizes).get("decoder", (0, 0))[1]
        made = sizes.replace(layers=layers)
        return made if made.decoder_depth == depth else made.replace(decoder_layers=depth)

    def grown(blank: str = "") -> Change:
        """Leaves of layers copied; in copies those whose path `blank` matches are zero, -0 but where a pruned weight is copied (`base.removed`)."""

        def change(sizes: ModelConfig, params: Params, key: Array) -> Params:
            depths = stacks(sizes)

            def leaf(name: str, x: Array) -> Array:
                side, _, rest = name.partition("/")
                old, new = depths.get(side, (0, 0)) if rest.startswith("layers/") else (0, 0)
                if new == old:
                    return x
                index = origins(old, new, how)
                x = take(x, index, axis=0)
                if not re.fullmatch(blank, name):
                    return x
                copy = np.append(False, index[1:] == index[:-1]).reshape(-1, *(1,) * (x.ndim - 1))
                return jnp.where(copy & ~removed(x), -0.0, x).astype(x.dtype)

            return tree.map_with_name(leaf, params)

        return change

    zero = how == "zero"
    growth = Growth(grown(LAST if zero else ""), grown(".*" if zero else ""), grown())
    told = [str(layers), *([f"decoder_layers={decoder_layers}"] if decoder_layers else []), f"how={how!r}"]
    return Transform(config=config, params=growth, label=f"grow_depth({', '.join(told)})")
