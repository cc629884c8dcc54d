"""Distillation: divergences against NumPy and plain gradients, the terms that compare states, the laws, and the cache of a teacher."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import divergences, losses, model, sharding, step
from llm_jax.data.teacher_cache import Header, TeacherCache, write_cache
from llm_jax.errors import ConfigError, DataError
from llm_jax.losses import Loss
from llm_jax.models import presets, transformer
from llm_jax.models.heads import Outputs
from llm_jax.tasks import Classification, NextToken
from llm_jax.transforms import IDENTITY
from llm_jax.transforms.distil import _attention as attention_distance
from llm_jax.transforms.distil import cached, distil
from tests.families import FAMILIES, SIZE, batch_of, random_params, tiny_model
from tests.transforms.laws import FAST, objective

jit = functools.partial(jax.jit, compiler_options=FAST)
B, S, D, E, V = 3, 10, 8, 6, 23
RNG = np.random.default_rng(0)


def drawn(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


STUDENT = (drawn(B, S, D), drawn(V, D), drawn(V))
TEACHER = (drawn(B, S, E), drawn(V, E), None)
WEIGHTS = np.where(RNG.random((B, S)) < 0.3, 0, RNG.random((B, S))).astype(np.float32)
FOUR = 4 * B * 2 * V * 3
"""The size of chunk that cuts rows of ten into four pieces of three tokens, the last of which is filled up."""


def outputs(hidden, kernel, bias):
    return Outputs(hidden, None, kernel, bias)


def logits_of(hidden, kernel, bias):
    return hidden @ kernel.T + (0 if bias is None else bias)


def softmax(x, numpy=np):
    x = numpy.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def formula(name, student, teacher, temperature=1.0, beta=0.5, numpy=np):
    """T^2 times the divergence of the softmaxes, written with probabilities."""
    q, p = softmax(student / temperature, numpy), softmax(teacher / temperature, numpy)

    def kl(a, b):
        return (a * numpy.log(a / b)).sum(axis=-1)

    m = beta * p + (1 - beta) * q
    found = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
    }
    return temperature**2 * found[name]()


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


# The divergences


@pytest.mark.parametrize(
    "name, temperature, count",
    [
        ("forward_kl", 1.0, 1),
        ("forward_kl", 2.0, 4),
        ("reverse_kl", 1.0, 10),
        ("reverse_kl", 2.0, 1),
        ("jensen_shannon", 1.0, 4),
        ("jensen_shannon", 2.0, 1),
    ],
)
def test_values_and_gradients(name, temperature, count, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", {1: losses.CHUNK, 4: FOUR, 10: 4}[count])
    assert losses._chunks(B, S, 2 * V) == count
    rule = divergences.named(name, 0.3)

    def ours(*student):
        return 3 * divergences.over_vocabulary(rule, outputs(*student), outputs(*TEACHER), WEIGHTS, temperature)

    def plain(*student):
        each = formula(name, logits_of(*student), logits_of(*TEACHER), temperature, 0.3, jnp)
        return 3 * jnp.sum(WEIGHTS * each)

    value, gradient = jit(jax.value_and_grad(ours, (0, 1, 2)))(*STUDENT)
    each = formula(name, logits_of(*double(STUDENT)), logits_of(*double(TEACHER)), temperature, 0.3)
    np.testing.assert_allclose(value, 3 * (WEIGHTS * each).sum(), rtol=1e-5)
    np.testing.assert_allclose(jit(ours)(*STUDENT), value, rtol=1e-6)
    expected = jit(jax.grad(plain, (0, 1, 2)))(*STUDENT)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), gradient, expected)
    assert (np.asarray(gradient[0])[WEIGHTS == 0] == 0).all() and np.abs(gradient[0]).max() > 0.1


@pytest.mark.parametrize("name", divergences.NAMES)
def test_of_equal_models_it_is_zero_and_so_is_its_gradient(name):
    def ours(*student):
        return divergences.over_vocabulary(divergences.named(name), outputs(*student), outputs(*STUDENT), WEIGHTS, 2.0)

    value, gradient = jit(jax.value_and_grad(ours, (0, 1, 2)))(*STUDENT)
    for x in (value, *gradient):
        np.testing.assert_allclose(x, 0, atol=1e-5)


def test_jensen_shannon_at_its_ends_is_a_kullback_leibler_divergence():
    """D / b as b goes to 0 is the forward one, D / (1 - b) as b goes to 1 the reverse (GKD, appendix)."""
    a, b = 0.2 * logits_of(*STUDENT), 0.2 * logits_of(*TEACHER)
    low = divergences.jensen_shannon(a, b, 1e-3) / 1e-3
    high = divergences.jensen_shannon(a, b, 1 - 1e-3) / 1e-3
    np.testing.assert_allclose(low, formula("forward_kl", a, b), rtol=0.01, atol=1e-3)
    np.testing.assert_allclose(high, formula("reverse_kl", a, b), rtol=0.01, atol=1e-3)


def test_half_precision():
    """Hidden states in bfloat16: the sum and the gradient of the float32 kernel stay in float32."""

    def ours(hidden, kernel):
        return divergences.over_vocabulary(
            divergences.forward_kl, outputs(hidden, kernel, None), outputs(*TEACHER), WEIGHTS
        )

    value, gradient = jit(jax.value_and_grad(ours, (0, 1)))(jnp.asarray(STUDENT[0], jnp.bfloat16), STUDENT[1])
    assert [x.dtype for x in (value, *gradient)] == [jnp.float32, jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(value, jit(ours)(*STUDENT[:2]), rtol=0.02)


@pytest.mark.parametrize("name", divergences.NAMES)
def test_large_logits(name):
    def ours(hidden):
        student = outputs(hidden, *STUDENT[1:])
        return divergences.over_vocabulary(divergences.named(name), student, outputs(*TEACHER), WEIGHTS)

    value, gradient = jit(jax.value_and_grad(ours))(200 * STUDENT[0])
    assert np.isfinite(value) and np.isfinite(gradient).all()


# The transform on a decoder: `problem` is the student, its teacher is wider


WIDE = presets.llama(vocab_size=48, max_length=12, layers=3, dim=24, heads=4, mlp_dim=32)


@pytest.fixture(scope="module")
def wide():
    return model.Model(WIDE, random_params(WIDE))


def found(change, problem, teacher, key=True, loss=None):
    """The loss and its gradient under a transform."""

    def run(params, batch, reference):
        return step.differentiate(change.loss(loss or problem.loss))(
            params, batch, jax.random.key(0) if key else None, reference
        )

    return jit(run)(problem.params, problem.batch, {"teacher": teacher.params})


def test_total_is_task_and_soft(problem, wide):
    name = "reverse_kl"
    change = distil(wide, divergence=name, temperature=2.0, soft=0.7, task=0.4)
    got, gradient = found(change, problem, wide)

    def plain(params):
        says = transformer.apply(problem.config, params, problem.batch).logits
        other = transformer.apply(WIDE, wide.params, problem.batch).logits
        soft = jnp.sum(problem.batch["weights"] * formula(name, says, other, 2.0, numpy=jnp))
        return 0.4 * problem.loss(params, problem.batch, jax.random.key(0), {}).total + 0.7 * soft, soft

    (total, soft), expected = jit(jax.value_and_grad(plain, has_aux=True))(problem.params)
    np.testing.assert_allclose(got.total, total, rtol=1e-5)
    np.testing.assert_allclose(got.metrics["soft"], soft, rtol=1e-5)
    whole = problem.whole[0]
    assert float(got.weight) == float(whole.weight)
    np.testing.assert_allclose(got.metrics["nll"], whole.metrics["nll"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), gradient, expected)


def test_at_zero_strength_it_is_the_identity(problem, wide):
    assert distil("no such path", soft=0) is IDENTITY and cached("no such path", soft=0) is IDENTITY


def test_evaluation_is_untouched(problem, wide):
    marker = Loss(jnp.ones(()), jnp.ones(()), {})
    inner = lambda *arguments: marker  # noqa: E731
    assert distil(wide, cosine=1.0, hidden=1.0, attention=1.0).loss(inner)({}, {}, None, {}) is marker


def test_there_is_one_forward_pass_of_each(problem, wide, monkeypatch):
    runs = []
    run = transformer._stack
    monkeypatch.setattr(transformer, "_stack", lambda c, *rest: (runs.append(c), run(c, *rest))[1])
    change = distil(wide, attention=1.0, hidden=1.0)
    jax.eval_shape(
        change.loss(problem.loss), problem.params, problem.batch, jax.random.key(0), {"teacher": wide.params}
    )
    assert runs == [problem.config, WIDE]
    assert transformer._REQUESTED.get() == frozenset()


def test_the_teacher_has_neither_dropout_nor_gradient(problem, wide):
    wild = model.Model(WIDE.replace(dropout=0.5), wide.params)

    def soft(teacher, key):
        return distil(wild).loss(problem.loss)(problem.params, problem.batch, key, {"teacher": teacher}).total

    run = jit(jax.value_and_grad(soft))
    (a, gradient), (b, _) = run(wide.params, jax.random.key(0)), run(wide.params, jax.random.key(1))
    assert float(a) == float(b) and not any(np.any(x) for x in jax.tree.leaves(gradient))


@functools.partial(jit, static_argnums=0)
def states(config, params, batch):
    return transformer.apply(config, params, batch, hidden_states=True, attentions=True)


def test_terms_on_states_and_attention(problem):
    """A batch of packed rows with padding, models of one width, a map of layers."""
    sizes, batch = problem.config, batch_of(problem.config)
    batch |= {"targets": batch["tokens"], "weights": (batch["segment_ids"] == 1).astype(np.float32)}
    other = model.Model(sizes.replace(layers=3), random_params(sizes.replace(layers=3)))
    change = distil(other, cosine=0.5, hidden=0.25, attention=2.0, layers=((0, 2), (1, 0)))
    mine = problem._replace(batch=batch)
    got, gradient = found(change, mine, other)
    own, said = (states(c, p, batch) for c, p in ((sizes, problem.params), (other.config, other.params)))
    real = batch["segment_ids"] > 0
    share = real / real.sum(axis=1, keepdims=True) * batch["weights"].sum(axis=1, keepdims=True)

    def cos(a, b):
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    a, b = np.float64(own.hidden_states), np.float64(said.hidden_states)
    np.testing.assert_allclose(got.metrics["cosine"], (share * (1 - cos(a[-1], b[-1]))).sum(), rtol=1e-5)
    squared = (((a[0] - b[2]) ** 2).mean(-1) + ((a[1] - b[0]) ** 2).mean(-1)) / 2
    np.testing.assert_allclose(got.metrics["hidden"], (share * squared).sum(), rtol=1e-5)
    x, y = np.float64(own.attentions), np.float64(said.attentions)
    apart = (((x[0] - y[2]) ** 2).sum(-1).mean(1) + ((x[1] - y[0]) ** 2).sum(-1).mean(1)) / 2
    np.testing.assert_allclose(got.metrics["attention"], (share * apart).sum(), rtol=1e-5)
    m = got.metrics
    task = mine.loss(problem.params, batch, jax.random.key(0), {}).total
    expected = task + m["soft"] + 0.5 * m["cosine"] + 0.25 * m["hidden"] + 2 * m["attention"]
    np.testing.assert_allclose(got.total, expected, rtol=1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_models_of_other_width_are_compared_by_their_relations(problem, wide):
    batch = {**problem.batch, "segment_ids": np.repeat([[1] * 5 + [2] * 4 + [0] * 3], 8, 0).astype(np.int32)}
    got, _ = found(distil(wide, hidden=1.0, attention=1.0), problem._replace(batch=batch), wide)
    own, said = (states(c, p, batch) for c, p in ((problem.config, problem.params), (WIDE, wide.params)))
    expected = 0.0
    for i, j in ((0, 1), (1, 2)):  # two layers spread over three
        a, b = np.float64(own.hidden_states[i]), np.float64(said.hidden_states[j])
        for row, weight in enumerate(batch["weights"].sum(axis=1)):
            for part in (slice(0, 5), slice(5, 9)):
                x, y = (z[row, part] / np.linalg.norm(z[row, part], axis=-1, keepdims=True) for z in (a, b))
                expected += ((x @ x.T - y @ y.T) ** 2).mean(1).sum() / 9 * weight / 2
    np.testing.assert_allclose(got.metrics["hidden"], expected, rtol=1e-5)
    with pytest.raises(ConfigError, match="cosine compares states of one width, not of 16 and 24"):
        found(distil(wide, cosine=1.0), problem, wide)


def test_states_of_other_width_through_a_projection(problem, wide):
    change = distil(wide, soft=0.0, hidden=1.0, projected=True, layers=((0, 2), (1, 0)))
    extra = change.extra(problem.config, jax.random.key(1))
    (matrices,) = extra.values()
    assert matrices.shape == (2, problem.config.dim, WIDE.dim)
    assert np.asarray(matrices).var() == pytest.approx(1 / problem.config.dim, rel=0.2)
    got, gradient = found(change, problem._replace(params={**problem.params, **extra}), wide)
    own, said = (states(c, p, problem.batch) for c, p in ((problem.config, problem.params), (WIDE, wide.params)))
    a, b, w = (np.float64(x) for x in (own.hidden_states, said.hidden_states, matrices))
    squared = (((a[0] @ w[0] - b[2]) ** 2).mean(-1) + ((a[1] @ w[1] - b[0]) ** 2).mean(-1)) / 2
    expected = (squared.mean(axis=1) * problem.batch["weights"].sum(axis=1)).sum()
    np.testing.assert_allclose(got.metrics["hidden"], expected, rtol=1e-5)
    assert all(np.abs(g).max() > 0 for g in gradient["projections"])
    same = distil(wide, hidden=1.0, projected=True).extra(WIDE, jax.random.key(1))["projections"]
    np.testing.assert_array_equal(same, np.broadcast_to(np.eye(WIDE.dim), (WIDE.layers, WIDE.dim, WIDE.dim)))
    with pytest.raises(ConfigError, match="projected goes with hidden, which is 0"):
        distil(wide, projected=True)


def test_heads_of_other_number_are_averaged(problem):
    a, b = (softmax(drawn(2, h, 3, 5)) for h in (4, 2))
    np.testing.assert_allclose(attention_distance(a, b), ((a.mean(1) - b.mean(1)) ** 2).sum(-1), rtol=1e-5)


@pytest.fixture(scope="module")
def whole(problem, wide):
    """Every term that models of other width have, and the gradient, on one device."""
    change = distil(wide, hidden=1.0, attention=1.0)
    return change, *found(change, problem, wide)


def test_slices_of_a_batch_add_up(problem, wide, whole):
    change, *expected = whole
    run = jit(
        lambda batch: step.differentiate(change.loss(problem.loss))(
            problem.params, batch, jax.random.key(0), {"teacher": wide.params}
        )
    )
    halves = [run(jax.tree.map(lambda x, i=i: x[i::2], problem.batch)) for i in range(2)]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-4, atol=1e-3), *halves, tuple(expected))


def test_on_a_mesh_it_is_the_same(problem, wide, whole, mesh):
    change, expected, gradient = whole
    many = mesh(data=2, fsdp=2, tensor=2)

    def placed(config, params):
        return jax.device_put(
            params, sharding.params_shardings(many, transformer.axes(config), transformer.shapes(config))
        )

    with jax.set_mesh(many):
        there = problem._replace(params=placed(problem.config, problem.params), batch=sharding.put(problem.batch, many))
        got, other = found(change, there, model.Model(WIDE, placed(WIDE, wide.params)))
    np.testing.assert_allclose(got.total, expected.total, rtol=1e-5)
    for name, x in expected.metrics.items():
        np.testing.assert_allclose(got.metrics[name], x, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), other, gradient)


def test_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch):
    """The gradient of a step on eight rows of S and of 4 S tokens, with chunks of a token of each."""
    vocab = 8192
    sizes = presets.llama(vocab_size=vocab, max_length=1024, layers=1, dim=8, heads=1, mlp_dim=8)
    monkeypatch.setattr(losses, "CHUNK", 4 * 8 * 2 * vocab)
    teacher = model.Model(sizes, transformer.shapes(sizes))
    grad = step.differentiate(distil(teacher).loss(NextToken().loss(sizes)))

    def held(length):
        row = jax.ShapeDtypeStruct((8, length), jnp.int32)
        batch = {"tokens": row, "targets": row, "weights": jax.ShapeDtypeStruct((8, length), jnp.float32)}
        lowered = jax.jit(grad).lower(teacher.params, batch, jax.random.key(0), {"teacher": teacher.params})
        return lowered.compile(compiler_options=FAST).memory_analysis().temp_size_in_bytes

    short, long = held(48), held(192)
    one = 4 * 8 * 48 * vocab
    assert short < one, "less than the logits of the short row"
    assert long - short < 0.2 * 3 * one, "far less than the logits that the long row has more"


# Every family


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    """A teacher equal to the student adds nothing; another one adds what its softmax gives."""
    head = dict(head="mlm") if name == "bert" else {}
    tiny = tiny_model(name, dropout=0.0, **head)
    loss, batch = objective(tiny.config)
    change = distil(model.Model(tiny.config, tiny.params), cosine=1.0, hidden=1.0, attention=1.0).loss(loss)

    @jit
    def run(params, batch, teacher):
        said = tuple(transformer.apply(tiny.config, p, batch).logits for p in (params, teacher))
        return change(params, batch, jax.random.key(0), {"teacher": teacher}).metrics, said

    terms = ("soft", "cosine", "hidden", "attention")
    same, _ = run(tiny.params, batch, tiny.params)
    for term in terms:
        np.testing.assert_allclose(same[term], 0, atol=1e-4)
    other, said = run(tiny.params, batch, jax.tree.map(lambda x: x * 0.8, tiny.params))
    expected = (batch["weights"] * formula("forward_kl", *double(said))).sum()
    np.testing.assert_allclose(other["soft"], expected, rtol=2e-4)
    assert all(np.isfinite(other[term]) and other[term] > 0 for term in terms)


def test_classes_and_their_weights_in_the_task():
    tiny = tiny_model("distilbert", dropout=0.0)
    _, batch = objective(tiny.config)
    loss = Classification(labels=("a", "b", "c"), class_weights=(1, 2, 3)).loss(tiny.config)
    second = model.Model(tiny.config, jax.tree.map(lambda x: x * 0.8, tiny.params))
    change = distil(second, divergence="reverse_kl", temperature=2.0, soft=0.5, task=2.0)
    run = jit(
        lambda wrapped: (loss, change.loss(loss))[wrapped](
            tiny.params, batch, jax.random.key(0), {"teacher": second.params}
        ),
        static_argnums=0,
    )
    inner, got = run(False), run(True)
    out = [np.float64(transformer.apply(tiny.config, p, batch).logits) for p in (tiny.params, second.params)]
    weights = batch["weights"] * np.array([1, 2, 3])[batch["targets"]]
    soft = (weights * formula("reverse_kl", *out, 2.0)).sum()
    np.testing.assert_allclose(got.total, 2 * inner.total + 0.5 * soft, rtol=1e-4)
    assert float(got.weight) == float(inner.weight) == 1 + 2 + 3 + 1 + 2


# What does not go together


def test_bad_arguments():
    for arguments, said in (
        (dict(divergence="forward"), "unknown divergence 'forward'; did you mean 'forward_kl'"),
        (dict(soft=-1), "distil: soft is -1: it must not be negative"),
        (dict(temperature=0), "distil: temperature is 0: it must be above 0"),
        (dict(divergence="jensen_shannon", beta=1.0), "distil: beta is 1.0: it must lie between 0 and 1"),
        (dict(soft=0, task=0), "distil: every factor is 0: there is nothing to minimise"),
        (dict(layers=((0, 0),)), "distil: layers go with hidden or attention"),
    ):
        with pytest.raises(ConfigError, match=said):
            distil("teacher", **arguments)


def test_models_that_do_not_go_together(problem):
    def shaped(config, **arguments):
        change = distil(model.Model(config, None), **arguments)
        jax.eval_shape(
            change.loss(problem.loss),
            problem.params,
            problem.batch,
            jax.random.key(0),
            {"teacher": transformer.shapes(config)},
        )

    for config, arguments, said in (
        (presets.llama(**{**SIZE, "vocab_size": 50}), {}, "the teacher has 50 tokens, the student 48"),
        (presets.t5(**{**SIZE, "vocab_size": 48}), {}, "reads encoder_tokens, which the task's rows lack"),
        (presets.bert(**{**SIZE, "vocab_size": 48}), {}, "one of teacher and student has a head over the vocabulary"),
        (WIDE, dict(hidden=1.0, layers=((0, 3),)), r"the pair \(0, 3\): the student has 2 layers, the teacher 3"),
    ):
        with pytest.raises(ConfigError, match=said):
            shaped(config, **arguments)


def test_the_label_makes_it_again():
    for change in (
        distil("runs/big", divergence="jensen_shannon", beta=0.1, temperature=2.0, cosine=1.0),
        distil("runs/big", hidden=1.0, layers=((0, 1), (1, 3))),
        cached("caches/big", soft=0.5),
    ):
        assert eval(change.label).label == change.label
    assert distil("runs/big").label == "distil('runs/big')"
    assert distil("runs/big").reference == {"teacher": "runs/big"}


def test_a_teacher_that_lies_in_a_folder(problem, wide, tmp_path):
    model.save(wide, tmp_path / "wide")
    there, here = (found(distil(x), problem, wide)[0] for x in (tmp_path / "wide", wide))
    assert float(there.total) == float(here.total)


# The teacher's most probable tokens


@pytest.mark.parametrize("chunk", [None, FOUR])
def test_top_k(chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(losses, "CHUNK", chunk)
    ids, log_p = jit(lambda: divergences.top_k(outputs(*TEACHER), 5, 2.0))()
    expected = np.log(softmax(logits_of(*double(TEACHER)) / 2))
    np.testing.assert_array_equal(ids, np.argsort(-expected, axis=-1)[..., :5])
    np.testing.assert_allclose(log_p[..., :5], np.take_along_axis(expected, np.asarray(ids), -1), atol=1e-5)
    np.testing.assert_allclose(np.exp(log_p[..., 5]), 1 - np.exp(np.float64(log_p[..., :5])).sum(-1), rtol=1e-3)


def test_the_others_of_a_teacher_that_is_sure_are_not_lost_to_rounding():
    hidden, kernel, bias = TEACHER
    sharp = outputs(40 * hidden, kernel, bias)
    ids, log_p = divergences.top_k(sharp, 5)
    logits = np.float64(logits_of(*double((40 * hidden, kernel, bias))))
    np.put_along_axis(logits, np.asarray(ids), -np.inf, -1)
    others = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    whole = np.float64(logits_of(*double((40 * hidden, kernel, bias))))
    norm = np.log(np.exp(whole - whole.max(-1, keepdims=True)).sum(-1)) + whole.max(-1)
    assert (others - norm).min() < np.log(1e-7)
    np.testing.assert_allclose(log_p[..., 5], others - norm, rtol=1e-3)


@pytest.mark.parametrize("name, chunk", [("forward_kl", None), ("forward_kl", FOUR), ("jensen_shannon", FOUR)])
def test_divergence_with_the_others_as_one(name, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(losses, "CHUNK", chunk)
    ids, log_p = divergences.top_k(outputs(*TEACHER), 5, 2.0)
    rule = divergences.named(name)

    def ours(*student):
        return divergences.over_top_k(rule, outputs(*student), ids, log_p, WEIGHTS, 2.0)

    def joined(logits, numpy):
        p = softmax(logits / 2, numpy)
        kept = numpy.take_along_axis(p, np.asarray(ids), -1)
        return 2 * numpy.log(numpy.concatenate([kept, 1 - kept.sum(-1, keepdims=True)], -1))

    def plain(*student, numpy=jnp, teacher=TEACHER):
        given = (joined(logits_of(*x), numpy) for x in (student, teacher))
        return (WEIGHTS * formula(name, *given, 2.0, numpy=numpy)).sum()

    value, gradient = jit(jax.value_and_grad(ours, (0, 1, 2)))(*STUDENT)
    np.testing.assert_allclose(value, plain(*double(STUDENT), numpy=np, teacher=double(TEACHER)), rtol=1e-4)
    expected = jit(jax.grad(plain, (0, 1, 2)))(*STUDENT)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), gradient, expected)
    full = divergences.over_vocabulary(rule, outputs(*STUDENT), outputs(*TEACHER), WEIGHTS, 2.0)
    assert 0 < float(value) < float(full)
    every = divergences.top_k(outputs(*TEACHER), V, 2.0)
    np.testing.assert_allclose(divergences.over_top_k(rule, outputs(*STUDENT), *every, WEIGHTS, 2.0), full, rtol=1e-4)


@pytest.fixture
def cache(problem, wide, tmp_path):
    """A cache of the rows of the problem, two shards, at temperature 2."""
    ids, log_p = jit(lambda params: divergences.top_k(transformer.apply(WIDE, params, problem.batch), 6, 2.0))(
        wide.params
    )
    header = Header("the teacher", "the data", 6, 2.0)
    parts = [
        (jax.tree.map(lambda x, i=i: x[i : i + 4], problem.batch), ids[i : i + 4], log_p[i : i + 4]) for i in (0, 4, 0)
    ]
    written = write_cache(tmp_path / "cache", header, parts, shard_rows=5)
    p = np.exp(np.float64(log_p[..., :6])).sum(-1)
    weights = problem.batch["weights"]
    np.testing.assert_allclose(written.mass, (p * weights).sum() / weights.sum(), rtol=1e-6)
    assert written.rows == 8 and len(list((tmp_path / "cache").glob("*.npz"))) == 2
    return tmp_path / "cache", ids, log_p


def test_a_student_of_a_cache(cache, problem):
    folder, ids, log_p = cache
    batch = TeacherCache(folder, teacher="the teacher", data="the data").add(problem.batch)
    np.testing.assert_array_equal(batch["teacher_ids"], ids)
    np.testing.assert_allclose(batch["teacher_log_p"], log_p, rtol=1e-3)
    change = cached(str(folder), soft=0.5)
    loss = change.loss(problem.loss)

    @jit
    def run(params, ids, log_p):
        got = loss(params, batch, jax.random.key(0), {})
        weights = problem.batch["weights"]
        return got, divergences.over_top_k(divergences.forward_kl, got.outputs, ids, log_p, weights, 2.0)

    got, soft = run(problem.params, ids, log_p)
    np.testing.assert_allclose(got.metrics["soft"], soft, rtol=2e-3)
    np.testing.assert_allclose(got.total, problem.whole[0].total + 0.5 * got.metrics["soft"], rtol=1e-5)
    trace = functools.partial(jax.eval_shape, loss, problem.params, problem.batch)
    assert "soft" not in trace(None, {}).metrics
    with pytest.raises(ConfigError, match="the rows of this run bring nothing of the teacher's cache"):
        trace(jax.random.key(0), {})


def test_a_cache_of_something_else(cache, problem, tmp_path):
    folder = cache[0]
    for other, said in (
        (dict(teacher="another"), "is of another teacher"),
        (dict(data="others"), "is of another data"),
    ):
        with pytest.raises(DataError, match=said):
            TeacherCache(folder, **other)
    changed = {**problem.batch, "tokens": problem.batch["tokens"] + 1}
    with pytest.raises(DataError, match="a row of this run is not in the cache"):
        TeacherCache(folder).add(changed)
    with pytest.raises(DataError, match="holds a cache already"):
        write_cache(folder, Header("", "", 6, 1.0), [])
    with pytest.raises(DataError, match="holds no complete cache"):
        TeacherCache(tmp_path / "nothing")
    (folder / "00001.npz").unlink()
    with pytest.raises(DataError, match="holds 5 of its 8 rows"):
        TeacherCache(folder)


@pytest.mark.parametrize("terms", [dict(), dict(cosine=1.0, hidden=1.0)], ids=["soft", "states"])
def test_a_term_is_a_mean_over_what_the_task_weighs(terms):
    """Classes that all weigh ten times as much change nothing; one that does draws each term to its rows as it draws the task's loss."""
    sizes = FAMILIES["bert"].replace(head="classification", labels=2, pooler="none", dropout=0.0)
    params, batch = random_params(sizes), batch_of(sizes)
    teacher = model.Model(sizes, jax.tree.map(lambda x: x * 0.8, params))
    rows = batch["tokens"].shape[0]
    batch |= {"targets": np.arange(rows) % 2, "weights": np.ones(rows, np.float32)}

    def means(weights, batch):
        task = Classification(labels=("a", "b"), class_weights=weights)
        loss = distil(teacher, **terms).loss(task.loss(sizes))
        found = jit(lambda p: loss(p, batch, jax.random.key(0), {"teacher": teacher.params}))(params)
        return {name: float(x / found.weight) for name, x in {**found.metrics, "total": found.total}.items()}

    plain, tenfold = means((1.0, 1.0), batch), means((10.0, 10.0), batch)
    assert plain == pytest.approx(tenfold, rel=1e-5) and plain["soft"] > 1e-3
    first = {name: x[::2] for name, x in batch.items()}
    assert means((1e6, 1.0), batch) == pytest.approx(means((1.0, 1.0), first), rel=1e-3)
