"""User values to opaque payloads and back; happens in clients only.

Plain data (what msgpack gives back exactly: None, bool, int, float, str, bytes, packed arrays of numbers, and lists,
tuples and string- or number-keyed dicts of these) becomes msgpack; everything else is pickled (`pickler`), so that
any picklable object comes back as it was, type included. Object references found in a value travel beside the bytes
(see `raystore.core.payload`).
"""

from __future__ import annotations

import functools
import io
import sys
from array import array
from typing import Any

import msgpack

from raystore.core.payload import PICKLED, PLAIN, Opaque, Payload
from raystore.errors import PayloadLostError, PayloadNotPicklableError, PayloadTooLargeError
from raystore.values import pickler
from raystore.values.plain import LEAVES, TYPECODES

_PACKED = 1  # msgpack extension: a type code and the array's bytes, little-endian
_TUPLE = 2  # msgpack extension: the items as a list
LARGE_BYTES = 32 * 1024  #: from here on a copy costs more than an argument of its own
_MAX_DEPTH = 64  # deeper values are pickled, which has its own limit and says so


def _is_plain(value: Any, depth: int = 0) -> bool:
    kind = type(value)
    if kind is dict:
        if not LEAVES.issuperset(map(type, value)):
            return False
        value = value.values()
    elif kind is not list and kind is not tuple:
        return kind in LEAVES or (kind is array and value.typecode in TYPECODES)
    if depth == _MAX_DEPTH:
        return False
    for item in value:  # noqa: SIM110 - half the cost of `all`
        if type(item) not in LEAVES and not _is_plain(item, depth + 1):
            return False
    return True


def _extended(value: Any) -> msgpack.ExtType:
    """A tuple or array as an extension of msgpack."""
    if type(value) is tuple:
        return msgpack.ExtType(_TUPLE, _packb(list(value)))
    if not isinstance(value, array):
        raise OverflowError(value)  # an int beyond 64 bits
    if sys.byteorder == "big":
        value = array(value.typecode, value)
        value.byteswap()
    return msgpack.ExtType(_PACKED, value.typecode.encode() + value.tobytes())


def _restored(code: int, data: bytes) -> Any:
    """The tuple or array of an extension."""
    if code == _TUPLE:
        return tuple(_unpackb(data))
    if code != _PACKED:
        raise ValueError(f"msgpack extension {code}; expected {_PACKED} or {_TUPLE}: it was written by another version")
    value: array[Any] = array(chr(data[0]), data[1:])
    if sys.byteorder == "big":
        value.byteswap()
    return value


_packers: list[Any] = []  # reused, since making one costs as much as packing a small value; taken out while in use
_PACKER_BYTES = 256 * 1024  # one that has packed a larger value is dropped with its buffer


def _packb(*values: Any) -> bytes:
    """Values, packed one behind the other."""
    try:
        packer = _packers.pop()
    except IndexError:
        packer = msgpack.Packer(strict_types=True, default=_extended, autoreset=False)
    for value in values:
        packer.pack(value)  # if this raises, the packer is dropped
    data = bytes(packer.bytes())
    if len(data) <= _PACKER_BYTES:
        packer.reset()
        _packers.append(packer)
    return data


_unpackb = functools.partial(msgpack.unpackb, strict_map_key=False, ext_hook=_restored)


_EMPTY = _packb(PLAIN, {})


def encode(value: Any, what: str, limit_bytes: int) -> bytes | Payload:
    """A value as a payload: bytes, or a `Payload` if it is large (to travel without a copy) or holds references.

    `what` names the value in errors. Raises `PayloadNotPicklableError` and `PayloadTooLargeError`.
    """
    try:
        payload = _encode(value)
    except Exception as error:  # whatever the value's own `__reduce__` raises
        raise PayloadNotPicklableError(what, f"{type(error).__name__}: {error}") from error
    data = payload.data if isinstance(payload, Payload) else payload
    if len(data) > limit_bytes:
        raise PayloadTooLargeError(what, len(data), limit_bytes)
    return Payload(data, ()) if data is payload and len(data) > LARGE_BYTES else payload


def _encode(value: Any) -> bytes | Payload:
    if _is_plain(value):
        try:
            return _packb(PLAIN, value)
        except (OverflowError, UnicodeEncodeError):  # the latter: a lone surrogate
            pass
    return _pickle(value)


def _pickle(value: Any) -> bytes | Payload:
    refs: list[Any] = []
    data = pickler.dumps(value, refs, prefix=bytes((PICKLED,)))
    return Payload(data, tuple(refs)) if refs else data


def is_pickled(payload: bytes | Payload) -> bool:
    """Whether a payload holds more than plain data."""
    return (payload.data if isinstance(payload, Payload) else payload)[0] == PICKLED


def decode(payload: Opaque, *, lost: Any = None) -> Any:
    """The value of a payload; None for None.

    A reference that is gone becomes `lost`; without it `PayloadLostError` is raised. Raises also what a user's class
    raises while it is unpickled.
    """
    if payload is None:
        return None
    if payload == _EMPTY:  # the metadata of most rollouts
        return {}
    data, refs = (payload.data, payload.refs) if isinstance(payload, Payload) else (payload, ())
    tag = data[0]
    if tag == PLAIN:
        return _unpackb(memoryview(data)[1:])
    if tag != PICKLED:
        raise ValueError(
            f"payload has tag {tag:#x}; expected {PLAIN:#x} or {PICKLED:#x}: it was written by another version"
        )
    stream = io.BytesIO(data)
    stream.seek(1)
    unpickler = _Unpickler(stream)
    unpickler.refs, unpickler.lost = refs, lost
    return unpickler.load()


class _Unpickler(pickler.Unpickler):
    refs: tuple[Any, ...] = ()
    lost: Any = None

    def persistent_load(self, pid: Any) -> Any:
        if pid >= len(self.refs):
            if self.lost is not None:
                return self.lost
            raise PayloadLostError(
                "an object reference", "the store was started again since; a journal keeps no objects"
            )
        return self.refs[pid]


def describe(payload: Opaque) -> str:
    """Form and size of a payload, without decoding it."""
    if payload is None:
        return "none"
    data = payload.data if isinstance(payload, Payload) else payload
    kind = "plain" if data[0] == PLAIN else "pickled"
    return f"<{kind}, {len(data)} bytes>"
