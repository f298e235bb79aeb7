"""Calls that wait at the actor: which they are, what came for them, and whether a listen call is needed for it.

An answer may come more than once, until it is acknowledged, and it may overtake the word that its call is parked.
Not here: sending the listen call, waking callers (`session`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raystore.remote.batching import Operation
from raystore.wire import frames

Reply = list[Any]


class ParkedCalls:
    """The parked calls of one session. Its owner holds a lock around every call."""

    def __init__(self) -> None:
        self._waiting: dict[int, Operation] = {}  # by ticket
        self._early: dict[int, Reply] = {}  # answers of calls of which we do not know yet that they are parked
        self._acknowledgements: list[int] = []  # tickets whose answers came
        self._hint = 0
        self._noticed = 0  # number of the newest notice that came; they count downwards
        self._wanted = False
        self.listening: bool = False  #: whether a listen call is under way

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, ticket: int) -> bool:
        return ticket in self._waiting

    @property
    def wanted(self) -> bool:
        """Whether the store holds something for this process: attempts, parked calls, notices."""
        return self._wanted or bool(self._waiting)

    def park(self, operation: Operation) -> Reply | None:
        """Note that a call is parked; its answer, if that has overtaken this."""
        operation.parked = True
        early = self._early.pop(operation.ticket, None)
        if early is None:
            self._waiting[operation.ticket] = operation
        return early

    def forget(self, ticket: int) -> None:
        """Nothing will come for a call any more."""
        self._waiting.pop(ticket, None)

    def take_hint(self, hint: list[Any]) -> None:
        """What the store says of listening: whether there is need of it. Numbered, since answers overtake."""
        number, wanted = hint
        if number > self._hint:
            self._hint, self._wanted = number, wanted

    def receive(
        self, later: list[Any], is_under_way: Callable[[int], bool]
    ) -> tuple[list[tuple[Operation, Reply]], list[list[str]]]:
        """What came for parked calls: answers with their calls, and notices. What came before is only acknowledged."""
        answers, notices = [], []
        for ticket, reply in later:
            if ticket in self._acknowledgements:
                continue
            self._acknowledgements.append(ticket)
            if reply[0] == frames.NOTICE:
                if ticket < self._noticed:  # else it has come before, and its acknowledgement is on its way
                    self._noticed = ticket
                    notices.append(reply[1:])
            elif (operation := self._waiting.pop(ticket, None)) is not None:
                answers.append((operation, reply))
            elif is_under_way(ticket):
                self._early[ticket] = reply
        return answers, notices

    def take_acknowledgements(self) -> list[int]:
        """The acknowledgements that leave now."""
        taken, self._acknowledgements = self._acknowledgements, []
        return taken

    def listened(self, unsent: list[int], *, wanted: bool = False) -> None:
        """A listen call came back; with acknowledgements that it did not deliver."""
        self.listening = False
        self._acknowledgements = unsent + self._acknowledgements
        self._wanted = self._wanted or wanted

    def of_before(self) -> list[Operation]:
        """The calls that are parked, when a new process takes over; its hints are numbered from the beginning."""
        self._hint, self._wanted = 0, True
        return list(self._waiting.values())

    def unwanted(self) -> None:
        """The store knows nothing of this session."""
        self._wanted = False

    def clear(self) -> list[Operation]:
        """The session is another one from now on, or none; the calls that were parked."""
        waiting = list(self._waiting.values())
        self._waiting.clear()
        self._early.clear()
        self._acknowledgements.clear()
        self._hint, self._wanted, self._noticed = 0, False, 0
        return waiting
