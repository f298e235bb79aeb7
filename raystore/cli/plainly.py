"""What a store answers as plain data, for `--json`: dicts, lists, texts and numbers.

A pickle, which is not opened, is `{"type", "bytes", "opened": false}`; bytes are `{"bytes"}`; a secret is hidden. JSON
escapes all that is not ASCII, so that no control character comes through. NaN and infinities, which JSON has not, are
texts.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from raystore.errors import PayloadNotReadableError
from raystore.values.closed import Closed

HIDDEN = "(hidden)"
_SECRETS = {"api_key"}


def fields_of(model: BaseModel) -> dict[str, Any]:
    """The fields of a record; one that cannot be read says why instead."""
    found = {}
    for name in type(model).model_fields:
        try:
            value = getattr(model, name) if name != "endpoint" else vars(model)[name]
        except PayloadNotReadableError as error:
            value = {"not_readable": error.why}
        found[name] = HIDDEN if name in _SECRETS and value is not None else value
    return found | (model.__pydantic_extra__ or {})


def plain(value: Any) -> Any:
    """Plain data for what a store answers with, or a list, tuple or dict of such."""
    if isinstance(value, BaseModel):
        value = fields_of(value)
    if isinstance(value, Mapping):
        return {str(name): plain(held) for name, held in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, array)):
        return [plain(held) for held in value]
    if isinstance(value, Closed):
        return {"type": value.type, "bytes": value.size, "opened": False}
    if isinstance(value, bytes):
        return {"bytes": len(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, bool, int, float)) else repr(value)


def as_json(value: Any, *, indent: int | None = None) -> str:
    """The JSON text of what a store answers with."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)
