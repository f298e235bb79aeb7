"""Words that error messages have in common: the nearest name, lists of names, how a value is shown."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

PART_LETTERS = 3  #: length from which a name that is part of another one counts as near it
NAMED = 5  #: things of one kind that a message names
SHOWN = 100  #: characters of a value that a message shows

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = SHOWN


def meant(name: Any, known: Iterable[str]) -> str:
    """The known name that is nearest, as the end of a sentence; empty if none is near."""
    if not isinstance(name, str) or not 0 < len(name) < 100:
        return ""
    names = [one for one in known if isinstance(one, str)]
    found = difflib.get_close_matches(name, names, n=1)
    if not found and len(name) >= PART_LETTERS:
        found = [one for one in names if len(one) >= PART_LETTERS and (one in name or name in one)]
    return f"; did you mean {found[0]!r}?" if found else ""


def either(names: Sequence[str]) -> str:
    """Alternatives as a sentence has them: a, b or c."""
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def quoted(names: Iterable[str]) -> str:
    """Names in quotation marks: 'a', 'b'."""
    return ", ".join(map(repr, names))


def shown(value: Any) -> Any:
    """A value as an error carries it: plain, and no longer than a line. Shown again, it stays the same."""
    if value is None or type(value) in (bool, float) or (type(value) is int and abs(value) < 2**63):
        return value
    if type(value) is str:
        return value if len(value) <= SHOWN + 40 else f"{value[:SHOWN]}... ({len(value)} characters)"
    return f"<{type(value).__name__} {_SHORT.repr(value)[:SHOWN]}>"
