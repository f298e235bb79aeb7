"""Sessions that must show that they live before they are handed work.

A claim that nobody acknowledged was perhaps handed to a dead process, and others may have died with it. So every
session that waits for work is suspended until it speaks. Some are asked at once, the next ones a second later.
"""

from __future__ import annotations

from collections.abc import Iterable

ASKED_AT_ONCE = 16
PAUSE_SECONDS = 1.0  #: until the next ones are asked


class LivenessChecks:
    """The suspended sessions, in the order in which they will be asked."""

    def __init__(self) -> None:
        self.suspended: dict[str, None] = {}  #: sessions that are handed nothing
        self.at: float | None = None  #: when the next sessions are to be asked, on the clock by which sessions age

    def __contains__(self, session_id: str) -> bool:
        return session_id in self.suspended

    def suspend(self, session_ids: Iterable[str], age: float) -> None:
        """Hand nothing to these sessions until they have spoken."""
        self.suspended.update(dict.fromkeys(session_ids))
        self.at = age

    def ask_soon(self, age: float) -> None:
        """There is work for a suspended session: ask it, unless that is planned already."""
        if self.at is None:
            self.at = age

    def spoke(self, session_id: str) -> bool:
        """A session has spoken; whether it was suspended."""
        return self.suspended.pop(session_id, 0) is None

    def due(self, age: float, *, is_work_waiting: bool) -> list[str]:
        """Sessions to ask now; plans when to ask the next ones."""
        if self.at is None or age < self.at:
            return []
        asked = list(self.suspended)[:ASKED_AT_ONCE]
        for session_id in asked:  # to the end of the line
            del self.suspended[session_id]
            self.suspended[session_id] = None
        self.at = age + PAUSE_SECONDS if asked and is_work_waiting else None
        return asked
