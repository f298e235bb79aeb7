"""How operations and answers cross to an actor: msgpack frames, with object references beside them.

An operation is packed once by its caller (`pack_operation`). A batch is a header and operations, joined without packing
them again (`join`); an answer is packed as a whole. A call is one frame, since Ray carries a single `bytes` with the
least effort. Records travel as their rows. Payloads stay opaque: their bytes are carried, never decoded.
Not here: what the values mean (`convert`), when batches are sent (`remote.session`).
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgpack

from raystore.core.payload import Payload
from raystore.core.records import Record
from raystore.core.state import ERROR as ERROR
from raystore.core.state import NOTICE as NOTICE
from raystore.core.state import PARKED as PARKED
from raystore.core.state import VALUE as VALUE
from raystore.errors import InvalidValueError

_REFS = 1  # extension type: a payload whose references stand in the list beside the frame
_LARGE = 2  # extension type: the place of a payload that stands beside the frame

# Outcomes of a batch.
DONE, ENDED, REFUSED, BROKEN = range(4)


PART_BYTES = 96_000  #: of one argument, with room for Ray's own bytes beside it
INLINE_BYTES = 1152 * 1024  #: of a frame that travels in parts
BULK_BYTES = 64 * 1024  #: of an answer that consists of many values

Answer = bytes | tuple[bytes, list[Any]]  #: a frame, with the references that stand beside it if there are any


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Let the garbage collector of this process wait while many values are made that stay.

    It would look at those that are there again and again, which takes longer than making them.
    """
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


class Packed(NamedTuple):
    """A frame with its object references, its large payloads in order, and how many bytes these are."""

    frame: bytes
    refs: list[Any]
    large: list[bytes]
    size: int


class _Packing:
    """Packs frames, and collects the references and large payloads in them."""

    def __init__(self) -> None:
        self.refs: list[Any] = []
        self.large: list[bytes] = []
        self.packer = msgpack.Packer(default=self._extended, unicode_errors="surrogatepass", autoreset=False)

    def _extended(self, value: Any) -> Any:
        if isinstance(value, Record):
            return value.row()
        if isinstance(value, Payload) and not value.refs and not self.is_answer:
            self.large.append(value.data)
            return msgpack.ExtType(_LARGE, b"")
        if isinstance(value, Payload):
            place = msgpack.packb([value.data, len(self.refs), len(value.refs)])
            self.refs.extend(value.refs)
            return msgpack.ExtType(_REFS, place)
        raise TypeError(f"{type(value).__name__} cannot travel")

    is_answer = False  #: in an answer, a `Payload` without references is one that has lost them, and stays a `Payload`


_spare: list[_Packing] = []  # reused, since making one costs as much as packing a small frame; taken out while in use
_SPARE_BYTES = 2 * 1024 * 1024  # one that has packed a larger frame is dropped with its buffer


#: What `pack` raises for a value that cannot travel.
UNPACKABLE = (OverflowError, TypeError, ValueError)


def pack(value: Any, *, is_answer: bool = False) -> Packed:
    """A value as a frame, and what belongs to it."""
    try:
        packing = _spare.pop()
    except IndexError:
        packing = _Packing()
    packing.is_answer = is_answer
    packing.packer.pack(value)  # if this raises, it is not used again
    frame = bytes(packing.packer.bytes())
    packing.packer.reset()
    packed = Packed(frame, packing.refs, packing.large, len(frame) + sum(map(len, packing.large)))
    packing.refs, packing.large = [], []
    if len(frame) <= _SPARE_BYTES:
        _spare.append(packing)
    return packed


def pack_operation(verb: str, arguments: dict[str, Any]) -> Packed:
    """One operation as a frame."""
    try:
        return pack((verb, arguments))
    except UNPACKABLE:
        raise refusal(verb, arguments) from None


def refusal(verb: str, arguments: dict[str, Any]) -> InvalidValueError:
    """The error that names the argument that cannot be packed."""
    for name, value in arguments.items():
        try:
            pack(value)
        except UNPACKABLE:
            return InvalidValueError(name, value, "plain values, whole numbers of at most 64 bits among them")
    return InvalidValueError("arguments", verb, "plain values")


def _opener(refs: list[Any], large: Iterator[bytes]) -> Any:
    def hook(code: int, data: bytes) -> Any:
        if code == _LARGE:
            return next(large)
        if code != _REFS:
            raise ValueError(f"frame has an unknown extension {code}")
        body, first, count = msgpack.unpackb(data)
        return Payload(body, tuple(refs[first : first + count]))

    return hook


_NOTHING_TO_OPEN = _opener([], iter(()))
_unpackb = functools.partial(msgpack.unpackb, strict_map_key=False, unicode_errors="surrogatepass")


def unpack(frame: bytes | memoryview, refs: list[Any], large: Sequence[bytes] = ()) -> Any:
    """The value of a frame, with its references and large payloads."""
    return _unpackb(frame, ext_hook=_opener(refs, iter(large)) if refs or large else _NOTHING_TO_OPEN)


def pack_answer(*values: Any) -> Answer:
    """The answer of an actor with these values."""
    frame, refs, *_ = pack(values, is_answer=True)
    return (frame, refs) if refs else frame


def unpack_answer(answer: Answer) -> list[Any]:
    """The values of an actor's answer."""
    frame, refs = (answer, []) if isinstance(answer, bytes) else answer
    if len(frame) > BULK_BYTES:
        with collector_paused():
            return list(unpack(frame, refs))
    return list(unpack(frame, refs)) if refs else _unpackb(frame, ext_hook=_NOTHING_TO_OPEN)


def join(header: list[Any], operations: Sequence[Packed]) -> list[bytes]:
    """A batch as the arguments of a call: a header and operations that are packed already, and large payloads.

    Ray carries an argument inline up to 100 KiB; a larger one goes through the object store, which costs a millisecond,
    and pages of it stay mapped into the actor. So a frame is cut into parts as long as that pays off; its first byte
    says how many. Large payloads follow as arguments of their own, which saves copying them into a frame and out again.
    """
    values = [pack(header).frame, *(operation.frame for operation in operations)]
    large = [payload for operation in operations for payload in operation.large]
    size = sum(map(len, values))
    count = -(-size // PART_BYTES) if size <= INLINE_BYTES else 1
    frame = b"".join((bytes((count,)), _LIST, len(values).to_bytes(4, "big"), *values))
    if count == 1:
        return [frame, *large]
    length = len(frame) // count + 1
    return [*(frame[first : first + length] for first in range(0, len(frame), length)), *large]


_LIST = b"\xdd"  # msgpack's mark of a list whose length follows in four bytes


def split(parts: Sequence[bytes], refs: dict[int, list[Any]] | None) -> list[Any]:
    """The header of a batch, and its operations; `refs` has the references of an operation by its number."""
    count = parts[0][0]
    frame = memoryview(parts[0] if count == 1 else b"".join(parts[:count]))[1:]
    if not refs:
        opener = _NOTHING_TO_OPEN if count == len(parts) else _opener([], iter(parts[count:]))
        return _unpackb(frame, ext_hook=opener)  # type: ignore[no-any-return]
    large = iter(parts[count:])
    values: list[Any] = []

    def open_payload(code: int, data: bytes) -> Any:
        return _opener(refs.get(len(values) - 1, []), large)(code, data)  # the header comes first

    unpacker = msgpack.Unpacker(
        ext_hook=open_payload, strict_map_key=False, unicode_errors="surrogatepass", max_buffer_size=len(frame)
    )
    unpacker.feed(frame)
    for _ in range(unpacker.read_array_header()):
        values.append(unpacker.unpack())
    return values
