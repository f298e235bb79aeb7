"""The client's side of a session: every operation of this process to one store, from any loop and thread.

Callers append operations under a lock. Operations issued within one tick of a loop, or while a batch is under way,
leave together; answers come on a thread of Ray's, go to each waiting loop at once, and that loop sends the next batch.
A blocked or ended loop holds nothing up: what is left lying is sent by the timer thread (`session_timer`).
Not here: what operations mean (`client`), the actor's side (`inbox`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import ray

from raystore.client.notices import Notices
from raystore.client.transport import giving_back, handed_keys, with_time_left, without
from raystore.core.resources import FREED
from raystore.core.state import HandedKey
from raystore.core.verbs import HANDING
from raystore.errors import (
    OutcomeUnknownError,
    OverloadedError,
    PayloadTooLargeError,
    ProtocolMismatchError,
    StoreClosedError,
    StoreUnavailableError,
    copy_of,
    from_record,
)
from raystore.remote import retries
from raystore.remote.batching import WINDOW, Batch, Operation, Outgoing
from raystore.remote.claim_acks import ClaimLedger
from raystore.remote.handshake import CLIENT, ray_connection
from raystore.remote.held import HeldObjects, HoldAgain
from raystore.remote.lifeline import Lifeline
from raystore.remote.listening import Listening
from raystore.remote.parked import ParkedCalls
from raystore.remote.processes import this_process
from raystore.remote.retries import Retries
from raystore.remote.timer import SessionTimer
from raystore.service.service import PROTOCOL
from raystore.wire import frames

logger = logging.getLogger("raystore")


class Session:
    """All operations of this process to one store."""

    def __init__(self, handle: Any, store: str, epoch: int, call_bytes: int, machine: str | None = None) -> None:
        """`machine` is where the store's process runs (`processes.here`)."""
        self.handle = handle
        self.store = store  # its name, for errors
        self.epoch = epoch
        self.call_bytes = call_bytes
        self.connection = ray_connection()
        self.process = this_process()
        self.session_id = secrets.token_hex(8)
        self.users = 0
        self.notices = Notices()
        self.lock = threading.Lock()
        self.parked = ParkedCalls()
        self.failure: Exception | None = None  # why no operation can succeed any more
        self.retries = Retries()
        self.sent_at = time.monotonic()
        self.outgoing = Outgoing()
        self.ledger = ClaimLedger()
        self.held = HeldObjects()
        self._is_to_hold_again = False  # another process is the store now
        self._under_way: dict[int, Batch] = {}
        self._next_sequence = 1
        self._answered = 0  # all batches up to here have their answers
        self._answered_ahead: set[int] = set()
        self._flushing: set[asyncio.AbstractEventLoop] = set()
        self._closing = False
        self._orphans: deque[Operation] = deque()
        self.listening = Listening(self)
        self._lifeline = Lifeline(self, machine)
        self.timer = SessionTimer(self)

    # -- taking operations -------------------------------------------------------------------------------------------

    def post(
        self, verb: str, arguments: dict[str, Any], *, awaited: bool = True, cancels: int | None = None
    ) -> Operation:
        """Take an operation; it takes effect in the order of the calls of this method."""
        operation = Operation(verb, arguments, awaited=awaited)
        operation.cancels = cancels
        if operation.size > self.call_bytes:
            raise PayloadTooLargeError(f"call {verb}", operation.size, self.call_bytes)
        return self._post(operation)

    def _post(self, operation: Operation) -> Operation:
        with self.lock:
            if self.failure is not None:
                raise copy_of(self.failure)
            if self._closing and operation.verb != "close_session":
                raise StoreClosedError(self.store)
            self.outgoing.append(operation)
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
        waits = arguments
        started = time.monotonic()
        while True:
            operation = self.post(verb, arguments)
            try:
                answer = await operation
                if verb not in HANDING or not (keys := handed_keys(verb, arguments, answer)):
                    return answer
                if verb != "dequeue" or not any(suspect for _, _, suspect in answer):
                    self._seen(keys)
                    return answer
                # Once lost or withdrawn: known to the store before its caller sees it, so that whoever dies of it
                # is found.
                lost = await self.call("acknowledge", {"keys": keys})
                self._seen(keys, acknowledged=True)
                if kept := without(verb, answer, lost):
                    return kept
                arguments = with_time_left(waits, time.monotonic() - started)
            except GeneratorExit:
                self._orphans.append(operation)
                raise
            except BaseException:
                self.abandon(operation)
                raise

    def _flush_on(self, loop: asyncio.AbstractEventLoop) -> None:
        with self.lock:  # `tidy` puts another set in its place, on another thread
            self._flushing.discard(loop)
        self.flush()

    def flush(self, *, empty: bool = False) -> None:
        """Send what waits, as far as the window allows; `empty` sends a batch even without operations."""
        while True:
            with self.lock:
                under_way = len(self._under_way)
                if self.failure is not None or not (
                    self.outgoing.may_leave(under_way) or (empty and under_way < WINDOW)
                ):
                    return
                batch = self._take()
            empty = False
            self.send(batch)

    def _take(self) -> Batch:
        operations = self.outgoing.take()
        first = operations[0].ticket if operations else 0
        header = [first, self.ledger.take(), self.parked.take_acknowledgements()]
        if not self._answered and not self._answered_ahead:  # the store may not know yet who this is
            header.append(self.process)
        batch = Batch(self.session_id, self._next_sequence, operations, header)
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
            if batch.sequence == 1:  # before it, since this process may be gone in a moment
                self._lifeline.tie(self.epoch)
            parts = batch.parts(CLIENT, self._answered, self._answered_ahead)
            more = {"refs": batch.refs} if batch.refs else {}
            reference = self.handle.exchange.remote(*parts, **more)
            reference.future().add_done_callback(lambda future: self._on_reply(batch, future))
        except Exception as error:  # Ray has been shut down in this process, or refuses the call
            self.fail(StoreUnavailableError(self.store, f"{type(error).__name__}: {error}"))

    # -- answers -----------------------------------------------------------------------------------------------------

    def _on_reply(self, batch: Batch, future: Any) -> None:
        """An answer has come, on a thread of Ray's."""
        try:
            epoch, outcome, *rest = frames.unpack_answer(future.result())
        except Exception as error:  # no answer, or none that can be read
            self._on_failure(batch, error)
            return
        try:
            self._on_answer(batch, epoch, outcome, rest)
        except Exception as error:  # nobody else would tell the callers of this batch
            logger.exception("The answer to a batch of store %r could not be taken", self.store)
            self._give_up(batch, f"its answer could not be taken. {_first_line(error)}")

    def _on_answer(self, batch: Batch, epoch: int, outcome: int, rest: list[Any]) -> None:
        if batch.session_id != self.session_id:
            return  # of a session that was renewed: its operations were sent again
        if outcome == frames.REFUSED:
            self.fail(ProtocolMismatchError(f"{CLIENT[1]}, protocol {PROTOCOL}", rest[0]))
            return
        if outcome == frames.BROKEN:
            self._on_broken(batch, from_record(*rest[0]))
            return
        if epoch < self.epoch:  # of a process that has been replaced, and does not know it yet
            self._on_failure(batch, StoreUnavailableError(self.store, "a process answered that was replaced"))
            return
        if outcome == frames.ENDED:
            self.renew(epoch)
            return
        replies, later, lost, hint = rest
        for key in lost:
            if isinstance(key[1], int):
                logger.warning("Batch %d of consumer %r was lost: acknowledged too late", key[1], key[0])
            else:
                logger.warning("The claim of attempt %s of rollout %s was lost: acknowledged too late", key[1], key[0])
        answers = list(zip(batch.operations, replies, strict=True))
        with self.lock:
            resumed = self.follow(epoch)
            self._under_way.pop(batch.sequence, None)
            self._answered_ahead.add(batch.sequence)
            while self._answered + 1 in self._answered_ahead:
                self._answered += 1
                self._answered_ahead.discard(self._answered)
            answers = [(op, (reply[0] == frames.PARKED and self.parked.park(op)) or reply) for op, reply in answers]
            self.parked.take_hint(hint)
        self._settle(answers)
        if later:
            self.receive(later)
        self.resume(resumed)
        if self.parked.wanted and not self.parked.listening:
            self.timer.wake()

    def _on_broken(self, batch: Batch, error: Exception) -> None:
        """The store takes nothing of this session: for now, if it has too much to do, else for good."""
        if not isinstance(error, OverloadedError):  # it came back and could not go on
            self.fail(error)
            return
        self._drop(batch, lambda operation: error)

    def _settle(self, answers: Iterable[tuple[Operation, list[Any]]]) -> None:
        """Give answers to their callers: one wake-up for each loop, however many they are."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Operation]] = {}
        for operation, reply in answers:
            kind = reply[0]
            if kind == frames.VALUE and operation.cancels is None and operation.verb not in HANDING:
                operation.put(reply[1], None)
                if operation.loop is not None and not operation.abandoned:
                    by_loop.setdefault(operation.loop, []).append(operation)
                continue
            if kind == frames.PARKED:
                if operation.abandoned:
                    self._cancel_wait(operation)
                continue
            if operation.cancels is not None and reply[1] is True:  # nothing will come for it any more
                with self.lock:
                    self.parked.forget(operation.cancels)
            if kind == frames.ERROR:
                operation.put(None, from_record(reply[1], reply[2]))
            else:
                if reply[1] and (keys := handed_keys(operation.verb, operation.arguments, reply[1])):
                    self._arrived(operation, keys)
                operation.put(reply[1], None)
            if operation.loop is not None and not operation.abandoned:
                by_loop.setdefault(operation.loop, []).append(operation)
        for loop, operations in by_loop.items():
            try:
                loop.call_soon_threadsafe(self._wake, loop, operations)
            except RuntimeError:  # the loop is closed, and its callers with it
                for operation in operations:
                    self.abandon(operation)
        with self.lock:
            waiting = self.outgoing.first_loop()
        if waiting not in by_loop:  # what waits belongs to a thread, or to a loop that this wakes not
            self.flush()

    def _wake(self, loop: asyncio.AbstractEventLoop, operations: list[Operation]) -> None:
        for operation in operations:
            operation.wake()
        loop.call_soon(self.flush)  # behind the callers, so that what they issue now leaves with it

    def receive(self, later: list[Any]) -> None:
        """Hand out what came for parked calls, and notices."""
        with self.lock:
            answers, notices = self.parked.receive(later, self._is_under_way)
        if answers:
            self._settle(answers)
        freed = [(resources_id, version) for kind, resources_id, version in notices if kind == FREED]
        if freed:
            self.held.drop(freed)
            notices = [notice for notice in notices if notice[0] != FREED]
        self.notices.add(notices)
        self.notices.hand_out_elsewhere()

    def _is_under_way(self, ticket: int) -> bool:
        return any(batch.has(ticket) for batch in self._under_way.values())

    # -- claims ------------------------------------------------------------------------------------------------------

    def _arrived(self, operation: Operation, keys: list[HandedKey]) -> None:
        with self.lock:
            is_wanted = not operation.abandoned
            if is_wanted:
                self.ledger.arrived(operation, keys)
        if is_wanted:
            self.timer.wake_for_pending()  # to acknowledge them if their caller stays busy
            return
        self._decline(keys)

    def _seen(self, keys: list[HandedKey], *, acknowledged: bool = False) -> None:
        with self.lock:
            self.ledger.seen(keys, acknowledged=acknowledged)
        self.timer.wake_for_pending()

    def acknowledge_arrived(self, before: float) -> None:
        """Acknowledge claims that arrived before, their callers being busy; give back those whose loop has ended."""
        with self.lock:
            gone = self.ledger.answer_for_busy_callers(before)
        for operation in gone:
            self.abandon(operation)

    def abandon(self, operation: Operation) -> None:
        """The caller has gone: unsent, the operation is dropped; what it waits for or was handed goes back."""
        with self.lock:
            operation.abandoned = True
            if not operation.sent:
                self.outgoing.drop(operation)
                return
            keys = self.ledger.of(operation)
            parked = operation.ticket in self.parked
        if keys:
            self._decline(keys)
        elif parked:
            self._cancel_wait(operation)

    def _cancel_wait(self, operation: Operation) -> None:
        """Nobody waits for a parked call any more; an answer that crosses this still finds it, to be given back."""
        self._tell("cancel_wait", {"of": operation.ticket}, cancels=operation.ticket)

    def _tell(self, verb: str, arguments: dict[str, Any], *, cancels: int | None = None) -> None:
        """Post what nobody waits for; a session that has ended, or is about to, gives back everything anyway."""
        with contextlib.suppress(StoreClosedError, StoreUnavailableError):
            self.post(verb, arguments, awaited=False, cancels=cancels)

    def tidy(self) -> None:
        """Forget loops that have ended, and see to calls whose coroutines were collected.

        On the timer's thread: a collection strikes anywhere, also where the lock is held.
        """
        with self.lock:
            self._flushing = {loop for loop in self._flushing if not loop.is_closed()}
        while self._orphans:
            self.abandon(self._orphans.popleft())

    def _decline(self, keys: list[HandedKey]) -> None:
        with self.lock:
            self.ledger.forget(keys)
        for key in keys:
            self._tell(*giving_back(key))

    # -- what the timer asks -----------------------------------------------------------------------------------------

    @property
    def has_pending(self) -> bool:
        """Whether something waits to be sent, or for an answer."""
        return bool(self.outgoing or self._under_way)

    # -- when the store is another process ---------------------------------------------------------------------------

    def follow(self, epoch: int) -> list[Operation]:
        """Note that a newer process answers; the calls that were parked in the one before. Called with the lock."""
        if epoch <= self.epoch:
            return []
        self.epoch = epoch
        self._is_to_hold_again = True
        return self.parked.of_before()

    def resume(self, operations: list[Operation]) -> None:
        """Let calls wait again that were parked in a process that is no more, unless it had answered them."""
        self._lifeline.tie(self.epoch)
        with self.lock:
            operations = [op for op in operations if op.ticket in self.parked and not op.abandoned]
            for operation in operations:
                self.parked.forget(operation.ticket)
                operation.resume()
            self.outgoing.put_back(operations)
            hold_again, self._is_to_hold_again = self._is_to_hold_again, False
        if operations:
            self.flush()
        if hold_again:
            self.hold_again()

    def hold_again(self) -> None:
        """Tell a store that does not know it which objects this process has."""
        if len(self.held):
            with contextlib.suppress(StoreClosedError, StoreUnavailableError):
                self._post(HoldAgain(self.held))

    # -- when things go wrong ----------------------------------------------------------------------------------------

    def _on_failure(self, batch: Batch, error: Exception) -> None:
        """A batch has no answer: it may have run. It is sent again with the same identity."""
        if self.has_died(error):
            return
        with self.lock:
            again_later = self.retries.add(batch)
        if again_later:
            self.timer.wake()
        else:
            self._give_up(batch, f"no answer for {retries.RETRY_SECONDS:g} s. {_first_line(error)}")

    def has_died(self, error: Exception) -> bool:
        if isinstance(error, ray.exceptions.ActorDiedError):
            self.fail(StoreUnavailableError(self.store, f"its actor has died. {_first_line(error)}"))
            return True
        return False

    def _give_up(self, batch: Batch, why: str) -> None:
        """Nobody knows what became of a batch."""

        def doubt(operation: Operation) -> Exception:
            kind = OutcomeUnknownError if operation.changes else StoreUnavailableError
            return kind(self.store, why)

        self._drop(batch, doubt)

    def _drop(self, batch: Batch, why: Callable[[Operation], Exception]) -> None:
        """Refuse the operations of a batch, which leaves a gap: what follows goes on in another session."""
        operations, batch.operations = batch.operations, []
        for operation in operations:
            self._refuse(operation, why(operation))
        self.renew(self.epoch)

    def renew(self, epoch: int) -> None:
        """The store knows this session no longer: what it cannot have executed is sent in a new one.

        What was sent once was never executed, since an ended session executes nothing. Of what was sent more than
        once, reads run again, and writes have an unknown outcome.
        """
        if self._closing:  # the store has let go of all that this session held, which is what was wanted
            self.fail(StoreClosedError(self.store))
            return
        with self.lock:
            self.epoch = epoch
            self.session_id = secrets.token_hex(8)
            batches = [self._under_way[sequence] for sequence in sorted(self._under_way)]
            self._under_way.clear()
            self.retries.clear()
            self._next_sequence, self._answered = 1, 0
            self._answered_ahead.clear()
            self.ledger.clear()
            parked = self.parked.clear()
            sent = [(op, batch.retries > 0 and op.changes) for batch in batches for op in batch.operations]
            unknown = [operation for operation, is_unknown in sent if is_unknown]
            again = [*parked, *(operation for operation, is_unknown in sent if not is_unknown)]
            again = [operation for operation in again if not operation.abandoned]
            for operation in again:
                operation.shorten()
            self.outgoing.put_back(again)
        for operation in unknown:
            self._refuse(operation, OutcomeUnknownError(self.store, "the session ended before the answer came"))
        self.flush()
        self.hold_again()

    def _refuse(self, operation: Operation, error: Exception) -> None:
        operation.put(None, copy_of(error))
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
            operations += [*self.parked.clear(), *self.outgoing.clear()]
            self._under_way.clear()
            self.retries.clear()
        for operation in operations:
            self._refuse(operation, error)
        self.held.clear()
        self.timer.close()

    def close(self) -> None:
        """End the session: the store takes back what this process holds."""
        self._closing = True
        if self.failure is None:
            self.post("close_session", {}, awaited=False)
            self.flush(empty=True)  # beside a batch that is under way, if need be
            deadline = time.monotonic() + 1.0
            while self.has_pending and time.monotonic() < deadline and self.failure is None:
                time.sleep(0.002)
        self.fail(StoreClosedError(self.store))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
