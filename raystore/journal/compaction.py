"""Replacing segments by a snapshot, in a process of its own: `python -m raystore.journal.compaction PATH EPOCH NUMBER`.

The helper replays the snapshot before, and behind it the segments up to the named one, which its writer has closed, and
must find what the writer found. Only then the new snapshot counts, and the segments are deleted, but for records that
hold bodies of spans that are still there. A writer closes a segment only while it has no successor, so every later
writer has read all of it: a snapshot of closed segments is right whoever writes by then, and a helper goes on when its
store has died. Only one helper works at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import resource
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from raystore.errors import JournalInUseError, JournalMissingError, StoreError
from raystore.journal import format
from raystore.journal.failpoints import failpoint
from raystore.journal.files import BODIES, RECORDS, SNAPSHOT, Directory, JournalPosition, unfinished
from raystore.journal.format import Chunks
from raystore.journal.reader import JournalReader
from raystore.journal.replay import Replay, replay

DIFFERS = 3  #: exit code: the state is not the one that its writer found
COPY_BYTES = 8 * 1024 * 1024
LOCK = "compaction.lock"
HELPER_PATIENCE_SECONDS = 60.0  #: for which the helper of another store is waited for


class Outcome(TypedDict, total=False):
    """What a helper did: `bytes` if there is a snapshot, else `differs` or `error`."""

    bytes: int  # size of the snapshot
    seconds: float
    freed: int  # bytes of segments that were deleted
    operations: int  # that were replayed
    rss: int  # the most memory of the helper, in bytes
    differs: list[int]  # records at which the writer had found another digest
    error: str


def compact(directory: Directory, epoch: int, number: int) -> Outcome:
    """Replace everything up to a closed segment by a snapshot, unless a snapshot goes that far already.

    Raises `BlockingIOError` if another helper is at work.
    """
    with _only_helper(directory):
        snapshots = directory.segments(SNAPSHOT)
        if snapshots and snapshots[-1][:2] >= (epoch, number):
            return {"seconds": 0.0, "bytes": snapshots[-1].path.stat().st_size}
        started = time.monotonic()
        reader = JournalReader(directory, until=(epoch, number))
        replayed = replay(reader)
        if not replayed.writer:
            raise JournalMissingError(str(directory.path), "a snapshot was to be made of it")
        if replayed.differences:
            return {"differs": replayed.differences[:10]}
        path, freed = _replace_segments(directory, replayed, reader.position)
        return {
            "seconds": round(time.monotonic() - started, 3),
            "bytes": path.stat().st_size,
            "freed": freed,
            "operations": replayed.operations,
            "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


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


def _replace_segments(directory: Directory, replayed: Replay, position: JournalPosition) -> tuple[Path, int]:
    """Write a snapshot that goes up to a position, and delete what it replaces: its path, and how many bytes."""
    path = directory.segment(position.epoch, position.segment, SNAPSHOT)
    needed = replayed.write_snapshot(path, position)
    failpoint("snapshot.named")
    directory.sync()
    failpoint("snapshot.there")
    freed = _drop_segments(directory, position, sorted(needed))
    failpoint("segments.dropped")
    for *_, old in directory.segments(SNAPSHOT)[:-1]:
        old.unlink()
    directory.sync()
    return path, freed


def _drop_segments(directory: Directory, position: JournalPosition, needed: list[int]) -> int:
    """Delete segments up to a position, but for records that are needed; returns the bytes that were freed."""
    freed = 0
    for epoch, number, path in directory.segments(RECORDS, BODIES):
        if (epoch, number) > (position.epoch, position.segment):
            break
        failpoint("segments.dropping")
        size = path.stat().st_size
        count, first, last = _records_in(path)
        live = needed[bisect_left(needed, first) : bisect_left(needed, last + 1)]
        kept = directory.segment(epoch, number, BODIES)
        if not live:
            path.unlink()
            freed += size
        elif 2 * len(live) >= count:
            path.rename(kept)
        else:
            freed += size - _copy(path, kept, set(live))
            if path != kept:
                path.unlink()
    return freed


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


def _copy(path: Path, target: Path, live: set[int]) -> int:
    """Copy the records of a file that are needed; returns the size of the copy."""
    data = memoryview(path.read_bytes())
    head, at = format.unpack_head(data, str(path))
    with unfinished(target) as new:
        with open(new, "wb", buffering=COPY_BYTES) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(format.pack_head(head))
            for number, record in _records(data, at):
                if number in live:
                    for chunk in format.pack_frame([record], number, 0):
                        file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        failpoint("bodies.written")
        new.rename(target)
    failpoint("bodies.named")
    return size


def _records(data: memoryview, at: int) -> Iterator[tuple[int, Chunks]]:
    """The records of a file, of which some may be missing, with their numbers."""
    while (frame := format.read_frame(data, at)) is not None:
        yield from enumerate(frame.records(), frame.first)
        at = frame.end


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
