"""Distillation: a student learns, beside its task, to agree with a teacher that reads the same rows.

The teacher is an argument of the step (`reference["teacher"]`), runs without dropout and has no gradient; the student's one forward pass
serves the task's loss and these terms alike. Divergences over the vocabulary stand in `divergences.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llm_jax import divergences
from llm_jax.data.teacher_cache import TeacherCache, data_fingerprint, read_header
from llm_jax.errors import ConfigError
from llm_jax.losses import Loss, LossFn
from llm_jax.models import transformer
from llm_jax.models.config import ModelConfig
from llm_jax.models.heads import Outputs
from llm_jax.models.transformer import Params
from llm_jax.storage import as_path
from llm_jax.transforms.base import IDENTITY, Transform

EPSILON = 1e-12
"""Squared length below which a vector has no direction"""


class Names(NamedTuple):
    """What the messages of a term call its parts."""

    change: str
    teacher: str
    student: str


NAMES = Names("distil", "teacher", "student")

PROJECTIONS = "projections"
"""The name of the matrices, (pairs, D_student, D_teacher), that are trained beside a student"""


def distil(
    teacher: Any,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    soft: float = 1.0,
    task: float = 1.0,
    cosine: float = 0.0,
    hidden: float = 0.0,
    attention: float = 0.0,
    layers: Sequence[tuple[int, int]] = (),
    projected: bool = False,
) -> Transform:
    """task * the task's loss + soft * T^2 divergence + cosine * (1 - cos) + hidden * its distance + attention * its distance.

    Each term is a mean as the task's loss is one: the divergence over the targets with their weights; the others of each row over its
    tokens, as heavy as the row's targets. In training `soft`, `cosine`, `hidden` and `attention` are reported too, unweighted by these
    factors; evaluation reads the task's loss alone. The student may have other sizes than the teacher, but the same tokens or classes. States and
    attention of an encoder-decoder are its decoder's.

    Args:
        teacher: a path or a `Model`.
        divergence: forward_kl (Hinton et al. 2015), reverse_kl (MiniLLM; Gu et al. 2023) or jensen_shannon (GKD; Agarwal et al. 2023).
        beta: weight of the teacher in the mixture of jensen_shannon.
        temperature: T; both models' logits are divided by it.
        soft: factor of the divergence.
        task: factor of the task's own loss.
        cosine: factor of 1 - cos of the states after the last layers (DistilBERT; Sanh et al. 2019, section 2).
        hidden: factor of the mean squared difference of states (TinyBERT; Jiao et al. 2019, eq. 8); between models of different width,
            unless `projected`, that of the cosines between the tokens of an example, which need no projection (Tung and Mori 2019, eq. 4).
        attention: factor of the squared distance of the distributions over keys, a mean over heads; of the heads' mean distributions where
            their numbers differ (TinyBERT, eq. 7, on weights).
        layers: pairs (student's layer, teacher's layer), counted from 0, for `hidden` and `attention`, which are means over them; empty to
            spread the student's layers evenly over the teacher's.
        projected: `hidden` compares the student's states times a matrix (D_student, D_teacher), one for each pair of layers, that is trained with
            the student and is no part of it (TinyBERT, eq. 8). It starts as an identity between equal widths, else normal with variance 1/D.
            Beside `lora` it is trained only where `also` names `projections`.

    Raises:
        ConfigError: a factor below 0 or nothing to minimise, or, when the loss is traced, models that do not go together.
    """
    if (soft, task, cosine, hidden, attention) == (0, 1, 0, 0, 0):
        return IDENTITY
    teacher = fspath(teacher) if isinstance(teacher, PathLike) else teacher
    given = dict(locals())
    rule = divergences.named(divergence, beta)
    factors = {"soft": soft, "cosine": cosine, "hidden": hidden, "attention": attention}
    _check("distil", {"task": task, **factors}, temperature, beta)
    pairs = tuple((int(a), int(b)) for a, b in layers)
    if pairs and not hidden and not attention:
        raise ConfigError("distil: layers go with hidden or attention, and both are 0")
    if projected and not hidden:
        raise ConfigError("distil: projected goes with hidden, which is 0")

    wanted = (["hidden_states"] if cosine or hidden else []) + (["attentions"] if attention else [])

    def loss(inner: LossFn) -> LossFn:
        sizes = sizes_of(teacher)

        def added(params: Any, batch: Any, key: Any, reference: Any) -> Loss:
            if key is None:
                return inner(params, batch, key, reference)
            with transformer.requested(*wanted):
                found = inner(params, batch, key, reference)
                batch = rows_of(found, batch)
                said = say(NAMES, sizes, reference["teacher"], batch, found.outputs)
            own, weights = found.outputs, weights_of(found, batch)
            terms = {}
            if soft:
                terms["soft"] = differ(NAMES, rule, own, said, weights, temperature)
            if wanted:
                tokens = _Tokens(batch, own, weights)
                matrices = params[PROJECTIONS] if projected else None
                terms |= _states(tokens, own, said, bool(cosine), bool(hidden), bool(attention), pairs, matrices)
            return found.plus(sum(factors[name] * term for name, term in terms.items()), terms, task)

        return added

    def extra(config: ModelConfig, key: Array) -> Params:
        sizes = sizes_of(teacher)
        count = len(pairs) or (config.decoder_depth or config.layers)
        shape = (count, config.dim, sizes.dim)
        if config.dim == sizes.dim:
            return {PROJECTIONS: jnp.broadcast_to(jnp.eye(config.dim), shape)}
        return {PROJECTIONS: jax.random.normal(key, shape) / math.sqrt(config.dim)}

    change = Transform(loss=loss, label=_label("distil", distil, given), reference={"teacher": teacher})
    return change._replace(extra=extra) if projected else change


def cached(
    path: str, *, divergence: str = "forward_kl", beta: float = 0.5, soft: float = 1.0, task: float = 1.0
) -> Transform:
    """task * the task's loss + soft * T^2 divergence, without a teacher: from its k most probable tokens, as a cache holds them.

    All other tokens count as one outcome. The cache states the temperature, and of which rows it is: those of one run, whose data, batch and
    seed must be this run's (`python -m llm_jax cache`).

    Args:
        path: folder of the cache.
        divergence: as in `distil`.
        beta: as in `distil`.
        soft: factor of the divergence.
        task: factor of the task's own loss.

    Raises:
        ConfigError: a factor below 0 or nothing to minimise, or, when the loss is traced, rows without what the cache holds.
        DataError: no cache there, or, before the first step, one of other data; at the first row that it lacks, one of too few steps.
    """
    if (soft, task) == (0, 1):
        return IDENTITY
    given = dict(locals())
    rule = divergences.named(divergence, beta)
    _check("cached", {"task": task, "soft": soft}, 1.0, beta)

    def loss(inner: LossFn) -> LossFn:
        header = read_header(as_path(path))
        temperature = header.temperature

        def added(params: Any, batch: Any, key: Any, reference: Any) -> Loss:
            found = inner(params, batch, key, reference)
            if key is None or not soft:
                return found if key is None else found.plus(0.0, {}, task)
            if "teacher_ids" not in batch:
                raise ConfigError(f"cached: the rows of this run bring nothing of the teacher's cache {path}")
            if found.outputs.kernel is None:
                raise ConfigError("cached: the student has no head over the vocabulary")
            size = found.outputs.kernel.shape[0]
            check_tokens(NAMES._replace(change="cached"), header.vocab_size or size, size)
            ids, log_p = batch["teacher_ids"], batch["teacher_log_p"]
            weights = weights_of(found, batch)
            term = divergences.over_top_k(rule, found.outputs, ids, log_p, weights, temperature)
            return found.plus(soft * term, {"soft": term}, task)

        return added

    @functools.cache
    def opened(stream: str) -> TeacherCache:
        return TeacherCache(path, data=stream)

    def rows(batch: Mapping[str, np.ndarray], fingerprint: Mapping[str, Any]) -> dict[str, Any]:
        return opened(data_fingerprint(fingerprint)).add(batch)

    def card(params: Params) -> dict[str, Any]:
        return {"teacher_cache": dataclasses.asdict(read_header(as_path(path)))}

    return Transform(loss=loss, label=_label("cached", cached, given), rows=rows, card=card)


def _check(name: str, factors: dict[str, float], temperature: float, beta: float) -> None:
    """Raise unless the arguments of a transform are in their ranges."""
    for what, value in factors.items():
        if not value >= 0:
            raise ConfigError(f"{name}: {what} is {value}: it must not be negative")
    if not any(factors.values()):
        raise ConfigError(f"{name}: every factor is 0: there is nothing to minimise")
    if not temperature > 0:
        raise ConfigError(f"{name}: temperature is {temperature}: it must be above 0")
    if not 0 < beta < 1:
        raise ConfigError(f"{name}: beta is {beta}: it must lie between 0 and 1")


def _label(name: str, function: Any, given: dict[str, Any]) -> str:
    """The call that makes a transform again, without what is at its default."""
    first, *rest = given.items()
    default = function.__kwdefaults__
    told = [repr(first[1]), *(f"{key}={value!r}" for key, value in rest if value != default[key])]
    return f"{name}({', '.join(told)})"


def sizes_of(teacher: Any) -> ModelConfig:
    """The sizes of a teacher, which keeps nothing for a backward pass and drops nothing out."""
    from llm_jax import model  # it imports the transforms

    sizes = model.sizes(teacher) if isinstance(teacher, str) else teacher.config
    return sizes.replace(dropout=0.0, remat="none")


def rows_of(found: Loss, batch: Any) -> Any:
    """The rows that the loss read: those of the batch, or others in their place."""
    return batch if found.rows is None else found.rows


def weights_of(found: Loss, batch: Any) -> Array:
    """Of each target, as the loss took them: a task may weigh classes in training."""
    return (batch["weights"] if found.weights is None else found.weights).astype(jnp.float32)


def check_rows(names: Names, sizes: ModelConfig, batch: Any) -> None:
    """Raise where the teacher cannot read a batch.

    Raises:
        ConfigError: it reads other rows, or has no place for as many tokens.
    """
    needed = "images" if sizes.patch_size else "encoder_tokens" if sizes.architecture == "encoder-decoder" else "tokens"
    if needed not in batch:
        raise ConfigError(
            f"{names.change}: the {names.teacher} is {sizes.architecture} and reads {needed}, which the task's rows lack"
        )
    if sizes.positions == "learned" and not sizes.patch_size and batch[needed].shape[1] > sizes.max_length:
        raise ConfigError(
            f"{names.change}: the {names.teacher}'s table has {sizes.max_length} positions, a row {batch[needed].shape[1]} tokens: "
            "set batch.length"
        )


def say(names: Names, sizes: ModelConfig, weights: Any, batch: Any, student: Outputs) -> Outputs:
    """What the teacher makes of a batch.

    Raises:
        ConfigError: it cannot read it.
    """
    check_rows(names, sizes, batch)
    logits = student.kernel is None
    return jax.lax.stop_gradient(transformer.apply(sizes, jax.lax.stop_gradient(weights), batch, logits=logits))


def check_tokens(names: Names, teacher: int, student: int) -> None:
    """Raise ConfigError where two vocabularies differ in size."""
    if teacher != student:
        raise ConfigError(
            f"{names.change}: the {names.teacher} has {teacher} tokens, the {names.student} {student}: both must have the same"
        )


def differ(
    names: Names,
    rule: divergences.Divergence,
    student: Outputs,
    teacher: Outputs,
    weights: Array,
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """The divergence of what the heads say.

    Raises:
        ConfigError: they say it of different things.
    """
    if (student.kernel is None) != (teacher.kernel is None):
        raise ConfigError(
            f"{names.change}: one of {names.teacher} and {names.student} has a head over the vocabulary, the other has not"
        )
    if student.kernel is not None and teacher.kernel is not None:
        check_tokens(names, teacher.kernel.shape[0], student.kernel.shape[0])
        return divergences.over_vocabulary(rule, student, teacher, weights, temperature)
    a, b = student.logits, teacher.logits
    if a is None or b is None or a.shape[:-1] != weights.shape:
        raise ConfigError(f"{names.change}: what models say is compared by a head over the vocabulary or over classes")
    if a.shape != b.shape:
        raise ConfigError(
            f"{names.change}: the {names.teacher} has {b.shape[-1]} classes, the {names.student} {a.shape[-1]}"
        )
    return divergences.over_classes(rule, a, b, weights, temperature)


class _Tokens:
    """The tokens of a batch that count where states are compared, and their weight: each row's is that of its targets."""

    def __init__(self, batch: Any, student: Outputs, weights: Array):
        states = student.hidden_states if student.hidden_states is not None else student.attentions
        assert states is not None
        shape = states.shape[1:3] if student.hidden_states is not None else (states.shape[1], states.shape[3])
        segments = batch.get("segment_ids")
        self.segments: Int[Array, "B S"] = jnp.ones(shape, jnp.int32) if segments is None else segments
        self.real: Bool[Array, "B S"] = self.segments > 0
        share = 1 / jnp.maximum(jnp.sum(self.real, axis=1), 1)
        self.weights: Float[Array, "B S"] = self.real * (share * weights.reshape(shape[0], -1).sum(axis=1))[:, None]

    def sum(self, terms: Float[Array, "B S"]) -> Float[Array, ""]:
        """Each row's mean over its tokens, times its weight."""
        return jnp.sum(self.weights * jnp.where(self.real, terms, 0))


def _states(
    tokens: _Tokens,
    student: Outputs,
    teacher: Outputs,
    cosine: bool,
    hidden: bool,
    attention: bool,
    pairs: tuple[tuple[int, int], ...],
    matrices: Float[Array, "P D E"] | None = None,
) -> dict[str, Array]:
    """The terms that compare states and attention.

    Raises:
        ConfigError: the models have no such layers, or widths that cosine cannot compare.
    """
    found: dict[str, Array] = {}
    a, b = student.hidden_states, teacher.hidden_states
    if cosine:
        assert a is not None and b is not None
        if a.shape[-1] != b.shape[-1]:
            raise ConfigError(f"distil: cosine compares states of one width, not of {a.shape[-1]} and {b.shape[-1]}")
        found["cosine"] = tokens.sum(1 - jnp.sum(_unit(a[-1]) * _unit(b[-1]), axis=-1))
    if hidden:
        assert a is not None and b is not None
        mapped = _pairs(pairs, a.shape[0], b.shape[0])
        if matrices is not None:
            each = [_squared(a[i] @ matrix.astype(a.dtype), b[j]) for (i, j), matrix in zip(mapped, matrices)]
        elif a.shape[-1] == b.shape[-1]:
            each = [_squared(a[i], b[j]) for i, j in mapped]
        else:
            each = [_relations(a[i], b[j], tokens.segments) for i, j in mapped]
        found["hidden"] = tokens.sum(jnp.mean(jnp.stack(each), axis=0))
    if attention:
        a, b = student.attentions, teacher.attentions
        assert a is not None and b is not None
        each = [_attention(a[i], b[j]) for i, j in _pairs(pairs, a.shape[0], b.shape[0])]
        found["attention"] = tokens.sum(jnp.mean(jnp.stack(each), axis=0))
    return found


def _pairs(given: tuple[tuple[int, int], ...], student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """The layer map; without one, layer i of the student goes with layer ceil((i + 1) L_t / L_s) - 1 of the teacher."""
    for i, j in given:
        if not (0 <= i < student and 0 <= j < teacher):
            raise ConfigError(
                f"distil: layers has the pair {(i, j)}: the student has {student} layers, the teacher {teacher}"
            )
    return given or tuple((i, -(-(i + 1) * teacher // student) - 1) for i in range(student))


def _unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """x / |x|."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), EPSILON))


def _squared(a: Float[Array, "B S D"], b: Float[Array, "B S D"]) -> Float[Array, "B S"]:
    """The mean over D of (a - b)^2."""
    return jnp.mean(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)), axis=-1)


def _relations(a: Float[Array, "B S D"], b: Float[Array, "B S E"], segments: Int[Array, "B S"]) -> Float[Array, "B S"]:
    """Of each token the mean over the tokens t of its example of (cos(a_s, a_t) - cos(b_s, b_t))^2: no width enters, no projection."""
    a, b = (jnp.einsum("bsd,btd->bst", x, x) for x in (_unit(a), _unit(b)))
    together = segments[:, :, None] == segments[:, None, :]
    return jnp.sum(together * jnp.square(a - b), axis=-1) / jnp.sum(together, axis=-1)


def _attention(a: Float[Array, "B H S T"], b: Float[Array, "B G S T"]) -> Float[Array, "B S"]:
    """The mean over heads of sum_t (a_t - b_t)^2; of the heads' means where the two have different numbers of them."""
    if a.shape[1] != b.shape[1]:
        a, b = (jnp.mean(x, axis=1, keepdims=True) for x in (a, b))
    return jnp.mean(jnp.sum(jnp.square(a - b), axis=-1), axis=1)
