"""A whole state as plain values, section by section, and back.

What `restore` makes of an image is the state it was taken of, in everything that a replay must reproduce. Rollouts are
known by their numbers here, in the order in which they came. Of each there is a little at once (what an index or a
table needs), and the rest in chunks (`cold`); of its spans, where their index is.
Not here: the file (`journal.snapshot_file`), batches under way (`journal.replay`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from raystore.core.cold import AT_ONCE, Chunk, columns
from raystore.core.fields import packed, unpacked
from raystore.core.lifecycle import ACTIVE, FINISHED
from raystore.core.records import Change, Worker
from raystore.core.state import Consumer, Entry, Session, State

_PLAIN = ("paused", "rollouts_made", "attempts_made", "attempt_count", "payload_bytes", "drained", "evicted_rollouts")


def image(state: State, places: dict[str, int]) -> Iterator[tuple[str, Any]]:
    """The sections of a state; `places` says where the index of the spans of a rollout was written to.

    The value of a section is plain, or a `Chunk` that nobody needed since it was read.
    """
    yield "plain", [getattr(state, name) for name in _PLAIN]
    numbers = {rollout_id: number for number, rollout_id in enumerate(state.entries)}
    yield "ids", list(numbers)
    for chunk, members in _chunks(state):
        yield "members", array("I", members).tobytes()
        yield "chunk", chunk
    yield "indexes", state.indexes.image(numbers)
    yield "spans", state.spans.image(numbers, places)
    yield "completions", state.completions.image(numbers)
    yield "waiting", (state.queues.orders(), state.queues.arrivals, list(state.suspects.items()))
    yield "workers", [worker.row() for worker in state.workers.values()]
    yield "consumers", {name: packed(known) for name, known in state.consumers.items()}
    yield "forgotten", {name: packed(known) for name, known in state.forgotten.items()}
    yield "resources", state.resources.image()
    for session in state.sessions.values():
        yield "session", packed(session)
    yield "changes", (state.changes.last, [change.row() for change in state.changes])
    yield "disposable", (state.disposable_released.image(), state.disposable_read.image())
    yield "touched", list(state.touched)


def _chunks(state: State) -> Iterator[tuple[Any, list[int]]]:
    """Chunks with the numbers of their rollouts; what moves is apart from what waits, and that from what has ended."""
    intact: dict[int, tuple[Chunk, list[int]]] = {}
    gathering: dict[bool | None, tuple[list[Entry], list[int]]] = {}
    for number, entry in enumerate(state.entries.values()):
        chunk = getattr(entry, "cold", None)
        if chunk is not None:
            intact.setdefault(id(chunk), (chunk, []))[1].append(number)
            continue
        status = entry.rollout.status
        kind = None if status in ACTIVE else status in FINISHED
        entries, members = gathering.setdefault(kind, ([], []))
        entries.append(entry)
        members.append(number)
        if len(members) == AT_ONCE:
            del gathering[kind]
            yield columns(entries), members
    for entries, members in gathering.values():
        yield columns(entries), members
    yield from intact.values()


def restore(state: State, sections: Iterable[tuple[str, Any]], unpack: Callable[[Any], Any]) -> None:
    """Fill an empty state from the sections of an image; `unpack` makes a chunk's columns of what it came in."""
    ids: list[str] = []
    members: list[array[int]] = []
    chunks: list[Chunk | None] = []  # by number of the rollout
    known: dict[str, Callable[[Any], None]] = {
        "plain": lambda values: _restore_plain(state, values),
        "ids": lambda found: _number(found, ids, chunks),
        "members": lambda found: members.append(array("I", found)),
        "chunk": lambda packed: _place(Chunk(packed, unpack, members[-1], ids, state.entries), members.pop(), chunks),
        "indexes": lambda found: state.indexes.restore(found, ids),
        "spans": lambda found: state.spans.restore(found, ids),
        "completions": lambda found: state.completions.restore(found, ids),
        "waiting": lambda found: _restore_waiting(state, *found),
        "workers": lambda rows: state.workers.update((row[0], Worker(*row)) for row in rows),
        "consumers": lambda found: state.consumers.update((n, unpacked(Consumer, c)) for n, c in found.items()),
        "forgotten": lambda found: state.forgotten.update((n, unpacked(Consumer, c)) for n, c in found.items()),
        "resources": state.resources.restore,
        "session": lambda found: _restore_session(state, found),
        "changes": lambda found: state.changes.restore(found[0], (Change(*row) for row in found[1])),
        "disposable": lambda found: _restore_disposable(state, *found),
        "touched": lambda ids: state.touched.update(dict.fromkeys(ids)),
    }
    for name, value in sections:
        known[name](value)
    make = Entry.__new__
    for rollout_id, chunk in zip(ids, chunks, strict=True):
        entry = state.entries[rollout_id] = make(Entry)
        entry.cold = chunk


def _restore_session(state: State, values: dict[str, Any]) -> None:
    session = unpacked(Session, values)
    state.sessions[session.session_id] = session
    if session.deleting:
        state.deleting[session.session_id] = session


def _restore_plain(state: State, values: list[Any]) -> None:
    for name, value in zip(_PLAIN, values, strict=True):
        setattr(state, name, value)


def _number(found: list[str], ids: list[str], chunks: list[Chunk | None]) -> None:
    ids.extend(found)
    chunks.extend([None] * len(found))


def _place(chunk: Chunk, members: Iterable[int], chunks: list[Chunk | None]) -> None:
    for member in members:
        chunks[member] = chunk


def _restore_waiting(state: State, orders: list[Any], arrivals: int, suspects: list[Any]) -> None:
    state.queues.restore(orders, arrivals)
    state.suspects.update(suspects)


def _restore_disposable(state: State, released: list[Any], read: list[Any]) -> None:
    state.disposable_released.restore(released)
    state.disposable_read.restore(read)
