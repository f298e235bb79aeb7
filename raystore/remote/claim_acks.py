"""Claims that came to a process, from their arrival until the store knows that their callers have them.

A claim is *unseen* until its caller runs again; then its acknowledgement waits for the next batch, or for half a
second. A caller that is busy is acknowledged for; one whose loop has ended is not.
Not here: sending (`session`), giving back (`session`), what an acknowledgement does (`raystore.core.claims`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from raystore.core.state import HandedKey
from raystore.remote.batching import Operation


class ClaimLedger:
    """The claims of one session. Its owner holds a lock around every call."""

    def __init__(self) -> None:
        self._unseen: dict[HandedKey, tuple[Operation, float]] = {}  # by whom, and since when
        self._acknowledgements: dict[HandedKey, float] = {}  # since when they wait

    @property
    def has_unseen(self) -> bool:
        """Whether a claim has arrived and its caller has not run yet."""
        return bool(self._unseen)

    def arrived(self, operation: Operation, keys: Iterable[HandedKey]) -> None:
        """Claims came for a caller."""
        now = time.monotonic()
        for key in keys:
            self._unseen[key] = (operation, now)

    def seen(self, keys: Iterable[HandedKey], *, acknowledged: bool) -> None:
        """The caller has its claims; unless the store knows already, it is to be told."""
        now = time.monotonic()
        for key in keys:
            if self._unseen.pop(key, None) is not None and not acknowledged:
                self._acknowledgements[key] = now

    def answer_for_busy_callers(self, before: float) -> list[Operation]:
        """Acknowledge what arrived before, its callers being busy; returns the callers whose loop has ended."""
        gone = []
        for key, (operation, since) in list(self._unseen.items()):
            if operation.loop is not None and operation.loop.is_closed():
                gone.append(operation)
            elif since <= before and (operation.loop is None or operation.loop.is_running()):
                self._acknowledgements.setdefault(key, since)
                self._unseen[key] = (operation, float("inf"))
        return gone

    def of(self, operation: Operation) -> list[HandedKey]:
        """The unseen claims of a caller."""
        return [key for key, (claimer, _) in self._unseen.items() if claimer is operation]

    def forget(self, keys: Iterable[HandedKey]) -> None:
        """Claims that are given back."""
        for key in keys:
            self._unseen.pop(key, None)
            self._acknowledgements.pop(key, None)

    def oldest(self) -> float | None:
        """Since when the oldest acknowledgement waits."""
        return min(self._acknowledgements.values(), default=None)

    def take(self) -> list[HandedKey]:
        """The acknowledgements that leave now."""
        taken, self._acknowledgements = list(self._acknowledgements), {}
        return taken

    def clear(self) -> None:
        """The session these belonged to is no more."""
        self._unseen.clear()
        self._acknowledgements.clear()
