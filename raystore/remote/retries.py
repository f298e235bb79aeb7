"""Batches that got no answer, and when they are sent again.

With pauses that double up to a bound, jittered, so that a thousand clients do not come back at once.
Not here: sending (`timer`), what a batch without an answer means (`session`).
"""

from __future__ import annotations

import random
import time

from raystore.remote.batching import Batch

RETRY_SECONDS = 60.0  #: how long a batch is tried again when the actor does not answer
PAUSE_SECONDS = 0.1  #: before a batch is sent again; doubled each time ...
PAUSE_MOST_SECONDS = 2.0  #: ... up to this, so that a claim is asked for before it is withdrawn


class Retries:
    """The batches of one session that wait to be sent again. Its owner holds a lock around every call."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, Batch]] = []

    def add(self, batch: Batch) -> bool:
        """Plan to send a batch again; False if it has been tried for long enough."""
        now = time.monotonic()
        if batch.failing_since is None:
            batch.failing_since = now
        if now - batch.failing_since > RETRY_SECONDS:
            return False
        pause = min(PAUSE_SECONDS * 2**batch.retries, PAUSE_MOST_SECONDS)
        batch.retries += 1
        self._waiting.append((now + pause * random.uniform(0.5, 1.5), batch))
        return True

    def take_ripe(self) -> tuple[list[Batch], float | None]:
        """Batches to send now, and when there will be one again."""
        now = time.monotonic()
        ripe = [batch for when, batch in self._waiting if when <= now]
        self._waiting = [(when, batch) for when, batch in self._waiting if when > now]
        return ripe, min((when for when, _ in self._waiting), default=None)

    def clear(self) -> None:
        """Send nothing again."""
        self._waiting.clear()
