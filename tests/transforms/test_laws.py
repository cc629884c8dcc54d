"""The laws of section 1 of the design for every change, of weights and of training, and every family; what each change does is told in the file of its name."""

from typing import Any

import jax
import numpy as np
import pytest

from llm_jax import divergences, sharding
from llm_jax import model as models
from llm_jax.config import Batch, Mesh, Optimizer, Run
from llm_jax.data.teacher_cache import Header, data_fingerprint, write_cache
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.interop import huggingface
from llm_jax.models import transformer
from llm_jax.tasks import NextToken
from llm_jax.transforms import (
    IDENTITY,
    Transform,
    anchor,
    cached,
    carry_moments,
    chain,
    densify,
    distil,
    dropout,
    extend_vocabulary,
    grow_depth,
    grow_width,
    keep_zeros,
    lengthen,
    lora,
    merge,
    merge_lora,
    new_head,
    offload_moments,
    on_policy,
    prune,
    shrink,
    silence,
    spell,
    unfreeze,
)
from llm_jax.transforms.accumulate import accumulate
from llm_jax.transforms.freeze import freeze
from llm_jax.transforms.moving_average import moving_average
from tests.families import FAMILIES, Tiny, tiny_model
from tests.transforms import laws
from tests.transforms.laws import objective

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
    "new_head of words": (
        spell(new_head("classification", words=("a", "ab")), load_tokenizer("wordpiece:16", ["a b"])),
        IDENTITY,
    ),
    "dropout": (dropout(0.3), IDENTITY),
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
    if what == "new_head of words" and tiny.config.architecture != "decoder":
        pytest.skip("words are those of decoders")
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


# What changes training


def training(tiny: Tiny, cache: Any) -> dict[str, tuple[Transform, Transform]]:
    """Each transform that acts in training, and itself at zero strength, where that is a transform of its own."""
    old = models.Model(tiny.config, jax.tree.map(lambda x: 0.9 * x, tiny.params))
    beside, weighted = "projections", dict(fisher=models.Model(tiny.config, jax.tree.map(np.abs, tiny.params)))
    states = dict(cosine=1.0, hidden=1.0, attention=1.0, projected=True)
    matrices = (".*/layers/.*/(up|down|query)",)
    return {
        "l2": (anchor(old, strength=0.1, exclude=beside), anchor(old, strength=0.0)),
        "fisher": (anchor(old, "fisher", **weighted, exclude=beside), anchor(old, "fisher", **weighted, strength=0.0)),
        "kl": (anchor(old, "kl"), anchor(old, "kl", strength=0.0)),
        "distil": (distil(old, temperature=2.0, **states), distil(old, soft=0.0)),
        "cached": (cached(str(cache)), cached(str(cache), soft=0.0)),
        "on_policy": (on_policy(1.0, prompt=4), on_policy(0.0, prompt=4)),
        "accumulate": (accumulate(2), accumulate(1)),
        "unfreeze": (unfreeze(1), IDENTITY),
        "lora": (lora(2, also=(beside,)), lora(0)),
        "freeze": (freeze((".*norm/.*",)), freeze(())),
        "keep_zeros": (keep_zeros(matrices), keep_zeros(())),
        "prune": (prune(0.5, schedule=(0, 2, 1), targets=matrices), prune(0.0, schedule=(0, 2, 1))),
        "moving_average": (moving_average(0.9), moving_average(0.0)),
        "densify": (densify(), IDENTITY),
        "carry_moments": (carry_moments(), IDENTITY),
        "offload_moments": (offload_moments(), IDENTITY),
    }


FIELDS = ("accumulate", "freeze", "moving_average")
"""Those that fields of the config ask for"""
TOGETHER = ("distil", "l2", "fisher", "kl", "cached", "unfreeze", "keep_zeros", *FIELDS)
"""Those that one run takes together, which costs one compilation in place of ten"""
SLOW = pytest.mark.slow
TEXT = tuple(name for name, config in FAMILIES.items() if not config.patch_size)


def judged(family: str, folder: Any) -> tuple[Tiny, Any, Any]:
    """A model of the family, one layer under a head over the vocabulary, a batch, and a cache of what a teacher says of it."""
    config = FAMILIES[family]
    changes = dict(layers=1, decoder_layers=min(1, config.decoder_layers))
    tiny = laws.with_zeros(tiny_model(family, **changes, **({} if config.head in ("lm", "mlm") else dict(head="mlm"))))
    _, batch = objective(tiny.config, rows=8)
    ids, log_p = jax.jit(
        lambda params: divergences.top_k(transformer.apply(tiny.config, params, batch, logits=False), 4)
    )(tiny.params)
    header = Header("the teacher", data_fingerprint({}), 4, 1.0)
    write_cache(folder / "cache", header, [(batch, np.asarray(ids), np.asarray(log_p))])
    return tiny, batch, folder / "cache"


@pytest.mark.parametrize(
    "family, what",
    [
        *(pytest.param(family, TOGETHER, id=f"{family}-together") for family in TEXT),
        *(pytest.param(family, ("distil", "on_policy"), id=f"{family}-on_policy") for family in ("llama", "gpt2")),
        *(pytest.param(family, ("lora", "distil"), id=f"{family}-lora", marks=SLOW) for family in ("gpt2", "marian")),
        *(pytest.param(family, ("prune",), id=f"{family}-prune", marks=SLOW) for family in ("gpt2", "marian")),
    ],
)
def test_training_on_one_device_and_on_eight(family, what, tmp_path):
    """Law 5: two steps of the program of a run, by all that its state holds and tells."""
    tiny, batch, cache = judged(family, tmp_path)
    table = training(tiny, cache)
    run = Run(
        name="law",
        model=tiny.config,
        transforms=tuple(table[name][0] for name in what if name not in FIELDS),
        task=NextToken(),
        batch=Batch(size=8, accumulate=2 if "accumulate" in what else 1),
        optimizer=Optimizer(
            name="sgd",
            learning_rate=1e-2,
            arguments=(("momentum", 0.9),),
            freeze=(".*norm/.*",) if "freeze" in what else (),
            moving_average=0.9 if "moving_average" in what else 0.0,
        ),
    )
    one, many = (
        laws.trained(run, tiny, batch, sharding.make_mesh(mesh, jax.devices()[:count]))
        for mesh, count in ((Mesh(data=1), 1), (Mesh(data=2, fsdp=2, tensor=2), 8))
    )
    assert one[0].params.keys() == many[0].params.keys() and int(one[0].skipped) == 0
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path((one[0]._replace(key=None), one[1])),
        jax.tree.leaves((many[0]._replace(key=None), many[1])),
        strict=True,
    ):
        np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5 * max(1, np.abs(x).max(initial=0)), err_msg=str(path))


def test_training_at_zero_strength_is_the_identity():
    """Law 2; and what leaves sizes and weights alone does so by being the identity there."""
    tiny = tiny_model("llama")
    table = training(tiny, "no cache")
    for name, (change, nothing) in table.items():
        assert nothing is IDENTITY, name
        assert name == "lora" or change.config is IDENTITY.config, name
        assert name in ("lora", "keep_zeros", "prune", "densify") or change.params is IDENTITY.params, name
    for name in ("keep_zeros", "prune"):
        laws.identity(table[name][0], laws.with_zeros(tiny))


def test_the_tables_know_every_change():
    """What the package offers is in one of the two tables."""
    import llm_jax.transforms as offered

    others = {
        "IDENTITY",
        "Calibration",
        "Growth",
        "Transform",
        "chain",
        "carry",
        "fisher",
        "mask",
        "pieces_of",
        "spell",
    }
    known = {name for what in CHANGES for name in what.split(" and ")}
    tables = known | training(tiny_model("llama"), "no cache").keys() | {"anchor"}
    assert set(offered.__all__) - others <= tables
