"""The actor's side of one session: it runs batches in order, each once, and keeps answers that come later.

A batch that comes early is held until its predecessor has run. A batch that comes again gets the answers that were kept
of it. Answers of parked calls, and notices, stay in the outbox until the client says that it has received them.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from raystore.core.batches import BatchRun, Item, repeat
from raystore.core.claims import CLOSED
from raystore.core.payload import OnDisk, Payload, size_of
from raystore.core.records import Many, Record
from raystore.core.replies import VALUE, BatchReplies, Reply
from raystore.core.state import HandedKey, Session
from raystore.core.verbs import HANDING, Verb, handed_again
from raystore.errors import AnswerGoneError, StoreError, to_record
from raystore.journal.recorder import Source
from raystore.service.parking import PARKED, Deliver
from raystore.service.service import Service
from raystore.wire import frames

SLICE_SECONDS = 0.005  #: of a batch; then other calls of the loop have a turn
PAGE_BYTES = 1024 * 1024  #: a longer answer is sent in pages, so that packing it does not hold up the loop
LATER_AT_ONCE = 1_000  #: answers of parked calls that leave together
PAGES_KEPT = 4_096  #: long answers of a session of which pages are left

Perform = Callable[[int, str, dict[str, Any], Deliver], Any]


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
            self.session.replies.acknowledged(*answered)
            if self._turns:
                self._take_turns()
            if sequence > self.session.replies.expected:
                turn = self._turns[sequence] = asyncio.get_running_loop().create_future()
                await turn
            if self.session.ended_at is not None:
                raise SessionEnded
            replies, lost = await self._run(sequence, header, operations, parts)
            answer = self._answer(replies, lost)
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
            before = cache.find(sequence, first_ticket)
            return self._again(before, operations) if before else [], lost
        kept = cache.begin(sequence, first_ticket)
        before = BatchReplies(first_ticket, list(kept.replies))  # of a process that ran this store before
        run = BatchRun(self.service.state, self.session, kept, operations, self.service.catch_up)
        source = None
        if self.service.journal is not None:
            source = Source(self.session.session_id, sequence, first_ticket, parts, len(kept.replies))
        is_done = False
        while not is_done:
            until = time.perf_counter() + SLICE_SECONDS
            with self.service.slice(self.session, source) as perform:
                for item in run:
                    run.answer(item, self._operation(perform, item, source))
                    if time.perf_counter() > until:
                        break
                else:
                    is_done = True
            if not is_done:
                await asyncio.sleep(0)
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
            turn = self._turns.pop(sequence)
            if not turn.done():
                turn.set_result(None)

    def _again(self, kept: BatchReplies, operations: list[Any]) -> list[Reply]:
        return repeat(self.service.state, self.session, kept, operations, self._once_more)

    def _deliver(self, ticket: int, value: Any) -> bool:
        """Put the answer of a parked call into the outbox."""
        is_error = isinstance(value, StoreError)
        self._outbox[ticket] = [frames.ERROR, *to_record(value)] if is_error else [frames.VALUE, value]
        self.wake()
        return True  # if it hands something over, its caller is to acknowledge that

    def _operation(self, perform: Perform, item: Item, source: Source | None = None) -> Reply:
        verb, arguments = item.verb, item.arguments
        try:
            own = OWN.get(verb)
            if own is not None:  # it is about this session, and none of the service's
                if source is not None:
                    source.unwritten += 1
                own.require(verb, arguments)
                return [frames.VALUE, own.run(self, **arguments)]
            if verb in HANDING and type(of := arguments.get("of")) is int:
                self._outbox.pop(of, None)  # it asks again: the answer there is the one it asks for
            value = perform(item.ticket, verb, arguments, self._deliver)
        except Exception as error:  # the answer of this operation; the others of the batch go on
            return [frames.ERROR, *to_record(error)]
        return [frames.PARKED] if value is PARKED else [frames.VALUE, value]

    def _once_more(self, item: Item) -> Reply:
        return self._operation(functools.partial(self.service.call, self.session), item)

    def _answer(self, replies: list[Reply], lost: list[HandedKey]) -> frames.Answer:
        """Pack the answers of a batch, with the outbox if no listen call is parked that could take it."""
        if self.session.notices:
            self._collect_notices()
        later = self._later() if self._listener is None else []
        replies = [self._paged(reply) for reply in replies]
        return frames.pack_answer(self.service.epoch, frames.DONE, replies, later, lost, self._hint())

    def _hint(self) -> tuple[int, bool]:
        """Whether the client should keep a listen call parked. Numbered, since answers overtake each other."""
        service, session_id = self.service, self.session.session_id
        holds = not self.session.is_idle or bool(self.session.batches) or bool(self._outbox)
        wanted = holds or service.is_waiting(session_id) or service.state.resources.is_publishing(session_id)
        return next(self._hints), wanted

    # -- answers that come later -------------------------------------------------------------------------------------

    async def listen(self, received: list[int], seconds: float) -> frames.Answer:
        """Wait until the outbox has something, at most for `seconds`. `received`: tickets of answers that came."""
        self._forget(received)
        if self._listener is not None and not self._listener.done():
            self._listener.set_result(None)  # of an older call, which this one replaces
        self._collect_notices()
        if not self._outbox and self.session.ended_at is None:
            self._listener = listener = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(seconds):
                    await listener
            except TimeoutError:
                pass
            finally:
                if self._listener is listener:
                    self._listener = None
            self._collect_notices()
        return frames.pack_answer(self.service.epoch, frames.DONE, self._later(), self._hint())

    def _later(self) -> list[tuple[int, Reply]]:
        """The oldest answers of the outbox. A long one is cut once, however often it is sent."""
        later = [
            (ticket, self._paged(reply)) for ticket, reply in itertools.islice(self._outbox.items(), LATER_AT_ONCE)
        ]
        self._outbox.update(later)
        return later

    def wake(self) -> None:
        """Let the parked listen call return."""
        if self._listener is not None and not self._listener.done():
            self._listener.set_result(None)

    def _collect_notices(self) -> None:
        """Move notices of the session to the outbox."""
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
            if not turn.done():
                turn.set_result(None)

    # -- long answers ------------------------------------------------------------------------------------------------

    def _paged(self, reply: Reply) -> Reply:
        """The answer; of one with a list of rows the first page, and a token for the rest if there is one."""
        value = reply[1] if len(reply) == 2 else None
        if isinstance(value, Many):
            first, token = self._cut(value.items)
            return [frames.VALUE, [first, value.total, token]]
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
