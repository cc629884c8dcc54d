"""What the backward pass finds of a layer and what it computes again: one table of policies, by the names of the values they keep.

A layer's input is always found, on the device or on the host. The products of a layer are called as their weights (`layers.multiply`), what
attention gives together with the logarithms of its sums `attention`. Norms, activations, rotations and sums are always computed again.
"""

from typing import Any, NamedTuple

INPUT = "residual"
"""The residual stream where it enters a layer"""
ATTENTION = "attention"
"""What attention gives, as the splash kernel and the ring form it; elsewhere attention is computed again under every policy"""
QKV = ("query", "key", "value")
MLP = ("up", "gate")
PRODUCTS = (*QKV, "out", *MLP, "down")
"""Results of the products of a layer; where the norm comes first no gradient needs that of `down`, and it is not kept"""


class Policy(NamedTuple):
    """The values that wait for the backward pass beside a layer's input."""

    about: str
    kept: tuple[str, ...] = ()
    """in the device's memory"""
    offloaded: tuple[str, ...] = ()
    """in the host's memory; with `INPUT` among them the layer's input too"""


POLICIES: dict[str, Policy] = {
    "full": Policy("nothing: each layer is computed again from its input"),
    "attention": Policy("what attention gives, so that its kernel or ring runs once", (ATTENTION,)),
    "out": Policy("the last product of attention (MaxText: save_out_proj)", ("out",)),
    "qkv": Policy("queries, keys and values (MaxText: save_qkv_proj)", QKV),
    "mlp": Policy("the wide products of the MLP", MLP),
    "dots": Policy("every product with weights (MaxText: minimal)", PRODUCTS),
    "dots_attention": Policy("every product and what attention gives (MaxText: minimal_flash)", (*PRODUCTS, ATTENTION)),
    "offload": Policy("nothing, and the layers' inputs wait in the host's memory", offloaded=(INPUT,)),
    "offload_qkv": Policy("queries, keys and values, with the layers' inputs in the host's memory", QKV, (INPUT,)),
    "offload_dots": Policy("every product, in the host's memory like the layers' inputs", offloaded=(INPUT, *PRODUCTS)),
}
"""By the value of `ModelConfig.remat`; `none` keeps whatever a gradient needs"""

REMAT = ("none", *POLICIES)


def policy(name: str) -> Any:
    """The policy of the table for `jax.checkpoint`; of `full` None.

    >>> policy("full") is None, callable(policy("offload"))
    (True, True)
    """
    import jax  # here, since a config is read without it

    kept, offloaded = POLICIES[name].kept, POLICIES[name].offloaded
    if offloaded:
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(kept),
            names_which_can_be_offloaded=list(offloaded),
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint_policies.save_only_these_names(*kept) if kept else None


def named(x: Any, name: str) -> Any:
    """`x` under a name of the table; elsewhere than under a policy the identity."""
    import jax
    from jax.ad_checkpoint import checkpoint_name

    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), x)
