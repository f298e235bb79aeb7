"""The writing end of a journal: records in, groups committed by a thread of their own, and who waits for them told.

While one group is being written the next one gathers; nothing waits for a timer. Space is set aside before a change is
accepted, so that a full disk refuses changes and never breaks off in the middle of one. An error of the disk ends the
writer: what it says of earlier writes cannot be known any more.
Not here: what records mean (`records`), reading (`replay`).
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
from raystore.journal.format import Head, Record

logger: logging.Logger = logging.getLogger("raystore.store")

SEGMENT_BYTES = 64 * 1024 * 1024  #: a segment that has grown beyond is followed by a new one
SPACE_BYTES = 4 * 1024 * 1024  #: set aside at once, at least
SLACK_BYTES = 256 * 1024  #: kept for what time brings while the disk is full
IDLE_SECONDS = 1.0  #: how often an idle writer looks for a newer one
PENDING_BYTES = 32 * 1024 * 1024  #: that wait for the disk; beyond, changes are refused
PENDING_SECONDS = 10  #: and as soon as the oldest of them waits for so long
SLOW_SECONDS = 1.0  #: after which to try again
FULL_SECONDS = 0.1  #: how often a full disk is asked for space
_CHUNKS_AT_ONCE = 1024  # the system's limit for one write

Told = Callable[[StoreError | None], None]  #: called on the writer's thread, with the error that ended it if one did


def is_full(error: OSError) -> bool:
    """Whether there is no space, rather than something wrong."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class Log:
    """The segments of one epoch."""

    def __init__(
        self,
        directory: Directory,
        *,
        store_id: str,
        epoch: int,
        first: int,
        durability: str,
    ) -> None:
        self.directory = directory
        self.epoch = epoch
        self.failure: StoreError | None = None
        self.last: int = first - 1  #: number of the newest record
        self.durable: int = first - 1  #: everything up to here may be relied on
        self._store_id = store_id
        self._syncs = durability == "power"
        self._waits = durability != "none"
        self._on_failure: Callable[[StoreError], None] = lambda error: None
        self.on_closed: Callable[[int, int, bool], None] = lambda number, size, is_asked: None
        self._is_asked = False  # for a new segment
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._pending: list[Record] = []
        self._pending_bytes = 0
        self._behind_since = 0.0  # since when something waits that is not durable; 0 if nothing does
        self._waiting: deque[tuple[int, Told]] = deque()
        self._closing = False
        self._is_open = True
        self._number = 0  # of the segment
        self._promised = 0  # size of the change that was let in last, and may not be here yet
        self._asked_at = 0.0
        self._safe = first - 1  # on disk, whatever happens
        self._unsynced = False
        self._fd, self._offset, self._space = self._make_segment(first)
        self._number = 1
        self._thread = threading.Thread(target=self._run, name="raystore-journal", daemon=True)
        self._thread.start()

    # -- for whoever changes the state -------------------------------------------------------------------------------

    def append(self, record: Record) -> int:
        """Take a record; its number."""
        with self._lock:
            self._pending.append(record)
            self._pending_bytes += sum(map(len, record)) + 64
            self.last += 1
            if len(self._pending) == 1:
                self._work.notify()
                self._behind_since = self._behind_since or time.monotonic()
            return self.last

    def watch(self, on_failure: Callable[[StoreError], None]) -> None:
        """Call `on_failure` if the writer ends by an error, on its thread; at once if it has."""
        with self._lock:
            self._on_failure = on_failure
            failure = self.failure
        if failure is not None:
            on_failure(failure)

    def then(self, number: int, told: Told) -> bool:
        """Call `told` once a record may be relied on; False if it may already, and nothing will be called."""
        if self.failure is None and (number <= self.durable or not self._waits):
            return False
        with self._lock:
            failure = self.failure
            if failure is None and number <= self.durable:
                return False
            if failure is None and self._is_open:
                self._waiting.append((number, told))
                return True
        told(failure or StoreClosedError(str(self.directory.path)))
        return True

    def admit(self, size: int) -> None:
        """Make sure that there is space for a change of so many bytes.

        Raises `JournalFullError` if there is none, and `StoreOverloadedError` if the disk is too slow for what comes.
        """
        with self._lock:
            self._promised = size
            if self._is_open and self.failure is None:
                if self._pending_bytes > PENDING_BYTES:
                    what = "bytes that wait for the disk of its journal"
                    raise StoreOverloadedError(what, self._pending_bytes, PENDING_BYTES, SLOW_SECONDS)
                if self._behind_since and (age := time.monotonic() - self._behind_since) > PENDING_SECONDS:
                    what = "seconds of changes that wait for the disk of its journal"
                    raise StoreOverloadedError(what, int(age), PENDING_SECONDS, SLOW_SECONDS)
                self._set_aside(size)

    def _set_aside(self, size: int) -> None:
        missing = self._offset + self._pending_bytes + size + SLACK_BYTES - self._space
        if missing <= 0:
            return
        now = time.monotonic()
        if now - self._asked_at < FULL_SECONDS and self._asked_at:
            raise JournalFullError(str(self.directory.path), FULL_SECONDS)
        for more in (max(missing, SPACE_BYTES), missing):  # what is wanted, or else what is needed
            try:
                failpoint("log.space")
                os.posix_fallocate(self._fd, self._space, more)
            except OSError as error:
                if not is_full(error):
                    raise
            else:
                self._asked_at = 0.0
                self._space += more
                return
        self._asked_at = now
        raise JournalFullError(str(self.directory.path), FULL_SECONDS)

    @property
    def is_full(self) -> bool:
        """Whether the disk refuses space; it is asked again now and then."""
        if not self._asked_at:
            return False
        with self._lock, contextlib.suppress(JournalFullError):
            self._set_aside(0)
        return self._asked_at > 0.0

    def rotate(self) -> None:
        """Go on in a new segment soon; `on_closed` is told of the old one, on the writer's thread."""
        with self._lock:
            self._is_asked = True
            self._work.notify()

    def let_go(self) -> None:
        """Close soon; may be called from anywhere, a garbage collection included, so that it takes no lock."""
        self._closing = True

    def close(self) -> None:
        """Commit what is left, and let go of the file."""
        with self._lock:
            self._closing = True
            self._work.notify()
        self._thread.join()
        with self._lock:
            self._is_open = False
            left, self._waiting = list(self._waiting), deque()
        for _, tell in left:
            _tell(tell, StoreClosedError(str(self.directory.path)))

    # -- on the writer's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._commit():
                pass
            failpoint("log.closing")
            os.ftruncate(self._fd, self._offset)
            os.fsync(self._fd)
        except StoreError as error:
            self._fail(error)
        except Exception as error:  # whatever it is, nobody must wait for ever
            self._fail(JournalFailedError(str(self.directory.path), f"{type(error).__name__}: {error}"))
        finally:
            os.close(self._fd)

    def _commit(self) -> bool:
        """Commit one group, or look around if there is none for a while; whether to go on."""
        with self._lock:
            if not self._pending and not self._closing and not self._is_asked:
                self._work.wait(IDLE_SECONDS)
            group, self._pending = self._pending, []
            size, closing, is_asked = self._pending_bytes, self._closing, self._is_asked
            first = self.last - len(group) + 1
        if group:
            failpoint("log.gathered")
            self._write(format.pack_frame(group, first, self._safe))
            self._unsynced = True
        # A segment is closed with all of it on disk, before there is a next one, or a tail that is lost would be a gap;
        # and before this writer looks for its successor, who then finds all of it on whatever file system.
        is_last = is_asked or self._offset > SEGMENT_BYTES
        if self._unsynced and (self._syncs or not group or is_last):
            failpoint("log.written")
            os.fdatasync(self._fd)
            failpoint("log.synced")
            self._unsynced = False
        if not self._unsynced:
            self._safe = first + len(group) - 1
        if self.directory.is_fenced(self.epoch):
            raise FencedError(str(self.directory.path), self.epoch)
        if not group:
            if is_asked and not closing:
                self._rotate(first)
            return not closing
        failpoint("log.not_fenced")
        told = []
        with self._lock:
            self._pending_bytes -= size
            self.durable = first + len(group) - 1
            self._behind_since = time.monotonic() if self._pending else 0.0
            while self._waiting and self._waiting[0][0] <= self.durable:
                told.append(self._waiting.popleft()[1])
        failpoint("log.durable")
        for tell in told:
            _tell(tell, None)
        failpoint("log.told")
        if is_last:
            self._rotate(self.durable + 1)
        return True

    def _write(self, chunks: list[bytes]) -> None:
        left = [memoryview(chunk) for chunk in chunks if chunk]
        at = 0
        while at < len(left):
            failpoint("log.write")
            written = os.pwritev(self._fd, left[at : at + _CHUNKS_AT_ONCE], self._offset)
            self._offset += written
            while at < len(left) and written >= len(left[at]):
                written -= len(left[at])
                at += 1
            if written:
                left[at] = left[at][written:]

    def _rotate(self, first: int) -> None:
        """Go on in a new segment; in this one for as long as there is no space for another."""
        failpoint("log.full")
        is_asked, self._is_asked = self._is_asked, False
        try:
            fd, offset, space = self._make_segment(first)
        except OSError as error:
            if not is_full(error):
                raise
            if is_asked:
                self.on_closed(0, 0, is_asked)
            return
        with self._lock:
            if offset + self._pending_bytes + self._promised + SLACK_BYTES <= space:
                before, end = self._fd, self._offset
                self._fd, self._offset, self._space = fd, offset, space
                self._number += 1
            else:  # what has been promised meanwhile has its place in the old one
                before, end = -1, 0
        if before < 0:
            os.close(fd)
            self.directory.segment(self.epoch, self._number + 1).unlink()
            if is_asked:
                self.on_closed(0, 0, is_asked)
            return
        failpoint("log.rotated")
        os.ftruncate(before, end)
        os.close(before)
        failpoint("log.cut")
        self.on_closed(self._number - 1, end, is_asked)

    def _make_segment(self, first: int) -> tuple[int, int, int]:
        """A new segment, whole from the moment that it has its name: file, where frames begin, and space in it."""
        path = self.directory.segment(self.epoch, self._number + 1)
        unfinished = path.with_name(path.name + ".new")
        head = format.pack_head(Head(self._store_id, self.epoch, self._number + 1, first))
        space = max(SPACE_BYTES, 2 * (self._pending_bytes + self._promised + SLACK_BYTES))
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            failpoint("segment.created")
            os.posix_fallocate(fd, 0, space)
            failpoint("segment.allocated")
            os.pwrite(fd, head, 0)
            os.fsync(fd)
            failpoint("segment.synced")
            unfinished.rename(path)  # the epoch is ours alone, so that nobody else makes this one
        except OSError:
            os.close(fd)
            unfinished.unlink(missing_ok=True)
            if self.directory.is_fenced(self.epoch):  # who comes next clears away what is unfinished
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
        except Exception:  # those who wait must be told all the same
            logger.exception("Journal %s: what was to follow from its failure failed", self.directory.path)
        for _, tell in waiting:
            _tell(tell, error)


def _tell(tell: Told, error: StoreError | None) -> None:
    """Call somebody who waited; what goes wrong there is no failure of the journal, and others wait too."""
    try:
        tell(error)
    except Exception:
        logger.exception("An answer that waited for the journal could not be handed on")
