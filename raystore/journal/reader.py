"""Reading a journal in order: its newest snapshot, and the segments behind it of all its writers.

The segments of each writer count as far as its successor read them: whatever lies behind was never acknowledged. A torn
tail is left out and reported; anything else that cannot be read is damage.

A crash marker names the record that is being read, in a file that survives the process. So a record that ends every
process that reads it is found, instead of being read for ever.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self, TypeVar

from raystore.errors import JournalDamagedError
from raystore.journal import files, format, snapshot_file
from raystore.journal.files import SNAPSHOT, Directory, JournalFile, JournalPosition
from raystore.journal.format import FORMAT, START, Chunks, WriterInfo
from raystore.reports.log import logger_of
from raystore.reports.progress import Progress
from raystore.values import objects

logger: logging.Logger = logger_of("raystore.store")

T = TypeVar("T")

ATTEMPTS = 20  #: to read while a helper replaces segments by a snapshot
LOG_SECONDS = 10.0  #: between two lines of the log about a reading that takes long


class JournalReader:
    """One pass over a journal, up to the writers that began before `epoch`, or `until` a segment (epoch, number)."""

    def __init__(self, directory: Directory, epoch: int | None = None, until: tuple[int, int] | None = None) -> None:
        self.torn_tails: list[str] = []  # what to say of each
        self.position: JournalPosition = JournalPosition(0, 0, 0, 0)  # behind the last record that was read
        self.writer: WriterInfo = {}  # the newest writer; empty if there is none
        self.snapshot: Path | None = None  # to begin with
        self.format: int = FORMAT  # of the record that was read last
        self.is_old: bool = False  # something that was read has an earlier format
        self.bytes_read: int = 0  # of the segments

        def is_wanted(found: JournalFile) -> bool:
            return (epoch is None or found.epoch < epoch) and (until is None or found[:2] <= until)

        snapshots, segments = directory.segments(SNAPSHOT), directory.segments()
        if directory.segments(SNAPSHOT) != snapshots:  # and segments may have gone before they were listed
            raise FileNotFoundError(f"{directory.path}: a helper has replaced segments by a snapshot meanwhile")
        if snapshots := [found for found in snapshots if is_wanted(found)]:
            self.snapshot = snapshots[-1].path
            self.position, self.writer, format_ = snapshot_file.read_head(self.snapshot)
            self.is_old = format_ < FORMAT
        self._limits: dict[int, JournalPosition] = {}  # by epoch: up to where a later writer read it
        begin = (self.position.epoch, self.position.segment)
        self._segments = self._that_count([found for found in segments if found[:2] > begin and is_wanted(found)])

    def _that_count(self, segments: list[JournalFile]) -> list[JournalFile]:
        """The segments of the newest writer that has begun, of the one that it followed, and so on."""
        by_epoch: dict[int, list[JournalFile]] = {}
        for segment in segments:
            by_epoch.setdefault(segment.epoch, []).append(segment)
        chosen: list[JournalFile] = []
        base = self.position.epoch
        epoch = max(by_epoch, default=base)
        is_newest = True
        while epoch > base:
            if epoch not in by_epoch:
                raise JournalDamagedError(str(segments[0].path.parent), 0, f"the segments of epoch {epoch} are missing")
            began = _beginning(by_epoch[epoch])
            if began is None:  # it never acknowledged anything
                if chosen:
                    raise JournalDamagedError(
                        str(by_epoch[epoch][0].path), 0, "it is empty, and a later writer read it"
                    )
                epoch = max((earlier for earlier in by_epoch if earlier < epoch), default=base)
                continue
            writer, after = began
            self.writer, is_newest = (writer if is_newest else self.writer), False
            chosen = by_epoch[epoch] + chosen
            self._limits[after.epoch] = after
            epoch = after.epoch
        if epoch < base:
            raise JournalDamagedError(str(self.snapshot), 0, "the writer that followed did not read what it holds")
        return by_epoch.get(base, []) + chosen

    @property
    def known_last(self) -> int:
        """A record up to which the journal goes at least, known before its records are read."""
        return files.read_head(self._segments[-1].path).first if self._segments else self.position.record

    @property
    def size_bytes(self) -> int:
        """Of all segments, as far as it is known before they are read."""
        return sum(segment.path.stat().st_size for segment in self._segments)

    def __iter__(self) -> Iterator[tuple[int, Chunks]]:
        """Number and chunks of each record behind the snapshot."""
        expected = self.position.record + 1
        for epoch, number, path in self._segments:
            limit = self._limits.get(epoch)
            if limit is not None and number > limit.segment:
                continue  # its writer did not know yet that it had a successor
            is_limited = limit is not None and number == limit.segment
            head, found = files.read_segment(path, limit.offset if limit is not None and is_limited else None)
            if head.first != expected or (head.epoch, head.number) != (epoch, number):
                raise JournalDamagedError(str(path), 0, f"it begins with record {head.first}, and {expected} is next")
            self.format = head.format
            self.is_old = self.is_old or head.format < FORMAT
            end, before = 0, self.bytes_read
            for frame in found:
                for record in frame.records():
                    yield expected, record
                    expected += 1
                end = frame.end
                self.bytes_read = before + end
                self.position = JournalPosition(epoch, number, end, expected - 1)
            if limit is not None and is_limited and expected - 1 != limit.record:
                why = f"its records end at {expected - 1}, and not at {limit.record}"
                raise JournalDamagedError(str(path), end, why)
            if path is self._segments[-1].path and (torn := files.torn_tail(path, end)) is not None:
                self.torn_tails.append(torn)

    def sync(self) -> None:
        """Make durable what was read; only the last segment may not be."""
        if self._segments:
            objects.sync(self._segments[-1].path)


def _beginning(segments: list[JournalFile]) -> tuple[WriterInfo, JournalPosition] | None:
    """The writer of an epoch, and up to where it had read when it began; None if it wrote no record."""
    path = segments[0].path
    frame = next(files.read_segment(path)[1], None)
    if frame is None:
        return None
    head = format.unpack_record_head(next(frame.records())[0])
    if head.kind != START:
        raise JournalDamagedError(str(path), frame.at, "the first record of an epoch is missing")
    return head.arguments[0], JournalPosition(*head.arguments[2])


def retry_on_replacement(read: Callable[[], T]) -> T:
    """The result of `read`, which is called again if a helper has replaced a file by another meanwhile."""
    for _ in range(ATTEMPTS):
        try:
            return read()
        except FileNotFoundError:
            continue
    return read()


class CrashMarker:
    """Marks each record while it is read, so that the next process knows if this one dies there."""

    _FILE = "progress"
    _FORM = struct.Struct("<QQ")  # the record that is being read (0: none), how often that has ended a process before

    died_at: int
    deaths: int

    def __init__(self, path: Path) -> None:
        with open(os.open(path / self._FILE, os.O_RDWR | os.O_CREAT, 0o600), "rb+", buffering=0) as file:
            file.truncate(self._FORM.size)  # which leaves one that is there as it is
            self._map = mmap.mmap(file.fileno(), self._FORM.size)
        #: The record at which the process before died, 0 if it did not; and how many have died there in a row.
        self.died_at, before = self._FORM.unpack_from(self._map)
        self.deaths = before + 1 if self.died_at else 0

    def mark(self, record: int) -> None:
        """A record is about to be read."""
        self._FORM.pack_into(self._map, 0, record, self.deaths if record == self.died_at else 0)

    def clear(self) -> None:
        """Everything was read, or reading ended with an error, which is no death."""
        self._FORM.pack_into(self._map, 0, 0, 0)
        self._map.close()


class ReadingProgress:
    """How far a reading has come, for other threads, for the log now and then, and for whoever waits at a terminal."""

    def __init__(self, *, is_shown: bool = False) -> None:
        self.steps: int = 0  #: grows as long as the reading makes progress
        self.record: int = 0  #: that is being read; 0 before the first
        self.known_last = 0  #: the journal goes at least up to this record
        self.kilobytes: int = 0  #: of its segments that were read
        self.kilobytes_in_all: int = 0
        self._logged_at = time.monotonic()
        self._shown = Progress("reading the journal, kB", is_wanted=is_shown)

    def advance(self, record: int | None = None, bytes_read: int = 0) -> None:
        """A section of a snapshot was read, or a record is about to be, behind so many bytes of segments."""
        self.steps += 1
        if record is not None:
            self.record = record
        self.kilobytes = bytes_read // 1000
        if self._shown.can_draw:
            self._shown.update(self.kilobytes, total=self.kilobytes_in_all, note=str(self))
        if (now := time.monotonic()) > self._logged_at + LOG_SECONDS:
            self._logged_at = now
            logger.info("Reading the journal: %s", self)

    def __enter__(self) -> Self:
        self._shown.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._shown.__exit__(*exc)

    def __str__(self) -> str:
        return f"at record {self.record} of {max(self.record, self.known_last)} or more"
