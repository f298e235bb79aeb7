"""How operations reach a service: the interface, and the transport within one process.

A transport takes an operation when it is called, not when it is awaited, so that operations take effect in the order
in which they were issued. It sees to it that a claim whose caller has gone is given back.
Not here: the transport to an actor (`session`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

from raystore.client import forks
from raystore.client.notices import Handler, Notices
from raystore.client.pending import Call
from raystore.core.claims import is_batch
from raystore.core.state import HandedKey, Session
from raystore.core.verbs import HANDING, Many
from raystore.errors import (
    BatchConflictError,
    ForkedError,
    JournalError,
    StoreClosedError,
    StoreCorruptError,
    StoreError,
)
from raystore.journal.objects import OBJECTS
from raystore.service.parking import PARKED
from raystore.service.service import Service
from raystore.values.objects import Origin


class Transport(Protocol):
    """What a client needs to reach its store."""

    def call(self, verb: str, arguments: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        """Run one operation and return its answer, or raise the error that is its answer."""

    def post(self, verb: str, arguments: dict[str, Any]) -> Call:
        """Issue one operation now; the answer may be awaited."""

    def abandon(self, call: Call) -> None:
        """Nobody waits for a call that was issued: if it has not left, it never was."""

    def tell(self, verb: str, arguments: dict[str, Any]) -> None:
        """Issue an operation whose answer nobody waits for."""

    def listen_for_notices(self, handler: Handler) -> Callable[[], None]:
        """Call `handler` (kind, rollout id, attempt id) for what becomes of this process's attempts; how to stop."""

    @property
    def session_id(self) -> str:
        """The session that this process's operations belong to."""

    def close(self) -> None:
        """Take no more calls."""


def handed_keys(verb: str, arguments: dict[str, Any] | None, answer: Any) -> list[HandedKey]:
    """Keys of what an answer hands over, which its caller is to acknowledge; none for most verbs."""
    hands = HANDING.get(verb)
    return hands(arguments or {}, answer) if hands is not None else []


def giving_back(key: HandedKey) -> tuple[str, dict[str, Any]]:
    """The operation that gives back what an answer handed over."""
    if is_batch(key):
        return "nack", {"consumer": key[0], "batch": key[1]}
    return "decline", {"rollout_id": key[0], "attempt_id": key[1]}


def without(verb: str, answer: Any, lost: Iterable[Any]) -> list[Any]:
    """What is left of an answer without what is lost, by its keys: of claims the others, of a batch nothing."""
    if verb != "dequeue":
        return []
    gone = {(key[0], key[1]) for key in lost}
    return [claim for claim, key in zip(answer, handed_keys(verb, None, answer), strict=True) if key not in gone]


def with_time_left(arguments: dict[str, Any], elapsed: float) -> dict[str, Any]:
    """The arguments of a call that is to be repeated; one that waits does so for what is left of its time."""
    timeout = arguments.get("timeout")
    return arguments if not timeout else arguments | {"timeout": max(timeout - elapsed, 0.0)}


class LocalTransport:
    """Calls a service of this process, from any of its threads and event loops."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._session: Session = service.open_session("local", eternal=True)  # anew with each process
        self._tickets = itertools.count(1)
        self._notices = Notices()
        self._pid = 0  # of the process that uses it; 0 until one does
        service.on_notice = self._hand_on

    @property
    def session_id(self) -> str:
        return self._session.session_id

    def listen_for_notices(self, handler: Handler) -> Callable[[], None]:
        return self._notices.listen(handler)

    def _hand_on(self, session_id: str) -> None:
        """Within a step; handlers are called when it is over, since they may use the store."""
        notices, self._session.notices = self._session.notices, []
        self._notices.add(notices)
        self.service.afterwards(self._notices.hand_out)

    def _begin(self) -> None:
        """It is used for the first time in this process."""
        if self._pid:
            raise ForkedError("This store")
        self._pid = forks.pid

    def post(self, verb: str, arguments: dict[str, Any]) -> Call:
        if self._pid != forks.pid:
            self._begin()
        call = Call(verb, next(self._tickets))
        call.arguments = arguments

        def deliver(ticket: int, value: Any) -> bool:
            if call.loop is not None and call.loop.is_closed():
                return False
            if isinstance(value, StoreError):
                call.put(None, value)
                return _wake(call)
            return self._give(call, value, None)

        try:
            answer = self.service.call(self._session, call.ticket, verb, arguments, deliver)
        except Exception as error:  # the answer of this call, raised where it is awaited
            self._give(call, None, error, is_own=True)
            return call
        if answer is PARKED:
            call.parked = True
            return call
        self._give(call, answer, None, is_own=True)
        return call

    def _give(self, call: Call, answer: Any, error: Exception | None, *, is_own: bool = False) -> bool:
        """Give a call its answer once what it says is safe; whether its caller is there. `is_own`: of this thread."""

        def give(lost: StoreError | None) -> None:
            call.put(answer, lost or error)
            _wake(call)

        call.hold(answer)
        if self.service.when_safe(give):
            return True
        call.put(answer, error)
        if is_own:
            call.wake()
        return is_own or _wake(call)

    async def call(self, verb: str, arguments: dict[str, Any]) -> Any:
        if self._pid != forks.pid:
            self._begin()
        if self.service.journal is None and arguments.get("timeout", 0) == 0:  # answered at once: no future, no wake-up
            answer = self.service.call(self._session, 0, verb, arguments, _nobody)
            if verb in HANDING and (keys := handed_keys(verb, arguments, answer)):  # nothing can come between
                self.service.acknowledge(self._session, keys)
            return answer
        waits = arguments
        started = self.service.clock.now()
        while True:
            call = self.post(verb, arguments)
            try:
                answer = await call
            except GeneratorExit:  # collected, in the middle of whatever this thread does: not now
                self.service.defer(functools.partial(self.abandon, call))
                raise
            except BaseException:
                self.abandon(call)
                raise
            if isinstance(answer, Many):
                answer.items = self.service.with_bodies(answer.items)
            keys = handed_keys(verb, arguments, answer)
            if not keys:
                return answer
            lost = self.service.acknowledge(self._session, keys)
            if not lost:
                return answer
            if kept := without(verb, answer, lost):
                return kept
            # The loop was blocked for so long that all of the work went to somebody else: try again.
            arguments = with_time_left(waits, self.service.clock.now() - started)

    def tell(self, verb: str, arguments: dict[str, Any]) -> None:
        with contextlib.suppress(StoreError):
            if self._pid != forks.pid:
                self._begin()
            self.service.call(self._session, 0, verb, arguments, _nobody)

    def abandon(self, call: Call) -> None:
        """The caller has gone: it waits no longer, and what it was handed goes back."""
        if not call.parked and call.verb not in HANDING:
            return
        # A store that is closed, or has failed, gives out nothing and has nothing to take back.
        with contextlib.suppress(StoreClosedError, StoreCorruptError, JournalError):
            self.service.call(self._session, 0, "cancel_wait", {"of": call.ticket}, _nobody)
            for key in handed_keys(call.verb, call.arguments, call.answer):
                with contextlib.suppress(BatchConflictError):  # somebody has said what became of it
                    self.service.call(self._session, 0, *giving_back(key), _nobody)

    def close(self) -> None:
        if self._pid in (0, forks.pid):  # in a forked child it is the parent's
            self.service.close()


def _nobody(ticket: int, value: Any) -> bool:
    return False


def _wake(call: Call) -> bool:
    if call.loop is None:  # a blocking thread, which the answer itself has woken
        return True
    try:
        call.loop.call_soon_threadsafe(call.wake)
    except RuntimeError:  # the loop is closed, and its caller with it
        return False
    return True


def origin_of(service: Service) -> Origin:
    """Where the objects are that the journal of a service of this process keeps."""
    opened = service.journal
    return Origin() if opened is None else Origin(path=str(opened.directory.path / OBJECTS))
