"""An operation on its way: awaited by a coroutine, or waited for by a blocking thread.

The same `async def` methods serve both. `run_blocking` drives a coroutine by hand and blocks its thread on each
`PendingCall` that the coroutine awaits, so that it needs no event loop and works inside a running one.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from time import monotonic
from typing import Any, TypeVar

T = TypeVar("T")

TURN_SECONDS = 0.01  #: for so long calls that are answered at once may keep an event loop from its other tasks


class _Thread(threading.local):
    """How coroutines run in this thread."""

    is_blocking = False  # whether `run_blocking` drives the current one
    turn_ends = 0.0  # from then on (`monotonic`) the event loop's other tasks are to have their turn


this_thread = _Thread()


class PendingCall:
    """An operation, and the place for its answer.

    Belongs to the event loop or blocking thread that made it. The answer is set at most once, from any thread.
    """

    __slots__ = ("_answer", "_error", "_event", "_future", "arguments", "leader", "loop", "parked", "ticket", "verb")

    def __init__(self, verb: str, ticket: int = 0, awaited: bool = True) -> None:
        self.verb = verb
        self.ticket = ticket
        self.arguments: dict[str, Any] | None = None  # kept if it may wait, or if the answer is to be acknowledged
        self.parked = False
        self.leader: PendingCall | None = None  # of a part of a bulk call: the first part, which has the same caller
        self._answer: Any = None
        self._error: Exception | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._future: asyncio.Future[None] | None = None
        self._event: threading.Event | None = None
        if not awaited:
            return
        if this_thread.is_blocking:
            self._event = threading.Event()
        else:
            self.loop = asyncio.get_running_loop()
            self._future = self.loop.create_future()

    def hold(self, answer: Any) -> None:
        """Keep the answer without giving it to the caller yet."""
        self._answer = answer

    def put(self, answer: Any, error: Exception | None) -> None:
        """Set the answer. Wakes a blocking caller; one on an event loop is woken by `wake`."""
        self._answer = answer
        self._error = error
        if self._event is not None:
            self._event.set()

    def wake(self) -> None:
        """Wake the caller; to be called on its event loop."""
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    def result(self) -> Any:
        """The answer; raises it if it is an error."""
        if self._error is not None:
            raise self._error
        return self._answer

    @property
    def is_cancelled(self) -> bool:
        """Whether its caller has been cancelled."""
        if self.leader is not None and self.leader.is_cancelled:
            return True
        return self._future is not None and self._future.cancelled()

    @property
    def answer(self) -> Any:
        """The answer so far; None if there is none, or if it is an error."""
        return self._answer

    def block(self) -> None:
        """Wait in this thread until the answer is there."""
        assert self._event is not None
        self._event.wait()

    def __await__(self) -> Generator[Any, Any, Any]:
        if self._future is None:
            yield self  # to run_blocking
        elif not self._future.done():
            yield from self._future
        elif monotonic() >= this_thread.turn_ends:
            yield  # to the event loop, which runs its other tasks and comes back
        else:
            return self.result()
        this_thread.turn_ends = monotonic() + TURN_SECONDS
        return self.result()


def in_thread(function: Callable[..., Any], *arguments: Any) -> PendingCall:
    """Run a function on a thread of its own. The call may be awaited on an event loop or by `run_blocking`."""
    call = PendingCall("thread")

    def run() -> None:
        try:
            call.put(function(*arguments), None)
        except Exception as error:
            call.put(None, error)
        if call.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                call.loop.call_soon_threadsafe(call.wake)

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
