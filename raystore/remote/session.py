"""The way of a client process to a store (`describe`), and its session there: its thread, calls of Ray's, and callers.

All clients of a store in a process share one session, from any loop and thread. Operations issued within one tick of a
loop, or while a batch is under way, leave together. Answers come on a thread of Ray's and go to each waiting loop at
once; that loop sends the next batch behind its callers. A blocked or ended loop holds nothing up: a thread of the
session, its timer, sends what is left lying, acknowledges claims whose callers are busy, repeats batches that got no
answer, and keeps the session alive.
Not here: what follows from an answer, and what is due when (`session_state`).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import logging
import os
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from typing import Any

import ray

from raystore import __version__
from raystore.api import NoticeHandler
from raystore.client import transport
from raystore.client.transport import NoticeHandlers, PendingCall, this_thread, with_time_left, without
from raystore.core.claims import is_claim
from raystore.core.verbs import HANDING
from raystore.errors import (
    ForkedError,
    NotAStoreError,
    PayloadTooLargeError,
    ProtocolMismatchError,
    RayClientError,
    StoreClosedError,
    StoreUnavailableError,
    from_record,
)
from raystore.errors.text import last_line
from raystore.remote.lifelines import this_process
from raystore.remote.session_state import PENDING_SECONDS, Actions, Batch, Listen, Operation, SessionState, Version
from raystore.reports.log import a_minute, logger_of
from raystore.reports.progress import Progress
from raystore.service.service import PROTOCOL
from raystore.wire import frames

logger: logging.Logger = logger_of("raystore")

CLIENT = (PROTOCOL, f"raystore {__version__}")  #: protocol and version of this side of a session
HANDSHAKE_SECONDS = 60.0  #: to wait for the first answer of a store
STANDSTILL_SECONDS = 60.0  #: to wait for a store that makes no progress with reading its journal
HANDSHAKE_RETRY_SECONDS = 0.2
LOG_SECONDS = 10.0  #: between two log lines about a store that reads its journal
AGAIN_SECONDS = 1.0  #: to the next look of the timer after an error that nobody foresaw
CLOSE_SECONDS = 1.0  #: that the store is given to take a goodbye


# -- the way to a store ------------------------------------------------------------------------------------------------


def ray_connection() -> tuple[str, str] | None:
    """The cluster that this process is connected to, and its id there; None if it is not connected."""
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return context.gcs_address, context.get_worker_id()


def describe(handle: Any, *, waits: bool = True) -> dict[str, Any]:
    """Ask an actor for its description. If `waits`, wait for a store that makes progress with reading its journal.

    Raises `NotAStoreError`, `ProtocolMismatchError`, `StoreUnavailableError` if it does not answer, and the error with
    which it could not start.
    """
    check_connection()
    if not isinstance(handle, ray.actor.ActorHandle):
        raise NotAStoreError(f"{handle!r} (a {type(handle).__name__})")
    if not is_store(handle):
        raise NotAStoreError(f"The actor {handle!r}")
    try:
        with Progress("waiting for a store that reads its journal, kB") as shown:
            known = _described(handle, waits, shown)
    except ray.exceptions.ActorDiedError as error:
        raise StoreUnavailableError(repr(handle), f"its actor has died. {last_line(str(error))}") from None
    except TimeoutError:
        raise StoreUnavailableError(repr(handle), f"no answer within {HANDSHAKE_SECONDS:g} s") from None
    if not isinstance(known, dict) or known.get("kind") != "raystore":
        raise NotAStoreError(f"The actor {handle!r}")
    if known.get("refusal") is not None:
        raise from_record(*known["refusal"])
    if known["protocol"] != PROTOCOL:
        theirs = f"raystore {known['version']}, protocol {known['protocol']}"
        raise ProtocolMismatchError(f"{CLIENT[1]}, protocol {PROTOCOL}", theirs)
    return known


def _described(handle: Any, waits: bool, shown: Progress) -> Any:
    """What an actor says of itself, once it has read its journal."""
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    steps, progressed_at, logged_at = -1, 0.0, time.monotonic()
    while True:
        try:
            known = handle.describe.remote().future().result(timeout=max(deadline - time.monotonic(), 0))
        except ray.exceptions.ActorUnavailableError:  # it may be back in a moment, and asking again is harmless
            time.sleep(HANDSHAKE_RETRY_SECONDS)
            continue
        if not isinstance(known, dict) or known.get("reading") is None:
            return known
        now, (count, where) = time.monotonic(), known["reading"]
        read, in_all = known.get("kilobytes", (0, 0))
        shown.update(read, total=in_all, note=where)
        deadline = now + HANDSHAKE_SECONDS
        if count != steps:
            steps, progressed_at = count, now
        elif now - progressed_at > STANDSTILL_SECONDS:
            why = f"it has not come on in its journal for {STANDSTILL_SECONDS:g} s, {where}. Its log says more"
            raise StoreUnavailableError(known["name"], why)
        if not waits:
            raise StoreUnavailableError(known["name"], f"it reads its journal, {where}")
        if now > logged_at + LOG_SECONDS:
            logged_at = now
            logger.info("Waiting for store %r, which reads its journal: %s", known["name"], where)
        time.sleep(HANDSHAKE_RETRY_SECONDS)


def is_store(handle: Any) -> bool:
    """Whether an actor has the methods of a store."""
    return all(hasattr(handle, method) for method in ("describe", "exchange", "listen"))


def join_cluster(address: str | None) -> None:
    """Connect this process to Ray if it is not. Raises `RayClientError` and `ForkedError`: no store can be used."""
    if not ray.is_initialized():
        asked = address or os.environ.get("RAY_ADDRESS", "")
        if asked.startswith("ray://"):
            raise RayClientError(asked)
        ray.init(address=address)
    check_connection()


def check_connection() -> None:
    """Raise if no store can use this process's connection to Ray: it was inherited by a fork, or is Ray Client."""
    if transport.ray_is_inherited():
        raise ForkedError("Ray")
    if ray.util.client.ray.is_connected():
        raise RayClientError("ray://")


def join_cluster_of(store: str, address: str | None) -> None:
    """Connect to the cluster of a store, unless this process is connected or RAY_ADDRESS names a cluster."""
    if ray.is_initialized() or address is None or os.environ.get("RAY_ADDRESS", "local") != "local":
        join_cluster(None)
        return
    try:
        join_cluster(address)
    except ConnectionError as error:
        raise StoreUnavailableError(store, f"its cluster at {address} cannot be reached from here: {error}") from None


def find_actor(name: str, namespace: str) -> Any:
    """The handle of a named actor, None if there is none."""
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:  # Ray's way to say that there is no such actor
        return None


# -- the session -------------------------------------------------------------------------------------------------------


class ClientSession:
    """All operations of this process to one store."""

    def __init__(self, handle: Any, store: str, epoch: int, call_bytes: int, machine: str | None = None) -> None:
        """`machine`: that of the store's process, which looks for processes there; None if it looks for none."""
        self.handle = handle
        self.store = store  # its name, for errors
        self.call_bytes = call_bytes
        self.connection: tuple[str, str] | None = ray_connection()
        self.users = 0
        self.notices: NoticeHandlers = NoticeHandlers()
        process = this_process()
        self.state: SessionState = SessionState(
            store,
            epoch,
            CLIENT,
            process,
            time.monotonic(),
            make_id=lambda: secrets.token_hex(8),
            jitter=lambda: random.uniform(0.5, 1.5),
        )
        self._lock = threading.Lock()  # around every call of the state
        self._orphans: deque[Operation] = deque()  # of coroutines that were collected
        # The timer.
        self._timer = threading.Condition(threading.Lock())
        self._is_woken = False
        self._is_asleep = True  # for long, so that it must be woken
        self._thread: threading.Thread | None = None
        # The lifeline.
        self._machine = machine
        self._near = epoch if machine == process.machine != "" else None  # this process of the store looks for us
        self._tied: tuple[str, int] | None = None  # session and epoch
        self._lifeline: Any = None  # as long as we live

    # -- operations --------------------------------------------------------------------------------------------------

    def post(self, verb: str, arguments: dict[str, Any], *, awaited: bool = True) -> Operation:
        """Take an operation; it takes effect in the order of the calls of this method."""
        try:
            packed = frames.pack((verb, arguments))
        except frames.UNPACKABLE:
            raise frames.refusal(verb, arguments) from None
        if packed.size > self.call_bytes:
            raise PayloadTooLargeError(f"call {verb}", packed.size, self.call_bytes)
        loop = event = None
        if awaited and this_thread.is_blocking:
            event = threading.Event()
        elif awaited:
            loop = asyncio.get_running_loop()
        operation = Operation(verb, loop, event, packed=packed, issued=time.monotonic(), hands=HANDING.get(verb))
        if "timeout" in arguments:  # it may have to wait anew
            operation.arguments = arguments
        with self._lock:
            must_ask = self.state.post(operation)
        if loop is None:
            self._flush()
        elif must_ask:
            loop.call_soon(self._flush, loop)
        if self._is_asleep:
            self.wake()
        return operation

    async def call(self, verb: str, arguments: dict[str, Any]) -> Any:
        """Run one operation. What it hands over is acknowledged once its caller is running again, or given back."""
        waits = arguments
        started = time.monotonic()
        while True:
            operation = self.post(verb, arguments)
            try:
                answer = await operation
                keys = operation.handed
                if not keys:
                    return answer
                is_watched = is_claim(keys[0]) and any(is_suspect for _, _, is_suspect in answer)
                if is_watched:  # lost or withdrawn once: the store is told first, so that whoever dies of it is found
                    lost = await self.call("acknowledge", {"keys": keys})
                    answer = without(verb, answer, lost)
                with self._lock:
                    self.state.seen(keys, time.monotonic(), is_acknowledged=is_watched)
                if self._is_asleep:
                    self.wake()
                if answer:
                    return answer
                arguments = with_time_left(waits, time.monotonic() - started)
            except GeneratorExit:  # garbage collection may run anywhere, also while the lock is held
                self._orphans.append(operation)
                raise
            except BaseException:
                self.abandon(operation)
                raise

    def abandon(self, operation: Operation) -> None:
        """The caller has gone: see `SessionState.abandon`."""
        with self._lock:
            must_tell = self.state.abandon(operation, time.monotonic())
        if must_tell:
            self._flush()
            if self._is_asleep:
                self.wake()

    def hold(self, version: Version, references: tuple[Any, ...], *, again: bool) -> None:
        """Refer to objects that this process has published; `again`: the store may not know that they are here."""
        with self._lock:
            self.state.held.hold(version, references)
            if again:
                self.state.hold_again(time.monotonic())
        if again:
            self._flush()

    def close(self) -> None:
        """End the session: the store takes back what this process holds."""
        state = self.state
        state.is_closing = True
        if state.failure is None:
            self.post("close_session", {}, awaited=False)
            self._flush(is_needed=True)  # beside a batch that is under way, if need be
            deadline = time.monotonic() + CLOSE_SECONDS
            while state.has_pending and time.monotonic() < deadline and state.failure is None:
                time.sleep(0.002)
        self.fail(StoreClosedError(self.store))

    def fail(self, error: Exception) -> None:
        """No operation can succeed any more: tell everybody who waits, and everybody who comes."""
        with self._lock:
            actions = self.state.fail(error)
        self._do(actions)

    # -- calls of Ray's ----------------------------------------------------------------------------------------------

    def _flush(
        self,
        loop: asyncio.AbstractEventLoop | None = None,
        *,
        awake: Collection[asyncio.AbstractEventLoop] = (),
        is_needed: bool = False,
    ) -> None:
        """Send what should leave now: see `SessionState.next_batch`."""
        while True:
            with self._lock:
                batch = self.state.next_batch(time.monotonic(), loop, awake=awake, is_needed=is_needed)
            if batch is None:
                return
            self.send(batch)
            is_needed = False

    def send(self, batch: Batch) -> None:
        """Send a batch, for the first time or again."""
        refs = {number: op.packed.refs for number, op in enumerate(batch.operations) if op.packed.refs}
        parts = frames.join(batch.header, [operation.packed for operation in batch.operations])
        self._ask("exchange", functools.partial(self._on_reply, batch), *parts, **({"refs": refs} if refs else {}))

    def _listen(self, listen: Listen) -> None:
        """Park a listen call: it comes back when the store has something to say."""
        frame = frames.pack([*CLIENT, *listen])[0]
        self._ask("listen", functools.partial(self._on_listened, listen), frame)

    def _ask(self, method: str, answered: Callable[[Any], None], *arguments: Any, **more: Any) -> None:
        """Call a method of the actor; a call after Ray was shut down would start a Ray of its own."""
        if ray_connection() != self.connection:
            self.fail(StoreUnavailableError(self.store, "Ray has been shut down in this process since"))
            return
        try:
            if self._tied != (self.state.session_id, self.state.epoch):  # first: we may be gone in a moment
                self._tie(self.state.session_id, self.state.epoch)
            getattr(self.handle, method).remote(*arguments, **more).future().add_done_callback(answered)
        except Exception as error:  # Ray has been shut down in this process, or refuses the call
            self.fail(StoreUnavailableError(self.store, f"{type(error).__name__}: {error}"))

    def _on_reply(self, batch: Batch, future: Any) -> None:
        """The answer to a batch has come, on a thread of Ray's."""
        try:
            epoch, outcome, *rest = frames.unpack_answer(future.result())
        except Exception as error:  # no answer, or none that can be read
            if not self._has_died(error):
                with self._lock:
                    actions = self.state.no_answer(batch, _first_line(error), time.monotonic())
                self._do(actions)
            return
        try:
            with self._lock:
                actions = self.state.reply(batch, epoch, outcome, rest, time.monotonic())
            self._do(actions)
        except Exception as error:  # nobody else would tell the callers of this batch
            logger.exception(
                "The answer to a batch of store %r could not be taken", self.store, extra=a_minute("batch", self.store)
            )
            with self._lock:
                actions = self.state.give_up(
                    batch, f"its answer could not be taken. {_first_line(error)}", time.monotonic()
                )
            self._do(actions)

    def _on_listened(self, listen: Listen, future: Any) -> None:
        try:
            epoch, outcome, *rest = frames.unpack_answer(future.result())
        except Exception as error:  # no answer, or none that can be read
            if not self._has_died(error):
                self._listen_again(listen)
            return
        try:
            with self._lock:
                actions = self.state.listened(listen, epoch, outcome, rest, time.monotonic())
            self._do(actions)
        except Exception:  # the next call may fare better, and what came will come again
            logger.exception(
                "What store %r had to say could not be taken", self.store, extra=a_minute("said", self.store)
            )
            self._listen_again(listen)

    def _listen_again(self, listen: Listen) -> None:
        with self._lock:
            self.state.not_listened(listen, time.monotonic())
        if self._is_asleep:
            self.wake()

    def _has_died(self, error: Exception) -> bool:
        if not isinstance(error, ray.exceptions.ActorDiedError):
            return False
        self.fail(StoreUnavailableError(self.store, f"its actor has died. {_first_line(error)}"))
        return True

    def _do(self, actions: Actions) -> None:
        """Do what follows from an answer: one wake-up for each loop, however many answers it has."""
        for key in actions.lost:
            what = "Batch %d of consumer %r" if isinstance(key[1], int) else "The claim of attempt %s of rollout %s"
            logger.warning(
                f"{what} was lost: acknowledged too late", key[1], key[0], extra=a_minute("lost", self.store)
            )
        by_loop: dict[asyncio.AbstractEventLoop, list[Operation]] = {}
        for operation in actions.answered:
            operation.is_answered = True
            if operation.event is not None:
                operation.event.set()
            elif operation.loop is not None and not operation.abandoned:
                by_loop.setdefault(operation.loop, []).append(operation)
        for loop, operations in by_loop.items():
            try:
                loop.call_soon_threadsafe(self._wake_callers, loop, operations)
            except RuntimeError:  # the loop is closed, and its callers with it
                for operation in operations:
                    self.abandon(operation)
        if actions.notices:
            self.notices.add(actions.notices)
            self.notices.hand_out_elsewhere()
        if actions.listen is not None:
            self._listen(actions.listen)
        self._flush(awake=by_loop)
        if self._is_asleep:
            self.wake()

    def _wake_callers(self, loop: asyncio.AbstractEventLoop, operations: list[Operation]) -> None:
        for operation in operations:
            if operation.future is not None and not operation.future.done():
                operation.future.set_result(None)
        loop.call_soon(self._flush)  # behind the callers, so that what they issue now leaves with it

    # -- the timer ---------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Let the timer look at once; its thread starts with the first operation."""
        with self._timer:
            if self._thread is None and self.state.failure is None:
                self._thread = threading.Thread(target=self._run, name="raystore-session", daemon=True)
                self._thread.start()
            self._is_woken = True
            self._timer.notify()

    def _run(self) -> None:
        while self.state.failure is None:
            self._is_asleep = True  # what comes from here on wakes us, whether we have looked at it or not
            try:
                seconds = self._work()
            except Exception:  # the session lives by this thread: acknowledgements, retries, keep-alives
                logger.exception("A session could not see to what was due; trying again in %g s", AGAIN_SECONDS)
                seconds = AGAIN_SECONDS
            with self._timer:
                if not self._is_woken:
                    self._is_asleep = seconds is None or seconds > 1.5 * PENDING_SECONDS
                    self._timer.wait(seconds)
                    self._is_asleep = False
                self._is_woken = False

    def _work(self) -> float | None:
        """Do what is due; seconds until there is something again, None for when woken."""
        while self._orphans:
            self.abandon(self._orphans.popleft())
        now = time.monotonic()
        with self._lock:
            due = self.state.due(now)
        for batch in due.batches:
            self.send(batch)
        if due.listen is not None:
            self._listen(due.listen)
        return None if due.at is None else max(due.at - now, 0.001)

    # -- the lifeline ------------------------------------------------------------------------------------------------

    def _tie(self, session_id: str, epoch: int) -> None:
        """Make the lifeline (`remote.lifelines`): let the store learn of our end where it cannot look for us."""
        self._tied = (session_id, epoch)
        if self._machine is None or epoch == self._near:  # the next process of the store may be elsewhere
            return
        self._lifeline = self.handle.linger.remote(session_id)
        for reference in (self._lifeline, self.handle.hold.remote(session_id, [self._lifeline])):
            reference.future().add_done_callback(self._on_torn)

    def _on_torn(self, future: Any) -> None:
        """A call of the lifeline returned: the session ended, or the store could not be reached; then tie it again."""
        with contextlib.suppress(Exception):
            if future.exception() is not None:
                self._tied = None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


_sessions: dict[bytes, tuple[int, ClientSession]] = {}  # of this process, by actor, with the process they belong to
_sessions_lock = threading.Lock()


class ActorTransport:
    """The way of one client to its store: the session that all clients in this process share.

    The session is made at first use, and anew when Ray was shut down and started again. In a child that was forked from
    a process with a session, or with Ray, it raises.
    """

    def __init__(self, handle: Any, known: dict[str, Any]) -> None:
        self._handle = handle
        self._known = known
        self._closed = False
        self._session: ClientSession | None = None
        self._pid = 0

    @property
    def _actor_id(self) -> bytes:
        """One run may be gone on with by another actor, so the id of the store is not enough."""
        return bytes(self._handle._actor_id.binary())

    @property
    def session(self) -> ClientSession:
        """The session of this process, made at first use; raises `ForkedError` in a child that was forked later."""
        session = self._session
        if session is not None and self._pid == transport.pid and session.state.failure is None:
            return session
        if self._closed:
            raise StoreClosedError(self._known["name"])
        if (session is not None and self._pid != transport.pid) or transport.ray_is_inherited():
            raise ForkedError(f"Store {self._known['name']!r}")
        if session is not None:
            if isinstance(session.state.failure, StoreClosedError) or ray_connection() in (None, session.connection):
                return session  # which says why
            self._handle = find_actor(self._known["name"], self._known["namespace"])  # Ray was started anew
            if self._handle is None or describe(self._handle)["store_id"] != self._known["store_id"]:
                return session
        with _sessions_lock:
            pid = transport.pid
            if self._session is not None and self._session is not session and self._pid == pid:
                return self._session  # another thread was quicker
            owner, found = _sessions.get(self._actor_id, (0, None))
            if found is None or owner != pid or found.state.failure is not None:
                limit = self._known["limits"]["call_bytes"]
                machine = self._known.get("machine")
                found = ClientSession(self._handle, self._known["name"], self._known["epoch"], limit, machine)
                _sessions[self._actor_id] = (pid, found)
            found.users += 1
            self._session, self._pid = found, pid
            return found

    def call(self, verb: str, arguments: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        session = self._session
        if session is None or self._pid != transport.pid or session.state.failure is not None:
            session = self.session
        return session.call(verb, arguments)

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
        return self.session.state.session_id

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        session, self._session = self._session, None
        if session is None or self._pid != transport.pid:
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
        mine = [session for pid, session in _sessions.values() if pid == transport.pid]
        _sessions.clear()
    for session in mine:
        session.close()


atexit.register(close_sessions)  # before Ray's own, which was registered earlier
