"""New tokens: rows of the embedding and of the unembedding for pieces of text that the vocabulary spelled with several tokens."""

import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Array, Float

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import ConfigError, DataError
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Params
from llm_jax.transforms.base import Growth, Transform, marked, removed

Pieces = tuple[tuple[int, ...], ...]
"""Of each new token the ids of the old ones that spelled it"""


def means(table: Float[Array, "V ..."], pieces: Pieces) -> Float[Array, "N ..."]:
    """The mean of the table's rows at the pieces of each new token; of all its rows where it has none. What is pruned in all of them is pruned."""
    ids = np.zeros((len(pieces), max(1, *map(len, pieces))), np.int32)
    share = np.zeros(ids.shape, np.float32)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)], share[row, : len(piece)] = piece, 1 / max(1, len(piece))
    weight = jnp.asarray(share, table.dtype).reshape(*share.shape, *(1,) * (table.ndim - 1))
    made, gone = jnp.sum(table[ids] * weight, axis=1), jnp.all(removed(table[ids]) | (weight == 0), axis=1)
    without = np.array([not piece for piece in pieces]).reshape(-1, *(1,) * (table.ndim - 1))
    if without.any():
        made = jnp.where(without, jnp.mean(table, axis=0), made)
        gone = jnp.where(without, jnp.all(removed(table), axis=0), gone)
    return marked(made, gone)


def extend_vocabulary(pieces: Sequence[Sequence[int]] | int, *, start: int = 0) -> Transform:
    """The row of each new token is the mean of the rows of the tokens that spelled it, in the embedding, the unembedding and its bias.

    Given a number of tokens, or no pieces, it is the mean of all rows (Hewitt 2021, 'Initializing new word embeddings for pretrained
    language models'). The logits of the old tokens stay as they are; the new one's logit is the mean of its pieces'. Moments: means as
    well, of which those of the squares are as large as a token needs that occurs no more often than its pieces did.

    Args:
        pieces: of each new token the ids of the old ones (see `pieces_of`), or how many new tokens there are.
        start: id of the first new token, where the table has more rows than the tokenizer entries: its spare rows are overwritten before
            new ones are added. 0 for the end of the table.

    Raises:
        ConfigError: a piece that is no id below `start`, a start beyond the table, or a model without a vocabulary.
    """
    if isinstance(pieces, int) and pieces < 0:
        raise ConfigError(f"extend_vocabulary({pieces}): the number of new tokens must not be negative")
    rows: Pieces = ((),) * pieces if isinstance(pieces, int) else tuple(tuple(int(i) for i in p) for p in pieces)

    def begin(sizes: ModelConfig) -> int:
        """The id of the first new token."""
        if sizes.patch_size:
            raise ConfigError("extend_vocabulary: the model reads images, it has no vocabulary")
        first = start or sizes.vocab_size
        if not 0 < first <= sizes.vocab_size:
            raise ConfigError(f"extend_vocabulary: start is {start}, the table has {sizes.vocab_size} rows")
        wrong = next((i for piece in rows for i in piece if not 0 <= i < first), None)
        if wrong is not None:
            raise ConfigError(f"extend_vocabulary: piece {wrong} is no id of the {first} old tokens")
        return first

    def config(sizes: ModelConfig) -> ModelConfig:
        return sizes.replace(vocab_size=max(sizes.vocab_size, begin(sizes) + len(rows)))

    def change(sizes: ModelConfig, params: Params, key: Array) -> Params:
        first = begin(sizes)

        def leaf(x: Array, names: tuple[str, ...]) -> Array:
            if names[0] != "vocab" or not rows:
                return x
            return jnp.concatenate([x[:first], means(x[:first], rows), x[first + len(rows) :]])

        return jax.tree.map(leaf, params, transformer.axes(sizes))

    told = str(pieces) if isinstance(pieces, int) else repr(rows)
    label = f"extend_vocabulary({told}{f', start={start}' if start else ''})"
    return Transform(config=config, params=Growth(change, change, change), label=label)


def pieces_of(old: Tokenizer, new: Tokenizer) -> Pieces:
    """Of each token that `new` has beyond those of `old`, the ids with which `old` spells it.

    A token of the vocabulary is spelled by the old rules from its name, so that marks of blanks and of continued words count; an added one,
    such as <|im_start|>, as plain text; what cannot be spelled has no pieces. For a model whose table has spare rows, start
    `extend_vocabulary` at `old.vocab_size`.

    Raises:
        DataError: an id that stands for different tokens in the two.
    """
    engine = tokenizers.Tokenizer.from_str(old.definition)
    known = engine.get_vocab(with_added_tokens=True)
    names = {i: name for name, i in tokenizers.Tokenizer.from_str(new.definition).get_vocab(True).items()}
    for name, i in known.items():
        if names.get(i) != name:
            raise DataError(
                f"token {i} is {name!r} in the old tokenizer and {names.get(i)!r} in the new: ids must stay"
            )
    rules = json.loads(new.definition)
    added = {token["id"] for token in rules.get("added_tokens") or ()}
    prefix = rules["model"].get("continuing_subword_prefix") or ""

    def spell(i: int) -> tuple[int, ...]:
        name = names.get(i, "")
        if i in added:
            found = old.encode(name).tolist()
        elif prefix:
            found = _longest_first(name, prefix, known)
        else:
            found = [token.id for token in engine.model.tokenize(name)] if name else []
        return tuple(int(j) for j in found if j != old.unk)

    return tuple(spell(i) for i in range(old.vocab_size, new.vocab_size))


def _longest_first(name: str, prefix: str, known: dict[str, int]) -> list[int]:
    """A token's name split as WordPiece splits a word, but for a name that itself continues one; nothing where that fails."""
    found: list[int] = []
    rest, mark = (name[len(prefix) :], prefix) if name.startswith(prefix) else (name, "")
    while rest:
        cut = next((n for n in range(len(rest), 0, -1) if mark + rest[:n] in known), 0)
        if not cut:
            return []
        found.append(known[mark + rest[:cut]])
        rest, mark = rest[cut:], prefix
    return found
