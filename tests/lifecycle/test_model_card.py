"""README.md of an export: a header that YAML and the Hub's library read, and nothing that the card does not say."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

import llm_jax
from llm_jax import model_card
from llm_jax.interop import huggingface
from llm_jax.model import Model
from llm_jax.models import presets, transformer
from llm_jax.transforms import prune
from tests.families import FAMILIES

H = {letter: letter * 64 for letter in "abc"}
RUN: dict[str, Any] = {
    "name": "tuned",
    "parents": [H["b"]],
    "transforms": ["lora(8)"],
    "hashes": {"params": H["a"]},
    "config": {
        "name": "tuned",
        "start": "asset:minilm",
        "task": {"kind": "NextToken"},
        "data": {"sources": ["asset:sotu"], "heldout": 0.05, "heldout_sources": []},
    },
    "sources": {"sources": [{"spec": "asset:sotu", "fingerprint": "f" * 64, "documents": 237}]},
    "device": {"kind": "cpu", "count": 2},
    "code": "1234-dirty",
    "step": 600,
    "tokens": 613840.0,
    "flops": 7549747200000.0,
    "results": {"step": 500, "loss": 4.25, "accuracy": 1e-05, "perplexity": float("nan")},
    "huggingface": {
        "config": {"model_type": "llama", "_name_or_path": "somebody/base"},
        "left_out": ["lm_head.bias"],
    },
    "pruned": {"decoder/layers/mlp/up": 0.5},
    "references": {"teacher": H["c"]},
}
PARENT: dict[str, Any] = {
    "name": 'origin: "it\'s" #1',
    "parents": [],
    "transforms": [],
    "hashes": {"params": H["b"]},
    "huggingface": RUN["huggingface"],
}


def written(card: dict[str, Any], *ancestors: dict[str, Any], title: str = "small") -> tuple[dict[str, Any], str]:
    """The header, as YAML reads it, and the text."""
    text = model_card.readme(title, card, FAMILIES["llama"], None, "LlamaForCausalLM", "llama", ancestors)
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_the_header():
    header, _ = written(RUN, PARENT)
    (entry,) = header.pop("model-index")
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "somebody/base",
        "tags": ["llm_jax", "llama", "lora"],
        "datasets": ["asset:sotu"],
    }
    (result,) = entry["results"]
    assert entry["name"] == "small" and result["task"] == {"type": "text-generation", "name": "NextToken"}
    assert result["dataset"]["name"] == "0.05 of the documents of asset:sotu"
    assert {m["type"]: m["value"] for m in result["metrics"]} == {"loss": 4.25, "accuracy": 1e-05}


def test_what_the_card_states_of_licence_and_language_is_handed_on():
    header, _ = written({**RUN, "license": "apache-2.0", "language": ["en", "no"]})
    assert header["license"] == "apache-2.0" and header["language"] == ["en", "no"]


@pytest.mark.parametrize("card", [RUN, PARENT, {}, {**RUN, "license": "mit", "language": "no"}])
def test_the_hub_s_library_reads_it(card: dict[str, Any]):
    hub = pytest.importorskip("huggingface_hub")
    title = 'a: "b" #c — ä'
    read = hub.ModelCard(model_card.readme(title, card, FAMILIES["llama"], None, "LlamaForCausalLM", "llama"))
    assert read.data.library_name == "transformers" and read.data.license == card.get("license")
    assert read.data.language == card.get("language")
    results = {r.metric_type: r.metric_value for r in read.data.eval_results or []}
    assert results == ({"loss": 4.25, "accuracy": 1e-05} if "results" in card else {})
    if results:
        assert read.data.model_name == title


def test_the_sections():
    _, body = written(RUN, PARENT)
    headings = re.findall(r"^#+ .*", body, re.M)
    assert headings == [
        "# small",
        "## How it came to be",
        "## Training data",
        "## Results",
        "## Compute",
        "## How to load it",
        "## Limits",
    ]
    for said in (
        "(bbbbbbbbbbbb): imported from Hugging Face llama somebody/base",
        '`tuned` (aaaaaaaaaaaa): lora(8), NextToken, 600 steps; made of `origin: "it\'s" #1` (bbbbbbbbbbbb); started from `asset:minilm`; '
        "its loss read teacher `cccccccccccc`",
        "| `decoder/layers/mlp/up` | 50.00% |",
        f"| `tuned` | `asset:sotu` | 237 | `{'f' * 16}` |",
        "| `tuned` | 600 | 613,840 | 7.55e+12 | 2 x cpu |",
        "| loss | 4.25 |",
        "model = LlamaForCausalLM.from_pretrained('small')",
        "model = llm_jax.load('small')",
        "`lm_head.bias`",
        "The figures are of step 500, the weights of step 600.",
        "changes that are in no commit",
    ):
        assert said in body, said
    assert "No card was found" not in body and "AutoTokenizer" not in body


def test_a_chain_that_ends_is_said():
    _, body = written(RUN)
    assert "No card was found of `bbbbbbbbbbbb`." in body


def test_what_the_card_does_not_say_is_not_said():
    header, body = written({})
    assert set(header) == {"library_name", "pipeline_tag", "tags"} and header["tags"] == ["llm_jax", "llama"]
    assert "holds no held-out figures" in body
    for absent in ("## Training data", "## Compute", "## Limits", "None", "nan", "imported", "hash"):
        assert absent not in body, absent


@pytest.mark.parametrize("named", ["/home/me/model", "model", "a/b/c", "", "x/y z", "./model"])
def test_what_is_no_repository_is_no_base_model(named: str):
    card = {"huggingface": {"config": {"_name_or_path": named}}}
    assert "base_model" not in written(card)[0]


@pytest.mark.parametrize(
    "family, tag",
    [
        ("bert", "feature-extraction"),
        ("roberta", "fill-mask"),
        ("distilbert", "text-classification"),
        ("gpt2", "text-generation"),
        ("t5", "text2text-generation"),
        ("vit", "image-classification"),
    ],
)
def test_what_a_model_does(family: str, tag: str):
    assert model_card.pipeline_tag(FAMILIES[family]) == tag


@pytest.mark.parametrize(
    "value",
    [
        {
            "a": "yes",
            "b": "1e3",
            "c": "null",
            "d": "- x",
            "e": "a\nb",
            "f": "é—😀",
            "g": "",
            "h": "0x1F",
            "i": "\x07\x85\u2028",
        },
        {"a": 1e-05, "b": 1e22, "c": -2.5e-07, "d": 3, "e": True, "f": 1.5, "g": 1234567.0},
        {"a": [{"b": [1, 2], "c": {"d": [{"e": "f"}]}}, {"b": "x"}], "g": ["h", "i: j"]},
    ],
)
def test_yaml_reads_what_was_written(value: dict[str, Any]):
    assert yaml.safe_load(model_card.to_yaml(value)) == value


def test_an_export_has_one_with_its_ancestors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    sizes = presets.llama(vocab_size=512, max_length=32, layers=1, dim=8, heads=2, mlp_dim=8)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(size=x.shape), x.dtype), transformer.shapes(sizes))
    llm_jax.save(Model(sizes, params, tokenizer), tmp_path / "beside" / "first")
    first = llm_jax.load(tmp_path / "beside" / "first")
    changed = llm_jax.transform(first, prune(0.5), jax.random.key(0))
    llm_jax.save(changed, tmp_path / "beside" / "second")
    huggingface.export_model(tmp_path / "beside" / "second", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    first_hash, second_hash = (
        llm_jax.load(tmp_path / "beside" / name).card["hashes"]["params"][:12] for name in ("first", "second")
    )
    assert f"1. `first` ({first_hash}): saved\n" in text
    assert f"({second_hash}): prune(0.5); made of `first` ({first_hash})" in text
    assert "AutoTokenizer, LlamaForCausalLM" in text and "from_pretrained('out')" in text
    assert f"{512:,}" in text and "| `decoder/layers/mlp/up` | 50.00% |" in text
    assert llm_jax.load(tmp_path / "out").card["pruned"] == changed.card["pruned"]
    shown = yaml.safe_load(text.split("---\n", 2)[1])
    assert shown["tags"] == ["llm_jax", "llama", "prune"] and "model-index" not in shown
