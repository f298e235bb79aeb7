"""What comes next: heaps with lazy deletion, deadlines, and the queues in which rollouts wait.

A key that is moved or discarded leaves a stale entry in its heap. A stale entry is skipped when it comes first, and all
are removed once most of the heap is stale.

A queue is ordered by priority, then by arrival: one order key per waiting rollout, `(-priority, arrival)`; with
defaults everywhere that is the contract's FIFO. A rollout keeps its key for life, so that one that comes back keeps its
place. A rollout that is *held back* keeps its key too, and is not handed out until it is put in line again: when its
resources can be had, or, if it *backs off* after a failed attempt, when its time has come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Any, Generic, TypeVar

K = TypeVar("K")
P = TypeVar("P")  # priorities can be compared with each other; keys are not compared

NEVER = float("inf")


class LazyHeap(dict[K, tuple[P, int, K]], Generic[K, P]):
    """Each key once, with its entry: the priority, a number that no other entry has, and the key.

    The lowest priority comes first, and of equal ones what was put first. `pop(key, None)` forgets a key.
    """

    __slots__ = ("_heap", "_number")

    def __init__(self) -> None:
        self._heap: list[tuple[P, int, K]] = []  # of the entries, and of some that were replaced or forgotten
        self._number = 0

    def put(self, key: K, priority: P) -> None:
        """Enter a key, or give it another priority."""
        known = self.get(key)
        if known is not None and known[0] == priority:
            return
        self._number += 1
        entry = self[key] = (priority, self._number, key)
        heap = self._heap
        heappush(heap, entry)
        if len(heap) > 64 and len(heap) > 4 * len(self):
            heap[:] = self.values()
            heapify(heap)

    def first(self) -> tuple[P, int, K] | None:
        """The first entry, left in place."""
        heap = self._heap
        while heap:
            entry = heap[0]
            if self.get(entry[2]) is entry:
                return entry
            heappop(heap)
        return None

    def take(self) -> K:
        """Take out the first key, which `first` has just found."""
        key = heappop(self._heap)[2]
        del self[key]
        return key

    def priorities(self) -> list[tuple[K, P]]:
        """All keys with their priorities."""
        return [(key, priority) for priority, _, key in self.values()]

    def fill(self, priorities: Iterable[tuple[K, P]]) -> None:
        """Enter what another heap had, into an empty one."""
        for number, (key, priority) in enumerate(priorities, 1):
            self[key] = (priority, number, key)
        self._heap[:] = self.values()
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

    def guard(self, key: K, deadline: float | None = None) -> None:
        """Make sure that `key` is met no later than its deadline, which may be given if it is known."""
        if deadline is None and (deadline := self.deadline_of(key)) is None:
            return
        known = self.get(key)
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
            self.take()
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
            yield self.take()

    def check(self, key: K) -> None:
        """Verify that `key` will be met in time."""
        deadline = self.deadline_of(key)
        assert deadline is None or (key in self and self[key][0] <= deadline), f"{key} is not guarded"


# -- queues ------------------------------------------------------------------------------------------------------------

Order = tuple[int, int]
Line = tuple[str, int]  #: queue, and one of

#: Lines of a queue. PLAIN: for any session. ASIDE: suspects, for a session that runs nothing else. OVERDUE: suspects
#: for which no such session came in time, for any session. HELD: rollouts that are held back or back off, for none.
#: EVALUATED: those of evaluations, which have a share of what runs (`claims`).
PLAIN, ASIDE, OVERDUE, HELD, EVALUATED = LINES = range(5)


class Queues:
    """All queues of a store; a rollout waits at most once."""

    def __init__(self) -> None:
        self.line_of: dict[str, Line] = {}  #: where each rollout waits
        self._lines: dict[Line, LazyHeap[str, Order]] = {}
        self._lengths: dict[str, int] = {}
        self._held: dict[str, dict[str, None]] = {}  # by what they wait for
        self._waits_for: dict[str, str] = {}  # the same by rollout
        self._backoffs: dict[str, float] = {}  # until when each of those that back off does
        self.backing_off_by_queue: dict[str, int] = {}  #: how many do, if any
        self.arrivals: int = 0  #: places at the tail that were given
        self.evaluated: int = 0  #: how many wait in lines of evaluations

    def __len__(self) -> int:
        return len(self.line_of)

    def __contains__(self, rollout_id: str) -> bool:
        return rollout_id in self.line_of

    def __iter__(self) -> Iterator[str]:
        return iter(self.line_of)

    def orders(self) -> list[tuple[str, tuple[Any, ...], Order]]:
        """Each rollout that waits, its line, and its order key.

        The line of one that is held is with what it waits for: a resources id, or the end of its backoff.
        """
        return [
            (
                rollout_id,
                (*line, self._held_for(rollout_id)) if line[1] == HELD else line,
                self._lines[line][rollout_id][0],
            )
            for rollout_id, line in self.line_of.items()
        ]

    def _held_for(self, rollout_id: str) -> str | float:
        until = self._backoffs.get(rollout_id)
        return self._waits_for[rollout_id] if until is None else until

    def restore(self, orders: Iterable[tuple[str, tuple[Any, ...], Order]], arrivals: int) -> None:
        """Fill empty queues with what `orders` and `arrivals` returned."""
        for rollout_id, (queue, line, *waits_for), order in orders:
            place = (order[0], order[1])
            if waits_for and isinstance(waits_for[0], str):
                self.hold(queue, rollout_id, place, waits_for[0])
            elif waits_for:
                self.back_off(queue, rollout_id, place, waits_for[0])
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
        place = self.line_of[rollout_id] = (queue, line)
        heap = self._lines.get(place)
        if heap is None:
            heap = self._lines[place] = LazyHeap()
        heap.put(rollout_id, order)
        self._lengths[queue] = self._lengths.get(queue, 0) + 1
        if line == EVALUATED:
            self.evaluated += 1

    def hold(self, queue: str, rollout_id: str, order: Order, waits_for: str) -> None:
        """Let a rollout wait at its place, and be passed over; it must not be waiting yet."""
        self.put(queue, rollout_id, order, line=HELD)
        self._waits_for[rollout_id] = waits_for
        self._held.setdefault(waits_for, {})[rollout_id] = None

    def back_off(self, queue: str, rollout_id: str, order: Order, until: float) -> None:
        """Let a rollout wait at its place, and be passed over until an instant; it must not be waiting yet."""
        self.put(queue, rollout_id, order, line=HELD)
        self._backoffs[rollout_id] = until
        self.backing_off_by_queue[queue] = self.backing_off_by_queue.get(queue, 0) + 1

    def held(self, waits_for: str) -> list[str]:
        """The rollouts that are held back for something."""
        return list(self._held.get(waits_for, ()))

    def is_held(self, rollout_id: str) -> bool:
        """Whether a rollout is held back, since its resources cannot be had."""
        return rollout_id in self._waits_for

    def is_evaluated(self, rollout_id: str) -> bool:
        """Whether a rollout that waits does so in a line of evaluations."""
        return self.line_of[rollout_id][1] == EVALUATED

    def waits_for(self, rollout_id: str) -> str | None:
        """What a rollout is held back for, if it is."""
        return self._waits_for.get(rollout_id)

    @property
    def backing_off(self) -> list[str]:
        """The rollouts that back off."""
        return list(self._backoffs)

    def backs_off_until(self, rollout_id: str) -> float | None:
        """Until when a rollout backs off; None if it does not."""
        return self._backoffs.get(rollout_id)

    def backoffs(self, queue: str, most: int) -> list[float]:
        """Until when each rollout of a queue backs off, of the `most` that began to back off first, in any queue."""
        found = islice(self._backoffs.items(), most)
        return [until for rollout_id, until in found if self.line_of[rollout_id][0] == queue]

    def held_counts(self) -> dict[str, int]:
        """How many rollouts are held back, by what they wait for."""
        return {waits_for: len(held) for waits_for, held in self._held.items()}

    def held_for(self, waits_for: str) -> int:
        """How many rollouts are held back for something."""
        return len(self._held.get(waits_for, ()))

    def in_line(self, queue: str, line: int) -> int:
        """How many rollouts wait in one line of a queue."""
        return len(self._lines.get((queue, line), ()))

    def offers(self, queue: str) -> bool:
        """Whether a queue has a rollout that is not held back."""
        return self._lengths.get(queue, 0) > len(self._lines.get((queue, HELD), ()))

    @property
    def are_offering(self) -> bool:
        """Whether any queue has a rollout that is not held back."""
        return len(self.line_of) > len(self._waits_for) + len(self._backoffs)

    def discard(self, rollout_id: str) -> bool:
        """Take a rollout out of line wherever it stands; whether it stood there."""
        line = self.line_of.pop(rollout_id, None)
        if line is None:
            return False
        del self._lines[line][rollout_id]
        queue = line[0]
        if line[1] == HELD and self._backoffs.pop(rollout_id, None) is not None:
            self.backing_off_by_queue[queue] -= 1
            if not self.backing_off_by_queue[queue]:
                del self.backing_off_by_queue[queue]
        elif line[1] == HELD:
            waits_for = self._waits_for.pop(rollout_id)
            del self._held[waits_for][rollout_id]
            if not self._held[waits_for]:
                del self._held[waits_for]
        elif line[1] == EVALUATED:
            self.evaluated -= 1
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
        line = self.line_of[rollout_id]
        queue, heap = line[0], self._lines[line]
        order = heap.pop(rollout_id)[0]
        self.line_of[rollout_id] = (queue, OVERDUE)
        self._lines.setdefault((queue, OVERDUE), LazyHeap()).put(rollout_id, order)
        return queue

    def line(self, rollout_id: str) -> int:
        """In which line a rollout waits."""
        return self.line_of[rollout_id][1]

    def first(self, queues: Iterable[str], lines: Iterable[int] = (PLAIN,)) -> str | None:
        """The next rollout of some lines, left in place: that of the first queue that has one."""
        for queue in queues:
            best: tuple[Order, int, str] | None = None
            for line in lines:
                heap = self._lines.get((queue, line))
                found = heap.first() if heap else None
                if found is not None and (best is None or found < best):
                    best = found
            if best is not None:
                return best[2]
        return None

    def check(self) -> None:
        """Verify that every waiting rollout is in its line, and that the counts are right."""
        found = {rollout_id: line for line, heap in self._lines.items() for rollout_id in heap}
        assert found == self.line_of, "a waiting rollout is not in its line"
        assert sum(map(len, self._lines.values())) == len(self.line_of), "a rollout waits twice"
        held = {rollout_id for rollout_id, line in self.line_of.items() if line[1] == HELD}
        assert self._waits_for.keys() | self._backoffs.keys() == held, "what is held back is not known to be"
        assert not self._waits_for.keys() & self._backoffs.keys(), "a rollout that backs off is held back"
        assert {i: name for name, ids in self._held.items() for i in ids} == self._waits_for, (
            "what is held back for what"
        )
        count: dict[str, int] = {}
        for queue, _ in self.line_of.values():
            count[queue] = count.get(queue, 0) + 1
        assert count == self._lengths, "queue lengths differ from the queues"
        ends: dict[str, int] = {}
        for rollout_id in self._backoffs:
            queue = self.line_of[rollout_id][0]
            ends[queue] = ends.get(queue, 0) + 1
        assert ends == self.backing_off_by_queue, "how many back off"
        assert self.evaluated == sum(map(self.is_evaluated, self)), "how many wait in lines of evaluations"
