"""What a smaller model saves, and that zeros save nothing."""

import json

import jax
import jax.numpy as jnp
import pytest

from llm_jax import cli, cost, flops, model, tree
from llm_jax.models import transformer
from tests.families import FAMILIES, tiny_model


def test_a_smaller_model_costs_less():
    before = FAMILIES["gpt2"].replace(dim=64, layers=4, mlp_dim=512)
    after = before.replace(layers=1, mlp_dim=64)
    found = cost.compare(before, after, (4, 32))
    for config, one in ((before, found.before), (after, found.after)):
        assert one.parameters == tree.size(transformer.shapes(config))
        assert one.flops == flops.forward_flops(config, {"tokens": (4, 32)})
        assert one.spread[0] <= one.seconds <= one.spread[1]
    assert found.speedup > 1.2 and not found.same_shapes
    table = str(found).splitlines()
    assert [len(line) for line in table[:4]] == [62] * 4 and "4 rows of 32 tokens" in table[4]
    assert table[2].split()[-1] == f"{found.after.flops / found.before.flops:.3f}"
    assert "no speed-up" not in str(found)


def test_of_zeros_no_speed_up_is_expected():
    tiny = tiny_model("bert")
    half = jax.tree.map(lambda x: jnp.where(jnp.arange(x.size).reshape(x.shape) % 2 == 0, x, 0), tiny.params)
    found = cost.compare(tiny.config, tiny.config, (2, 8), tiny.params, half)
    assert found.same_shapes and found.before.zeros == 0
    assert found.after.zeros == sum(x.size // 2 for x in jax.tree.leaves(tiny.params))
    share = found.after.zeros / found.after.parameters
    assert f"{share:.1%} of the weights after are 0 (0.0% before)" in str(found)
    assert "no speed-up is to be expected" in str(found)


@pytest.mark.parametrize("name", ["t5", "vit"])
def test_two_streams_and_images(name: str):
    config = FAMILIES[name]
    found = cost.compare(config, config.replace(mlp_dim=8), (2, 10))
    assert found.after.flops < found.before.flops and found.after.seconds > 0


def test_what_a_run_says_of_it(monkeypatch):
    before = FAMILIES["bert"]
    after = before.replace(mlp_dim=8)
    said = cost.told(before, after, (2, 8), {}).splitlines()
    assert [line.split(",")[0].strip() for line in said[1:4]] == ["parameters", "forward", "forward"]
    assert "no speed-up" not in "".join(said), "weights of no meaning are drawn: nothing is said of their zeros"
    pruned = {"encoder/layers/mlp/up"}
    assert "pruned: 1 stacks of matrices" in cost.told(before, after, (2, 8), pruned).splitlines()[-1]
    monkeypatch.setattr(cost, "MEASURED", 10)
    assert [line.split()[-1] for line in cost.told(before, after, (2, 8), {}).splitlines()[1:3]] == [
        f"{tree.size(transformer.shapes(after)) / tree.size(transformer.shapes(before)):.3f}",
        f"{flops.forward_flops(after, {'tokens': (2, 8)}) / flops.forward_flops(before, {'tokens': (2, 8)}):.3f}",
    ]
    assert cost.told(before, after, (2, 8), {}).endswith("not timed: models of more than 0M parameters together")
    headed = before.replace(head="classification", labels=2)
    assert cost.told(before, headed, (2, 8), {}) == ""
    assert "no speed-up is to be expected" in cost.told(before, headed, (2, 8), {"encoder/layers/mlp/up": 0.5})


def test_the_command(tmp_path, capsys):
    sizes = FAMILIES["bert"]
    for name, config in (("big", sizes), ("small", sizes.replace(mlp_dim=12))):
        model.save(model.Model(config, transformer.init(config, jax.random.key(0))), tmp_path / name)
    both = [str(tmp_path / "big"), str(tmp_path / "small")]
    assert cli.main(["cost", *both, "--length=16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["before"]["parameters"] - found["after"]["parameters"] == 2 * 12 * (2 * 16 + 1)  # of two layers
    assert found["speedup"] == found["before"]["seconds"] / found["after"]["seconds"] and not found["same_shapes"]
    assert cli.main(["cost", *both, "--length=64"]) == 2
    assert "--length is 64, but a row of Model(encoder, " in capsys.readouterr().err
    assert cli.main(["cost", both[0], both[0], "--length=16"]) == 0
    assert "no speed-up is to be expected" in capsys.readouterr().out
