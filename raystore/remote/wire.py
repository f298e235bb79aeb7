"""How operations and answers cross to an actor: msgpack frames, with object references beside them.

An operation is packed once by its caller (`pack_operation`), a batch is operations one behind the other, an answer is
packed as a whole. Records travel as their rows. Payloads stay opaque: their bytes are carried, never opened.
Not here: what the values mean (`convert`), when batches leave (`session`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack

from raystore.core.payload import Payload
from raystore.core.records import Record
from raystore.errors import InvalidValueError

_REFS = 1  # extension type: a payload whose references stand in the list beside the frame

# What an answer to one operation is.
VALUE, ERROR, PARKED, NOTICE = range(4)

# What became of a batch.
DONE, ENDED, REFUSED = range(3)


class _Refs(list[Any]):
    """Collects the references of a frame while it is packed."""

    def pack(self, value: Any) -> Any:
        if isinstance(value, Record):
            return value.row()
        if isinstance(value, Payload):
            place = msgpack.packb([value.data, len(self), len(value.refs)])
            self.extend(value.refs)
            return msgpack.ExtType(_REFS, place)
        raise TypeError(f"{type(value).__name__} cannot travel: {value!r}")


def pack(value: Any) -> tuple[bytes, list[Any]]:
    """A frame and the references beside it."""
    refs = _Refs()
    frame = msgpack.packb(value, default=refs.pack, unicode_errors="surrogatepass")
    return bytes(frame), list(refs)


def pack_operation(verb: str, arguments: dict[str, Any]) -> tuple[bytes, list[Any]]:
    """One operation as a frame."""
    try:
        return pack([verb, arguments])
    except OverflowError:
        raise InvalidValueError("arguments", verb, "whole numbers of at most 64 bits") from None


def _opener(refs: list[Any]) -> Any:
    def hook(code: int, data: bytes) -> Any:
        if code != _REFS:
            raise ValueError(f"frame has an unknown extension {code}")
        body, first, count = msgpack.unpackb(data)
        return Payload(body, tuple(refs[first : first + count]))

    return hook


def unpack(frame: bytes, refs: list[Any]) -> Any:
    """The value of a frame."""
    return msgpack.unpackb(frame, ext_hook=_opener(refs), strict_map_key=False, unicode_errors="surrogatepass")


def join(header: list[Any], operations: list[bytes]) -> bytes:
    """A batch: a header, and operations one behind the other."""
    return b"".join([bytes(msgpack.packb(header)), *operations])


def split(body: bytes, refs: dict[int, list[Any]]) -> Iterator[Any]:
    """The header of a batch, then its operations; `refs` has the references of operations by their number."""
    current: list[Any] = []
    unpacker = msgpack.Unpacker(
        ext_hook=lambda code, data: _opener(current)(code, data),
        strict_map_key=False,
        unicode_errors="surrogatepass",
        max_buffer_size=len(body) or 1,
    )
    unpacker.feed(body)
    yield unpacker.unpack()
    number = 0
    while True:
        current = refs.get(number, [])
        try:
            operation = unpacker.unpack()
        except msgpack.OutOfData:
            return
        yield operation
        number += 1
