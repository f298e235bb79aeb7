"""Opaque user values: encoded once by the producer, decoded once by the consumer, never looked into here.

A payload is `bytes` (one tag byte and a body), or a `Payload` where object references travel beside the bytes: a
reference pickled *inside* bytes would stay pinned for ever, beside them it is freed with the record.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

PLAIN = 0x01  #: body is msgpack of plain data
PICKLED = 0x02  #: body is a pickle; only the consumer may open it

# What stands for the content of a value begins otherwise than a payload.
CANONICAL = 0x03  #: a digest of the value in a canonical form, made by the caller
BY_BYTES = 0x04  #: a digest of its encoded bytes

ROLLOUT_OVERHEAD_BYTES = 1_500  #: record, entry and index entries of one rollout with an attempt, beside its payloads

ERROR_BYTES = 64 * 1024  #: of the error of an attempt; of a longer one its beginning and its end are kept
ERROR_HEAD_BYTES = 16 * 1024


@dataclass(slots=True, eq=False, repr=False)
class Payload:
    """Encoded bytes with the object references that belong to them."""

    data: bytes
    refs: tuple[Any, ...]


@dataclass(slots=True, eq=False)
class OnDisk:
    """A body that is in the journal and not in memory; its place tells record, operation within it, and span."""

    place: int
    size: int  # in bytes, once it is read

    OPERATIONS = 1 << 10  #: what a place can tell apart within a record
    SPANS = 1 << 16
    RECORD = OPERATIONS * SPANS  #: from one record to the next

    @staticmethod
    def place_of(record: int, operation: int, span: int) -> int:
        """A place as one number; 0 if it cannot be told, so that the body has to stay in memory."""
        if not record or operation >= OnDisk.OPERATIONS or span >= OnDisk.SPANS:
            return 0
        return (record * OnDisk.OPERATIONS + operation) * OnDisk.SPANS + span

    @staticmethod
    def parts(place: int) -> tuple[int, int, int]:
        """Record, operation, span."""
        rest, span = divmod(place, OnDisk.SPANS)
        return *divmod(rest, OnDisk.OPERATIONS), span


#: What the core stores for `input`, `metadata`, resources and span bodies. None stands for "no value".
Opaque = bytes | Payload | None


def size_of(payload: Opaque | OnDisk) -> int:
    """Bytes of the encoded value; referenced objects live in the object store and are not counted."""
    if payload is None or isinstance(payload, OnDisk):
        return 0
    return len(payload.data if isinstance(payload, Payload) else payload)


def text_bytes(text: str) -> int:
    """Bytes of a text."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def bounded_error(error: str) -> str:
    """An error as it is kept: a long one without its middle, of which it says how long it was.

    The end stays, since a traceback says there what it was.
    """
    if len(error) <= ERROR_BYTES and text_bytes(error) <= ERROR_BYTES:
        return error
    data = error.encode("utf-8", "surrogatepass")
    cut = len(data) - ERROR_BYTES + 128  # room for the marker
    head = data[:ERROR_HEAD_BYTES].decode("utf-8", "ignore")
    tail = data[ERROR_HEAD_BYTES + cut :].decode("utf-8", "ignore")
    return f"{head}\n[... {cut} of {len(data)} bytes left out: an error keeps {ERROR_BYTES} ...]\n{tail}"


def of_attempt(metadata: Opaque, error: str | None) -> int:
    """Bytes that the values of an attempt count for."""
    return size_of(metadata) + (text_bytes(error) if error is not None else 0)


def of_rollout(input: Opaque, metadata: Opaque, tags: dict[str, Any]) -> int:
    """Bytes that a rollout counts for without its attempts."""
    size = size_of(input) + size_of(metadata) + ROLLOUT_OVERHEAD_BYTES
    for name, value in tags.items():
        size += text_bytes(name) + (text_bytes(value) if type(value) is str else 8)
    return size


def digest_of_bytes(payload: Opaque) -> bytes:
    """The digest that stands for a value of which only the bytes are known."""
    data = payload.data if isinstance(payload, Payload) else payload
    return bytes((BY_BYTES,)) + blake2b(b"" if data is None else data, digest_size=16).digest()


def is_digest(content: Any) -> bool:
    """Whether this stands for the content of a value; journals of format 1 kept the value itself."""
    return isinstance(content, bytes) and content[0] in (CANONICAL, BY_BYTES)


def same_content(one: Opaque, other: Opaque) -> bool:
    """Whether two payloads may stand for the same value by the rule of format 1: a pickle always may."""
    mine, theirs = (p.data if isinstance(p, Payload) else p for p in (one, other))
    if mine is not None and theirs is not None and mine[0] == theirs[0] == PLAIN:
        return mine == theirs
    return (one is None) == (other is None)
