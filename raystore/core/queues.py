"""Which rollout is next: named queues ordered by priority, then by arrival.

One order key per waiting rollout, `(-priority, arrival)`; with defaults everywhere that is the contract's FIFO. A
rollout keeps its key for life, so that one that comes back keeps its place. A rollout that is *held back* keeps its key
too, and is not handed out until it is put in line again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from raystore.core.lazyheap import LazyHeap

Order = tuple[int, int]
Line = tuple[str, int]  #: queue, and one of

#: Lines of a queue. PLAIN: for any session. ASIDE: suspects, for a session that runs nothing else. OVERDUE: suspects
#: for which no such session came in time, for any session. HELD: rollouts that are held back, for none.
PLAIN, ASIDE, OVERDUE, HELD = LINES = range(4)


class Queues:
    """All queues of a store; a rollout waits at most once."""

    def __init__(self) -> None:
        self._line_of: dict[str, Line] = {}
        self._lines: dict[Line, LazyHeap[str, Order]] = {}
        self._lengths: dict[str, int] = {}
        self._held: dict[str, dict[str, None]] = {}  # by what they wait for
        self._waits_for: dict[str, str] = {}  # the same by rollout
        self.arrivals: int = 0  #: places at the tail that were given

    def __len__(self) -> int:
        return len(self._line_of)

    def __contains__(self, rollout_id: str) -> bool:
        return rollout_id in self._line_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._line_of)

    def orders(self) -> list[tuple[str, tuple[Any, ...], Order]]:
        """Each rollout that waits, its line (with the resources id that it waits for, if any), and its order key."""
        return [
            (
                rollout_id,
                (*line, self._waits_for[rollout_id]) if line[1] == HELD else line,
                self._lines[line].priority(rollout_id),
            )
            for rollout_id, line in self._line_of.items()
        ]

    def restore(self, orders: Iterable[tuple[str, tuple[Any, ...], Order]], arrivals: int) -> None:
        """Fill empty queues with what `orders` and `arrivals` returned."""
        for rollout_id, (queue, line, *waits_for), order in orders:
            place = (order[0], order[1])
            if waits_for:
                self.hold(queue, rollout_id, place, waits_for[0])
            else:
                self.put(queue, rollout_id, place, line=int(line))
        self.arrivals = arrivals

    def length(self, queue: str) -> int:
        """How many rollouts wait in one queue."""
        return self._lengths.get(queue, 0)

    def lengths(self) -> dict[str, int]:
        """How many rollouts wait in each queue that is not empty."""
        return dict(self._lengths)

    def tail(self, priority: int) -> Order:
        """The order key behind everything of this priority."""
        self.arrivals += 1
        return (-priority, self.arrivals)

    def put(self, queue: str, rollout_id: str, order: Order, *, line: int = PLAIN) -> None:
        """Let a rollout wait at its place; it must not be waiting yet."""
        place = self._line_of[rollout_id] = (queue, line)
        heap = self._lines.get(place)
        if heap is None:
            heap = self._lines[place] = LazyHeap()
        heap.put(rollout_id, order)
        self._lengths[queue] = self._lengths.get(queue, 0) + 1

    def hold(self, queue: str, rollout_id: str, order: Order, waits_for: str) -> None:
        """Let a rollout wait at its place, and be passed over; it must not be waiting yet."""
        self.put(queue, rollout_id, order, line=HELD)
        self._waits_for[rollout_id] = waits_for
        self._held.setdefault(waits_for, {})[rollout_id] = None

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
        return self._lengths.get(queue, 0) > len(self._lines.get((queue, HELD), ()))

    @property
    def are_offering(self) -> bool:
        """Whether any queue has a rollout that is not held back."""
        return len(self._line_of) > len(self._waits_for)

    def discard(self, rollout_id: str) -> bool:
        """Take a rollout out of line wherever it stands; whether it stood there."""
        line = self._line_of.pop(rollout_id, None)
        if line is None:
            return False
        self._lines[line].discard(rollout_id)
        queue = line[0]
        if line[1] == HELD:
            waits_for = self._waits_for.pop(rollout_id)
            del self._held[waits_for][rollout_id]
            if not self._held[waits_for]:
                del self._held[waits_for]
        left = self._lengths[queue] - 1
        if left:
            self._lengths[queue] = left
        else:  # a queue without rollouts is not kept
            del self._lengths[queue]
            for number in LINES:
                self._lines.pop((queue, number), None)
        return True

    def make_overdue(self, rollout_id: str) -> str:
        """Let a rollout that waits aside be for anybody, at the same place; its queue."""
        line = self._line_of[rollout_id]
        queue, heap = line[0], self._lines[line]
        order = heap.priority(rollout_id)
        heap.discard(rollout_id)
        self._line_of[rollout_id] = (queue, OVERDUE)
        self._lines.setdefault((queue, OVERDUE), LazyHeap()).put(rollout_id, order)
        return queue

    def line(self, rollout_id: str) -> int:
        """In which line a rollout waits."""
        return self._line_of[rollout_id][1]

    def first(self, queues: Iterable[str], lines: Iterable[int] = (PLAIN,)) -> str | None:
        """The next rollout of some lines, left in place: that of the first queue that has one."""
        for queue in queues:
            best: tuple[Order, int, str] | None = None
            for line in lines:
                heap = self._lines.get((queue, line))
                found = heap.first() if heap is not None else None
                if found is not None and (best is None or found < best):
                    best = found
            if best is not None:
                return best[2]
        return None

    def check(self) -> None:
        """Verify that every waiting rollout is in its line, and that the counts are right."""
        found = {rollout_id: line for line, heap in self._lines.items() for rollout_id in heap}
        assert found == self._line_of, "a waiting rollout is not in its line"
        assert sum(map(len, self._lines.values())) == len(self._line_of), "a rollout waits twice"
        held = {rollout_id for rollout_id, line in self._line_of.items() if line[1] == HELD}
        assert self._waits_for.keys() == held, "what is held back is not known to be"
        assert {i: name for name, ids in self._held.items() for i in ids} == self._waits_for, (
            "what is held back for what"
        )
        count: dict[str, int] = {}
        for queue, _ in self._line_of.values():
            count[queue] = count.get(queue, 0) + 1
        assert count == self._lengths, "queue lengths differ from the queues"
