"""Numbers, lists and mappings of numpy, torch and others as plain Python values, without loss.

`scalar` looks at one value, `number`, `whole` and `reward` check an argument, `plain` goes into lists and mappings.
What has no plain form is refused by name and place: nothing becomes its text. No library is imported for it; a value
is known by what it can do (`item`, `tolist`, `dtype`).
Not here: arrays of one kind of number that stay packed (`packed`), any picklable value (`codec`).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raystore.errors import InvalidValueError

LEAVES = frozenset({str, bool, int, float, bytes, type(None)})  #: what stays as it is
_DEPTH = 64  # of lists and mappings in each other; deeper ones are taken for endless
_BASES: dict[type, Callable[[Any], Any]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    bytes: bytes.__bytes__,
}  # an instance of a subclass (an IntEnum, numpy's float64) is the base's value to everybody else


def scalar(value: Any) -> Any:
    """A scalar of numpy or torch as the plain value that equals it; anything else is given back as it is."""
    if type(value) in LEAVES:
        return value
    if _is_numeric(value):
        return _item(value) if _dimensions(value) == 0 else value
    for base, plain_value in _BASES.items():
        if isinstance(value, base):
            return plain_value(value)
    return value


def _is_numeric(value: Any) -> bool:
    """Whether this is numpy's or torch's, or something like it."""
    return hasattr(value, "item") and (hasattr(value, "dtype") or hasattr(value, "tolist"))


def _dimensions(value: Any) -> int:
    if (count := getattr(value, "ndim", None)) is not None:
        return int(count)
    if (shape := getattr(value, "shape", None)) is not None:
        return len(shape)
    return int(isinstance(value.tolist(), list)) if hasattr(value, "tolist") else 0


def _item(value: Any) -> Any:
    """The one item of a scalar or array if it has a plain form, else what was given."""
    if not _has_plain_items(value):
        return value
    try:
        found = value.item()
    except (TypeError, ValueError, RuntimeError):  # more than one
        return value
    if type(found) in LEAVES:
        return found
    if hasattr(found, "dtype") and hasattr(found, "__float__") and float(found) == found:  # numpy's long double
        return float(found)
    return value


def _has_plain_items(value: Any) -> bool:
    """Not for records, dates, durations and complex numbers: `tolist` gives their parts, or counts without a unit."""
    dtype = getattr(value, "dtype", None)
    return getattr(dtype, "kind", "") not in tuple("VMmc")


def number(name: str, value: Any, expected: str = "a number") -> int | float:
    """A number that is neither NaN nor a bool, plain."""
    found = scalar(value)
    if type(found) not in (int, float) or math.isnan(found):
        raise InvalidValueError(name, value, expected)
    return found  # type: ignore[no-any-return]


def whole(name: str, value: Any, *, at_least: int) -> int:
    """A whole number, plain."""
    found = scalar(value)
    if type(found) is not int or found < at_least:
        raise InvalidValueError(name, value, f"a whole number, {at_least} or more")
    return found


A_REWARD = "one number, not NaN; True and False are 1 and 0. Where there is none, return None, or raise rs.Drop(why)"


def reward(name: str, value: Any) -> float:
    """A reward: any number but NaN; True and False are 1 and 0, and an array or tensor may hold the one number."""
    found = scalar(value)
    if _is_numeric(found):
        found = _item(found)  # its one item, however many dimensions it has
    if type(found) not in (int, float, bool) or math.isnan(found):
        raise InvalidValueError(name, value, A_REWARD)
    return float(found)


def plain(name: str, value: Any) -> Any:
    """A value with all that is in it as plain values, a copy: arrays become lists, tuples and packed arrays stay.

    Raises `InvalidValueError`, which names the place, for what has no plain form (a date, an object, a set).
    """
    return value if type(value) in LEAVES else _plain(name, value, 0, _refuse)


def plainest(value: Any) -> Any:
    """The same for a value that is kept in any case: what has no plain form stays as it is."""
    return _plain("", value, 0, _keep)


def _plain(name: str, value: Any, depth: int, otherwise: Callable[[str, Any], Any]) -> Any:
    kind = type(value)
    if kind in LEAVES:
        return value
    if depth > _DEPTH:
        return otherwise(name, value)
    if kind is list or kind is tuple:
        if LEAVES.issuperset(map(type, value)):
            return value[:]
        return kind([_plain(f"{name}[{index}]", item, depth + 1, otherwise) for index, item in enumerate(value)])
    if isinstance(value, array):
        return value[:]
    if isinstance(value, bytearray):
        return bytes(value)
    found = scalar(value)
    if type(found) in LEAVES:
        return found
    if isinstance(value, Mapping):
        keys = [_plain(f"a key of {name}", key, _DEPTH, otherwise) for key in value]
        items = [_plain(f"{name}[{key!r}]", item, depth + 1, otherwise) for key, item in value.items()]
        return dict(zip(keys, items, strict=True))
    if hasattr(value, "tolist") and _has_plain_items(value):  # numpy, torch
        return _plain(name, value.tolist(), depth + 1, otherwise)
    if isinstance(value, Sequence):
        made = [_plain(f"{name}[{index}]", item, depth + 1, otherwise) for index, item in enumerate(value)]
        return tuple(made) if isinstance(value, tuple) else made
    return otherwise(name, value)


def _refuse(name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple, Mapping)):
        top = name.partition("[")[0]
        raise InvalidValueError(top, "[...]", f"lists and mappings at most {_DEPTH} deep, which do not hold themselves")
    raise InvalidValueError(
        name,
        value,
        "text, a number, a bool, bytes, None, or lists, arrays and mappings of these; of a "
        f"{type(value).__qualname__} give what is to be kept (its fields, its text, a list)",
    )


def _keep(name: str, value: Any) -> Any:
    return value
