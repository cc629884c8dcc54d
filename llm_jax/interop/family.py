"""What a family of transformers' models is: one record, and what the families have in common.

The records themselves are in `encoders.py`, `decoders.py` and `encoder_decoders.py`, the list of them in `families.py`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from llm_jax.errors import CheckpointError, suggest
from llm_jax.interop.fields import Fields
from llm_jax.interop.names import Entry
from llm_jax.models.config import ModelConfig

Held = frozenset[str] | None
"""Names of the tensors at hand, without the prefix of the base; None where a config.json is read alone."""

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
"""Their word for an activation, and ours."""

ACTIVATION_WORDS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu"}
"""Our word for an activation, and the one written."""


class Family(NamedTuple):
    """Models of one `model_type`."""

    name: str
    classes: Mapping[str, str]
    """head here -> class there"""
    base: tuple[Entry, ...]
    """the model without its head; names without a prefix. A pooler of the base is here too"""
    heads: Mapping[str, tuple[Entry, ...]]
    """what each head adds, or names otherwise than the base does"""
    prefixes: Mapping[str, str]
    """before the base's names in the class of each head"""
    read: Callable[[Fields, str, Held], ModelConfig]
    """(config.json, head, tensors) -> sizes; raises CheckpointError for what is not implemented"""
    write: Callable[[ModelConfig], dict[str, Any]]
    """sizes -> the keys of a config.json that state them"""
    variant: Callable[[ModelConfig], tuple[Entry, ...]] = lambda config: ()
    """further entries of the base, by the sizes"""
    also: Mapping[str, str] = {}
    """other classes that are understood, and their heads here"""
    base_copies: tuple[Entry, ...] = ()
    """second names of parameters in some files"""
    head_copies: Mapping[str, tuple[Entry, ...]] = {}
    """likewise, in files with this head; names without a prefix"""
    constants: tuple[str, ...] = ()
    """regexes of tensors that hold no parameter of ours and are left out"""

    def entries(self, config: ModelConfig, prefix: str) -> tuple[Entry, ...]:
        """The table of a model, with its base's names under a prefix; where two entries name a parameter the last counts."""
        base = (*self.base, *self.variant(config))
        return (*_under(prefix, base), *self.heads[config.head])

    def copies(self, head: str, prefix: str) -> tuple[Entry, ...]:
        """Second names that parameters have in some files with this head."""
        return (*_under(prefix, self.base_copies), *self.head_copies.get(head, ()))

    def of_other_heads(self, prefix: str) -> set[str]:
        """The names of all heads' tensors."""
        own = [e.theirs for table in (*self.heads.values(), *self.head_copies.values()) for e in table]
        pooler = [prefix + e.theirs for e in self.base if e.ours.startswith("head/")]
        return {*own, *pooler}

    def prefix(self, found: Iterable[str]) -> str:
        """The prefix under which most names of the base are found."""
        found = set(found)
        some = [e.theirs.format(0) for e in self.base]
        return max(dict.fromkeys(self.prefixes.values()), key=lambda prefix: sum(prefix + x in found for x in some))

    def head(self, fields: Fields) -> str:
        """The head of the class that a config.json names; none where it names none.

        Raises:
            CheckpointError: a class that is not known.
        """
        named = fields.words("architectures")
        known = {**{name: head for head, name in self.classes.items()}, **self.also}
        if not named:
            return "none"
        if named[0] not in known:
            raise CheckpointError(
                f"{fields.where}: unknown architecture {named[0]!r}{suggest(named[0], known)}; "
                f"a head may be asked for instead: {', '.join(self.classes)}"
            )
        return known[named[0]]


def _under(prefix: str, entries: Iterable[Entry]) -> tuple[Entry, ...]:
    return tuple(e._replace(theirs=prefix + e.theirs) for e in entries)


def labels(fields: Fields, head: str) -> int:
    """The number of classes that a config.json states; what it says of another head is of no account."""
    if head != "classification":
        return ModelConfig.labels
    stated = fields.section("id2label").values
    return len(stated) if stated else fields.integer("num_labels", ModelConfig.labels)
