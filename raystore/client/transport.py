"""How a client reaches its store: a transport, the calls that it makes, and the notices that it passes on.

A transport takes an operation when it is called, not when it is awaited: operations take effect in the order in which
they were issued. It gives back claims and batches whose caller was cancelled.

A coroutine awaits a `PendingCall`; a blocking thread waits for it. The same `async def` methods serve both:
`run_blocking` drives a coroutine by hand and blocks its thread on each `PendingCall` that the coroutine awaits, so it
needs no event loop and works inside a running one.
Also here: whether this process was forked (`pid`, `ray_is_inherited`), and so must not use what it has inherited.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol, TypeVar

from raystore.api import NoticeHandler
from raystore.core.claims import is_batch
from raystore.core.state import HandedKey
from raystore.core.verbs import HANDING
from raystore.errors import BatchHeldError, FeedHeldError
from raystore.reports.log import a_minute, logger_of

logger: logging.Logger = logger_of("raystore")

T = TypeVar("T")

SIGN_SECONDS = 0.1  #: in which a process that lives gives a sign of life; then it is looked for
TURN_SECONDS = 0.01  #: that calls which are answered at once may keep an event loop from its other tasks


# -- calls -------------------------------------------------------------------------------------------------------------


class _Thread(threading.local):
    """How coroutines run in this thread."""

    is_blocking = False  # whether `run_blocking` drives the current one
    turn_ends: float = 0.0  # time (`monotonic`) at which the event loop's other tasks get their turn


this_thread: _Thread = _Thread()


@dataclass(slots=True, eq=False)
class PendingCall:
    """An operation on its way, and its answer once there is one.

    Belongs to the event loop or blocking thread that made it (`caller`). The answer is set at most once, from any
    thread.
    """

    verb: str
    loop: asyncio.AbstractEventLoop | None = None  # that its caller runs on
    event: threading.Event | None = None  # for which its caller blocks a thread
    ticket: int = 0
    arguments: dict[str, Any] | None = None  # kept if it may wait, or if the answer is to be acknowledged
    parked: bool = False
    leader: PendingCall | None = None  # of a part of a bulk call: the first part, which has the same caller
    is_answered: bool = False
    answer: Any = None  # so far; None also if it is an error
    error: Exception | None = None
    future: asyncio.Future[None] | None = None  # for which its caller waits, once it does

    def put(self, answer: Any, error: Exception | None) -> None:
        """Set the answer. Wakes a blocking caller; one on an event loop is woken by `wake`."""
        self.answer, self.error, self.is_answered = answer, error, True
        if self.event is not None:
            self.event.set()

    def wake(self) -> None:
        """Wake the caller; to be called on its event loop."""
        if self.future is not None and not self.future.done():
            self.future.set_result(None)

    def block(self) -> None:
        """Wait in this thread until the answer is there."""
        assert self.event is not None
        self.event.wait()

    def __await__(self) -> Generator[Any, Any, Any]:
        """Wait for the answer, and return it or raise it."""
        if self.loop is None:
            yield self  # to run_blocking
        elif not self.is_answered:
            self.future = self.future or self.loop.create_future()
            yield from self.future
            this_thread.turn_ends = monotonic() + TURN_SECONDS
        elif monotonic() >= this_thread.turn_ends:
            yield  # to the event loop, which runs its other tasks and comes back
            this_thread.turn_ends = monotonic() + TURN_SECONDS
        if self.error is not None:
            raise self.error
        return self.answer


def caller() -> tuple[asyncio.AbstractEventLoop | None, threading.Event | None]:
    """Who makes a call here, as `PendingCall` knows it: this thread if `run_blocking` drives it, else its loop."""
    return (None, threading.Event()) if this_thread.is_blocking else (asyncio.get_running_loop(), None)


def wake_elsewhere(call: PendingCall) -> bool:
    """Wake the caller of a call, on any thread; whether it is still there."""
    if call.loop is None:  # a blocking thread, which the answer itself has woken
        return True
    try:
        call.loop.call_soon_threadsafe(call.wake)
    except RuntimeError:  # the loop is closed, and its caller with it
        return False
    return True


def in_thread(function: Callable[..., Any], *arguments: Any) -> PendingCall:
    """Run a function on a thread of its own. The call may be awaited on an event loop or by `run_blocking`."""
    call = PendingCall("thread", *caller())

    def run() -> None:
        try:
            call.put(function(*arguments), None)
        except Exception as error:
            call.put(None, error)
        wake_elsewhere(call)

    threading.Thread(target=run, name="raystore-object", daemon=True).start()
    return call


def run_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine of a store's client to its end in this thread."""
    before = this_thread.is_blocking
    error: BaseException | None = None
    try:
        while True:
            this_thread.is_blocking = True
            try:
                call = coroutine.throw(error) if error is not None else coroutine.send(None)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            finally:
                this_thread.is_blocking = before
            error = None
            try:
                call.block()
            except BaseException as interruption:  # Ctrl+C: the coroutine cleans up and lets it out again
                error = interruption
    finally:
        coroutine.close()


def iterate_blocking(iterator: AsyncIterator[T]) -> Iterator[T]:
    """Iterate over an asynchronous iterator of a store's client in this thread."""

    async def advance() -> T:
        return await anext(iterator)

    while True:
        try:
            yield run_blocking(advance())
        except StopAsyncIteration:
            return


class Transport(Protocol):
    """The connection of a client to its store."""

    def call(self, verb: str, arguments: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        """Run an operation and return its answer; raises the answer if it is an error.

        Claims and batches in the answer are acknowledged, or given back if the caller is cancelled.
        """

    def post(self, verb: str, arguments: dict[str, Any]) -> PendingCall:
        """Issue an operation now; its answer may be awaited."""

    def tell(self, verb: str, arguments: dict[str, Any]) -> None:
        """Issue an operation and ignore its answer."""

    def abandon(self, call: PendingCall) -> None:
        """Cancel an issued call: an operation that was not sent yet is dropped, claims in its answer are given back."""

    def listen_for_notices(self, handler: NoticeHandler) -> Callable[[], None]:
        """Call `handler` when an attempt of this process is cancelled or lost; returns a function that stops this."""

    @property
    def session_id(self) -> str:
        """The session of this process, to which its operations belong."""

    def close(self) -> None:
        """Take no more calls."""


# -- claims and batches, which are acknowledged or given back ---------------------------------------------------------


def handed_keys(verb: str, arguments: dict[str, Any] | None, answer: Any) -> list[HandedKey]:
    """The claims or the batch that an answer hands over, by key; the caller must acknowledge them."""
    hands = HANDING.get(verb)
    return hands(arguments or {}, answer) if hands is not None else []


def giving_back(key: HandedKey) -> tuple[str, dict[str, Any]]:
    """The operation, verb and arguments, that gives back a claim or a batch."""
    if is_batch(key):
        return "nack", {"consumer": key[0], "batch": key[1]}
    return "decline", {"rollout_id": key[0], "attempt_id": key[1]}


def without(verb: str, answer: Any, lost: Iterable[HandedKey]) -> list[Any]:
    """An answer without the claims that are lost; empty if its batch is. Keys may be lists, as they travel."""
    gone = {(key[0], key[1]) for key in lost}
    if any(isinstance(number, int) for _, number in gone):
        return []
    return [claim for claim, key in zip(answer, handed_keys(verb, None, answer), strict=True) if key not in gone]


def with_time_left(arguments: dict[str, Any], elapsed: float) -> dict[str, Any]:
    """The arguments for repeating a call after so many seconds: its timeout is shorter by as much."""
    timeout = arguments.get("timeout")
    return arguments if not timeout else arguments | {"timeout": max(timeout - elapsed, 0.0)}


async def call_past_the_dead(
    call: Callable[[str, dict[str, Any]], Coroutine[Any, Any, T]],
    verb: str,
    arguments: dict[str, Any],
    seconds: float = math.inf,
) -> T:
    """Run an operation, and again if what it asks for is held by another process, which may just have died.

    The store learns of an end some seconds later. It asks the holder for a sign of life: if there is one, or after so
    many seconds, the refusal is raised.
    """
    started, refused = monotonic(), 0.0
    while True:
        asked = monotonic()
        try:
            return await call(verb, with_time_left(arguments, asked - started))
        except (BatchHeldError, FeedHeldError) as error:
            silent = error.silent_seconds
            if silent is None or (refused and silent < asked - refused) or monotonic() - started >= seconds:
                raise
        refused = refused or monotonic()
        await in_thread(time.sleep, SIGN_SECONDS)


# -- notices -----------------------------------------------------------------------------------------------------------


class NoticeHandlers:
    """The handlers of notices in this process, and the notices that they have not got yet.

    One thread at a time calls the handlers, in the order of the notices and without a lock of the store. A handler may
    use the store; notices that it causes follow once it has returned.
    """

    def __init__(self) -> None:
        self._handlers: list[NoticeHandler] = []
        self._waiting: deque[Sequence[str]] = deque()
        self._is_telling = threading.Lock()

    def listen(self, handler: NoticeHandler) -> Callable[[], None]:
        """Call a handler for each notice from now on; returns a function that stops this."""
        self._handlers.append(handler)
        return lambda: self._handlers.remove(handler)

    def add(self, notices: Iterable[Sequence[str]]) -> None:
        """Take notices; `hand_out` calls the handlers."""
        self._waiting.extend(notices)

    def hand_out(self) -> None:
        """Call every handler for every notice that waits, unless another thread is doing so."""
        # The other thread looks once more after it has released the lock, so that nothing is left.
        while self._waiting and self._is_telling.acquire(blocking=False):
            try:
                while self._waiting:
                    self._tell(self._waiting.popleft())
            finally:
                self._is_telling.release()

    def hand_out_elsewhere(self) -> None:
        """Do the same on another thread: a handler may wait for an answer that this thread would deliver."""
        if self._waiting:
            threading.Thread(target=self.hand_out, name="raystore-notices", daemon=True).start()

    def _tell(self, notice: Sequence[str]) -> None:
        for handler in list(self._handlers):
            try:
                handler(*notice)
            except Exception:  # an error of a user's handler must not stop the session
                logger.exception("A handler of notices failed", extra=a_minute("notices"))


# -- forks -------------------------------------------------------------------------------------------------------------

# A fork copies neither the threads of a store nor Ray's: a lock that one of them held stays locked, and an answer never
# comes. So stores that were used before the fork raise `ForkedError` in the child, at once.

#: of this process, kept here since the system takes longer to answer than a store to take its lock
pid: int = os.getpid()
_has_inherited_ray = False


def _in_child() -> None:
    global pid, _has_inherited_ray
    pid = os.getpid()
    _has_inherited_ray = _is_ray_initialized()


def _is_ray_initialized() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def ray_is_inherited() -> bool:
    """Whether Ray was connected before the fork that made this process, and was not shut down since."""
    global _has_inherited_ray
    _has_inherited_ray = _has_inherited_ray and _is_ray_initialized()
    return _has_inherited_ray


os.register_at_fork(after_in_child=_in_child)
