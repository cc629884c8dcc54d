"""What a teacher says of the rows that a run will train on, written down once, so that students learn from it without the teacher."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from llm_jax import checkpoint, divergences, model, parts, program, sharding
from llm_jax.card import content_hash
from llm_jax.config import Run
from llm_jax.data.teacher_cache import HEADER, Header, data_fingerprint, write_cache
from llm_jax.errors import ConfigError, DataError
from llm_jax.models import transformer
from llm_jax.storage import Path, as_path
from llm_jax.transforms import Transform
from llm_jax.transforms.distil import Names, check_rows, check_tokens


def cache(run: Run, teacher: str, folder: str | Path, k: int = 32, temperature: float = 1.0) -> Header:
    """Write the k most probable tokens under softmax(logits / T) at each place of every row of the run's steps.

    No (B, S, V) array is kept: the vocabulary's logits are made in chunks of rows. A row that comes again is kept once. Of the run's transforms
    only the sizes count, since rows do not depend on the rest; `cached(folder)` among them reads what is written here.

    Args:
        run: the student's; its data, task, tokenizer, batch, seed and steps decide the rows.
        teacher: a path; a model with a head over the same vocabulary.
        folder: must hold no cache yet.
        k: tokens kept at each place; the others are one outcome.
        temperature: T.

    Raises:
        ConfigError: k or T out of range, a teacher without a head over the vocabulary, of another vocabulary's size than the student, or that
            cannot read the rows; several processes.
        DataError: a teacher with another tokenizer, a folder that holds a cache or cannot be written.
    """
    if jax.process_count() > 1:
        raise ConfigError("cache: the rows of a run are written by one process")
    if not temperature > 0:
        raise ConfigError(f"cache: temperature is {temperature}: it must be above 0")
    if (as_path(folder) / HEADER).exists():
        raise DataError(f"{folder} holds a cache already")
    sizes = model.sizes(teacher).replace(dropout=0.0, remat="none")
    if sizes.head not in ("lm", "mlm"):
        raise ConfigError(f"cache: {teacher} has no head over the vocabulary (head={sizes.head!r})")
    if not 0 < k <= sizes.vocab_size:
        raise ConfigError(f"cache: k is {k}: it must lie between 1 and the teacher's {sizes.vocab_size} tokens")
    made = parts.build(dataclasses.replace(run, transforms=tuple(Transform(config=x.config) for x in run.transforms)))
    names = Names("cache", "teacher", "student")
    try:
        check_tokens(names, sizes.vocab_size, made.model.vocab_size)
        check_rows(names, sizes, program.abstract_batch(made.run, made.mesh))
        known = model.read_tokenizer(teacher)
        if known is not None and not known.same_tokens(made.tokenizer):
            raise DataError(f"the teacher {teacher} has another tokenizer than the run: its tokens mean something else")
        loaded = model.load(teacher, made.mesh)

        @jax.jit
        def say(params: Any, batch: Any) -> Any:
            return divergences.top_k(transformer.apply(sizes, params, batch, logits=False), k, temperature)

        def batches() -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
            for _ in range(made.run.steps):
                rows = next(made.train).batch
                ids, log_p = jax.device_get(say(loaded.params, sharding.put(rows, made.mesh)))
                yield rows, ids, log_p

        data = data_fingerprint(made.train.fingerprint())
        header = Header(content_hash(loaded.params), data, k, temperature, vocab_size=sizes.vocab_size)
        with jax.set_mesh(made.mesh):
            return write_cache(as_path(folder), header, batches())
    except OSError as e:
        if e.filename is None and not checkpoint.is_full(e):
            raise
        why = "no space left on the disk" if checkpoint.is_full(e) else e.strerror
        raise DataError(f"{folder}: {why}: the cache is not complete") from e
    finally:
        made.close()


def describe(header: Header, folder: str | Path) -> dict[str, Any]:
    """What was written, for the command's answer."""
    size = sum(path.stat().st_size for path in as_path(folder).iterdir())
    return {**dataclasses.asdict(header), "bytes": size, "path": str(folder)}
