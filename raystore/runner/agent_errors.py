"""Errors that agents raise: their text, their causes and our notes on them.

An error's class may have a `__str__` that raises, or attributes that cannot be set (a frozen dataclass). Users must see
their error all the same, so no function here raises.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterator

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
