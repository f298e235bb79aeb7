"""Rows as Parquet: the same tree as in JSON, with what has no type of its own (inputs, attributes) as JSON in a text.

Needs pyarrow (`pip install "raystore[export]"`), which is imported only here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raystore.cli.exports.records import to_json

JOINED_ROWS = 64  #: that are in memory at once while files are joined

_TEXT, _TIME, _WHOLE, _FLAG = "string", "float64", "int64", "bool"
_JSON = "json"  # of a value that may be anything: its JSON, in a text
_SPAN = {
    "span_id": _TEXT, "trace_id": _TEXT, "parent_id": _TEXT, "sequence_id": _WHOLE, "name": _TEXT, "start_time": _TIME,
    "end_time": _TIME, "status": {"status_code": _TEXT, "description": _TEXT}, "attributes": _JSON, "events": _JSON,
    "links": _JSON, "resource": _JSON,
}  # fmt: skip
_ATTEMPT = {
    "attempt_id": _TEXT, "sequence_id": _WHOLE, "status": _TEXT, "outcome": _TEXT, "reward": _TIME, "error": _TEXT,
    "worker_id": _TEXT, "start_time": _TIME, "end_time": _TIME, "last_heartbeat_time": _TIME,
    "resources_version": _WHOLE, "policy_version": _WHOLE, "metadata": _JSON, "spans": [_SPAN],
}  # fmt: skip
ROLLOUT: dict[str, Any] = {
    "rollout_id": _TEXT, "status": _TEXT, "mode": _TEXT, "reward": _TIME, "input": _JSON, "metadata": _JSON,
    "tags": _JSON, "group_id": _TEXT, "queue": _TEXT, "priority": _WHOLE, "resources_id": _TEXT, "start_time": _TIME,
    "end_time": _TIME, "requeued_from": _TEXT, "config": _JSON, "spans_evicted": _FLAG, "attempts": [_ATTEMPT],
}  # fmt: skip
_MESSAGE = {"role": _TEXT, "content": _TEXT, "tool_calls": _TEXT, "tool_call_id": _TEXT, "name": _TEXT}
_SEQUENCE = {
    "role": _TEXT, "token_ids": [_WHOLE], "loss_mask": ["int8"], "logprobs": [_TIME], "policy_versions": [_WHOLE],
}  # fmt: skip
_CALL = {
    "model": _TEXT, "role": _TEXT, "finish_reason": _TEXT, "prompt": [_MESSAGE], "completion": [_MESSAGE],
    "prompt_ids": [_WHOLE], "response_ids": [_WHOLE], "logprobs": [_TIME],
}  # fmt: skip
_MEMBER = {
    "rollout_id": _TEXT, "attempt_id": _TEXT, "status": _TEXT, "outcome": _TEXT, "error": _TEXT, "reward": _TIME,
    "policy_version": _WHOLE, "spans_evicted": _FLAG, "sequences": [_SEQUENCE], "calls": [_CALL],
}  # fmt: skip
GROUP: dict[str, Any] = {
    "group_id": _TEXT, "status": _TEXT, "why": _TEXT, "mode": _TEXT, "queue": _TEXT, "tags": _TEXT, "input": _TEXT,
    "size": _WHOLE, "start_time": _TIME, "end_time": _TIME, "rewards": [_TIME], "rollouts": [_MEMBER],
}  # fmt: skip


def library() -> Any:
    """pyarrow. Raises ModuleNotFoundError, with what to install."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        told = 'Parquet needs the package pyarrow: pip install "raystore[export]" (or pip install pyarrow)'
        raise ModuleNotFoundError(told, name="pyarrow") from error
    return pyarrow


def schema(form: Any) -> Any:
    """The Arrow schema of rows of a form."""
    pyarrow = library()
    return pyarrow.schema([(name, _type(held)) for name, held in form.items()])


def _type(form: Any) -> Any:
    pyarrow = library()
    if isinstance(form, list):
        return pyarrow.list_(_type(form[0]))
    if isinstance(form, dict):
        return pyarrow.struct([(name, _type(held)) for name, held in form.items()])
    return pyarrow.string() if form == _JSON else pyarrow.type_for_alias(form)


def fitted(row: Any, form: Any) -> Any:
    """A row of plain data as a form asks for it: what may be anything becomes JSON, infinities become numbers again."""
    if row is None:
        return None
    if isinstance(form, list):
        return [fitted(held, form[0]) for held in row]
    if isinstance(form, dict):
        return {name: fitted(row.get(name), held) for name, held in form.items()} if "unreadable" not in row else None
    if form == _JSON:
        return to_json(row)
    return float(row) if form == _TIME else row


def write(path: Path, rows: Sequence[dict[str, Any]], form: Any) -> None:
    """Write rows to a file of their own, which appears as a whole."""
    pyarrow = library()
    table = pyarrow.Table.from_pylist([fitted(row, form) for row in rows], schema=schema(form))
    started = unfinished(path)
    pyarrow.parquet.write_table(table, started, compression="zstd")
    started.replace(path)


def unfinished(path: Path) -> Path:
    """Where a file is written, under a name that readers of its directory pass over."""
    return path.with_name(f"_{path.name}.partial")


def join(parts: Sequence[Path], path: Path, form: Any) -> None:
    """Join files of rows to one, some rows at a time."""
    pyarrow = library()
    started = unfinished(path)
    with pyarrow.parquet.ParquetWriter(started, schema(form), compression="zstd") as writer:
        for part in parts:
            for batch in pyarrow.parquet.ParquetFile(part).iter_batches(batch_size=JOINED_ROWS):
                writer.write_batch(batch)
    started.replace(path)
