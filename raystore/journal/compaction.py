"""Replacing segments by a snapshot, in a process of its own: `python -m raystore.journal.compaction PATH EPOCH NUMBER`.

It reads the snapshot before, and behind it the segments up to the one that is named, which its writer has closed,
through the same core, and must find what the writer found. Only then, and only while nobody else has become the writer,
the new snapshot counts; then the segments go, but for records that hold bodies of spans that are still there.
Not here: when this is done (`keeper`), the file (`snapshot`).
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from bisect import bisect_left
from pathlib import Path
from typing import Any

from raystore.errors import FencedError, JournalMissingError, StoreError
from raystore.failpoints import failpoint
from raystore.journal import frames
from raystore.journal.frames import Head
from raystore.journal.reading import Reading
from raystore.journal.replay import replay
from raystore.journal.segments import BODIES, RECORDS, SNAPSHOT, Directory, Place, unfinished

DIFFERS = 3  #: exit code: the state is not what its writer found
COPY_BYTES = 8 * 1024 * 1024


def compact(directory: Directory, epoch: int, number: int) -> dict[str, Any]:
    """Replace everything up to a closed segment of the current writer; what came of it."""
    started = time.monotonic()
    reading = Reading(directory, until=(epoch, number))
    before = [] if reading.snapshot is None else [reading.snapshot]
    follower = replay(reading)
    if not follower.started:
        raise JournalMissingError(str(directory.path), "a snapshot was to be made of it")
    if follower.differences:
        return {"differs": follower.differences[:10]}
    place = reading.place
    path = directory.segment(place.epoch, place.number, SNAPSHOT)
    if path in before:
        return {"seconds": 0.0, "bytes": path.stat().st_size}

    def stop_if_replaced() -> None:
        if directory.is_fenced(epoch):  # who comes now reads the segments, all of which are still there
            raise FencedError(str(directory.path), epoch)

    needed = follower.write(path, place, stop_if_replaced)
    failpoint("snapshot.named")
    directory.sync()
    failpoint("snapshot.there")
    freed = _drop_segments(directory, place, sorted(needed))
    failpoint("segments.dropped")
    for old in before:
        old.unlink(missing_ok=True)
    directory.sync()
    return {
        "seconds": round(time.monotonic() - started, 3),
        "bytes": path.stat().st_size,
        "freed": freed,
        "operations": follower.operations,
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


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
        head, at = frames.unpack_head(file.read(frames.HEAD_BYTES), str(path))
        count, last = 0, head.first - 1
        while (found := frames.skip_frame(os.pread(file.fileno(), frames.FRAME_BYTES, at), at)) is not None:
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
            file.write(frames.pack_head(head))
            for number, record in found:
                if number in live:
                    for chunk in frames.pack_frame([record], number, 0):
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
    head, at = frames.unpack_head(data, str(path))

    def found() -> Any:
        position = at
        while (frame := frames.read_frame(data, position)) is not None:
            yield from enumerate(frame.records(), frame.first)
            position = frame.end

    return head, found()


def main() -> int:
    """Compact as the command line says; the outcome as one line of JSON."""
    path, epoch, number = sys.argv[1:]
    os.nice(19)
    gc.disable()  # what is read stays until the end, and holds no cycles
    try:
        outcome = compact(Directory(path), int(epoch), int(number))
    except (StoreError, OSError) as error:
        outcome = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(outcome))
    return DIFFERS if "differs" in outcome else 1 if "error" in outcome else 0


if __name__ == "__main__":
    sys.exit(main())
