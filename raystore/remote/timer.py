"""The one timer thread of a session: what must happen although no event loop comes by.

It sends what has waited, acknowledges claims whose callers are busy, keeps the session alive, repeats batches that got
no answer, and parks the listen call. It sleeps until something is due.
Not here: how any of it is done (`session`).
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raystore.remote.session import Session

logger: logging.Logger = logging.getLogger("raystore")

PENDING_SECONDS = 0.02  #: what no loop has sent for so long
AWAKE_SECONDS = 0.5  #: after the last batch, to look by itself: waking a thread with every call would slow the caller
ACKNOWLEDGE_SECONDS = 0.5  #: an acknowledgement that found no batch to ride on
KEEP_ALIVE_SECONDS = 10.0  #: of silence, when no listen call can be parked
LISTEN_RETRY_SECONDS = 0.5
AGAIN_SECONDS = 1.0  #: after an error that nobody foresaw


class SessionTimer:
    """Works for one session, on a daemon thread that starts with its first operation."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._wake = threading.Condition(threading.Lock())
        self._woken = False
        self._asleep = False  # for long: nothing is pending
        self._closed = False
        self._thread: threading.Thread | None = None
        self._no_listen_before = 0.0

    def wake(self) -> None:
        """Look at once."""
        with self._wake:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="raystore-session", daemon=True)
                self._thread.start()
            self._woken = True
            self._wake.notify()

    def wake_for_pending(self) -> None:
        """Look soon: cheap when the thread is awake anyway, as it is while something is pending."""
        if self._asleep or self._thread is None:
            self.wake()

    def listen_failed(self) -> None:
        """A listen call came back without an answer: not again for a moment."""
        self._no_listen_before = time.monotonic() + LISTEN_RETRY_SECONDS
        self.wake()

    def close(self) -> None:
        """Stop."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def _run(self) -> None:
        while True:
            self._asleep = True  # what comes from here on wakes us, whether we have looked at it or not
            try:
                seconds = self._work()
            except Exception:  # the session lives by this thread: acknowledgements, retries, keep-alives
                logger.exception("A session could not see to what was due; trying again in %g s", AGAIN_SECONDS)
                seconds = AGAIN_SECONDS
            with self._wake:
                if self._closed:
                    return
                if not self._woken:
                    self._asleep = seconds is None or seconds > 1.5 * PENDING_SECONDS
                    self._wake.wait(seconds)
                    self._asleep = False
                self._woken = False

    def _work(self) -> float | None:
        """Do what is due; seconds until there is something again, None for when woken."""
        session, now = self._session, time.monotonic()
        session.tidy()
        due: list[float] = []
        with session.lock:
            ripe, next_ripe = session.retries.take_ripe()
            unseen = session.ledger.has_unseen
            oldest = session.outgoing.oldest()
            waiting = session.ledger.oldest()
        if next_ripe is not None:
            due.append(next_ripe)
        for batch in ripe:
            session.send(batch)
        if unseen:
            session.acknowledge_arrived(now - ACKNOWLEDGE_SECONDS)
            due.append(now + ACKNOWLEDGE_SECONDS / 2)
        if oldest is not None and oldest <= now - PENDING_SECONDS:
            session.flush()
        if waiting is not None:
            if waiting <= now - ACKNOWLEDGE_SECONDS:
                session.flush(empty=True)
            else:
                due.append(waiting + ACKNOWLEDGE_SECONDS)
        if now >= self._no_listen_before:
            listening = session.listening.start()
        else:
            listening = False
            due.append(self._no_listen_before)
        # Silence would cost this process something while it holds work, or waits.
        if not listening and session.parked.wanted:
            if session.sent_at <= now - KEEP_ALIVE_SECONDS:
                session.flush(empty=True)
            due.append(session.sent_at + KEEP_ALIVE_SECONDS)
        if session.has_pending or session.sent_at > now - AWAKE_SECONDS:
            due.append(now + PENDING_SECONDS)
        return max(min(due) - now, 0.001) if due else None
