"""Keeping a journal short: when enough was written since the last snapshot, a helper process makes the next one.

The writer begins a new segment, and the helper reads the closed ones; the store's own process (`Snapshotter`) only
starts the helper and hears of its end. From time to time the digest of the rollouts that were touched longest ago is
recorded, and every replay must find the same. If a helper does not, that is logged as critical, and nothing more is
deleted.

The helper (`python -m raystore.journal.compaction PATH EPOCH NUMBER`) reads the previous snapshot, and replays the
segments after it up to the named one, which the writer has closed. The replay must reproduce the digests that the
writer recorded. Only then the new snapshot counts, and the segments are deleted, except for records with bodies of
spans that still exist.

A writer closes a segment only while it is the newest writer, so every later writer has read the whole segment. So a
snapshot of closed segments stays valid when another writer takes over, and a helper goes on when its store has died.
Only one helper works at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any, TypedDict, cast

from raystore.core.snapshot import verify
from raystore.core.state import State
from raystore.errors import JournalInUseError, JournalMissingError, StoreError
from raystore.journal import format
from raystore.journal.failpoints import failpoint
from raystore.journal.files import BODIES, RECORDS, SNAPSHOT, Directory, JournalPosition, whole_file
from raystore.journal.reader import JournalReader
from raystore.journal.recorder import Recorder
from raystore.journal.replay import Replay, replay
from raystore.journal.writer import SEGMENT_BYTES
from raystore.reports.log import logger_of

logger: logging.Logger = logger_of("raystore.store")

VERIFY_LAG = 2_000  #: so many rollouts are touched before the first of them is verified: most have come to rest then
VERIFY_AT_ONCE = 64

OPERATIONS = 30_000  #: since the last snapshot; reading so many again takes one to two seconds
MOST_FAILURES = 8  #: each doubles the number of operations before the next try
SHARE = 10  #: and one operation for so many rollouts, since each is read and written again

DIFFERS = 3  #: exit code: the state is not the one that its writer found
LOCK = "compaction.lock"
HELPER_PATIENCE_SECONDS = 60.0  #: for which the helper of another store is waited for


class Outcome(TypedDict, total=False):
    """What a helper did: `bytes` if there is a snapshot, else `differs` or `error`."""

    bytes: int  # size of the snapshot
    seconds: float
    operations: int  # that were replayed
    rss: int  # the most memory of the helper, in bytes
    differs: list[int]  # records at which the writer had found another digest
    error: str


# -- in the process of the store ---------------------------------------------------------------------------------------


class Snapshotter:
    """Lets helpers make snapshots for one writer of a journal."""

    def __init__(
        self, directory: Directory, epoch: int, operations: int, on_snapshot: Callable[[], None], *, failed: str = ""
    ) -> None:
        """`operations` is how many were replayed behind the last snapshot; `failed`, why there must be no more.

        `on_snapshot` is called on a thread of its own when a helper has replaced files.
        """
        self.directory = directory
        self.epoch = epoch
        self.snapshots_made: int = 0
        self.longest_seconds: float = 0.0  # that the store was held up by a digest
        self.failed: str = failed  # why there will be no more snapshots
        self.last: Outcome = {}  # of the last helper that made a snapshot
        self._on_snapshot = on_snapshot
        self._since = -operations  # number of the operation behind the last snapshot
        self._seen = 0  # operations of this writer
        self._counted = 0  # of them, up to the segment that is being replaced
        self._to_verify = 0  # rollouts before the segment may be closed
        self._is_asked = False  # a snapshot is due, and its helper has not ended
        self._bytes = 0  # closed since the last snapshot
        self._failures = 0
        self._lock = threading.Lock()
        self._is_closed = False
        self._helper: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    @property
    def operations(self) -> int:
        """How many were recorded since the last snapshot."""
        return self._seen - self._since

    def statistics(self) -> dict[str, Any]:
        """The part of `statistics()` about the journal."""
        return {
            "operations_since_snapshot": self.operations,
            "snapshots": self.snapshots_made,
            "snapshot_bytes": self.last.get("bytes", 0),
            "snapshot_seconds": self.last.get("seconds", 0.0),
            "helper_rss_bytes": self.last.get("rss", 0),
            "longest_pause_seconds": self.longest_seconds,
            "failed": self.failed,
        }

    def after_step(self, recorder: Recorder, state: State, now: float) -> None:
        """Do what is due after a step: record a digest, or close the segment so that a helper can replace it."""
        self._seen = recorder.operations
        touched = len(state.touched)
        if touched and (touched > VERIFY_LAG or self._to_verify > 0):
            started = time.perf_counter()
            recorder.verified(now, VERIFY_AT_ONCE, verify(state, VERIFY_AT_ONCE))
            self.longest_seconds = max(self.longest_seconds, time.perf_counter() - started)
        if self._to_verify > 0:
            self._to_verify -= VERIFY_AT_ONCE
            if self._to_verify <= 0:
                recorder.writer.rotate()
        elif not self._is_asked and self._is_due(len(state.entries)):
            self._is_asked = True
            self._to_verify = touched + 1

    def _is_due(self, rollouts: int) -> bool:
        return self.operations >= max(OPERATIONS, rollouts // SHARE) << self._failures and not self.failed

    def segment_closed(self, number: int, size: int, is_asked: bool) -> None:
        """Start a helper if it is time; called on the writer's thread (`writer.OnSegmentClosed`)."""
        with self._lock:
            if not number:
                self._is_asked = False
                self._put_off("there is no room for another segment")
                return
            self._bytes += size
            enough = max(SEGMENT_BYTES, self.last.get("bytes", 0)) << self._failures
            if self._is_closed or self.failed or self._thread is not None or not (is_asked or self._bytes >= enough):
                return
            self._counted, self._bytes = self._seen, 0
            name = "raystore-snapshotter"
            self._thread = threading.Thread(target=self._run_helper, args=(number,), name=name, daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:  # the system has no thread left; the journal itself can go on
                self._thread, self._is_asked = None, False
                self._put_off(str(error))

    def _run_helper(self, number: int) -> None:
        """Run a helper to its end, on a thread of its own."""
        command = [sys.executable, "-m", "raystore.journal.compaction"]
        command += [str(self.directory.path), str(self.epoch), str(number)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        outcome: Outcome
        try:
            with self._lock:
                if self._is_closed:
                    return
                # Ray ends a worker with its process group, and the helper is to finish. In a session of its own the
                # system would count it apart, and its low priority would have no effect.
                helper = self._helper = subprocess.Popen(
                    command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env=environment, process_group=0
                )
            outcome = _outcome(*helper.communicate(), helper.returncode)
            if "bytes" in outcome and not _snapshot_up_to(self.directory, self.epoch, number):
                outcome = {"error": "the helper says that it made one, and there is none"}
        except Exception as error:  # whatever it is, another helper must be able to begin
            outcome = {"error": f"{type(error).__name__}: {error}"}
        with self._lock:
            self._thread = self._helper = None
            self._is_asked = False
            if self._is_closed:
                return
            if "differs" in outcome:
                self.failed = f"a replay differs from the store at records {outcome['differs']}"
            elif "error" in outcome:
                self._put_off(outcome["error"])
            else:
                self._failures, self.last, self.snapshots_made = 0, outcome, self.snapshots_made + 1
                self._since = self._counted
        if self.failed:
            logger.critical("Journal %s: %s; nothing of it is deleted any more", self.directory.path, self.failed)
        elif "error" not in outcome:
            self._on_snapshot()

    def _put_off(self, why: str) -> None:
        """No snapshot was made; wait twice as long for the next try."""
        self._failures = min(self._failures + 1, MOST_FAILURES)
        logger.warning("Journal %s: no snapshot was made (%s); trying later", self.directory.path, why)

    def close(self) -> None:
        """End the helper, if there is one: an unfinished snapshot does not count."""
        with self._lock:
            self._is_closed = True
            helper, thread = self._helper, self._thread
        if helper is not None:
            helper.kill()
        if thread is not None:
            thread.join()


def _outcome(stdout: bytes, stderr: bytes, code: int) -> Outcome:
    """The outcome that a helper printed, or an error if it did not come to its end."""
    said = stderr.decode(errors="replace").strip()[-2000:]
    if code < 0:
        number = -code
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        hint = "; the system may be out of memory" if number == signal.SIGKILL else ""
        return {"error": f"the helper was ended by {name}{hint}{': ' + said if said else ''}"}
    try:
        outcome = json.loads(stdout.rstrip().rpartition(b"\n")[2])
    except ValueError:
        outcome = None
    if not isinstance(outcome, dict):
        return {"error": f"the helper ended with code {code} and said nothing of a snapshot. {said}".strip()}
    if code and not outcome.keys() & {"differs", "error"}:
        return {"error": f"the helper ended with code {code}. {said}".strip()}
    return cast(Outcome, outcome)


# -- in the helper -----------------------------------------------------------------------------------------------------


def compact(directory: Directory, epoch: int, number: int) -> Outcome:
    """Replace everything up to a closed segment by a snapshot, unless a snapshot goes that far already.

    Raises `BlockingIOError` if another helper is at work.
    """
    with _only_helper(directory):
        if (made := _snapshot_up_to(directory, epoch, number)) is not None:
            return {"seconds": 0.0, "bytes": made.stat().st_size}
        started = time.monotonic()
        reader = JournalReader(directory, until=(epoch, number))
        replayed = replay(reader)
        if not replayed.writer:
            raise JournalMissingError(str(directory.path), "a snapshot was to be made of it")
        if replayed.differences:
            return {"differs": replayed.differences[:10]}
        path = _replace_segments(directory, replayed, reader.position)
        return {
            "seconds": round(time.monotonic() - started, 3),
            "bytes": path.stat().st_size,
            "operations": replayed.operations,
            "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def _snapshot_up_to(directory: Directory, epoch: int, number: int) -> Path | None:
    """The newest snapshot, if it goes up to a segment."""
    snapshots = directory.segments(SNAPSHOT)
    return snapshots[-1].path if snapshots and snapshots[-1][:2] >= (epoch, number) else None


@contextlib.contextmanager
def _only_helper(directory: Directory) -> Iterator[None]:
    """Keep other helpers out; remove files that a helper has not finished before it died."""
    with open(os.open(directory.path / LOCK, os.O_RDWR | os.O_CREAT, 0o600), "rb+", buffering=0) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError("another helper is at work, perhaps of a store that died meanwhile") from None
        for kind in (SNAPSHOT, BODIES):
            for left in directory.path.glob(f"*{kind}.*.new"):
                left.unlink()
        yield


def upgrade(directory: Directory, replayed: Replay, position: JournalPosition) -> None:
    """Replace a journal of an earlier format, which was read up to a position, by a snapshot of today's format.

    A helper of the store before may still be at work, and is waited for.
    """
    until = time.monotonic() + HELPER_PATIENCE_SECONDS
    while True:
        try:
            with _only_helper(directory):
                _replace_segments(directory, replayed, position)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                why = "a helper of the store before still replaces files"
                raise JournalInUseError(str(directory.path), why) from None
            time.sleep(0.1)


def _replace_segments(directory: Directory, replayed: Replay, position: JournalPosition) -> Path:
    """Write a snapshot that goes up to a position, and delete what it replaces."""
    path = directory.segment(position.epoch, position.segment, SNAPSHOT)
    needed = replayed.write_snapshot(path, position)
    failpoint("snapshot.named")
    directory.sync()
    failpoint("snapshot.there")
    _drop_segments(directory, position, sorted(needed))
    failpoint("segments.dropped")
    for *_, old in directory.segments(SNAPSHOT)[:-1]:
        old.unlink()
    directory.sync()
    return path


def _drop_segments(directory: Directory, position: JournalPosition, needed: list[int]) -> None:
    """Delete segments up to a position, but for records that are needed."""
    for epoch, number, path in directory.segments(RECORDS, BODIES):
        if (epoch, number) > (position.epoch, position.segment):
            break
        failpoint("segments.dropping")
        count, first, last = _records_in(path)
        live = needed[bisect_left(needed, first) : bisect_left(needed, last + 1)]
        kept = directory.segment(epoch, number, BODIES)
        if not live:
            path.unlink()
        elif 2 * len(live) >= count:
            path.rename(kept)
        else:
            _copy(path, kept, set(live))
            if path != kept:
                path.unlink()


def _records_in(path: Path) -> tuple[int, int, int]:
    """How many records a file holds, and the numbers of the first and the last."""
    with open(path, "rb") as file:
        head, at = format.unpack_head(file.read(format.HEAD_BYTES), str(path))
        count, last = 0, head.first - 1
        while (found := format.skip_frame(os.pread(file.fileno(), format.FRAME_BYTES, at), at)) is not None:
            numbers, at = found
            count += len(numbers)
            last = numbers.stop - 1
    return count, head.first, last


def _copy(path: Path, target: Path, live: set[int]) -> None:
    """Copy the records of a file that are needed."""
    data = memoryview(path.read_bytes())
    head, at = format.unpack_head(data, str(path))
    with whole_file(target) as file:
        file.write(format.pack_head(head))
        while (frame := format.read_frame(data, at)) is not None:
            at = frame.end
            for number, record in enumerate(frame.records(), frame.first):
                if number in live:
                    file.writelines(format.pack_frame([record], number, 0))
    failpoint("bodies.named")


def main() -> int:
    """Compact as the command line says; the outcome is JSON, the last line of stdout whatever else is printed here."""
    path, epoch, number = sys.argv[1:]
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.nice(19)
    gc.disable()  # what is read stays until the end, and holds no cycles
    outcome: Outcome
    try:
        outcome = compact(Directory(path), int(epoch), int(number))
    except (StoreError, OSError) as error:
        outcome = {"error": f"{type(error).__name__}: {error}"}
    with stdout:
        stdout.write("\n" + json.dumps(outcome))
    return DIFFERS if "differs" in outcome else 1 if "error" in outcome else 0


if __name__ == "__main__":
    sys.exit(main())
