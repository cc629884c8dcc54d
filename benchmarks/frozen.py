"""Classifiers on a frozen MiniLM that are trained in milliseconds: what it makes of all 12,808 snippets is computed once and kept.

No model made here is a simulation: its head is trained, its last MLP may be damaged, and `whole` gives it as a `Model` whose figures are those
of `probabilities`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special
from jaxtyping import Array, Float, Int

from benchmarks import arms
from llm_jax import model, sharding, tasks
from llm_jax.config import Batch, Data
from llm_jax.data.documents import open_sources
from llm_jax.data.pipeline import Loader
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import MLP, Norm
from llm_jax.transforms import new_head

FOLDER = arms.FOLDER / "gate"
SOURCE = "asset:rotten-tomatoes"
TASK = tasks.Classification(labels=("rotten", "fresh"))
STEPS, ROWS, RATE, DECAY = 600, 128, 3e-3, 1e-2
"""Steps of a head's training, snippets of a step, learning rate and weight decay of AdamW"""

Head = dict[str, Array]


@functools.cache
def encoder() -> model.Model:
    """MiniLM as it is published, with a head of zeros for two classes."""
    loaded = model.load("asset:minilm")
    made = model.transform(loaded, new_head("classification", labels=2, pooler="none"), jax.random.key(0))
    return dataclasses.replace(made, params={**made.params, "head": jax.tree.map(jnp.zeros_like, made.params["head"])})


def layer(params: Any) -> Any:
    """The MLP of the last layer and the norm after it."""
    layers = params["encoder"]["layers"]
    return jax.tree.map(lambda x: x[-1], {name: layers[name] for name in ("mlp", "mlp_norm")})


@functools.cache
def inputs() -> Float[np.ndarray, "N D"]:
    """What reaches the last MLP at the first token of each snippet."""
    path = FOLDER / "inputs.npy"
    if path.exists():
        return np.load(path)
    loaded, (source,) = encoder(), open_sources(Data(sources=(SOURCE,)))
    data = Data(sources=(SOURCE,), heldout_sources=(SOURCE,), long="truncate")
    found = np.full((len(source), loaded.config.dim), np.nan, np.float32)
    with (
        Loader([source], loaded.tokenizer, TASK, data, Batch(size=16, length=64), 0, "heldout", once=True) as loader,
        jax.set_mesh(sharding.make_mesh()),
    ):
        for rows in loader:
            first, weights = rows.batch["predict"], rows.batch["weights"] > 0
            x = np.asarray(_reaching(loaded.config, loaded.params, rows.batch))
            each = np.take_along_axis(x, first[..., None], axis=1)
            found[np.take_along_axis(rows.ids, first, axis=1)[weights]] = each[weights]
    assert not np.isnan(found).any()
    FOLDER.mkdir(parents=True, exist_ok=True)
    np.save(path, found)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _reaching(config: ModelConfig, params: Any, batch: Any) -> Float[Array, "B S D"]:
    found = transformer.apply(config, params, batch, inputs=True).inputs
    return found["encoder"]["layers"]["mlp"]["up"][-1]


@functools.partial(jax.jit, static_argnums=0)
def _vectors(config: ModelConfig, weights: Any, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
    y = x + MLP(config).apply({"params": weights["mlp"]}, x[:, None])[:, 0]
    return Norm(config).apply({"params": weights["mlp_norm"]}, y)


def vectors(weights: Any = None, chosen: Any = slice(None)) -> Float[np.ndarray, "N D"]:
    """What the head reads of each snippet, with these weights in place of the last MLP."""
    given = layer(encoder().params) if weights is None else weights
    x = inputs()[chosen]
    padded = np.pad(x, ((0, -len(x) % 1024), (0, 0)))  # so that trials, each of another number, share a compilation
    return np.asarray(_vectors(encoder().config, given, padded))[: len(x)]


@jax.jit
def train(x: Float[Array, "N D"], y: Int[Array, " N"], rows: Int[Array, "T B"], key: Array) -> Head:
    """A head trained from a random start on these rows, a batch a step, AdamW with a rate that falls to 0."""
    optimizer = optax.adamw(optax.linear_schedule(RATE, 0.0, STEPS), weight_decay=DECAY)
    head = {"classification": 0.05 * jax.random.normal(key, (x.shape[1], 2)), "classification_bias": jnp.zeros(2)}

    def step(carry: Any, chosen: Array) -> Any:
        head, state = carry

        def loss(head: Head) -> Array:
            logits = x[chosen] @ head["classification"] + head["classification_bias"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[chosen]).mean()

        updates, state = optimizer.update(jax.grad(loss)(head), state, head)
        return (optax.apply_updates(head, updates), state), None

    return jax.lax.scan(step, (head, optimizer.init(head)), rows)[0][0]


def probabilities(head: Head, x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N 2"]:
    """p(class | snippet)."""
    logits = x @ np.asarray(head["classification"]) + np.asarray(head["classification_bias"])
    return np.asarray(scipy.special.softmax(logits.astype(np.float64), axis=1))


def whole(head: Head, weights: Any = None) -> model.Model:
    """The model that a head, and the weights of a last MLP, are parts of."""
    base = encoder()
    params = {**base.params, "head": head}
    if weights is not None:
        layers = dict(params["encoder"]["layers"])
        for name, part in weights.items():
            layers[name] = jax.tree.map(lambda old, new: old.at[-1].set(new), layers[name], part)
        params["encoder"] = {**params["encoder"], "layers": layers}
    return dataclasses.replace(base, params=params)
