"""The writing end of a journal: a thread that commits records in groups, and calls back whoever waits for them.

While one group is being written the next one gathers; nothing waits for a timer. Space is allocated before a change is
accepted, so that a full disk refuses changes and never breaks off in the middle of one. An error of the disk ends the
writer: which of its earlier writes are on disk cannot be known any more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from raystore.errors import (
    FencedError,
    JournalFailedError,
    JournalFullError,
    StoreClosedError,
    StoreError,
    StoreOverloadedError,
)
from raystore.journal import format
from raystore.journal.failpoints import failpoint
from raystore.journal.files import Directory
from raystore.journal.format import FileHead, Record
from raystore.reports.log import logger_of

logger: logging.Logger = logger_of("raystore.store")

SEGMENT_BYTES = 64 * 1024 * 1024  #: a segment that has grown beyond is followed by a new one
SPACE_BYTES = 4 * 1024 * 1024  #: allocated at once, at least
SLACK_BYTES = 256 * 1024  #: kept for changes that time brings while the disk is full
IDLE_SECONDS = 1.0  #: how often an idle writer looks for a newer one
PENDING_BYTES = 32 * 1024 * 1024  #: that wait for the disk; beyond, changes are refused
PENDING_SECONDS = 10  #: and as soon as the oldest of them waits for so long
SLOW_SECONDS = 1.0  #: after which to try again
FULL_SECONDS = 0.1  #: how often a full disk is asked for space
_CHUNKS_AT_ONCE = 1024  # the system's limit for one write

#: Called on the writer's thread once a record is durable, or with the error because of which it never will be.
OnDurable = Callable[[StoreError | None], None]
#: Called on the writer's thread with the number and size of a segment that was closed, and whether `rotate` asked for
#: that. Number 0: `rotate` asked in vain, since there is no space for another segment.
OnSegmentClosed = Callable[[int, int, bool], None]


def is_full(error: OSError) -> bool:
    """Whether the error says that there is no space, rather than that something is wrong."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class _Group(NamedTuple):
    """Records that are committed together; perhaps none."""

    records: list[Record]
    size: int
    last: int  # number of its last record, or of the last one before it
    rotates: bool  # a new segment was asked for
    closes: bool  # the writer is to close


class JournalWriter:
    """The segments of one epoch."""

    def __init__(
        self,
        directory: Directory,
        *,
        store_id: str,
        epoch: int,
        first: int,
        durability: str,
        on_segment_closed: OnSegmentClosed = lambda number, size, is_asked: None,
    ) -> None:
        """`first` is the number of the first record. `durability` is "power", "process" or "none"."""
        self.directory = directory
        self.epoch = epoch
        self.failure: StoreError | None = None
        self.last: int = first - 1  #: number of the newest record
        self.durable: int = first - 1  #: everything up to this record is as durable as was asked for
        self._store_id = store_id
        self._syncs = durability == "power"
        self._waits = durability != "none"
        self._on_segment_closed = on_segment_closed
        self._on_failure: Callable[[StoreError], None] = lambda error: None
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._pending: list[Record] = []
        self._pending_bytes = 0
        self._behind_since = 0.0  # since when a record waits to be durable; 0 if none does
        self._waiting: deque[tuple[int, OnDurable]] = deque()
        self._rotates = False  # a new segment was asked for
        self._closing = False
        self._is_open = True
        self._number = 0  # of the segment
        self._reserved = 0  # bytes of the change that was accepted last, and may not have come yet
        self._refused_at = 0.0  # when the disk last refused space; 0 if it has space
        self._safe = first - 1  # synced, whatever the durability
        self._unsynced = False
        self._fd, self._offset, self._space = self._make_segment(first)
        self._number = 1
        self._thread = threading.Thread(target=self._run, name="raystore-journal", daemon=True)
        self._thread.start()

    # -- on the threads of callers -----------------------------------------------------------------------------------

    def append(self, record: Record) -> int:
        """Take a record; returns its number."""
        with self._lock:
            self._pending.append(record)
            self._pending_bytes += sum(map(len, record)) + 64
            self.last += 1
            if len(self._pending) == 1:
                self._work.notify()
                self._behind_since = self._behind_since or time.monotonic()
            return self.last

    @property
    def behind_seconds(self) -> float:
        """For how long the oldest change has waited to be durable; 0 if none does."""
        since = self._behind_since
        return time.monotonic() - since if since else 0.0

    def when_failed(self, on_failure: Callable[[StoreError], None]) -> None:
        """Call `on_failure` if the writer ends by an error, on its thread; at once if it has."""
        with self._lock:
            self._on_failure = on_failure
            failure = self.failure
        if failure is not None:
            on_failure(failure)

    def when_durable(self, number: int, on_durable: OnDurable) -> bool:
        """Call `on_durable` once a record is durable; False if it is, and nothing will be called."""
        if self.failure is None and (number <= self.durable or not self._waits):
            return False
        with self._lock:
            failure = self.failure
            if failure is None and number <= self.durable:
                return False
            if failure is None and self._is_open:
                self._waiting.append((number, on_durable))
                return True
        on_durable(failure or StoreClosedError(str(self.directory.path)))
        return True

    def reserve(self, size: int) -> None:
        """Make sure that there is space for a change of so many bytes.

        Raises `JournalFullError` if there is none, and `StoreOverloadedError` if the disk is too slow for the changes.
        """
        with self._lock:
            self._reserved = size
            if self._is_open and self.failure is None:
                if self._pending_bytes > PENDING_BYTES:
                    what = "bytes that wait for the disk of its journal"
                    raise StoreOverloadedError(what, self._pending_bytes, PENDING_BYTES, SLOW_SECONDS)
                if (age := self.behind_seconds) > PENDING_SECONDS:
                    what = "seconds of changes that wait for the disk of its journal"
                    raise StoreOverloadedError(what, int(age), PENDING_SECONDS, SLOW_SECONDS)
                self._allocate(size)

    def _allocate(self, size: int) -> None:
        missing = self._offset + self._pending_bytes + size + SLACK_BYTES - self._space
        if missing <= 0:
            return
        now = time.monotonic()
        if now - self._refused_at < FULL_SECONDS and self._refused_at:
            raise JournalFullError(str(self.directory.path), FULL_SECONDS)
        for more in (max(missing, SPACE_BYTES), missing):  # as much as is wanted, or else as is needed
            try:
                failpoint("writer.allocating")
                os.posix_fallocate(self._fd, self._space, more)
            except OSError as error:
                if not is_full(error):
                    raise
            else:
                self._refused_at = 0.0
                self._space += more
                return
        self._refused_at = now
        raise JournalFullError(str(self.directory.path), FULL_SECONDS)

    def regain_space(self) -> bool:
        """Whether the disk has space; one that was full is asked again, but not more often than `FULL_SECONDS`."""
        if not self._refused_at:
            return True
        with self._lock, contextlib.suppress(JournalFullError):
            self._allocate(0)
        return not self._refused_at

    @property
    def is_full(self) -> bool:
        """Whether the disk refused space when it was asked last."""
        return self._refused_at > 0

    def behind(self) -> tuple[float, int]:
        """For how many seconds the oldest record waits to be durable, and how many bytes wait; 0 and 0 if none does."""
        with self._lock:
            since, size = self._behind_since, self._pending_bytes
        return (time.monotonic() - since, size) if since else (0.0, 0)

    def rotate(self) -> None:
        """Begin a new segment soon; `on_segment_closed` hears of the old one."""
        with self._lock:
            self._rotates = True
            self._work.notify()

    def close_soon(self) -> None:
        """Close without waiting. It takes no lock, so that it may be called from anywhere, garbage collection too."""
        self._closing = True

    def close(self) -> None:
        """Commit the records that are left, and close the file."""
        with self._lock:
            self._closing = True
            self._work.notify()
        self._thread.join()
        with self._lock:
            self._is_open = False
            left, self._waiting = list(self._waiting), deque()
        for _, on_durable in left:
            _answer(on_durable, StoreClosedError(str(self.directory.path)))

    # -- on the writer's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._commit():
                pass
            failpoint("writer.closing")
            os.ftruncate(self._fd, self._offset)
            os.fsync(self._fd)
        except StoreError as error:
            self._fail(error)
        except Exception as error:  # whatever it is, nobody must wait for ever
            self._fail(JournalFailedError(str(self.directory.path), f"{type(error).__name__}: {error}"))
        finally:
            os.close(self._fd)

    def _commit(self) -> bool:
        """Commit one group, or look for a newer writer if no record came for a while; whether to go on."""
        group = self._gather()
        if group.records:
            failpoint("writer.gathered")
            first = group.last - len(group.records) + 1
            self._write(format.pack_frame(group.records, first, self._safe))
            self._unsynced = True
        # A segment is closed with all of it on disk, before there is a next one, or a tail that is lost would be a gap;
        # and before this writer looks for its successor, who then finds all of it on whatever file system.
        rotates = group.rotates or (bool(group.records) and self._offset > SEGMENT_BYTES)
        if self._syncs or rotates or not group.records:
            self._sync()
        if not self._unsynced:
            self._safe = group.last
        if self.directory.is_fenced(self.epoch):
            raise FencedError(str(self.directory.path), self.epoch)
        if group.records:
            self._acknowledge(group)
        elif group.closes:
            return False
        if rotates:
            self._rotate(group.last + 1)
        return True

    def _gather(self) -> _Group:
        """Take the records that are pending, after a wait for some if there are none."""
        with self._lock:
            if not self._pending and not self._closing and not self._rotates:
                self._work.wait(IDLE_SECONDS)
            records, self._pending = self._pending, []
            return _Group(records, self._pending_bytes, self.last, self._rotates, self._closing)

    def _write(self, chunks: list[bytes | memoryview]) -> None:
        left = [memoryview(chunk) for chunk in chunks if chunk]
        at = 0
        while at < len(left):
            failpoint("writer.writing")
            written = os.pwritev(self._fd, left[at : at + _CHUNKS_AT_ONCE], self._offset)
            self._offset += written
            while at < len(left) and written >= len(left[at]):
                written -= len(left[at])
                at += 1
            if written:
                left[at] = left[at][written:]

    def _sync(self) -> None:
        if self._unsynced:
            failpoint("writer.written")
            os.fdatasync(self._fd)
            failpoint("writer.synced")
            self._unsynced = False

    def _acknowledge(self, group: _Group) -> None:
        """Note that a group is durable, and call back those who wait for it."""
        failpoint("writer.not_fenced")
        ready = []
        with self._lock:
            self._pending_bytes -= group.size
            self.durable = group.last
            self._behind_since = time.monotonic() if self._pending else 0.0
            while self._waiting and self._waiting[0][0] <= self.durable:
                ready.append(self._waiting.popleft()[1])
        failpoint("writer.durable")
        for on_durable in ready:
            _answer(on_durable, None)
        failpoint("writer.answered")

    def _rotate(self, first: int) -> None:
        """Begin a new segment, or stay in this one for as long as there is no space for another."""
        failpoint("writer.rotating")
        is_asked, self._rotates = self._rotates, False
        try:
            fd, offset, space = self._make_segment(first)
        except OSError as error:
            if not is_full(error):
                raise
            closed = None
        else:
            closed = self._switch(fd, offset, space)
        if closed is None:
            if is_asked:
                self._on_segment_closed(0, 0, is_asked)
            return
        before, end = closed
        failpoint("writer.rotated")
        os.ftruncate(before, end)
        os.close(before)
        failpoint("writer.truncated")
        self._on_segment_closed(self._number - 1, end, is_asked)

    def _switch(self, fd: int, offset: int, space: int) -> tuple[int, int] | None:
        """Let records go to a new segment, unless it is too small for what was accepted meanwhile: it goes then.

        Returns the file of the segment before, and where it ends.
        """
        with self._lock:
            if offset + self._pending_bytes + self._reserved + SLACK_BYTES <= space:
                before, end = self._fd, self._offset
                self._fd, self._offset, self._space = fd, offset, space
                self._number += 1
                return before, end
        os.close(fd)
        self.directory.segment(self.epoch, self._number + 1).unlink()
        return None

    def _make_segment(self, first: int) -> tuple[int, int, int]:
        """A new segment, which is whole once it has its name: file, offset of its first frame, allocated bytes."""
        path = self.directory.segment(self.epoch, self._number + 1)
        unfinished = path.with_name(path.name + ".new")
        head = format.pack_head(FileHead(self._store_id, self.epoch, self._number + 1, first))
        space = max(SPACE_BYTES, 2 * (self._pending_bytes + self._reserved + SLACK_BYTES))
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            failpoint("segment.created")
            os.posix_fallocate(fd, 0, space)
            failpoint("segment.allocated")
            os.pwrite(fd, head, 0)
            os.fsync(fd)
            failpoint("segment.synced")
            unfinished.rename(path)  # the epoch is ours alone, so no other process makes a segment of this name
        except OSError:
            os.close(fd)
            unfinished.unlink(missing_ok=True)
            if self.directory.is_fenced(self.epoch):  # a newer writer removes unfinished files
                raise FencedError(str(self.directory.path), self.epoch) from None
            raise
        failpoint("segment.named")
        self.directory.sync()
        failpoint("segment.there")
        return fd, len(head), space

    def _fail(self, error: StoreError) -> None:
        logger.critical("%s", error)
        with self._lock:
            self.failure = error
            waiting, self._waiting = list(self._waiting), deque()
            on_failure = self._on_failure
        try:
            on_failure(error)
        except Exception:  # those who wait must be answered all the same
            logger.exception("Journal %s: the callback for its failure has failed", self.directory.path)
        for _, on_durable in waiting:
            _answer(on_durable, error)


def _answer(on_durable: OnDurable, error: StoreError | None) -> None:
    """Call back somebody who waited; an exception there is no failure of the journal, and others wait too."""
    try:
        on_durable(error)
    except Exception:
        logger.exception("An answer that waited for the journal could not be handed on")
