"""Fixed limits of a store: a call that would exceed one is refused, and changes nothing.

Not here: limits that a user sets (`max_queued`, `limits`), memory (`retention`), bytes that wait for the disk
(`journal.writer`).
"""

from __future__ import annotations

from raystore.errors import StoreOverloadedError

CONSUMERS = 1_000  #: that are known: each is asked with every rollout that finishes
WORKERS = 100_000  #: records of runners
WAITERS = 100_000  #: calls that wait
SESSIONS = 10_000  #: client processes
RETRY_SECONDS = 5.0

# Of records that nobody needs any more the newest are kept:
IDLE_WORKERS = 10_000  #: that are not busy, by when they were heard of
ENDED_SESSIONS = 10_000  #: which answer late batches
SURPLUS = 250  #: go at once


def admit(what: str, number: int, bound: int) -> None:
    """Raise `StoreOverloadedError` if there is no room for one more."""
    if number >= bound:
        raise StoreOverloadedError(what, number, bound, RETRY_SECONDS)
