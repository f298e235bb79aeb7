"""Rollouts as rows of plain data: a rollout with its attempts, each with its spans.

Every value has a form in JSON. Bytes are `{"base64": ...}`; a value that only a pickle holds is told by its type and
its size, `{"opaque": ..., "bytes": ...}`, and one that cannot be read here by why, `{"unreadable": ...}`; NaN and
infinities are texts. Texts are valid Unicode: half a character, which no file can hold, becomes a question mark.
Not here: files (`targets`), groups to train on (`groups`).
"""

from __future__ import annotations

import base64
import json
import math
from array import array
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from raystore.cli.exports.source import Whole
from raystore.errors import PayloadNotReadableError
from raystore.types.spans import Span
from raystore.values.closed import Closed

_RECORDED = (
    "rollout_id", "status", "mode", "reward", "input", "metadata", "tags", "group_id", "queue", "priority",
    "resources_id", "start_time", "end_time", "requeued_from", "config",
)  # fmt: skip
_OF_ATTEMPT = (
    "attempt_id", "sequence_id", "status", "outcome", "reward", "error", "worker_id", "start_time", "end_time",
    "last_heartbeat_time", "resources_version", "policy_version", "metadata",
)  # fmt: skip
_OF_SPAN = (
    "span_id", "trace_id", "parent_id", "sequence_id", "name", "start_time", "end_time", "status", "attributes",
    "events", "links", "resource",
)  # fmt: skip


def row(one: Whole) -> dict[str, Any]:
    """A rollout as a row, with its attempts and their spans."""
    attempts = []
    for attempt in one.attempts:
        spans = [span_row(span) for span in one.spans.get(attempt.attempt_id, ())]
        attempts.append(_fields(attempt, _OF_ATTEMPT) | {"spans": spans})
    return _fields(one.rollout, _RECORDED) | {"spans_evicted": one.is_partial, "attempts": attempts}


def span_row(span: Span) -> dict[str, Any]:
    """A span as a row."""
    return _fields(span, _OF_SPAN)


def _fields(record: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: plain(field_of(record, name)) for name in names}


def field_of(record: Any, name: str) -> Any:
    """A field of a record; what stands for it if it cannot be read here."""
    try:
        return getattr(record, name)
    except PayloadNotReadableError as error:
        return {"unreadable": text(error.why)}


def plain(value: Any) -> Any:
    """A value in a form that JSON has."""
    if value is None or type(value) in (bool, int):
        return value
    if isinstance(value, str):
        return text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else _NOT_FINITE[str(value)]
    if isinstance(value, Mapping):
        return {text(str(name)): plain(held) for name, held in value.items()}
    if isinstance(value, array):
        return value.tolist() if value.typecode not in "fd" else [plain(held) for held in value]
    if isinstance(value, (list, tuple)):
        return [plain(held) for held in value]
    if isinstance(value, (bytes, bytearray)):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, BaseModel):
        return {name: plain(field_of(value, name)) for name in type(value).model_fields} | plain(
            value.model_extra or {}
        )
    if isinstance(value, Closed):
        return {"opaque": text(value.type), "bytes": value.size}
    return {"opaque": f"{type(value).__module__}.{type(value).__qualname__}", "bytes": None}


_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def text(value: str) -> str:
    """A text that every file can hold."""
    if value.isascii():
        return str.__str__(value)
    return value.encode("utf-8", "replace").decode()


def to_json(value: Any) -> str:
    """The JSON of plain data in one line, in which no character is a control character."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
