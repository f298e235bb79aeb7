"""One operation on its way: awaited by a coroutine, or waited for by a blocking caller.

The same `async def` methods serve both: `run_blocking` drives a coroutine by hand and blocks its thread on each `Call`
that the coroutine awaits, so that it needs no event loop and works inside a running one.
Not here: how an operation reaches the store (`transport`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_driving = threading.local()


class Call:
    """An operation and the place where its answer will be.

    Belongs to the event loop that made it, or to a blocking thread. The answer is set at most once, from any thread.
    """

    __slots__ = ("_answer", "_error", "_event", "_future", "arguments", "leader", "loop", "parked", "ticket", "verb")

    def __init__(self, verb: str, ticket: int = 0, awaited: bool = True) -> None:
        self.verb: str = verb
        self.ticket: int = ticket
        self.arguments: dict[str, Any] | None = None  # of one that may wait, or that hands something over
        self.parked: bool = False
        self.leader: Call | None = None  # the first part of a bulk call, whose caller is the caller of all
        self._answer: Any = None
        self._error: Exception | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._future: asyncio.Future[None] | None = None
        self._event: threading.Event | None = None
        if not awaited:
            return
        if getattr(_driving, "blocking", False):
            self._event = threading.Event()
        else:
            self.loop = asyncio.get_running_loop()
            self._future = self.loop.create_future()

    def hold(self, answer: Any) -> None:
        """Note the answer, which the caller is not to have yet."""
        self._answer = answer

    def put(self, answer: Any, error: Exception | None) -> None:
        """Set the answer, without waking the caller of an event loop yet."""
        self._answer = answer
        self._error = error
        if self._event is not None:
            self._event.set()

    def wake(self) -> None:
        """Wake the caller; on its own event loop."""
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    def result(self) -> Any:
        """The answer; raises the error that was the answer."""
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
        """The answer as it was put, None before."""
        return self._answer

    def block(self) -> None:
        """Wait in this thread until the answer is there."""
        assert self._event is not None
        self._event.wait()

    def __await__(self) -> Generator[Any, Any, Any]:
        if self._future is not None:
            yield from self._future
        else:
            yield self  # to run_blocking
        return self.result()


def in_thread(function: Callable[..., Any], *arguments: Any) -> Call:
    """Run a function on a thread of its own; may be awaited by a client's coroutine, whoever drives that."""
    call = Call("thread")

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
    before = getattr(_driving, "blocking", False)
    error: BaseException | None = None
    try:
        while True:
            _driving.blocking = True
            try:
                call = coroutine.throw(error) if error is not None else coroutine.send(None)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            finally:
                _driving.blocking = before
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
