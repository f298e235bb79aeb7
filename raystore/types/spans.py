"""Spans as users see them: OpenTelemetry's model with a rollout, an attempt and a sequence number; and their rewards.

Fields are those of agent-lightning 0.3.0. Trace ids have 32 hexadecimal digits and span ids 16; times are seconds since
the epoch.
"""

from __future__ import annotations

import json
import math
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import uuid4

from pydantic import BaseModel, Field, InstanceOf, PlainSerializer, PlainValidator

from raystore.errors import InvalidValueError, PayloadNotReadableError
from raystore.tracing import semconv
from raystore.values.models import Model, StoredModel
from raystore.values.plain import LEAVES, plain, scalar

__all__ = [
    "AttributeValue", "Event", "Link", "OtelResource", "Span", "SpanContext", "SpanCoreFields", "StatusCode",
    "TraceStatus", "estimate_model_size", "find_final_reward",
]  # fmt: skip

if TYPE_CHECKING:
    _Array = array[Any]
else:
    _Array = array  # subscriptable from 3.12 on

PackedArray = Annotated[InstanceOf[_Array], PlainSerializer(lambda packed: packed.tolist(), when_used="json")]
#: A value of an attribute; sequences and mappings may hold each other, packed arrays (`array.array`) are sequences.
AttributeValue = PackedArray | str | bool | int | float | bytes | Sequence[Any] | Mapping[str, Any] | None


def attributes_of(values: Any) -> dict[str, AttributeValue]:
    """A copy of a span's attributes in plain form (`values.plain`).

    Raises `InvalidValueError`, which names the attribute, for what has no plain form.
    """
    if not isinstance(values, Mapping):
        raise InvalidValueError("attributes", values, "a mapping from names to values")
    found = {}
    for name, value in values.items():
        if not isinstance(name, str):
            raise InvalidValueError("name of an attribute", name, "text")
        found[name] = value if type(value) in LEAVES else plain(f"attribute {name}", value)
    return found


#: Checked in Python: pydantic would try each member of the union, and make `1` of numpy's `True`.
Attributes = Annotated[dict[str, AttributeValue], PlainValidator(attributes_of, json_schema_input_type=dict[str, Any])]

StatusCode = Literal["UNSET", "OK", "ERROR"]

VIRTUAL_SPAN: str = "agentlightning.virtual"  #: name of a span that was made from attributes alone
_PRIMARY, (_OUTPUT, _OLDER_OUTPUT), _REWARD_SPANS = semconv.PRIMARY_REWARD, semconv.REWARD_OUTPUTS, semconv.REWARD_SPANS
_NANOSECONDS_ABOVE = 1e12  # a time larger than this can only be in nanoseconds


class TraceStatus(Model, extra="allow"):
    """How the operation of a span ended: OpenTelemetry's code, and the text of an error. Unknown fields are kept."""

    status_code: StatusCode
    description: str | None = None


class Event(Model, extra="allow"):
    """Something that happened within a span, at `timestamp` (seconds). Unknown fields are kept."""

    name: str
    attributes: dict[str, Any] = Field(default_factory=dict)
    timestamp: float | None = None


class SpanContext(Model, extra="allow"):
    """The identity of a span across processes. Unknown fields are kept.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16 hexadecimal digits.
        is_remote: whether the span belongs to another process.
        trace_state: W3C's `tracestate`, by vendor.
    """

    trace_id: str
    span_id: str
    is_remote: bool
    trace_state: dict[str, str]


class Link(Model, extra="allow"):
    """A reference to another span. Unknown fields are kept."""

    context: SpanContext
    attributes: dict[str, Any] | None = None


class OtelResource(Model):
    """OpenTelemetry's resource of a span: attributes of the process that made it (not a raystore resource)."""

    attributes: dict[str, Any]
    schema_url: str


class SpanCoreFields(Model):
    """The fields of a span that an agent must give; `Span.from_core_fields` fills in the others."""

    name: str
    status: TraceStatus
    attributes: Attributes
    start_time: float | None
    end_time: float | None


class Span(StoredModel, extra="allow", ser_json_bytes="base64"):  # not every attribute of bytes is text
    """One span of one attempt. Unknown fields are kept.

    Raises pydantic's `ValidationError` if a field is missing or wrong. Reading a field raises
    `PayloadNotReadableError` if the span holds an object whose class cannot be imported here.

    Attributes:
        rollout_id: the rollout.
        attempt_id: the attempt.
        sequence_id: its number in the rollout; spans are sorted by it.
        trace_id: 32 hexadecimal digits.
        span_id: 16 hexadecimal digits.
        parent_id: id of the enclosing span; None for the outermost.
        name: of the operation.
        status: how it ended.
        attributes: by name, in plain form.
        events: what happened within it.
        links: references to other spans.
        start_time: seconds; None if not known.
        end_time: seconds; None if not known.
        context: its identity, if known.
        parent: the identity of the enclosing span, if there is one and it is known.
        resource: OpenTelemetry's resource.
    """

    rollout_id: str
    attempt_id: str
    sequence_id: int
    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    status: TraceStatus
    attributes: Attributes
    events: list[Event]
    links: list[Link]
    start_time: float | None
    end_time: float | None
    context: SpanContext | None
    parent: SpanContext | None
    resource: OtelResource

    @classmethod
    def from_opentelemetry(cls, src: Any, rollout_id: str, attempt_id: str, sequence_id: int) -> Span:
        """A span from one of the OpenTelemetry SDK, whose times are in nanoseconds.

        What it holds beyond the model becomes an extra field (`kind`, `instrumentation_scope`, ...), as text if JSON
        cannot hold it. Raises `InvalidValueError` for an attribute that has no plain form.
        """
        context = _context(src.get_span_context() if hasattr(src, "get_span_context") else src.context)
        parent = _context(src.parent)
        known = {
            "rollout_id": rollout_id,
            "attempt_id": attempt_id,
            "sequence_id": sequence_id,
            "trace_id": context.trace_id if context else f"{0:032x}",
            "span_id": context.span_id if context else f"{0:016x}",
            "parent_id": parent.span_id if parent else None,
            "name": src.name,
            "status": TraceStatus(status_code=src.status.status_code.name, description=src.status.description),
            "attributes": attributes_of(src.attributes or {}),
            "events": [
                Event(name=e.name, attributes=dict(e.attributes or {}), timestamp=seconds(e.timestamp))
                for e in src.events
            ],
            "links": [
                Link(context=made, attributes=dict(link.attributes) if link.attributes else None)
                for link in src.links or []
                if (made := _context(link.context)) is not None
            ],
            "start_time": seconds(src.start_time),
            "end_time": seconds(src.end_time),
            "context": context,
            "parent": parent,
            "resource": OtelResource(
                attributes=dict(src.resource.attributes or {}), schema_url=src.resource.schema_url or ""
            ),
        }
        return cls(**_extras(src, known), **known)

    @classmethod
    def from_attributes(
        cls,
        *,
        attributes: Mapping[str, AttributeValue],
        rollout_id: str | None = None,
        attempt_id: str | None = None,
        sequence_id: int | None = None,
        name: str | None = None,
        trace_id: str | None = None,
        span_id: str | None = None,
        parent_id: str | None = None,
        start_time: float | None = None,
        end_time: float | None = None,
        resource: OtelResource | None = None,
        status: TraceStatus | None = None,
    ) -> Span:
        """A span from its attributes. Trace and span ids that are not given are random; the status is OK."""
        trace_id = trace_id or uuid4().hex
        span_id = span_id or uuid4().hex[:16]
        return cls(
            rollout_id=rollout_id or "",
            attempt_id=attempt_id or "",
            sequence_id=sequence_id or 0,
            trace_id=trace_id,
            span_id=span_id,
            parent_id=parent_id,
            name=name or VIRTUAL_SPAN,
            status=status or TraceStatus(status_code="OK"),
            attributes=dict(attributes),
            events=[],
            links=[],
            start_time=start_time,
            end_time=end_time,
            context=SpanContext(trace_id=trace_id, span_id=span_id, is_remote=False, trace_state={}),
            parent=SpanContext(trace_id=trace_id, span_id=parent_id, is_remote=False, trace_state={})
            if parent_id
            else None,
            resource=resource or OtelResource(attributes={}, schema_url=""),
        )

    @classmethod
    def from_core_fields(
        cls,
        core: SpanCoreFields,
        *,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
        sequence_id: int | None = None,
    ) -> Span:
        """A span from the fields that an agent gave; without a start time it starts now."""
        return cls.from_attributes(
            attributes=core.attributes,
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            sequence_id=sequence_id,
            name=core.name,
            start_time=core.start_time or time.time(),
            end_time=core.end_time,
            status=core.status,
        )


#: Fields of an SDK span that belong to its tracer, and would only be noise in a trace.
_NOT_EXTRA = frozenset(
    {
        "span_processor", "sampler", "trace_config", "record_exception", "set_status_on_exception", "limits", "lock",
        "record_end_metrics", "readable_span",
    }
)  # fmt: skip


def is_traced(span: Span) -> bool:
    """Whether a tracer made this span, not `ctx` or the agent itself: the name of a library is on it."""
    return "instrumentation_scope" in (span.model_extra or ())


def _extras(source: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """What an SDK span holds beyond the model, by its public names."""
    held = {private.lstrip("_"): value for private, value in vars(source).items() if not private.startswith("__")}
    extras = held.keys() - known.keys() - _NOT_EXTRA
    return {name: json.loads(json.dumps(value, default=str)) for name, value in held.items() if name in extras}


def _context(source: Any) -> SpanContext | None:
    if source is None:
        return None
    return SpanContext(
        trace_id=format(source.trace_id, "032x"),
        span_id=format(source.span_id, "016x"),
        is_remote=bool(source.is_remote),
        trace_state=dict(source.trace_state or {}),
    )


def seconds(value: float | None) -> float | None:
    """A time in seconds, from seconds or nanoseconds; None for None and 0, which mean "not known"."""
    if not value:
        return None
    return value / 1_000_000_000 if value > _NANOSECONDS_ABOVE else float(value)  # of an int: exact to the last digit


def reward_of(name: str, attributes: Mapping[str, Any]) -> float | None:
    """The primary reward that a span carries, None if it carries none; `find_final_reward` has the rule."""
    if (
        _PRIMARY not in attributes
        and _OUTPUT not in attributes
        and _OLDER_OUTPUT not in attributes
        and name not in _REWARD_SPANS
    ):  # as nearly always; every span comes by here on its way to the store
        return None
    value = attributes.get(_PRIMARY)
    for output in (_OUTPUT, _OLDER_OUTPUT):
        if value is None and output in attributes:
            value = _rewarded(attributes[output])
    if value is None and name in _REWARD_SPANS:
        value = attributes.get(semconv.LEGACY_REWARD)
    value = scalar(value)
    if isinstance(value, (int, float)) and not math.isnan(value):  # True and False are 1 and 0
        return float(value)
    return None


def _rewarded(output: Any) -> Any:
    """The reward in AgentOps' record of a function's output; None if the output is anything else."""
    if isinstance(output, str):
        if '"reward"' not in output:
            return None
        try:
            output = json.loads(output)
        except ValueError:  # a text of its own
            return None
    return output.get("value") if isinstance(output, Mapping) and output.get("type") == "reward" else None


def find_final_reward(spans: Sequence[Span]) -> float | None:
    """The primary reward of the newest span that carries one.

    A span carries a reward if a number stands in its attribute `agentlightning.reward.0.value`; or in its attribute
    `reward`, if its name is `agentlightning.annotation` or `agentlightning.reward` (agent-lightning 0.2); or in the
    output that AgentOps keeps of a function under agent-lightning's decorator `reward`. True and False are 1 and 0. The
    same rule sets `Rollout.reward`. None if no span carries one. Raises `PayloadNotReadableError` if a span of those
    names cannot be decoded here.
    """
    for span in reversed(spans):
        try:
            attributes = span.attributes
        except PayloadNotReadableError:
            if span.name in semconv.REWARD_SPANS:
                raise
            continue  # its name does not say that it carries a reward
        if (reward := reward_of(span.name, attributes)) is not None:
            return reward
    return None


def estimate_model_size(obj: Any) -> int:
    """Bytes of a model by a recursive `sys.getsizeof`, as agent-lightning estimates it.

    Counts a model's own size and its field values, a mapping's own size and its values, a list's, tuple's or set's own
    size and its items, and `getsizeof` of anything else. Keys and extra fields are not counted, shared objects are
    counted each time.
    """
    if isinstance(obj, BaseModel):
        return sys.getsizeof(obj) + sum(estimate_model_size(value) for value in obj.__dict__.values())
    if isinstance(obj, Mapping):
        return sys.getsizeof(obj) + sum(estimate_model_size(value) for value in obj.values())
    if isinstance(obj, (list, tuple, set)):
        return sys.getsizeof(obj) + sum(estimate_model_size(item) for item in obj)
    return sys.getsizeof(obj)
