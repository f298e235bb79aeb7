"""Bodies of spans that are on disk only, read when somebody asks for them.

The place of a body is the number of its record, an operation in that, and a span of that. The record is found by the
heads of files, and by a sparse index of the frames of a file, which is made from their heads when it is first needed.
"""

from __future__ import annotations

import os
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from raystore.core.payload import OnDisk
from raystore.core.records import Span
from raystore.errors import JournalDamagedError
from raystore.journal import format
from raystore.journal.files import BODIES, RECORDS, Directory, read_head
from raystore.journal.format import Chunks
from raystore.journal.reader import retry_on_replacement
from raystore.wire import frames

BODY = 8  #: where the body is in the row of a span as it travels
FILES_OPEN = 8  #: at once
SPARSE_BYTES = 256 * 1024  #: one entry of an index for so much of a segment


class _Segment:
    """One file, and an index of it. Its writer may go on, and truncate the space that it did not need."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._identity: tuple[int, int] | None = None  # of the file that the index is of
        self._firsts = array("Q")
        self._offsets = array("Q")
        self.open()
        try:
            head, self._indexed = format.unpack_head(self._read(0, format.HEAD_BYTES), str(path))
        except BaseException:
            self.close()
            raise
        self.last = head.first - 1  #: number of the newest record that the index covers

    def open(self) -> bool:
        """Open the file unless it is open; False if another file has its name by now."""
        if self._file is None:
            self._file = open(self._path, "rb", buffering=0)  # noqa: SIM115  # until others are needed
            status = os.fstat(self._file.fileno())
            found = (status.st_dev, status.st_ino)
            if self._identity is not None and found != self._identity:
                self.close()
                return False
            self._identity = found
        return True

    def close(self) -> None:
        """Close the file; the index stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, at: int, size: int) -> bytes:
        assert self._file is not None
        return os.pread(self._file.fileno(), size, at)

    def _skip(self, at: int) -> tuple[range, int] | None:
        """Numbers of the records of the frame at an offset, and where it ends."""
        return format.skip_frame(self._read(at, format.FRAME_BYTES), at)

    def _index(self) -> None:
        """Index the frames that were appended since the last time."""
        assert self._file is not None
        size = os.fstat(self._file.fileno()).st_size
        while (found := self._skip(self._indexed)) is not None and found[1] <= size:
            numbers, end = found
            if not self._offsets or self._indexed - self._offsets[-1] >= SPARSE_BYTES:
                self._firsts.append(numbers.start)
                self._offsets.append(self._indexed)
            self.last, self._indexed = numbers.stop - 1, end

    def record(self, number: int) -> Chunks | None:
        """A record by its number; None if it is not here, or cannot be read."""
        if number > self.last:
            self._index()
        entry = bisect_right(self._firsts, number) - 1
        at = self._offsets[entry] if entry >= 0 else 0
        while entry >= 0 and (found := self._skip(at)) is not None:
            numbers, end = found
            if number in numbers:
                frame = format.read_frame(memoryview(self._read(at, end - at)), 0)
                return list(frame.records())[number - numbers.start] if frame is not None else None
            at = end
        return None


class SpanBodies:
    """The bodies of one journal. Few files are open, however many there are: a bisection over their heads finds one."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._lock = threading.Lock()  # a store in process may be asked from several threads
        self._files: list[list[Path]] = []  # by epoch, the newest first; in each by number
        self._segments: OrderedDict[Path, _Segment] = OrderedDict()  # the one that was used last stands last
        self._firsts: dict[Path, int] = {}  # number of the first record, of files whose head was read

    def load(self, items: list[Any]) -> list[Any]:
        """The same records, but spans with their bodies; bodies that were written together are read together."""
        last: tuple[int, list[Any]] | None = None
        loaded = []
        for item in items:
            if isinstance(item, Span) and isinstance(item.body, OnDisk):
                number, operation, place = OnDisk.parts(item.body.place)
                if last is None or last[0] != number:
                    last = (number, self._operations(number))
                row = last[1][operation][1]["spans"][place]
                item = item.evolve(body=row[BODY])
            loaded.append(item)
        return loaded

    def _operations(self, number: int) -> list[Any]:
        with self._lock:
            record = retry_on_replacement(lambda: self._find(number))
        if record is None:
            where = str(self._directory.path)
            raise JournalDamagedError(where, 0, f"record {number}, with spans, cannot be read any more")
        parts = [bytes(part) for part in record[1:]]
        if format.unpack_record_head(record[0]).kind == format.CALL:
            return [frames.unpack(parts[0], [], parts[1:])]
        return frames.split(parts, None)[1:]

    def forget_files(self) -> None:
        """Close all files; a helper may have replaced some of them."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
        self._files, self._firsts = [], {}

    def _find(self, number: int) -> Chunks | None:
        """A record; the directory is listed again if it is not found."""
        try:
            if self._files and (record := self._look(number)) is not None:
                return record
            self._list()  # the writer may have begun another file
            return self._look(number)
        except FileNotFoundError:
            self._forget()
            raise

    def _list(self) -> None:
        by_epoch: dict[int, list[Path]] = {}
        for epoch, _, path in self._directory.segments(RECORDS, BODIES):
            by_epoch.setdefault(epoch, []).append(path)
        self._files = [by_epoch[epoch] for epoch in sorted(by_epoch, reverse=True)]

    def _look(self, number: int) -> Chunks | None:
        """A successor uses numbers again that a fenced writer appended after it was read: the newest epoch counts."""
        for files in self._files:
            if self._first(files[0]) <= number:
                return self._segment(files[bisect_right(files, number, key=self._first) - 1]).record(number)
        return None

    def _first(self, path: Path) -> int:
        """Number of the first record of a file."""
        if path not in self._firsts:
            self._firsts[path] = read_head(path).first
        return self._firsts[path]

    def _segment(self, path: Path) -> _Segment:
        """An open file; the one that was not used for the longest is closed for it."""
        segment = self._segments.pop(path, None)
        if segment is None or not segment.open():
            segment = _Segment(path)
        self._segments[path] = segment
        if len(self._segments) > FILES_OPEN:
            older = next(islice(reversed(self._segments.values()), FILES_OPEN, None))
            older.close()
        return segment
