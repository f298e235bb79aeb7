"""Calls that wait: one record for each, woken by the change they wait for, never by polling.

A waiting call names what it waits for (rollouts, queues, completions, changes). After each step the service says what
happened (`finished`, `work`, `moved`), and the waiters concerned are tried again; each is answered exactly once.
Not here: how an answer reaches its caller (`Waiter.deliver`, from the transport).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import heapify, heappop, heappush, merge
from operator import attrgetter
from typing import Any

#: Gives an answer to the caller with this ticket; False if it is gone, so that what was handed to it can be taken back.
Deliver = Callable[[int, Any], bool]


class Waiter:
    """One parked call."""

    __slots__ = ("arguments", "deadline", "deliver", "missing", "number", "session_id", "ticket", "verb")

    def __init__(
        self,
        number: int,
        session_id: str,
        ticket: int,
        verb: str,
        arguments: dict[str, Any],
        deadline: float | None,
        deliver: Deliver,
    ) -> None:
        self.number: int = number
        self.session_id: str = session_id
        self.ticket: int = ticket
        self.verb: str = verb
        self.arguments: dict[str, Any] = arguments
        self.deadline: float | None = deadline  # on the store's clock
        self.deliver: Deliver = deliver
        self.missing: set[str] = set()  # rollouts still waited for


class Waiters:
    """All parked calls of a store."""

    def __init__(self) -> None:
        self._number = 0
        self._all: dict[int, Waiter] = {}
        self._by_ticket: dict[tuple[str, int], Waiter] = {}
        self._by_rollout: dict[str, dict[int, Waiter]] = {}
        self._by_queue: dict[str, dict[int, Waiter]] = {}
        self._by_session: dict[str, dict[int, Waiter]] = {}
        self._by_verb: dict[str, dict[int, Waiter]] = {"completed": {}, "changes": {}, "take": {}}
        self.by_changes: dict[int, Waiter] = self._by_verb["changes"]  #: those that wait for changes, whatever they are
        self.deadlines: list[tuple[float, int]] = []  #: a heap; some may be answered

    def __len__(self) -> int:
        return len(self._all)

    def park(
        self,
        session_id: str,
        ticket: int,
        verb: str,
        arguments: dict[str, Any],
        deadline: float | None,
        deliver: Deliver,
        missing: Iterable[str] = (),
    ) -> Waiter:
        """Remember a call that cannot be answered yet."""
        self._number += 1
        waiter = Waiter(self._number, session_id, ticket, verb, arguments, deadline, deliver)
        self._all[waiter.number] = waiter
        self._by_ticket[session_id, ticket] = waiter
        for mapping, keys in self._places(waiter):
            for key in keys:
                mapping.setdefault(key, {})[waiter.number] = waiter
        self.wait_for(waiter, missing)
        if deadline is not None:
            heappush(self.deadlines, (deadline, waiter.number))
            if len(self.deadlines) > 256 and len(self.deadlines) > 4 * len(self._all):  # mostly answered ones
                self.deadlines = [item for item in self.deadlines if item[1] in self._all]
                heapify(self.deadlines)
        return waiter

    def _places(self, waiter: Waiter) -> list[tuple[dict[str, dict[int, Waiter]], Iterable[str]]]:
        session: tuple[dict[str, dict[int, Waiter]], Iterable[str]] = (self._by_session, [waiter.session_id])
        if waiter.verb == "dequeue":
            return [session, (self._by_queue, waiter.arguments["queues"])]
        if waiter.verb == "wait":
            return [session, (self._by_rollout, list(waiter.missing))]
        return [session, (self._by_verb, [waiter.verb])]

    def wait_for(self, waiter: Waiter, rollout_ids: Iterable[str]) -> None:
        """Let a waiting call wait for (more) rollouts."""
        for rollout_id in rollout_ids:
            waiter.missing.add(rollout_id)
            self._by_rollout.setdefault(rollout_id, {})[waiter.number] = waiter

    def remove(self, waiter: Waiter) -> None:
        """Forget a call: it is answered, or nobody waits any longer."""
        del self._all[waiter.number]
        del self._by_ticket[waiter.session_id, waiter.ticket]
        for mapping, keys in self._places(waiter):
            for key in keys:
                there = mapping.get(key)
                if there is not None:
                    there.pop(waiter.number, None)
                    if not there and mapping is not self._by_verb:
                        del mapping[key]

    def find(self, session_id: str, ticket: int) -> Waiter | None:
        """The parked call with this ticket."""
        return self._by_ticket.get((session_id, ticket))

    def of_session(self, session_id: str) -> list[Waiter]:
        """All parked calls of a session."""
        return list(self._by_session.get(session_id, {}).values())

    def has_session(self, session_id: str) -> bool:
        """Whether a session has a parked call."""
        return session_id in self._by_session

    def sessions_wanting_work(self) -> list[str]:
        """Sessions with a parked dequeue, the longest waiting first."""
        numbers = {w.number: w for waiters in self._by_queue.values() for w in waiters.values()}
        return list(dict.fromkeys(numbers[number].session_id for number in sorted(numbers)))

    def finished(self, rollout_id: str) -> list[Waiter]:
        """Note that a rollout has finished; the calls that wait for nothing more."""
        complete = []
        for waiter in self._by_rollout.pop(rollout_id, {}).values():
            waiter.missing.discard(rollout_id)
            if not waiter.missing:
                complete.append(waiter)
        return complete

    def wanting(self, queues: Iterable[str]) -> Iterator[Waiter]:
        """Calls that wait for work of these queues, the longest waiting first; as they are now."""
        there = [list(self._by_queue.get(queue, {}).values()) for queue in queues]  # each in order, as it is added to
        last = 0
        for waiter in merge(*there, key=attrgetter("number")):
            if waiter.number > last:  # once, although it waits for several
                last = waiter.number
                yield waiter

    def reading(self, verb: str) -> list[Waiter]:
        """Calls that wait for completions or changes."""
        return list(self._by_verb[verb].values())

    def next_deadline(self) -> float | None:
        """When the first waiting call runs out of time."""
        while self.deadlines and self.deadlines[0][1] not in self._all:
            heappop(self.deadlines)
        return self.deadlines[0][0] if self.deadlines else None

    def are_overdue(self, now: float) -> bool:
        """Whether a waiting call has run out of time."""
        deadline = self.next_deadline()
        return deadline is not None and deadline <= now

    def expired(self, now: float) -> list[Waiter]:
        """Calls that have run out of time."""
        found = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            found.append(self._all[heappop(self.deadlines)[1]])
        return found

    def all(self) -> list[Waiter]:
        """All parked calls."""
        return list(self._all.values())
