"""The records the core keeps: light, slotted, replaced and never edited; and how a class declares its fields.

What was handed out stays true, because a change makes a new record (`evolve`). A record crosses to a client as its
`row()`, a tuple in field order, and comes back with `Class(*row)`.
A field is named once, at its class. `declare` says of it whether a snapshot holds it, whether a replay must reproduce
it, and how its value becomes plain data; snapshots and digests follow from that. A field that is not given to
`__init__` is in neither.
Not here: validation and the public pydantic classes (`raystore.types.contract`); a test holds the field names equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Sequence
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any, NamedTuple, Self, TypeVar, dataclass_transform

from raystore.core.payload import OnDisk, Opaque

T = TypeVar("T", bound="type[Record]")

Turn = Callable[[Any], Any]


def _same(value: Any) -> Any:
    return value


@dataclass(slots=True, frozen=True)
class Field:
    """One declared field."""

    name: str
    default: Callable[[], Any] | None  # None: whoever makes the record gives it
    pack: Turn = _same  # a value to plain data,
    unpack: Turn = _same  # and back
    shows: Turn = _same  # how it stands in a digest, if that is not what it is
    stored_as: str = ""  # its name in a snapshot
    in_snapshot: bool = True
    in_digest: bool = True
    in_rows: bool = True  # else it is one of the last, and a row ends behind the last of these that is not empty
    is_later: bool = False  # digests were recorded before it was there: they show it only if it is not as usual


def declare(default: Any = MISSING, *, make: Callable[[], Any] | None = None, **how: Any) -> Any:
    """A field of a record of the state; `how` is what `Field` has beyond name and default.

    `make` makes a default that is not to be shared.
    """
    if make is not None:
        return dataclasses.field(default_factory=make, metadata=how)
    return dataclasses.field(default=default, metadata=how)


@cache
def declared(cls: Any) -> tuple[Field, ...]:
    """The fields of a class, in the order of their declaration."""
    return tuple(
        Field(field.name, _default(field), **{"stored_as": field.name, **field.metadata})
        for field in dataclasses.fields(cls)
        if field.init
    )


def _default(field: dataclasses.Field[Any]) -> Callable[[], Any] | None:
    if field.default_factory is not MISSING:
        return field.default_factory
    return None if field.default is MISSING else lambda: field.default


@cache
def snapshot_fields(cls: Any) -> tuple[Field, ...]:
    """The fields that a snapshot holds."""
    return tuple(field for field in declared(cls) if field.in_snapshot)


@cache
def digest_fields(cls: Any) -> tuple[Field, ...]:
    """The fields that a replay must reproduce."""
    return tuple(field for field in declared(cls) if field.in_digest)


def packed(record: Any) -> dict[str, Any]:
    """A record as plain data, by field."""
    kind: Any = type(record)
    return {field.stored_as: field.pack(getattr(record, field.name)) for field in snapshot_fields(kind)}


def unpacked(cls: Any, values: dict[str, Any]) -> Any:
    """A record from plain data: a missing field takes its default, an unknown one is ignored."""
    made: Any = object.__new__(cls)
    for field in declared(cls):
        if field.stored_as in values and field.in_snapshot:
            setattr(made, field.name, field.unpack(values[field.stored_as]))
        elif field.default is not None:
            setattr(made, field.name, field.default())
    return made


def shown(record: Any, content: Turn = _same, without: Container[str] = ()) -> list[Any]:
    """What of a record a replay must reproduce, `without` some fields; `content` says how a value stands there."""
    made: list[Any] = []
    kind: Any = type(record)
    for field in digest_fields(kind):
        if field.name in without:
            continue
        value = getattr(record, field.name)
        if not field.is_later:
            made.append(content(field.shows(value)))
        elif field.default is None or value != field.default():
            made.append((field.name, content(field.shows(value))))
    return made


def pairs(mapping: dict[Any, Any]) -> list[Any]:
    """A dictionary whose keys need not be text, as plain data."""
    return list(mapping.items())


# -- records -----------------------------------------------------------------------------------------------------------


class Record:
    """Base of all records; `record` fills in the two methods for the fields of each class."""

    __slots__ = ()

    def evolve(self, **changes: Any) -> Self:
        """A copy of this record with some fields changed."""
        raise TypeError("apply @record")

    def row(self) -> tuple[Any, ...]:
        """The field values in order, for the wire."""
        raise TypeError("apply @record")


@dataclass_transform()
def record(cls: T) -> T:
    """Make a slotted dataclass with `evolve` and `row` written out field by field.

    Written out because `dataclasses.replace` costs 2 µs and these run several times per operation.
    """
    made = dataclass(slots=True)(cls)
    kind: Any = made
    names = [field.name for field in dataclasses.fields(kind)]
    source = ["def evolve(self, **changes):", "    new = object.__new__(type(self))"]
    source += [f"    new.{name} = self.{name}" for name in names]
    source += ["    for name, value in changes.items():", "        setattr(new, name, value)", "    return new"]
    source += ["def row(self):"]
    always = sum(field.in_rows for field in declared(kind))  # those that are not come last
    for number in range(always, len(names)):
        if_all_are_empty = " or ".join(f"self.{name}" for name in names[number:])
        row = ", ".join(f"self.{name}" for name in names[:number])
        source += [f"    if not ({if_all_are_empty}):", f"        return ({row},)"]
    source += [f"    return ({', '.join(f'self.{name}' for name in names)},)"]
    namespace: dict[str, Any] = {}
    exec("\n".join(source), namespace)
    made.evolve = namespace["evolve"]  # type: ignore[method-assign]
    made.row = namespace["row"]  # type: ignore[method-assign]
    return made  # type: ignore[return-value]


class RetryRule(NamedTuple):
    """How often a rollout is tried again after attempts with one outcome, and after which delays."""

    outcome: str
    max_retries: int
    backoff_seconds: float  #: before the first retry
    factor: float  #: by which the delay grows from one retry to the next
    max_backoff_seconds: float | None  #: it grows no longer than this; None: without a bound
    jitter: float  #: the share of the delay that chance may take off


@record
class Config(Record):
    """When an attempt is given up, and how often it is tried again."""

    timeout_seconds: float | None = None
    unresponsive_seconds: float | None = None
    max_attempts: int = 1
    retry_condition: tuple[str, ...] = ()
    #: At most one for each outcome. Rows of configurations are in journals, and repeated requests are compared by them.
    retry_rules: tuple[RetryRule, ...] = declare((), in_rows=False)

    @classmethod
    def of(cls, row: Sequence[Any]) -> Config:
        """A configuration of its row."""
        rules = tuple(RetryRule(*rule) for rule in row[4]) if len(row) > 4 else ()
        return cls(row[0], row[1], row[2], tuple(row[3]), rules)


@record
class Rollout(Record):
    """One task for an agent, and where it stands."""

    rollout_id: str
    input: Opaque
    start_time: float
    end_time: float | None
    mode: str | None
    resources_id: str | None
    status: str
    config: Config
    metadata: Opaque
    group_id: str | None
    queue: str
    priority: int
    tags: dict[str, Any]
    reward: float | None
    requeued_from: str | None = declare(None, is_later=True)


@record
class Attempt(Record):
    """One execution of a rollout."""

    rollout_id: str
    attempt_id: str
    sequence_id: int
    start_time: float
    end_time: float | None
    status: str
    worker_id: str | None
    last_heartbeat_time: float | None = None
    metadata: Opaque = None
    outcome: str | None = None
    error: str | None = None
    resources_version: int | None = None
    policy_version: int | None = None
    reward: float | None = None
    #: The attempt whose saved state it goes on from.
    resumed_from: str | None = declare(None, in_rows=False, is_later=True)


@record
class Group(Record):
    """Samples of one input that are trained on together, and where they stand."""

    group_id: str
    input: Opaque
    n: int
    min_size: int | None
    spare: int
    replace: int
    start_time: float
    end_time: float | None
    deadline_time: float | None
    status: str
    why: str | None
    mode: str | None
    queue: str
    priority: int
    tags: dict[str, Any]
    members: list[str]


@record
class Worker(Record):
    """What is known of one runner."""

    worker_id: str
    status: str = "unknown"
    heartbeat_stats: Opaque = None
    last_heartbeat_time: float | None = None
    last_dequeue_time: float | None = None
    last_busy_time: float | None = None
    last_idle_time: float | None = None
    current_rollout_id: str | None = None
    current_attempt_id: str | None = None


@record
class Resources(Record):
    """One immutable version of a set of named resources."""

    resources_id: str
    version: int
    create_time: float
    update_time: float
    policy_version: int | None
    resources: Opaque
    holds_objects: bool


@record
class Span(Record):
    """The index of one span beside its encoded body."""

    rollout_id: str
    attempt_id: str
    sequence_id: int
    span_id: str
    trace_id: str
    parent_id: str | None
    name: str
    start_time: float | None
    end_time: float | None
    reward: float | None
    body: Opaque | OnDisk = declare(in_digest=False)  # whether it is in memory is no part of what is replayed
    size: int = declare(in_digest=False)


@record
class Change(Record):
    """One thing the core did, in the order in which it did them."""

    sequence: int
    time: float
    kind: str
    rollout_id: str | None
    attempt_id: str | None
    detail: dict[str, Any] | None


@dataclass(slots=True)
class Many:
    """A page of records with the number of all matches; long ones are sent in parts."""

    items: list[Any]
    total: int
