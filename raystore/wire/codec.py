"""User values to opaque payloads and back, and digests of their content; happens in clients only.

Plain data (what msgpack gives back exactly: None, bool, int, float, str, bytes, packed arrays of numbers, and lists,
tuples and string- or number-keyed dicts of these) becomes msgpack; everything else is pickled (`pickler`), so that
any picklable object comes back as it was, type included. Object references found in a value travel beside the bytes
(see `raystore.core.payload`).

A digest tells whether a request with a caller-given id repeats an earlier one, or conflicts with it. Equal content
gives equal digests in every process and in any order of keys: a canonical form is hashed, not the bytes of a pickle.
Dicts and sets are sorted; arrays and tensors go by dtype, shape and bytes; dataclasses and pydantic models by their
fields; classes, and functions that have a name, by that name (of a script: with its file's); enums by class and member;
any other object by its class and by what pickling would keep of it. A number's kind counts: `1`, `1.0` and `True` are
three contents, a list is no tuple, and NaN equals itself. An object reference equals only itself. Where no such form
can be made (for what only cloudpickle can pickle) the digest is of the encoded bytes.
"""

from __future__ import annotations

import copyreg
import dataclasses
import enum
import functools
import io
import os
import struct
import sys
import types
from array import array
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from typing import Any

import msgpack

from raystore.core.payload import CANONICAL, PICKLED, PLAIN, Opaque, Payload, digest_of_bytes
from raystore.errors import PayloadLostError, PayloadNotPicklableError, PayloadTooLargeError
from raystore.values import pickler
from raystore.values.closed import are_closed, closed
from raystore.values.plain import LEAVES, TYPECODES

_PACKED = 1  # msgpack extension: a type code and the array's bytes (little-endian, as all machines that Ray runs on)
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
    if type(value) is tuple:
        return msgpack.ExtType(_TUPLE, _packb(list(value)))
    if not isinstance(value, array):
        raise OverflowError(value)  # an int beyond 64 bits
    return msgpack.ExtType(_PACKED, value.typecode.encode() + value.tobytes())


def _restored(code: int, data: bytes) -> Any:
    if code == _TUPLE:
        return tuple(_unpackb(data))
    if code != _PACKED:
        raise ValueError(f"msgpack extension {code}; expected {_PACKED} or {_TUPLE}: it was written by another version")
    return array(chr(data[0]), data[1:])


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


STATE = "state"  #: the name, in errors, of what an agent saves


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Encoded:
    """A value that is encoded already, and is passed on as it is: whoever passes it on need not have its classes."""

    payload: Opaque


def encode(value: Any, what: str, limit_bytes: int) -> bytes | Payload:
    """A value as a payload: bytes, or a `Payload` if it is large (to travel without a copy) or holds references.

    `what` names the value in errors. Raises `PayloadNotPicklableError` and `PayloadTooLargeError`.
    """
    payload: bytes | Payload
    try:
        if _is_plain(value):
            try:
                payload = _packb(PLAIN, value)
            except (OverflowError, UnicodeEncodeError):  # the latter: a lone surrogate
                payload = _pickled(value)
        else:
            payload = _pickled(value)
    except Exception as error:  # whatever the value's own `__reduce__` raises
        raise PayloadNotPicklableError(what, f"{type(error).__name__}: {error}") from error
    data = payload.data if isinstance(payload, Payload) else payload
    if len(data) > limit_bytes:
        raise PayloadTooLargeError(what, len(data), limit_bytes)
    return Payload(data, ()) if data is payload and len(data) > LARGE_BYTES else payload


def encode_each(values: Mapping[str, Any], what: str, limit_bytes: int) -> bytes | Payload:
    """Named values as one payload in which each stays apart: a plain one is plain data, another a pickle of its own.

    `decode_each` is its inverse. Raises what `encode` raises.
    """
    refs: list[Any] = []
    try:
        packed = _packb(PLAIN, {name: _apart(value, refs) for name, value in values.items()})
    except Exception as error:  # whatever a value's own `__reduce__` raises
        raise PayloadNotPicklableError(what, f"{type(error).__name__}: {error}") from error
    if len(packed) > limit_bytes:
        raise PayloadTooLargeError(what, len(packed), limit_bytes)
    return Payload(packed, tuple(refs)) if refs or len(packed) > LARGE_BYTES else packed


def _apart(value: Any, refs: list[Any]) -> Any:
    """A plain value as it is, in a list of its own; else the bytes of its payload, whose references are added."""
    if _is_plain(value):
        try:
            _packb(value)
            return [value]
        except (OverflowError, UnicodeEncodeError):
            pass
    return pickler.dumps(value, refs, prefix=bytes((PICKLED,)))


def decode_each(payload: Opaque, *, lost: Any = None) -> dict[str, Any] | None:
    """The values of a payload of `encode_each`; None if it was encoded otherwise. `lost` is as in `decode`."""
    data, refs = (payload.data, payload.refs) if isinstance(payload, Payload) else (payload, ())
    if data is None or data[0] != PLAIN:
        return None
    found = _unpackb(memoryview(data)[1:])
    return {
        name: held[0] if isinstance(held, list) else decode(Payload(held, refs), lost=lost)
        for name, held in found.items()
    }


def _pickled(value: Any) -> bytes | Payload:
    refs: list[Any] = []
    data = pickler.dumps(value, refs, prefix=bytes((PICKLED,)))
    return Payload(data, tuple(refs)) if refs else data


def is_pickled(payload: Opaque) -> bool:
    """Whether a payload holds more than plain data."""
    data = payload.data if isinstance(payload, Payload) else payload
    return data is not None and data[0] == PICKLED


def plain_of(payload: Opaque) -> Any:
    """The value of a payload of plain data; None for one that would have to be unpickled, or cannot be read.

    For the store, which else never looks into what a client has encoded, and must not fail by it.
    """
    if not payload or is_pickled(payload):
        return None
    try:
        return decode(payload)
    except (ValueError, TypeError, IndexError):  # the bytes are no client's of ours
        return None


def decode(payload: Opaque, *, lost: Any = None) -> Any:
    """The value of a payload; None for None.

    A reference that is gone becomes `lost`; without it `PayloadLostError` is raised. Raises also what a user's class
    raises while it is unpickled. Where pickles stay closed (`values.closed`), a `Closed` stands for what is pickled.
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
    if are_closed():
        return closed(memoryview(data)[1:])
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


# -- digests of values -------------------------------------------------------------------------------------------------

_DIGEST_BYTES = 16
_WALKS = 10_000  # visits to parts of cycles, whose forms cannot be remembered; beyond them the bytes are hashed


def digest(value: Any, encoded: bytes | Payload | None) -> bytes:
    """The digest of a value; `encoded` is its payload."""
    try:
        return bytes((CANONICAL,)) + _hashed(_Form().of(value))
    except Exception:  # whatever a user's `__reduce__` raises: pickling has other ways, and has succeeded
        return digest_of_bytes(encoded)


def _hashed(*parts: bytes) -> bytes:
    made = blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        made.update(part)
    return made.digest()


def _framed(parts: Iterable[bytes]) -> bytes:
    """Parts one behind the other, each behind its length, so that no two lists of parts give the same bytes."""
    return b"".join([len(part).to_bytes(8, "little") + part for part in parts])


def _number(value: float) -> bytes:
    return b"d" + (struct.pack("<d", value) if value == value else b"nan")


_SHORT_FORMS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"n",
    bool: lambda value: b"1" if value else b"0",
    int: lambda value: b"i%x" % value if value >= 0 else b"i-%x" % -value,
    float: _number,
    complex: lambda value: b"c" + _number(value.real) + _number(value.imag),
    str: lambda value: b"s" + value.encode("utf-8", "surrogatepass"),
    bytes: lambda value: b"b" + value,
    bytearray: lambda value: b"B" + bytes(value),
}


class _Form:
    """The canonical form of one value: a short text for each part, a hash for what consists of others."""

    def __init__(self) -> None:
        self._known: dict[int, bytes] = {}  # forms of parts by `id`
        self._kept: list[Any] = []  # the parts themselves, so that Python gives no `id` to another object
        self._path: dict[int, int] = {}  # depth of the parts that are being visited, by `id`
        self._highest = 0  # the least depth to which a part of the present one refers back
        self._walks = _WALKS

    def of(self, value: Any) -> bytes:
        """The form of a part."""
        leaf = _SHORT_FORMS.get(type(value))
        if leaf is not None:
            return leaf(value)
        number = id(value)
        if (known := self._known.get(number)) is not None:
            return known
        depth = len(self._path)
        if (before := self._path.get(number)) is not None:  # a cycle
            self._highest = min(self._highest, before)
            return b"^%d" % (depth - before)
        self._path[number] = depth
        outer, self._highest = self._highest, depth
        form = _hashed(*self._composed(value))
        del self._path[number]
        self._kept.append(value)
        if self._highest >= depth:
            self._known[number] = form
        else:
            self._walks -= 1
            if self._walks < 0:
                raise RecursionError("its cycles have too many parts")
        self._highest = min(outer, self._highest)
        return form

    def _all(self, values: Iterable[Any]) -> bytes:
        return _framed(map(self.of, values))

    def _pairs(self, items: Iterable[tuple[Any, Any]]) -> bytes:
        return _framed(sorted(self._all(item) for item in items))

    def _composed(self, value: Any) -> tuple[bytes, ...]:
        kind = type(value)
        if kind is dict:
            return b"{", self._pairs(value.items())
        if kind is list or kind is tuple:
            return b"[" if kind is list else b"(", self._all(value)
        if kind is set or kind is frozenset:
            return b"<" if kind is set else b">", _framed(sorted(map(self.of, value)))
        if kind is array:
            return b"array", value.typecode.encode(), value.tobytes()
        if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)):
            return self._named(value)
        if isinstance(value, enum.Enum):
            return b"enum", self.of(kind), self.of(value.name or value._value_)
        if (numeric := self._numeric(value)) is not None:
            return b"numeric", self.of(kind), *numeric
        if dataclasses.is_dataclass(value):
            fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
            return b"fields", self.of(kind), self._pairs(fields.items())
        if (pydantic := sys.modules.get("pydantic")) is not None and isinstance(value, pydantic.BaseModel):
            fields = {name: vars(value).get(name) for name in kind.model_fields} | (value.__pydantic_extra__ or {})
            return b"fields", self.of(kind), self._pairs(fields.items())
        reference: Any = getattr(sys.modules.get("ray"), "ObjectRef", None)
        if reference is not None and isinstance(value, reference):
            return b"ref", value.binary()
        return self._reduced(value)

    def _named(self, value: Any) -> tuple[bytes, ...]:
        """A class, function or module by its name; a lambda or local function also by its code."""
        if isinstance(value, types.ModuleType):
            return b"module", value.__name__.encode()
        origin = None
        if not isinstance(value, types.BuiltinFunctionType):
            origin = pickler.origin_of(value)
        elif value.__self__ is not None and not isinstance(value.__self__, types.ModuleType):
            return b"method", self.of(value.__self__), value.__name__.encode()
        module = os.path.basename(origin.script) if origin is not None else str(value.__module__)
        name = _framed((module.encode(), value.__qualname__.encode()))
        if isinstance(value, types.FunctionType) and "<" in value.__qualname__:
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            written = pickler.content_of(value).encode()
            return b"function", name, written, self._all([value.__defaults__, value.__kwdefaults__, *cells])
        return b"name", name

    def _numeric(self, value: Any) -> tuple[bytes, ...] | None:
        """An array of numpy or a tensor of torch; neither library is imported for it."""
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        dtype: Any
        if numpy is not None and (type(value) is numpy.ndarray or isinstance(value, numpy.generic)):
            dtype = value.dtype.descr if value.dtype.names else value.dtype.str
            data = self.of(value.tolist()) if value.dtype.hasobject else value.tobytes()
        elif torch is not None and isinstance(value, torch.Tensor):
            dtype = value.dtype
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        else:
            return None
        return f"{dtype} {tuple(value.shape)} ".encode(), data

    def _reduced(self, value: Any) -> tuple[bytes, ...]:
        """Any other object, by what pickling would keep of it."""
        kind = type(value)
        reduce = copyreg.dispatch_table.get(kind)
        reduction: Any = value.__reduce_ex__(4) if reduce is None else reduce(value)
        if isinstance(reduction, str):
            return b"global", self.of(kind), reduction.encode()
        parts: list[Any] = [*list(reduction), None, None, None]
        make, arguments, state, items, pairs = parts[:5]
        return (
            b"object", self.of(kind), self.of(make), self.of(arguments), self.of(state), self._all(items or ()),
            self._pairs(pairs or ()),
        )  # fmt: skip
