"""The text of errors: words that our messages have in common, and how the errors that agents raise are shown."""

from __future__ import annotations

import difflib
import pickle
import reprlib
import traceback
from collections.abc import Iterable, Iterator, Sequence
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


# -- errors that agents raise ------------------------------------------------------------------------------------------

# An error's class may have a `__str__` that raises, or attributes that cannot be set (a frozen dataclass). Users must
# see their error all the same, so no function here raises.

NOTE = "raystore: "  #: begins each of our notes
MAX_CAUSES = 20  #: of an error that are looked at; a chain of causes may be circular


def text_of(error: BaseException) -> str:
    """`str(error)`, or a placeholder if that raises."""
    try:
        return str(error)
    except Exception as another:
        return f"<its text cannot be had: {type(another).__name__}>"


def summary(error: BaseException) -> str:
    """An error in one line: its class and its text."""
    text = text_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def report(error: BaseException) -> str:
    """An error with its traceback, causes and notes; only its summary if Python cannot format them."""
    try:
        return "".join(traceback.format_exception(error))
    except Exception as another:
        return f"{summary(error)}\n(its traceback cannot be shown: {type(another).__name__})\n"


def last_line(text: str) -> str:
    """The most informative line of a report: the last one, which names the error, with our note if one follows it."""
    lines = [stripped for line in text.splitlines() if (stripped := line.strip(" |+-"))]  # without frames of groups
    if not lines:
        return ""
    return f"{lines[-2]}; {lines[-1]}" if len(lines) > 1 and lines[-1].startswith(NOTE) else lines[-1]


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an error, once, if its class permits."""
    try:
        if NOTE + note not in getattr(error, "__notes__", ()):
            error.add_note(NOTE + note)
    except Exception:  # noqa: S110 - the error matters more than the note
        pass


def portable(error: Exception) -> Exception:
    """The error itself if it has a text and can be pickled, else a RuntimeError with its last line."""
    try:
        str(error)
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(last_line(report(error)))
    return error


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors of a group and of the groups in it; of any other error, itself."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from leaves(one)
    else:
        yield error


def with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, newest first, each group followed by its leaves."""
    for _ in range(MAX_CAUSES):
        if error is None:
            return
        yield error
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        error = error.__cause__ or error.__context__
