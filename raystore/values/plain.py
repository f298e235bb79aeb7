"""Numbers, lists and mappings of numpy, torch and others as plain Python values, without loss.

`scalar` looks at one value, `plain` goes into lists and mappings, and `pack_integers` and `pack_floats` make packed
arrays of lists of numbers. What has no plain form is refused by name and place: nothing becomes its text. No library is
imported for it; a value is known by what it can do (`item`, `tolist`, `dtype`).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from raystore.errors import InvalidValueError

LEAVES: frozenset[type] = frozenset({str, bool, int, float, bytes, type(None)})  #: types of plain values
_DEPTH = 64  # of lists and mappings in each other; deeper ones are taken to hold themselves
_BASES: dict[type, Callable[[Any], Any]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    bytes: bytes.__bytes__,
}  # an instance of a subclass (an IntEnum, numpy's float64) becomes one of the base


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
    """Whether this is a scalar, array or tensor of numpy, torch, or a library like them."""
    return hasattr(value, "item") and (hasattr(value, "dtype") or hasattr(value, "tolist"))


def _dimensions(value: Any) -> int:
    if (count := getattr(value, "ndim", None)) is not None:
        return int(count)
    if (shape := getattr(value, "shape", None)) is not None:
        return len(shape)
    return int(isinstance(value.tolist(), list)) if hasattr(value, "tolist") else 0


def _item(value: Any) -> Any:
    """The only item of a scalar or array in plain form; the value itself if there is none."""
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
    """Whether `tolist` loses nothing, as it does for records, dates, durations and complex numbers."""
    dtype = getattr(value, "dtype", None)
    return getattr(dtype, "kind", "") not in tuple("VMmc")


_REWARD = "one number, not NaN; True and False are 1 and 0. Where there is none, return None, or raise rs.Drop(why)"


def number(name: str, value: Any, expected: str = "a number") -> float:
    """A number that is neither NaN nor a bool, such as a time or a reward."""
    found = scalar(value)
    if type(found) in (int, float) and found == found:
        with suppress(OverflowError):  # of an int beyond any float
            return float(found)
    raise InvalidValueError(name, value, expected)


def whole(name: str, value: Any, *, at_least: int) -> int:
    """A whole number, no bool."""
    found = scalar(value)
    if type(found) is not int or found < at_least:
        raise InvalidValueError(name, value, f"a whole number, {at_least} or more")
    return found


def reward(name: str, value: Any) -> float:
    """A reward: any number but NaN; True and False are 1 and 0, and an array or tensor may hold the one number."""
    found = scalar(value)
    if _is_numeric(found):
        found = _item(found)  # its one item, however many dimensions it has
    if type(found) not in (int, float, bool) or math.isnan(found):
        raise InvalidValueError(name, value, _REWARD)
    return float(found)


def plain(name: str, value: Any) -> Any:
    """A copy of a value in plain form, deeply: arrays and tensors become lists, tuples and packed arrays stay.

    Raises `InvalidValueError`, which names the place, for what has no plain form (a date, an object, a set).
    """
    return value if type(value) in LEAVES else _plain(name, value, 0, _refuse)


def plainest(value: Any) -> Any:
    """The same, but parts that have no plain form stay as they are."""
    return _plain("", value, 0, lambda _, part: part)


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


# -- packed arrays -----------------------------------------------------------------------------------------------------
#
# A list of Python floats takes 32 bytes a number in memory and 9 on the wire; an `array.array` takes 4 or 8. numpy and
# torch read it without copying. Packing copies: the caller may go on using its own.

TYPECODES: frozenset[str] = frozenset("bBhHiIqQfd")  #: arrays that travel packed; of one size on all machines of today
_IDS = "a sequence of whole numbers (token ids)"
_LOGPROBS = "a sequence of numbers (log-probabilities)"


def pack_integers(name: str, values: Iterable[Any]) -> array[int]:
    """Whole numbers, such as token ids: int32, or int64 if they do not fit. Takes numpy arrays and tensors too."""
    if isinstance(values, array) and values.typecode in "iq":
        return values[:]
    items = _items(name, values, _IDS)
    for typecode in "iq":
        try:
            return array(typecode, items)
        except OverflowError:
            continue
        except TypeError:
            break
    raise InvalidValueError(name, values, _IDS)


def pack_floats(name: str, values: Iterable[Any]) -> array[float]:
    """Numbers, such as log-probabilities: float32 if that is exact, else float64; NaN is refused."""
    if isinstance(values, array) and values.typecode in "fd":
        packed = values[:]
    else:
        items = _items(name, values, _LOGPROBS)
        try:
            exact = array("d", items)
        except TypeError:
            raise InvalidValueError(name, values, _LOGPROBS) from None
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
