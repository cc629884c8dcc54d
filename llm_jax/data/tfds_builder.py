"""Records of one's own as a TFDS data set, which `tfds:NAME` then reads; no TensorFlow is imported.

A data set in ten lines:

    from llm_jax.data.tfds_builder import build_tfds

    def train():
        for line in open("letters.tsv", encoding="utf-8"):
            date, text = line.rstrip().split("\\t")
            yield {"text": text, "date": date}

    build_tfds("letters", {"train": train()})      # once; then data.sources = ("tfds:letters",)

Any `Source` will do as well: `build_tfds("letters", {"train": open_source("jsonl:letters/*.jsonl", Data())})`. Where
the class itself is wanted, for `tfds build` or with a download of its own, `builder_class` makes it. Reading belongs to
`tables.py`.
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.errors import DataError, suggest

Splits = Mapping[str, Iterable[dict[str, Any]]]
"""Records of each split by its name, e.g. `{"train": ..., "test": ...}`"""


def _feature(value: Any, where: str) -> Any:
    """The TFDS feature that holds values like this one."""
    import tensorflow_datasets as tfds

    if isinstance(value, (str, bytes)):
        return tfds.features.Text()
    if isinstance(value, (bool, np.bool_)):
        return tfds.features.Scalar(np.bool_)
    if isinstance(value, (int, np.integer)):
        return tfds.features.Scalar(np.int64)
    if isinstance(value, (float, np.floating)):
        return tfds.features.Scalar(np.float64)
    if isinstance(value, dict):
        return tfds.features.FeaturesDict({key: _feature(part, f"{where}.{key}") for key, part in value.items()})
    if isinstance(value, (list, tuple)) and value:
        return tfds.features.Sequence(_feature(value[0], where))
    if isinstance(value, np.ndarray) and value.dtype != object:
        return tfds.features.Tensor(shape=(None,) * value.ndim if value.ndim < 2 else value.shape, dtype=value.dtype)
    raise DataError(
        f"field {where!r}: no feature known for {value!r}: give features=, a dict of names to tfds.features"
    )


def _counted(
    name: str, split: str, records: Iterable[dict[str, Any]], fields: set[str], counts: dict[str, int]
) -> Iterator[tuple[int, Any]]:
    """(key, record) as TFDS wants them, counting them."""
    counts[split] = 0
    for index, record in enumerate(records):
        if set(record) != fields:
            odd = min(set(record) ^ fields)
            what = (
                f"no field {odd!r}{suggest(odd, record)}"
                if odd in fields
                else f"a field {odd!r} that the data set does not have"
            )
            raise DataError(f"tfds:{name}: record {index} of {split} has {what}")
        counts[split] += 1
        yield index, record


def builder_class(
    name: str, splits: Splits, features: Mapping[str, Any] | None = None, version: str = "1.0.0", description: str = ""
) -> type:
    """A `tfds.core.GeneratorBasedBuilder` subclass over the records; its attribute `counts` holds the records it read
    by split.

    Args:
        name: as in `tfds:NAME`: lower case, digits and underscores.
        splits: the records. A generator serves one build.
        features: TFDS features by field; by default those of the first record of the first split.
        version: of the data; a data set of a version that exists is not built again.

    Raises:
        DataError: a bad name, no records, or a field whose feature is not known.
    """
    import tensorflow_datasets as tfds

    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise DataError(f"{name!r} is no name of a TFDS data set: lower case, digits and underscores, e.g. my_letters")
    if not splits:
        raise DataError(f"tfds:{name}: no split: give e.g. {{'train': records}}")
    held = {split: iter(records) for split, records in splits.items()}
    if features is None:
        first_split = next(iter(held))
        first = next(held[first_split], None)
        if first is None:
            raise DataError(f"tfds:{name}: split {first_split!r} has no records")
        held[first_split] = itertools.chain([first], held[first_split])
        features = {key: _feature(value, key) for key, value in first.items()}
    counts: dict[str, int] = {}
    fields = dict(features)

    def info(self) -> tfds.core.DatasetInfo:
        # Without shuffling the records stay in the order in which they came; the pipeline shuffles.
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(fields), description=description, disable_shuffling=True
        )

    def split_generators(self, dl_manager) -> dict[str, Iterator[tuple[int, Any]]]:
        return {split: _counted(name, split, records, set(fields), counts) for split, records in held.items()}

    def generate_examples(self) -> Iterator[tuple[int, Any]]:
        return iter(())  # abstract in the base class; the generators come from _split_generators

    members = {
        "VERSION": tfds.core.Version(version),
        "_info": info,
        "_split_generators": split_generators,
        "_generate_examples": generate_examples,
        "counts": counts,
        "name": name,
        "__module__": __name__,
        "code_path": None,
    }  # no folder of code with checksums and citations to look for
    # Not entered into TFDS's own table, where a second data set of this name in one process would be refused: it is
    # found by its files.
    with tfds.core.registered.skip_registration():
        return type("".join(part.capitalize() for part in name.split("_")), (tfds.core.GeneratorBasedBuilder,), members)


def build_tfds(
    name: str,
    splits: Splits,
    features: Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
    version: str = "1.0.0",
    description: str = "",
) -> dict[str, int]:
    """Write the records as a TFDS data set in ArrayRecord format and return how many each split holds, counted in the
    files.

    Args:
        data_dir: folder of TFDS data sets; by default `TFDS_DATA_DIR`, else `~/tensorflow_datasets`, where `tfds:NAME`
            looks.

    Raises:
        DataError: what `builder_class` raises; the version exists already; records differ in their fields; fewer are in
            the files than were given.
    """
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    builder = builder_class(name, splits, features, version, description)(data_dir=data_dir, file_format="array_record")
    if builder.is_prepared():
        raise DataError(
            f"tfds:{name}: version {version} exists already in {builder.data_dir}: give a higher version, or remove it"
        )
    try:
        builder.download_and_prepare()
    except DataError:
        raise
    except (
        Exception
    ) as e:  # TFDS raises what it likes for a value that does not fit its feature, with what it was in several lines
        raise DataError(f"tfds:{name}: {type(e).__name__}: {' '.join(str(e).split())[:500]}") from e
    found = {split: len(builder.as_data_source(split=split)) for split in splits}
    if found != builder.counts:
        raise DataError(
            f"tfds:{name}: {builder.counts} records were given, and the files in {builder.data_dir} hold {found}"
        )
    return found
