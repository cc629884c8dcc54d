"""From the documents of some sources to the batches of a run, as one Grain pipeline.

Responsible for the order of documents, the shares of shards and worker processes, the mixture of sources, and for a
stream that is a pure function of the config and can be stopped and continued at any batch. Reading and cutting
documents is the business of `documents.py` and the task, packing that of `packing.py`, sums over a run that of
`accounting.py`, arrays on devices that of the train loop.
"""

import dataclasses
import multiprocessing
import os
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from llm_jax.config import Batch, Data
from llm_jax.data.accounting import FIELDS, batch_account
from llm_jax.data.batching import Batches, Pieces, Windows
from llm_jax.data.documents import SPLITS, Read, documents
from llm_jax.data.packing import STREAMS, Bucketed, Packed, Row, collate
from llm_jax.data.sources import Source
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import ConfigError, DataError, choose
from llm_jax.storage import is_remote

PACK_ROWS = 256
"""rows' worth of pieces that a window holds at least, so that packing fills the rows"""
REQUESTS = 16
"""records of a source in a bucket that are asked for at a time"""

READ_AHEAD = 4
"""batches made ahead by the thread, and by each worker process"""


@dataclasses.dataclass(frozen=True)
class _Finish:
    """(Row, rng) -> the arrays of the row, through the task's last step."""

    task: Any
    tokenizer: Tokenizer
    padding: dict[str, int]

    def __call__(self, row: Row, rng: np.random.Generator) -> dict[str, np.ndarray]:
        arrays = collate(row, self.padding)
        kept = {name: arrays.pop(name) for name in ("account", "ids")}
        return {**self.task.row(arrays, self.tokenizer, rng), **kept}


def _in_worker(index: int, count: int) -> None:
    """Before anything is unpickled in a worker process: a task imports jax, which must leave the accelerator alone."""
    os.environ["JAX_PLATFORMS"] = "cpu"


class Rows(NamedTuple):
    """A batch of this process and what is known about it."""

    batch: dict[str, np.ndarray]
    """(B, S) arrays for the devices"""
    account: np.ndarray
    """float64, by `accounting.FIELDS`"""
    digest: int
    """crc32 of ids and tokens: equal for equal samples in equal order"""
    ids: np.ndarray
    """(B, S) int32: number of each slot's document over all sources, -1 for padding"""


class Loader:
    """Iterates over the `Rows` of this process, `batch.size / process_count` rows each.

    Training never ends. The documents are dealt out to `data.shards` streams, each of which fills an equal part of the rows of
    every batch: it reads its documents, reshuffled each epoch, mixes the pieces of the sources by weight, and shuffles and
    packs them in windows of `data.window`. A process makes the streams that its rows come from and keeps its rows: so the
    batches depend on the config, the seed, `data.shards` and `data.workers`, and not on the number of processes.

    Evaluation ends: all held-out documents once, in order, in one stream, read by a thread whatever `data.workers` is, the
    same at any seed; empty rows fill up the last batch.

    Args:
        sources: as given by `documents.open_sources(data, split)`.
        once: read the documents for training as those held out are: once, in order.
        only: the number of the one source whose documents are read; None for all of them.

    Raises:
        ConfigError: rows, processes, buckets or weights that do not go together; a label for each example of packed
        rows.
        DataError: no documents for this split or one of its shards, none that yields an example, an example that no row holds.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        task: Any,
        data: Data,
        batch: Batch,
        seed: int,
        split: str = "train",
        process_index: int = 0,
        process_count: int = 1,
        once: bool = False,
        only: int | None = None,
    ):
        self._sources, self._tokenizer, self._task = list(sources), tokenizer, task
        self._data, self._batch = data, batch
        self._process, self._processes = process_index, process_count
        self._split = choose("split", split, SPLITS)
        self._train = split == "train" and not once
        self._seed = seed if self._train else 0
        self._workers, self._shards = (data.workers, data.shards) if self._train else (0, 1)
        self._lengths = sorted({*data.buckets, batch.length})
        self._check()
        self._weights = list(data.weights) if split == "train" and data.weights else None
        wanted = [
            only in (None, i) and (self._weights is None or self._weights[i] > 0) for i in range(len(self._sources))
        ]
        self._documents = [
            documents(source, data, split) if read else np.arange(0) for source, read in zip(self._sources, wanted)
        ]
        self._salt, self._batches = 0, 0
        self._iterators = self._make()

    def _check(self) -> None:
        data, length, processes = self._data, self._batch.length, self._processes
        if not self._sources:
            raise ConfigError("data.sources is empty: name one, e.g. text:corpus/*.txt")
        if self._batch.size % processes:
            raise ConfigError(f"batch.size {self._batch.size} is not a multiple of the {processes} processes")
        if self._batch.size % self._shards:
            raise ConfigError(f"batch.size {self._batch.size} is not a multiple of data.shards {self._shards}")
        if self._shards % processes and processes % self._shards:
            raise ConfigError(
                f"data.shards {self._shards} and the {processes} processes: one must be a multiple of the other, so that each "
                "process reads whole shards or a part of one"
            )
        if data.pack and data.buckets:
            raise ConfigError("data.buckets are for rows of one example: set data.pack to False")
        if self._lengths[-1] > length:
            raise ConfigError(f"data.buckets has {self._lengths[-1]}, but batch.length is {length}")
        if self._shards > 1 and len(self._lengths) > 1:
            raise ConfigError(
                f"data.buckets {data.buckets} would give the {self._shards} shards rows of different "
                "lengths: leave them empty, or set data.shards to 1"
            )

    def _capacity(self, length: int) -> dict[str, int]:
        """Slots in each stream of a row whose length the config gives."""
        lengths = self._task.lengths(length)
        return {stream: lengths[stream] for stream in STREAMS if stream in lengths}

    def _seed_of(self, shard: int, *what: str | int) -> int:
        """A seed for one purpose, unlike those for other purposes, shards and seeds of the run."""
        return zlib.crc32(repr((self._seed, self._salt, shard, what)).encode())

    def _pairs(self, which: int, shard: int) -> np.ndarray:
        """(N, 2) source and record number of the documents of a source that a shard holds."""
        numbers = self._documents[which][shard :: self._shards]
        if not len(numbers) and (self._train or not any(map(len, self._documents))):
            raise DataError(
                f"{self._sources[which].spec}: {len(self._documents[which])} documents for "
                f"data.shards {self._shards}: shard {shard} has none"
            )
        return np.stack([np.full_like(numbers, which), numbers], axis=1)

    def _pieces(self, shard: int) -> grain.IterDataset:
        """The pieces of all sources in a shard: mixed without end, or one source after the other, once."""
        read = Read(
            self._sources,
            self._tokenizer,
            self._task,
            self._data,
            self._batch.length,
            self._capacity(self._batch.length),
        )
        # Grain's reading threads gain nothing on a disk, since encoding a text holds the interpreter's lock. From a bucket each record is a request
        # to wait for, so that many are under way at once; the order is the same.
        threads = REQUESTS if any(is_remote(source.spec.partition(":")[2]) for source in self._sources) else 0
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
        trained = [which for which in range(len(self._sources)) if not self._weights or self._weights[which]]
        pairs = {which: self._pairs(which, shard) for which in (trained if self._train else range(len(self._sources)))}
        if not self._train:
            pairs = {0: np.concatenate(list(pairs.values()))}
        parts = []
        for which, part in pairs.items():
            dataset = grain.MapDataset.source(part)
            if self._train:
                dataset = dataset.shuffle(self._seed_of(shard, "documents", which)).repeat()
            dataset = dataset.random_map(read, seed=self._seed_of(shard, "examples", which))
            # Over the border of two epochs, nearly all documents may come twice before one that yields an example.
            parts.append(Pieces(dataset.to_iter_dataset(reading), limit=2 * len(part)))
        if len(parts) == 1:
            return parts[0]
        weights = self._weights or list(map(len, self._documents))
        return grain.IterDataset.mix(parts, [weights[which] for which in trained])

    def _rows(self, shard: int, count: int) -> grain.IterDataset:
        """Rows of a shard in the order of its parts of batches, of `count` rows."""
        data, seed = self._data, self._seed_of(shard, "windows") if self._train else None
        streams = tuple(tuple(self._capacity(length).values()) for length in self._lengths)
        if data.pack:
            return Windows(self._pieces(shard), Packed(streams[-1]), streams[-1], data.window, PACK_ROWS, seed)
        # A window is a whole number of batches, so that no batch but the last of an evaluation has rows of two lengths.
        window = -(-data.window // count) * count
        return Windows(self._pieces(shard), Bucketed(streams, count), streams[-1], window, 0, seed)

    def _make(self) -> dict[int, grain.DatasetIterator]:
        """The streams that this process reads, by their shard."""
        own = self._shards // self._processes or 1
        first = self._process * self._shards // self._processes
        return {shard: self._stream(shard) for shard in range(first, first + own)}

    def _stream(self, shard: int) -> grain.DatasetIterator:
        """This process's rows of the part of each batch that a shard fills."""
        count = self._batch.size // self._shards
        kept = min(count, self._batch.size // self._processes)
        start = self._process * kept % count
        padding = dict.fromkeys(STREAMS, self._tokenizer.pad or 0)
        finish = _Finish(self._task, self._tokenizer, padding)
        rows = self._rows(shard, count).random_map(finish, seed=self._seed_of(shard, "rows"))
        batches = Batches(rows, count, slice(start, start + kept), padding)
        if not self._workers:
            return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=READ_AHEAD).__iter__()
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            # A worker that imports the script that started it: without this it hangs, and the script with it.
            raise ConfigError(
                "data.workers starts processes that import the main script: put what the script runs "
                "under if __name__ == '__main__':"
            )
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain hands its flags to the workers, parsed or not, and fails if not
        options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=READ_AHEAD)
        return batches.mp_prefetch(options, worker_init_fn=_in_worker).__iter__()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Rows:
        try:
            parts = [next(iterator) for iterator in self._iterators.values()]
        except StopIteration:
            if self._batches:
                raise
            specs = ", ".join(source.spec for source in self._sources)
            raise DataError(f"none of the documents of {specs} yields an example") from None
        self._batches += 1
        arrays = parts[0] if len(parts) == 1 else {name: np.concatenate([x[name] for x in parts]) for name in parts[0]}
        batch = {name: value for name, value in arrays.items() if name not in ("account", "ids")}
        digest = zlib.crc32(batch["tokens"].tobytes(), zlib.crc32(arrays["ids"].tobytes()))
        return Rows(batch, batch_account(arrays), digest, arrays["ids"])

    @property
    def _layout(self) -> list[int]:
        return [self._workers, self._shards, len(self._sources)]

    def get_state(self) -> dict[str, Any]:
        """The place after the last batch returned, whatever was read ahead, as JSON-able data."""
        return {
            "layout": self._layout,
            "salt": self._salt,
            "batches": self._batches,
            "shards": {str(shard): iterator.get_state() for shard, iterator in self._iterators.items()},
        }

    def set_state(self, *states: dict[str, Any]) -> None:
        """Go on after the batch at which the states of all processes were taken, however many these were: the same batches follow.

        A state from another number of workers, shards or sources has no place in this stream (`check_fingerprint` tells):
        then a new stream starts, in an order that was not used before.
        """
        state = states[0]
        same = list(state["layout"]) == self._layout
        salt = state["salt"] if same else state["batches"]
        if salt != self._salt:
            self._close()
            self._salt = salt
            self._iterators = self._make()
        self._batches = state["batches"]
        places = {shard: place for each in states for shard, place in each["shards"].items()}
        if same:
            for shard, iterator in self._iterators.items():
                iterator.set_state(places[str(shard)])

    def start(self) -> None:
        """Begin to read ahead, e.g. while a model compiles."""
        for iterator in self._iterators.values():
            iterator.start_prefetch()

    def close(self) -> None:
        """Stop the threads or the worker processes; nothing can be asked of the loader afterwards."""
        self._close()

    def _close(self) -> None:
        iterators, self._iterators = (
            getattr(self, "_iterators", {}),
            {},
        )  # let go of them now: Grain's `__del__` fails at exit
        for iterator in iterators.values():
            iterator.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @property
    def only(self) -> str:
        """The one source that is read, as it was given; of several their list."""
        read = [source.spec for source, numbers in zip(self._sources, self._documents) if len(numbers)]
        return ", ".join(read)

    def record_id(self, document: int) -> str:
        """The id of a document by its number over all sources."""
        for source in self._sources:
            if document < len(source):
                return str(source[document]["id"])
            document -= len(source)
        raise IndexError(f"no document {document}")

    def fingerprint(self) -> dict[str, Any]:
        """What the stream depends on, as JSON-able data, for the card and for `check_fingerprint`."""
        names = ("weights", "heldout", "group", "text", "target", "pack", "buckets", "long", "invalid", "window")
        settings = {
            "seed": self._seed,
            "task": repr(self._task),
            "tokenizer": self._tokenizer.fingerprint,
            "batch.size": self._batch.size,
            "batch.length": self._batch.length,
        }
        for name in names:
            value = getattr(self._data, name)
            settings[f"data.{name}"] = list(value) if isinstance(value, tuple) else value
        sources = [
            {"spec": source.spec, "fingerprint": source.fingerprint, "documents": len(numbers)}
            for source, numbers in zip(self._sources, self._documents, strict=True)
        ]
        return {
            "split": self._split,
            "sources": sources,
            "workers": self._workers,
            "shards": self._shards,
            "grain": grain.__version__,
            "settings": settings,
        }


def count_rows(sources: Sequence[Source], tokenizer: Tokenizer, task: Any, data: Data, batch: Batch) -> int:
    """The rows that one pass over the training documents fills; all of them are read."""
    with Loader(sources, tokenizer, task, data, batch, 0, once=True) as loader:
        return int(sum(rows.account[FIELDS.index("rows")] for rows in loader))


def check_fingerprint(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise unless a stream with fingerprint `now` continues one with fingerprint `saved`.

    Raises:
        DataError: names each source, count and setting that differs.
    """
    changes = []
    before, after = ([source["spec"] for source in each["sources"]] for each in (saved, now))
    if before != after:
        changes.append(f"the sources were {before}, now {after}")
    else:
        changes += [
            f"source {new['spec']} has other content ({old['documents']} documents before, {new['documents']} now)"
            for old, new in zip(saved["sources"], now["sources"], strict=True)
            if old != new
        ]
    names = {
        "split": "the split",
        "workers": "data.workers",
        "shards": "data.shards",
        "grain": "the version of grain",
    }
    old = {**{what: saved[key] for key, what in names.items()}, **saved["settings"]}
    new = {**{what: now[key] for key, what in names.items()}, **now["settings"]}
    changes += [
        f"{name} was {old.get(name)}, now {new.get(name)}" for name in {**old, **new} if old.get(name) != new.get(name)
    ]
    if changes:
        raise DataError(
            "the run cannot continue on the same samples: " + "; ".join(changes) + ". Resume with what it "
            "began with, or set config.checkpoint.allow_changed_data=True to go on with other samples"
        )
