"""Replacing segments by a snapshot, in a process of its own: `python -m raystore.journal.compaction PATH EPOCH NUMBER`.

It reads the snapshot before, and behind it the segments up to the one that is named, which its writer has closed,
through the same core, and must find what the writer found. Only then the new snapshot counts; then the segments go, but
for records that hold bodies of spans that are still there. A writer closes a segment only while it has no successor, so
each that comes has read all of it: what is made of closed segments is right whoever writes by then, and a helper goes
on when its store has died. There is one at a time.
Not here: when this is done (`keeper`), the file (`snapshot`).
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
from typing import Any

from raystore.errors import JournalInUseError, JournalMissingError, StoreError
from raystore.journal import format
from raystore.journal.failpoints import failpoint
from raystore.journal.files import BODIES, RECORDS, SNAPSHOT, Directory, Place, unfinished
from raystore.journal.format import Head
from raystore.journal.reader import Reading
from raystore.journal.replay import Replay, replay

DIFFERS = 3  #: exit code: the state is not what its writer found
COPY_BYTES = 8 * 1024 * 1024
LOCK = "compaction.lock"
HELPER_PATIENCE_SECONDS = 60.0  #: for which a helper of another store is waited for


def compact(directory: Directory, epoch: int, number: int) -> dict[str, Any]:
    """Replace everything up to a closed segment by a snapshot, unless one goes that far already; what came of it.

    Raises `BlockingIOError` if another helper is at work.
    """
    with _alone(directory):
        snapshots = directory.segments(SNAPSHOT)
        if snapshots and snapshots[-1][:2] >= (epoch, number):
            return {"seconds": 0.0, "bytes": snapshots[-1][2].stat().st_size}
        return _compact(directory, epoch, number)


@contextlib.contextmanager
def _alone(directory: Directory) -> Iterator[None]:
    """Be the only helper; what one that died has not finished goes."""
    with open(os.open(directory.path / LOCK, os.O_RDWR | os.O_CREAT, 0o600), "rb+", buffering=0) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError("another helper is at work, perhaps of a store that died meanwhile") from None
        for kind in (SNAPSHOT, BODIES):
            for left in directory.path.glob(f"*{kind}.*.new"):
                left.unlink()
        yield


def _compact(directory: Directory, epoch: int, number: int) -> dict[str, Any]:
    started = time.monotonic()
    reading = Reading(directory, until=(epoch, number))
    follower = replay(reading)
    if not follower.started:
        raise JournalMissingError(str(directory.path), "a snapshot was to be made of it")
    if follower.differences:
        return {"differs": follower.differences[:10]}
    path, freed = _replace(directory, follower, reading.place)
    return {
        "seconds": round(time.monotonic() - started, 3),
        "bytes": path.stat().st_size,
        "freed": freed,
        "operations": follower.operations,
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def rewrite(directory: Directory, follower: Replay, place: Place) -> None:
    """Replace what was read, which is of an earlier format, by a snapshot of today's; its reader writes the journal.

    A helper of the store before may still be at work, and is waited for.
    """
    until = time.monotonic() + HELPER_PATIENCE_SECONDS
    while True:
        try:
            with _alone(directory):
                _replace(directory, follower, place)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise JournalInUseError(
                    str(directory.path), "a helper of the store before still replaces files"
                ) from None
            time.sleep(0.1)


def _replace(directory: Directory, follower: Replay, place: Place) -> tuple[Path, int]:
    """Write a snapshot that goes up to a place, and drop what it replaces: the file, and how many bytes were freed."""
    path = directory.segment(place.epoch, place.number, SNAPSHOT)
    needed = follower.write(path, place)
    failpoint("snapshot.named")
    directory.sync()
    failpoint("snapshot.there")
    freed = _drop_segments(directory, place, sorted(needed))
    failpoint("segments.dropped")
    for *_, old in directory.segments(SNAPSHOT)[:-1]:
        old.unlink()
    directory.sync()
    return path, freed


def _drop_segments(directory: Directory, place: Place, needed: list[int]) -> int:
    """Drop what a snapshot replaces, but for records that are needed; how many bytes."""
    freed = 0
    for epoch, number, path in directory.segments(RECORDS, BODIES):
        if (epoch, number) > (place.epoch, place.number):
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
    """Copy the records of a file that are needed; how many bytes they are."""
    head, found = read_sparse(path)
    with unfinished(target) as new:
        with open(new, "wb", buffering=COPY_BYTES) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(format.pack_head(head))
            for number, record in found:
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


def read_sparse(path: Path) -> tuple[Head, Any]:
    """The head of a file of records, and its records with their numbers, of which some may be missing."""
    with open(path, "rb") as file:
        data = memoryview(file.read())
    head, at = format.unpack_head(data, str(path))

    def found() -> Any:
        position = at
        while (frame := format.read_frame(data, position)) is not None:
            yield from enumerate(frame.records(), frame.first)
            position = frame.end

    return head, found()


def main() -> int:
    """Compact as the command line says; the outcome as JSON, the last line of stdout whatever else is printed here."""
    path, epoch, number = sys.argv[1:]
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.nice(19)
    gc.disable()  # what is read stays until the end, and holds no cycles
    try:
        outcome = compact(Directory(path), int(epoch), int(number))
    except (StoreError, OSError) as error:
        outcome = {"error": f"{type(error).__name__}: {error}"}
    with told:
        told.write("\n" + json.dumps(outcome))
    return DIFFERS if "differs" in outcome else 1 if "error" in outcome else 0


if __name__ == "__main__":
    sys.exit(main())
