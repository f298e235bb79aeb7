"""Who is next: named queues ordered by priority, then by arrival.

One order key per waiting rollout, `(-priority, arrival)`; with defaults everywhere that is the contract's FIFO. A
rollout keeps its key for life, so that one that comes back keeps its place; entries that lost their meaning
are skipped when met. "Exactly once in a queue" is a dictionary, not a scan. What is *held back* waits as well, and is
nobody's next until it is put in line.
Not here: whether a rollout may wait at all (`lifecycle`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import Any

Order = tuple[int, int]
Line = tuple[str, int]  #: queue, and one of

#: Lines of a queue: for anybody; for a session of its own; for anybody too, after such a session did not come; for
#: nobody, since it is held back.
PLAIN, ASIDE, OVERDUE, HELD = range(4)


class Queues:
    """All queues of a store."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[Line, Order]] = {}
        self._heaps: dict[Line, list[tuple[Order, str]]] = {}
        self._lengths: dict[str, int] = {}
        self._held: dict[str, dict[str, None]] = {}  # by what they wait for
        self._waits_for: dict[str, str] = {}  # the same by rollout
        self._held_lengths: dict[str, int] = {}  # by queue
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, rollout_id: str) -> bool:
        return rollout_id in self._waiting

    def __iter__(self) -> Iterator[str]:
        return iter(self._waiting)

    def orders(self) -> list[tuple[str, tuple[Any, ...], Order]]:
        """What waits, in which line (of what is held back with what it waits for), at which place."""
        waits_for = self._waits_for
        return [
            (rollout_id, (*line, waits_for[rollout_id]) if line[1] == HELD else line, order)
            for rollout_id, (line, order) in self._waiting.items()
        ]

    @property
    def arrivals(self) -> int:
        """How many places at the tail were given."""
        return self._arrivals

    def restore(self, orders: Iterable[tuple[str, tuple[Any, ...], Order]], arrivals: int) -> None:
        """Let wait what waited."""
        for rollout_id, (queue, line, *waits_for), order in orders:
            place = (order[0], order[1])
            if waits_for:
                self.hold(queue, rollout_id, place, waits_for[0])
            else:
                self.put(queue, rollout_id, place, line=int(line))
        self._arrivals = arrivals

    def length(self, queue: str) -> int:
        """How many rollouts wait in one queue."""
        return self._lengths.get(queue, 0)

    def lengths(self) -> dict[str, int]:
        """How many rollouts wait in each queue that is not empty."""
        return dict(self._lengths)

    def tail(self, priority: int) -> Order:
        """The order key behind everything of this priority."""
        self._arrivals += 1
        return (-priority, self._arrivals)

    def put(self, queue: str, rollout_id: str, order: Order, *, line: int = PLAIN) -> None:
        """Let a rollout wait at its place; it must not be waiting yet."""
        self._waiting[rollout_id] = ((queue, line), order)
        heappush(self._heaps.setdefault((queue, line), []), (order, rollout_id))
        self._lengths[queue] = self._lengths.get(queue, 0) + 1

    def hold(self, queue: str, rollout_id: str, order: Order, waits_for: str) -> None:
        """Let a rollout wait at its place, and be passed over; it must not be waiting yet."""
        self._waiting[rollout_id] = ((queue, HELD), order)
        self._waits_for[rollout_id] = waits_for
        self._held.setdefault(waits_for, {})[rollout_id] = None
        self._lengths[queue] = self._lengths.get(queue, 0) + 1
        self._held_lengths[queue] = self._held_lengths.get(queue, 0) + 1

    def held(self, waits_for: str) -> list[str]:
        """The rollouts that are held back for something."""
        return list(self._held.get(waits_for, ()))

    def is_held(self, rollout_id: str) -> bool:
        """Whether a rollout is held back."""
        return rollout_id in self._waits_for

    def held_counts(self) -> dict[str, int]:
        """How many rollouts are held back, by what they wait for."""
        return {waits_for: len(held) for waits_for, held in self._held.items()}

    def offers(self, queue: str) -> bool:
        """Whether a queue has a rollout that is not held back."""
        return self._lengths.get(queue, 0) > self._held_lengths.get(queue, 0)

    @property
    def are_offering(self) -> bool:
        """Whether any queue has a rollout that is not held back."""
        return len(self._waiting) > sum(self._held_lengths.values())

    def discard(self, rollout_id: str) -> bool:
        """Take a rollout out of line wherever it stands; whether it stood there."""
        place = self._waiting.pop(rollout_id, None)
        if place is None:
            return False
        line = place[0]
        left = self._lengths[line[0]] - 1
        if line[1] == HELD:
            self._let_go(rollout_id, line[0])
        if left:
            self._lengths[line[0]] = left
            heap = self._heaps.get(line, [])
            if len(heap) > 64 and len(heap) > 4 * left:  # mostly entries without meaning: rebuild
                heap[:] = {entry for entry in heap if self._waiting.get(entry[1]) == (line, entry[0])}
                heapify(heap)
        else:  # a queue without rollouts is not kept
            del self._lengths[line[0]]
            for number in (PLAIN, ASIDE, OVERDUE):
                self._heaps.pop((line[0], number), None)
        return True

    def _let_go(self, rollout_id: str, queue: str) -> None:
        waits_for = self._waits_for.pop(rollout_id)
        del self._held[waits_for][rollout_id]
        if not self._held[waits_for]:
            del self._held[waits_for]
        self._held_lengths[queue] -= 1
        if not self._held_lengths[queue]:
            del self._held_lengths[queue]

    def move(self, rollout_id: str, line: int) -> str:
        """Let a rollout that waits do so in another line of its queue, at the same place; the queue."""
        (queue, _), order = self._waiting[rollout_id]
        self._waiting[rollout_id] = ((queue, line), order)
        heappush(self._heaps.setdefault((queue, line), []), (order, rollout_id))
        return queue

    def line(self, rollout_id: str) -> int:
        """In which line a rollout waits."""
        return self._waiting[rollout_id][0][1]

    def head(self, queue: str, line: int = PLAIN) -> str | None:
        """The next rollout of one line of a queue, left in place."""
        key = (queue, line)
        heap = self._heaps.get(key)
        while heap:
            order, rollout_id = heap[0]
            if self._waiting.get(rollout_id) == (key, order):
                return rollout_id
            heappop(heap)
        return None

    def first(self, queue: str, lines: Iterable[int]) -> str | None:
        """The next rollout of several lines of a queue."""
        heads = [head for line in lines if (head := self.head(queue, line)) is not None]
        return min(heads, key=lambda head: self._waiting[head][1], default=None)

    def check(self) -> None:
        """Verify that every waiting rollout can be met exactly once."""
        met: dict[str, int] = {}
        for line, heap in self._heaps.items():
            for order, rollout_id in set(heap):
                if self._waiting.get(rollout_id) == (line, order):
                    met[rollout_id] = met.get(rollout_id, 0) + 1
        held = {rollout_id: line for rollout_id, (line, _) in self._waiting.items() if line[1] == HELD}
        assert met == dict.fromkeys(self._waiting.keys() - held.keys(), 1), (
            "a waiting rollout is not in its queue exactly once"
        )
        assert self._waits_for.keys() == held.keys(), "what is held back is not known to be"
        assert {i: name for name, ids in self._held.items() for i in ids} == self._waits_for, (
            "what is held back for what"
        )
        count: dict[str, int] = {}
        held_count: dict[str, int] = {}
        for line, _ in self._waiting.values():
            count[line[0]] = count.get(line[0], 0) + 1
            if line[1] == HELD:
                held_count[line[0]] = held_count.get(line[0], 0) + 1
        assert count == self._lengths, "queue lengths differ from the queues"
        assert held_count == self._held_lengths, "what is held back differs from the queues"
