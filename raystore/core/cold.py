"""Rollouts as they stand in a snapshot: some at a time, laid out in columns, and made into entries when one is needed.

A store of a million rollouts starts in seconds, since most of them are finished and nobody asks for them: their
entries are empty, and the first look at a field of one fills it and its neighbours. A chunk of which nobody needed
anything goes into the next snapshot as it is.
Not here: tables and indexes, which are there from the start (`image`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from itertools import chain
from typing import Any

from raystore.core.records import Attempt, Config, Record, Rollout
from raystore.core.state import NOBODY, AttemptClock, Entry, Taken

AT_ONCE = 128  #: rollouts of a chunk

Column = list[Any]

#: Columns of few different texts or numbers, which are kept once.
_REPEATED = frozenset(
    {"mode", "resources_id", "status", "config", "group_id", "queue", "priority"}
    | {"sequence_id", "worker_id", "outcome", "error", "resources_version", "policy_version"}
)


class Chunk:
    """Some rollouts of a snapshot, until one of them is needed."""

    __slots__ = ("_entries", "_ids", "_members", "_read", "packed")

    def __init__(
        self,
        packed: bytes,
        read: Callable[[bytes], list[Any]],
        members: Iterable[int],
        ids: list[str],
        entries: dict[str, Entry],
    ) -> None:
        """`members` are the places of its rollouts among `ids`; their entries will be in `entries`."""
        self.packed = packed
        self._read, self._members, self._ids, self._entries = read, members, ids, entries

    def thaw(self) -> None:
        """Fill the entries of all its rollouts."""
        ids = [self._ids[member] for member in self._members]
        entries = [self._entries[rollout_id] for rollout_id in ids]  # whoever deletes one looks at it first
        for entry in entries:
            del entry.cold
        fill(entries, ids, self._read(self.packed))


def _names(kind: type[Record]) -> list[str]:
    return [field.name for field in fields(kind)][1:]  # type: ignore[arg-type]  # without the rollout's id


_NAMES: dict[type[Record], list[str]] = {kind: _names(kind) for kind in (Rollout, Attempt)}
_CONFIG = _NAMES[Rollout].index("config")


def _repeated(column: Column) -> tuple[Column, bytes]:
    """A column as its different values and, for each row, which of them."""
    numbers: dict[Any, int] = {}
    rows = bytes([numbers.setdefault(value, len(numbers)) & 255 for value in column])
    return (list(numbers), rows) if len(numbers) <= 256 else (column, b"")


def _expanded(column: Any) -> Column:
    values, rows = column
    if len(values) == 1:
        return list(values) * (len(rows) or 1)
    return [values[row] for row in rows] if rows else list(values)


def _columns(records: list[Any], kind: type[Record]) -> list[Any]:
    names = _NAMES[kind]
    columns = list(zip(*(record.row()[1:] for record in records), strict=True)) or [()] * len(names)
    return [_repeated(list(c)) if name in _REPEATED else c for name, c in zip(names, columns, strict=True)]


def _fields(columns: list[Any], kind: type[Record]) -> list[Any]:
    return [_expanded(c) if name in _REPEATED else c for name, c in zip(_NAMES[kind], columns, strict=True)]


def columns(entries: list[Entry]) -> list[Any]:
    """Rollouts as columns."""
    configs: dict[tuple[Any, ...], int] = {}
    rollouts = [e.rollout.evolve(config=configs.setdefault(_row(e.rollout.config), len(configs))) for e in entries]
    attempts = list(chain.from_iterable(entry.attempts for entry in entries))
    clocks = list(chain.from_iterable(entry.clocks for entry in entries))
    return [
        list(configs),
        _columns(rollouts, Rollout),
        [len(entry.attempts) for entry in entries],
        _columns(attempts, Attempt),
        [clock.start for clock in clocks],
        [clock.beat for clock in clocks],
        [entry.number for entry in entries],
        [entry.order for entry in entries],
        [entry.bytes for entry in entries],
        _repeated([entry.former for entry in entries]),
        _repeated([e.holders.get(a.attempt_id) for e in entries for a in e.attempts]),
        # what most rollouts do not have
        [(n, others) for n, e in enumerate(entries) if (others := _other_holders(e))],
        [(n, e.given) for n, e in enumerate(entries) if e.given is not None],
        [n for n, e in enumerate(entries) if e.released],
        [n for n, e in enumerate(entries) if e.suspect],
        [(n, e.deliveries) for n, e in enumerate(entries) if e.deliveries],
        [(n, _taken(e)) for n, e in enumerate(entries) if e.taken],
    ]


def _row(config: Config) -> tuple[Any, ...]:
    timeout, unresponsive, max_attempts, retry_condition = config.row()
    return timeout, unresponsive, max_attempts, tuple(retry_condition)


def _other_holders(entry: Entry) -> list[tuple[str, str]]:
    """Holders of what is no attempt any more."""
    if len(entry.holders) <= len(entry.attempts):
        return []
    there = {attempt.attempt_id for attempt in entry.attempts}
    return [(attempt_id, session_id) for attempt_id, session_id in entry.holders.items() if attempt_id not in there]


def _taken(entry: Entry) -> list[Any]:
    return [(name, taken.batch, taken.step, taken.note, taken.is_durable) for name, taken in entry.taken.items()]


def fill(entries: list[Entry], ids: list[str], chunk: list[Any]) -> None:
    """Make entries of columns."""
    (
        configs, rollout_columns, counts, attempt_columns, starts, beats, numbers, orders, sizes, formers, holders,
        other_holders, given, released, suspects, deliveries, taken,
    ) = chunk  # fmt: skip
    known = [Config(row[0], row[1], row[2], tuple(row[3])) for row in configs]
    rollout_fields = _fields(rollout_columns, Rollout)
    rollout_fields[_CONFIG] = [known[number] for number in rollout_fields[_CONFIG]]
    owners = [i for i, count in zip(ids, counts, strict=True) for _ in range(count)]
    attempts = list(map(Attempt, owners, *_fields(attempt_columns, Attempt)))
    held_by = _expanded(holders) if attempts else []
    at = 0
    rows = zip(
        entries, map(Rollout, ids, *rollout_fields), counts, numbers, orders, sizes, _expanded(formers), strict=True
    )
    for entry, rollout, count, number, order, size, former in rows:
        Entry.__init__(entry, rollout, number=number, given=None, size=size)
        entry.former = former
        entry.order = (order[0], order[1]) if order is not None else None
        for index in range(at, at + count):
            attempt, clock = attempts[index], AttemptClock(starts[index])
            clock.beat = beats[index]
            entry.attempts.append(attempt)
            entry.clocks.append(clock)
            if held_by[index] is not None:
                entry.holders[attempt.attempt_id] = held_by[index]
        at += count
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
    for n, takers in taken:
        entries[n].taken = {row[0]: _restored_taken(row) for row in takers} or NOBODY


def _restored_taken(row: list[Any]) -> Taken:
    _, batch, step, note, is_durable = row
    taken = Taken(batch, step, note=note)
    taken.is_durable = is_durable
    return taken
