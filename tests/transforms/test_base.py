"""The composition of transforms: in turn, the last outermost, associative, with a neutral element."""

from typing import Any

import jax
import optax
import pytest

from llm_jax import tree
from llm_jax.errors import ConfigError
from llm_jax.models.config import ModelConfig
from llm_jax.transforms import IDENTITY, Transform, chain, mask, spell

SIZES = ModelConfig(dim=8, heads=2)


def named(name: str) -> Transform:
    """A transform that leaves its name in everything it touches; none of it commutes with another's."""

    def wrap(inner: Any) -> Any:
        return lambda *arguments: f"{name}({inner(*arguments)})"

    return Transform(
        config=lambda sizes: sizes.replace(vocab_size=sizes.vocab_size * 10 + len(name)),
        params=lambda sizes, params, key, aux: [*params, (name, sizes.vocab_size, key, aux)],
        loss=wrap,
        grad=wrap,
        update=wrap,
        label=name,
        reference={name: name.upper()},
        calibration=len(name),
        steps=10 - len(name),
        card=lambda params: {"names": {name: len(name)}},
        extra=lambda sizes, key: {name: (sizes.vocab_size, key)},
        rows=lambda batch, fingerprint: {**batch, "rows": (*batch["rows"], (name, fingerprint["of"]))},
        masks=(f"{name}/.*",),
        trained=lambda params: tree.map_with_name(lambda path, _: path != name, params),
        densify=name == "a",
        offload=name == "a",
        moments=name == "ccc",
        spelled=lambda tokenizer: Transform(label=f"{name} of {tokenizer}"),
        pruned=(lambda known: named("c" * (3 + len(known)))._replace(pruned=None)) if name == "ccc" else None,
    )


A, B, C = (named(name) for name in ("a", "bb", "ccc"))


def effect(change: Transform) -> tuple[Any, ...]:
    """All functions of a transform on something simple, and what it asks for."""
    plain = lambda *arguments: ",".join(map(str, arguments))  # noqa: E731
    return (
        change.config(SIZES).vocab_size,
        change.params(SIZES, [], "key", "aux"),
        change.loss(plain)("p", "b"),
        change.grad(plain)("p", "b"),
        change.update(plain)("p"),
        change.label,
        change.reference,
        change.calibration,
        change.steps,
        change.card({}),
        change.extra(SIZES, "key"),
        change.rows({"rows": ()}, {"of": "stream"}),
        change.masks,
        change.trained and change.trained(dict.fromkeys(("a", "bb", "ccc", "d"), 0)),
        change.densify,
        change.offload,
        change.moments,
        spell(change, "t").label,  # type: ignore[arg-type]
        mask(change, ("x", "y")).label,
    )


def test_members_apply_in_turn():
    first = SIZES.vocab_size * 10 + 1
    assert effect(chain(A, B)) == (
        first * 10 + 2,
        [("a", SIZES.vocab_size, "key", "aux"), ("bb", first, "key", "aux")],
        "bb(a(p,b))",
        "bb(a(p,b))",
        "bb(a(p))",
        "a, bb",
        {"a": "A", "bb": "BB"},
        2,
        9,
        {"names": {"a": 1, "bb": 2}},
        {"a": (SIZES.vocab_size, "key"), "bb": (SIZES.vocab_size, "key")},
        {"rows": (("a", "stream"), ("bb", "stream"))},
        ("a/.*", "bb/.*"),
        {"a": False, "bb": False, "ccc": True, "d": True},
        True,
        True,
        False,
        "a of t, bb of t",
        "a, bb",
    )
    assert effect(chain(B, C)) != effect(chain(C, B))


def test_what_asks_for_it_is_told_what_is_pruned_before_it():
    """By name how many: `ccc` grows by a letter for each regex."""
    alone, after = chain(C), chain(A, C, B)
    assert (alone.label, after.label) == ("ccc", "a, cccc, bb")
    assert mask(after, ("x", "y")).label == "a, cccccc, bb" == mask(chain(A, chain(C, B)), ("x", "y")).label
    assert mask(spell(after, "t"), ("x",)).label == "a of t, ccc of t, bb of t"  # type: ignore[arg-type]


def test_zeros_of_the_start_alone_can_be_trained():
    with pytest.raises(ConfigError, match="a comes after bb, whose zeros it would take for weights"):
        chain(B, A)


def test_a_record_has_no_part_that_is_not_tried_here():
    assert len(effect(A)) == len(Transform._fields)


def test_chain_is_associative():
    assert (
        effect(chain(A, B, C))
        == effect(chain(chain(A, B), C))
        == effect(chain(A, chain(B, C)))
        == effect(chain(chain(A), chain(B), chain(C)))
    )


@pytest.mark.parametrize(
    "change", [chain(A, IDENTITY), chain(IDENTITY, A), chain(A), chain(chain(), A, chain(IDENTITY, IDENTITY))]
)
def test_the_identity_is_neutral(change):
    assert effect(change) == effect(A)


def test_the_identity_does_nothing():
    for change in (IDENTITY, chain(), Transform()):
        marker = object()
        params, rule = {"a": marker}, optax.sgd(0.1)
        for name in ("params", "loss", "grad", "update", "rows", "trained"):
            assert getattr(change, name) is getattr(IDENTITY, name), name
        assert change.config(SIZES) is SIZES and change.params(SIZES, params, None, None) is params
        assert change.loss(marker) is marker and change.grad(marker) is marker and change.update(rule) is rule


def test_params_is_jitted_with_a_static_config():
    """As `llm_jax.transform` calls it: the config is hashable, each member sees the one that those before it made."""
    widen = Transform(
        config=lambda sizes: sizes.replace(dim=sizes.dim * 2),
        params=lambda sizes, params, key, aux: {"x": params["x"] * sizes.dim + aux},
    )
    made = jax.jit(chain(widen, widen).params, static_argnums=0)(SIZES, {"x": 1.0}, jax.random.key(0), 1.0)
    assert float(made["x"]) == (1 * 8 + 1) * 16 + 1
