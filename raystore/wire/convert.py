"""Between the public models and what crosses to a store: rows in field order, and opaque payloads.

`Encoder` makes arguments and rows of what a user passes; `to_span` and so on build models of what a store answers, a
record or its row. They do not validate again, which a round-trip test proves equal. A field whose payload
cannot be decoded here is left for its reader (`StoredModel`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar, cast

from pydantic import BaseModel

from raystore.core.payload import Opaque, size_of
from raystore.core.records import Record
from raystore.core.schema import ID_LENGTH, MAX_PRIORITY, MAX_SPAN_NUMBER
from raystore.errors import InvalidValueError, PayloadTooLargeError
from raystore.types.contract import (
    LLM,
    Attempt,
    AttemptedRollout,
    Change,
    EnqueueRolloutRequest,
    Event,
    Group,
    Link,
    NamedResources,
    ObjectResource,
    OtelResource,
    PromptTemplate,
    ProxyLLM,
    ResourcesUpdate,
    RetryRule,
    Rollout,
    RolloutConfig,
    Span,
    SpanContext,
    TraceStatus,
    Worker,
)
from raystore.types.spans import reward_of
from raystore.values.closed import Closed
from raystore.values.models import EXTRA, Undecoded, decode_all
from raystore.values.objects import Kept, Origin, Source
from raystore.values.plain import LEAVES, plainest
from raystore.wire import checks
from raystore.wire.codec import STATE, Encoded, decode, decode_each, digest, encode, encode_each, is_pickled
from raystore.wire.frames import collector_paused

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
Row = Sequence[Any] | Record


def row(answer: Row) -> Sequence[Any]:
    """The field values of a record, or of the row that it travelled as."""
    return answer.row() if isinstance(answer, Record) else answer


# -- from models to rows -----------------------------------------------------------------------------------------------


class Encoder:
    """Encodes values within the limits of one store."""

    def __init__(self, limits: Mapping[str, int], estimator: Callable[[Span], Any] | None) -> None:
        self._value_bytes = limits["value_bytes"]
        self._span_bytes = limits["span_bytes"]
        self.call_bytes: int = limits["call_bytes"]
        self._state_bytes = limits["state_bytes"]
        self._estimator = estimator

    def value(self, what: str, value: Any) -> Opaque:
        """A user's value as an opaque payload."""
        return encode(value, what, self._value_bytes)

    def state(self, state: Any) -> Opaque:
        """A state that an agent saves; None means that there is none. One that is encoded already is only measured."""
        if state is None:
            return None
        if not isinstance(state, Encoded):
            return encode(state, STATE, self._state_bytes)
        if (size := size_of(state.payload)) > self._state_bytes:
            raise PayloadTooLargeError(STATE, size, self._state_bytes)
        return state.payload

    def task(self, task: Any) -> Opaque:
        """A rollout's input as a payload; a request, a rollout, or a list of them was meant as something else."""
        kind = type(task)
        if (kind is list or kind is tuple) and task:
            kind = type(task[0])
        if kind not in _OFTEN_TASKS and not _NO_TASKS.isdisjoint(kind.__mro__):
            raise InvalidValueError("input", task, _instead_of_a_task(task))
        return encode(task, "input", self._value_bytes)

    def mapping(self, what: str, value: Any) -> Opaque:
        """Metadata or statistics, copied; None stays None."""
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise InvalidValueError(what, value, "a mapping")
        return encode(dict(value), what, self._value_bytes)

    def request(self, request: EnqueueRolloutRequest) -> dict[str, Any]:
        """What makes a rollout; group and tags come from the metadata if the request has none."""
        if len(request.__dict__) < len(_REQUEST):  # made without validation
            request = checks.model_of(EnqueueRolloutRequest, "", request.__dict__)
        metadata = request.metadata or {}
        if not isinstance(metadata, Mapping):
            raise InvalidValueError("metadata", metadata, "a mapping")
        group_id, tags = request.group_id, request.tags
        if group_id is None and isinstance(lifted := metadata.get("group_id"), str):
            group_id = lifted if checks.is_id(str.__str__(lifted)) else None
        if tags is None and isinstance(lifted := metadata.get("tags"), dict):
            try:
                tags = checks.tag_dict("tags", lifted)
            except InvalidValueError:  # not well-formed, so not meant as tags
                tags = None
        encoded: dict[str, Any] = {"input": self.task(request.input)}
        encoded["metadata"] = self.mapping("metadata", metadata)
        if request.config is not None:
            encoded["config"] = checks.rollout_config("config", request.config)
        if request.mode is not None:
            encoded["mode"] = checks.mode(request.mode)
        if request.resources_id is not None:
            encoded["resources_id"] = checks.identifier("resources_id", request.resources_id)
        if request.rollout_id is not None:
            encoded["rollout_id"] = checks.identifier("rollout_id", request.rollout_id)
            encoded["digests"] = [digest(request.input, encoded["input"]), digest(metadata, encoded["metadata"])]
        if group_id is not None:
            encoded["group_id"] = checks.identifier("group_id", group_id)
        if request.queue != "default":
            encoded["queue"] = checks.identifier("queue", request.queue)
        if request.priority:
            encoded["priority"] = checks.whole("priority", request.priority, at_least=-(2**31))
            if encoded["priority"] > MAX_PRIORITY:
                raise InvalidValueError("priority", request.priority, "a whole number of at most 53 bits")
        if tags:
            encoded["tags"] = checks.tag_dict("tags", tags)
        return encoded

    def span(self, span: Span, *, numbered: bool = True) -> list[Any]:
        """A span as the row of `core.records.Span` behind rollout and attempt: index, reward, encoded body, size."""
        values = span.__dict__
        try:
            number, rollout_id, attempt_id, span_id, trace_id, parent_id, name, start_time, end_time = _index_of(values)
            body = _body(values, span.__pydantic_extra__)
        except (AttributeError, KeyError, TypeError) as error:
            if decode_all(span):  # it came from a store, and nobody had read it
                return self.span(span, numbered=numbered)
            # It was changed, or made, without validation.
            checked = checks.model_of(Span, "span", {name: _raw(value) for name, value in values.items()})
            if checked.__dict__.keys() == values.keys() and checked.__dict__ == values:
                raise InvalidValueError("span", span, f"a whole Span; {type(error).__name__}: {error}") from None
            return self.span(checked, numbered=numbered)
        try:
            ids = rollout_id + attempt_id + span_id + trace_id  # one look instead of four
        except TypeError:
            ids = None
        if not (
            type(ids) is str
            and rollout_id and attempt_id and span_id and trace_id
            and len(ids) <= ID_LENGTH
            and ids.isprintable()
            and type(number) is int
            and 0 <= number < MAX_SPAN_NUMBER
            and type(name) is str
            and (parent_id is None or type(parent_id) is str)
            and (start_time is None or (type(start_time) is float and start_time == start_time))
            and (end_time is None or (type(end_time) is float and end_time == end_time))
        ):  # fmt: skip
            number, _, _, span_id, trace_id, parent_id, name, start_time, end_time = _checked_index(*_index_of(values))
        encoded = encode(body, f"span {span_id}", self._span_bytes)
        if is_pickled(encoded):  # numbers of numpy or torch, perhaps, which came in after the span was checked
            encoded = encode(plainest(body), f"span {span_id}", self._span_bytes)
        return [
            number if numbered else -1,
            span_id,
            trace_id,
            parent_id,
            name,
            start_time,
            end_time,
            reward_of(name, values["attributes"]),
            encoded,
            -1 if self._estimator is None else max(int(self._estimator(span)), 0),
        ]

    def resources(self, resources: NamedResources) -> tuple[Opaque, bool]:
        """Named resources, validated before, as a payload, and whether they hold an object.

        Prompts and endpoints are plain data in it, so that they can be read without opening a pickle.
        """
        holds_objects = any(isinstance(resource, ObjectResource) for resource in resources.values())
        parts = {name: _plain_fields(resource) or resource for name, resource in resources.items()}
        return encode_each(parts, "resources", self._value_bytes), holds_objects


#: Resources that travel as their fields; of a class that a user derived, only a pickle knows the class.
_PLAIN_RESOURCES: dict[str, type[BaseModel]] = {"llm": LLM, "proxy_llm": ProxyLLM, "prompt_template": PromptTemplate}


def _plain_fields(resource: Any) -> dict[str, Any] | None:
    """The fields of a prompt or an endpoint; None for any other resource."""
    values = vars(resource)
    is_plain = type(resource) is _PLAIN_RESOURCES.get(values.get("resource_type", ""))
    return dict(values) if is_plain and values.keys() == type(resource).model_fields.keys() else None


#: What holds a task, and is no task itself.
_NO_TASKS = frozenset({EnqueueRolloutRequest, Rollout})
_OFTEN_TASKS = LEAVES | {dict, list, tuple}  #: types that need no closer look


def _instead_of_a_task(given: Any) -> str:
    """What was expected instead of a request or rollout, and what to write."""
    if isinstance(given, Rollout):
        return "a task, and this is a rollout; pass its input (rollout.input), or requeue it: requeue([rollout_id])"
    if isinstance(given, (list, tuple)):
        return "a task, and these are requests or rollouts; pass requests to enqueue_many_rollouts(requests)"
    return (
        "a task, and this is a request; pass its fields, input=... first, or it alone: enqueue_many_rollouts([request])"
    )


#: The fields of a span that the store looks at.
_index_of = itemgetter(
    "sequence_id", "rollout_id", "attempt_id", "span_id", "trace_id", "parent_id", "name", "start_time", "end_time"
)
_REQUEST = EnqueueRolloutRequest.model_fields


def _raw(value: Any) -> Any:
    """A model as dicts and lists, so that it is validated again."""
    if isinstance(value, BaseModel):
        return {name: _raw(item) for name, item in value.__dict__.items()}
    return [_raw(item) for item in value] if isinstance(value, list) else value


def _checked_index(
    sequence_id: Any, rollout_id: Any, attempt_id: Any, span_id: Any, trace_id: Any,
    parent_id: Any, name: Any, start_time: Any, end_time: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The index of a span in plain form. Raises `InvalidValueError` that names the field that is wrong."""
    number = checks.whole("span.sequence_id", sequence_id, at_least=0)
    if number >= MAX_SPAN_NUMBER:
        raise InvalidValueError("span.sequence_id", sequence_id, "a whole number below 2**62")
    if not isinstance(name, str):
        raise InvalidValueError("span.name", name, "text")
    return (
        number,
        checks.identifier("span.rollout_id", rollout_id),
        checks.identifier("span.attempt_id", attempt_id),
        checks.identifier("span.span_id", span_id),
        checks.identifier("span.trace_id", trace_id),
        checks.optional_text("span.parent_id", parent_id),
        str.__str__(name),
        None if start_time is None else checks.number("span.start_time", start_time),
        None if end_time is None else checks.number("span.end_time", end_time),
    )


def _body(values: dict[str, Any], extra: dict[str, Any] | None) -> list[Any]:
    """The fields of a span that are not in its index, as a list, in which the usual values are short.

    Status (the code alone if it says no more), attributes, resource (None for an empty one), context and parent (1 if
    the index has all that they say); and, only if there are any: events, links, fields unknown to the model.

    Raises AttributeError, KeyError or TypeError for a span that lacks a field.
    """
    status, resource, context, parent = values["status"], values["resource"], values["context"], values["parent"]
    said, source = status.__dict__, resource.__dict__
    if type(values["attributes"]) is not dict:
        raise TypeError("attributes that are no dict")
    body = [
        said["status_code"] if said["description"] is None and not status.__pydantic_extra__ else _dump(status),
        values["attributes"],
        _dump(resource) if source["attributes"] or source["schema_url"] else None,
        context and (_IN_INDEX if _is_in_index(context, values, values["span_id"]) else _dump(context)),
        parent and (_IN_INDEX if _is_in_index(parent, values, values["parent_id"]) else _dump(parent)),
    ]
    events, links = values["events"], values["links"]
    if events or links or extra:
        for model in (*events, *links, *(link.__dict__["context"] for link in links)):
            if not type(model).model_fields.keys() <= model.__dict__.keys():  # nobody could read it again
                raise TypeError(f"a {type(model).__name__} that lacks a field")
        body += [[_dump(event) for event in events], [_dump(link) for link in links], extra or {}]
    return body


_IN_INDEX = 1  # in place of a context that says nothing but ids of the index


def _is_in_index(context: SpanContext, values: dict[str, Any], span_id: str | None) -> bool:
    """Whether a context says nothing but ids of a span's index."""
    own = context.__dict__
    return (
        own["span_id"] == span_id
        and own["trace_id"] == values["trace_id"]
        and own["is_remote"] is False
        and own["trace_state"] == {}
        and not context.__pydantic_extra__
    )


def _dump(model: BaseModel) -> dict[str, Any]:
    """The fields of a model, and of models in it, as dicts."""
    values = {name: _dump(value) if isinstance(value, BaseModel) else value for name, value in model.__dict__.items()}
    return values | model.__pydantic_extra__ if model.__pydantic_extra__ else values


# -- from rows to models -----------------------------------------------------------------------------------------------


def all_of(make: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
    """Make something of each of many items, as models of rows."""
    with collector_paused():
        return [make(item) for item in items]


def build(
    cls: type[M],
    values: dict[str, Any],
    extra: dict[str, Any] | None = None,
    undecoded: dict[str, Undecoded] | None = None,
) -> M:
    """A model with these field values, which were validated when they came in and are not validated again."""
    made = cls.__new__(cls)
    put = object.__setattr__
    put(made, "__dict__", values)
    put(made, "__pydantic_fields_set__", set(values))
    put(made, "__pydantic_extra__", extra if extra is not None else _NO_EXTRA[cls]())
    put(made, "__pydantic_private__", undecoded)
    return made


class _NoExtra(dict[type[BaseModel], Callable[[], Any]]):
    """What pydantic puts for "no extra fields": a dict where they are allowed, None elsewhere."""

    def __missing__(self, cls: type[BaseModel]) -> Callable[[], Any]:
        self[cls] = dict if cls.model_config.get("extra") == "allow" else type(None)
        return self[cls]


_NO_EXTRA = _NoExtra()

_ROLLOUT = tuple(Rollout.model_fields)
_ATTEMPT = tuple(Attempt.model_fields)
_WORKER = tuple(Worker.model_fields)
_GROUP = tuple(Group.model_fields)


def _decode_fields(values: dict[str, Any], names: Sequence[str], kind: str) -> dict[str, Undecoded] | None:
    """Decode these fields in place; those that cannot be decoded are taken out and returned, None if there are none."""
    undecoded: dict[str, Undecoded] | None = None
    for name in names:
        payload = values[name]
        try:
            values[name] = decode(payload)
        except Exception:  # whatever a user's class raises while it is unpickled
            del values[name]
            whose = f"{name} of {kind} {values[f'{kind}_id']}"
            undecoded = (undecoded or {}) | {name: Undecoded(whose, partial(_field, name), payload)}
    return undecoded


def _field(name: str, payload: Opaque) -> dict[str, Any]:
    return {name: decode(payload)}


def to_any_rollout(answer: Sequence[Any]) -> Rollout | AttemptedRollout:
    """A rollout with its latest attempt, without if it was never attempted (the second row is None)."""
    rollout, attempt, undecoded = answer[0], answer[1], None
    values = dict(zip(_ROLLOUT, rollout.row() if isinstance(rollout, Record) else rollout, strict=True))
    try:
        values |= {"input": decode(values["input"]), "metadata": decode(values["metadata"])}
    except Exception:  # whatever a user's class raises while it is unpickled
        undecoded = _decode_fields(values, ("input", "metadata"), "rollout")
    values["tags"] = dict(values["tags"])
    config = values["config"]
    timeout, unresponsive, max_attempts, retry_condition, *more = config.row() if isinstance(config, Record) else config
    values["config"] = build(
        RolloutConfig,
        {
            "timeout_seconds": timeout,
            "unresponsive_seconds": unresponsive,
            "max_attempts": max_attempts,
            "retry_condition": list(retry_condition),
            "retry_rules": {rule[0]: _retry_rule(rule[1:]) for rule in more[0]} if more else {},
        },
    )
    if attempt is None:
        return build(Rollout, values, None, undecoded)
    values["attempt"] = to_attempt(attempt)
    return build(AttemptedRollout, values, None, undecoded)


def _retry_rule(values: Sequence[Any]) -> RetryRule:
    return build(RetryRule, dict(zip(RetryRule.model_fields, values, strict=True)))


#: The same for a rollout that has an attempt.
to_attempted_rollout: Callable[[Sequence[Any]], AttemptedRollout] = cast("Any", to_any_rollout)


def to_attempt(answer: Row) -> Attempt:
    values = dict(zip(_ATTEMPT, answer.row() if isinstance(answer, Record) else answer, strict=False))
    values.setdefault("resumed_from", None)  # which only rows of those have that went on
    undecoded = None if values["metadata"] is None else _decode_fields(values, ("metadata",), "attempt")
    return build(Attempt, values, None, undecoded)


def to_state(payload: Opaque, rollout_id: str) -> Any:
    """What an agent saved. Raises `PayloadNotReadableError` if it cannot be decoded here."""
    return Undecoded(f"saved state of rollout {rollout_id}", partial(_field, STATE), payload).decode()[STATE]


def group_values(answer: Row) -> tuple[dict[str, Any], dict[str, Undecoded] | None]:
    """The fields of a group, and those that cannot be decoded here."""
    values = dict(zip(_GROUP, row(answer), strict=True))
    values["tags"], values["members"] = dict(values["tags"]), list(values["members"])
    return values, _decode_fields(values, ("input",), "group")


def to_group(answer: Row) -> Group:
    values, undecoded = group_values(answer)
    return build(Group, values, None, undecoded)


def to_worker(answer: Row) -> Worker:
    values = dict(zip(_WORKER, row(answer), strict=True))
    return build(Worker, values, None, _decode_fields(values, ("heartbeat_stats",), "worker"))


def to_change(answer: Row) -> Change:
    values = dict(zip(Change.model_fields, row(answer), strict=True))
    values["detail"] = dict(values["detail"]) if values["detail"] is not None else None
    return build(Change, values)


_LOST = Kept(None, 0)


def _resources_field(origin: Origin, resources_id: str, version: int, payload: Opaque) -> dict[str, Any]:
    """The field `resources`, in which those that are objects know where these may be found."""
    parts = decode_each(payload, lost=_LOST)
    if parts is None:  # they were published when all of them were one pickle
        parts = decode(payload, lost=_LOST)
    if isinstance(parts, Closed):
        return {"resources": parts}
    resources = {name: _resource(part) for name, part in parts.items()}
    for resource in resources.values():
        if isinstance(resource, ObjectResource) and resource.is_elsewhere:
            kept = resource.source.kept if resource.source is not None else _LOST
            resource.source = Source(kept, origin, resources_id, version)
            if resource.value is _LOST:
                resource.value = kept
    return {"resources": resources}


def _resource(part: Any) -> Any:
    """A resource, of its fields if it travelled as these."""
    return build(_PLAIN_RESOURCES[part["resource_type"]], part) if isinstance(part, dict) else part


def to_resources(answer: Row, origin: Origin, payload: Opaque = None) -> ResourcesUpdate:
    """One version of resources; `payload` is what they were published with, for an answer that does not repeat it."""
    resources_id, version, create_time, update_time, policy_version, resources, _ = row(answer)
    if resources is None:
        resources = payload
    values = {
        "resources_id": resources_id,
        "create_time": create_time,
        "update_time": update_time,
        "version": version,
        "resources": resources,
        "policy_version": policy_version,
    }
    decode_field = partial(_resources_field, origin, resources_id, version)
    undecoded = None
    try:
        values |= decode_field(resources)
    except Exception:  # whatever a user's class raises while it is unpickled
        del values["resources"]
        whose = f"resources of resources {resources_id}, version {version}"
        undecoded = {"resources": Undecoded(whose, decode_field, resources)}
    return build(ResourcesUpdate, values, None, undecoded)


def to_span(answer: Row) -> Span:
    """A span, from its index and its body."""
    index, payload = row(answer)[:9], row(answer)[10]
    try:
        body = decode(payload)
        return _span(index, body if not isinstance(body, Closed) else ("UNSET", {NOT_OPENED: repr(body)}, *[None] * 3))
    except Exception:  # an attribute is of a user's class
        return _undecoded_span(index, payload)


def _span(index: Sequence[Any], body: Sequence[Any]) -> Span:
    rollout_id, attempt_id, sequence_id, span_id, trace_id, parent_id, name, start_time, end_time = index
    status, attributes, resource, context, parent, *rest = body
    events, links, extra = rest or ((), (), None)
    if not isinstance(status, dict):
        status = {"status_code": status, "description": None}
    return build(
        Span,
        {
            "rollout_id": rollout_id,
            "attempt_id": attempt_id,
            "sequence_id": sequence_id,
            "trace_id": trace_id,
            "span_id": span_id,
            "parent_id": parent_id,
            "name": name,
            "status": _open(TraceStatus, status),
            "attributes": attributes,
            "events": [_open(Event, event) for event in events],
            "links": [_open(Link, link | {"context": _open(SpanContext, link["context"])}) for link in links],
            "start_time": start_time,
            "end_time": end_time,
            "context": _context(context, trace_id, span_id),
            "parent": _context(parent, trace_id, parent_id),
            "resource": build(OtelResource, resource or {"attributes": {}, "schema_url": ""}),
        },
        extra,
    )


NOT_OPENED = "raystore.not_opened"  #: attribute of a span whose body is a pickle that stays closed

_OF_BODY = ("status", "attributes", "events", "links", "context", "parent", "resource")


def _undecoded_span(index: Sequence[Any], payload: Opaque) -> Span:
    values = vars(_span(index, ("UNSET", {}, None, None, None)))
    values = {name: value for name, value in values.items() if name not in _OF_BODY}
    whose = f"body of span {values['span_id']} of rollout {values['rollout_id']}"
    body = Undecoded(whose, partial(_fields_of_body, list(index)), payload)
    return build(Span, values, None, dict.fromkeys(_OF_BODY, body))


def _fields_of_body(index: Sequence[Any], payload: Opaque) -> dict[str, Any]:
    made = _span(index, decode(payload))
    return {name: vars(made)[name] for name in _OF_BODY} | {EXTRA: made.__pydantic_extra__}


def _context(context: Any, trace_id: str, span_id: str) -> SpanContext | None:
    if context == _IN_INDEX:
        return build(SpanContext, {"trace_id": trace_id, "span_id": span_id, "is_remote": False, "trace_state": {}})
    return None if context is None else _open(SpanContext, context)


def _open(cls: type[M], values: dict[str, Any]) -> M:
    """A model that allows extra fields, from all its values."""
    known = cls.model_fields
    if len(values) == len(known):
        return build(cls, values)
    extra = {name: value for name, value in values.items() if name not in known}
    return build(cls, {name: value for name, value in values.items() if name in known}, extra)
