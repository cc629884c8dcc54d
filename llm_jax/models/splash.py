"""Attention on TPU by the Pallas splash kernel: scores are formed block by block on the chip and never written out.

Blocks that the causal mask hides are skipped. On other platforms the kernel runs in Pallas' interpreter, for tests.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llm_jax.models.remat import ATTENTION
from llm_jax.models.ring import split_alike

BLOCKS = (512, 256, 128)
"""Queries, and keys, taken at once: the largest that divides a row"""
PARTS = 8
"""Parts of the gradient of the queries, each as large as they are, that may be kept for the sake of fewer operations"""
HEAD = 64
"""Heads whose size is a multiple of it fill the lanes of the chip well enough"""


def fits(q: Any) -> bool:
    """Whether the kernel takes rows and heads of the sizes of queries (B, S, H, E).

    >>> fits(jnp.zeros((1, 256, 2, 64))), fits(jnp.zeros((1, 200, 2, 64)))
    (True, False)
    """
    return q.shape[1] % BLOCKS[-1] == 0 and q.shape[3] % HEAD == 0


def attend(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    segments: Int[Array, "B S"],
    causal: bool,
    scale: float,
    mesh: Any,
    interpret: bool = False,
) -> Float[Array, "B S H E"]:
    """softmax(scale * q k^T) v over keys of the query's segment and, if causal, of no later place; rows and heads split over the mesh, if any."""

    def each(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return _on_one(q * jnp.asarray(scale, q.dtype), k, v, segments, causal, interpret)

    if mesh.empty or mesh.size == 1:
        return each(q, k, v, segments)
    whole, k, v = split_alike(q, k, v, None, mesh)
    specs = (whole, whole, whole, PartitionSpec(whole[0]))
    return jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False)(q, k, v, segments)


def _on_one(q: Array, k: Array, v: Array, segments: Array, causal: bool, interpret: bool) -> Array:
    """The rows and heads of one device."""
    # Imported here: Pallas' TPU part is slow to load, and not there on every platform
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = q.shape[1:3]
    block = next(size for size in BLOCKS if length % size == 0)
    one = (masks.CausalMask if causal else masks.FullMask)((length, length))
    # One kernel for all three gradients forms the scores once, not twice, and keeps a part of that of q for each block of keys.
    fused = length <= PARTS * block
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", *(() if fused else ("q_dq", "kv_dq")))
    sizes: dict[str, Any] = {f"block_{name}": block for name in names}
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([one] * heads),
        block_sizes=kernels.BlockSizes(**sizes, use_fused_bwd_kernel=fused),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name=ATTENTION,
    )

    def row(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return kernel(q, k, v, kernels.SegmentIds(segments, segments))

    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
    found = jax.vmap(row)(q, k, v, segments)
    return jnp.moveaxis(found, 1, 2)
