"""Where a journal is: a directory with one file for each segment, and one for each process that ever wrote there.

Whoever wants to write creates `epoch.N` for the next N, exclusively, and only then reads what is there; whoever wrote
before finds it and stops. So what an earlier writer has acknowledged, its successor has read. A writer of an earlier
epoch may still add to its last segment unknowingly; the first record of each epoch says up to where it read.
Not here: frames (`frames`), writing (`log`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from raystore.errors import JournalDamagedError
from raystore.journal import format
from raystore.journal.format import Frame, Head

EPOCH = "epoch.{:08d}"
SEGMENT = "{:08d}-{:08d}"  # epoch and number
RECORDS, BODIES, SNAPSHOT = ".journal", ".bodies", ".snapshot"  # kinds of files


@dataclass(slots=True, frozen=True, order=True)
class Place:
    """A place in a journal: behind the last byte that was read, and the number of the last record."""

    epoch: int
    number: int
    offset: int
    last: int


@dataclass(slots=True, frozen=True)
class Cut:
    """A tail that was never finished, and is not read."""

    segment: str
    offset: int
    bytes: int


class Directory:
    """The directory of one journal."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = Path(path).expanduser().absolute()

    def unusable(self, *, to_write: bool) -> str | None:
        """What is expected and is not so, for people to read; None if a journal can be here, or may be made here."""
        for place in (self.path, *self.path.parents):
            try:
                is_directory = stat.S_ISDIR(os.stat(place).st_mode)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                return f"a directory, and {place} cannot be reached ({error.strerror})"
            if not is_directory:
                return f"a directory, and {place} is a file; name the directory, which is made if it is not there"
            if place != self.path and not to_write:
                return None
            rights = os.X_OK | (os.W_OK if to_write else 0) | (os.R_OK if place == self.path else 0)
            if not os.access(place, rights):
                to_do = "written" if to_write else "read"
                return f"a directory of this user, and {place} may not be {to_do}; change its rights, or name another"
            return None
        return None

    def epochs(self) -> list[int]:
        """All epochs there ever were, oldest first."""
        return sorted(int(p.name[6:]) for p in self.path.glob("epoch.*") if p.name[6:].isdigit())

    def segments(self, *kinds: str) -> list[tuple[int, int, Path]]:
        """All files of these kinds (default: records) in order: epoch, number within it, file."""
        found = []
        for name in os.listdir(self.path) if self.path.is_dir() else ():
            stem, kind = os.path.splitext(name)
            epoch, _, number = stem.partition("-")
            if kind in (kinds or (RECORDS,)) and epoch.isdigit() and number.isdigit():
                found.append((int(epoch), int(number), self.path / name))
        return sorted(found)

    def segment(self, epoch: int, number: int, kind: str = RECORDS) -> Path:
        """The file of a segment."""
        return self.path / (SEGMENT.format(epoch, number) + kind)

    def begin_epoch(self) -> int:
        """Become the writer: from here on the one before is not."""
        self.path.mkdir(parents=True, exist_ok=True)
        told = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}).encode()
        epoch = max(self.epochs(), default=0) + 1
        while True:
            try:
                fd = os.open(self.path / EPOCH.format(epoch), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                break
            except FileExistsError:  # somebody else, in the same moment
                epoch += 1
        try:
            os.write(fd, told)
            os.fsync(fd)
        finally:
            os.close(fd)
        for left in self.path.glob(f"*{RECORDS}.new"):  # of writers that died, or are to stop
            left.unlink(missing_ok=True)
        self.sync()
        return epoch

    def is_fenced(self, epoch: int) -> bool:
        """Whether there is a newer writer."""
        return os.path.exists(self.path / EPOCH.format(epoch + 1))

    def sync(self) -> None:
        """Make names of files durable."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def writer(self) -> str | None:
        """Who has the newest segment open on this machine, for people to read; None if nobody has."""
        segments = self.segments()
        if not segments:
            return None
        with open(segments[-1][2], "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                epoch = self.path / EPOCH.format(segments[-1][0])
                return epoch.read_text() if epoch.exists() else "another process"
        return None


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Another name for a file that is being made, to be renamed once it is whole; nothing is left if it fails."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        yield new
    except BaseException:
        new.unlink(missing_ok=True)  # a full disk has no room for it
        raise


def read_segment_head(path: Path) -> Head:
    """The head of a segment."""
    with open(path, "rb") as file:
        return format.unpack_head(file.read(format.HEAD_BYTES), str(path))[0]


def read_segment(path: Path, until: int | None = None) -> tuple[Head, Iterator[Frame]]:
    """The head of a segment and its frames, up to an offset; the iterator ends where nothing whole follows.

    Raises `JournalDamagedError` where something that was finished once cannot be read.
    """
    with open(path, "rb") as file:
        held = file.read()  # not mapped: its writer may cut off the space that it did not need
    data = memoryview(held)[: len(held) if until is None else min(until, len(held))]
    head, at = format.unpack_head(data, str(path))
    return head, _frames(path, data, at, head.first)


def _frames(path: Path, data: memoryview, at: int, expected: int) -> Iterator[Frame]:
    while (frame := format.read_frame(data, at)) is not None:
        if frame.first != expected:
            raise JournalDamagedError(str(path), at, f"record {expected} was expected, and {frame.first} stands there")
        expected += frame.count
        at = frame.end
        yield frame
    later = format.find_frame(data, at)
    if later is not None and later.safe >= expected:
        raise JournalDamagedError(
            str(path), at, f"record {expected} cannot be read, although it was on disk before record {later.first}"
        )


def tail(path: Path, at: int) -> Cut | None:
    """What stands behind the last whole frame of a segment; None if that is nothing but space for more."""
    with open(path, "rb") as file:
        file.seek(at)
        rest = file.read()
    used = len(rest.rstrip(b"\0"))
    return Cut(path.name, at, used) if used else None
