"""A digest of a value's content: whether a request with a caller-given id repeats an earlier one, or conflicts with it.

Equal content gives equal digests in every process and in any order of keys: a canonical form is hashed, not the bytes
of a pickle. Dicts and sets are sorted; arrays and tensors go by dtype, shape and bytes; dataclasses and pydantic models
by their fields; classes, and functions that have a name, by that name (of a script: with its file's); enums by class
and member; any other object by its class and by what pickling would keep of it. A number's kind counts: `1`, `1.0` and
`True` are three contents, a list is no tuple, and NaN equals itself. An object reference equals only itself.
Where no such form can be made (for what only cloudpickle can pickle) the digest is of the encoded bytes.
"""

from __future__ import annotations

import copyreg
import dataclasses
import enum
import os
import struct
import sys
import types
from array import array
from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import Any

from raystore.core.payload import CANONICAL, Payload, digest_of_bytes
from raystore.values import pickler

_BYTES = 16
_WALKS = 10_000  # visits to parts of cycles, whose forms cannot be remembered; beyond them the bytes are hashed


class _NoForm(Exception):
    """There is no canonical form of this."""


def digest(value: Any, encoded: bytes | Payload | None) -> bytes:
    """The digest of a value; `encoded` is its payload."""
    try:
        return bytes((CANONICAL,)) + _hashed(_Form().of(value))
    except Exception:  # whatever a user's `__reduce__` raises: pickling has other ways, and has succeeded
        return digest_of_bytes(encoded)


def _hashed(*parts: bytes) -> bytes:
    made = blake2b(digest_size=_BYTES)
    for part in parts:
        made.update(part)
    return made.digest()


def _framed(parts: Iterable[bytes]) -> bytes:
    """Parts one behind the other, each behind its length, so that no two lists of parts give the same bytes."""
    return b"".join([len(part).to_bytes(8, "little") + part for part in parts])


def _number(value: float) -> bytes:
    return b"d" + (struct.pack("<d", value) if value == value else b"nan")


def _text(value: str) -> bytes:
    return b"s" + value.encode("utf-8", "surrogatepass")


_LEAVES: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"n",
    bool: lambda value: b"1" if value else b"0",
    int: lambda value: b"i%x" % value if value >= 0 else b"i-%x" % -value,
    float: _number,
    complex: lambda value: b"c" + _number(value.real) + _number(value.imag),
    str: _text,
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
        leaf = _LEAVES.get(type(value))
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
                raise _NoForm
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
