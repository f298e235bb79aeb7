"""The directory of a journal: a file for each segment, snapshot and large object, and one for each process that wrote.

A process that wants to write creates `epoch.N` for the next N, exclusively, and only then reads the journal; the writer
before it finds that file and stops. So a new writer has read everything that the earlier one acknowledged. An earlier
writer that has not noticed yet may still append to its last segment; the first record of each epoch says up to where
its writer read.
A client that publishes a large object writes its file once the store has the version that refers to it. The file is
deleted when no version refers to it any more; files that a crash left are deleted when the next process begins.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import stat
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from raystore.errors import JournalDamagedError
from raystore.journal import format
from raystore.journal.failpoints import failpoint
from raystore.journal.format import FileHead, Frame
from raystore.values.objects import TOKEN, ObjectFiles, sync

EPOCH = "epoch.{:08d}"
RECORDS, BODIES, SNAPSHOT = ".journal", ".bodies", ".snapshot"  # kinds of files
WRITE_BYTES = 16 * 1024 * 1024  #: of a snapshot or copy, at once


class JournalFile(NamedTuple):
    """A segment or snapshot; they sort in the order of the journal."""

    epoch: int
    number: int  # within its epoch
    path: Path


@dataclass(slots=True, frozen=True, order=True)
class JournalPosition:
    """A position in a journal: behind the last byte that was read, and the number of the last record."""

    epoch: int
    segment: int
    offset: int
    record: int


class Directory:
    """The directory of one journal."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = Path(path).expanduser().absolute()

    def why_unusable(self, *, to_write: bool) -> str | None:
        """What was expected of the path and is not so, for an error message; None if a journal is or can be here."""
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

    def segments(self, *kinds: str) -> list[JournalFile]:
        """All files of these kinds (default: `RECORDS`), oldest first."""
        found = []
        for name in os.listdir(self.path) if self.path.is_dir() else ():
            stem, kind = os.path.splitext(name)
            epoch, _, number = stem.partition("-")
            if kind in (kinds or (RECORDS,)) and epoch.isdigit() and number.isdigit():
                found.append(JournalFile(int(epoch), int(number), self.path / name))
        return sorted(found)

    def segment(self, epoch: int, number: int, kind: str = RECORDS) -> Path:
        """The path of a segment or snapshot."""
        return self.path / f"{epoch:08d}-{number:08d}{kind}"

    def begin_epoch(self) -> int:
        """Become the writer: from now on the earlier one is fenced. Returns the epoch."""
        self.path.mkdir(parents=True, exist_ok=True)
        writer = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}).encode()
        epoch = max(self.epochs(), default=0) + 1
        while True:
            try:
                fd = os.open(self.path / EPOCH.format(epoch), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                break
            except FileExistsError:  # another process became the writer at the same moment
                epoch += 1
        with open(fd, "wb", buffering=0) as file:
            file.write(writer)
            os.fsync(fd)
        for left in self.path.glob(f"*{RECORDS}.new"):  # of writers that died or are fenced now
            left.unlink(missing_ok=True)
        self.sync()
        return epoch

    def is_fenced(self, epoch: int) -> bool:
        """Whether there is a newer writer."""
        return os.path.exists(self.path / EPOCH.format(epoch + 1))

    def sync(self) -> None:
        """Make names of files durable."""
        sync(self.path)

    def running_writer(self) -> str | None:
        """The process on this machine that has the newest segment open, for an error message; None if none has."""
        segments = self.segments()
        if not segments:
            return None
        with open(segments[-1].path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                epoch = self.path / EPOCH.format(segments[-1].epoch)
                return epoch.read_text() if epoch.exists() else "another process"
        return None


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, which gets its name once it is whole and on disk. Removed on an error."""
    new, kind = path.with_name(f"{path.name}.{os.getpid()}.new"), path.suffix[1:]
    try:
        with open(new, "wb", buffering=WRITE_BYTES) as file:
            os.fchmod(file.fileno(), 0o600)
            yield file
            file.flush()
            failpoint(f"{kind}.written")
            os.fsync(file.fileno())
        failpoint(f"{kind}.synced")
        new.rename(path)
    except BaseException:
        new.unlink(missing_ok=True)  # a full disk has no room for it
        raise


def read_head(path: Path) -> FileHead:
    """The head of a segment or snapshot."""
    with open(path, "rb", buffering=0) as file:
        return format.unpack_head(file.read(format.HEAD_BYTES), str(path))[0]


def read_segment(path: Path, until: int | None = None) -> tuple[FileHead, Iterator[Frame]]:
    """The head of a segment, and its frames up to an offset; the iterator ends where no whole frame follows.

    Raises `JournalDamagedError` where a record that was safely on disk cannot be read.
    """
    whole = path.read_bytes()  # not mapped: its writer may truncate the space that it did not need
    data = memoryview(whole)[: len(whole) if until is None else min(until, len(whole))]
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


def torn_tail(path: Path, at: int) -> str | None:
    """What to say of bytes behind the last whole frame of a segment; None if only allocated space follows."""
    with open(path, "rb") as file:
        file.seek(at)
        rest = file.read()
    used = len(rest.rstrip(b"\0"))
    return f"{used} bytes behind byte {at} of {path.name} were never finished, and are left out" if used else None


# -- large objects -----------------------------------------------------------------------------------------------------

OBJECTS = "objects"  #: the directory of their files, in that of the journal


class JournalObjects:
    """The files of the objects of one journal, for the process that writes it."""

    def __init__(self, directory: Directory, *, needed: Collection[str], bound: int) -> None:
        """`needed` are the addresses of objects that some version refers to; `bound` is the most bytes of one."""
        self.files: ObjectFiles = ObjectFiles(directory.path / OBJECTS)
        self.bound = bound
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.files.path):
                if name != TOKEN and name not in needed:
                    (self.files.path / name).unlink(missing_ok=True)

    def description(self) -> dict[str, Any]:
        """For clients: the path of the directory, and the token in it by which a client knows that it sees it."""
        try:
            token = self._token()
        except OSError:  # the directory is gone, which the writer of the journal finds out as well
            token = secrets.token_hex(16)  # which no client finds
        return {"path": str(self.files.path), "token": token, "bound": self.bound}

    def _token(self) -> str:
        path = self.files.path
        path.mkdir(mode=0o700, exist_ok=True)
        token = path / TOKEN
        if not token.exists():
            new = path / f"{TOKEN}.{os.getpid()}"
            new.write_text(secrets.token_hex(16))
            new.rename(token)
        return token.read_text()

    def remove(self, addresses: Iterable[str]) -> None:
        """Delete the files of objects that no version refers to."""
        for address in addresses:
            self.files.file(address).unlink(missing_ok=True)
