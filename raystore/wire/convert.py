"""Between the public records and what crosses to a store: validate and encode on the way in, decode on the way out.

Arguments become plain values and opaque payloads; answers come as rows in field order (`core.records`) and are built
into pydantic records without validating again, which a round-trip test proves equal.
Not here: framing for an actor (`wire`), the methods themselves (`client`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from raystore.core.payload import Opaque
from raystore.core.records import Record
from raystore.core.wanted import TRAINABLE
from raystore.errors import InvalidValueError
from raystore.spans import reward_of
from raystore.types import (
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    Change,
    EnqueueRolloutRequest,
    Event,
    Link,
    NamedResources,
    ObjectResource,
    OtelResource,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    RolloutMode,
    Span,
    SpanContext,
    TraceStatus,
    Worker,
)
from raystore.values import plain
from raystore.values.content import digest
from raystore.values.mistakes import refusal
from raystore.values.objects import Kept, Origin, Source
from raystore.values.plain import whole as whole
from raystore.values.unread import EXTRA, Unread, read_all
from raystore.wire.codec import decode, encode, is_pickled

M = TypeVar("M", bound=BaseModel)
Row = Sequence[Any] | Record

ID_LENGTH = 512
SHOWN_IN_A_LIST = 50  #: characters of a text that is shown as the list it should be in
MAX_TAGS = 16
MAX_PRIORITY = 2**53


def row(answer: Row) -> Sequence[Any]:
    """The field values of a record, wherever it comes from."""
    return answer.row() if isinstance(answer, Record) else answer


# -- checks of single values -------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def validated(name: str, annotation: Any, value: Any, remedy: str = "") -> Any:
    """An argument of this type; an error that says what to do, if it is not. An instance of a model stays the same."""
    if type(value) is annotation and issubclass(annotation, BaseModel):
        return value
    try:
        return _adapter(annotation).validate_python(value)
    except ValidationError as error:
        raise refusal(name, annotation, error, remedy) from None


def within(place: str, name: str, *rest: Any) -> tuple[Any, ...]:
    """The arguments of an error, of which the first names a value, if that value is in this place."""
    return f"{place}{'' if name[:1] in ('', '[') else '.'}{name}", *rest


def made(cls: type[M], name: str, fields: dict[str, Any]) -> M:
    """A model of these fields, which are arguments of a call, or (with a name) make up the argument of that name."""
    try:
        return cls.__pydantic_validator__.validate_python(fields)  # type: ignore[no-any-return]
    except ValidationError as error:
        raise refusal(name, cls, error) from None


def rollout_config(name: str, config: Any) -> tuple[Any, ...]:
    """A rollout's configuration in field order, checked whatever it is."""
    if isinstance(config, RolloutConfig):  # assignment is not validated, so a wrong value may have come in since
        fields = config.__dict__
        if type(config) is not RolloutConfig:
            fields = {field: value for field, value in fields.items() if field in RolloutConfig.model_fields}
        config = made(RolloutConfig, name, fields)
    else:
        config = validated(name, RolloutConfig, config)
    return config.timeout_seconds, config.unresponsive_seconds, config.max_attempts, list(config.retry_condition)


_MODES = frozenset(get_args(RolloutMode))
_ATTEMPT_STATUSES = frozenset(get_args(AttemptStatus))


def attempt_status(value: Any) -> AttemptStatus:
    """The status of an attempt; looked up first, since asking pydantic costs ten times as much."""
    is_known = type(value) is str and value in _ATTEMPT_STATUSES
    return value if is_known else validated("status", AttemptStatus, value)  # type: ignore[no-any-return]


def identifier(name: str, value: Any) -> str:
    """An id: text of 1 to 512 characters without control characters."""
    if type(value) is not str:
        value = str.__str__(value) if isinstance(value, str) else value  # numpy's, or an enum's
    if type(value) is not str or not 0 < len(value) <= ID_LENGTH or not value.isprintable():
        raise InvalidValueError(name, value, _AN_ID + _hint(name, value))
    return value


_AN_ID = f"text of 1 to {ID_LENGTH} characters without control characters"


def _hint(name: str, value: Any) -> str:
    """What to do about a record that was passed instead of its id."""
    field = name.split("[")[0].rpartition(".")[2]
    field = (
        field.removesuffix("_in").removesuffix("s") if field not in getattr(type(value), "model_fields", ()) else field
    )
    is_record = isinstance(value, BaseModel) and field in type(value).model_fields
    return f"; pass its {field}" if is_record else ""


def optional_identifier(name: str, value: Any) -> str | None:
    """An id, or None."""
    return None if value is None else identifier(name, value)


def tag_dict(name: str, value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Tags: at most 16 names with a str, int, float or bool each."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) > MAX_TAGS:
        raise InvalidValueError(
            name,
            value,
            f"a mapping of at most {MAX_TAGS} tags, {{'level': 3}}; longer texts and more of them belong into metadata",
        )
    tags = {}
    for key, item in value.items():
        tag = plain.scalar(item)
        if type(tag) not in (str, int, float, bool) or (isinstance(tag, float) and math.isnan(tag)):
            raise InvalidValueError(
                f"{name}[{key!r}]", item, "a str, int, float or bool; anything else belongs into metadata"
            )
        tags[identifier(f"{name} name", key)] = tag
    return tags


def duration(name: str, value: Any) -> float:
    """Seconds to wait: 0 or more, not NaN."""
    expected = "a number of seconds, 0 or more"
    seconds = value if type(value) is float else plain.number(name, value, expected)
    if not seconds >= 0:
        raise InvalidValueError(name, value, expected)
    return float(seconds)


def identifiers(name: str, values: Any) -> list[str]:
    """A list of ids; a single text is a mistake that would otherwise be taken letter by letter."""
    if isinstance(values, str) or not isinstance(values, (Sequence, set, frozenset, dict)):
        raise InvalidValueError(name, values, f"a list of ids{_in_a_list(values)}")
    for value in values:
        if type(value) is not str or not 0 < len(value) <= ID_LENGTH or not value.isprintable():
            return [identifier(f"{name}[{index}]", value) for index, value in enumerate(values)]
    return list(values)


def listed(name: str, values: Any, expected: str) -> list[Any]:
    """Anything that can be gone through, as a list; a text or mapping is a mistake."""
    if isinstance(values, (str, bytes, Mapping, BaseModel)) or not isinstance(values, Iterable):
        raise InvalidValueError(name, values, f"{expected}{_in_a_list(values)}")
    return list(values)


def _in_a_list(value: Any) -> str:
    """What to do about one item that was passed instead of a list of them."""
    if isinstance(value, str) and len(value) < SHOWN_IN_A_LIST:
        return f"; put one alone into a list: [{value!r}]"
    return "; put one alone into a list" if isinstance(value, BaseModel) else ""


def statuses(name: str, annotation: Any, values: Any) -> list[Any] | None:
    """Statuses to look for; None leaves it open."""
    return None if values is None else validated(name, annotation, listed(name, values, "a list of statuses"))


def pairs(name: str, values: Any) -> list[tuple[str, str]]:
    """Pairs of a rollout's id and one of its attempts'."""
    expected = "a list of pairs: rollout id, attempt id"
    made = []
    for index, value in enumerate(listed(name, values, expected)):
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise InvalidValueError(f"{name}[{index}]", value, "a pair: rollout id, attempt id")
        made.append(
            (identifier(f"{name}[{index}].rollout_id", value[0]), identifier(f"{name}[{index}].attempt_id", value[1]))
        )
    return made


def names(rollout_id: Any, attempt_id: Any) -> dict[str, Any]:
    """The arguments that name an attempt."""
    return {
        "rollout_id": identifier("rollout_id", rollout_id),
        "attempt_id": identifier("attempt_id", attempt_id),
    }


def spans(values: Any) -> list[Span]:
    """A list of spans."""
    found = listed("spans", values, "a list of spans")
    return [v if type(v) is Span else validated(f"spans[{n}]", Span, v) for n, v in enumerate(found)]


def flag(name: str, value: Any) -> bool:
    """True or False."""
    found = plain.scalar(value)
    if type(found) is not bool:
        raise InvalidValueError(name, value, "True or False")
    return found


def optional_text(name: str, value: Any) -> str | None:
    """Text, or None."""
    if value is None or type(value) is str:
        return value
    if not isinstance(value, str):
        raise InvalidValueError(name, value, "text or None")
    return str.__str__(value)


def queue_names(values: Any) -> list[str]:
    """Names of queues to claim from, at least one."""
    if type(values) is tuple and values == ("default",):
        return ["default"]
    names = list(dict.fromkeys(identifiers("queues", values)))
    if not names:
        raise InvalidValueError("queues", values, "at least one name of a queue")
    return names


def filter_arguments(
    *, mode: Any = None, tags: Any = None, queue: Any = None, group_id: Any = None, status_in: Any = None
) -> dict[str, Any]:
    """What a consumer asks for, by field of a rollout, without what it leaves open."""
    given = {
        "mode": validated("mode", RolloutMode | None, mode),
        "tags": tag_dict("tags", tags) or None,
        "queue": optional_identifier("queue", queue),
        "group_id": optional_identifier("group_id", group_id),
        "status_in": None if status_in is None else _statuses(status_in),
    }
    return {name: value for name, value in given.items() if value is not None}


def _statuses(values: Any) -> list[str]:
    names = identifiers("status_in", values)
    if not names or set(names) - set(TRAINABLE):
        expected = "'succeeded', 'failed', or both in a list; what was cancelled or dropped is never given"
        raise InvalidValueError("status_in", names, expected)
    return sorted(names)


def finite(name: str, value: Any) -> float:
    """A time or a reward: a number, not NaN."""
    return float(plain.number(name, value))


# -- arguments in ------------------------------------------------------------------------------------------------------


class Encoder:
    """Encodes values within the limits of one store."""

    def __init__(self, limits: Mapping[str, int], estimator: Callable[[Span], Any] | None) -> None:
        self._value_bytes = limits["value_bytes"]
        self._span_bytes = limits["span_bytes"]
        self.call_bytes: int = limits["call_bytes"]
        self._estimator = estimator

    def value(self, what: str, value: Any) -> Opaque:
        """A user's value as an opaque payload."""
        return encode(value, what, self._value_bytes)

    def task(self, task: Any) -> Opaque:
        """A rollout's input. Requests and rollouts are none, nor is a list of them: their fields were meant."""
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

    def config(self, config: RolloutConfig | None) -> list[Any] | None:
        """A rollout's configuration in field order."""
        if config is None:
            return None
        return list(rollout_config("config", config))

    def request(self, request: EnqueueRolloutRequest) -> dict[str, Any]:
        """The arguments that make a rollout; group and tags are lifted from metadata when they are absent there."""
        if len(request.__dict__) < len(_REQUEST):  # made without validation
            request = made(EnqueueRolloutRequest, "", request.__dict__)
        metadata = request.metadata or {}
        if not isinstance(metadata, Mapping):
            raise InvalidValueError("metadata", metadata, "a mapping")
        group_id, tags = request.group_id, request.tags
        if group_id is None and isinstance(lifted := metadata.get("group_id"), str):
            group_id = lifted if 0 < len(lifted) <= ID_LENGTH and lifted.isprintable() else None
        if tags is None and isinstance(lifted := metadata.get("tags"), dict):
            try:
                tags = tag_dict("tags", lifted)
            except InvalidValueError:  # not well-formed, so not meant as tags
                tags = None
        encoded: dict[str, Any] = {"input": self.task(request.input)}
        encoded["metadata"] = self.mapping("metadata", metadata)
        if request.config is not None:
            encoded["config"] = self.config(request.config)
        mode: Any = request.mode  # which a copy may have been given
        if mode is not None:
            encoded["mode"] = mode if type(mode) is str and mode in _MODES else validated("mode", RolloutMode, mode)
        if request.resources_id is not None:
            encoded["resources_id"] = identifier("resources_id", request.resources_id)
        if request.rollout_id is not None:
            encoded["rollout_id"] = identifier("rollout_id", request.rollout_id)
            encoded["digests"] = [digest(request.input, encoded["input"]), digest(metadata, encoded["metadata"])]
        if group_id is not None:
            encoded["group_id"] = identifier("group_id", group_id)
        if request.queue != "default":
            encoded["queue"] = identifier("queue", request.queue)
        if request.priority:
            encoded["priority"] = whole("priority", request.priority, at_least=-(2**31))
            if encoded["priority"] > MAX_PRIORITY:
                raise InvalidValueError("priority", request.priority, "a whole number of at most 53 bits")
        if tags:
            encoded["tags"] = tag_dict("tags", tags)
        return encoded

    def span(self, span: Span, *, numbered: bool = True) -> list[Any]:
        """A span as index and encoded body, in the order of `core.records.Span` behind rollout and attempt."""
        values = span.__dict__
        try:
            number, rollout_id, attempt_id, span_id, trace_id, parent_id, name, start_time, end_time = _index_of(values)
            body = _body(values, span.__pydantic_extra__)
        except (AttributeError, KeyError, TypeError) as error:
            if read_all(span):  # it came from a store, and had not been read
                return self.span(span, numbered=numbered)
            # It was changed, or made, without validation.
            checked = made(Span, "span", {name: _raw(value) for name, value in values.items()})
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
            and 0 <= number < _NUMBERS
            and type(name) is str
            and (parent_id is None or type(parent_id) is str)
            and (start_time is None or (type(start_time) is float and start_time == start_time))
            and (end_time is None or (type(end_time) is float and end_time == end_time))
        ):  # fmt: skip
            number, _, _, span_id, trace_id, parent_id, name, start_time, end_time = _checked(*_index_of(values))
        encoded = encode(body, f"span {span_id}", self._span_bytes)
        if is_pickled(encoded):  # numbers of numpy or torch, perhaps, which came in after the span was checked
            encoded = encode(plain.plainest(body), f"span {span_id}", self._span_bytes)
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
        """Named resources, validated before, as a payload, and whether they hold an object."""
        holds_objects = any(isinstance(resource, ObjectResource) for resource in resources.values())
        return encode(resources, "resources", self._value_bytes), holds_objects


#: What is handed to a store with a task in it, and is no task itself.
_NO_TASKS = frozenset({EnqueueRolloutRequest, Rollout})
_OFTEN_TASKS = plain.LEAVES | {dict, list, tuple}  #: types that need no closer look


def _instead_of_a_task(given: Any) -> str:
    """What was expected where such a thing was passed as a task, and what to write."""
    if isinstance(given, Rollout):
        return "a task, and this is a rollout; pass its input (rollout.input), or requeue it: start_attempt(rollout_id)"
    if isinstance(given, (list, tuple)):
        return "a task, and these are requests or rollouts; pass requests to enqueue_many_rollouts(requests)"
    return (
        "a task, and this is a request; pass its fields, input=... first, or it alone: enqueue_many_rollouts([request])"
    )


#: What of a span the store looks at.
_index_of = itemgetter(
    "sequence_id", "rollout_id", "attempt_id", "span_id", "trace_id", "parent_id", "name", "start_time", "end_time"
)
_NUMBERS = 2**62  #: numbers of spans are below
_REQUEST = EnqueueRolloutRequest.model_fields


def _raw(value: Any) -> Any:
    """A small model as what it is made of, so that it is validated again."""
    if isinstance(value, BaseModel):
        return {name: _raw(item) for name, item in value.__dict__.items()}
    return [_raw(item) for item in value] if isinstance(value, list) else value


def _checked(
    sequence_id: Any, rollout_id: Any, attempt_id: Any, span_id: Any, trace_id: Any,
    parent_id: Any, name: Any, start_time: Any, end_time: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The index of a span, with plain values; what is wrong in it is named."""
    number = plain.whole("span.sequence_id", sequence_id, at_least=0)
    if number >= _NUMBERS:
        raise InvalidValueError("span.sequence_id", sequence_id, "a whole number below 2**62")
    if not isinstance(name, str):
        raise InvalidValueError("span.name", name, "text")
    return (
        number,
        identifier("span.rollout_id", rollout_id),
        identifier("span.attempt_id", attempt_id),
        identifier("span.span_id", span_id),
        identifier("span.trace_id", trace_id),
        optional_text("span.parent_id", parent_id),
        str.__str__(name),
        None if start_time is None else finite("span.start_time", start_time),
        None if end_time is None else finite("span.end_time", end_time),
    )


def _body(values: dict[str, Any], extra: dict[str, Any] | None) -> list[Any]:
    """What of a span is not in its index, as a list; what is as it nearly always is takes next to no place in it.

    Raises an AttributeError, KeyError or TypeError for a span that is not whole.

    Status (its code alone, if there is no more), attributes, resource (None for the empty one), context and parent
    (1 for what the index says already), and only if there are any: events, links, fields unknown to the model.
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


_IN_INDEX = 1


def _is_in_index(context: SpanContext, values: dict[str, Any], span_id: str | None) -> bool:
    """Whether a context says nothing but the ids of a span's index."""
    own = context.__dict__
    return (
        own["span_id"] == span_id
        and own["trace_id"] == values["trace_id"]
        and own["is_remote"] is False
        and own["trace_state"] == {}
        and not context.__pydantic_extra__
    )


def _dump(model: BaseModel) -> dict[str, Any]:
    """The fields of a small model as a dict; nested models are dumped too."""
    values = {name: _dump(value) if isinstance(value, BaseModel) else value for name, value in model.__dict__.items()}
    return values | model.__pydantic_extra__ if model.__pydantic_extra__ else values


# -- answers out -------------------------------------------------------------------------------------------------------


def build(
    cls: type[M],
    values: dict[str, Any],
    extra: dict[str, Any] | None = None,
    unread: dict[str, Unread] | None = None,
) -> M:
    """An instance with these field values, not validated: they were when they came in."""
    made = cls.__new__(cls)
    put = object.__setattr__
    put(made, "__dict__", values)
    put(made, "__pydantic_fields_set__", set(values))
    put(made, "__pydantic_extra__", extra if extra is not None else _EXTRA[cls]())
    put(made, "__pydantic_private__", unread)
    return made


def _put_aside(
    values: dict[str, Any], names: Sequence[str], payloads: Mapping[str, Any], whose: str
) -> dict[str, Unread]:
    """Take out of a record's values what cannot be decoded here, as the one among these fields that is to blame."""
    unread = {}
    for name in names:
        try:
            values[name] = decode(payloads[name])
        except Exception:  # whatever a user's class raises while it is unpickled
            del values[name]
            unread[name] = Unread(f"{name} of {whose}", partial(_field, name), payloads[name])
    return unread


def _field(name: str, payload: Opaque) -> dict[str, Any]:
    return {name: decode(payload)}


class _Extras(dict[type[BaseModel], Callable[[], Any]]):
    """What pydantic puts for "no extra fields": a dict where they are allowed, None elsewhere."""

    def __missing__(self, cls: type[BaseModel]) -> Callable[[], Any]:
        self[cls] = dict if cls.model_config.get("extra") == "allow" else type(None)
        return self[cls]


_EXTRA = _Extras()

_ROLLOUT = tuple(Rollout.model_fields)
_ATTEMPT = tuple(Attempt.model_fields)
_WORKER = tuple(Worker.model_fields)


def rollout(answer: Row) -> Rollout:
    """A rollout without its attempt."""
    values, unread = _rollout_values(answer)
    return build(Rollout, values, None, unread)


def _rollout_values(answer: Row) -> tuple[dict[str, Any], dict[str, Unread] | None]:
    values = dict(zip(_ROLLOUT, row(answer), strict=True))
    unread = None
    try:
        values["input"] = decode(values["input"])
        values["metadata"] = decode(values["metadata"])
    except Exception:
        payloads = dict(zip(_ROLLOUT, row(answer), strict=True))
        unread = _put_aside(values, ("input", "metadata"), payloads, f"rollout {values['rollout_id']}")
    values["tags"] = dict(values["tags"])
    timeout, unresponsive, max_attempts, retry_condition = row(values["config"])
    values["config"] = build(
        RolloutConfig,
        {
            "timeout_seconds": timeout,
            "unresponsive_seconds": unresponsive,
            "max_attempts": max_attempts,
            "retry_condition": list(retry_condition),
        },
    )
    return values, unread


def attempt(answer: Row) -> Attempt:
    """An attempt."""
    values = dict(zip(_ATTEMPT, row(answer), strict=True))
    unread = None
    try:
        values["metadata"] = decode(values["metadata"])
    except Exception:
        unread = _put_aside(values, ("metadata",), dict(values), f"attempt {values['attempt_id']}")
    return build(Attempt, values, None, unread)


def pair(answer: Sequence[Any]) -> Rollout | AttemptedRollout:
    """A rollout, with its latest attempt if it has one."""
    if answer[1] is None:
        return rollout(answer[0])
    return attempted(answer)


def attempted(answer: Sequence[Any]) -> AttemptedRollout:
    """A rollout with its latest attempt."""
    values, unread = _rollout_values(answer[0])
    values["attempt"] = attempt(answer[1])
    return build(AttemptedRollout, values, None, unread)


def worker(answer: Row) -> Worker:
    """A worker."""
    values = dict(zip(_WORKER, row(answer), strict=True))
    unread = None
    try:
        values["heartbeat_stats"] = decode(values["heartbeat_stats"])
    except Exception:
        unread = _put_aside(values, ("heartbeat_stats",), dict(values), f"worker {values['worker_id']}")
    return build(Worker, values, None, unread)


def change(answer: Row) -> Change:
    """A change."""
    values = dict(zip(Change.model_fields, row(answer), strict=True))
    values["detail"] = dict(values["detail"]) if values["detail"] is not None else None
    return build(Change, values)


_LOST = Kept(None, 0)


def _opened(payload: Opaque, origin: Origin, resources_id: str, version: int) -> dict[str, Any]:
    """Named resources, of which those with objects know where else these may be."""
    resources: dict[str, Any] = decode(payload, lost=_LOST)
    for resource in resources.values():
        if isinstance(resource, ObjectResource) and resource.is_elsewhere:
            kept = resource.source.kept if resource.source is not None else _LOST
            resource.source = Source(kept, origin, resources_id, version)
            if resource.value is _LOST:
                resource.value = kept
    return resources


def resources_update(answer: Row, origin: Origin, payload: Opaque = None) -> ResourcesUpdate:
    """One version of resources, with the `payload` that they were published with if the answer has none."""
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
    unread = None
    try:
        values["resources"] = _opened(resources, origin, resources_id, version)
    except Exception:
        unread = _put_aside(values, ("resources",), dict(values), f"resources {resources_id}, version {version}")
    return build(ResourcesUpdate, values, None, unread)


def span(answer: Row) -> Span:
    """A span, from its index and its body."""
    fields = row(answer)
    try:
        body = decode(fields[10])
    except Exception:  # of an attribute that is of a user's class
        return _unread_span(fields)
    return _span(fields, body)


def _span(fields: Sequence[Any], body: Sequence[Any]) -> Span:
    rollout_id, attempt_id, sequence_id, span_id, trace_id, parent_id, name, start_time, end_time = fields[:9]
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
            "links": [_link(link) for link in links],
            "start_time": start_time,
            "end_time": end_time,
            "context": _context(context, trace_id, span_id),
            "parent": _context(parent, trace_id, parent_id),
            "resource": build(OtelResource, resource or {"attributes": {}, "schema_url": ""}),
        },
        extra,
    )


_OF_BODY = ("status", "attributes", "events", "links", "context", "parent", "resource")


def _unread_span(fields: Sequence[Any]) -> Span:
    """A span whose body cannot be decoded here."""
    index = fields[:9]
    made = _span(index, ("UNSET", {}, None, None, None))
    values = {name: value for name, value in vars(made).items() if name not in _OF_BODY}
    whose = f"span {values['span_id']} of rollout {values['rollout_id']}"
    body = Unread(f"body of {whose}", partial(_fields_of_body, list(index)), fields[10])
    return build(Span, values, None, dict.fromkeys(_OF_BODY, body))


def _fields_of_body(index: Sequence[Any], payload: Opaque) -> dict[str, Any]:
    made = _span(index, decode(payload))
    return {name: vars(made)[name] for name in _OF_BODY} | {EXTRA: made.__pydantic_extra__}


def _context(context: Any, trace_id: str, span_id: str) -> SpanContext | None:
    if context == _IN_INDEX:
        return build(SpanContext, {"trace_id": trace_id, "span_id": span_id, "is_remote": False, "trace_state": {}})
    return None if context is None else _open(SpanContext, context)


def _open(cls: type[M], values: dict[str, Any]) -> M:
    """An instance of a model that allows extra fields, from all its values."""
    known = cls.model_fields
    if len(values) == len(known):
        return build(cls, values)
    extra = {name: value for name, value in values.items() if name not in known}
    return build(cls, {name: value for name, value in values.items() if name in known}, extra)


def _link(values: dict[str, Any]) -> Link:
    return _open(Link, values | {"context": _open(SpanContext, values["context"])})
