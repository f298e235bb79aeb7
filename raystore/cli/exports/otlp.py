"""Spans as OTLP requests, as a collector takes them: OpenTelemetry's, Phoenix, Langfuse, Jaeger, Tempo.

Each span has `raystore.rollout_id` and its like, besides its own attributes. Ids that are not hexadecimal, as a span
that was made by hand may have, become hashes. With `is_openinference` spans get the attributes by which Phoenix shows
calls of models, tools and agents; those that a tracer has set stay.
Not here: sending (`targets`).
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

from raystore.cli.exports.records import field_of, plain, text, to_json
from raystore.cli.exports.source import Whole
from raystore.errors import InvalidValueError
from raystore.tracing import semconv
from raystore.tracing.dialects import CallFacts, is_model_call
from raystore.types.spans import Span, reward_of

REQUEST_BYTES = 3_500_000  #: of one request, unless one span alone is larger; collectors often take 4 MiB
REQUEST_SPANS = 2_000

_KINDS = {"INTERNAL": 1, "SERVER": 2, "CLIENT": 3, "PRODUCER": 4, "CONSUMER": 5}
_CODES = {"UNSET": 0, "OK": 1, "ERROR": 2}


def messages() -> Any:
    """The modules with OTLP's messages. Raises ModuleNotFoundError, with what to install."""
    try:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
    except ModuleNotFoundError as error:
        told = "OTLP needs the package opentelemetry-proto, which ray[default] has: pip install opentelemetry-proto"
        raise ModuleNotFoundError(told, name="opentelemetry-proto") from error
    return trace_service_pb2


def requests(found: Iterable[Whole], *, is_openinference: bool = False) -> Iterator[tuple[bytes, int]]:
    """Requests with the spans of these rollouts, and how many each has."""
    pb = messages()
    made, size, count = pb.ExportTraceServiceRequest(), 0, 0
    scopes: dict[str, Any] = {}
    for one in found:
        for attempt in one.attempts:
            for span in one.recorded.get(attempt.attempt_id, ()):
                message = span_message(span, one, attempt, is_openinference=is_openinference)
                weight = message.ByteSize()
                if count and (size + weight > REQUEST_BYTES or count == REQUEST_SPANS):
                    yield made.SerializeToString(), count
                    made, size, count, scopes = pb.ExportTraceServiceRequest(), 0, 0, {}
                _scope_of(made, scopes, span).spans.append(message)
                size, count = size + weight, count + 1
    if count:
        yield made.SerializeToString(), count


def _scope_of(request: Any, scopes: dict[str, Any], span: Span) -> Any:
    """The part of a request for the spans of one resource and library."""
    resource = field_of(span, "resource")
    attributes = {"service.name": "raystore", **_mapping(getattr(resource, "attributes", None))}
    library = _mapping((span.model_extra or {}).get("instrumentation_scope"))
    name, version = text(str(library.get("name") or "raystore")), text(str(library.get("version") or ""))
    key = to_json([plain(attributes), name, version])
    if key not in scopes:
        part = request.resource_spans.add()
        _add_attributes(part.resource.attributes, attributes)
        scopes[key] = part.scope_spans.add()
        scopes[key].scope.name, scopes[key].scope.version = name, version
    return scopes[key]


def span_message(span: Span, one: Whole, attempt: Any, *, is_openinference: bool) -> Any:
    """A span as an OTLP span."""
    from opentelemetry.proto.trace.v1 import trace_pb2

    message: Any = trace_pb2.Span()
    message.trace_id, message.span_id = id_bytes(span.trace_id, 16), id_bytes(span.span_id, 8)
    if span.parent_id:
        message.parent_span_id = id_bytes(span.parent_id, 8)
    message.name = text(span.name)
    begin = span.start_time if span.start_time is not None else attempt.start_time
    end = span.end_time if span.end_time is not None else begin
    message.start_time_unix_nano, message.end_time_unix_nano = _nanos(begin), _nanos(max(end, begin))
    kind = str((span.model_extra or {}).get("kind") or "INTERNAL").rpartition(".")[2]
    message.kind = _KINDS.get(kind, 1)
    status = field_of(span, "status")
    message.status.code = _CODES.get(getattr(status, "status_code", "UNSET"), 0)
    message.status.message = text(getattr(status, "description", None) or "")
    attributes = _mapping(field_of(span, "attributes"))
    if is_openinference:
        attributes = openinference(span, attributes, one) | dict(attributes)
    _add_attributes(message.attributes, {**attributes, **_where(one, attempt)})
    for event in _list(field_of(span, "events")):
        added = message.events.add()
        added.name = text(event.name)
        added.time_unix_nano = _nanos(event.timestamp if event.timestamp is not None else begin)
        _add_attributes(added.attributes, event.attributes)
    for link in _list(field_of(span, "links")):
        to = message.links.add()
        to.trace_id, to.span_id = id_bytes(link.context.trace_id, 16), id_bytes(link.context.span_id, 8)
        _add_attributes(to.attributes, link.attributes or {})
    return message


def _where(one: Whole, attempt: Any) -> dict[str, Any]:
    """What a span belongs to."""
    rollout = one.rollout
    found = {
        "raystore.rollout_id": rollout.rollout_id, "raystore.attempt_id": attempt.attempt_id,
        "raystore.group_id": rollout.group_id, "raystore.mode": rollout.mode, "raystore.status": rollout.status,
        "raystore.reward": rollout.reward, "raystore.worker_id": attempt.worker_id,
        semconv.POLICY_VERSION: attempt.policy_version,
        **{f"raystore.tag.{name}": value for name, value in rollout.tags.items()},
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def id_bytes(name: str, length: int) -> bytes:
    """An id of so many bytes: the hexadecimal one that a name is, else a hash of the name."""
    try:
        found = bytes.fromhex(name)
    except ValueError:
        found = b""
    if len(found) == length and any(found):
        return found
    return blake2b(name.encode("utf-8", "replace"), digest_size=length).digest()


def _nanos(seconds: float) -> int:
    return max(round(seconds * 1e9), 0) if math.isfinite(seconds) else 0


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _add_attributes(into: Any, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if value is not None:
            added = into.add()
            added.key = text(str(name))
            _set(added.value, value)


def _set(into: Any, value: Any) -> None:
    """Put a value into an `AnyValue`."""
    if isinstance(value, bool):
        into.bool_value = value
    elif isinstance(value, int):
        if -(2**63) <= value < 2**63:
            into.int_value = value
        else:
            into.string_value = str(value)
    elif isinstance(value, float):
        into.double_value = value
    elif isinstance(value, str):
        into.string_value = text(value)
    elif isinstance(value, (bytes, bytearray)):
        into.bytes_value = bytes(value)
    elif isinstance(value, (list, tuple, array)):
        into.array_value.SetInParent()
        for held in value:
            _set(into.array_value.values.add(), held)
    elif isinstance(value, Mapping):
        into.kvlist_value.SetInParent()
        _add_attributes(into.kvlist_value.values, value)
    elif value is not None:
        into.string_value = to_json(plain(value))


# -- OpenInference, as Phoenix reads it --------------------------------------------------------------------------------


def openinference(span: Span, attributes: Mapping[str, Any], one: Whole) -> dict[str, Any]:
    """The attributes by which Phoenix shows a span as what it is."""
    found: dict[str, Any] = {"session.id": one.rollout.group_id or one.rollout.rollout_id}
    operation = attributes.get(semconv.OPERATION)
    if is_model_call(span.name, attributes):
        return found | {"openinference.span.kind": "LLM"} | _of_call(span, attributes)
    if operation == "execute_tool" or "gen_ai.tool.name" in attributes or "tool.name" in attributes:
        return found | {"openinference.span.kind": "TOOL"} | _of_tool(span, attributes)
    if operation == "embeddings":
        return found | {"openinference.span.kind": "EMBEDDING"}
    if (reward := reward_of(span.name, attributes)) is not None:
        return found | {"openinference.span.kind": "EVALUATOR", "output.value": f"{reward:g}"}
    is_agent = operation in ("invoke_agent", "create_agent") or semconv.AGENT_NAME in attributes
    found["openinference.span.kind"] = "AGENT" if is_agent else "CHAIN"
    if span.parent_id is None:  # the outermost shows the task, and what came of it
        found |= _value("input", plain(field_of(one.rollout, "input")))
        if one.rollout.reward is not None:
            found["metadata"] = to_json({"reward": plain(one.rollout.reward), "status": one.rollout.status})
    return found


def _of_call(span: Span, attributes: Mapping[str, Any]) -> dict[str, Any]:
    try:
        facts = CallFacts(span, attributes)
    except InvalidValueError:  # its token ids cannot be read; the rest of it is shown
        return {}
    asked, answer = facts.messages("messages"), facts.messages("answer")
    prompt = attributes.get(semconv.INPUT_TOKENS, _length(facts.prompt_ids))
    response = attributes.get(semconv.OUTPUT_TOKENS, _length(facts.response_ids))
    is_counted = isinstance(prompt, int) and isinstance(response, int)
    sampling = {name.rpartition(".")[2]: attributes[name] for name in semconv.SAMPLING if name in attributes}
    found = {
        "llm.model_name": facts.text("model"),
        "llm.token_count.prompt": prompt,
        "llm.token_count.completion": response,
        "llm.token_count.total": prompt + response if is_counted else None,
        "llm.invocation_parameters": to_json(plain(sampling)) if sampling else None,
        **_of_messages("llm.input_messages", asked),
        **_of_messages("llm.output_messages", answer),
        **(_value("input", plain(asked)) if asked else {}),
        **(_value("output", _said(answer)) if answer else {}),
    }
    return {name: value for name, value in found.items() if value is not None}


def _length(ids: Any) -> int | None:
    return None if ids is None else len(ids)


def _said(answer: list[dict[str, Any]]) -> Any:
    """The text of an answer if it is nothing else."""
    is_text = len(answer) == 1 and isinstance(answer[0]["content"], str) and "tool_calls" not in answer[0]
    return answer[0]["content"] if is_text else plain(answer)


def _of_messages(prefix: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for number, message in enumerate(found):
        place = f"{prefix}.{number}.message"
        content = message.get("content")
        told[f"{place}.role"] = message["role"]
        if content is not None:
            told[f"{place}.content"] = content if isinstance(content, str) else json.dumps(plain(content))
        if message.get("tool_call_id"):
            told[f"{place}.tool_call_id"] = message["tool_call_id"]
        for index, call in enumerate(message.get("tool_calls", ())):
            inner = f"{place}.tool_calls.{index}.tool_call"
            told[f"{inner}.id"] = call.get("id")
            told[f"{inner}.function.name"] = call["function"].get("name")
            told[f"{inner}.function.arguments"] = call["function"].get("arguments")
    return told


def _of_tool(span: Span, attributes: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"tool.name": attributes.get("gen_ai.tool.name", attributes.get("tool.name", span.name))}
    arguments = attributes.get("gen_ai.tool.call.arguments", attributes.get("tool.parameters"))
    result = attributes.get("gen_ai.tool.call.result")
    if arguments is not None:
        found |= _value("input", plain(arguments))
    if result is not None:
        found |= _value("output", plain(result))
    return found


def _value(side: str, value: Any) -> dict[str, Any]:
    """An input or output, as text or JSON."""
    if isinstance(value, str):
        return {f"{side}.value": value, f"{side}.mime_type": "text/plain"}
    return {f"{side}.value": to_json(value), f"{side}.mime_type": "application/json"}
