"""Runs the batches of a session: each operation once, in order. If a batch is repeated, only its reads run again.

Long operations run in pieces, so that others may come in between. A batch that was
interrupted by the end of its process goes on after the last operation that is known to have run.
Each piece changes whole rollouts. The answers of the pieces are joined (lists) or added up (numbers). A long operation
is checked before it is cut, so that no later piece fails: a deletion reserves its rollouts, and consumers are not given
reserved rollouts.
Not here: the replies that are kept (`state.ReplyCache`), parking (`service`), sending (`remote.server_session`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from raystore.core.retention import held_among
from raystore.core.rollouts import chosen_among
from raystore.core.schema import checker
from raystore.core.state import AGAIN, ERROR, PARTLY, VALUE, BatchReplies, Reply, Session, State
from raystore.core.training import unreserve
from raystore.core.verbs import CHANGING, HANDING, VERBS, handed_again

DIVISIBLE = frozenset({"cancel_rollouts", "release", "delete_rollouts"})
WRITING = CHANGING - HANDING.keys()  #: verbs of which the whole reply is kept
RESERVING = frozenset({"delete_rollouts"})  #: of these, those that fail if a rollout is taken by a consumer
PIECE = 100  #: rollouts of a long operation that are worked off at once


class Item(NamedTuple):
    """A piece of a long operation."""

    number: int  # of the operation in its batch
    ticket: int
    verb: str
    arguments: dict[str, Any]
    is_more: bool  # of the operation before
    is_last: bool  # of its operation


#: Runs an operation or a piece, given its number in the batch, ticket, verb and arguments.
Operate = Callable[[int, int, str, dict[str, Any]], Reply]

#: Whether something is an operation: a verb and its arguments.
is_operation: Callable[[Any], bool] = checker(tuple[str, dict[Any, Any]])
NO_OPERATION: tuple[str, dict[str, Any]] = ("", {})  #: what stands for everything else: a verb that does not exist


class BatchRun:
    """A batch under way, and the answers so far."""

    __slots__ = ("_catch_up", "_is_more", "_kept", "_operations", "_session", "_state", "cut", "next", "ran")

    def __init__(
        self,
        state: State,
        session: Session,
        sequence: int,
        first_ticket: int,
        operations: list[Any],
        catch_up: Callable[[], None] = lambda: None,
    ) -> None:
        """`catch_up` applies passed deadlines before a long operation is cut, so that none changes its pieces."""
        self._state, self._session, self._operations, self._catch_up = state, session, operations, catch_up
        session.replies.expected = sequence
        kept = session.replies.kept.setdefault(sequence, BatchReplies(first_ticket, []))
        self._kept = kept
        self.ran: dict[int, Reply] = {}  #: answers of operations that ran here, whole, by number of the operation
        self.next: int = len(kept.replies)  # operation
        self._is_more = self.next > 0 and kept.replies[-1][:1] == [PARTLY]
        if self._is_more:  # what is done already does not count twice
            self.next -= 1
        self.cut: deque[Item] = deque()  # pieces of the operation before, which run first

    def run(self, operate: Operate, measure: Callable[[], float], limit: float) -> bool:
        """Run what is left, until `measure` gives more than the limit; whether all has run."""
        state, operations, replies = self._state, self._operations, self._kept.replies
        while True:
            if self.cut:
                item = self._piece()
                self._answer_piece(item, operate(*item[:4]))
            elif self.next < len(operations):
                number = self.next
                self.next += 1
                given = operations[number]
                verb, arguments = given if is_operation(given) else NO_OPERATION
                if verb in DIVISIBLE:
                    self._cut(number, verb, arguments)
                    continue
                reply = self.ran[number] = operate(number, self._kept.first_ticket + number, verb, arguments)
                if state.deleting:
                    unreserve(state, self._session)
                replies.append(reply if verb in WRITING else to_keep(verb, arguments, reply))
            else:
                return True
            if measure() > limit:
                return False

    def _cut(self, number: int, verb: str, arguments: dict[str, Any]) -> None:
        """Cut a long operation into pieces, which are next."""
        self._catch_up()
        ticket, pieces = self._kept.first_ticket + number, self._pieces(verb, arguments)
        for index, piece in enumerate(pieces, 1):
            self.cut.append(Item(number, ticket, verb, piece, self._is_more or index > 1, index == len(pieces)))
        self._is_more = False

    def _pieces(self, verb: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """The arguments of each piece of an operation that is divisible, or of what is left of one.

        One that will be refused stays whole, so that it is refused as a whole.
        """
        state, session = self._state, self._session
        if not VERBS[verb].fits(arguments) or session.ended_at is not None:
            return [arguments]
        group = state.groups.get(arguments.get("group_id"))
        if group is not None and group.has_rule:
            return [arguments]  # its end cancels all of its members at once
        ids, rest = named(state, verb, arguments)
        if verb in RESERVING and self._is_more and session.session_id in state.deleting:
            ids = [rollout_id for rollout_id in dict.fromkeys(ids) if rollout_id in session.deleting]
        elif verb in RESERVING and len(ids) > PIECE:
            if held_among(state, ids) is not None:
                return [arguments]
            ids = [rollout_id for rollout_id in dict.fromkeys(ids) if rollout_id in state.entries]
            state.reserve(session, ids)
        return cut(ids, rest)

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
        left = filter(is_operation, self._operations[self.next :])
        return bool(self.cut) or any(verb in CHANGING for verb, _ in left)

    def _answer_piece(self, item: Item, reply: Reply) -> None:
        """Note the answer of a piece; one that was refused is the last one of its operation."""
        kept = self._kept.replies
        is_last = item.is_last or reply[:1] == [ERROR]
        if is_last:
            self.cut.clear()
            if self._state.deleting:
                unreserve(self._state, self._session)
        if item.is_more:
            reply = joined(kept.pop()[1], reply)
        self.ran[item.number] = reply
        kept.append(to_keep(item.verb, item.arguments, reply) if is_last else [PARTLY, reply])


def repeat(state: State, session: Session, kept: BatchReplies, operations: list[Any], operate: Operate) -> list[Reply]:
    """The answers of a repeated batch. `operate` runs its reads again, and dequeues whose claims were taken back."""
    answers = []
    for number, given in enumerate(operations):
        verb, arguments = given if is_operation(given) else NO_OPERATION
        reply = kept.replies[number] if number < len(kept.replies) else AGAIN
        if verb in HANDING and reply[:1] == [VALUE] and reply[1] and reply[1][0]:  # keys: it was not empty
            found = handed_again(state, session, reply[1])
            reply = [VALUE, found] if found is not None else AGAIN  # withdrawn meanwhile
        if not reply:
            ticket = kept.first_ticket + number
            reply = operate(number, ticket, verb, arguments)
            session.replies.note(ticket, to_keep(verb, arguments, reply))
        answers.append(reply)
    return answers


def to_keep(verb: str, arguments: dict[str, Any], reply: Reply) -> Reply:
    """What to keep of a reply: the keys if it hands over claims or a batch, nothing of a read, else all of it."""
    if verb in HANDING and reply[:1] == [VALUE] and (keys := HANDING[verb](arguments, reply[1])):
        return [VALUE, keys]
    return reply if not reply or verb in CHANGING or verb == "more" or reply[0] != VALUE else AGAIN


def joined(reply: Reply, more: Reply) -> Reply:
    """The answer of two pieces of one operation."""
    if reply[0] != VALUE:
        return reply
    return [VALUE, reply[1] + more[1]] if more[0] == VALUE else more


def named(state: State, verb: str, arguments: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The rollouts that an operation which is divisible is about, and its other arguments in each piece."""
    if verb == "cancel_rollouts":
        return chosen_among(state, **arguments), {"group_id": None, "tags": None}
    return arguments["rollout_ids"], {}


def cut(ids: list[str], rest: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each piece; at least one, so that there is an answer."""
    cuts = [ids[first : first + PIECE] for first in range(0, len(ids), PIECE)]
    return [rest | {"rollout_ids": part} for part in cuts or [[]]]
