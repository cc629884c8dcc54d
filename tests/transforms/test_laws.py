"""The laws of section 1 of the design for every change of weights and every family; what each change does is told in the file of its name."""

from typing import Any

import jax
import numpy as np
import pytest

from llm_jax import model as models
from llm_jax.interop import huggingface
from llm_jax.transforms import (
    IDENTITY,
    Transform,
    chain,
    extend_vocabulary,
    grow_depth,
    grow_width,
    lengthen,
    lora,
    merge,
    merge_lora,
    new_head,
    prune,
    shrink,
    silence,
)
from tests.families import FAMILIES, Tiny, tiny_model
from tests.transforms import laws

CHANGES: dict[str, tuple[Transform, Transform]] = {
    "prune": (prune(0.5, pattern="2:4"), prune(0.0)),
    "shrink": (shrink(mlp=0.5), shrink(mlp=1.0, layers=1.0)),
    "silence": (silence(mlp=0.5, heads=2), silence(mlp=1.0)),
    "grow_depth": (grow_depth(4, how="interleave"), IDENTITY),
    "grow_width": (grow_width(mlp_dim=40), grow_width()),
    "extend_vocabulary": (extend_vocabulary(((3, 5), (7,))), extend_vocabulary(0)),
    "lengthen": (lengthen(48), lengthen(32)),
    "lora and merge_lora": (chain(lora(2), merge_lora()), chain(lora(2, targets=(".*",)), merge_lora())),
    "merge": (merge(), merge(weights=(1, 0))),
    "new_head": (new_head("classification", labels=3), IDENTITY),
}
"""Each change, and itself at zero strength, where that is a transform of its own"""


def case(what: str, family: str) -> tuple[Transform, Transform, Tiny, Any]:
    """The change, the same at zero strength, a model of the family and what the change reads beside it."""
    change, nothing = CHANGES[what]
    # as transformers has it
    tiny = laws.with_zeros(tiny_model(family, **(dict(pooler="relu") if family == "distilbert" else {})))
    if tiny.config.patch_size and what in ("extend_vocabulary", "lengthen"):
        pytest.skip("it reads images")
    if what == "new_head" and family == "roberta":
        change = new_head("classification", labels=3, pooler="tanh")
    if what == "new_head" and tiny.config.architecture == "encoder-decoder":
        pytest.skip("classification reads encoders and decoders")
    aux = None
    if what == "merge":
        aux = (jax.tree.map(lambda x: x[..., ::-1].copy(), tiny.params),)
    if what == "grow_depth":
        nothing = grow_depth(tiny.config.layers, decoder_layers=tiny.config.decoder_layers)
    return change, nothing, tiny, aux


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_one_device_and_on_eight(what, family):
    """Laws 1, 2 and 5."""
    change, nothing, tiny, aux = case(what, family)
    laws.same_tree(change, tiny, aux)
    laws.identity(nothing, tiny, aux)
    if what == "merge":
        laws.identity(change, tiny, (tiny.params,))
    laws.same_on_mesh(change, tiny, aux)


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_comes_back(what, family, tmp_path):
    """Law 6: from a checkpoint bit for bit, and from a Hugging Face directory where the family has such a form."""
    change, _, tiny, aux = case(what, family)
    again = laws.comes_back(change, tiny, tmp_path, aux)
    if family in ("vaswani", "vit"):
        return  # no such form
    huggingface.save(again, tmp_path / "export")
    back = models.load(tmp_path / "export")
    laws.equal(back.params, again.params)
    np.testing.assert_allclose(
        laws.logits(back.config, back.params), laws.logits(again.config, again.params), atol=1e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_chains_are_associative(family):
    """Law 4, with changes of sizes, of weights and of both in turn."""
    tiny = laws.with_zeros(tiny_model(family))
    members = [grow_width(mlp_dim=40), prune(0.3, score="random"), shrink(mlp=0.5), silence(heads=2)]
    if not tiny.config.patch_size:
        members.insert(1, extend_vocabulary(((3, 5),)))
    left, right = members[0], members[-1]
    for member in members[1:]:
        left = chain(left, member)
    for member in members[-2::-1]:
        right = chain(member, right)
    (config, params), (other, others) = (laws.changed(x, tiny) for x in (left, right))
    assert config == other == chain(*members).config(tiny.config) and left.label == right.label
    laws.equal(params, others)


def test_the_tables_know_every_change():
    """A transform that changes weights is in the table: what the package offers and what leaves params alone make up the rest."""
    import llm_jax.transforms as offered

    others = {"IDENTITY", "Calibration", "Transform", "chain", "carry", "fisher", "pieces_of"}
    leave_weights = {"anchor", "cached", "carry_moments", "densify", "distil", "keep_zeros", "on_policy", "unfreeze"}
    known = {name for what in CHANGES for name in what.split(" and ")}
    known |= {"lora"}
    assert set(offered.__all__) - others - leave_weights == known
