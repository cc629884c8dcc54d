"""The presets have the sizes that were published, counted without making a weight."""

import pytest

from llm_jax import tree
from llm_jax.models import presets, transformer

STACKS = 6 * 3_152_384 + 6 * 4_204_032
"""Six layers of an encoder and of a decoder of width 512 with all biases, by hand: papers tell only millions."""
PUBLISHED = [
    ("bert", {}, 109_482_240),
    ("distilbert", {}, 66_362_880),
    ("roberta", {}, 124_645_632 - 590_592),  # without a pooler
    ("gpt2", {}, 124_439_808),
    ("gpt2", dict(layers=24, dim=1024, heads=16), 354_823_168),
    ("t5", {}, 60_506_624),
    ("llama", {}, 6_738_415_616),
    ("llama", dict(kv_heads=8, mlp_dim=14336), 7_241_732_096),  # Mistral 7B
    ("vaswani", {}, 37_000 * 512 + STACKS),
    ("marian", {}, 58_101 * 512 + 58_101 + STACKS),
    ("vit", {}, 86_567_656),
]


@pytest.mark.parametrize("name, changes, count", PUBLISHED, ids=lambda x: x if isinstance(x, str) else "")
def test_published_sizes(name, changes, count):
    assert tree.size(transformer.shapes(getattr(presets, name)(**changes))) == count


def test_changes_by_keyword():
    config = presets.bert(layers=2, head="classification", dropout=0.0)
    assert (config.layers, config.head, config.dropout, config.dim) == (2, "classification", 0.0, 768)
    with pytest.raises(TypeError, match="depth"):
        presets.gpt2(depth=3)
