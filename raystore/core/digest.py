"""A state as one number, so that two processes can tell whether they hold the same.

Everything that a replay must reproduce counts. What only a process itself knows does not: what was read, who was heard
when, which bodies are in memory, what waits to be sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from operator import attrgetter
from typing import Any
from zlib import crc32

from raystore.core.fields import digest_fields, shown
from raystore.core.payload import OnDisk, Payload
from raystore.core.records import Record, Span
from raystore.core.state import Entry, State


def digest(state: State) -> str:
    """The digest of a state, 32 hexadecimal digits."""
    made = blake2b(digest_size=16)
    for part in parts(state):
        made.update(repr(part).encode("utf-8", "surrogatepass"))
        made.update(b"\n")
    return made.hexdigest()


def verify(state: State, count: int) -> str:
    """A digest of the rollouts that were touched longest ago, so many, which count as untouched from now on.

    Two processes that follow the same steps touch the same rollouts in the same order, and find the same digest.
    """
    made = blake2b(digest_size=16)
    for rollout_id in list(islice(state.touched, count)):
        del state.touched[rollout_id]
        entry = state.entries.get(rollout_id)
        found = _entry(state, entry, is_brief=True) if entry else None
        made.update(repr((rollout_id, found)).encode("utf-8", "surrogatepass"))
    sums = (
        len(state.entries), len(state.queues), len(state.sessions), len(state.workers), state.spans.count,
        state.changes.last, state.completions.last, state.rollouts_made, state.attempts_made, state.payload_bytes,
    )  # fmt: skip
    made.update(repr(sums).encode())
    return made.hexdigest()


def parts(state: State) -> Iterator[Any]:
    """A state as plain values, in an order that depends on nothing else; two lists of them show a difference."""
    yield "counts", state.rollouts_made, state.attempts_made, state.paused, state.payload_bytes, state.drained
    for rollout_id in sorted(state.entries):
        yield "rollout", rollout_id, _entry(state, state.entries[rollout_id])
    yield "queue", sorted(state.queues.orders())
    yield "suspects", list(state.suspects.items())
    for worker_id in sorted(state.workers):
        yield "worker", _plain(state.workers[worker_id])
    for name in sorted(state.consumers):
        yield "consumer", name, _plain(shown(state.consumers[name]))
    for name in sorted(state.forgotten):
        yield "forgotten", name, _plain(shown(state.forgotten[name]))
    yield "resources", [_plain(held) for held in state.resources.everything()]
    yield "objects", state.resources.shown()
    yield "latest resources", state.resources.latest_id, state.resources.policy_version
    yield "span counters", sorted(state.spans.counters())
    for session_id in sorted(state.sessions):
        yield "session", session_id, _plain(shown(state.sessions[session_id]))
    yield "changes", state.changes.last, [_plain(change) for change in state.changes]
    yield "completions", state.completions.last, list(state.completions.after(None))


#: Fields of an entry that hold records, of whose long values only what tells them apart counts.
_RECORDS = frozenset({"rollout", "attempts"})
_ENTRY = tuple(field for field in digest_fields(Entry) if field.name not in _RECORDS)
_SPAN = tuple(field.name for field in digest_fields(Span) if field.name != "rollout_id")
_SPAN_BRIEF = ("attempt_id", "sequence_id", "span_id")  # the rest of a span never changes


def _entry(state: State, entry: Entry, *, is_brief: bool = False) -> list[Any]:
    """A rollout; `is_brief` leaves out what never changes of a span."""
    rollout_id = entry.rollout.rollout_id
    of_span = attrgetter(*(_SPAN_BRIEF if is_brief else _SPAN))
    return [
        [_content(field) for field in entry.rollout.row()],
        [[_content(field) for field in attempt.row()] for attempt in entry.attempts],
        [_plain(field.shows(getattr(entry, field.name))) for field in _ENTRY],
        [of_span(span) for span in state.spans.of(rollout_id)],
        rollout_id in state.spans.evicted,
    ]


_BRIEF = frozenset({str, int, float, bool, type(None)})


def _content(field: Any) -> Any:
    """A field as a value; of long ones only what tells them apart."""
    if type(field) in _BRIEF:
        return field
    if isinstance(field, bytes):
        return len(field), crc32(field)
    if isinstance(field, Payload):
        return len(field.data), crc32(field.data)
    return _plain(field)


def _plain(value: Any) -> Any:
    """A record as its values; of object references only how many there were."""
    if isinstance(value, Record):
        return [_plain(field) for field in value.row()]
    if isinstance(value, Payload):
        return value.data
    if isinstance(value, OnDisk):
        return None
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return sorted((name, _plain(item)) for name, item in value.items())
    return value
