"""The parked call of a session: it comes back when the store has something to say.

At most one is under way. It carries answers of parked calls, and notices, and is the first to meet a store that is
another process by now.
Not here: what is parked (`parked`), what an answer does (`session`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from raystore.errors import StoreUnavailableError, from_record
from raystore.remote.handshake import CLIENT
from raystore.wire import frames

if TYPE_CHECKING:
    from raystore.remote.session import Session

logger: logging.Logger = logging.getLogger("raystore")


class Listening:
    """The listen calls of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def start(self) -> bool:
        """Park a listen call if the store has something to say; whether one is parked."""
        session = self._session
        with session.lock:
            if session.parked.listening or not session.parked.wanted or session.failure is not None:
                return session.parked.listening
            tickets = session.parked.take_acknowledgements()
            session_id = session.session_id
            session.parked.listening = True
        if not session.is_connected():
            return False
        try:
            reference = session.handle.listen.remote(frames.pack([*CLIENT, session_id, tickets, session.epoch])[0])
            reference.future().add_done_callback(lambda future: self._on_listened(session_id, tickets, future))
        except Exception as error:
            session.fail(StoreUnavailableError(session.store, f"{type(error).__name__}: {error}"))
        return True

    def _on_listened(self, session_id: str, tickets: list[int], future: Any) -> None:
        session = self._session
        try:
            epoch, outcome, *rest = frames.unpack_answer(future.result())
        except Exception as error:  # no answer, or none that can be read
            with session.lock:  # of a session that was renewed meanwhile the same tickets would be other calls
                session.parked.listened(tickets if session_id == session.session_id else [])
            if not session.has_died(error):
                session.timer.listen_failed()
            return
        try:
            self._on_answer(session_id, epoch, outcome, rest)
        except Exception:  # the next call may fare better, and what came will come again
            logger.exception("What store %r had to say could not be taken", session.store)
            session.timer.listen_failed()

    def _on_answer(self, session_id: str, epoch: int, outcome: int, rest: list[Any]) -> None:
        session = self._session
        with session.lock:
            session.parked.listened([])
            is_ours = session_id == session.session_id
            resumed = session.follow(epoch) if is_ours and outcome == frames.DONE else []
        if not is_ours:
            session.timer.wake()
            return
        if outcome == frames.BROKEN:
            session.fail(from_record(*rest[0]))
        elif epoch < session.epoch:
            session.timer.listen_failed()
        elif outcome == frames.DONE:
            later, hint = rest
            with session.lock:
                session.parked.take_hint(hint)
                session.parked.listened([], wanted=bool(later))  # to acknowledge what came
            session.receive(later)
            session.resume(resumed)
            self.start()
        elif outcome == frames.ENDED and session.parked:
            session.renew(epoch)
        else:
            session.parked.unwanted()
        session.timer.wake()
