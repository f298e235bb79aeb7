"""Fields of a record whose value cannot be decoded in this process.

The record is delivered all the same: who reads such a field gets `PayloadNotReadableError`, everybody else notices
nothing. The field is missing in the record's `__dict__`, and its payload stands in `__pydantic_private__`, which a good
record does not have; so good ones pay nothing. Each reading tries again, since the missing module may be there by now.
Not here: which fields there are and how they are decoded (`convert`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from raystore.errors import PayloadNotReadableError, StoreError
from raystore.values.mistakes import Record

EXTRA = "__pydantic_extra__"  #: among fields: those that the model does not know


class Unread:
    """A payload that could not be decoded, with what decodes it; equal to another of the same payload."""

    __slots__ = ("_decode", "_payload", "_what")

    def __init__(self, what: str, decode: Callable[[Any], dict[str, Any]], payload: Any) -> None:
        self._what = what
        self._decode = decode  # gives the values of the fields by name
        self._payload = payload

    def read(self) -> dict[str, Any]:
        """The fields, if they can be decoded by now."""
        try:
            return self._decode(self._payload)
        except StoreError:  # says already what is wrong
            raise
        except Exception as error:  # whatever a user's class raises while it is unpickled
            raise self.problem(error) from error

    def problem(self, error: Exception) -> PayloadNotReadableError:
        """What its reader is told."""
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        return PayloadNotReadableError(self._what, missing, f"{type(error).__name__}: {error}")

    def _content(self) -> Any:
        payload = self._payload
        return self._what, payload if isinstance(payload, bytes) else (payload.data, payload.refs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unread) and self._content() == other._content()

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        try:
            self.read()
        except Exception as error:
            return f"<not readable here: {error}>"
        return "<not read yet>"


class Delivered(Record):
    """A record that a store answers with."""

    if not TYPE_CHECKING:  # a type checker would take any name for a field

        def __getattr__(self, name: str) -> Any:
            unread = _unread_fields(self).get(name)
            if unread is None:
                return super().__getattr__(name)
            fields = unread.read()
            if EXTRA in fields:
                object.__setattr__(self, EXTRA, fields.pop(EXTRA))
            vars(self).update(fields)
            left = {other: kept for other, kept in self.__pydantic_private__.items() if other not in fields}
            object.__setattr__(self, "__pydantic_private__", left or None)  # like a record that was read at once
            return fields[name]

    def __repr_args__(self) -> Any:
        yield from super().__repr_args__()
        yield from ((name, unread) for name, unread in _unread_fields(self).items())

    def __iter__(self) -> Any:
        read_all(self)
        return super().__iter__()

    def model_dump(self, *arguments: Any, **options: Any) -> Any:
        read_all(self)
        return super().model_dump(*arguments, **options)

    def model_dump_json(self, *arguments: Any, **options: Any) -> Any:
        read_all(self)
        return super().model_dump_json(*arguments, **options)


def _unread_fields(record: BaseModel) -> dict[str, Unread]:
    """Those that are not read yet."""
    try:
        private = object.__getattribute__(record, "__pydantic_private__")
    except AttributeError:  # it is being made
        return {}
    return {} if not private else {name: unread for name, unread in private.items() if name not in vars(record)}


def _records_in(value: Any) -> Iterator[Delivered]:
    if isinstance(value, Delivered):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _records_in(item)


def read_all(record: BaseModel) -> bool:
    """Read what is not read yet, in the record and in those that it holds; raises what reading raises.

    Whether there was anything.
    """
    names = list(_unread_fields(record))
    for name in names:
        getattr(record, name)
    inner = [read_all(held) for value in vars(record).values() for held in _records_in(value)]
    return bool(names) or any(inner)
