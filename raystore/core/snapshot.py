"""A whole state as plain values: section by section and back, and as one number, its digest.

`restore` rebuilds from `sections` everything that a replay must reproduce. A snapshot refers to a rollout by its number
in the order of creation. Indexes and tables are restored at once. Other fields of rollouts are in chunks of columns:
an entry stays empty until one of its fields is read, which loads its whole chunk. So a store of a million rollouts
starts in seconds, since most of them have finished and are not read. A chunk that was not loaded is copied into the
next snapshot.
A digest tells two processes whether they hold the same state. It covers everything that a replay must reproduce, and
nothing that only one process knows: what was read, who was heard when, which bodies are in memory, what is to be sent.
Not here: the file (`journal.snapshot_file`), batches under way (`journal.replay`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, islice
from operator import attrgetter
from typing import Any
from zlib import crc32

from raystore.core.lifecycle import ACTIVE, FINISHED
from raystore.core.payload import OnDisk, Payload
from raystore.core.records import (
    Attempt,
    Change,
    Config,
    Field,
    Record,
    Rollout,
    Span,
    Worker,
    digest_fields,
    packed,
    shown,
    snapshot_fields,
    unpacked,
)
from raystore.core.state import AttemptClock, Consumer, Entry, Session, State

_PLAIN = ("paused", "rollouts_made", "attempts_made", "attempt_count", "payload_bytes", "drained", "evicted_rollouts")


def sections(state: State, places: dict[str, int]) -> Iterator[tuple[str, Any]]:
    """The sections of a state; `places` says where the index of the spans of a rollout was written to.

    The value of a section is plain, or a `LazyChunk` that nobody needed since it was read.
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
    for some in state.groups.image():
        yield "groups", some
    yield "resources", state.resources.image()
    for session in state.sessions.values():
        yield "session", packed(session)
    yield "changes", (state.changes.last, [change.row() for change in state.changes])
    yield "disposable", (state.disposable_released.priorities(), state.disposable_read.priorities())
    yield "touched", list(state.touched)
    if state.gates.are_used:  # else a snapshot is as it was before there were gates
        yield "gates", state.gates.image()
    if len(state.feeds):
        yield "feeds", state.feeds.image()
    if state.evaluations.are_used:
        yield "evaluations", state.evaluations.image()
    yield "meters", state.meters.image()


def _chunks(state: State) -> Iterator[tuple[dict[str, Any] | LazyChunk, list[int]]]:
    """Chunks with the numbers of their rollouts. Running, waiting and finished rollouts are in chunks of their own."""
    unread: dict[int, tuple[LazyChunk, list[int]]] = {}
    gathering: dict[bool | None, tuple[list[Entry], list[int]]] = {}
    for number, entry in enumerate(state.entries.values()):
        chunk = getattr(entry, "chunk", None)
        if chunk is not None:
            unread.setdefault(id(chunk), (chunk, []))[1].append(number)
            continue
        status = entry.rollout.status
        kind = None if status in ACTIVE else status in FINISHED
        entries, members = gathering.setdefault(kind, ([], []))
        entries.append(entry)
        members.append(number)
        if len(members) == CHUNK_ROLLOUTS:
            del gathering[kind]
            yield columns(entries), members
    for entries, members in gathering.values():
        yield columns(entries), members
    yield from unread.values()


def restore(state: State, sections: Iterable[tuple[str, Any]], unpack: Callable[[Any], dict[str, Any]]) -> None:
    """Fill an empty state from its sections; `unpack` makes the columns of a chunk of the bytes that it came in."""
    ids: list[str] = []
    chunk_of: list[LazyChunk | None] = []  # by number of the rollout
    members: array[int] = array("I")
    for name, value in sections:
        match name:
            case "plain":
                for field, plain in zip(_PLAIN, value, strict=True):
                    setattr(state, field, plain)
            case "ids":
                ids.extend(value)
                chunk_of.extend([None] * len(value))
            case "members":
                members = array("I", value)
            case "chunk":
                chunk = LazyChunk(value, unpack, members, ids, state.entries)
                for member in members:
                    chunk_of[member] = chunk
            case "indexes":
                state.indexes.restore(value, ids)
            case "spans":
                state.spans.restore(value, ids)
            case "completions":
                state.completions.restore(value, ids)
            case "waiting":
                orders, arrivals, suspects = value
                state.queues.restore(orders, arrivals)
                state.suspects.update(suspects)
            case "workers":
                state.workers.update((row[0], Worker(*row)) for row in value)
            case "consumers" | "forgotten":
                getattr(state, name).update((consumer, unpacked(Consumer, known)) for consumer, known in value.items())
            case "groups":
                state.groups.restore(value)
            case "resources":
                state.resources.restore(value)
            case "session":
                session = unpacked(Session, value)
                state.sessions[session.session_id] = session
                if session.deleting:
                    state.deleting[session.session_id] = session
            case "changes":
                state.changes.restore(value[0], (Change(*row) for row in value[1]))
            case "disposable":
                state.disposable_released.fill(value[0])
                state.disposable_read.fill(value[1])
            case "touched":
                state.touched.update(dict.fromkeys(value))
            case "gates":
                state.gates.restore(value)
            case "feeds":
                state.feeds.restore(value)
            case "evaluations":
                state.evaluations.restore(value)
            case "meters":
                state.meters.restore(value)
            case _:
                raise KeyError(name)
    for rollout_id, made in zip(ids, chunk_of, strict=True):
        entry = state.entries[rollout_id] = Entry.__new__(Entry)
        entry.chunk = made
    if state.evaluations.are_used:
        active = (rollout_id for status in ACTIVE for rollout_id in state.indexes.find(("status", status)))
        state.evaluations.gather(state.groups, state.completions, active)


# -- chunks ------------------------------------------------------------------------------------------------------------


CHUNK_ROLLOUTS = 128

Column = list[Any]

#: Columns of few different texts or numbers, which are kept once.
REPEATED = frozenset(
    {"mode", "resources_id", "status", "config", "group_id", "queue", "priority"}
    | {"sequence_id", "worker_id", "outcome", "error", "resources_version", "policy_version"}
)


@dataclass(slots=True, eq=False, repr=False)
class LazyChunk:
    """Some rollouts of a snapshot, in columns until one of them is needed."""

    packed: bytes
    read: Callable[[bytes], dict[str, Any]]
    members: Iterable[int]  # places of its rollouts among `ids`
    ids: list[str]
    entries: dict[str, Entry]  # in which theirs will be

    def load(self) -> None:
        """Fill the entries of all its rollouts."""
        ids = [self.ids[member] for member in self.members]
        entries = [self.entries[rollout_id] for rollout_id in ids]  # whoever deletes one looks at it first
        for entry in entries:
            del entry.chunk
        fill(entries, ids, self.read(self.packed))


#: Fields of an entry that have columns of their own: records, and what is kept for each attempt.
_APART = frozenset({"rollout", "attempts", "clocks", "holders"})
_FIELDS = tuple(field for field in snapshot_fields(Entry) if field.name not in _APART)

# How a column stands: rows that are not as usual; the different values and which row has which; all values.
_SPARSE, _REPEATS, _DENSE = range(3)


#: Fields that have columns, without the rollout's id, which is the entry's.
NAMES: dict[type, list[str]] = {
    kind: [field.name for field in snapshot_fields(kind) if field.name != "rollout_id"]
    for kind in (Rollout, Attempt, AttemptClock)
}


def column(values: Column, usual: Any = None, *, repeats: bool = False) -> Any:
    """The values of one field; None if all are as usual."""
    other = [(row, value) for row, value in enumerate(values) if value != usual or type(value) is not type(usual)]
    if not other:
        return None
    if 3 * len(other) < len(values):
        return _SPARSE, other
    if repeats:
        numbers: dict[Any, int] = {}
        rows = bytes([numbers.setdefault(value, len(numbers)) & 255 for value in values])
        if len(numbers) <= 256:
            return _REPEATS, list(numbers), rows
    return _DENSE, values


def expanded(packed_column: Any, length: int, usual: Any = None) -> Column:
    """The values of a column; `usual` where there is none."""
    if packed_column is None:
        return [usual] * length
    kind, values, *rows = packed_column
    if kind == _DENSE:
        return list(values)
    if kind == _REPEATS:
        return [values[row] for row in rows[0]]
    found = [usual] * length
    for row, value in values:
        found[row] = value
    return found


def _record_columns(records: list[Any], kind: type) -> dict[str, Any]:
    return {
        name: column([getattr(record, name) for record in records], repeats=name in REPEATED) for name in NAMES[kind]
    }


def _record_fields(columns_: dict[str, Any], kind: type, length: int) -> list[Column]:
    return [expanded(columns_.get(name), length) for name in NAMES[kind]]


def columns(entries: list[Entry]) -> dict[str, Any]:
    """Rollouts as columns, by field."""
    configs: dict[tuple[Any, ...], int] = {}
    rollouts = [e.rollout.evolve(config=configs.setdefault(_row(e.rollout.config), len(configs))) for e in entries]
    attempts = list(chain.from_iterable(entry.attempts for entry in entries))
    clocks = list(chain.from_iterable(entry.clocks for entry in entries))
    return {
        "configs": list(configs),
        "rollouts": _record_columns(rollouts, Rollout),
        "counts": [len(entry.attempts) for entry in entries],
        "attempts": _record_columns(attempts, Attempt),
        "clocks": _record_columns(clocks, AttemptClock),
        "holders": column([e.holders.get(a.attempt_id) for e in entries for a in e.attempts], repeats=True),
        "others": [(n, others) for n, e in enumerate(entries) if (others := _other_holders(e))],
        "entries": {f.name: _entry_column(f, entries) for f in _FIELDS},
    }


def _entry_column(field: Field, entries: list[Entry]) -> Any:
    values = [field.pack(getattr(entry, field.name)) for entry in entries]
    return column(values, _usual(field), repeats=type(values[0]) is str)


def _usual(field: Field) -> Any:
    return None if field.default is None else field.pack(field.default())


def _row(config: Config) -> tuple[Any, ...]:
    return tuple(tuple(value) if isinstance(value, list) else value for value in config.row())


def _other_holders(entry: Entry) -> list[tuple[str, str]]:
    """Holders of what is no attempt any more."""
    there = {attempt.attempt_id for attempt in entry.attempts}
    return [(attempt_id, session_id) for attempt_id, session_id in entry.holders.items() if attempt_id not in there]


def fill(entries: list[Entry], ids: list[str], chunk: dict[str, Any]) -> None:
    """Make entries of columns."""
    configs = list(map(Config.of, chunk["configs"]))
    counts = chunk["counts"]
    rollouts = list(map(Rollout, ids, *_record_fields(chunk["rollouts"], Rollout, len(ids))))
    owners = [i for i, count in zip(ids, counts, strict=True) for _ in range(count)]
    attempts = list(map(Attempt, owners, *_record_fields(chunk["attempts"], Attempt, len(owners))))
    clocks = list(map(AttemptClock, *_record_fields(chunk["clocks"], AttemptClock, len(owners))))
    held_by = expanded(chunk["holders"], len(owners))
    at = 0
    for entry, rollout, count in zip(entries, rollouts, counts, strict=True):
        rollout.config = configs[rollout.config]  # type: ignore[call-overload]  # its number among them
        end = at + count
        Entry.__init__(entry, rollout, 0, attempts=attempts[at:end], clocks=clocks[at:end])
        held = zip(entry.attempts, held_by[at:end], strict=True)
        entry.holders.update((attempt.attempt_id, holder) for attempt, holder in held if holder is not None)
        at = end
    for n, others in chunk["others"]:
        entries[n].holders.update(others)
    for field in _FIELDS:
        found = chunk["entries"].get(field.name)
        if found is None:
            continue  # as usual
        name, unpack = field.name, field.unpack
        for entry, value in zip(entries, expanded(found, len(entries), _usual(field)), strict=True):
            setattr(entry, name, unpack(value))


# -- digests -----------------------------------------------------------------------------------------------------------


def digest(state: State) -> str:
    """The digest of a state, 32 hexadecimal digits."""
    made = blake2b(digest_size=16)
    for part in parts(state):
        made.update(repr(part).encode("utf-8", "surrogatepass"))
        made.update(b"\n")
    return made.hexdigest()


def verify(state: State, count: int) -> str:
    """The digest of the `count` rollouts (and groups) that were touched longest ago; then they count as untouched.

    Two processes that follow the same steps touch the same rollouts in the same order, and find the same digest.
    """
    made = blake2b(digest_size=16)
    for rollout_id in list(islice(state.touched, count)):
        del state.touched[rollout_id]
        entry = state.entries.get(rollout_id)
        found = _entry(state, entry, is_brief=True) if entry else None
        made.update(repr((rollout_id, found)).encode("utf-8", "surrogatepass"))
    for group_id in list(islice(state.groups.touched, count)):
        del state.groups.touched[group_id]
        group = state.groups.get(group_id)
        made.update(repr((group_id, group and _plain(shown(group)))).encode("utf-8", "surrogatepass"))
    sums = (
        len(state.entries), len(state.queues), len(state.sessions), len(state.workers), state.spans.count,
        state.changes.last, state.completions.last, state.rollouts_made, state.attempts_made, state.payload_bytes,
    )  # fmt: skip
    made.update(repr(sums).encode())
    if state.gates.are_used:
        made.update(repr(state.gates.sums()).encode())
    if len(state.feeds):
        made.update(repr(state.feeds.sums()).encode())
    if state.evaluations.are_used:
        made.update(repr(state.evaluations.sums()).encode())
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
    for group_id in sorted(state.groups.by_id):
        yield "group", group_id, _plain(shown(state.groups.by_id[group_id]))
    yield "resources", [_plain(held) for held in state.resources.everything()]
    yield "objects", state.resources.shown()
    yield "latest resources", state.resources.latest_id, state.resources.policy_version
    yield "span counters", sorted(state.spans.counters())
    for session_id in sorted(state.sessions):
        yield "session", session_id, _plain(shown(state.sessions[session_id]))
    yield "changes", state.changes.last, [_plain(change) for change in state.changes]
    yield "completions", state.completions.last, list(state.completions.after(None))
    if state.gates.are_used:
        yield "gates", state.gates.shown()
    if len(state.feeds):
        yield "feeds", _plain(state.feeds.shown())
    if state.evaluations.are_used:
        yield "evaluations", _plain(state.evaluations.shown())


#: Fields of an entry that hold records, of whose long values only what tells them apart counts.
_RECORDS = frozenset({"rollout", "attempts"})
_SPAN = tuple(field.name for field in digest_fields(Span) if field.name != "rollout_id")
_SPAN_BRIEF = ("attempt_id", "sequence_id", "span_id")  # the rest of a span never changes


def _entry(state: State, entry: Entry, *, is_brief: bool = False) -> list[Any]:
    """A rollout; `is_brief` leaves out what never changes of a span."""
    rollout_id = entry.rollout.rollout_id
    of_span = attrgetter(*(_SPAN_BRIEF if is_brief else _SPAN))
    return [
        shown(entry.rollout, _content),
        [shown(attempt, _content) for attempt in entry.attempts],
        shown(entry, _plain, _RECORDS),
        [of_span(span) for span in state.spans.of(rollout_id)],
        rollout_id in state.spans.evicted,
    ]


_BRIEF = frozenset({str, int, float, bool, type(None)})


def _content(field: Any) -> Any:
    """A field as a value; of long ones only what tells them apart."""
    if type(field) in _BRIEF:
        return field
    if isinstance(field, (bytes, Payload)):
        data = field if isinstance(field, bytes) else field.data
        return len(data), crc32(data)
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
