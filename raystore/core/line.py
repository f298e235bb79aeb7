"""What is kept of a session's batches, in case one comes again.

Answers of changes are kept until the client has them; of claims only the ids, of what changes nothing only that it is
to be run again.
Not here: running batches (`batches`), holding what came early (`inbox`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from raystore.core.fields import declare, pairs

# What an answer to one operation is.
VALUE, ERROR, PARKED, NOTICE = range(4)
PARTLY = -1  #: kept of a long operation of which a part has run; never sent

Reply = list[Any]
AGAIN: Reply = []  #: kept for what is to be run again if it is asked again
HANDED_KEPT = 64  #: handed-over claims that may be known still, beyond twice those that are open


class Kept(NamedTuple):
    """What is kept of a batch that ran, or runs."""

    first_ticket: int
    replies: list[Reply]


def _kept_again(rows: list[Any]) -> dict[int, Kept]:
    return {sequence: Kept(first_ticket, list(replies)) for sequence, (first_ticket, replies) in rows}


def _handed_again(rows: list[Any]) -> dict[int, list[Any]]:
    return {ticket: [(key[0], key[1]) for key in keys] for ticket, keys in rows}


@dataclass(slots=True, eq=False)
class Line:
    """The batches of one session. What was sent and answered is no part of what a replay must reproduce."""

    expected: int = declare(1, in_digest=False)
    #: The client has all answers up to here ...
    answered: int = declare(0, in_digest=False)
    #: ... and these.
    ahead: set[int] = declare(make=set, pack=list, unpack=set, in_digest=False)
    kept: dict[int, Kept] = declare(make=dict, pack=pairs, unpack=_kept_again, in_digest=False)
    #: By ticket: the keys of claims, or of a batch, that parked calls were handed.
    handed: dict[int, list[Any]] = declare(make=dict, pack=pairs, unpack=_handed_again, in_digest=False)

    def heard(self, answered: int, ahead: Iterable[int]) -> None:
        """The client has all answers up to a batch, and those of some later ones."""
        for sequence in [number for number in self.kept if number <= answered]:
            del self.kept[sequence]
        self.answered = max(self.answered, answered)
        self.ahead = {number for number in self.ahead.union(ahead) if number > self.answered}
        self._expect(max(self.expected, answered + 1))

    def _expect(self, sequence: int) -> None:
        """What changed nothing may have left no trace, and does not come again once the client has its answer."""
        while sequence in self.ahead:
            sequence += 1
        self.expected = sequence

    def find(self, sequence: int, first_ticket: int) -> Kept | None:
        """What is kept of a batch that came before; None if the client has its answer.

        A batch of which nothing is kept, and which nobody answered, changed nothing.
        """
        is_answered = sequence <= self.answered or sequence in self.ahead
        return None if is_answered else self.kept.get(sequence, Kept(first_ticket, []))

    def begin(self, sequence: int, first_ticket: int) -> Kept:
        """A batch starts, or goes on after it was cut short."""
        self.expected = sequence
        return self.kept.setdefault(sequence, Kept(first_ticket, []))

    def end(self, sequence: int) -> None:
        """A batch has run to its end."""
        self._expect(sequence + 1)

    def hand(self, ticket: int, keys: list[Any], *still_open: Collection[Any]) -> None:
        """A parked call was handed claims, or a batch: its answer is known now."""
        if len(self.handed) > HANDED_KEPT + 2 * sum(map(len, still_open)):  # half can go, which pays for looking
            self.handed = {
                t: k for t, k in self.handed.items() if any(key in there for key in k for there in still_open)
            }
        self.handed[ticket] = keys
        self.note(ticket, [PARKED])

    def note(self, ticket: int, reply: Reply) -> None:
        """An operation has another answer to be kept from now on."""
        for kept in self.kept.values():
            number = ticket - kept.first_ticket
            if 0 <= number < len(kept.replies):
                kept.replies[number] = reply
