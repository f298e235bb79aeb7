"""One declaration per record: a field is named once, at its class, and snapshots and digests follow from it.

A class of the state is a slotted dataclass whose fields say with `declare` what becomes of them: whether a snapshot
holds them, whether a replay must reproduce them, and how a value looks as plain data where it is none. A field that a
snapshot does not have (of an earlier format) takes its default. What is not given to `__init__` is no such field.
Not here: the file of a snapshot (`journal.snapshot_file`), what is compared (`digest`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any

Change = Callable[[Any], Any]


def declare(
    default: Any = MISSING,
    *,
    make: Callable[[], Any] | None = None,
    pack: Change | None = None,
    unpack: Change | None = None,
    shows: Change | None = None,
    name: str | None = None,
    in_snapshot: bool = True,
    in_digest: bool = True,
) -> Any:
    """A field of a record of the state.

    `make` makes a default that is not to be shared. `name` is its name in snapshots, if that is another. `pack` and
    `unpack` turn a value into plain data and back; `shows` says how it stands in a digest, if that is not what it is.
    """
    said = {"name": name, "pack": pack, "unpack": unpack, "shows": shows, "snapshot": in_snapshot, "digest": in_digest}
    declared = {"raystore": said}
    if make is not None:
        return dataclasses.field(default_factory=make, metadata=declared)
    return dataclasses.field(default=default, metadata=declared)


@dataclass(slots=True, frozen=True)
class Field:
    """One declared field."""

    name: str
    stored: str  # its name in a snapshot
    default: Callable[[], Any] | None  # None: whoever makes the record gives it
    pack: Change
    unpack: Change
    shows: Change
    in_snapshot: bool
    in_digest: bool


def _same(value: Any) -> Any:
    return value


@cache
def declared(cls: Any) -> tuple[Field, ...]:
    """The fields of a class, in the order of their declaration."""
    found = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        said = field.metadata.get("raystore", {})
        default: Callable[[], Any] | None = None
        if field.default_factory is not MISSING:
            default = field.default_factory
        elif field.default is not MISSING:
            default = _always(field.default)
        found.append(
            Field(
                field.name,
                said.get("name") or field.name,
                default,
                said.get("pack") or _same,
                said.get("unpack") or _same,
                said.get("shows") or _same,
                said.get("snapshot", True),
                said.get("digest", True),
            )
        )
    return tuple(found)


def _always(value: Any) -> Callable[[], Any]:
    return lambda: value


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
    return {field.stored: field.pack(getattr(record, field.name)) for field in snapshot_fields(kind)}


def unpacked(cls: Any, values: dict[str, Any]) -> Any:
    """A record of plain data; what is not there takes its default, what is not known any more is left out."""
    made: Any = object.__new__(cls)
    for field in declared(cls):
        if field.stored in values and field.in_snapshot:
            setattr(made, field.name, field.unpack(values[field.stored]))
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
