"""How operations and answers cross to an actor: msgpack frames, with object references beside them.

An operation is packed once by its caller (`pack_operation`); a batch is a list of a header and operations, joined
without packing them again; an answer is packed as a whole. Everything of a call is in one frame, since Ray carries a
single `bytes` with the least effort. Records travel as their rows. Payloads stay opaque: their bytes are carried, never
opened.
Not here: what the values mean (`convert`), when batches leave (`session`).
"""

from __future__ import annotations

from collections.abc import Sequence
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


PART_BYTES = 96_000  #: of one argument, with room for Ray's own bytes beside it
INLINE_BYTES = 512 * 1024  #: of a call whose arguments are parts

Answer = bytes | tuple[bytes, list[Any]]  #: a frame, with the references that stand beside it if there are any


class _Packing:
    """Packs frames and collects the references in them."""

    def __init__(self) -> None:
        self._refs: list[Any] = []
        self._packer = msgpack.Packer(default=self._extended, unicode_errors="surrogatepass", autoreset=False)

    def _extended(self, value: Any) -> Any:
        if isinstance(value, Record):
            return value.row()
        if isinstance(value, Payload):
            place = msgpack.packb([value.data, len(self._refs), len(value.refs)])
            self._refs.extend(value.refs)
            return msgpack.ExtType(_REFS, place)
        raise TypeError(f"{type(value).__name__} cannot travel: {value!r}")

    def pack(self, value: Any) -> tuple[bytes, list[Any]]:
        """A frame and the references beside it; of no use any more when it raises."""
        self._packer.pack(value)
        frame = bytes(self._packer.bytes())
        self._packer.reset()
        refs, self._refs = self._refs, []
        return frame, refs


_spare: list[_Packing] = []  # one costs as much to make as a small frame to pack; out of here while in use
_SPARE_BYTES = 256 * 1024  # one that has grown beyond this is not kept


def pack(value: Any) -> tuple[bytes, list[Any]]:
    """A frame and the references beside it."""
    try:
        packing = _spare.pop()
    except IndexError:
        packing = _Packing()
    frame, refs = packing.pack(value)
    if len(frame) <= _SPARE_BYTES:
        _spare.append(packing)
    return frame, refs


def pack_operation(verb: str, arguments: dict[str, Any]) -> tuple[bytes, list[Any]]:
    """One operation as a frame."""
    try:
        return pack((verb, arguments))
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


def pack_answer(*values: Any) -> Answer:
    """What an actor returns."""
    frame, refs = pack(values)
    return (frame, refs) if refs else frame


def unpack_answer(answer: Answer) -> list[Any]:
    """The values that an actor returned."""
    frame, refs = (answer, []) if isinstance(answer, bytes) else answer
    return list(unpack(frame, refs))


def join(header: list[Any], operations: list[bytes]) -> list[bytes]:
    """A batch: the list of a header and of operations that are packed already, in as many parts as travel best.

    Ray carries a call's arguments inline up to 100 KiB each; a larger one goes through the object store, which costs
    a millisecond and pays off from half a mebibyte on.
    """
    values = [pack(header)[0], *operations]
    if not PART_BYTES < sum(map(len, values)) <= INLINE_BYTES:
        return [_list(values)]
    parts: list[list[bytes]] = [[]]
    size = 0
    for value in values:
        if parts[-1] and size + len(value) > PART_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(value)
        size += len(value)
    return [_list(part) for part in parts]


def _list(values: list[bytes]) -> bytes:
    return b"".join((b"\xdd", len(values).to_bytes(4, "big"), *values))  # as msgpack begins a list


def split(parts: Sequence[bytes], refs: dict[int, list[Any]] | None) -> list[Any]:
    """The header of a batch, and its operations; `refs` has the references of operations by their number."""
    if not refs:
        return [value for part in parts for value in unpack(part, [])]
    values: list[Any] = []

    def open_payload(code: int, data: bytes) -> Payload:
        payload: Payload = _opener(refs.get(len(values) - 1, []))(code, data)  # the header comes first
        return payload

    for part in parts:
        unpacker = msgpack.Unpacker(
            ext_hook=open_payload, strict_map_key=False, unicode_errors="surrogatepass", max_buffer_size=len(part)
        )
        unpacker.feed(part)
        for _ in range(unpacker.read_array_header()):
            values.append(unpacker.unpack())
    return values
