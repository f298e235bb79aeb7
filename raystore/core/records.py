"""The records the core keeps: light, slotted, replaced and never edited.

What was handed out stays true, because a change makes a new record (`evolve`). A record crosses to a client as its
`row()`, a tuple in field order, and comes back with `Class(*row)`.
Not here: validation and the public pydantic classes (`raystore.types`); a test holds the field names equal.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar, dataclass_transform

from raystore.core.fields import declare
from raystore.core.payload import OnDisk, Opaque

T = TypeVar("T", bound="type[Record]")


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
    names = [field.name for field in fields(made)]  # type: ignore[arg-type]
    source = ["def evolve(self, **changes):", "    new = object.__new__(type(self))"]
    source += [f"    new.{name} = self.{name}" for name in names]
    source += ["    for name, value in changes.items():", "        setattr(new, name, value)", "    return new"]
    source += ["def row(self):", f"    return ({', '.join(f'self.{name}' for name in names)},)"]
    namespace: dict[str, Any] = {}
    exec("\n".join(source), namespace)
    made.evolve = namespace["evolve"]  # type: ignore[method-assign]
    made.row = namespace["row"]  # type: ignore[method-assign]
    return made  # type: ignore[return-value]


@record
class Config(Record):
    """When an attempt is given up, and how often it is tried again."""

    timeout_seconds: float | None = None
    unresponsive_seconds: float | None = None
    max_attempts: int = 1
    retry_condition: tuple[str, ...] = ()


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
    last_heartbeat_time: float | None
    metadata: Opaque
    outcome: str | None
    error: str | None
    resources_version: int | None
    policy_version: int | None
    reward: float | None


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
