"""The five functions of a notebook, and the verbs of the command line, on a run of a few steps; evaluation against NumPy."""

import json
import math

import jax
import numpy as np
import pytest

import llm_jax
from llm_jax import cli, evaluate, flops, log, loop, sharding, tree
from llm_jax.card import content_hash
from llm_jax.config import Batch, Data, Eval, Optimizer, Run
from llm_jax.errors import CheckpointError, UserError
from llm_jax.models import presets, transformer
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import NextToken
from llm_jax.transforms import Transform, densify, lora, new_head, prune, shrink
from tests.families import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus, tokenizer):
    root = tmp_path_factory.mktemp("trained")
    tokenizer.save(root / "tokenizer.json")
    run = Run(
        name="tiny",
        workdir=str(root / "run"),
        model=ModelConfig(vocab_size=512, max_length=64, layers=2, dim=32, heads=2),
        task=NextToken(),
        data=Data(sources=(f"text:{corpus}/*.txt",), tokenizer=str(root / "tokenizer.json"), heldout=0.1, window=64),
        optimizer=Optimizer(learning_rate=3e-3),
        steps=4,
        batch=Batch(size=8, length=64),
        eval=Eval(prompts=("Fellow citizens",)),
    )
    loop.train(run)
    return root / "run"


@pytest.fixture(scope="module")
def model(folder):
    return llm_jax.load(folder)


def test_the_package_gives_the_functions_and_not_modules():
    assert all(callable(getattr(llm_jax, name)) for name in llm_jax.__all__)
    assert not hasattr(llm_jax, "generat")


def test_load_apply_generate(model):
    ids = model.tokenizer.encode("My fellow Americans")[None]
    outputs = llm_jax.apply(model, {"tokens": ids}, hidden_states=True, attentions=True)
    assert outputs.logits.shape == (1, ids.shape[1], 512) and outputs.hidden_states.shape[0] == 2
    np.testing.assert_allclose(np.asarray(outputs.attentions).sum(-1), 1, rtol=1e-5)
    assert llm_jax.generate(model, "The state", max_new_tokens=3) == llm_jax.generate(
        model, ["The state"], max_new_tokens=3
    )
    assert "tiny" in repr(model)


def test_save_and_load_give_the_same_model(model, tmp_path):
    llm_jax.save(model, tmp_path / "kept")
    again = llm_jax.load(tmp_path / "kept")
    assert again.config == model.config and again.tokenizer == model.tokenizer
    assert content_hash(again.params) == content_hash(model.params) == model.card["hashes"]["params"]
    with pytest.raises(CheckpointError, match="exists already"):
        llm_jax.save(model, tmp_path / "kept")


def test_transform_names_itself_and_its_parent_in_the_card(model):
    change = Transform(params=lambda config, params, key, aux: jax.tree.map(lambda x: x * 2, params), label="double")
    twice = llm_jax.transform(model, change, jax.random.key(0))
    np.testing.assert_array_equal(twice.params["embed"]["tokens"], 2 * np.asarray(model.params["embed"]["tokens"]))
    assert twice.card["parents"] == [content_hash(model.params)] and "double" in json.dumps(twice.card["transforms"])


@pytest.mark.parametrize("path, message", [("nothing", "no such file or folder"), ("", "no checkpoint in")])
def test_load_refuses(path, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        llm_jax.load(tmp_path / path)


def log_probabilities(model, text):
    """From one whole forward pass and a softmax in NumPy."""
    symbols = [model.tokenizer.bos, *model.tokenizer.encode(text), model.tokenizer.eos]
    logits = np.asarray(llm_jax.apply(model, {"tokens": np.array([symbols[:-1]])}).logits, np.float64)[0]
    logs = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    return logs[np.arange(len(symbols) - 1), symbols[1:]]


def test_score_is_the_log_softmax(model):
    found = evaluate.score(model.config, model.params, model.tokenizer, "We hold these truths")
    np.testing.assert_allclose([p for _, p in found], log_probabilities(model, "We hold these truths"), rtol=1e-4)
    assert "".join(t for t, _ in found[:-1]) == "We hold these truths"


def test_score_of_a_text_longer_than_the_model_has_each_token_once(model):
    text = "We hold these truths to be self-evident. " * 12
    found = evaluate.score(model.config, model.params, model.tokenizer, text)
    assert "".join(t for t, _ in found[:-1]) == text and len(found) > 2 * model.config.max_length
    np.testing.assert_allclose([p for _, p in found[:64]], log_probabilities(model, text)[:64], rtol=1e-4)


def test_evaluation_is_the_mean_over_the_held_out_documents(model, tmp_path, folder):
    texts = ["Short text one.", "Another text, a little longer than the first.", "And a third."]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    found = evaluate.evaluate_checkpoint(str(folder), (f"text:{tmp_path}/*.txt",))
    logs = np.concatenate([log_probabilities(model, text) for text in texts])
    assert found["tokens"] == len(logs)
    assert found["loss"] == pytest.approx(-logs.mean(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(-logs.mean()), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(
        -logs.sum() / math.log(2) / sum(len(t.encode()) for t in texts), rel=1e-5
    )


def run_cli(capsys, *arguments):
    status = cli.main(list(arguments))
    said = capsys.readouterr()
    return status, said.out, said.err


def test_verbs(folder, capsys):
    status, out, _ = run_cli(capsys, "eval", str(folder), "--json")
    assert status == 0 and json.loads(out)["loss"] == pytest.approx(
        json.loads((folder / "result.json").read_text())["eval"]["loss"], rel=1e-5
    )
    status, out, _ = run_cli(capsys, "score", str(folder), "We hold", "--json")
    scored = json.loads(out)
    assert status == 0 and scored["log_probability"] == pytest.approx(
        sum(t["log_probability"] for t in scored["tokens"])
    )
    status, out, _ = run_cli(capsys, "generate", str(folder), "The", "A", "--max-new-tokens=3", "--json")
    assert status == 0 and [r["prompt"] for r in json.loads(out)] == ["The", "A"]
    status, out, _ = run_cli(capsys, "generate", str(folder), "The", "--max-new-tokens=3")
    assert status == 0 and out.startswith("The")
    status, out, _ = run_cli(capsys, "show", str(folder), "--json")
    assert status == 0 and json.loads(out)["name"] == "tiny"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["evl"], "unknown verb 'evl'; did you mean 'eval'?"),
        (["eval", "/nowhere"], "no such file or folder"),
        (["generate", "/nowhere", "x", "--temprature=1"], "did you mean '--temperature'"),
        (["score"], "the following arguments are required: checkpoint, text"),
        (["train", "--config=none.py"], "no config file none.py"),
    ],
)
def test_a_wrong_command_is_one_line_and_status_2(arguments, message, capsys):
    status, out, err = run_cli(capsys, *arguments)
    assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ") and message in err


def test_help_of_each_verb_has_an_example(capsys):
    for verb in cli.VERBS:
        with pytest.raises(SystemExit) if verb != "train" else _nothing():
            cli.main([verb, "--help"])
        assert "example" in capsys.readouterr().out


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False


def test_generate_without_a_tokenizer_is_refused(model):
    with pytest.raises(UserError, match="no tokenizer"):
        llm_jax.generate(llm_jax.Model(model.config, model.params), "x")


def test_flops_are_those_counted_by_hand():
    config = ModelConfig(vocab_size=10, max_length=8, layers=3, dim=4, heads=2, mlp_dim=8, norm="rms", positions="none")
    matrices = 3 * (4 * 4 * 4 + 2 * 4 * 8) + 10 * 4
    causal = 3 * 2 * 8 * 4
    assert flops.train_flops(config, {"tokens": (2, 8)}) == 2 * 8 * 3 * (2 * matrices + causal)


def test_mlm_head_counts_the_positions_to_predict_alone():
    config = presets.bert(vocab_size=50, layers=1, dim=8, heads=2, mlp_dim=16, max_length=16, head="mlm", pooler="none")
    every, few = (flops.forward_flops(config, {"tokens": (1, 16), "predict": (1, m)}) for m in (16, 3))
    assert every - few == 2 * 13 * (50 * 8 + 8 * 8)
    assert tree.size(transformer.shapes(config)["head"]["dense"]) == 64


def test_a_metrics_file_is_cut_back_to_the_checkpoint(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log.keep_until(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    "change", [shrink(mlp=0.5), lora(2), new_head("classification", labels=2)], ids=lambda c: c.label
)
def test_a_changed_model_lies_on_its_mesh_as_the_rules_say(change, mesh):
    tiny = tiny_model("llama")
    here = mesh(data=2, fsdp=2, tensor=2)

    def placed(config):
        return sharding.params_shardings(here, transformer.axes(config), transformer.shapes(config))

    whole = llm_jax.Model(tiny.config, jax.device_put(tiny.params, placed(tiny.config)))
    made = llm_jax.transform(whole, change, jax.random.key(0))
    for (path, x), where in zip(jax.tree_util.tree_leaves_with_path(made.params), jax.tree.leaves(placed(made.config))):
        assert x.sharding.is_equivalent_to(where, x.ndim), path


def test_a_changed_model_has_no_results_of_its_parent():
    tiny = tiny_model("llama")
    parent = llm_jax.Model(
        tiny.config, tiny.params, card={"name": "a", "results": {"loss": 1.0}, "step": 3, "best": {}}
    )
    made = llm_jax.transform(parent, prune(0.5), jax.random.key(0))
    assert made.card["name"] == "a" and not {"results", "step", "best"} & made.card.keys()
    assert made.card["pruned"] and "pruned" not in llm_jax.transform(made, densify(), jax.random.key(0)).card
