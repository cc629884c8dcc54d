"""Memory, operations and collectives of a training step by formulas, where nothing can be compiled. `plan.py` says that they are estimates.

Parameters, optimizer state and the batch are exact but for the padding to tiles: they are the shards that the rules of `sharding.py`
give. The rest follows what the step keeps and moves: gradients, what each layer saves for its backward pass, the largest working set.
The letters are those of `models/layers.py`.
"""

import dataclasses
import math
from collections import Counter
from typing import Any

import jax

from llm_jax import flops, losses, tree
from llm_jax.chips import Topology
from llm_jax.config import Run
from llm_jax.models import remat, ring, splash, transformer
from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import compute_dtype
from llm_jax.platform import target

PASSES = 12
"""Times that the scores of attention cross a TPU's memory in a step with remat, in float32; counted in a compiled step of Llama 2 7B"""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one device and one step; the fields are those of `plan.Memory` and `plan.Plan`."""

    parameters: float
    optimizer: float
    other: float
    rest: float
    flops: float
    traffic: float
    payload: dict[str, float]
    sent: dict[str, float]
    network: dict[str, float]
    host: float


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What a device holds of a slice of the batch, and how the weights are spread."""

    config: ModelConfig
    rows: float
    share: float
    """of a row's tokens that it holds: 1 without a context axis"""
    tensor: int
    fsdp: int
    data: int
    width: int
    """bytes of a value in the computation"""
    steps: int
    """in which what lies over fsdp is gathered: two where that is a torus of three dimensions (`sharding.gathers`)"""

    @property
    def stacks(self) -> list[tuple[str, int]]:
        """Sides and their depths."""
        c = self.config
        return [(side, depth) for side, depth in (("encoder", c.encoder_depth), ("decoder", c.decoder_depth)) if depth]


def step(
    run: Run, config: ModelConfig, mesh: dict[str, int], state: Any, batch: dict[str, Any], topology: Topology
) -> Estimate:
    """The estimate of one update.

    Args:
        config: the sizes after the transforms.
        mesh: the size of each axis.
        state, batch: shapes and places of what the step is called with.
        topology: over whose slices the axis data goes first.
    """
    slices = topology.slices
    chips = math.prod(mesh.values())
    rows = run.batch.size / run.batch.accumulate / mesh["data"] / mesh["fsdp"]
    width = jax.numpy.dtype(compute_dtype(config)).itemsize
    steps = 2 if len(topology.shape) == 3 and mesh["fsdp"] == topology.chips // slices else 1
    sizes = _Sizes(config, rows, 1 / mesh["context"], mesh["tensor"], mesh["fsdp"], mesh["data"], width, steps)
    lengths = {side: _length(side, config, batch) for side, _ in sizes.stacks}
    held = {name: shard_bytes(getattr(state, name), "device") for name in state._fields}
    away = shard_bytes(state, "pinned_host")
    parameters, optimizer = held.pop("params"), held.pop("opt_state")
    layers, waiting = (
        sum(_saved(sizes, lengths[side], where) * depth for side, depth in sizes.stacks) for where in ("device", "host")
    )
    backward = parameters + _cast(sizes, state.params) + max(_working(sizes, lengths[side]) for side, _ in sizes.stacks)
    # moments that lie on the host come for the update, where they meet the gradients and what they become
    brought = shard_bytes(state.opt_state, "pinned_host")
    update = brought + 2 * parameters if brought else 0.0
    rest = max(layers + max(backward, _loss(sizes, batch)), update)
    forward = flops.forward_flops(config, {name: x.shape for name, x in batch.items()})
    program = _program(sizes, forward, lengths, run.batch.size) / chips
    payload, sent, network = _collectives(sizes, state.params, lengths, run.batch.accumulate, slices)
    traffic = _traffic(sizes, state.params, parameters + optimizer, lengths, run.batch.accumulate)
    other = sum(held.values()) + shard_bytes(batch)
    return Estimate(parameters, optimizer, other, rest, program, traffic, payload, sent, network, away + waiting)


def shard_bytes(arrays: Any, memory: str = "") -> float:
    """Bytes of one device's shards, without the padding to tiles; of those in one memory where it is named: device or pinned_host."""
    total = 0.0
    for x in jax.tree.leaves(arrays):
        if memory and (x.sharding.memory_kind or "device") != memory:
            continue
        key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype)) if key else None
        each = 1 if data is None else math.prod(data.shape[x.ndim :])
        total += math.prod(x.sharding.shard_shape(x.shape)) * each * (x.dtype if data is None else data.dtype).itemsize
    return total


def _length(side: str, config: ModelConfig, batch: dict[str, Any]) -> int:
    """Tokens of a row of a side."""
    source = side == "encoder" and config.architecture == "encoder-decoder"
    return batch["encoder_tokens" if source else "tokens"].shape[1]


def _scores(sizes: _Sizes, length: int) -> float:
    """Values of the scores of one layer on a device; none where a kernel keeps them to itself."""
    if _kernel(sizes, length):
        return 0.0
    return sizes.rows * sizes.config.heads / sizes.tensor * length * sizes.share * length


def _scores_at_once(sizes: _Sizes, length: int) -> float:
    """Of them, those that a device holds at once: the ring meets the keys of one other device, a block of queries after the other."""
    if sizes.share == 1:
        return _scores(sizes, length)
    queries = length * sizes.share
    return _scores(sizes, length) * sizes.share * (ring.BLOCK / queries if queries % ring.BLOCK == 0 else 1.0)


def _kernel(sizes: _Sizes, length: int) -> bool:
    """Whether attention is a kernel's business: cuDNN's on GPU, splash on TPU."""
    c = sizes.config
    if c.dropout or target() not in ("gpu", "tpu"):
        return False
    if target() == "gpu":
        return sizes.width == 2
    rows = jax.ShapeDtypeStruct((1, length, c.heads, c.head_size), jax.numpy.bfloat16)
    return c.positions != "relative" and sizes.share == 1 and splash.fits(rows)


def _products(sizes: _Sizes) -> float:
    """Values a token of what the products of a layer give: queries, keys, values, both outputs, the MLP's hidden ones."""
    c = sizes.config
    inner = 2 if c.mlp.startswith("gated_") else 1
    return 2 * c.dim + ((c.heads + 2 * c.kv_size) * c.head_size + inner * c.mlp_size) / sizes.tensor


def _values(sizes: _Sizes, length: int) -> dict[str, float]:
    """Values a token of what a policy of `models/remat.py` may keep of a layer, by its name there."""
    c = sizes.config
    heads, kv, wide = (n / sizes.tensor for n in (c.heads * c.head_size, c.kv_size * c.head_size, c.mlp_size))
    found = {remat.INPUT: c.dim, "query": heads, "key": kv, "value": kv, "out": c.dim, "up": wide}
    if c.mlp.startswith("gated_"):
        found["gate"] = wide
    if c.norm_place == "post":  # else no gradient needs it
        found["down"] = c.dim
    if _once(sizes, length):
        found[remat.ATTENTION] = heads * (4 / sizes.width if sizes.share < 1 else 1)  # the ring's in float32
    return found


def _once(sizes: _Sizes, length: int) -> bool:
    """Whether what attention gives has a name, so that a policy may keep it: as splash and the ring form it."""
    return sizes.share < 1 or (target() == "tpu" and _kernel(sizes, length))


def _saved(sizes: _Sizes, length: int, where: str = "device") -> float:
    """Bytes that a layer keeps for its backward pass in the memory of the device or of the host."""
    c, tokens = sizes.config, sizes.rows * length * sizes.share
    if c.remat != "none":
        policy, values = remat.POLICIES[c.remat], _values(sizes, length)
        on_host = set(policy.offloaded)
        names = on_host if where == "host" else {remat.INPUT, *policy.kept} - on_host
        return sizes.width * tokens * sum(n for name, n in values.items() if name in names)
    if where == "host":
        return 0.0
    elementwise = 4 * c.dim + (c.heads * c.head_size + c.mlp_size) / sizes.tensor
    scores = _scores(sizes, length) if sizes.share == 1 else 0.0  # the ring forms them again
    return sizes.width * tokens * (_products(sizes) + elementwise) + (4 + sizes.width) * scores


def _working(sizes: _Sizes, length: int) -> float:
    """Bytes at the height of a layer's backward pass beside what all layers keep: scores, gathered weights, the values of the MLP or of the ring."""
    c, tokens = sizes.config, sizes.rows * length * sizes.share
    weights = tree.size(transformer.shapes(c.replace(vocab_size=1, layers=1, decoder_layers=0)))
    hidden = 3 * sizes.width * tokens * c.mlp_size / sizes.tensor
    gathered = sizes.width * weights / sizes.tensor if sizes.fsdp > 1 else 0.0
    heads, kv = (tokens * n * c.head_size / sizes.tensor for n in (c.heads, c.kv_size))
    # float32: what attention gives, its gradient, that of the queries; keys, values and their gradients here and on their way to the next device
    ring = 4 * 3 * heads + 2 * (4 + sizes.width) * 2 * kv if sizes.share < 1 else 0.0
    return (4 + sizes.width) * _scores_at_once(sizes, length) + max(hidden, ring) + gathered


def _cast(sizes: _Sizes, params: Any) -> float:
    """Bytes of the copy of the weights in the dtype of the computation, which XLA makes once for all layers."""
    return shard_bytes(params) / 4 * sizes.width if sizes.width < 4 else 0.0


def _loss(sizes: _Sizes, batch: dict[str, Any]) -> float:
    """Bytes of the loss over the vocabulary: a chunk of logits in float32 and its gradient, the unembedding and the gradient of it, both whole;
    of an unembedding gathered in two steps XLA makes a copy.
    """
    c = sizes.config
    if c.head not in ("lm", "mlm"):
        return 0.0
    asked = batch.get("predict", batch["tokens"]).shape[1] * sizes.rows * sizes.share
    chunk = min(losses.CHUNK * losses.HELD.get(target(), 1), asked * c.vocab_size)
    table = c.vocab_size * c.dim / sizes.tensor
    return (4 + sizes.width) * chunk / sizes.tensor + (4 + sizes.width * sizes.steps) * table


def _program(sizes: _Sizes, forward: float, lengths: dict[str, int], rows: int) -> float:
    """Operations on all devices: three times the forward pass, with the scores of the future where no kernel leaves them out, and what remat
    and attention in parts compute again.
    """
    c = sizes.config
    width = c.heads * c.head_size
    full = sum(4 * rows * lengths[side] ** 2 * width * depth for side, depth in sizes.stacks)
    kernel = all(_kernel(sizes, length) for length in lengths.values())
    whole = forward + (full / 2 if c.architecture == "decoder" and not kernel else 0.0)
    again = 0.0
    if c.remat != "none":  # but for each layer's last product, which no gradient needs, and what is kept
        tokens = sum(rows * lengths[side] * depth for side, depth in sizes.stacks)
        head = 2 * rows * lengths[sizes.stacks[-1][0]] * c.vocab_size * c.dim if c.head in ("lm", "mlm") else 0.0
        again = whole - head - 2 * tokens * c.mlp_size * c.dim
        policy = remat.POLICIES[c.remat]
        found = {*policy.kept, *policy.offloaded} & _values(sizes, max(lengths.values())).keys() - {remat.INPUT, "down"}
        if remat.ATTENTION in found:
            found.remove(remat.ATTENTION)
            again -= full / 2 if c.architecture == "decoder" and kernel else full
        products = {"query": width, "out": width, "key": c.kv_size * c.head_size, "value": c.kv_size * c.head_size}
        again -= 2 * tokens * c.dim * sum(products.get(name, c.mlp_size) for name in found)
    if kernel or sizes.share < 1:  # the gradient of the scores forms them again
        again += full / (4 if c.architecture == "decoder" and kernel else 2)
    return 3 * whole + again


def _collectives(
    sizes: _Sizes, params: Any, lengths: dict[str, int], turns: int, slices: int
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Weights gathered for each pass, gradients summed, activations summed over the tensor axis; payload and sent bytes by kind, within a slice
    and between slices.

    Gradients cross between slices once they are summed within each, a part of them by each device.

    Args:
        turns: slices of the batch.
    """
    c = sizes.config
    count = tree.size(params) / sizes.tensor
    payload: Counter[str] = Counter()
    sent: Counter[str] = Counter()

    def add(kind: str, size: float, devices: int, factor: int = 1) -> None:
        if devices > 1:
            payload[kind] += size / (devices if kind == "reduce-scatter" else 1)  # type: ignore[assignment]
            sent[kind] += factor * size * (devices - 1) / devices  # type: ignore[assignment]

    passes = turns * 2  # forward, and again for the backward pass
    add("all-gather", passes * sizes.width * count, sizes.fsdp)
    add("reduce-scatter", turns * sizes.width * count, sizes.fsdp)
    table = c.vocab_size * c.dim / sizes.tensor if c.head in ("lm", "mlm") else 0.0
    products = count - (1 if c.tie_embeddings else 2) * table
    # Of what is looked up in the table in float32; of what is predicted as of the products where the table is split
    predicted = sizes.width if sizes.fsdp > 1 else 4
    within, gradient = sizes.data // slices, turns * (sizes.width * products + (4 + predicted) * table) / sizes.fsdp
    add("all-reduce", gradient, within, 2)
    network = {"all-reduce": 2 * gradient / within * (slices - 1) / slices} if slices > 1 else {}
    sums = turns * (4 if c.remat == "none" else 6)
    for side, depth in sizes.stacks:
        tokens = sizes.rows * lengths[side] * sizes.share
        add("all-reduce", sums * depth * sizes.width * tokens * c.dim, sizes.tensor, 2)
    return dict(payload), dict(sent), network


def _traffic(sizes: _Sizes, params: Any, state: float, lengths: dict[str, int], slices: int) -> float:
    """Bytes to and from the device's memory: the state read and written, gathered weights, activations of each pass, scores."""
    c = sizes.config
    passes = 3 if c.remat == "none" else 4
    weights = passes * 2 * sizes.width * tree.size(params) / sizes.tensor
    total = 0.0
    for side, depth in sizes.stacks:
        tokens = sizes.rows * lengths[side] * sizes.share
        values = _products(sizes) + 4 * c.dim + c.mlp_size / sizes.tensor
        total += depth * (2 * passes * sizes.width * tokens * values + 4 * PASSES * _scores(sizes, lengths[side]))
    return 2 * state + slices * (weights + total)
