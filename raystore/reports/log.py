"""What the package tells in the log: its loggers, which line is told again and when, and `setup_logging`.

All loggers are below "raystore". The program decides what becomes of their lines; if it decides nothing, Python writes
warnings and errors to stderr, and nothing below. Whatever a user's value holds, a line is one line: control characters
are escaped, and the lines of a longer text are indented.

Trouble comes in thousands: one failing agent fails every rollout. So a line may have a kind:
`logger.warning(..., extra=a_minute("heartbeat"))` is told once a minute, then with the number of those that were left
out; `extra=once("no reward")` is told once in this process.
Not here: what goes wrong, and when that is worth a line.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Hashable
from time import monotonic
from typing import Any, TextIO

from raystore.errors import InvalidValueError
from raystore.errors.text import either, meant, shown

MINUTE_SECONDS = 60.0  #: in which a kind of trouble is told once
KINDS_KNOWN = 1_000  #: kinds that are remembered; one that was forgotten is told again

_KIND = "raystore_kind"  # attribute of a record: its kind, and for how many seconds it is not told again


# -- text that is safe to show ----------------------------------------------------------------------------------------

#: C0 and C1 but tabulator and new line; what ends a line or turns its direction; halves of characters.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    """A text without control characters, which no terminal obeys; lines after the first are indented."""
    if text.isprintable():
        return text
    text = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return text.replace("\n", "\n    ")


# -- kinds of trouble --------------------------------------------------------------------------------------------------


def a_minute(*kind: Hashable) -> dict[str, Any]:
    """For `extra=`: tell a line of this kind once in a minute, and how many more there were."""
    return {_KIND: (kind, MINUTE_SECONDS)}


def once(*kind: Hashable) -> dict[str, Any]:
    """For `extra=`: tell a line of this kind once in this process."""
    return {_KIND: (kind, math.inf)}


class _Kind:
    """A kind of trouble that was told."""

    __slots__ = ("last", "left_out", "until")

    def __init__(self, until: float) -> None:
        self.until = until  # `monotonic`; not told again before
        self.left_out = 0  # lines since it was told
        self.last = ""  # of these


class _Sieve(logging.Filter):
    """Leaves out what was told, and makes the text of the rest safe."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()  # a garbage collection may log while it is held
        self._kinds: dict[Hashable, _Kind] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            text = escaped(record.getMessage())
        except Exception:  # the text of a user's value cannot be had; logging says where that was
            return True
        kind = record.__dict__.pop(_KIND, None)
        if kind is not None:
            more = self._left_out(record, text, *kind)
            if more is None:
                return False
            text += f" (and {more} more like this since)" if more else ""
        record.msg, record.args = text, None
        if record.exc_info and not record.exc_text:
            record.exc_text = escaped(_FORMATTER.formatException(record.exc_info))
        return True

    def _left_out(self, record: logging.LogRecord, text: str, kind: Hashable, seconds: float) -> int | None:
        """How many lines were left out since this kind was told; None if this one is left out as well."""
        now, key = monotonic(), (record.name, kind)
        with self._lock:
            known = self._kinds.get(key)
            if known is not None and now < known.until:
                known.left_out, known.last = known.left_out + 1, text
                is_first, left = known.left_out == 1 and seconds < math.inf, known.until - now
            else:
                if known is None and len(self._kinds) >= KINDS_KNOWN:
                    del self._kinds[next(iter(self._kinds))]
                self._kinds[key] = _Kind(now + seconds)
                return 0 if known is None else known.left_out
        if is_first:  # without the lock: the new thread may log as well, in a garbage collection
            self._tell_rest_in(left, record, key)
        return None

    def _tell_rest_in(self, seconds: float, record: logging.LogRecord, key: Hashable) -> None:
        """Tell how many were left out, should no other line of this kind do it."""
        timer = threading.Timer(seconds, self._tell_rest, (record.name, record.levelno, key))
        timer.name, timer.daemon = "log-of-raystore", True
        with contextlib.suppress(RuntimeError):  # no thread can be started, or the interpreter ends
            timer.start()

    def _tell_rest(self, name: str, level: int, key: Hashable) -> None:
        with self._lock:
            known = self._kinds.get(key)
            if known is None or not known.left_out:
                return
            self._kinds[key] = _Kind(monotonic() + MINUTE_SECONDS)
        many = f"{known.left_out} more like this since" if known.left_out > 1 else "once more"
        logging.getLogger(name).log(level, "%s (%s)", known.last, many)

    def forget(self) -> None:
        """Tell every kind again; for tests, and in a forked process, whose lock may be locked for ever."""
        self._lock = threading.RLock()
        self._kinds = {}


_FORMATTER = logging.Formatter()
_SIEVE = _Sieve()
forget_told: Callable[[], None] = _SIEVE.forget
os.register_at_fork(after_in_child=forget_told)


def logger_of(name: str) -> logging.Logger:
    """The logger of a part of the package, "raystore" or below it."""
    logger = logging.getLogger(name)
    logger.addFilter(_SIEVE)  # which does nothing the second time
    return logger


# -- for programs ------------------------------------------------------------------------------------------------------


def setup_logging(level: int | str = "INFO", *, stream: TextIO | None = None) -> None:
    """Write what raystore logs, from this level on, with time, level and logger; of this process, and nothing else.

    Configures the logger "raystore" only, whose lines then go nowhere else; a second call replaces the first. To have
    the same of runners, call it where the agent is imported.

    Args:
        level: "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", or its number.
        stream: where to write; None: stderr. Coloured on a terminal, unless NO_COLOR is set.

    Raises `InvalidValueError`.
    """
    number = _number_of(level)
    if stream is not None and not callable(getattr(stream, "write", None)):
        raise InvalidValueError("stream", shown(stream), "an open text file, such as sys.stdout")
    logger = logger_of("raystore")
    for handler in logger.handlers[:]:
        if isinstance(handler, _Handler):
            logger.removeHandler(handler)
    logger.addHandler(_Handler(stream))
    logger.setLevel(number)
    logger.propagate = False


def _number_of(level: int | str) -> int:
    names = logging.getLevelNamesMapping()
    if isinstance(level, str) and level.upper() in names:
        return names[level.upper()]
    if isinstance(level, bool) or not isinstance(level, int) or level < 0:
        usual = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
        near = meant(level.upper(), usual) if isinstance(level, str) else ""
        raise InvalidValueError("level", level, f"{either(usual)}, or the number of a level{near}")
    return level


class _Handler(logging.Handler):
    """Writes lines to a stream, or to what stderr is at that moment, as a notebook may change it."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream = self._stream or sys.stderr
            stream.write(self._line(record, is_coloured=_is_coloured(stream)))
            stream.flush()
        except Exception:  # as the handlers of logging do
            self.handleError(record)

    def _line(self, record: logging.LogRecord, *, is_coloured: bool) -> str:
        time = f"{_FORMATTER.formatTime(record, '%Y-%m-%d %H:%M:%S')}.{int(record.msecs):03d}"
        level = record.levelname
        if is_coloured:
            time, level = f"\x1b[2m{time}\x1b[0m", f"\x1b[{_COLOURS.get(record.levelno, '0')}m{level}\x1b[0m"
        return f"{time} {level} {record.name}: {_FORMATTER.format(record)}\n"


_COLOURS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "1;31"}


def _is_coloured(stream: TextIO) -> bool:
    is_terminal = bool(getattr(stream, "isatty", bool)())
    return is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
