"""The replies of a session's batches, kept in case a batch comes again.

The reply of a change is kept until the client has received it. Of a reply that handed over claims or a batch only the
keys are kept. Nothing is kept of a read, which runs again.
Not here: running batches (`batches`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from raystore.core.records import declare, pairs

# What a reply says.
VALUE, ERROR, PARKED, NOTICE = range(4)
PARTLY = -1  #: kept of a long operation of which some pieces have run; never sent

Reply = list[Any]
AGAIN: Reply = []  #: placeholder: run this operation again if the batch is repeated
HANDED_KEPT = 64  #: tickets whose handed-over claims are remembered, beyond twice the open claims


class BatchReplies(NamedTuple):
    """The replies of one batch, as far as it has run."""

    first_ticket: int
    replies: list[Reply]


def _kept_again(rows: list[Any]) -> dict[int, BatchReplies]:
    return {sequence: BatchReplies(first_ticket, list(replies)) for sequence, (first_ticket, replies) in rows}


def _handed_again(rows: list[Any]) -> dict[int, list[Any]]:
    return {ticket: [(key[0], key[1]) for key in keys] for ticket, keys in rows}


@dataclass(slots=True, eq=False)
class ReplyCache:
    """The replies of one session. A replay need not reproduce what was sent and answered."""

    #: The sequence number of the batch that is to run next.
    expected: int = declare(1, in_digest=False)
    #: The client has all answers up to here ...
    answered: int = declare(0, in_digest=False)
    #: ... and these.
    ahead: set[int] = declare(make=set, pack=list, unpack=set, in_digest=False)
    kept: dict[int, BatchReplies] = declare(make=dict, pack=pairs, unpack=_kept_again, in_digest=False)
    #: By ticket: the keys of claims, or of a batch, that parked calls were handed.
    handed: dict[int, list[Any]] = declare(make=dict, pack=pairs, unpack=_handed_again, in_digest=False)

    def answers_received(self, answered: int, ahead: Iterable[int]) -> None:
        """The client has the answers of all batches up to one, and those of some later ones."""
        for sequence in [number for number in self.kept if number <= answered]:
            del self.kept[sequence]
        self.answered = max(self.answered, answered)
        if ahead or self.ahead:
            self.ahead = {number for number in self.ahead.union(ahead) if number > self.answered}
        self.expected = max(self.expected, answered + 1)
        while self.expected in self.ahead:  # the client has its answer: a batch of reads leaves no trace here
            self.expected += 1

    def find(self, sequence: int, first_ticket: int) -> BatchReplies | None:
        """The replies of a batch that came before; None if the client has them.

        A batch without replies that the client has no answer of changed nothing.
        """
        is_answered = sequence <= self.answered or sequence in self.ahead
        return None if is_answered else self.kept.get(sequence, BatchReplies(first_ticket, []))

    def begin(self, sequence: int, first_ticket: int) -> BatchReplies:
        """A batch starts, or goes on after it was interrupted."""
        self.expected = sequence
        return self.kept.setdefault(sequence, BatchReplies(first_ticket, []))

    def end(self, sequence: int) -> None:
        """A batch has run to its end."""
        self.expected = sequence + 1
        while self.expected in self.ahead:
            self.expected += 1

    def hand(self, ticket: int, keys: list[Any], *still_open: Collection[Any]) -> None:
        """A parked call was handed claims, or a batch."""
        if len(self.handed) > HANDED_KEPT + 2 * sum(map(len, still_open)):  # half can go: worth it
            self.handed = {
                t: k for t, k in self.handed.items() if any(key in there for key in k for there in still_open)
            }
        self.handed[ticket] = keys
        self.note(ticket, [PARKED])

    def note(self, ticket: int, reply: Reply) -> None:
        """Keep another reply of an operation from now on."""
        for kept in self.kept.values():
            number = ticket - kept.first_ticket
            if 0 <= number < len(kept.replies):
                kept.replies[number] = reply
