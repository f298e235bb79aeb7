"""The format of a journal: a file is a head and frames, a frame is the records of one commit, a record is byte chunks.

A frame has its length and a checksum, and is written whole or not at all. Its head also says up to which record
everything was safely on disk when it was written, so that a reader can tell a torn tail from damage.

The first chunk of a record is its head, `[kind, now, age, seed, minted, session, arguments]`. A batch adds the bytes in
which it arrived as further chunks, so that it is not encoded again. A batch that was interrupted is one record with its
bytes, and one more record for each part that ran later.
Pure: bytes in, bytes out. Not here: which records are made (`recorder`), what they do (`replay`).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from raystore.core.state import Step
from raystore.errors import JournalDamagedError, JournalFormatError
from raystore.wire import frames

FORMAT = 2  #: of segments and snapshots; older ones are read by their own rules, newer ones refused
MAGIC = b"raystore journal "

#: magic, records in the frame, length of the body, checksum, number of its first record, safe up to this record
_FRAME = struct.Struct("<4sIQIQQ")
_FRAME_MAGIC = b"\xf5JF\n"
FRAME_BYTES = _FRAME.size  #: length of the head of a frame
HEAD_BYTES = 4096  #: the head of a file is not longer
_CHUNKS = struct.Struct("<H")

Record = Sequence[bytes | memoryview]
Chunks = list[memoryview]  #: a record that was read


class WriterInfo(TypedDict, total=False):
    """Who writes a journal."""

    store_id: str
    name: str | None  # of the store
    writer: str | None  # id of the actor; a restarted actor keeps it


# -- heads of files ----------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class FileHead:
    """The head of a segment or snapshot."""

    store_id: str
    epoch: int
    number: int  # within its epoch
    first: int  # number of its first record; of a snapshot, of the first record after it
    format: int = FORMAT
    more: dict[str, Any] | None = None  # of a snapshot


def pack_head(head: FileHead) -> bytes:
    """The first bytes of a file."""
    fields = {"store_id": head.store_id, "epoch": head.epoch, "number": head.number, "first": head.first}
    body = json.dumps(fields | ({"more": head.more} if head.more is not None else {})).encode()
    return b"%s%d %d %08x\n%s\n" % (MAGIC, head.format, len(body), zlib.crc32(body), body)


def unpack_head(data: bytes | memoryview, where: str) -> tuple[FileHead, int]:
    """The head of a file, and its length in bytes.

    Raises `JournalDamagedError` if it cannot be read, and `JournalFormatError` if its format is newer than this code.
    """
    line, _, rest = bytes(data[:HEAD_BYTES]).partition(b"\n")
    if not line.startswith(MAGIC):
        raise JournalDamagedError(where, 0, "it does not begin like a segment of a journal")
    try:
        format_, length, checksum = line[len(MAGIC) :].split()
        theirs = int(format_)
        body = rest[: int(length)]
        if zlib.crc32(body) != int(checksum, 16):
            raise ValueError("checksum")
        head = FileHead(format=theirs, **json.loads(body))
    except (ValueError, TypeError):
        raise JournalDamagedError(where, 0, "its head is damaged") from None
    if theirs > FORMAT:
        raise JournalFormatError(where, theirs, FORMAT)
    return head, len(line) + 1 + int(length) + 1


# -- frames ------------------------------------------------------------------------------------------------------------


def pack_frame(records: Sequence[Record], first: int, safe: int) -> list[bytes | memoryview]:
    """A frame as chunks, to be written one after the other; the chunks of records are not copied."""
    chunks: list[bytes | memoryview] = [b""]
    length = 0
    for record in records:
        sizes = [len(chunk) for chunk in record]
        head = _CHUNKS.pack(len(sizes)) + struct.pack(f"<{len(sizes)}I", *sizes)
        chunks.append(head)
        chunks.extend(record)
        length += len(head) + sum(sizes)
    checksum = zlib.crc32(_FRAME.pack(_FRAME_MAGIC, len(records), length, 0, first, safe))
    for chunk in chunks:
        checksum = zlib.crc32(chunk, checksum)
    chunks[0] = _FRAME.pack(_FRAME_MAGIC, len(records), length, checksum, first, safe)
    return chunks


@dataclass(slots=True, frozen=True)
class Frame:
    """A whole frame that was read."""

    at: int  # offset of its first byte
    end: int  # offset behind its last byte
    first: int
    count: int
    safe: int
    body: memoryview

    def records(self) -> Iterator[Chunks]:
        """Its records."""
        body, at = self.body, 0
        for _ in range(self.count):
            (count,) = _CHUNKS.unpack_from(body, at)
            sizes = struct.unpack_from(f"<{count}I", body, at + 2)
            at += 2 + 4 * count
            record = []
            for size in sizes:
                record.append(body[at : at + size])
                at += size
            yield record


def read_frame(data: memoryview, at: int) -> Frame | None:
    """The frame at an offset; None if no whole frame begins there."""
    if at + _FRAME.size > len(data):
        return None
    magic, count, length, checksum, first, safe = _FRAME.unpack_from(data, at)
    begin = at + _FRAME.size
    if magic != _FRAME_MAGIC or length > len(data) - begin:
        return None
    actual = zlib.crc32(_FRAME.pack(magic, count, length, 0, first, safe))
    if zlib.crc32(data[begin : begin + length], actual) != checksum:
        return None
    return Frame(at, begin + length, first, count, safe, data[begin : begin + length])


def skip_frame(head: bytes, at: int) -> tuple[range, int] | None:
    """Numbers of the records of a frame at an offset, and the offset of its end, from its head alone.

    The body is not checked. None if these bytes are not the head of a frame.
    """
    if len(head) < FRAME_BYTES:
        return None
    magic, count, length, _, first, _ = _FRAME.unpack(head)
    return (range(first, first + count), at + FRAME_BYTES + length) if magic == _FRAME_MAGIC else None


def find_frame(data: memoryview, at: int) -> Frame | None:
    """The next whole frame that begins at or behind an offset, past bytes that cannot be read."""
    whole: Any = data.obj
    while (at := whole.find(_FRAME_MAGIC, at)) >= 0:
        if (frame := read_frame(data, at)) is not None:
            return frame
        at += 1
    return None


# -- heads of records --------------------------------------------------------------------------------------------------

#: Kinds of records. Any other kind is the name of a step (`core.verbs.STEPS`), with its arguments.
START = (
    "start"  # a process begins to write: [writer info, settings, position up to which it read, seconds away or None]
)
BATCH = "batch"  # [items that ran, operations that had run before], and the bytes of the batch
MORE = "more"  # [sequence, items that ran] of a batch that has a record already
CALL = "call"  # [ticket], and the bytes of an operation: called in the store's own process, or of a repeated batch
VERIFIED = "verified"  # [rollouts, digest]: the writer's digest of the rollouts that were touched longest ago
LEFT_OUT = "left_out"  # [sequence, class of the error, its arguments]: an item that must not run, and its answer


class RecordHead(NamedTuple):
    """The head of a record."""

    kind: str
    now: float
    age: float
    seed: int
    minted: int
    session_id: str | None
    arguments: list[Any]

    def step(self) -> Step:
        """The step in which it was recorded; its session is not set."""
        return Step(self.now, self.age, self.seed, minted=self.minted)


def pack_record_head(kind: str, step: Step, minted: int, session_id: str | None, arguments: Sequence[Any]) -> bytes:
    """The first chunk of a record."""
    return frames.pack((kind, step.now, step.age, step.seed, minted, session_id, arguments)).frame


def unpack_record_head(chunk: bytes | memoryview) -> RecordHead:
    """The head of a record from its first chunk."""
    return RecordHead(*frames.unpack(chunk, []))
