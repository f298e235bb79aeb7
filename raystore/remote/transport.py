"""A process's session to a store, shared by all its clients there.

Made at first use, and anew when Ray was shut down and started again. In a child that was forked from a process with a
session, or with Ray, it raises.
Not here: what a session does (`session`).
"""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from raystore.api import NoticeHandler
from raystore.client import forks
from raystore.client.pending import PendingCall
from raystore.errors import ForkedError, StoreClosedError, StoreUnavailableError
from raystore.remote.batching import Operation
from raystore.remote.handshake import describe, find_actor, ray_connection
from raystore.remote.session import Session

_sessions: dict[bytes, tuple[int, Session]] = {}  # of this process, by actor, with the process they belong to
_sessions_lock = threading.Lock()


class ActorTransport:
    """The process's session to one store, shared by all its clients."""

    def __init__(self, handle: Any, known: dict[str, Any]) -> None:
        self._handle = handle
        self._known = known
        self._closed = False
        self._session: Session | None = None
        self._pid = 0

    @property
    def _actor_id(self) -> bytes:
        """One run may be gone on with by another actor, so the id of the store is not enough."""
        return bytes(self._handle._actor_id.binary())

    @property
    def session(self) -> Session:
        """The session of this process, made at first use; raises `ForkedError` in a child that was forked later."""
        session = self._session
        if session is not None and self._pid == forks.pid and session.failure is None:
            return session
        if self._closed:
            raise StoreClosedError(self._known["name"])
        if (session is not None and self._pid != forks.pid) or forks.ray_is_inherited():
            raise ForkedError(f"Store {self._known['name']!r}")
        if session is not None and session.failure is not None:
            if isinstance(session.failure, StoreClosedError) or ray_connection() in (None, session.connection):
                return session  # which says why
            self._handle = find_actor(self._known["name"], self._known["namespace"])  # Ray was started anew
            if self._handle is None or describe(self._handle)["store_id"] != self._known["store_id"]:
                return session
        with _sessions_lock:
            pid = forks.pid
            if self._session is not None and self._session is not session and self._pid == pid:
                return self._session  # another thread was quicker
            owner, found = _sessions.get(self._actor_id, (0, None))
            if found is None or owner != pid or found.failure is not None:
                limit = self._known["limits"]["call_bytes"]
                machine = self._known.get("machine")
                found = Session(self._handle, self._known["name"], self._known["epoch"], limit, machine)
                _sessions[self._actor_id] = (pid, found)
            found.users += 1
            self._session, self._pid = found, pid
            return found

    def call(self, verb: str, arguments: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        return self.session.call(verb, arguments)

    def post(self, verb: str, arguments: dict[str, Any]) -> PendingCall:
        return self.session.post(verb, arguments)

    def abandon(self, call: PendingCall) -> None:
        assert isinstance(call, Operation)
        self.session.abandon(call)

    def tell(self, verb: str, arguments: dict[str, Any]) -> None:
        with contextlib.suppress(StoreClosedError, StoreUnavailableError):
            self.session.post(verb, arguments, awaited=False)

    def listen_for_notices(self, handler: NoticeHandler) -> Callable[[], None]:
        return self.session.notices.listen(handler)

    @property
    def session_id(self) -> str:
        return self.session.session_id

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        session, self._session = self._session, None
        if session is None or self._pid != forks.pid:
            return
        with _sessions_lock:
            session.users -= 1
            last = session.users == 0
            if last:
                _sessions.pop(self._actor_id, None)
        if last:
            session.close()


def close_sessions() -> None:
    """Say goodbye to all stores; at the exit of the process."""
    with _sessions_lock:
        mine = [session for pid, session in _sessions.values() if pid == forks.pid]
        _sessions.clear()
    for session in mine:
        session.close()


atexit.register(close_sessions)  # before Ray's own, which was registered earlier
