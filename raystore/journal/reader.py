"""Everything that a journal holds, in order: its newest snapshot, and the segments behind it of all its writers, each
as far as its successor read it.

What no successor read was never acknowledged. A tail that was never finished is left out and told; anything else that
cannot be read is damage.
Not here: frames (`frames`), files (`segments`), what records mean (`replay`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from raystore.errors import JournalDamagedError
from raystore.journal import records, snapshot_file
from raystore.journal.files import SNAPSHOT, Cut, Directory, Place, read_segment, read_segment_head, tail
from raystore.journal.format import FORMAT

Segment = tuple[int, int, Path]
T = TypeVar("T")

READINGS = 20  #: while a helper replaces segments by a snapshot


class Reading:
    """One pass over a journal, up to the writers that began before `epoch`, or `until` a segment."""

    def __init__(self, directory: Directory, epoch: int | None = None, until: tuple[int, int] | None = None) -> None:
        self.cuts: list[Cut] = []
        self.place: Place = Place(0, 0, 0, 0)  # where it has come to
        self.who: dict[str, Any] = {}  # what the newest writer said of itself; empty if there is none
        self.snapshot: Path | None = None  # to begin with
        self.format: int = FORMAT  # of the record that was read last
        self.is_old: bool = False  # something that was read is of an earlier format

        def is_wanted(found: Segment) -> bool:
            return (epoch is None or found[0] < epoch) and (until is None or found[:2] <= until)

        snapshots, segments = directory.segments(SNAPSHOT), directory.segments()
        if directory.segments(SNAPSHOT) != snapshots:  # and segments may have gone before they were listed
            raise FileNotFoundError(f"{directory.path}: a helper has replaced segments by a snapshot meanwhile")
        if snapshots := [found for found in snapshots if is_wanted(found)]:
            self.snapshot = snapshots[-1][2]
            self.place, self.who, format_ = snapshot_file.read_head(self.snapshot)
            self.is_old = format_ < FORMAT
        self._limits: dict[int, Place] = {}  # by epoch, if a later one read it
        begin = (self.place.epoch, self.place.number)
        self._segments = self._that_count([found for found in segments if found[:2] > begin and is_wanted(found)])

    def _that_count(self, segments: list[Segment]) -> list[Segment]:
        """The segments of the newest writer that has begun, of the one that it followed, and so on."""
        by_epoch: dict[int, list[Segment]] = {}
        for segment in segments:
            by_epoch.setdefault(segment[0], []).append(segment)
        chosen: list[Segment] = []
        base = self.place.epoch
        epoch = max(by_epoch, default=base)
        is_newest = True
        while epoch > base:
            if epoch not in by_epoch:
                raise JournalDamagedError(str(segments[0][2].parent), 0, f"the segments of epoch {epoch} are missing")
            began = _beginning(by_epoch[epoch])
            if began is None:  # it never acknowledged anything
                if chosen:
                    raise JournalDamagedError(str(by_epoch[epoch][0][2]), 0, "it is empty, and a later writer read it")
                epoch = max((earlier for earlier in by_epoch if earlier < epoch), default=base)
                continue
            who, after = began
            self.who, is_newest = (who if is_newest else self.who), False
            chosen = by_epoch[epoch] + chosen
            self._limits[after.epoch] = after
            epoch = after.epoch
        if epoch < base:
            raise JournalDamagedError(str(self.snapshot), 0, "the writer that followed did not read what it holds")
        return by_epoch.get(base, []) + chosen

    @property
    def least(self) -> int:
        """Number of a record up to which the journal goes at least, known before it is read."""
        return read_segment_head(self._segments[-1][2]).first if self._segments else self.place.last

    def __iter__(self) -> Iterator[tuple[int, list[memoryview]]]:
        """Number and chunks of each record behind the snapshot."""
        expected = self.place.last + 1
        for epoch, number, path in self._segments:
            limit = self._limits.get(epoch)
            if limit is not None and number > limit.number:
                continue  # its writer did not know yet that it had a successor
            is_cut = limit is not None and number == limit.number
            head, found = read_segment(path, limit.offset if limit is not None and is_cut else None)
            if head.first != expected or (head.epoch, head.number) != (epoch, number):
                raise JournalDamagedError(str(path), 0, f"it begins with record {head.first}, and {expected} is next")
            self.format = head.format
            self.is_old = self.is_old or head.format < FORMAT
            end = 0
            for frame in found:
                for record in frame.records():
                    yield expected, record
                    expected += 1
                end = frame.end
                self.place = Place(epoch, number, end, expected - 1)
            if limit is not None and is_cut and expected - 1 != limit.last:
                raise JournalDamagedError(str(path), end, f"its records end at {expected - 1}, and not at {limit.last}")
            if path is self._segments[-1][2] and (cut := tail(path, end)) is not None:
                self.cuts.append(cut)

    def sync(self) -> None:
        """Make durable what was read; only the last segment may not be."""
        if self._segments:
            fd = os.open(self._segments[-1][2], os.O_RDWR)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def _beginning(segments: list[Segment]) -> tuple[dict[str, Any], Place] | None:
    """Who a writer was, and up to where it had read when it began; None if it never did."""
    _, found = read_segment(segments[0][2])
    frame = next(found, None)
    if frame is None:
        return None
    told = records.unpack(next(frame.records())[0])
    if told.kind != records.START:
        raise JournalDamagedError(str(segments[0][2]), frame.at, "the first record of an epoch is missing")
    return told.arguments[0], Place(*told.arguments[2])


def settled(read: Callable[[], T]) -> T:
    """What `read` finds, which begins anew if a helper has replaced a file by another meanwhile."""
    for _ in range(READINGS):
        try:
            return read()
        except FileNotFoundError:
            continue
    return read()
