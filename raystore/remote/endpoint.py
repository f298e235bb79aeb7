"""The session protocol of a store: batches and listen calls of many sessions, bytes in and bytes out.

An answer leaves once what it says is as durable as the store's configuration asks for. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from raystore import __version__
from raystore.core.schema import Id, Positive, checker
from raystore.core.state import Session
from raystore.errors import InvalidValueError, StoreError, StoreOverloadedError, to_record
from raystore.remote.lifelines import process_of
from raystore.remote.server_session import ServerSession, SessionEnded
from raystore.service.service import PROTOCOL, Service
from raystore.wire import frames

LISTEN_SECONDS = 30.0  #: of a listen call, at most; jittered, so that a thousand clients do not come back at once
SLOW_SECONDS = 0.1  #: an answer that waits longer for the disk starts the time to acknowledge its claims anew


#: The header of a batch behind the protocol: version of the client, session id, number of the batch, the last batch up
#: to which the client has all answers, later ones whose answers it has, ticket of the first operation, keys of claims
#: that are acknowledged, tickets of parked calls and notices that were received.
is_header = checker(tuple[str, Id, int, int, list[int], int, list[tuple[Id, Id | Positive]], list[int]])


class Endpoint:
    """The sessions of one service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._is_durable = service.journal is not None
        service.on_notice = self._wake
        self.on_open: Callable[[Session], None] = lambda session: None  # called with each session that begins
        # Sessions of the process before this one go on:
        self._sessions = {name: ServerSession(service, session) for name, session in service.state.sessions.items()}

    def _wake(self, session_id: str) -> None:
        served = self._sessions.get(session_id)
        if served is not None and served.session.ended_at is not None:
            served.release()
        elif served is not None:
            served.wake()

    async def exchange(self, parts: tuple[bytes, ...], refs: dict[int, list[Any]] | None = None) -> frames.Answer:
        """Run a batch of operations of a session; the outcome of the batch, and the answers.

        `refs`: object references in the arguments of operations, by number of the operation.
        """
        service = self.service
        service.actor_calls += 1
        (protocol, *header), *operations = frames.split(parts, refs)
        if protocol != PROTOCOL:
            return frames.pack_answer(service.epoch, frames.REFUSED, own_protocol())
        if not is_header(header[:8]):
            refusal = InvalidValueError("header", header, "who sends which batch, and what it has of earlier ones")
            return frames.pack_answer(service.epoch, frames.BROKEN, to_record(refusal))
        _, session_id, sequence, answered, ahead, *more = header
        told, more = more[3:], more[:3]  # at first, a client says which process it is
        served = self._sessions.get(session_id)
        if served is None:
            # A client that has no answer yet is new, although its second batch may overtake its first.
            if answered or ahead or session_id in service.state.sessions:
                return frames.pack_answer(service.epoch, frames.ENDED)
            try:
                process = process_of(told[0]) if told else None
                session = service.open_session(session_id, process=None if process is None else list(process))
            except StoreOverloadedError as refusal:
                service.overloads += 1
                return frames.pack_answer(service.epoch, frames.BROKEN, to_record(refusal))
            served = self._sessions[session_id] = ServerSession(service, session)
            if len(self._sessions) > 2 * len(service.state.sessions) + 100:  # seldom, since it looks at all of them
                self._sweep()
            self.on_open(session)
        if served.session.ended_at is not None:
            return frames.pack_answer(service.epoch, frames.ENDED)
        service.heard(served.session)
        try:
            answer = await served.exchange(sequence, (answered, ahead), more, operations, parts)
        except SessionEnded:
            return frames.pack_answer(service.epoch, frames.ENDED)
        if self._is_durable:
            await self._safe(served.session)
        return answer

    async def listen(self, frame: bytes) -> frames.Answer:
        """Wait for answers of parked calls of a session, and for notices."""
        service = self.service
        service.actor_calls += 1
        protocol, *header = frames.unpack(frame, [])
        if protocol != PROTOCOL:
            return frames.pack_answer(service.epoch, frames.REFUSED, own_protocol())
        _, session_id, received, epoch = header
        served = self._sessions.get(session_id)
        if served is None or served.session.ended_at is not None:
            return frames.pack_answer(service.epoch, frames.ENDED)
        service.heard(served.session)
        # A client that knows the process before believes in parked calls that are no more: it is told at once.
        seconds = LISTEN_SECONDS * random.uniform(0.7, 1.0) if epoch == service.epoch else 0.0
        answer = await served.listen(received, seconds)
        if self._is_durable:
            await self._safe(served.session)
        return answer

    async def _safe(self, session: Session) -> None:
        """Wait until the changes so far are as durable as the configuration asks for."""
        service = self.service
        loop = asyncio.get_running_loop()
        safe: asyncio.Future[None] = loop.create_future()

        def tell(lost: StoreError | None) -> None:
            loop.call_soon_threadsafe(_set, safe, lost)

        started = loop.time()
        if not service.when_safe(tell):
            return
        await safe
        if loop.time() - started > SLOW_SECONDS:
            service.claims_left(session)

    def _sweep(self) -> None:
        """Forget sessions that the state has forgotten."""
        for session_id, served in list(self._sessions.items()):
            if session_id not in self.service.state.sessions:
                served.release()
                del self._sessions[session_id]


def _set(future: asyncio.Future[None], lost: StoreError | None) -> None:
    if future.done():
        return
    if lost is None:
        future.set_result(None)
    else:
        future.set_exception(lost)


def own_protocol() -> str:
    """What this side of a session is."""
    return f"raystore {__version__}, protocol {PROTOCOL}"
