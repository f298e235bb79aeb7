"""What is told of an error that an agent raised, whatever its class does.

A class of errors may have a `__str__` that raises, or attributes that cannot be set (a frozen dataclass). What people
see is their own error all the same.
Not here: what an error means for a rollout (`agents`).
"""

from __future__ import annotations

import pickle
import traceback

NOTE = "raystore: "  #: before each note of ours


def text_of(error: BaseException) -> str:
    """What an error says of itself."""
    try:
        return str(error)
    except Exception as another:
        return f"<its text cannot be had: {type(another).__name__}>"


def summary(error: BaseException) -> str:
    """An error in one line: its class and what it says."""
    text = text_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def report(error: BaseException) -> str:
    """An error with its traceback, causes and notes; of one that Python itself cannot show, its class."""
    try:
        return "".join(traceback.format_exception(error))
    except Exception as another:
        return f"{summary(error)}\n(its traceback cannot be shown: {type(another).__name__})\n"


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an error, if it takes one and has not got it."""
    try:
        if NOTE + note not in getattr(error, "__notes__", ()):
            error.add_note(NOTE + note)
    except Exception:  # noqa: S110 - one that cannot be changed, and counts for more than a note
        pass


def portable(error: Exception) -> Exception:
    """An error that can be pickled and has a text: itself, or one that says of it what there is to say."""
    try:
        str(error)
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(last_line(report(error)))
    return error


def last_line(text: str) -> str:
    """The line of a report that says most: the last, which names the error, with the note of ours that may follow."""
    lines = [stripped for line in text.splitlines() if (stripped := line.strip(" |+-"))]  # no frame of a group
    if not lines:
        return ""
    return f"{lines[-2]}; {lines[-1]}" if len(lines) > 1 and lines[-1].startswith(NOTE) else lines[-1]
