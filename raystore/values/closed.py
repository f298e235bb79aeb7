"""Pickles that stay closed: a reader that must run no code of others sees the type and the size of such a value.

`with pickles_closed():` no pickle of a user is opened by this task or thread, nor by the tasks that it starts: a
`Closed` stands in its place. Plain data is read as always. A new thread opens pickles, but for `asyncio.to_thread`'s.
Not here: which values are pickled (`wire.codec`).
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

_are_closed: ContextVar[bool] = ContextVar("pickles are closed", default=False)

LOOKED_AT = 32  #: operations of a pickle in which its type is looked for
#: What a pickle begins with, and what that says of its type.
_OF_OPERATION = {
    "EMPTY_DICT": "dict", "EMPTY_LIST": "list", "EMPTY_SET": "set", "EMPTY_TUPLE": "tuple", "MARK": "tuple",
    "NONE": "None", "NEWTRUE": "bool", "NEWFALSE": "bool", "BINFLOAT": "float", "BYTEARRAY8": "bytearray",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Closed:
    """A value that was not unpickled.

    Attributes:
        type: the name of its class, as far as a pickle tells without being opened.
        size: of its pickle, in bytes.
    """

    type: str
    size: int

    def __repr__(self) -> str:
        return f"<{self.type}, a pickle of {self.size} bytes, not opened>"


@contextmanager
def pickles_closed() -> Iterator[None]:
    """Open no pickle within the block."""
    token = _are_closed.set(True)
    try:
        yield
    finally:
        _are_closed.reset(token)


def are_closed() -> bool:
    """Whether pickles are to stay closed here."""
    return _are_closed.get()


def closed(pickled: bytes | memoryview) -> Closed:
    """What stands for a pickle that is not opened."""
    return Closed(_type_in(bytes(pickled[: 64 * 1024])), len(pickled))


def _type_in(pickled: bytes) -> str:
    """The name of the class of a pickled value: the first that the pickle names, unless it begins with a plain one."""
    texts: list[str] = []
    try:
        for number, (operation, argument, _) in enumerate(pickletools.genops(pickled)):
            name = operation.name
            if number == LOOKED_AT:
                break
            if name in ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT"):
                continue
            if name in ("SHORT_BINUNICODE", "BINUNICODE"):
                texts.append(str(argument))
            elif name == "GLOBAL":
                return str(argument).replace(" ", ".")
            elif name == "STACK_GLOBAL":
                return ".".join(texts[-2:])
            elif not texts:
                return _OF_OPERATION.get(name, "an object")
    except Exception:  # it is cut off, or no pickle: nothing is opened to find out
        pass
    return "str" if len(texts) == 1 else "an object"
