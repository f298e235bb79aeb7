"""Stores in this process, without Ray: one in memory, for tests and notebooks, and a finished run, for reading.

The same core, service and client as on Ray, usable from all threads and event loops of the process. With a journal, an
answer waits until its changes are as durable as the configuration asks for (`LocalTransport._give`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable
from time import monotonic
from typing import Any, NoReturn, Unpack

from raystore.api import NoticeHandler
from raystore.client import transport
from raystore.client.client import StoreClient, Testing, store_info
from raystore.client.transport import (
    NoticeHandlers,
    PendingCall,
    caller,
    giving_back,
    handed_keys,
    this_thread,
    wake_elsewhere,
    with_time_left,
    without,
)
from raystore.core.records import Many
from raystore.core.state import Session
from raystore.core.verbs import HANDING
from raystore.errors import (
    BatchConflictError,
    ForkedError,
    JournalError,
    StoreClosedError,
    StoreCorruptError,
    StoreError,
)
from raystore.errors.text import explained, explained_with
from raystore.journal.files import OBJECTS
from raystore.journal.opening import open_for_reading, open_journal
from raystore.service.clock import NoAlarm, ThreadAlarm
from raystore.service.parking import PARKED
from raystore.service.service import Service
from raystore.types.contract import StoreInfo
from raystore.types.options import OPTIONS, StoreConfig, StoreOptions, directory, make_config, memory_capacity, resolve
from raystore.values.objects import Origin

LONG_ITEMS = 50  #: an answer with more of them ends its turn, since its caller will decode for as long again


class LocalTransport:
    """Calls a service of this process, from any of its threads and event loops.

    Most operations are answered at once. So that a loop of such calls does not starve other tasks of its event loop,
    a call lets them run now and then: after its operation has run, and before its claims are acknowledged.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._session: Session = service.open_session("local", eternal=True)  # of this process, which it ends with
        self._tickets = itertools.count(1)
        self._handlers = NoticeHandlers()
        self._pid = 0  # of the process that uses it; 0 before the first use
        self._is_quick = service.journal is None  # so that only calls with a timeout may have to wait
        service.on_notice = self._take_notices

    @property
    def session_id(self) -> str:
        return self._session.session_id

    def listen_for_notices(self, handler: NoticeHandler) -> Callable[[], None]:
        return self._handlers.listen(handler)

    def _take_notices(self, session_id: str) -> None:
        """Take notices within a step, and call the handlers after it, since they may use the store."""
        notices, self._session.notices = self._session.notices, []
        self._handlers.add(notices)
        self.service.afterwards.append(self._handlers.hand_out)

    def _begin(self) -> None:
        """Remember the process of the first use; raises `ForkedError` in a child that was forked from it."""
        if self._pid:
            raise ForkedError("This store")
        self._pid = transport.pid

    def post(self, verb: str, arguments: dict[str, Any]) -> PendingCall:
        if self._pid != transport.pid:
            self._begin()
        call = PendingCall(verb, *caller(), next(self._tickets), arguments)

        def deliver(ticket: int, value: Any) -> bool:
            """Answer the parked call, on any thread; whether its caller is still there."""
            if call.loop is not None and call.loop.is_closed():
                return False
            if isinstance(value, StoreError):
                call.put(None, value)
                return wake_elsewhere(call)
            return self._give(call, value)

        try:
            answer = self.service.call(self._session, call.ticket, verb, arguments, deliver)
        except Exception as error:  # the answer of this call, raised where it is awaited
            self._give(call, None, error, is_own=True)
            return call
        if answer is PARKED:
            call.parked = True
        else:
            self._give(call, answer, is_own=True)
        return call

    def _give(self, call: PendingCall, answer: Any, error: Exception | None = None, *, is_own: bool = False) -> bool:
        """Give a call its answer once the changes that it tells of are safe; whether its caller is still there.

        `is_own`: this thread is the caller's.
        """

        def give(lost: StoreError | None) -> None:
            call.put(answer, lost or error)
            wake_elsewhere(call)

        call.answer = answer
        if self.service.when_safe(give):
            return True
        call.put(answer, error)
        if is_own:
            call.wake()
        return is_own or wake_elsewhere(call)

    async def call(self, verb: str, arguments: dict[str, Any]) -> Any:
        if self._pid != transport.pid:
            self._begin()
        if self._is_quick and arguments.get("timeout", 0) == 0 and monotonic() < this_thread.turn_ends:
            try:
                answer = self.service.call(self._session, 0, verb, arguments, _refuse)
            except Exception:
                await _give_way()
                raise
            if verb not in HANDING:
                if type(answer) is Many and len(answer.items) > LONG_ITEMS:
                    this_thread.turn_ends = 0.0
                if monotonic() >= this_thread.turn_ends:
                    await _give_way()
            elif keys := handed_keys(verb, arguments, answer):  # the caller has it: no `await` here
                self.service.acknowledge(self._session, keys)
            return answer
        waits = arguments
        started = self.service.clock.now()
        while True:
            call = self.post(verb, arguments)
            try:
                answer = await call
            except GeneratorExit:  # garbage collection, at any point of what this thread does: not now
                self.service.deferred.append(functools.partial(self.abandon, call))
                raise
            except BaseException:
                self.abandon(call)
                raise
            if isinstance(answer, Many):
                answer.items = self.service.with_bodies(answer.items)
            keys = handed_keys(verb, arguments, answer)
            lost = self.service.acknowledge(self._session, keys) if keys else []
            if not lost:
                return answer
            if kept := without(verb, answer, lost):
                return kept
            # The event loop was blocked for so long that all of the work went to others: ask again.
            arguments = with_time_left(waits, self.service.clock.now() - started)

    def tell(self, verb: str, arguments: dict[str, Any]) -> None:
        with contextlib.suppress(StoreError):
            if self._pid != transport.pid:
                self._begin()
            self.service.call(self._session, 0, verb, arguments, _refuse)

    def abandon(self, call: PendingCall) -> None:
        if not call.parked and call.verb not in HANDING:
            return
        # A store that is closed, or has failed, hands out nothing and takes nothing back.
        with contextlib.suppress(StoreClosedError, StoreCorruptError, JournalError):
            self.service.call(self._session, 0, "cancel_wait", {"of": call.ticket}, _refuse)
            for key in handed_keys(call.verb, call.arguments, call.answer):
                with contextlib.suppress(BatchConflictError):  # it was acknowledged or given back meanwhile
                    self.service.call(self._session, 0, *giving_back(key), _refuse)

    def close(self) -> None:
        if self._pid in (0, transport.pid):  # in a forked child it is the parent's
            self.service.close()


def _refuse(ticket: int, value: Any) -> bool:
    """Take no answer later: for operations that are not parked."""
    return False


async def _give_way() -> None:
    """Let the other tasks of the event loop run, if it is their turn."""
    call = PendingCall("give way", *caller())
    call.put(None, None)
    await call


class InMemoryLightningStore(StoreClient):
    """A LightningStore in this process.

    Takes the options of `StoreOptions`. The reference's `thread_safe`, `tracker` and `scan_debounce_seconds` are
    accepted and have no effect: this store is always thread-safe, and time is watched by deadlines, not by scans.
    """

    _travels = False

    @explained_with(OPTIONS)
    def __init__(
        self,
        *,
        thread_safe: bool = True,
        tracker: Any = None,
        scan_debounce_seconds: float = 10.0,
        **options: Unpack[StoreOptions],
    ) -> None:
        config, resume = make_config(**options), options.get("resume", "auto")
        capacity = memory_capacity()
        settings = resolve(config, capacity)
        opened = open_journal(config, settings, name=None, resume=resume, now=time.time()) if config.journal else None
        self._service = Service(config, capacity_bytes=capacity, alarm=ThreadAlarm, opened=opened)
        origin = Origin(None if opened is None else str(opened.directory.path / OBJECTS))
        self._reach(LocalTransport(self._service), config, origin)
        self.testing: Testing = Testing(self._transport)

    @property
    def info(self) -> StoreInfo:
        """Identity, limits and capabilities of this store."""
        return store_info(self._service.info() | {"name": None, "namespace": None, "node": None, "endpoints": {}})

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "An InMemoryLightningStore lives in its process and cannot be pickled. To share a store with other "
            "processes, start it on Ray: store = raystore.start(), and pass store or store.actor."
        )


class RecoveredRun(StoreClient):
    """A run as its journal has it: the methods of a store; those that would change something raise `ReadOnlyError`.

    Whoever writes the journal is not disturbed. Time stands still at the end of the journal: attempts that ran then are
    shown as running.
    """

    _travels = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = directory("path", path)
        config = StoreConfig(clock="manual", journal=path)
        opened = open_for_reading(path)
        self._service = Service(config, capacity_bytes=memory_capacity(), alarm=NoAlarm, opened=opened)
        self._reach(LocalTransport(self._service), config, Origin(str(opened.directory.path / OBJECTS)))

    @property
    def store_id(self) -> str:
        """The id of the store whose run this is."""
        return self._service.store_id


@explained
def recover(path: str | os.PathLike[str]) -> RecoveredRun:
    """Open a finished, crashed or running run for reading, by the directory of its journal.

    To go on with a run, start a store on its journal. Raises `JournalMissingError`, `JournalDamagedError`,
    `JournalFormatError`.
    """
    return RecoveredRun(path)
