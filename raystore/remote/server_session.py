"""The actor's side of sessions: it runs batches in order, each once, and keeps answers that come later.

A batch that comes early is held until its predecessor has run. A batch that comes again gets the answers that were kept
of it. Answers of parked calls, and notices, stay in the outbox until the client says that it has received them.
`Endpoint` has all sessions of a service; it takes and returns bytes. An answer leaves once its changes are as durable
as the store's configuration asks for. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from raystore import __version__
from raystore.core.batches import BatchRun, repeat
from raystore.core.claims import CLOSED
from raystore.core.pauses import is_pausing
from raystore.core.payload import OnDisk, Payload, size_of
from raystore.core.records import Many, Record
from raystore.core.schema import Id, Positive, checker
from raystore.core.state import VALUE, BatchReplies, HandedKey, Reply, Session, Step
from raystore.core.verbs import HANDING, Verb, handed_again
from raystore.errors import AnswerGoneError, InvalidValueError, StoreError, StoreOverloadedError, to_record
from raystore.journal.recorder import Source
from raystore.remote.lifelines import process_of
from raystore.service.parking import PARKED
from raystore.service.service import PROTOCOL, Service
from raystore.wire import frames

SLICE_SECONDS = 0.005  #: of a batch; then other calls of the loop have a turn, and after a second slice
PAUSE_SECONDS = 0.001  #: ... so long: a call of Ray's takes six turns, which would wait for a slice each
PAGE_BYTES = 1024 * 1024  #: a longer answer is sent in pages, so that packing it does not hold up the loop
LATER_AT_ONCE = 1_000  #: answers of parked calls that leave together
PAGES_KEPT = 4_096  #: long answers of a session of which pages are left
LISTEN_SECONDS = 30.0  #: of a listen call, at most; jittered, so that a thousand clients do not come back at once
SLOW_SECONDS = 0.1  #: an answer that waits longer for the disk starts the time to acknowledge its claims anew


class SessionEnded(Exception):
    """The session ended while a batch of it was held; the batch was not executed."""


class ServerSession:
    """One session of a client, at the actor."""

    def __init__(self, service: Service, session: Session) -> None:
        self.service = service
        self.session = session
        self._turns: dict[int, asyncio.Future[None]] = {}
        self._running: dict[int, asyncio.Future[frames.Answer]] = {}
        handed = session.replies.handed  # by a process that ran this store before
        found = ((ticket, handed_again(service.state, session, keys)) for ticket, keys in handed.items())
        self._outbox: dict[int, Reply] = {ticket: [VALUE, value] for ticket, value in found if value is not None}
        # Numbers of notices and pages differ from those of the process before.
        first = service.epoch << 32 if service.journal is not None else 0
        self._notices = itertools.count(-1 - first, -1)
        self._listener: asyncio.Future[None] | None = None
        self._pages: dict[int, list[Any]] = {}
        self._tokens = itertools.count(1 + first)
        self._hints = itertools.count(1)
        self._closing = False

    # -- batches -----------------------------------------------------------------------------------------------------

    async def exchange(
        self,
        sequence: int,
        answered: tuple[int, list[int]],
        header: list[Any],
        operations: list[Any],
        parts: Sequence[bytes],
    ) -> frames.Answer:
        """Run one batch at its place in the order, once, and return its answers.

        Args:
            sequence: number of the batch.
            answered: the client has all answers up to this batch, and those of these later ones.
            header: ticket of the first operation, keys of claims to acknowledge, tickets whose answers were received.
            operations: verb and arguments of each.
            parts: the batch as it came, for a journal.

        Raises `SessionEnded` if the session ended before the batch had its turn.
        """
        running = self._running.get(sequence)
        if running is not None:  # the client repeats it while it runs
            return await asyncio.shield(running)
        done = self._running[sequence] = asyncio.get_running_loop().create_future()
        try:
            self.session.replies.answers_received(*answered)
            if self._turns:
                self._take_turns()
            if sequence > self.session.replies.expected:
                self.service.heard(self.session)
                turn = self._turns[sequence] = asyncio.get_running_loop().create_future()
                await turn
            if self.session.ended_at is not None:
                raise SessionEnded
            replies, lost = await self._run(sequence, header, operations, parts)
            if self.session.notices:
                self._collect_notices()
            later = self._later() if self._listener is None else []  # else the listen call takes it
            replies = [self._paged(reply) if isinstance(reply[-1], (Many, tuple)) else reply for reply in replies]
            answer = self._answer(replies, later, lost)
            done.set_result(answer)
            return answer
        except BaseException as error:
            if not done.done():
                done.set_exception(error)
                done.exception()  # marks it as retrieved: perhaps nobody repeated the batch
            raise
        finally:
            del self._running[sequence]

    async def _run(
        self, sequence: int, header: list[Any], operations: list[Any], parts: Sequence[bytes]
    ) -> tuple[list[Reply], list[HandedKey]]:
        first_ticket, acknowledged, received = header
        if received:
            self._forget(received)
        lost: list[HandedKey] = []
        if acknowledged:
            lost = self.service.acknowledge(self.session, [(a, b) for a, b in acknowledged])
        cache = self.session.replies
        if sequence < cache.expected:
            self.service.heard(self.session)
            before = cache.find(sequence, first_ticket)
            return self._again(before, operations) if before else [], lost
        kept = cache.kept.get(sequence)  # by a process that ran this store before
        before = BatchReplies(first_ticket, [] if kept is None else list(kept.replies))
        service = self.service
        run = BatchRun(service.state, self.session, sequence, first_ticket, operations, service.catch_up)
        source = None
        if service.journal is not None:
            source = Source(self.session.session_id, sequence, first_ticket, parts, len(before.replies))
        for slices in itertools.count(1):
            until = time.perf_counter() + SLICE_SECONDS
            step = service.begin(self.session, source)
            try:
                is_done = run.run(functools.partial(self._operate, step, source), time.perf_counter, until)
            finally:
                service.end()
            if is_done:
                break
            await asyncio.sleep(PAUSE_SECONDS if slices > 1 else 0)
        cache.end(sequence)
        if self._turns:
            self._take_turns()
        if self._closing:
            self.service.end_session(self.session, why=CLOSED)
        first = min(run.ran, default=len(operations))
        replies = [run.ran[number] for number in range(first, len(operations))]
        return self._again(before, operations[:first]) + replies if first else replies, lost

    def _take_turns(self) -> None:
        """Let the expected batch run if it is here; held batches before it are repeats, and are answered as such."""
        for sequence in [number for number in self._turns if number <= self.session.replies.expected]:
            _set(self._turns.pop(sequence))

    def _again(self, kept: BatchReplies, operations: list[Any]) -> list[Reply]:
        return repeat(self.service.state, self.session, kept, operations, self._once_more)

    def _deliver(self, ticket: int, value: Any) -> bool:
        """Put the answer of a parked call into the outbox."""
        is_error = isinstance(value, StoreError)
        self._outbox[ticket] = [frames.ERROR, *to_record(value)] if is_error else [frames.VALUE, value]
        self.wake()
        return True  # if it hands something over, its caller is to acknowledge that

    def _operate(
        self, step: Step, source: Source | None, number: int, ticket: int, verb: str, arguments: dict[str, Any]
    ) -> Reply:
        try:
            own = OWN.get(verb)
            if own is not None:  # it is about this session, and none of the service's
                if source is not None:
                    source.unwritten += 1
                own.require(verb, arguments)
                return [frames.VALUE, own.run(self, **arguments)]
            if verb in HANDING and type(of := arguments.get("of")) is int:
                self._outbox.pop(of, None)  # it asks again: the answer there is the one it asks for
            value = self.service.perform(step, ticket, verb, arguments, self._deliver)
        except Exception as error:  # the answer of this operation; the others of the batch go on
            return [frames.ERROR, *to_record(error)]
        return [frames.PARKED] if value is PARKED else [frames.VALUE, value]

    def _once_more(self, number: int, ticket: int, verb: str, arguments: dict[str, Any]) -> Reply:
        """Run an operation of a repeated batch, a step of its own."""
        try:
            step = self.service.begin(self.session, self.service.source_of(self.session, ticket, verb, arguments))
        except Exception as error:
            return [frames.ERROR, *to_record(error)]
        try:
            return self._operate(step, None, number, ticket, verb, arguments)
        finally:
            self.service.end()

    def _answer(self, *parts: Any) -> frames.Answer:
        """Pack an answer, with whether the client should keep a listen call parked.

        The latter is numbered, since answers overtake each other.
        """
        service, session = self.service, self.session
        is_wanted = (
            bool(session.claims or session.held or session.batches or self._outbox)
            or service.parking.has_session(session.session_id)
            or service.state.resources.is_publishing(session.session_id)
            or (bool(service.state.gates.pauses) and is_pausing(service.state, session.session_id))
        )
        return frames.pack_answer(service.epoch, frames.DONE, *parts, (next(self._hints), is_wanted))

    # -- answers that come later -------------------------------------------------------------------------------------

    async def listen(self, received: list[int], seconds: float) -> frames.Answer:
        """Wait until the outbox has something, at most for `seconds`. `received`: tickets of answers that came."""
        self._forget(received)
        self.wake()  # an older call, which this one replaces
        self._collect_notices()
        if not self._outbox and self.session.ended_at is None:
            self._listener = listener = asyncio.get_running_loop().create_future()
            try:
                await asyncio.wait([listener], timeout=seconds)
            finally:
                if self._listener is listener:
                    self._listener = None
            self._collect_notices()
        return self._answer(self._later())

    def _later(self) -> list[tuple[int, Reply]]:
        """The oldest answers of the outbox. A long one is cut once, however often it is sent."""
        later = [
            (ticket, self._paged(reply)) for ticket, reply in itertools.islice(self._outbox.items(), LATER_AT_ONCE)
        ]
        self._outbox.update(later)
        return later

    def wake(self) -> None:
        """Let the parked listen call return."""
        if self._listener is not None:
            _set(self._listener)

    def _collect_notices(self) -> None:
        notices, self.session.notices = self.session.notices, []
        for notice in notices:
            self._outbox[next(self._notices)] = [frames.NOTICE, *notice]

    def _forget(self, tickets: Iterable[int]) -> None:
        """Drop answers that the client has received from the outbox."""
        for ticket in tickets:
            self._outbox.pop(ticket, None)

    def release(self) -> None:
        """The session has ended: let the listen call and held batches return."""
        self.wake()
        for turn in self._turns.values():
            _set(turn)

    # -- long answers ------------------------------------------------------------------------------------------------

    def _paged(self, reply: Reply) -> Reply:
        """The answer; of one with a list of rows the first page, and a token for the rest if there is one."""
        value = reply[1] if len(reply) == 2 else None
        if isinstance(value, Many):
            value = value.items, value.total
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], list):
            first, token = self._cut(value[0])
            return [frames.VALUE, [first, value[1], token]]
        return reply

    def _cut(self, items: list[Any]) -> tuple[list[Any], int | None]:
        """The first page of a list, and a token for the rest."""
        size = 0
        for index, item in enumerate(items):
            size += _weight(item)
            if size > PAGE_BYTES and index:
                token = next(self._tokens)
                self._pages[token] = items[index:]
                if len(self._pages) > PAGES_KEPT:
                    del self._pages[next(iter(self._pages))]
                return self.service.with_bodies(items[:index]), token
        return self.service.with_bodies(items), None

    def more(self, *, token: int) -> Many:
        """The rest of a long answer, cut anew. Raises `AnswerGoneError`."""
        rest = self._pages.pop(token, None)
        if rest is None:
            raise AnswerGoneError(token)
        return Many(rest, len(rest))

    def close(self) -> None:
        """The session ends with this batch."""
        self._closing = True


#: Operations on a session itself.
OWN = {"more": Verb(ServerSession.more, changes=False), "close_session": Verb(ServerSession.close, changes=False)}


def _weight(item: Any) -> int:
    """About how many bytes a record takes in an answer."""
    if isinstance(item, tuple):
        return sum(_weight(part) for part in item)
    if isinstance(item, Record):
        bodies = (value for value in item.row() if isinstance(value, (bytes, Payload, OnDisk)))
        return 200 + sum(body.size if isinstance(body, OnDisk) else size_of(body) for body in bodies)
    return 0


# -- all sessions ------------------------------------------------------------------------------------------------------

OWN_PROTOCOL = f"raystore {__version__}, protocol {PROTOCOL}"  #: of this side of a session

#: The header of a batch behind the protocol: version of the client, session id, number of the batch, the last batch up
#: to which the client has all answers, later ones whose answers it has, ticket of the first operation, keys of claims
#: that are acknowledged, tickets of parked calls and notices that were received.
is_header: Callable[[Any], bool] = checker(
    tuple[str, Id, int, int, list[int], int, list[tuple[Id, Id | Positive]], list[int]]
)


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
            return frames.pack_answer(service.epoch, frames.REFUSED, OWN_PROTOCOL)
        if not is_header(header[:8]):
            refusal = InvalidValueError("header", header, "who sends which batch, and what it has of earlier ones")
            return frames.pack_answer(service.epoch, frames.BROKEN, to_record(refusal))
        _, session_id, sequence, answered, ahead, *more = header
        told, more = more[3:], more[:3]  # at first, a client says which process it is
        served = self._sessions.get(session_id)
        if served is None:
            # A client that has no answer yet is new, although a later batch may overtake its first.
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
            return frames.pack_answer(service.epoch, frames.REFUSED, OWN_PROTOCOL)
        _, session_id, received, epoch = header
        served = self._sessions.get(session_id)
        if served is None or served.session.ended_at is not None:
            return frames.pack_answer(service.epoch, frames.ENDED)
        service.heard(served.session)
        # A client with an older epoch has parked calls in a process that has ended: answer at once, so that it knows.
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


def _set(future: asyncio.Future[None], lost: StoreError | None = None) -> None:
    if future.done():
        return
    if lost is None:
        future.set_result(None)
    else:
        future.set_exception(lost)
