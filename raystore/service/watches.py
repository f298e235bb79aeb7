"""Sets of rollouts that callers wait for one after the other, kept between their calls.

A caller names them once, and asks then only for what of them has finished since: what others finish does not travel to
it, and ten thousand ids do not travel with each call. A set that is gone (too many others, another process) is named
again by its caller.
Not here: the completion log (`core.changes`), parking (`waiters`).
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Iterable

from raystore.errors import AnswerGoneError

WATCHED = 200_000  #: ids of rollouts in all sets together; the newest set is kept in any case


class Watches:
    """The sets of one store."""

    def __init__(self) -> None:
        self._sets: OrderedDict[int, tuple[str, frozenset[str]]] = OrderedDict()  # the last that was asked for is last
        self._by_session: dict[str, set[int]] = {}
        self._ids = 0

    def __len__(self) -> int:
        return self._ids

    def keep(self, session_id: str, rollout_ids: Iterable[str]) -> int:
        """Keep a set; a token for it."""
        token = secrets.randbits(53)  # that of another process means nothing here
        wanted = frozenset(rollout_ids)
        self._sets[token] = (session_id, wanted)
        self._by_session.setdefault(session_id, set()).add(token)
        self._ids += len(wanted)
        while self._ids > WATCHED and len(self._sets) > 1:
            self.drop(next(iter(self._sets)))
        return token

    def find(self, token: int) -> frozenset[str]:
        """The set of a token."""
        if token not in self._sets:
            raise AnswerGoneError(token)
        self._sets.move_to_end(token)
        return self._sets[token][1]

    def drop(self, token: int) -> None:
        """Keep a set no longer."""
        if token not in self._sets:
            return
        session_id, wanted = self._sets.pop(token)
        self._ids -= len(wanted)
        there = self._by_session[session_id]
        there.discard(token)
        if not there:
            del self._by_session[session_id]

    def drop_session(self, session_id: str) -> None:
        """A process has ended: nobody asks for its sets."""
        for token in list(self._by_session.get(session_id, ())):
            self.drop(token)
