"""Running a session's batch: each operation once, in order, and again what may run again.

A batch runs in items: its operations, long ones in pieces. One that was cut short (by the end of the process that ran
it) goes on after the last operation that is known to have run.
Not here: what is kept (`line`), parking, sending (`inbox`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from raystore.core.line import AGAIN, ERROR, PARTLY, VALUE, Kept, Reply
from raystore.core.pieces import DIVISIBLE, RESERVING, pieces
from raystore.core.state import Session, State
from raystore.core.training import unreserve
from raystore.core.verbs import CHANGING, HANDING, handed_again


class Item(NamedTuple):
    """What runs at once: an operation, or a piece of one."""

    number: int  # of the operation in its batch
    ticket: int
    verb: str
    arguments: dict[str, Any]
    is_more: bool = False  # of the operation before
    is_last: bool = True  # of its operation


def _operation(given: Any) -> tuple[str, dict[str, Any]]:
    """Verb and arguments; of what is neither, a verb that does not exist."""
    verb, arguments = given if isinstance(given, (list, tuple)) and len(given) == 2 else ("", {})
    return (verb, arguments) if isinstance(verb, str) and isinstance(arguments, dict) else ("", {})


class Run:
    """A batch under way: an iterator of its items, and the answers so far."""

    __slots__ = ("_catch_up", "_is_more", "_kept", "_operations", "_ran", "_session", "_state", "cut", "next")

    def __init__(
        self,
        state: State,
        session: Session,
        kept: Kept,
        operations: list[Any],
        catch_up: Callable[[], None] = lambda: None,
    ) -> None:
        """`catch_up` works off what is due before a long operation is cut, so that the cuts stay what they are."""
        self._state, self._session, self._kept, self._operations = state, session, kept, operations
        self._catch_up = catch_up
        self._ran: dict[int, Reply] = {}  # answers by number of the operation
        self.next: int = len(kept.replies)  # operation
        self._is_more = self.next > 0 and kept.replies[-1][:1] == [PARTLY]
        if self._is_more:  # what is done already does not count twice
            self.next -= 1
        self.cut: deque[Item] = deque()  # pieces of the operation before, which run first

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self.cut:
            return self._piece()
        number = self.next
        if number >= len(self._operations):
            raise StopIteration
        self.next += 1
        verb, arguments = _operation(self._operations[number])
        ticket = self._kept.first_ticket + number
        if verb not in DIVISIBLE:
            return Item(number, ticket, verb, arguments)
        self._catch_up()
        cuts = pieces(self._state, self._session, verb, arguments, is_more=self._is_more)
        for index, piece in enumerate(cuts, 1):
            self.cut.append(Item(number, ticket, verb, piece, self._is_more or index > 1, index == len(cuts)))
        self._is_more = False
        return self._piece()

    def _piece(self) -> Item:
        """The next piece; of a deletion without what others have deleted meanwhile, or made anew since."""
        item = self.cut.popleft()
        if item.verb in RESERVING and self._session.session_id in self._state.deleting:
            left = self._session.deleting
            ids = [rollout_id for rollout_id in item.arguments["rollout_ids"] if rollout_id in left]
            item = item._replace(arguments=item.arguments | {"rollout_ids": ids})
        return item

    def go_on(self, number: int, cut: Iterable[Item]) -> None:
        """Go on where another run of the same batch stood."""
        self.next, self.cut, self._is_more = number, deque(cut), False

    @property
    def may_change(self) -> bool:
        """Whether anything is left that may change something."""
        left = (_operation(operation)[0] for operation in self._operations[self.next :])
        return bool(self.cut) or any(verb in CHANGING for verb in left)

    def answer(self, item: Item, reply: Reply) -> None:
        """Note the answer of an item; a piece that was refused is the last one of its operation."""
        kept = self._kept.replies
        is_last = item.is_last or reply[:1] == [ERROR]
        if is_last:
            self.cut.clear()
            if self._state.deleting:
                unreserve(self._state, self._session)
        if item.is_more:
            reply = _joined(kept.pop()[1], reply)
        self._ran[item.number] = reply
        kept.append(to_keep(item.verb, item.arguments, reply) if is_last else [PARTLY, reply])

    @property
    def ran(self) -> dict[int, Reply]:
        """The answers of operations that ran here, whole, by number of the operation."""
        return self._ran


def again(
    state: State, session: Session, kept: Kept, operations: list[Any], run: Callable[[Item], Reply]
) -> list[Reply]:
    """The answers of a batch that comes again; `run` runs what changes nothing, or nothing any more."""
    answers = []
    for number, (verb, arguments) in enumerate(map(_operation, operations)):
        reply = kept.replies[number] if number < len(kept.replies) else AGAIN
        if reply and verb in HANDING and reply[0] == VALUE and reply[1] and reply[1][0]:  # it was not empty
            found = handed_again(state, session, reply[1])
            reply = [VALUE, found] if found is not None else AGAIN  # withdrawn meanwhile
        if not reply:
            ticket = kept.first_ticket + number
            reply = run(Item(number, ticket, verb, arguments))
            session.line.note(ticket, to_keep(verb, arguments, reply))
        answers.append(reply)
    return answers


def to_keep(verb: str, arguments: dict[str, Any], reply: Reply) -> Reply:
    """What is kept of an answer: of what was handed over the keys, of what may run again nothing."""
    if verb in HANDING and reply[:1] == [VALUE] and (keys := HANDING[verb](arguments, reply[1])):
        return [VALUE, keys]
    return reply if not reply or verb in CHANGING or verb == "more" or reply[0] != VALUE else AGAIN


def _joined(reply: Reply, more: Reply) -> Reply:
    """The answer of two pieces of one operation."""
    if reply[0] != VALUE:
        return reply
    return [VALUE, reply[1] + more[1]] if more[0] == VALUE else more
