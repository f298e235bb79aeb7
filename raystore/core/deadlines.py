"""When something must be looked at again: a lazy heap.

Every guarded key has an entry no later than its deadline. What moves a deadline later (a heartbeat) does not touch the
heap: an entry that is due too early is re-entered when met. What may move one earlier pushes a fresh entry.
Not here: what a missed deadline means (`lifecycle`), sleeping until one (`service`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

K = TypeVar("K")

NEVER = float("inf")


class Deadlines(Generic[K]):
    """Deadlines by key; `deadline_of` says when a key is really due, None when it no longer is."""

    def __init__(self, deadline_of: Callable[[K], float | None]) -> None:
        self._deadline_of = deadline_of
        self._heap: list[tuple[float, int, K]] = []
        self._earliest: dict[K, float] = {}
        self._tie = 0
        self.fires: int = 0
        self.soonest: float = NEVER  #: nothing is due before this; may be earlier than `next`, which looks closer

    def guard(self, key: K) -> None:
        """Make sure that `key` is met no later than its deadline."""
        deadline = self._deadline_of(key)
        if deadline is None:
            return
        known = self._earliest.get(key)
        if known is None or deadline < known:
            self._push(deadline, key)

    def _push(self, deadline: float, key: K) -> None:
        self._earliest[key] = deadline
        self._tie += 1
        heappush(self._heap, (deadline, self._tie, key))
        if len(self._heap) > 256 and len(self._heap) > 4 * len(self._earliest):
            self._heap = [entry for entry in self._heap if self._earliest.get(entry[2]) == entry[0]]
            heapify(self._heap)
        self.soonest = self._heap[0][0]

    def drop(self, key: K) -> None:
        """Forget a key, so that it is not kept until its deadline."""
        self._earliest.pop(key, None)

    def next(self) -> float | None:
        """The earliest instant at which something may be due."""
        while self._heap:
            deadline, _, key = self._heap[0]
            if self._earliest.get(key) != deadline:
                heappop(self._heap)
                continue
            actual = self._deadline_of(key)
            if actual == deadline:
                self.soonest = deadline
                return deadline
            heappop(self._heap)
            del self._earliest[key]
            if actual is not None:
                self._push(actual, key)
        self.soonest = NEVER
        return None

    def due(self, now: float, limit: int) -> Iterator[K]:
        """Up to `limit` keys whose deadline lies before `now` (strictly, as in the contract)."""
        while limit > 0:
            deadline = self.next()
            if deadline is None or not now > deadline:
                return
            key = heappop(self._heap)[2]
            del self._earliest[key]
            self.fires += 1
            limit -= 1
            yield key

    def check(self, key: K) -> None:
        """Verify that `key` will be met in time."""
        deadline = self._deadline_of(key)
        assert deadline is None or self._earliest.get(key, deadline + 1) <= deadline, f"{key} is not guarded"
