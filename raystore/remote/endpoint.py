"""A service behind the session protocol: batches and listen calls of many sessions, as bytes in and bytes out.

What an answer says is as durable as was asked for before it leaves.
Not here: Ray (`actor`), the order and the answers of one session (`inbox`).
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
from raystore.remote.processes import process_of
from raystore.remote.server_session import Inbox, SessionEnded
from raystore.service.service import PROTOCOL, Service
from raystore.wire import frames

LISTEN_SECONDS = 30.0  #: at most; jittered, so that a thousand clients do not come back at once
SLOW_SECONDS = 0.1  #: an answer that waited for the disk for longer starts the time anew in which to acknowledge claims


#: What stands in a batch's header behind the protocol: the client, its session, number of the batch, up to where it has
#: all answers, which later ones, ticket of the first operation, claims that arrived, parked answers that arrived.
is_header: Callable[[Any], bool] = checker(
    tuple[str, Id, int, int, list[int], int, list[tuple[Id, Id | Positive]], list[int]]
)


class Front:
    """The sessions of one service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._is_durable = service.journal is not None
        service.on_notice = self._wake
        self.on_open: Callable[[Session], None] = lambda session: None  # is told of each session that begins
        # Of the process before this one, if there was one:
        self._inboxes = {name: Inbox(service, session) for name, session in service.state.sessions.items()}

    def _wake(self, session_id: str) -> None:
        inbox = self._inboxes.get(session_id)
        if inbox is not None and inbox.session.ended_at is not None:
            inbox.release()
        elif inbox is not None:
            inbox.wake()

    async def exchange(self, parts: tuple[bytes, ...], refs: dict[int, list[Any]] | None = None) -> frames.Answer:
        """Run a batch of operations of a session; what became of it, and their answers."""
        service = self.service
        service.actor_calls += 1
        (protocol, *header), *operations = frames.split(parts, refs)
        if protocol != PROTOCOL:
            return frames.pack_answer(service.epoch, frames.REFUSED, own_protocol())
        if not is_header(header[:8]):
            refusal = InvalidValueError("header", header, "who sends which batch, and what it has of earlier ones")
            return frames.pack_answer(service.epoch, frames.BROKEN, to_record(refusal))
        _, session_id, sequence, answered, ahead, *more = header
        told, more = more[3:], more[:3]  # a session says first which process it is
        inbox = self._inboxes.get(session_id)
        if inbox is None:
            # A client whose first batch was never answered is new; its second may overtake its first.
            if answered or ahead or session_id in service.state.sessions:
                return frames.pack_answer(service.epoch, frames.ENDED)
            try:
                process = process_of(told[0]) if told else None
                session = service.open_session(session_id, process=None if process is None else list(process))
            except StoreOverloadedError as refusal:
                service.overloads += 1
                return frames.pack_answer(service.epoch, frames.BROKEN, to_record(refusal))
            inbox = self._inboxes[session_id] = Inbox(service, session)
            if len(self._inboxes) > 2 * len(service.state.sessions) + 100:  # or it would cost as much as all that was
                self._sweep()
            self.on_open(session)
        if inbox.session.ended_at is not None:
            return frames.pack_answer(service.epoch, frames.ENDED)
        service.heard(inbox.session)
        try:
            answer = await inbox.exchange(sequence, (answered, ahead), more, operations, parts)
        except SessionEnded:
            return frames.pack_answer(service.epoch, frames.ENDED)
        if self._is_durable:
            await self._safe(inbox.session)
        return answer

    async def listen(self, frame: bytes) -> frames.Answer:
        """Wait for answers of parked calls and for notices of a session."""
        service = self.service
        service.actor_calls += 1
        protocol, *header = frames.unpack(frame, [])
        if protocol != PROTOCOL:
            return frames.pack_answer(service.epoch, frames.REFUSED, own_protocol())
        _, session_id, acknowledged, epoch = header
        inbox = self._inboxes.get(session_id)
        if inbox is None or inbox.session.ended_at is not None:
            return frames.pack_answer(service.epoch, frames.ENDED)
        service.heard(inbox.session)
        # A client that knows of the process before has calls that are parked nowhere: it is told at once.
        seconds = LISTEN_SECONDS * random.uniform(0.7, 1.0) if epoch == service.epoch else 0.0
        answer = await inbox.listen(acknowledged, seconds)
        if self._is_durable:
            await self._safe(inbox.session)
        return answer

    async def _safe(self, session: Session) -> None:
        """Let nothing leave before what it says is as durable as was asked for."""
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
        for session_id, inbox in list(self._inboxes.items()):
            if session_id not in self.service.state.sessions:
                inbox.release()
                del self._inboxes[session_id]


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
