"""Generation: the cache against the whole forward pass, the ways to choose a token, stop strings, streaming, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import generation
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.errors import UserError
from llm_jax.generation import Sampling, choose_token, filter_logits
from llm_jax.models import presets, transformer

SMALL = dict(vocab_size=320, max_length=64, layers=2, dim=32, heads=4, mlp_dim=48, dropout=0.0)
init = jax.jit(
    transformer.init, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)  # quick to compile
PROMPTS = ["to be or not", "the", "a rose by any other name would smell"]


@pytest.fixture(scope="module")
def words():
    return load_tokenizer("bpe:300", [" ".join(PROMPTS) + " é ü ", "the cat sat on the mat"] * 5)


@pytest.fixture(scope="module", params=["gpt2", "llama", "t5"])
def model(request):
    changes = (
        dict(SMALL, kv_heads=2)
        if request.param == "llama"
        else dict(SMALL, head_dim=8)
        if request.param == "t5"
        else SMALL
    )
    config = getattr(presets, request.param)(**changes)
    return config, init(config, jax.random.key(1))


@pytest.fixture(scope="module")
def decoder():
    config = presets.llama(**SMALL)
    return config, init(config, jax.random.key(2))


def greedy(config, params, tokenizer, prompt, count):
    """Token by token from the whole forward pass, without a cache."""
    begin = tokenizer.bos
    ids = [begin, *tokenizer.encode(prompt)]
    batch = {}
    if config.architecture == "encoder-decoder":
        source = np.array([[*tokenizer.encode(prompt), tokenizer.eos]], np.int32)
        wide = np.zeros((1, 40), np.int32)
        wide[:, : source.shape[1]] = source
        batch = {
            "encoder_tokens": wide,
            "encoder_segment_ids": (np.arange(40) < source.shape[1])[None].astype(np.int32),
        }
        ids = [begin]
    forward = jax.jit(lambda row: transformer.apply(config, params, {**batch, "tokens": row}).logits)
    made = []
    for _ in range(count):
        row = np.zeros((1, 40), np.int32)  # what follows the last token does not reach back to it
        row[0, : len(ids)] = ids
        token = int(jnp.argmax(forward(row)[0, len(ids) - 1, : tokenizer.vocab_size]))
        if token == tokenizer.eos:
            break
        made.append(token)
        ids.append(token)
    return tokenizer.decode(made)


def test_greedy_decoding_with_the_cache_is_that_without(model, words):
    config, params = model
    texts = generation.generate(config, params, words, PROMPTS, max_new_tokens=6)
    assert texts == [greedy(config, params, words, prompt, 6) for prompt in PROMPTS]


def test_a_row_does_not_depend_on_the_others(decoder, words):
    config, params = decoder
    options = dict(max_new_tokens=8, temperature=1.0, top_p=0.9, seed=3)
    together = generation.generate(config, params, words, PROMPTS, **options)
    assert generation.generate(config, params, words, PROMPTS[:1], **options)[0] == together[0]
    assert generation.generate(config, params, words, PROMPTS, **options) == together
    assert generation.generate(config, params, words, PROMPTS, **{**options, "seed": 4}) != together


def numpy_filter(logits, seen, s):
    """The filters from their definitions, one row at a time."""
    out = []
    for row, before in zip(np.array(logits, np.float64), seen):
        if s.repetition_penalty != 1:
            row = np.where(before, np.where(row > 0, row / s.repetition_penalty, row * s.repetition_penalty), row)
        row = row / (s.temperature or 1)
        if s.top_k:
            row = np.where(row < np.sort(row)[-s.top_k], -np.inf, row)
        if s.top_p < 1:
            p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            order = np.argsort(-p)
            keep = order[: int(np.searchsorted(np.cumsum(p[order]), s.top_p) + 1)]
            row = np.where(np.isin(np.arange(len(row)), keep), row, -np.inf)
        if s.min_p:
            p = np.exp(row - row.max())
            row = np.where(p < s.min_p, -np.inf, row)
        out.append(row)
    return np.array(out)


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=0.7),
        dict(top_k=3, temperature=1.0),
        dict(top_p=0.6, temperature=1.3),
        dict(min_p=0.2, temperature=1.0),
        dict(repetition_penalty=1.7),
        dict(temperature=0.9, top_k=7, top_p=0.8, min_p=0.05, repetition_penalty=1.2),
    ],
)
def test_filters_follow_their_definitions(settings):
    rng = np.random.default_rng(0)
    logits, seen = rng.normal(0, 2, (4, 20)).astype(np.float32), rng.random((4, 20)) < 0.3
    sampling = Sampling(**settings)
    np.testing.assert_allclose(
        filter_logits(jnp.array(logits), jnp.array(seen), sampling), numpy_filter(logits, seen, sampling), rtol=1e-5
    )


@pytest.mark.parametrize(
    "settings",
    [
        dict(top_k=4, temperature=0.8),
        dict(top_p=0.7, temperature=1.0),
        dict(min_p=0.1, temperature=1.0),
        dict(repetition_penalty=1.5),
    ],
)
def test_filters_are_those_of_transformers(settings):
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers").generation.logits_process
    rng = np.random.default_rng(1)
    logits, ids = rng.normal(0, 2, (3, 30)).astype(np.float32), rng.integers(0, 30, (3, 5))
    seen = np.zeros((3, 30), bool)
    seen[np.arange(3)[:, None], ids] = True
    sampling = Sampling(**settings)
    steps = (
        [processors.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
        if sampling.repetition_penalty != 1
        else []
    )
    steps += [processors.TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature not in (0, 1) else []
    steps += [processors.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [processors.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    steps += [processors.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    wanted = torch.tensor(logits)
    for process in steps:
        wanted = process(torch.tensor(ids), wanted)
    np.testing.assert_allclose(filter_logits(jnp.array(logits), jnp.array(seen), sampling), wanted.numpy(), rtol=1e-5)


def test_samples_follow_the_probabilities():
    logits = jnp.log(jnp.tile(jnp.array([[0.5, 0.3, 0.2, 0.0]]), (4000, 1)))
    drawn = choose_token(logits, jnp.zeros((4000, 4), bool), Sampling(temperature=1.0), jax.random.key(0), jnp.int32(0))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, [0.5, 0.3, 0.2, 0.0], atol=0.03)


def test_stop_strings_end_the_text_before_them(decoder, words):
    config, params = decoder
    whole = generation.generate(config, params, words, ["the"], max_new_tokens=20, temperature=1.0, seed=5)[0]
    stop = whole[5:8]
    assert (
        generation.generate(config, params, words, ["the"], max_new_tokens=20, temperature=1.0, seed=5, stop=[stop])[0]
        == whole[: whole.index(stop)]
    )


def test_streamed_pieces_are_the_text_and_never_show_a_stop_string(decoder, words):
    config, params = decoder
    whole = generation.generate(config, params, words, PROMPTS, max_new_tokens=24, temperature=1.0, seed=6)
    stop = whole[0][6:10]
    wanted = generation.generate(
        config, params, words, PROMPTS, max_new_tokens=24, temperature=1.0, seed=6, stop=[stop]
    )
    said = [""] * len(PROMPTS)

    def on_text(row, more):
        assert more
        said[row] += more

    generation.generate(
        config, params, words, PROMPTS, max_new_tokens=24, temperature=1.0, seed=6, stop=[stop], on_text=on_text
    )
    assert said == wanted and stop not in said[0]


@pytest.mark.parametrize(
    "text, stop, last, settled",
    [
        ("abcSTOPd", ["STOP"], False, ("abc", True)),
        ("abcST", ["STOP"], False, ("abc", False)),
        ("abcST", ["STOP"], True, ("abcST", False)),
        ("ab\ufffd", [], False, ("ab", False)),
        ("ab", ["bx", "xx"], False, ("a", False)),
        ("one two", ["two", "one"], False, ("", True)),
    ],
)
def test_what_may_still_change_is_held_back(text, stop, last, settled):
    assert generation._settled(text, stop, last) == settled


def test_ids_that_the_tokenizer_does_not_know_are_never_made(decoder, words):
    config, params = decoder
    assert words.vocab_size < config.vocab_size
    biased = {**params, "head": {"kernel": params["head"]["kernel"].at[words.vocab_size :].mul(1e3)}}
    assert generation.generate(config, biased, words, ["the"], max_new_tokens=5)[0] is not None


@pytest.mark.parametrize(
    "change, prompts, options, message",
    [
        (presets.bert(**SMALL), ["a"], {}, "cannot generate: it needs a decoder"),
        (presets.gpt2(**SMALL), [], {}, "no prompt to continue"),
        (presets.gpt2(**SMALL), ["a"], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (presets.gpt2(**SMALL), ["a"], {"max_new_tokens": 100}, "positions, the model has 64"),
        (presets.gpt2(**SMALL), ["a"], {"top_p": 0.0}, "top_p in"),
    ],
)
def test_refused(change, prompts, options, message, words):
    with pytest.raises(UserError, match=message):
        generation.generate(change, {}, words, prompts, **options)


@pytest.fixture(scope="module")
def letters():
    """A tokenizer whose tokens are bytes, so that other characters than ASCII take several."""
    return load_tokenizer("bpe:258", ["a b"])


@pytest.fixture
def scripted(monkeypatch, decoder):
    """`scripted(rows)`: a model that says these tokens, whatever it is asked, eight at a time."""
    config, params = decoder

    def script(rows):
        made = np.array(rows, np.int32).T
        done = jnp.zeros(made.shape[1], bool)
        going = generation._Going((), None, None, None, done, jnp.int32(0))

        def decode(config, params, going, sampling, key, count, known, end):
            at = int(going.step)
            return going._replace(step=going.step + count), made[at : at + count]

        monkeypatch.setattr(generation, "_prefill", lambda *arguments: going)
        monkeypatch.setattr(generation, "_decode", decode)
        return config, params

    return script


def pieces(config, params, tokenizer, rows, **options):
    """The texts, and the pieces they were streamed in, for each row."""
    said = [[] for _ in rows]
    texts = generation.generate(
        config,
        params,
        tokenizer,
        ["a"] * len(rows),
        max_new_tokens=len(rows[0]),
        on_text=lambda row, more: said[row].append(more),
        **options,
    )
    return texts, said


def test_a_character_of_several_tokens_is_shown_whole(scripted, letters):
    """Streamed four tokens at a time: each cut falls inside a character."""
    text = "é€𝄞é€𝄞ab"
    ids = letters.encode(text).tolist()
    assert len(ids) == len(text.encode())
    texts, said = pieces(*scripted([ids, ids[::-1]]), letters, [ids, ids[::-1]])
    assert texts[0] == text == "".join(said[0])
    assert len(said[0]) > 2 and not any("\ufffd" in piece for piece in said[0])
    assert (
        "\ufffd" in texts[1] and "".join(said[1]) == texts[1]
    )  # bytes that never become a character are shown in the end


def test_a_stop_string_over_the_border_of_tokens_is_never_shown(scripted, letters):
    texts = ["one END two", "one EN two ", "END one two"]
    rows = [letters.encode(text).tolist() for text in texts]
    found, said = pieces(*scripted(rows), letters, rows, stop=["END", "zzz"])
    assert found == ["one ", "one EN two ", ""]
    assert ["".join(each) for each in said] == found and said[2] == []


def test_the_end_token_ends_a_row_alone(scripted, letters):
    end = letters.eos
    rows = [[*letters.encode("abc"), end, *letters.encode("de")], letters.encode("abcdef").tolist()]
    assert pieces(*scripted(rows), letters, rows)[0] == ["abc", "abcdef"]


def test_text_begins_as_in_training(decoder):
    """By the class token where there is no begin token, as a document of `NextToken` does."""
    from llm_jax.tasks.next_token import document

    for spec in ("wordpiece:60", "bpe:258"):
        tokenizer = load_tokenizer(spec, ["the cat sat on the mat"] * 5)
        batch = generation._prompts(decoder[0], tokenizer, ["the cat"], -1)
        assert batch["tokens"][0, : batch["lengths"][0]].tolist() == document("the cat", tokenizer)[:-1].tolist()


def test_a_source_longer_than_its_positions_is_refused(words):
    config = presets.marian(**{**SMALL, "positions": "learned", "max_length": 8})
    with pytest.raises(UserError, match="positions, the model has 8"):
        generation.generate(config, {}, words, ["to be or not to be or not"], max_new_tokens=2)
