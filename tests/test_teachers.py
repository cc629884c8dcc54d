"""A teacher's most probable tokens written by the command, and a run that learns from them in the teacher's absence."""

import dataclasses
import errno
import json
import os
import shutil

import jax
import numpy as np
import pytest

from llm_jax import checkpoint, cli, loop, model, parts, teachers
from llm_jax.config import Data
from llm_jax.data.teacher_cache import TeacherCache
from llm_jax.errors import ConfigError, DataError
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.tasks import MaskedToken
from llm_jax.transforms import cached, distil, new_head
from tests.test_parts import losses, run_of

WIDE = ModelConfig(vocab_size=512, max_length=16, layers=2, dim=24, heads=2)


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    loop.train(run_of(corpus, folder, model=WIDE, steps=3))
    return folder


@pytest.fixture(scope="module")
def whole(corpus, teacher, tmp_path_factory):
    """A cache of all 512 tokens at temperature 2 of the rows of a run of six steps."""
    folder = tmp_path_factory.mktemp("caches") / "whole"
    header = teachers.cache(run_of(corpus, folder.parent / "run"), str(teacher), folder, k=512, temperature=2.0)
    assert header.rows == 6 * 8 and header.mass == pytest.approx(1, abs=2e-3)
    return folder


def test_with_every_token_it_is_distillation(corpus, teacher, whole, tmp_path):
    found = []
    for name, change in (
        ("cached", cached(str(whole), soft=0.5)),
        ("distil", distil(str(teacher), temperature=2.0, soft=0.5)),
    ):
        loop.train(run_of(corpus, tmp_path / name, transforms=(change,)))
        found.append(losses(tmp_path / name))
    np.testing.assert_allclose(*found, rtol=2e-4)  # log-probabilities are kept in half precision
    card = checkpoint.read_card(tmp_path / "cached")
    assert card["teacher_cache"]["teacher"] == checkpoint.read_card(teacher)["hashes"]["params"]
    shutil.rmtree(tmp_path / "cached" / "checkpoints" / "6")
    loop.train(run_of(corpus, tmp_path / "cached", transforms=(cached(str(whole), soft=0.5),)))
    assert losses(tmp_path / "cached") == found[0]


def test_the_mass_is_what_the_tokens_hold(corpus, teacher, tmp_path):
    run = run_of(corpus, tmp_path / "run", steps=2)
    header = teachers.cache(run, str(teacher), tmp_path / "cache", k=5)
    made, loaded = parts.build(run), model.load(teacher)
    kept = weight = 0.0
    cache = TeacherCache(tmp_path / "cache")
    for _ in range(2):
        batch = next(made.train).batch
        logits = np.float64(jax.jit(lambda b: transformer.apply(loaded.config, loaded.params, b).logits)(batch))
        p = np.exp(logits - logits.max(-1, keepdims=True))
        best = np.sort(p / p.sum(-1, keepdims=True), axis=-1)[..., -5:].sum(-1)
        kept, weight = kept + (best * batch["weights"]).sum(), weight + batch["weights"].sum()
        ids = np.argsort(-logits, axis=-1)[..., :5]
        np.testing.assert_array_equal(np.sort(cache.add(batch)["teacher_ids"]), np.sort(ids))
    made.close()
    assert header.mass == pytest.approx(kept / weight, rel=1e-3)


def test_other_rows_are_refused(corpus, whole, tmp_path):
    run = run_of(corpus, tmp_path / "run", transforms=(cached(str(whole)),))
    with pytest.raises(DataError, match="is of another data"):
        loop.train(dataclasses.replace(run, seed=1))
    with pytest.raises(DataError, match="a row of this run is not in the cache .*: write one of as many steps"):
        loop.train(dataclasses.replace(run, steps=9))


def test_what_is_refused(corpus, teacher, whole, tmp_path):
    run = run_of(corpus, tmp_path / "run")
    for message, arguments in (
        ("k is 513: it must lie between 1 and the teacher's 512 tokens", dict(k=513)),
        ("temperature is 0: it must be above 0", dict(temperature=0)),
    ):
        with pytest.raises(ConfigError, match=message):
            teachers.cache(run, str(teacher), tmp_path / "cache", **arguments)
    with pytest.raises(DataError, match="holds a cache already"):
        teachers.cache(run, str(teacher), whole)
    headless = model.transform(model.load(teacher), new_head("classification", labels=2), jax.random.key(0))
    model.save(headless, tmp_path / "headless")
    with pytest.raises(ConfigError, match=r"headless has no head over the vocabulary \(head='classification'\)"):
        teachers.cache(run, str(tmp_path / "headless"), tmp_path / "cache")
    other = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer="bpe:400"))
    with pytest.raises(DataError, match="has another tokenizer than the run"):
        teachers.cache(other, str(teacher), tmp_path / "cache")
    narrow = dataclasses.replace(run, model=run.model.replace(vocab_size=576))
    with pytest.raises(
        ConfigError, match="cache: the teacher has 512 tokens, the student 576: both must have the same"
    ):
        teachers.cache(narrow, str(teacher), tmp_path / "cache")
    with pytest.raises(
        ConfigError, match="cached: the teacher has 512 tokens, the student 576: both must have the same"
    ):
        loop.train(dataclasses.replace(narrow, transforms=(cached(str(whole)),)))
    short = WIDE.replace(positions="learned", max_length=8)
    model.save(model.Model(short, transformer.init(short, jax.random.key(0))), tmp_path / "short")
    with pytest.raises(ConfigError, match="cache: the teacher's table has 8 positions, a row 16 tokens"):
        teachers.cache(run, str(tmp_path / "short"), tmp_path / "cache")
    both = WIDE.replace(architecture="encoder-decoder")
    model.save(model.Model(both, transformer.init(both, jax.random.key(0))), tmp_path / "both")
    with pytest.raises(ConfigError, match="cache: the teacher is encoder-decoder and reads encoder_tokens"):
        teachers.cache(run, str(tmp_path / "both"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: File exists: the cache is not complete"):
        teachers.cache(run, str(teacher), tmp_path / "file")


def test_what_a_stopped_writer_left_is_removed_and_a_full_disk_is_told(corpus, tmp_path, monkeypatch):
    encoder = WIDE.replace(architecture="encoder", positions="learned")
    data = Data(sources=(f"text:{corpus}/*.txt",), tokenizer="wordpiece:512", heldout=0.1)
    masked = run_of(
        corpus, tmp_path / "masked", model=encoder.replace(head="mlm"), data=data, task=MaskedToken(), steps=1
    )
    loop.train(masked)
    transforms = (new_head("mlm"), cached(str(tmp_path / "cache")))
    run = run_of(corpus, tmp_path / "run", model=encoder, data=data, task=MaskedToken(), steps=1, transforms=transforms)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "00007.npz").write_bytes(b"half a shard")

    def full(*arguments, **arrays):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", full)
        with pytest.raises(DataError, match="cache: no space left on the disk: the cache is not complete"):
            teachers.cache(run, str(tmp_path / "masked"), tmp_path / "cache", k=4)
    header = teachers.cache(run, str(tmp_path / "masked"), tmp_path / "cache", k=4)
    assert header.rows == 8 and [x.name for x in sorted((tmp_path / "cache").glob("*.npz"))] == ["00000.npz"]
    assert loop.train(run)["steps"] == 1


def test_the_command(corpus, teacher, tmp_path, capsys):
    config = tmp_path / "student.py"
    config.write_text(
        "from llm_jax.config import Batch, Data, Run\nfrom llm_jax.models.config import ModelConfig\n"
        "from llm_jax.tasks import NextToken\n\n\ndef get_config():\n"
        "    return Run(model=ModelConfig(vocab_size=512, max_length=16, layers=1, dim=16, heads=2), task=NextToken(),\n"
        f"        data=Data(sources=('text:{corpus}/*.txt',), tokenizer='bpe:512', heldout=0.1), steps=9,\n"
        "        batch=Batch(size=8, length=16))\n"
    )
    command = ["cache", f"--config={config}", "--config.steps=2", f"--teacher={teacher}", f"--out={tmp_path / 'cache'}"]
    assert cli.main([*command, "--k=4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["k"], found["temperature"]) == (16, 4, 1.0) and 0 < found["mass"] < 1
    assert found["bytes"] > 0 and cli.main([command[0], "--config", str(config), *command[2:]]) == 2
    assert "holds a cache already" in capsys.readouterr().err
