"""Putting large objects where they belong when they are published: Ray's object store, and the journal.

Not here: holding on to what was published (`held`), the form of a file (`raystore.values.objects`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import ray

from raystore.client.pending import in_thread
from raystore.errors import JournalFailedError
from raystore.types import ObjectResource
from raystore.values.objects import PIECE_BYTES, Kept, Origin, Parts, Source, address_of, pickled, size_of

BOXED_FROM_BYTES = 64 * 1024  #: larger objects in resources go to Ray's object store
FETCH_SECONDS = 60.0  #: that an object may take to come here, to be written down
READY_SECONDS = 1.0  #: that a reference is given to say whether its object is there
PATIENCE_SECONDS = 60.0  #: with a store that does not take an object: it may be another process in a moment
PAUSE_SECONDS = 1.0


class Box(NamedTuple):
    """A resource as it travels; `kept` and the bytes are those of an object that is a reference now."""

    resource: ObjectResource
    kept: Kept | None = None
    parts: Parts | None = None


async def box(resource: ObjectResource, *, bound: int) -> Box:
    """A resource whose object is in the object store if it is large, with its bytes if they are within the bound."""
    value = resource.value
    if isinstance(value, Kept):  # read from a journal, and published again
        value = await in_thread(resource.get)
    if isinstance(value, ray.ObjectRef):
        parts, size = await in_thread(_fetched, value, bound) if bound else (None, 0)
        return _referring(value, parts, size)
    size = getattr(value, "nbytes", None)
    parts = None
    if not isinstance(size, int):
        parts = pickled(value)
        size = size_of(parts) if parts is not None else len(ray.cloudpickle.dumps(value))
    if size <= BOXED_FROM_BYTES:
        return Box(resource if value is resource.value else ObjectResource(value=value))
    if size > bound:
        parts = None
    elif parts is None:
        parts = pickled(value)
    return _referring(ray.put(value), parts, size)


def _referring(reference: Any, parts: Parts | None, size: int) -> Box:
    kept = Kept(None if parts is None else address_of(parts), size)
    made = ObjectResource(value=reference)
    made.source = Source(kept, Origin(), "", 0)  # the rest is known where it is read
    return Box(made, kept, parts)


def _fetched(reference: Any, bound: int) -> tuple[Parts | None, int]:
    """The object of a user's reference, if it is there and within the bound; and its size, 0 if that is not known."""
    where = ray.experimental.get_object_locations([reference]).get(reference, {})
    size = where.get("object_size") or 0
    if size > bound:
        return None, size
    try:
        value = reference.future().result(timeout=FETCH_SECONDS if size else READY_SECONDS)
    except Exception:  # not there yet, or never: whoever gets it will see
        return None, size
    parts = pickled(value)
    del value
    size = size_of(parts) if parts is not None else size
    return (parts if size <= bound else None), size


def keep(origin: Origin, address: str, parts: Parts) -> None:
    """Have an object on disk in the journal: written here, or by the store if this process does not see the directory.

    Raises `JournalFailedError` if that is not to be: the version is published, and will not survive.
    """
    files = origin.files()
    try:
        if files is not None:
            files.write(address, parts)
        else:
            _send(origin, address, parts)
    except (OSError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        why = f"an object of resources was published and cannot be kept: {type(error).__name__}: {error}"
        raise JournalFailedError(str(origin.path), why) from error


def _send(origin: Origin, address: str, parts: Parts) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            _send_all(origin, address, parts)
            return
        except (ray.exceptions.RayError, ValueError):  # the store is being restarted, and what had come is gone
            if time.monotonic() > until:
                raise
            time.sleep(PAUSE_SECONDS)


def _send_all(origin: Origin, address: str, parts: Parts) -> None:
    actor = ray.get_actor(origin.name, namespace=origin.namespace)
    upload, total, at = secrets.token_hex(4), size_of(parts), 0
    for piece in _pieces(parts):
        actor.piece.remote(address, at, total, upload, piece).future().result(timeout=FETCH_SECONDS)
        at += len(piece)


def _pieces(parts: Parts) -> Iterator[bytes]:
    """The bytes of an object in pieces of one size."""
    pending = bytearray()
    for part in parts:
        left = memoryview(part).cast("B")
        while left:
            room = PIECE_BYTES - len(pending)
            pending += left[:room]
            left = left[room:]
            if len(pending) == PIECE_BYTES:
                yield bytes(pending)
                pending.clear()
    if pending:
        yield bytes(pending)
