"""The client's side of a session: every operation of this process to one store, from any loop and thread.

Callers append operations under a lock. Operations issued within one tick of a loop, or while two batches are under way,
leave together; answers come on a thread of Ray's, go to each waiting loop at once, and that loop sends the next batch.
A blocked or ended loop holds nothing up: what is left lying is sent by the timer thread (`session_timer`).
Not here: what operations mean (`client`), the actor's side (`inbox`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import ray

from raystore.core.state import AttemptKey
from raystore.errors import (
    OutcomeUnknownError,
    PayloadTooLargeError,
    ProtocolMismatchError,
    StoreClosedError,
    StoreUnavailableError,
    from_record,
)
from raystore.remote import wire
from raystore.remote.handshake import CLIENT, ray_connection
from raystore.remote.ledger import ClaimLedger
from raystore.remote.outgoing import Batch, Operation, Outgoing
from raystore.remote.timer import SessionTimer
from raystore.service import PROTOCOL
from raystore.transport import claimed_keys

logger = logging.getLogger("raystore")

WINDOW = 2  #: batches under way at once
RETRY_SECONDS = 60.0  #: how long a batch is tried again when the actor does not answer
RETRY_PAUSE_SECONDS = 0.1  #: before a batch is sent again, with jitter; doubled each time ...
RETRY_PAUSE_MOST_SECONDS = 2.0  #: ... up to this, so that a claim is asked for before it is withdrawn


class Session:
    """All operations of this process to one store."""

    def __init__(self, handle: Any, store: str, epoch: int, call_bytes: int) -> None:
        self.handle = handle
        self.store = store  # its name, for errors
        self.epoch = epoch
        self.call_bytes = call_bytes
        self.connection = ray_connection()
        self.session_id = secrets.token_hex(8)
        self.users = 0
        self.on_notice: list[Callable[[str, str, str], None]] = []
        self.lock = threading.Lock()
        self.waiting: dict[int, Operation] = {}  # parked at the actor, by ticket
        self._early: dict[int, list[Any]] = {}  # answers of calls of which we do not know yet that they are parked
        self.failure: Exception | None = None  # why no operation can succeed any more
        self.retries: list[tuple[float, Batch]] = []
        self.sent_at = time.monotonic()
        self._outgoing = Outgoing()
        self._ledger = ClaimLedger()
        self._under_way: dict[int, Batch] = {}
        self._next_sequence = 1
        self._answered = 0  # all batches up to here have their answers
        self._answered_ahead: set[int] = set()
        self._flushing: set[asyncio.AbstractEventLoop] = set()
        self._tickets_to_acknowledge: list[int] = []
        self._listen_wanted = False
        self._hint = 0
        self._listening = False
        self._closing = False
        self._orphans: deque[Operation] = deque()
        self.timer = SessionTimer(self)

    # -- taking operations -------------------------------------------------------------------------------------------

    def post(
        self, verb: str, arguments: dict[str, Any], *, awaited: bool = True, cancels: int | None = None
    ) -> Operation:
        """Take an operation; it takes effect in the order of the calls of this method."""
        operation = Operation(verb, arguments, awaited=awaited)
        operation.cancels = cancels
        size = len(operation.frame)
        if size > self.call_bytes:
            raise PayloadTooLargeError(f"call {verb}", size, self.call_bytes)
        with self.lock:
            if self.failure is not None:
                raise self.failure
            if self._closing and verb != "close_session":
                raise StoreClosedError(self.store)
            self._outgoing.append(operation)
            loop = operation.loop
            first = loop is not None and loop not in self._flushing
            if first and loop is not None:
                self._flushing.add(loop)
        if first and loop is not None:
            loop.call_soon(self._flush_on, loop)
        elif loop is None:
            self.flush()
        self.timer.wake_for_pending()
        return operation

    async def call(self, verb: str, arguments: dict[str, Any]) -> Any:
        """Run one operation. A claim is acknowledged once its caller is running again, or given back."""
        while True:
            operation = self.post(verb, arguments)
            try:
                answer = await operation
                if verb != "dequeue" or not answer:
                    return answer
                keys = claimed_keys(answer)
                if not any(suspect for _, _, suspect in answer):
                    self._seen(keys)
                    return answer
                # Once lost or withdrawn: known to the store before its caller sees it, so that whoever dies of it
                # is found.
                if not await self.call("acknowledge", {"keys": keys}):
                    self._seen(keys, acknowledged=True)
                    return answer
                self._seen(keys, acknowledged=True)
            except GeneratorExit:
                self._orphans.append(operation)
                raise
            except BaseException:
                self.abandon(operation)
                raise

    def _flush_on(self, loop: asyncio.AbstractEventLoop) -> None:
        self._flushing.discard(loop)
        self.flush()

    def flush(self, *, empty: bool = False) -> None:
        """Send what waits, as far as the window allows; `empty` sends a batch even without operations."""
        while True:
            with self.lock:
                if self.failure is not None or len(self._under_way) >= WINDOW or not (self._outgoing or empty):
                    return
                batch = self._take()
            empty = False
            self.send(batch)

    def _take(self) -> Batch:
        operations = self._outgoing.take()
        tickets, self._tickets_to_acknowledge = self._tickets_to_acknowledge, []
        header = [operations[0].ticket if operations else 0, self._ledger.take(), tickets]
        body = wire.join(header, [operation.frame for operation in operations])
        batch = Batch(self.session_id, self._next_sequence, operations, body)
        self._next_sequence += 1
        self._under_way[batch.sequence] = batch
        return batch

    def is_connected(self) -> bool:
        """Whether Ray is what it was when the session began; a call would otherwise start a Ray of its own."""
        if ray_connection() == self.connection:
            return True
        self.fail(StoreUnavailableError(self.store, "Ray has been shut down in this process since"))
        return False

    def send(self, batch: Batch) -> None:
        """Send a batch, for the first time or again."""
        self.sent_at = time.monotonic()
        if not self.is_connected():
            return
        try:
            reference = self.handle.exchange.remote(
                CLIENT, batch.session_id, batch.sequence, self._answered, batch.body, batch.refs
            )
            reference.future().add_done_callback(lambda future: self._on_reply(batch, future))
        except Exception as error:  # Ray has been shut down in this process, or refuses the call
            self.fail(StoreUnavailableError(self.store, f"{type(error).__name__}: {error}"))

    # -- answers -----------------------------------------------------------------------------------------------------

    def _on_reply(self, batch: Batch, future: Any) -> None:
        """An answer has come, on a thread of Ray's."""
        try:
            epoch, outcome, body, refs = future.result()
        except Exception as error:
            self._on_failure(batch, error)
            return
        if batch.session_id != self.session_id:
            return  # of a session that was renewed: its operations were sent again
        if outcome == wire.REFUSED:
            self.fail(ProtocolMismatchError(f"{CLIENT[1]}, protocol {PROTOCOL}", body.decode()))
            return
        if outcome == wire.ENDED or epoch != self.epoch:
            self._renew(epoch)
            return
        replies, later, lost, hint = wire.unpack(body, refs)
        for key in lost:
            logger.warning("The claim of attempt %s of rollout %s was lost: acknowledged too late", key[1], key[0])
        answers = list(zip(batch.operations, replies, strict=True))
        with self.lock:
            self._under_way.pop(batch.sequence, None)
            self._answered_ahead.add(batch.sequence)
            while self._answered + 1 in self._answered_ahead:
                self._answered += 1
                self._answered_ahead.discard(self._answered)
            answers = [(op, self._parked(op) if reply[0] == wire.PARKED else reply) for op, reply in answers]
            self._take_hint(hint)
        self._settle(answers)
        self.on_later(later)
        self.timer.wake()

    def _settle(self, answers: Iterable[tuple[Operation, list[Any]]]) -> None:
        """Give answers to their callers: one wake-up for each loop, however many they are."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Operation]] = {}
        for operation, reply in answers:
            kind = reply[0]
            if kind == wire.PARKED:
                if operation.abandoned:
                    self._cancel_wait(operation)
                continue
            if operation.cancels is not None and reply[1] is True:  # nothing will come for it any more
                with self.lock:
                    self.waiting.pop(operation.cancels, None)
            if kind == wire.ERROR:
                operation.put(None, from_record(reply[1], reply[2]))
            else:
                if operation.verb == "dequeue" and reply[1]:
                    self._arrived(operation, claimed_keys(reply[1]))
                operation.put(reply[1], None)
            if operation.loop is not None and not operation.abandoned:
                by_loop.setdefault(operation.loop, []).append(operation)
        for loop, operations in by_loop.items():
            try:
                loop.call_soon_threadsafe(self._wake, loop, operations)
            except RuntimeError:  # the loop is closed, and its callers with it
                for operation in operations:
                    self.abandon(operation)
        if not by_loop:
            self.flush()

    def _wake(self, loop: asyncio.AbstractEventLoop, operations: list[Operation]) -> None:
        for operation in operations:
            operation.wake()
        loop.call_soon(self.flush)  # behind the callers, so that what they issue now leaves with it

    def _parked(self, operation: Operation) -> list[Any]:
        """Note that a call is parked, with the lock held; its answer, if that has overtaken this."""
        operation.parked = True
        early = self._early.pop(operation.ticket, None)
        if early is None:
            self.waiting[operation.ticket] = operation
        return [wire.PARKED] if early is None else early

    def _take_hint(self, hint: list[Any]) -> None:
        """What the store says of listening: whether there is need of it. Hints are numbered, since answers overtake."""
        number, wanted = hint
        if number > self._hint:
            self._hint = number
            self._listen_wanted = wanted

    def on_later(self, later: list[Any]) -> None:
        """Answers of parked calls, and notices; each may come more than once until it is acknowledged."""
        answers, notices = [], []
        with self.lock:
            for ticket, reply in later:
                if ticket in self._tickets_to_acknowledge:
                    continue
                self._tickets_to_acknowledge.append(ticket)
                if reply[0] == wire.NOTICE:
                    notices.append(reply[1:])
                elif (operation := self.waiting.pop(ticket, None)) is not None:
                    answers.append((operation, reply))
                elif any(batch.has(ticket) for batch in self._under_way.values()):
                    self._early[ticket] = reply  # it overtook the word that its call is parked
        if answers:
            self._settle(answers)
        for notice in notices:
            for handler in list(self.on_notice):
                try:
                    handler(*notice)
                except Exception:  # somebody else's code, which must not hold up the session
                    logger.exception("A handler of notices failed")

    # -- claims ------------------------------------------------------------------------------------------------------

    def _arrived(self, operation: Operation, keys: list[AttemptKey]) -> None:
        with self.lock:
            if not operation.abandoned:
                self._ledger.arrived(operation, keys)
                return
        self._decline(keys)

    def _seen(self, keys: list[AttemptKey], *, acknowledged: bool = False) -> None:
        with self.lock:
            self._ledger.seen(keys, acknowledged=acknowledged)
        self.timer.wake_for_pending()

    def acknowledge_arrived(self, before: float) -> None:
        """Acknowledge claims that arrived before, their callers being busy; give back those whose loop has ended."""
        with self.lock:
            gone = self._ledger.answer_for_busy_callers(before)
        for operation in gone:
            self.abandon(operation)

    def abandon(self, operation: Operation) -> None:
        """The caller has gone: unsent, the operation is dropped; what it waits for or was handed goes back."""
        with self.lock:
            operation.abandoned = True
            if not operation.sent:
                self._outgoing.drop(operation)
                return
            keys = self._ledger.of(operation)
            parked = operation.ticket in self.waiting
        if self.failure is not None:
            return
        if keys:
            self._decline(keys)
        elif parked:
            self._cancel_wait(operation)

    def _cancel_wait(self, operation: Operation) -> None:
        """Nobody waits for a parked call any more; an answer that crosses this still finds it, to be given back."""
        self.post("cancel_wait", {"of": operation.ticket}, awaited=False, cancels=operation.ticket)

    def abandon_orphans(self) -> None:
        """See to calls whose coroutines were collected; on the timer's thread, since collection strikes anywhere."""
        while self._orphans:
            self.abandon(self._orphans.popleft())

    def _decline(self, keys: list[AttemptKey]) -> None:
        with self.lock:
            self._ledger.forget(keys)
        for rollout_id, attempt_id in keys:
            self.post("decline", {"rollout_id": rollout_id, "attempt_id": attempt_id}, awaited=False)

    # -- what the timer asks -----------------------------------------------------------------------------------------

    @property
    def has_pending(self) -> bool:
        """Whether something waits to be sent, or for an answer."""
        return bool(self._outgoing or self._under_way)

    @property
    def has_unseen(self) -> bool:
        """Whether a claim has arrived and its caller has not run yet."""
        return self._ledger.has_unseen

    @property
    def wants_listening(self) -> bool:
        """Whether the store holds something for this process: attempts, parked calls, notices."""
        return self._listen_wanted or bool(self.waiting)

    def listen_for_notices(self, handler: Callable[[str, str, str], None]) -> Callable[[], None]:
        """Call `handler` (kind, rollout id, attempt id) for each notice, on any thread; how to stop that."""
        self.on_notice.append(handler)
        return lambda: self.on_notice.remove(handler)

    def oldest_pending(self) -> float | None:
        """When the oldest operation that waits to be sent was issued."""
        with self.lock:
            return self._outgoing.oldest()

    def oldest_acknowledgement(self) -> float | None:
        """Since when the oldest acknowledgement waits for a batch to ride on."""
        with self.lock:
            return self._ledger.oldest()

    def listen_if_wanted(self) -> bool:
        """Park a listen call if the store has something to say; whether one is parked."""
        with self.lock:
            if self._listening or not self.wants_listening or self.failure is not None:
                return self._listening
            tickets, self._tickets_to_acknowledge = self._tickets_to_acknowledge, []
            session_id = self.session_id
            self._listening = True
        if not self.is_connected():
            return False
        try:
            reference = self.handle.listen.remote(CLIENT, session_id, tickets)
            reference.future().add_done_callback(lambda future: self._on_listened(session_id, tickets, future))
        except Exception as error:
            self.fail(StoreUnavailableError(self.store, f"{type(error).__name__}: {error}"))
        return True

    def _on_listened(self, session_id: str, tickets: list[int], future: Any) -> None:
        try:
            epoch, outcome, body, refs = future.result()
        except Exception as error:
            with self.lock:
                self._listening = False
                self._tickets_to_acknowledge = tickets + self._tickets_to_acknowledge
            if not self._has_died(error):
                self.timer.listen_failed()
            return
        with self.lock:
            self._listening = False
        if session_id != self.session_id:
            self.timer.wake()
            return
        if outcome == wire.DONE and epoch == self.epoch:
            later, hint = wire.unpack(body, refs)
            with self.lock:
                self._take_hint(hint)
                self._listen_wanted |= bool(later)  # to acknowledge what came
            self.on_later(later)
            self.listen_if_wanted()
        elif outcome == wire.ENDED and self.waiting:
            self._renew(epoch)
        else:
            self._listen_wanted = False
        self.timer.wake()

    # -- when things go wrong ----------------------------------------------------------------------------------------

    def _on_failure(self, batch: Batch, error: Exception) -> None:
        """A batch has no answer: it may have run. It is sent again with the same identity."""
        if self._has_died(error):
            return
        now = time.monotonic()
        if batch.failing_since is None:
            batch.failing_since = now
        if now - batch.failing_since > RETRY_SECONDS:
            self._give_up(batch, error)
            return
        pause = min(RETRY_PAUSE_SECONDS * 2**batch.retries, RETRY_PAUSE_MOST_SECONDS)
        batch.retries += 1
        with self.lock:
            self.retries.append((now + pause * (0.5 + secrets.randbelow(1000) / 1000), batch))
        self.timer.wake()

    def _has_died(self, error: Exception) -> bool:
        if isinstance(error, ray.exceptions.ActorDiedError):
            self.fail(StoreUnavailableError(self.store, f"its actor has died. {_first_line(error)}"))
            return True
        return False

    def _give_up(self, batch: Batch, error: Exception) -> None:
        why = f"no answer for {RETRY_SECONDS:g} s. {_first_line(error)}"
        for operation in batch.operations:
            kind = OutcomeUnknownError if operation.changes else StoreUnavailableError
            self._refuse(operation, kind(self.store, why))
        batch.operations = []
        self._renew(self.epoch)

    def _renew(self, epoch: int) -> None:
        """The store knows this session no longer: what it cannot have executed is sent in a new one.

        What was sent once was never executed, since an ended session executes nothing. Of what was sent more than
        once, reads run again, and writes have an unknown outcome.
        """
        if self._closing:  # the store has let go of all that this session held, which is what was wanted
            self.fail(StoreClosedError(self.store))
            return
        with self.lock:
            self.epoch = epoch
            self._hint = 0
            self.session_id = secrets.token_hex(8)
            batches = [self._under_way[sequence] for sequence in sorted(self._under_way)]
            self._under_way.clear()
            self.retries.clear()
            self._next_sequence, self._answered = 1, 0
            self._answered_ahead.clear()
            self._ledger.clear()
            self._tickets_to_acknowledge.clear()
            self._listen_wanted = False
            self._early.clear()
            parked = list(self.waiting.values())
            self.waiting.clear()
            sent = [(op, batch.retries > 0 and op.changes) for batch in batches for op in batch.operations]
            unknown = [operation for operation, is_unknown in sent if is_unknown]
            again = [*parked, *(operation for operation, is_unknown in sent if not is_unknown)]
            again = [operation for operation in again if not operation.abandoned]
            for operation in again:
                operation.shorten()
            self._outgoing.put_back(again)
        for operation in unknown:
            self._refuse(operation, OutcomeUnknownError(self.store, "the session ended before the answer came"))
        self.flush()

    def _refuse(self, operation: Operation, error: Exception) -> None:
        operation.put(None, error)
        if operation.loop is not None:
            try:
                operation.loop.call_soon_threadsafe(operation.wake)
            except RuntimeError:
                return  # its loop is closed: nobody is left to be told

    def fail(self, error: Exception) -> None:
        """No operation can succeed any more: tell everybody who waits, and everybody who comes."""
        with self.lock:
            if self.failure is not None:
                return
            self.failure = error
            operations = [op for batch in self._under_way.values() for op in batch.operations]
            operations += [*self.waiting.values(), *self._outgoing.clear()]
            self._under_way.clear()
            self.waiting.clear()
            self.retries.clear()
        for operation in operations:
            self._refuse(operation, error)
        self.timer.close()

    def close(self) -> None:
        """End the session: the store takes back what this process holds."""
        self._closing = True
        if self.failure is None:
            self.post("close_session", {}, awaited=False)
            deadline = time.monotonic() + 1.0
            while self.has_pending and time.monotonic() < deadline and self.failure is None:
                time.sleep(0.002)
        self.fail(StoreClosedError(self.store))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
