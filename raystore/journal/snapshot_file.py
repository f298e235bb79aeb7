"""The file of a snapshot: a state from which a journal goes on, made by a helper and read when a store starts.

The file begins with a head like a segment. Then come the indexes of the spans, one for each rollout, each read when
somebody asks for it; then the sections of the image in frames; and last the offset of the first section. The file gets
its name only once it is whole and on disk. Bodies of spans stay in the segments: an index says where.
"""

from __future__ import annotations

import os
import struct
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgpack

from raystore.core import format1
from raystore.core.payload import OnDisk, Payload
from raystore.core.records import Attempt, Change, Config, Group, Record, Resources, Rollout, Span, Worker
from raystore.core.snapshot import LazyChunk, restore, sections
from raystore.core.spans import Index
from raystore.core.state import State
from raystore.errors import JournalDamagedError
from raystore.journal import format
from raystore.journal.files import JournalPosition, whole_file
from raystore.journal.files import read_head as read_file_head
from raystore.journal.format import FileHead, WriterInfo

_END = struct.Struct("<8sQI")  # magic, where the sections begin, how many there are
_END_MAGIC = b"rs-image"
_INDEX = struct.Struct("<III")  # checksum, bytes of the rows, spans
_EXACT = frozenset({"session", "consumers", "more"})  # sections in which tuples and records stay what they are

# Codes of msgpack's extension types; records have one each, from _RECORD on.
_PAYLOAD, _TUPLE, _RECORD = 1, 2, 16
_KINDS: list[type[Record]] = [Config, Rollout, Attempt, Worker, Resources, Span, Change, Group]


def _pack_extension(value: Any) -> Any:
    if isinstance(value, tuple):
        return msgpack.ExtType(_TUPLE, _pack(list(value), exactly=True))
    if isinstance(value, Record):
        return msgpack.ExtType(_RECORD + _KINDS.index(type(value)), _pack(list(value.row()), exactly=True))
    if isinstance(value, Payload):  # references are not kept
        return msgpack.ExtType(_PAYLOAD, value.data)
    raise TypeError(f"{type(value).__name__} has no place in a snapshot: {value!r}")


def _unpack_extension(code: int, data: bytes) -> Any:
    if code == _PAYLOAD:
        return Payload(data, ())
    value = _unpack(data)
    return tuple(value) if code == _TUPLE else _KINDS[code - _RECORD](*value)


def _pack(value: Any, *, exactly: bool) -> bytes:
    """A value as bytes; `exactly` keeps the difference between tuples and lists, and between records and rows."""
    return bytes(msgpack.packb(value, default=_pack_extension, strict_types=exactly, unicode_errors="surrogatepass"))


def _unpack(data: bytes | memoryview) -> Any:
    return msgpack.unpackb(data, ext_hook=_unpack_extension, strict_map_key=False, unicode_errors="surrogatepass")


class SpanIndexFile:
    """The span indexes of a snapshot, each read when it is needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # as long as the state lives

    def raw(self, at: int) -> bytes:
        """The bytes of the index at an offset."""
        data = os.pread(self._file.fileno(), 4096, at)
        checksum, length, count = _INDEX.unpack_from(data)
        size = _INDEX.size + 8 * count + length
        if len(data) < size:
            data = os.pread(self._file.fileno(), size, at)
        if len(data) < size or zlib.crc32(data[4:size]) != checksum:
            raise JournalDamagedError(str(self._path), at, "the index of the spans of a rollout cannot be read")
        return data[:size]

    def read(self, at: int) -> Index:
        """The index at an offset: the place of each body, and a row for each span."""
        raw = self.raw(at)
        places = _places_in(raw)
        return places, _unpack(raw[_INDEX.size + 8 * len(places) :])


def _places_in(raw: bytes) -> array[int]:
    _, _, count = _INDEX.unpack_from(raw)
    places = array("Q")
    places.frombytes(raw[_INDEX.size : _INDEX.size + 8 * count])
    return places


def _pack_index(index: Index) -> bytes:
    places, rows = index
    body = _pack(rows, exactly=False)
    rest = struct.pack("<II", len(body), len(places)) + places.tobytes() + body
    return struct.pack("<I", zlib.crc32(rest)) + rest


# -- writing -----------------------------------------------------------------------------------------------------------


def write(path: Path, head: FileHead, state: State, old: SpanIndexFile | None, more: dict[str, Any]) -> set[int]:
    """Write a snapshot; returns the numbers of the records that hold bodies of its spans.

    `old` has the indexes of the snapshot before, of which some may not have been read. `more` is what the journal needs
    beside the state.
    """
    needed: set[int] = set()
    with whole_file(path) as file:
        file.write(format.pack_head(head))
        places = _write_indexes(file, state, old, needed)
        begin, count = file.tell(), 0
        for name, value in sections(state, places):
            _write_section(file, name, value, count)
            count += 1
        _write_section(file, "more", more, count)
        file.write(_END.pack(_END_MAGIC, begin, count + 1))
    return needed


def _write_indexes(file: BinaryIO, state: State, old: SpanIndexFile | None, needed: set[int]) -> dict[str, int]:
    at = file.tell()
    written: dict[str, int] = {}
    for rollout_id in state.entries:
        if place := state.spans.place(rollout_id):
            assert old is not None
            raw = old.raw(place)
        elif (index := state.spans.index(rollout_id)) is not None:
            raw = _pack_index(index)
        else:
            continue
        written[rollout_id] = at
        needed.update(place // OnDisk.RECORD for place in _places_in(raw))
        file.write(raw)
        at += len(raw)
    return written


def _write_section(file: BinaryIO, name: str, value: Any, number: int) -> None:
    packed = bytes(value.packed) if isinstance(value, LazyChunk) else _pack(value, exactly=name in _EXACT)
    file.writelines(format.pack_frame([[name.encode(), packed]], number, 0))


# -- reading -----------------------------------------------------------------------------------------------------------


def read_head(path: Path) -> tuple[JournalPosition, WriterInfo, int]:
    """The position up to which a snapshot goes, the writer of the journal then, and the format of the snapshot."""
    head = read_file_head(path)
    assert head.more is not None
    position = JournalPosition(head.epoch, head.number, head.more["offset"], head.first - 1)
    return position, head.more["who"], head.format


def read(
    path: Path, state: State, on_section: Callable[[], None] = lambda: None
) -> tuple[SpanIndexFile, dict[str, Any]]:
    """Fill an empty state; returns its span indexes, and what the journal needs beside it.

    `on_section` is called for each section.
    """
    indexes = SpanIndexFile(path)
    more: dict[str, Any] = {}
    with open(path, "rb", buffering=0) as file:
        sections = _sections(file, path, more, on_section)
        restore(state, _upgraded(sections) if read_file_head(path).format == 1 else sections, _unpack)
    state.spans.read_index = indexes.read
    return indexes, more


def _upgraded(sections: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Sections of format 1 as sections of today."""
    plain: list[Any] = []
    payload_bytes = 0
    for name, value in sections:
        found = _unpack(value) if name == "chunk" else value
        payload_bytes += format1.payload_bytes(name, found)
        if name == "plain":
            plain = value
        elif name == "chunk":
            yield name, _pack(format1.section(name, found), exactly=False)
        else:
            yield name, format1.section(name, value)
    plain[format1.PAYLOAD_BYTES] = payload_bytes
    yield "plain", format1.section("plain", plain)


def _sections(
    file: BinaryIO, path: Path, more: dict[str, Any], on_section: Callable[[], None]
) -> Iterator[tuple[str, Any]]:
    """Names and values of the sections; the one named "more" fills that dict."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _END.size, 0))
    try:
        magic, begin, count = _END.unpack(file.read(_END.size))
    except struct.error:
        magic, begin, count = b"", 0, 0
    if magic != _END_MAGIC:
        raise JournalDamagedError(str(path), size, "the snapshot does not end like one")
    file.seek(begin)
    data = memoryview(file.read(size - _END.size - begin))
    at = 0
    for number in range(count):
        frame = format.read_frame(data, at)
        if frame is None or frame.first != number:
            raise JournalDamagedError(str(path), begin + at, f"section {number} of the snapshot cannot be read")
        at = frame.end
        name, packed = next(frame.records())
        section = bytes(name).decode()
        if section == "more":
            more.update(_unpack(packed))
        else:
            on_section()
            yield section, bytes(packed) if section == "chunk" else _unpack(packed)
