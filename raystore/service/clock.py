"""The store's one clock, and the alarm that rings when nobody calls.

Time is the wall time at start plus monotonic time since, so that a jump of the wall clock is not seen. A manual clock
stands still until it is told to move; claims and sessions then go on ageing in real time, since they watch over real
processes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol

from raystore.reports.log import a_minute, logger_of

logger: logging.Logger = logger_of("raystore.store")

AGAIN_SECONDS = 1.0  #: after a ring that failed
IDLE_SECONDS = 30.0  #: how often a thread with nothing to wait for looks whether its store is still there


class Clock:
    """The system clock."""

    is_manual = False

    def __init__(self, not_before: float = 0.0) -> None:
        self.offset: float = max(time.time(), not_before) - time.monotonic()  #: of `now`, while it moves by itself

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.monotonic() + self.offset

    age = now  #: the clock by which claims and sessions age, in seconds


class ManualClock(Clock):
    """A clock for tests, which moves only by `tick`."""

    is_manual = True

    def __init__(self, not_before: float = 0.0) -> None:
        super().__init__(not_before)
        self.start: float = super().now()
        self._ticked = 0.0
        self._aged = 0.0

    def now(self) -> float:
        return self.start + self._ticked

    def age(self) -> float:
        return super().now() + self._aged

    def tick(self, seconds: float, *, sessions: bool) -> None:
        """Let time pass; for claims and sessions too, if asked."""
        self._ticked += seconds
        if sessions:
            self._aged += seconds


class Alarm(Protocol):
    """Rings once at a set time; setting it anew replaces what was set."""

    def set(self, seconds: float | None) -> None:
        """Ring after so many seconds; None: not at all."""

    def close(self) -> None:
        """Never ring again."""


class NoAlarm:
    """Never rings: for what stands still."""

    def __init__(self, ring: Callable[[], None]) -> None:
        pass

    def set(self, seconds: float | None) -> None:
        pass

    def close(self) -> None:
        pass


class LoopAlarm:
    """An alarm on the event loop that owns the store (in an actor)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._handle: asyncio.TimerHandle | None = None

    def set(self, seconds: float | None) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = None if seconds is None else self._loop.call_later(seconds, self._go)

    def close(self) -> None:
        self.set(None)

    def _go(self) -> None:
        if not _rung(self._ring):
            self.set(AGAIN_SECONDS)


class ThreadAlarm:
    """An alarm with a daemon thread of its own, started when first set (in process).

    The alarm does not keep its store alive: the thread ends after the store was garbage collected.
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        is_method = hasattr(ring, "__self__")
        self._ring: Callable[[], Callable[[], None] | None] = weakref.WeakMethod(ring) if is_method else lambda: ring
        self._wake = threading.Condition(threading.Lock())
        self._due: float | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def set(self, seconds: float | None) -> None:
        with self._wake:
            earlier = self._due
            self._due = None if seconds is None else time.monotonic() + seconds
            if self._due is not None and self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="raystore-alarm", daemon=True)
                self._thread.start()
            elif self._due is not None and (earlier is None or self._due < earlier):
                self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                now = time.monotonic()
                if not self._closed and (self._due is None or self._due > now):
                    self._wake.wait(IDLE_SECONDS if self._due is None else min(self._due - now, IDLE_SECONDS))
                if self._closed:
                    return
                is_due = self._due is not None and self._due <= time.monotonic()
                self._due = None if is_due else self._due
            ring = self._ring()
            if ring is None:  # the store is gone
                return
            if is_due and not _rung(ring):
                self.set(AGAIN_SECONDS)
            del ring  # or the store would be kept until the next time


def _rung(ring: Callable[[], None]) -> bool:
    """Ring; an unexpected error is logged, and must not stop the clock. Returns whether there was none."""
    try:
        ring()
    except Exception:
        logger.exception(
            "What was due could not be worked off; trying again in %g s", AGAIN_SECONDS, extra=a_minute("due")
        )
        return False
    return True
