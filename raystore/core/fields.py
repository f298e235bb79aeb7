"""One declaration per record: a field is named once, at its class, and snapshots and digests follow from it.

A class of the state is a slotted dataclass whose fields say with `declare` what becomes of them: whether a snapshot
holds them, whether a replay must reproduce them, and how a value looks as plain data where it is none. A field that a
snapshot does not have (of an earlier format) takes its default. What is not given to `__init__` is no such field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any

Change = Callable[[Any], Any]


def _same(value: Any) -> Any:
    return value


@dataclass(slots=True, frozen=True)
class Field:
    """One declared field."""

    name: str
    default: Callable[[], Any] | None  # None: whoever makes the record gives it
    pack: Change = _same
    unpack: Change = _same
    shows: Change = _same
    stored_as: str = ""  # its name in a snapshot
    in_snapshot: bool = True
    in_digest: bool = True


def declare(
    default: Any = MISSING,
    *,
    make: Callable[[], Any] | None = None,
    pack: Change = _same,
    unpack: Change = _same,
    shows: Change = _same,
    name: str | None = None,
    in_snapshot: bool = True,
    in_digest: bool = True,
) -> Any:
    """A field of a record of the state.

    `make` makes a default that is not to be shared. `name` is its name in snapshots, if that is another. `pack` and
    `unpack` turn a value into plain data and back; `shows` says how it stands in a digest, if that is not what it is.
    """
    how: dict[str, Any] = {"pack": pack, "unpack": unpack, "shows": shows}
    how |= {"in_snapshot": in_snapshot, "in_digest": in_digest}
    if name is not None:
        how["stored_as"] = name
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
    """A record of plain data; what is not there takes its default, what is not known any more is left out."""
    made: Any = object.__new__(cls)
    for field in declared(cls):
        if field.stored_as in values and field.in_snapshot:
            setattr(made, field.name, field.unpack(values[field.stored_as]))
        elif field.default is not None:
            setattr(made, field.name, field.default())
    return made


def shown(record: Any) -> list[Any]:
    """What of a record a replay must reproduce."""
    kind: Any = type(record)
    return [field.shows(getattr(record, field.name)) for field in digest_fields(kind)]


def pairs(mapping: dict[Any, Any]) -> list[Any]:
    """A dictionary whose keys need not be text, as plain data."""
    return list(mapping.items())
