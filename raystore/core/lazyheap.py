"""Heaps with lazy deletion: `LazyHeap` has keys by priority, `Deadlines` finds the keys whose deadline has passed.

A key that is moved or discarded leaves a stale entry in the heap. A stale entry is skipped when it comes first, and all
are removed once most of the heap is stale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

K = TypeVar("K")
P = TypeVar("P")  # priorities can be compared with each other; keys are not compared

NEVER = float("inf")


class LazyHeap(Generic[K, P]):
    """Each key once, with its priority; the lowest comes first, and of equal ones what was put first."""

    __slots__ = ("_entries", "_heap", "_number")

    def __init__(self) -> None:
        self._entries: dict[K, tuple[P, int, K]] = {}
        self._heap: list[tuple[P, int, K]] = []  # of these entries, and of some that were replaced
        self._number = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[K]:
        return iter(self._entries)

    def put(self, key: K, priority: P) -> None:
        """Enter a key, or give it another priority."""
        known = self._entries.get(key)
        if known is not None and known[0] == priority:
            return
        self._number += 1
        entry = self._entries[key] = (priority, self._number, key)
        heap = self._heap
        heappush(heap, entry)
        if len(heap) > 64 and len(heap) > 4 * len(self._entries):
            heap[:] = self._entries.values()
            heapify(heap)

    def discard(self, key: K) -> None:
        """Forget a key, if it is here."""
        self._entries.pop(key, None)

    def first(self) -> tuple[P, int, K] | None:
        """The first entry, left in place: its priority, a number that no other entry has, and its key."""
        heap, entries = self._heap, self._entries
        while heap:
            entry = heap[0]
            if entries.get(entry[2]) is entry:
                return entry
            heappop(heap)
        return None

    def pop(self) -> K:
        """Take out the first key, which `first` has just found."""
        key = heappop(self._heap)[2]
        del self._entries[key]
        return key

    def priority(self, key: K) -> P:
        """The priority of a key that is here."""
        return self._entries[key][0]

    def priorities(self) -> list[tuple[K, P]]:
        """All keys with their priorities."""
        return [(key, priority) for priority, _, key in self._entries.values()]

    def fill(self, priorities: Iterable[tuple[K, P]]) -> None:
        """Enter what another heap had, into an empty one."""
        for number, (key, priority) in enumerate(priorities, 1):
            self._entries[key] = (priority, number, key)
        self._heap[:] = self._entries.values()
        heapify(self._heap)
        self._number = len(self._heap)


class Deadlines(LazyHeap[K, float]):
    """Keys with deadlines: each key has an entry that is no later than its deadline.

    `deadline_of` gives the present deadline of a key, None if it has none now. A change that makes a deadline later
    (a heartbeat) need not be reported: an entry that turns out to be too early is moved when it is reached. A change
    that may make a deadline earlier must call `guard`.
    """

    __slots__ = ("deadline_of", "fires", "soonest")

    def __init__(self, deadline_of: Callable[[K], float | None]) -> None:
        super().__init__()
        self.deadline_of: Callable[[K], float | None] = deadline_of
        self.fires: int = 0
        self.soonest: float = NEVER  #: nothing is due before this; may be earlier than `next`, which looks closer

    def guard(self, key: K) -> None:
        """Make sure that `key` is met no later than its deadline."""
        deadline = self.deadline_of(key)
        if deadline is None:
            return
        known = self._entries.get(key)
        if known is None or deadline < known[0]:
            self.put(key, deadline)
            self.soonest = self._heap[0][0]

    def next(self) -> float | None:
        """The earliest instant at which something may be due."""
        while (entry := self.first()) is not None:
            deadline, _, key = entry
            actual = self.deadline_of(key)
            if actual == deadline:
                self.soonest = deadline
                return deadline
            self.pop()
            if actual is not None:
                self.put(key, actual)
        self.soonest = NEVER
        return None

    def due(self, now: float, limit: int) -> Iterator[K]:
        """Up to `limit` keys whose deadline lies before `now` (strictly, as in the contract)."""
        while limit > 0:
            deadline = self.next()
            if deadline is None or not now > deadline:
                return
            self.fires += 1
            limit -= 1
            yield self.pop()

    def check(self, key: K) -> None:
        """Verify that `key` will be met in time."""
        deadline = self.deadline_of(key)
        assert deadline is None or (key in self and self._entries[key][0] <= deadline), f"{key} is not guarded"
