"""A new task for a trained model: its head replaced by a fresh one."""

from collections.abc import Sequence

from jaxtyping import Array

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import ConfigError
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Params
from llm_jax.transforms.base import Transform
from llm_jax.transforms.extend_vocabulary import Pieces, means

POOLER = ("pooler", "pooler_bias")


def new_head(head: str, labels: int = 0, pooler: str = "", *, words: Sequence[str] = ()) -> Transform:
    """Embeddings and layers as they are, under a fresh head; a pooler that was trained is kept.

    With words, a language model is asked for a class as it would be for the next token: its scores begin as the logits of the classes' words
    (verbalizers; Schick & Schütze 2021, section 3.1), at the end of a template that leads up to them (`Classification.template`).

    Args:
        head: none, lm, mlm, classification or span.
        labels: classes of a classification head; 0 for as many as there are words, else for as many as the config states.
        pooler: none, tanh or relu; empty for the model's own.
        words: one for each class, as it goes on after the template: " good" rather than "good". Of several tokens the mean of their logits.

    Raises:
        ConfigError: words for another head or another number of classes, or of a model that is no decoder with head lm.
    """
    words = (words,) if isinstance(words, str) else tuple(words)
    if words and (head != "classification" or labels not in (0, len(words))):
        raise ConfigError(
            f"new_head({head!r}, labels={labels}): words are {words}: give one for each class of a classification head"
        )

    def config(sizes: ModelConfig) -> ModelConfig:
        made = sizes.replace(head=head, labels=labels or len(words) or sizes.labels, pooler=pooler or sizes.pooler)
        if words and (sizes.architecture != "decoder" or sizes.head != "lm" or made.pooler != "none"):
            what = f"{sizes.architecture} with head {sizes.head!r} and pooler {made.pooler!r}"
            raise ConfigError(f"new_head: words are those of a decoder with head 'lm' and no pooler; this is {what}")
        return made

    def params(sizes: ModelConfig, weights: Params, key: Array, rows: Pieces) -> Params:
        made = transformer.init(config(sizes), key).get("head", {})
        old = weights.get("head", {})
        kept = {name: old[name] for name in POOLER if name in made and name in old}
        if rows:
            table = weights["embed"]["tokens"] if sizes.tie_embeddings else old["kernel"]
            scale = sizes.dim**-0.5 if sizes.logits_scale and sizes.tie_embeddings else 1
            kept[head] = (means(table, rows).T * scale).astype(made[head].dtype)
        body = {name: x for name, x in weights.items() if name != "head"}
        return {**body, "head": {**made, **kept}} if made else body

    def spelled(tokenizer: Tokenizer) -> Transform:
        rows = tuple(tuple(tokenizer.encode(word).tolist()) for word in words)
        if not all(rows):
            raise ConfigError(f"new_head: words are {words}, and one of them has no token")
        return made._replace(params=lambda sizes, weights, key, aux: params(sizes, weights, key, rows), spelled=None)

    told = [
        repr(head),
        *([f"labels={labels}"] if labels else []),
        *([f"pooler={pooler!r}"] if pooler else []),
        *([f"words={words!r}"] if words else []),
    ]
    made = Transform(
        config=config,
        params=lambda sizes, weights, key, aux: params(sizes, weights, key, ()),
        label=f"new_head({', '.join(told)})",
        spelled=spelled if words else None,
    )
    return made
