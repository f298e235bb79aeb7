"""Large objects of resources: their form in a file, and where a reader finds them.

An object is pickled with its buffers beside the pickle, so that an array is written as it lies in memory. Its address
is the digest of these bytes: the same object is written once, and a damaged file is noticed. A reader tries Ray's
object store, then the file, then the store that keeps the file.
"""

from __future__ import annotations

import io
import os
import pickle
import secrets
import struct
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from raystore.errors import PayloadLostError
from raystore.values import pickler

TOKEN = "token"  #: name of the file by which a process knows that it sees the directory of the store
UNFINISHED = ".new"  #: suffix of a file that is being written
DIGEST_BYTES = 20
PIECE_BYTES = 4 * 1024 * 1024  #: of an object that travels through the store
PATIENCE_SECONDS = 60.0  #: for which a store that does not answer is asked again ...
PAUSE_SECONDS = 0.5  #: ... at this interval

_MAGIC = b"rsobject"
_COUNT = struct.Struct("<8sQ")
_ALIGNED = 64  # of each part in a file, so that arrays can be used where they lie

Parts = list[bytes | memoryview]  #: a view is one of bytes, so that its length is its size


def pickled(value: Any) -> Parts | None:
    """An object as the parts of a file; buffers are not copied. None if it holds references, which no file can keep."""
    refs: list[Any] = []
    buffers: list[pickle.PickleBuffer] = []
    data = pickler.dumps(value, refs, buffers=buffers)
    if refs:
        return None
    bodies: list[bytes | memoryview] = [data, *(buffer.raw() for buffer in buffers)]
    sizes = struct.pack(f"<{len(bodies)}Q", *map(len, bodies))
    parts: Parts = [_COUNT.pack(_MAGIC, len(bodies)) + sizes]
    at = len(parts[0])
    for body in bodies:
        parts += [bytes(-at % _ALIGNED), body]
        at += -at % _ALIGNED + len(body)
    return parts


def unpickled(data: bytes | memoryview) -> Any:
    """The object in a file's bytes; its buffers are read-only, like those of Ray's object store."""
    data = memoryview(data).toreadonly()
    magic, count = _COUNT.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError("it is no object of a store")
    sizes = struct.unpack_from(f"<{count}Q", data, _COUNT.size)
    at = _COUNT.size + 8 * count
    bodies = []
    for size in sizes:
        at += -at % _ALIGNED
        bodies.append(data[at : at + size])
        at += size
    return pickler.Unpickler(io.BytesIO(bodies[0]), buffers=bodies[1:]).load()


def size_of(parts: Parts) -> int:
    """Size of an object in bytes."""
    return sum(map(len, parts))


def address_of(parts: Iterable[bytes | memoryview]) -> str:
    """The digest under which an object is kept."""
    made = blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        made.update(part)
    return made.hexdigest()


def sync(path: Path) -> None:
    """Make durable what was written to a file, or the names in a directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class ObjectFiles:
    """The files of the objects of one store."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = Path(path)

    def sees(self, token: str) -> bool:
        """Whether this directory, as this process sees it, has the token of the store."""
        try:
            return (self.path / TOKEN).read_text() == token
        except OSError:
            return False

    def file(self, address: str) -> Path:
        """The file of an object."""
        if not (len(address) == 2 * DIGEST_BYTES and address.isascii() and address.isalnum()):
            raise ValueError(f"{address!r} is no address of an object")
        return self.path / address

    def has(self, address: str) -> bool:
        """Whether an object is here."""
        return self.file(address).exists()

    def write(self, address: str, parts: Parts) -> None:
        """Write an object, under its name only once it is on disk. Raises OSError."""
        for _ in range(2):
            with suppress(FileNotFoundError):  # deleted by a store that has just begun to use the directory
                self._write(address, parts)
                return
        self._write(address, parts)

    def _write(self, address: str, parts: Parts) -> None:
        if self.has(address):
            return
        new = self.path / f"{address}.{secrets.token_hex(4)}{UNFINISHED}"
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0) as file:
                for part in parts:
                    left = memoryview(part)
                    while left:
                        left = left[file.write(left) :]
                os.fsync(file.fileno())
            new.rename(self.file(address))
        except BaseException:
            new.unlink(missing_ok=True)  # it would stay, and the disk may be full
            raise
        sync(self.path)

    def write_piece(self, upload: str, address: str, offset: int, total: int, data: bytes) -> None:
        """Write a piece of an object, of which the pieces come in order; the last one completes it."""
        if self.has(address):
            return
        new = self.file(address).with_suffix(f".{int(upload, 16):x}{UNFINISHED}")
        with open(os.open(new, os.O_RDWR | os.O_CREAT, 0o600), "rb+", buffering=0) as file:
            os.pwrite(file.fileno(), data, offset)
            if offset + len(data) < total:
                return
            os.fsync(file.fileno())
            found = address_of(iter(lambda: file.read(PIECE_BYTES), b""))
        if found != address:
            new.unlink(missing_ok=True)
            raise ValueError(f"object {address} did not arrive whole: what came has the digest {found}")
        new.rename(self.file(address))
        sync(self.path)

    def read_piece(self, address: str, offset: int) -> bytes:
        """The piece of an object at an offset; empty at its end. Raises FileNotFoundError."""
        with open(self.file(address), "rb", buffering=0) as file:
            return os.pread(file.fileno(), PIECE_BYTES, offset)

    def read(self, address: str) -> bytes:
        """All bytes of an object. Raises FileNotFoundError."""
        return self.file(address).read_bytes()


@dataclass(slots=True, frozen=True)
class Origin:
    """Where a resource was read: the store's directory of objects, and the name of the store."""

    path: str | None = None
    token: str | None = None  # None: the directory is this process's own
    name: str | None = None
    namespace: str | None = None

    def files(self) -> ObjectFiles | None:
        """The files, if this process sees them."""
        if self.path is None:
            return None
        files = ObjectFiles(self.path)
        return files if self.token is None or files.sees(self.token) else None

    def read(self, address: str) -> bytes:
        """The bytes of an object, from its file or from the store. Raises FileNotFoundError if it is in neither."""
        files = self.files()
        if files is not None:
            return files.read(address)
        if self.name is None:
            raise FileNotFoundError(address)
        return self._read_from_store(address)

    def _read_from_store(self, address: str) -> bytes:
        import ray

        pieces: list[bytes] = []
        at = 0
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                actor = ray.get_actor(self.name, namespace=self.namespace)
                while piece := actor.piece.remote(address, at).future().result(timeout=PATIENCE_SECONDS):
                    pieces.append(piece)
                    at += len(piece)
                return b"".join(pieces)
            except ray.exceptions.ActorUnavailableError:  # the store is being restarted; the file stays
                if time.monotonic() > until:
                    raise FileNotFoundError(f"{address}: the store does not answer") from None
                time.sleep(PAUSE_SECONDS)
            except (ray.exceptions.RayError, ValueError, TimeoutError) as error:
                raise FileNotFoundError(f"{address}, {type(error).__name__}: {error}") from None


@dataclass(slots=True, frozen=True)
class Kept:
    """An object in the journal of a store; stands for a reference whose object is in no object store any more."""

    address: str | None  # None: it is not kept
    size: int

    def __repr__(self) -> str:
        where = f"in the journal as {self.address}" if self.address is not None else "lost"
        return f"<object of {self.size} bytes, {where}>"


@dataclass(slots=True, frozen=True)
class Source:
    """Which object a resource has, and where it may be found beside the object store."""

    kept: Kept
    origin: Origin
    resources_id: str
    version: int

    def read(self, why: str) -> Any:
        """The object from the journal. Raises `PayloadLostError`; `why` is why the object store does not have it."""
        what = f"resources {self.resources_id} version {self.version}"
        if self.kept.address is not None:
            try:
                data = self.origin.read(self.kept.address)
                if address_of([data]) == self.kept.address:
                    return unpickled(data)
                why = f"{why}; the file of the journal that keeps it is damaged ({self.kept.address})"
            except FileNotFoundError as error:
                why = f"{why}; the journal does not have it either ({error})"
        raise PayloadLostError(what, why, (self.resources_id, self.version))
