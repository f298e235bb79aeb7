"""Bodies of spans that are on disk only, read when somebody asks.

A place is a record's number, an operation in it, and a span of that. The record is found by the segment's name and a
sparse index of its frames, which is made by looking at their heads when first needed.
Not here: which bodies are in memory (`core.spans`).
"""

from __future__ import annotations

import os
import threading
from array import array
from bisect import bisect_right
from pathlib import Path
from typing import Any

from raystore import wire
from raystore.core.payload import OnDisk
from raystore.core.records import Span
from raystore.errors import JournalDamagedError
from raystore.journal import frames, records
from raystore.journal.reading import settled
from raystore.journal.segments import BODIES, RECORDS, Directory

SPARSE_BYTES = 256 * 1024  #: one entry of an index for so much of a segment


class _Segment:
    """One file, and where in it records are. Its writer may go on, and cut off what space it did not need."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # as long as somebody may ask
        head, self._indexed = frames.unpack_head(self._read(0, frames.HEAD_BYTES), str(path))
        self.first = head.first
        self._last = head.first - 1  # number of the newest record that the index covers
        self._firsts = array("Q")
        self._offsets = array("Q")

    def _read(self, at: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, at)

    def _skip(self, at: int) -> tuple[range, int] | None:
        """Numbers of the records of the frame at an offset, and where it ends."""
        return frames.skip_frame(self._read(at, frames.FRAME_BYTES), at)

    def _index(self) -> None:
        """Look at the heads of frames that were not there the last time."""
        size = os.fstat(self._file.fileno()).st_size
        while (found := self._skip(self._indexed)) is not None and found[1] <= size:
            numbers, end = found
            if not self._offsets or self._indexed - self._offsets[-1] >= SPARSE_BYTES:
                self._firsts.append(numbers.start)
                self._offsets.append(self._indexed)
            self._last, self._indexed = numbers.stop - 1, end

    def record(self, number: int) -> list[memoryview] | None:
        """A record by its number; None if it is not here, or cannot be read."""
        if number > self._last:
            self._index()
        entry = bisect_right(self._firsts, number) - 1
        at = self._offsets[entry] if entry >= 0 else 0
        while entry >= 0 and (found := self._skip(at)) is not None:
            numbers, end = found
            if number in numbers:
                frame = frames.read_frame(memoryview(self._read(at, end - at)), 0)
                return list(frame.records())[number - numbers.start] if frame is not None else None
            at = end
        return None


class Bodies:
    """The bodies of one journal."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._lock = threading.Lock()  # callers of a store in process may ask from several threads
        self._segments: dict[Path, _Segment] = {}

    def load(self, items: list[Any]) -> list[Any]:
        """Records, and spans among them with their bodies; bodies that were written together are read together."""
        last: tuple[int, list[Any]] | None = None
        loaded = []
        for item in items:
            if isinstance(item, Span) and isinstance(item.body, OnDisk):
                number, operation, place = OnDisk.parts(item.body.place)
                if last is None or last[0] != number:
                    last = (number, self._operations(number))
                row = last[1][operation][1]["spans"][place]
                item = item.evolve(body=row[records.BODY])
            loaded.append(item)
        return loaded

    def _operations(self, number: int) -> list[Any]:
        with self._lock:
            record = self._record(number)
        told = records.unpack(record[0])
        parts = [bytes(part) for part in record[1:]]
        if told.kind == records.CALL:
            return [wire.unpack(parts[0], [], parts[1:])]
        return wire.split(parts, None)[1:]

    def forget_files(self) -> None:
        """Let go of all files: a helper has replaced some of them."""
        with self._lock:
            self._segments = {}

    def _record(self, number: int) -> list[memoryview]:
        record = settled(lambda: self._find(number))
        if record is None:
            where = str(self._directory.path)
            raise JournalDamagedError(where, 0, f"record {number}, with spans, cannot be read any more")
        return record

    def _find(self, number: int) -> list[memoryview] | None:
        """Of what an earlier writer added unknowingly, later ones use the same numbers: the newest counts."""
        files = self._directory.segments(RECORDS, BODIES)
        for epoch in sorted({found[0] for found in files}, reverse=True):
            segments = [self._open(path) for e, _, path in files if e == epoch]
            holding = [segment for segment in segments if segment.first <= number]
            if holding:
                return holding[-1].record(number)
        return None

    def _open(self, path: Path) -> _Segment:
        if path not in self._segments:
            self._segments[path] = _Segment(path)
        return self._segments[path]
