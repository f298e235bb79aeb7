"""What comes in with operations, as plain values: requests, changes, filters, rows of spans.

Each is an annotation of which a schema is made (`schema`), so that what it does not name is refused.
Not here: the arguments of each verb (`verbs`), what is kept of them (`records`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Required, TypedDict

from raystore.core.lifecycle import AttemptStatus as AttemptStatus
from raystore.core.lifecycle import Outcome as Outcome
from raystore.core.lifecycle import RolloutStatus as RolloutStatus
from raystore.core.lifecycle import Trainable as Trainable
from raystore.core.lifecycle import WorkerStatus as WorkerStatus
from raystore.core.payload import Payload
from raystore.core.schema import Id, Positive, Row, Rule, Seconds, Tags, Text, Value

Mode = Literal["train", "val", "test"]

#: A configuration in field order: timeout, silence, number of attempts, what is tried again.
ConfigRow = tuple[Seconds | None, Seconds | None, Positive, list[AttemptStatus]]
Priority = Annotated[int, Rule(f"{-(2**53)} <= {{v}} <= {2**53}", "a whole number of at most 53 bits")]
Time = Annotated[float, Rule("abs({v}) < 1e18", "a time in seconds")]


#: What stands for the content of a value (`payload.digest_of_bytes`, or the caller's own).
Digest = Annotated[bytes, Rule("len({v}) == 17 and {v}[0] in (3, 4)", "a digest of a value")]


class Request(TypedDict, total=False):
    """What makes a rollout."""

    input: Required[Value]
    mode: Mode | None
    resources_id: Id | None
    config: ConfigRow | None
    metadata: Value
    rollout_id: Id | None
    group_id: Id | None
    queue: Id
    priority: Priority
    tags: Tags | None
    digests: tuple[Digest, Digest]  # of input and metadata, where a rollout_id is given


class RolloutChanges(TypedDict, total=False):
    """What is set of a rollout."""

    input: Value
    mode: Mode | None
    resources_id: Id | None
    status: RolloutStatus
    config: ConfigRow
    metadata: Value


class AttemptChanges(TypedDict, total=False):
    """What is set of an attempt."""

    status: AttemptStatus
    worker_id: Id | None
    last_heartbeat_time: Time
    metadata: Value


class FinalChanges(AttemptChanges, total=False):
    """What is set of an attempt by the one who ran it, when it ends."""

    outcome: Outcome
    error: Text
    died: bool


class WorkerChanges(TypedDict, total=False):
    """What is set of a worker."""

    heartbeat_stats: Value


class Filters(TypedDict, total=False):
    """Which rollouts; what is None or absent says nothing."""

    group_id: Id | None
    tags: Tags | None
    queue: Id | None
    mode: Mode | None


class Must(Filters, total=False):
    """Which rollouts of a query, whatever its other filters say."""

    worker_id: Id | None


class SpanTexts(TypedDict, total=False):
    """Texts of the index of a span, or parts of them."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str


_SPAN_ID = Annotated[str, Rule("{v}", "text of at least 1 character")]

#: A span without rollout and attempt, in the order of `records.Span`. Number -1: the next one; size -1: to be measured.
SpanRow = Annotated[
    list[Any],
    Row(
        (
            ("sequence_id", Annotated[int, Rule(f"-1 <= {{v}} < {2**62}", "a number from 0 to 2**62, or -1")]),
            ("span_id", _SPAN_ID),
            ("trace_id", _SPAN_ID),
            ("parent_id", str | None),
            ("name", str),
            ("start_time", float | None),
            ("end_time", float | None),
            ("reward", float | None),
            ("body", bytes | Payload),
            ("size", Annotated[int, Rule(f"-1 <= {{v}} < {2**50}", "a size in bytes, or -1")]),
        )
    ),
]
