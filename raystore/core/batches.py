"""Running a session's batch: each operation once, in order, and again what may run again.

A batch runs in items: its operations, long ones in pieces. One that was cut short (by the end of the process that ran
it) goes on after the last operation that is known to have run.
Not here: what is kept (`line`), parking, sending (`inbox`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from raystore.core.line import AGAIN, VALUE, Kept, Reply
from raystore.core.pieces import DIVISIBLE, pieces
from raystore.core.state import AttemptKey, Session, State
from raystore.core.verbs import CHANGING


class Item(NamedTuple):
    """What runs at once: an operation, or a piece of one."""

    number: int  # of the operation in its batch
    ticket: int
    verb: str
    arguments: dict[str, Any]
    is_more: bool  # of the operation before


def _items(state: State, kept: Kept, operations: list[Any]) -> Iterator[Item]:
    first = len(kept.replies)
    is_more = first > 0 and operations[first - 1][0] in DIVISIBLE and kept.replies[-1][:1] == [VALUE]
    if is_more:  # it may have been cut short; what is done already does not count twice
        first -= 1
    for number in range(first, len(operations)):
        verb, arguments = operations[number]
        ticket = kept.first_ticket + number
        if verb not in DIVISIBLE:
            yield Item(number, ticket, verb, arguments, False)
            continue
        for piece in pieces(state, verb, arguments):
            yield Item(number, ticket, verb, piece, is_more)
            is_more = True
        is_more = False


class Run:
    """A batch under way: an iterator of its items, and the answers so far."""

    __slots__ = ("_items", "_kept", "_ran")

    def __init__(self, state: State, kept: Kept, operations: list[Any]) -> None:
        self._kept = kept
        self._ran: dict[int, Reply] = {}  # answers by number of the operation
        self._items = _items(state, kept, operations)

    def __iter__(self) -> Iterator[Item]:
        return self._items

    def answer(self, item: Item, reply: Reply) -> None:
        """Note the answer of an item."""
        kept = self._kept.replies
        if item.is_more:
            reply = _joined(self._ran.get(item.number, kept[-1]), reply)
            kept.pop()
        self._ran[item.number] = reply
        kept.append(to_keep(item.verb, reply))

    @property
    def ran(self) -> dict[int, Reply]:
        """The answers of operations that ran here, whole, by number of the operation."""
        return self._ran


def again(
    state: State, session: Session, kept: Kept, operations: list[Any], run: Callable[[Item], Reply]
) -> list[Reply]:
    """The answers of a batch that comes again; `run` runs what changes nothing, or nothing any more."""
    answers = []
    for number, (verb, arguments) in enumerate(operations):
        reply = kept.replies[number] if number < len(kept.replies) else AGAIN
        if reply and verb == "dequeue" and reply[0] == VALUE:
            claimed = claimed_again(state, session, reply[1])
            reply = [VALUE, claimed] if claimed or not reply[1] else AGAIN  # withdrawn meanwhile
        if not reply:
            ticket = kept.first_ticket + number
            reply = run(Item(number, ticket, verb, arguments, False))
            session.line.note(ticket, to_keep(verb, reply))
        answers.append(reply)
    return answers


def claimed_again(state: State, session: Session, keys: list[AttemptKey]) -> list[tuple[Any, Any, bool]]:
    """What a dequeue answered, as it is now; without what the session holds no longer."""
    claimed = []
    for key in keys:
        if key in session.claims or key in session.held:
            entry = state.entries[key[0]]
            claimed.append((entry.rollout, entry.attempts[-1], entry.suspect))
    return claimed


def taken_over(state: State, session: Session, ticket: int | None) -> list[tuple[Any, Any, bool]]:
    """The claims that a parked dequeue was handed whose caller asks again, in a new operation that names its ticket.

    Empty if it was handed nothing, or holds nothing of that any more: then this is a dequeue like any other.
    """
    keys = session.line.handed.pop(ticket, None) if ticket is not None else None
    return claimed_again(state, session, keys) if keys else []


def to_keep(verb: str, reply: Reply) -> Reply:
    """What is kept of an answer: of claims the ids, of what may run again nothing."""
    if verb == "dequeue" and reply[:1] == [VALUE]:
        return [VALUE, [(rollout.rollout_id, attempt.attempt_id) for rollout, attempt, _ in reply[1]]]
    return reply if not reply or verb in CHANGING or verb == "more" or reply[0] != VALUE else AGAIN


def _joined(reply: Reply, more: Reply) -> Reply:
    """The answer of two pieces of one operation."""
    if reply[0] != VALUE:
        return reply
    return [VALUE, reply[1] + more[1]] if more[0] == VALUE else more
