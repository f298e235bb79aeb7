"""How records stand in a file: a head, then frames, each with its length and a checksum.

A record is a list of byte chunks; a frame holds the records that were committed together, and is written whole or not
at all. Its head also says up to which record everything was safely on disk when it was written, so that a reader can
tell a tail that was never finished from damage to what was finished once.
Pure: bytes in, bytes out. Not here: files (`segments`), what a record means (`records`).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raystore.errors import JournalDamagedError, JournalFormatError

FORMAT = 2  #: of segments and snapshots; older ones are read by their own rules, newer ones refused
MAGIC = b"raystore journal "

#: magic, records in the frame, length of the body, checksum, number of its first record, safe up to this record
_FRAME = struct.Struct("<4sIQIQQ")
_FRAME_MAGIC = b"\xf5JF\n"
FRAME_BYTES = _FRAME.size  #: of the head of a frame
HEAD_BYTES = 4096  #: the head of a file is not longer
_LENGTH = struct.Struct("<I")
_CHUNKS = struct.Struct("<H")

Record = Sequence[bytes]


@dataclass(slots=True, frozen=True)
class Head:
    """What a segment says of itself."""

    store_id: str
    epoch: int
    number: int  # within its epoch
    first: int  # number of its first record; of a snapshot, of the first behind it
    format: int = FORMAT
    more: dict[str, Any] | None = None  # of a snapshot


def pack_head(head: Head) -> bytes:
    """The first bytes of a segment."""
    told = {"store_id": head.store_id, "epoch": head.epoch, "number": head.number, "first": head.first}
    body = json.dumps(told | ({"more": head.more} if head.more is not None else {})).encode()
    return b"%s%d %d %08x\n%s\n" % (MAGIC, head.format, len(body), zlib.crc32(body), body)


def unpack_head(data: bytes | memoryview, where: str) -> tuple[Head, int]:
    """The head of a segment, and how long it is; raises if it is none, is damaged, or of a newer format."""
    line, _, rest = bytes(data[:HEAD_BYTES]).partition(b"\n")
    if not line.startswith(MAGIC):
        raise JournalDamagedError(where, 0, "it does not begin like a segment of a journal")
    try:
        format_, length, checksum = line[len(MAGIC) :].split()
        theirs = int(format_)
        body = rest[: int(length)]
        if zlib.crc32(body) != int(checksum, 16):
            raise ValueError("checksum")
        head = Head(format=theirs, **json.loads(body))
    except (ValueError, TypeError):
        raise JournalDamagedError(where, 0, "its head is damaged") from None
    if theirs > FORMAT:
        raise JournalFormatError(where, theirs, FORMAT)
    return head, len(line) + 1 + int(length) + 1


def pack_frame(records: Sequence[Record], first: int, safe: int) -> list[bytes]:
    """A frame as chunks to be written one after the other; the chunks of records are not copied."""
    chunks: list[bytes] = [b""]
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
    """A frame that was found whole."""

    at: int  # offset
    end: int
    first: int
    count: int
    safe: int
    body: memoryview

    def records(self) -> Iterator[list[memoryview]]:
        """Its records, as chunks."""
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
    """The frame that stands at an offset; None if there is none, or not a whole one."""
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
    """Numbers of the records of a frame with this head, and where it ends if it stands at an offset.

    Believed without a look at its body; None if this is no head.
    """
    if len(head) < FRAME_BYTES:
        return None
    magic, count, length, _, first, _ = _FRAME.unpack(head)
    return (range(first, first + count), at + FRAME_BYTES + length) if magic == _FRAME_MAGIC else None


def find_frame(data: memoryview, at: int) -> Frame | None:
    """The next whole frame that begins at an offset or behind it, past whatever cannot be read."""
    held: Any = data.obj
    while (at := held.find(_FRAME_MAGIC, at)) >= 0:
        frame = read_frame(data, at)
        if frame is not None:
            return frame
        at += 1
    return None
