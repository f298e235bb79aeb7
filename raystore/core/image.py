"""A whole state as plain values, section by section, and back.

What `restore` makes of an image is the state it was taken of, in everything that a replay must reproduce. Rollouts are
laid out in columns, many at a time, so that a million of them are read in seconds. Spans are not among them: a rollout
says where the index of its spans is, and it is read when somebody asks for it (`spans`).
Not here: the file (`journal.snapshot`), batches under way (`journal.replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import chain, islice
from typing import Any

from raystore.core.line import Kept, Line
from raystore.core.records import Attempt, Change, Config, Record, Rollout, Worker
from raystore.core.state import NOBODY, AttemptClock, Chain, Consumer, Entry, Session, State, Taken
from raystore.errors import StoreError, from_record, to_record

ROLLOUTS_AT_ONCE = 10_000

Column = list[Any]

_PLAIN = ("paused", "rollouts_made", "attempts_made", "attempt_count", "payload_bytes", "drained", "evicted_rollouts")


def _names(kind: type[Record]) -> list[str]:
    return [field.name for field in fields(kind)]  # type: ignore[arg-type]


_CONFIG = _names(Rollout).index("config")
#: Columns of few different texts or numbers, which are kept once.
_REPEATED = frozenset(
    {"mode", "resources_id", "status", "config", "group_id", "queue", "priority"}
    | {"sequence_id", "worker_id", "outcome", "error", "resources_version", "policy_version", "session_id"}
)


def image(state: State, place_of: Callable[[str], int]) -> Iterator[tuple[str, Any]]:
    """The sections of a state; `place_of` says where the spans of a rollout are (0: there are none)."""
    yield "plain", [getattr(state, name) for name in _PLAIN]
    entries = iter(state.entries.values())
    configs: dict[tuple[Any, ...], int] = {}
    while some := list(islice(entries, ROLLOUTS_AT_ONCE)):
        known = len(configs)
        columns = _entries(state, some, configs, place_of)
        yield "configs", list(islice(configs, known, None))
        yield "entries", columns
    yield "waiting", (state.queues.orders(), state.queues.arrivals, list(state.suspects))
    yield "workers", [worker.row() for worker in state.workers.values()]
    yield "consumers", {name: _consumer(known) for name, known in state.consumers.items()}
    yield "resources", state.resources.image()
    yield "spans", state.spans.image()
    for session in state.sessions.values():
        yield "session", _session(session)
    yield "changes", (state.changes.last, [change.row() for change in state.changes])
    yield "completions", state.completions.image()
    yield "disposable", (list(state.disposable_released), list(state.disposable_read))
    yield "touched", list(state.touched)


def restore(state: State, sections: Iterator[tuple[str, Any]]) -> None:
    """Fill an empty state from the sections of an image."""
    configs: list[Config] = []
    queues: list[Any] = []
    known: dict[str, Callable[[Any], None]] = {
        "plain": lambda values: _restore_plain(state, values),
        "configs": lambda rows: configs.extend(_config(row) for row in rows),
        "entries": lambda columns: _restore_entries(state, columns, configs),
        "waiting": queues.append,
        "workers": lambda rows: state.workers.update((row[0], Worker(*row)) for row in rows),
        "consumers": lambda found: state.consumers.update((n, _restored_consumer(c)) for n, c in found.items()),
        "resources": state.resources.restore,
        "spans": state.spans.restore,
        "session": lambda found: _restore_session(state, found),
        "changes": lambda found: state.changes.restore(found[0], (Change(*row) for row in found[1])),
        "completions": state.completions.restore,
        "disposable": lambda found: _restore_disposable(state, *found),
        "touched": lambda ids: state.touched.update(dict.fromkeys(ids)),
    }
    for name, value in sections:
        known[name](value)
    for waiting, arrivals, suspects in queues:
        state.queues.restore(waiting, arrivals)
        state.suspects.update(dict.fromkeys(suspects))
    state.guard_all()


def _restore_plain(state: State, values: list[Any]) -> None:
    for name, value in zip(_PLAIN, values, strict=True):
        setattr(state, name, value)


# -- rollouts ----------------------------------------------------------------------------------------------------------


def _config_row(config: Config) -> tuple[Any, ...]:
    timeout, unresponsive, max_attempts, retry_condition = config.row()
    return timeout, unresponsive, max_attempts, tuple(retry_condition)


def _config(row: list[Any]) -> Config:
    return Config(row[0], row[1], row[2], tuple(row[3]))


def _repeated(column: Column) -> tuple[Column, bytes | list[int]]:
    """A column as its different values and, for each row, which of them."""
    numbers: dict[Any, int] = {}
    rows = [numbers.setdefault(value, len(numbers)) for value in column]
    return list(numbers), bytes(rows) if len(numbers) <= 256 else rows


def _columns(records: list[Any], kind: type[Record], without: int) -> list[Any]:
    """The fields of records of one kind, each as a column, from the `without`th on."""
    names = _names(kind)[without:]
    columns = list(zip(*(record.row()[without:] for record in records), strict=True)) or [()] * len(names)
    return [_repeated(list(c)) if name in _REPEATED else c for name, c in zip(names, columns, strict=True)]


def _fields(columns: list[Any], kind: type[Record], without: int) -> list[Any]:
    names = _names(kind)[without:]
    return [_expanded(c) if name in _REPEATED else c for name, c in zip(names, columns, strict=True)]


def _expanded(column: Any) -> Column:
    values, rows = column
    return [values[0]] * len(rows) if len(values) == 1 else [values[row] for row in rows]


def _entries(
    state: State, entries: list[Entry], configs: dict[tuple[Any, ...], int], place_of: Callable[[str], int]
) -> list[Any]:
    ids = [entry.rollout.rollout_id for entry in entries]
    rollouts = [
        entry.rollout.evolve(config=configs.setdefault(_config_row(entry.rollout.config), len(configs)))
        for entry in entries
    ]
    attempts = list(chain.from_iterable(entry.attempts for entry in entries))
    clocks = list(chain.from_iterable(entry.clocks for entry in entries))
    return [
        _columns(rollouts, Rollout, 0),
        [len(entry.attempts) for entry in entries],
        _columns(attempts, Attempt, 1),
        [clock.start for clock in clocks],
        [clock.beat for clock in clocks],
        [entry.number for entry in entries],
        [entry.order[1] if entry.order else 0 for entry in entries],  # the priority is the rollout's, or was
        [entry.order[0] if entry.order else 0 for entry in entries],
        [entry.bytes for entry in entries],
        _repeated([entry.former for entry in entries]),
        [state.spans.newest_number(i) for i in ids],
        [place_of(i) for i in ids],
        _holders(entries),
        # what most rollouts do not have
        [(n, e.given) for n, e in enumerate(entries) if e.given is not None],
        [n for n, e in enumerate(entries) if e.released],
        [n for n, e in enumerate(entries) if e.suspect],
        [(n, e.deliveries) for n, e in enumerate(entries) if e.deliveries],
        [(n, _taken(e)) for n, e in enumerate(entries) if e.taken],
        [n for n, i in enumerate(ids) if i in state.spans.evicted],
    ]


def _taken(entry: Entry) -> list[Any]:
    return [(name, taken.batch, taken.step, taken.note, taken.is_durable) for name, taken in entry.taken.items()]


def _holders(entries: list[Entry]) -> list[Any]:
    """Of each attempt in order its holder, and what else there is."""
    usual = _repeated([e.holders.get(a.attempt_id) for e in entries for a in e.attempts])
    others = [
        (n, [(i, s) for i, s in e.holders.items() if all(i != a.attempt_id for a in e.attempts)])
        for n, e in enumerate(entries)
        if len(e.holders) > len(e.attempts)
    ]
    return [usual, others]


def _restore_entries(state: State, columns: list[Any], configs: list[Config]) -> None:
    (
        rollout_columns, counts, attempt_columns, starts, beats, numbers, arrivals, priorities, sizes, formers,
        newest, places, (holders, other_holders), given, released, suspects, deliveries, taken, evicted,
    ) = columns  # fmt: skip
    fields = _fields(rollout_columns, Rollout, 0)
    fields[_CONFIG] = [configs[number] for number in fields[_CONFIG]]
    rollouts = list(map(Rollout, *fields))
    ids = fields[0]
    owners = ids if counts == [1] * len(ids) else [i for i, n in zip(ids, counts, strict=True) for _ in range(n)]
    attempts = list(map(Attempt, owners, *_fields(attempt_columns, Attempt, 1)))
    clocks = list(map(_clock, starts, beats))
    held_by = _expanded(holders)
    entries: list[Entry] = []
    at = 0
    rows = zip(rollouts, counts, numbers, arrivals, priorities, sizes, _expanded(formers), strict=True)
    for rollout, count, number, arrival, priority, size, former in rows:
        entry = Entry(rollout, number=number, given=None, size=size)
        entry.former = former
        if arrival:
            entry.order = (priority, arrival)
        if count == 1:
            entry.attempts.append(attempts[at])
            entry.clocks.append(clocks[at])
            if held_by[at] is not None:
                entry.holders[attempts[at].attempt_id] = held_by[at]
        else:
            entry.attempts, entry.clocks = attempts[at : at + count], clocks[at : at + count]
            entry.holders = {
                a.attempt_id: s for a, s in zip(entry.attempts, held_by[at : at + count], strict=True) if s is not None
            }
        at += count
        entries.append(entry)
    for n, pairs in other_holders:
        entries[n].holders.update(pairs)
    for n, arguments in given:
        entries[n].given = tuple(arguments)
    for n in released:
        entries[n].released = True
    for n in suspects:
        entries[n].suspect = True
    for n, count in deliveries:
        entries[n].deliveries = count
    for n, known in taken:
        entries[n].taken = {row[0]: _restored_taken(row) for row in known} or NOBODY
    state.entries.update(zip(ids, entries, strict=True))
    state.spans.restore_rollouts(ids, newest, places, [ids[n] for n in evicted])
    state.indexes.enter_all(zip(ids, rollouts, (entry.latest for entry in entries), strict=True))


def _clock(start: float, beat: float | None) -> AttemptClock:
    clock = AttemptClock(start)
    clock.beat = beat
    return clock


def _restored_taken(row: list[Any]) -> Taken:
    _, batch, step, note, is_durable = row
    taken = Taken(batch, step, note=note)
    taken.is_durable = is_durable
    return taken


def _restore_disposable(state: State, released: list[str], read: list[str]) -> None:
    state.disposable_released.update(dict.fromkeys(released))
    state.disposable_read.update(dict.fromkeys(read))


# -- the rest ----------------------------------------------------------------------------------------------------------


def _consumer(known: Consumer) -> list[Any]:
    return [
        known.cursor, list(known.returned), known.made, known.open,
        list(known.batches.items()), list(known.steps.items()), known.checkpoint,
    ]  # fmt: skip


def _restored_consumer(row: list[Any]) -> Consumer:
    known = Consumer()
    known.cursor, returned, known.made, known.open, batches, steps, known.checkpoint = row
    known.returned, known.batches, known.steps = dict.fromkeys(returned), dict(batches), dict(steps)
    return known


def _session(session: Session) -> list[Any]:
    line = session.line
    chains = [
        (number, chain.notes, to_record(chain.refusal) if isinstance(chain.refusal, StoreError) else None)
        for number, chain in session.chains.items()
    ]
    return [
        session.session_id, session.eternal, session.last_heard, session.ended_at,
        list(session.claims.items()), list(session.held), list(session.lost.items()), session.notices, chains,
        [line.expected, line.answered, list(line.ahead), list(line.kept.items()), list(line.handed.items())],
    ]  # fmt: skip


def _restore_session(state: State, row: list[Any]) -> None:
    session_id, eternal, last_heard, ended_at, claims, held, lost, notices, chains, line = row
    session = state.sessions[session_id] = Session(session_id, age=last_heard, eternal=eternal)
    session.ended_at = ended_at
    session.claims = {tuple(key): since for key, since in claims}
    session.held = dict.fromkeys(map(tuple, held))
    session.lost = {tuple(key): attempt for key, attempt in lost}
    session.notices = [tuple(notice) for notice in notices]
    for number, notes, refusal in chains:
        kept = session.chains[number] = Chain()
        kept.notes = notes
        error = from_record(*refusal) if refusal is not None else None
        kept.refusal = error if isinstance(error, StoreError) else None
    session.line = _restored_line(line)


def _restored_line(row: list[Any]) -> Line:
    line = Line()
    line.expected, line.answered, ahead, kept, handed = row
    line.ahead = set(ahead)
    line.kept = {sequence: Kept(first_ticket, list(replies)) for sequence, (first_ticket, replies) in kept}
    line.handed = {ticket: [tuple(key) for key in keys] for ticket, keys in handed}
    return line
