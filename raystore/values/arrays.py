"""Lists of numbers as packed arrays: `array.array` of 4 or 8 bytes a number, without loss.

A list of Python floats costs 32 bytes a number in memory and 9 on the wire. Numbers that fit are kept in 4 bytes
(log-probabilities mostly come from float32), others in 8. numpy and torch read such arrays without copying.
What is packed is a copy: the caller may go on with its own.
Not here: how arrays are encoded (`codec`).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from typing import Any

from raystore.errors import InvalidValueError

TYPECODES = frozenset("bBhHiIqQfd")  #: arrays that travel packed; their sizes are the same on all machines of today


def pack_integers(name: str, values: Iterable[Any]) -> array[int]:
    """Whole numbers, such as token ids: int32, or int64 if they do not fit. Takes numpy arrays and tensors too."""
    if isinstance(values, array) and values.typecode in "iq":
        return values[:]
    items = _items(name, values, "a sequence of whole numbers (token ids)")
    for typecode in "iq":
        try:
            return array(typecode, items)
        except OverflowError:
            continue
        except TypeError:
            break
    raise InvalidValueError(name, values, "a sequence of whole numbers (token ids)")


def pack_floats(name: str, values: Iterable[Any]) -> array[float]:
    """Numbers, such as log-probabilities: float32 if that is exact, else float64; NaN is refused."""
    if isinstance(values, array) and values.typecode in "fd":
        packed = values[:]
    else:
        items = _items(name, values, "a sequence of numbers (log-probabilities)")
        try:
            exact = array("d", items)
        except TypeError:
            raise InvalidValueError(name, values, "a sequence of numbers (log-probabilities)") from None
        try:
            packed = array("f", exact)
        except OverflowError:
            packed = exact
        if packed.tolist() != exact.tolist():
            packed = exact
    if any(map(math.isnan, packed)):
        raise InvalidValueError(name, "[... nan ...]", "numbers, not NaN")
    return packed


def _items(name: str, values: Iterable[Any], expected: str) -> list[Any]:
    if hasattr(values, "tolist"):  # numpy, torch
        values = values.tolist()
    if isinstance(values, (str, bytes, dict)) or not isinstance(values, Iterable):
        raise InvalidValueError(name, values, expected)
    return list(values)
