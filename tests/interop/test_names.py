"""Layouts and tables: reading and writing are inverse, and nothing goes by unnoticed."""

import numpy as np
import pytest

from llm_jax.errors import CheckpointError
from llm_jax.interop import names
from llm_jax.interop.names import FLIP, HEADS_BIAS, HEADS_IN, HEADS_OUT, ROW, SAME, Entry, Layout
from llm_jax.models import presets

D, H, E = 6, 3, 4
FUSED = Layout("d h e", "d (p h e)", parts=3)
PAIRS = Layout("d h (r j)", "(h j r) d")


@pytest.mark.parametrize(
    "layout, shape, there",
    [
        (SAME, (5, 2), (5, 2)),
        (FLIP, (5, 2), (2, 5)),
        (HEADS_OUT, (D, H, E), (H * E, D)),
        (HEADS_IN, (H, E, D), (D, H * E)),
        (HEADS_BIAS, (H, E), (H * E,)),
        (ROW, (7,), (1, 7)),
        (PAIRS, (D, H, E), (H * E, D)),
        (FUSED, (D, H, E), (D, 3 * H * E)),
        (Layout("h e", "(p h e)", parts=3), (H, E), (3 * H * E,)),
    ],
)
def test_writing_and_reading_are_inverse(layout, shape, there):
    parts = [np.random.default_rng(i).normal(size=shape) for i in range(layout.parts)]
    written = layout.write(parts)
    assert written.shape == layout.there_shape(shape) == there
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(layout.read(written, shape, i), part)
        assert np.shares_memory(layout.read(written, shape, i), written) or layout is PAIRS


def test_layouts_say_what_the_products_are():
    """x W here is torch's x W^T there, head by head; the rotated pairs lie side by side."""
    x, w = np.random.default_rng(0).normal(size=(2, D)), np.random.default_rng(1).normal(size=(D, H, E))
    np.testing.assert_allclose(np.einsum("bd,dhe->bhe", x, w).reshape(2, -1), x @ HEADS_OUT.write([w]).T)
    q, k, v = (w * i for i in (1, 2, 3))
    np.testing.assert_allclose(
        x @ FUSED.write([q, k, v]),
        np.concatenate([np.einsum("bd,dhe->bhe", x, y).reshape(2, -1) for y in (q, k, v)], 1),
    )
    halves = np.arange(E).reshape(1, 1, E)
    assert PAIRS.write([halves])[:, 0].tolist() == [0, 2, 1, 3]


CONFIG = presets.llama(vocab_size=9, layers=2, dim=4, heads=2, mlp_dim=3, max_length=8)
TABLE = (
    Entry("embed/tokens", "emb"),
    *(
        Entry(f"decoder/layers/{ours}", f"l.{{}}.{ours}")
        for ours in (
            *(f"attention/{part}" for part in ("query", "key", "value", "out")),
            *(f"mlp/{part}" for part in ("up", "gate", "down")),
            "attention_norm/scale",
            "mlp_norm/scale",
        )
    ),
    Entry("decoder/norm/scale", "norm"),
    Entry("head/kernel", "out"),
)


def test_places_are_those_of_the_model():
    places = names.places(CONFIG, (*TABLE, Entry("embed/positions", "unused")))
    assert places["decoder/layers/mlp/up"].names == ("l.0.mlp/up", "l.1.mlp/up")
    assert places["decoder/layers/mlp/up"].own == (4, 3) and places["embed/tokens"].names == ("emb",)
    assert "embed/positions" not in places
    with pytest.raises(CheckpointError, match="no place for 'head/kernel'"):
        names.places(CONFIG, TABLE[:-1])


def test_check_lists_what_is_wrong():
    places = names.places(CONFIG, TABLE)
    shapes = {name: place.there for place in places.values() for name in place.names}
    names.check({**shapes, "more": (1,)}, places, ["more"], "here")
    wrong = {**shapes, "l.1.mlp/up": (4, 4), "more": (1,)}
    del wrong["emb"]
    with pytest.raises(CheckpointError) as caught:
        names.check(wrong, places, [], "here")
    assert str(caught.value) == (
        "the tensors of here are not those of its config: 1 missing: emb; 1 not expected: more; "
        "1 of another shape: l.1.mlp/up is [4, 4], not [4, 3]"
    )
