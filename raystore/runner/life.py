"""The life of an agent, from `__init__` to `close`: all of it in one thread, and what is awaited in one task.

The thread that enters a `Life` leads it. `__init__`, `setup`, the calls and `close` run there, one after the other; an
awaitable that one of them gives is awaited in the one task of an event loop that belongs to this life. A plain agent is
called while that loop rests, so it may run a loop of its own (`asyncio.run`) or this one (`get_event_loop`); an async
agent is called in the task. Between calls the loop runs, and with it what the agent has started in the background.
Where calls may overlap (`concurrency` above 1) they run beside that: an async one in a task of its own on the same
loop, a plain one in a thread of its own.
Not here: which thread leads a life (`inline`, `child`, `single`), what an ending means (`agents`).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import logging
import queue
import threading
import types
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from raystore.runner import agents
from raystore.runner.agents import Ending
from raystore.runner.context import Context, apart
from raystore.runner.told import add_note, text_of

logger: logging.Logger = logging.getLogger("raystore.runner")

NEEDS_MAIN_THREAD = (
    "this can be done in the main thread of a process only, and the agent runs in another one here; "
    "RunnerPool(isolation='process') gives each agent a process with a main thread of its own"
)

T = TypeVar("T")
Outcome = tuple[Any, BaseException | None]  #: what a function returned; or what it raised, if that is not None


@dataclass(slots=True, eq=False)
class _Step:
    """Something to await in a task: an awaitable, or a function that is called there."""

    given: Any
    variables: contextvars.Context
    context: Context | None  # of a call; None for what cannot be cancelled
    done: asyncio.Future[Outcome]


@dataclass(slots=True, eq=False)
class _Call:
    """A call of the agent that another thread has asked for."""

    context: Context
    settle: Callable[[Ending], None]
    begun: Callable[[], None]


class Life:
    """One agent and its life. `with` makes it and sets it up, and closes it; `is_over` says that it ended by itself.

    A life is over before its time if its task is cancelled by the agent's own doing (a task group that was entered in
    `setup` has failed), if its loop was closed, or if something that it started ended the loop (`SystemExit`).
    """

    def __init__(self, source: Any, concurrency: int = 1) -> None:
        self.is_over: bool = False
        self._source = source
        self._is_ours = agents.is_class(source)
        self._is_async = agents.is_async(source)
        self._is_alone = concurrency == 1
        self._agent: Any = None
        self._variables = contextvars.copy_context()  # of `setup`; each call has a copy
        self._runner = asyncio.Runner()
        self._loop: asyncio.AbstractEventLoop
        self._keeper: asyncio.Task[None]
        self._steps: deque[_Step | None] = deque()  # for the keeper; None ends it
        self._coming: asyncio.Future[None] | None = None
        self._step: _Step | None = None  # that the keeper has under way
        self._cancels = 0  # of that, by us
        self._calls: deque[_Call] = deque()
        self._ends = False
        self._waiting: asyncio.Future[None] | None = None
        self._tasks: dict[Context, asyncio.Task[None]] = {}  # of calls that run beside
        self._threads = _Threads(concurrency)

    # -- in the thread that leads it ---------------------------------------------------------------------------------

    def __enter__(self) -> Life:
        """Make the agent and set it up; raises what it raises."""
        self._loop = self._runner.get_loop()
        self._keeper = self._loop.create_task(self._keep())
        try:
            if self._is_ours:
                with apart():
                    self._agent = _result(self._do(self._source, self._variables))
                    self._method("setup")
            else:
                self._agent = self._source
        except BaseException:
            self._agent = None
            self._end_loop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        """Let an agent that was made here let go of what it holds; an error there is told and changes nothing."""
        try:
            if self._is_ours:
                with apart():
                    self._method("close")
        except Exception:
            logger.exception("close() of the agent failed")
        finally:
            self._agent = None  # it ends in its own thread
            self._threads.close()
            self._end_loop()

    def run(self, context: Context) -> Outcome:
        """Call the agent for one rollout, here and now."""
        variables = self._variables.copy()
        variables.run(context.enter)
        return self._do(functools.partial(self._agent, context.rollout.input, context), variables, context)

    def serve(self) -> None:
        """Make the calls that other threads ask for, until one of them says `end`, or this life is over."""
        try:
            while not self._ends and not self._loop.is_closed():
                if self._calls:
                    self._serve_one(self._calls.popleft())
                else:
                    self._waiting = self._loop.create_future()
                    self._until(self._waiting)
        except BaseException:  # SystemExit of something that the agent has started
            self._over()
            raise

    def _serve_one(self, call: _Call) -> None:
        call.begun()
        if call.context.cancelled:
            call.settle(Ending(None))
            return
        try:
            outcome = self.run(call.context)
        except BaseException as error:  # the loop was ended
            call.settle(agents.ended(call.context, None, error))
            raise
        call.settle(agents.ended(call.context, *outcome))

    def _method(self, name: str) -> None:
        """Call a method that an agent may have."""
        method = getattr(self._agent, name, None)
        if callable(method):
            _result(self._do(method, self._variables))

    def _do(
        self, function: Callable[[], Any], variables: contextvars.Context, context: Context | None = None
    ) -> Outcome:
        """Call something of the agent, and await what it gives."""
        given: Any = function
        if not self._loop.is_closed():
            asyncio.set_event_loop(self._loop)  # the call before may have taken it away, by `asyncio.run` for one
        if not self._is_async:
            given, error = _tried(functools.partial(variables.run, function))
            if error is not None or not inspect.isawaitable(given):
                return given, error
        if self._keeper.done() or self._loop.is_closed():
            return None, RuntimeError("the event loop of this agent was closed")
        step = _Step(given, variables, context, self._loop.create_future())
        self._give(step)
        try:
            return self._until(step.done)
        finally:
            if not step.done.done():  # Ctrl+C, or SystemExit of something that the agent has started
                self._over()
                self._keeper.cancel()
                self._until(self._loop.create_task(_first([self._keeper, step.done])))

    def _until(self, future: asyncio.Future[T]) -> T:
        """Run the loop until a future of it is done, also if somebody else stops it meanwhile."""
        future.add_done_callback(self._stop)
        try:
            while not future.done():
                self._loop.run_forever()
        finally:
            future.remove_done_callback(self._stop)
        return future.result()

    def _stop(self, future: asyncio.Future[Any]) -> None:
        self._loop.stop()

    def _give(self, step: _Step | None) -> None:
        """Give the keeper something to await, which it does when the loop runs."""
        self._steps.append(step)
        _settle(self._coming)

    def _end_loop(self) -> None:
        if self._loop.is_closed():
            self._keeper._log_destroy_pending = False  # type: ignore[attr-defined]  # the agent has closed it
            return
        self._give(None)
        self._until(self._loop.create_task(_first([self._keeper])))
        self._runner.close()

    # -- on its loop -------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """The one task: await what there is to await, one after the other."""
        task = asyncio.current_task()
        assert task is not None
        while True:
            while not self._steps:
                self._coming = self._loop.create_future()
                try:
                    await self._coming
                except asyncio.CancelledError:  # not by us: by what the agent has entered in this task
                    self._over()
                    _take_back(task)
            self._step = self._steps.popleft()
            if self._step is None:
                return
            if self._step.context is not None and self._step.context.cancelled:
                outcome = _given_up(self._step.given)
            else:
                outcome = await _driven(_awaited(self._step.given), self._step.variables)
            done, self._step = self._step.done, None
            if task.cancelling() > self._cancels:
                self._over()
            self._cancels = 0
            _take_back(task)
            done.set_result(outcome)
            del done, outcome  # with all that they refer to, while nothing follows

    def _over(self) -> None:
        self.is_over = True
        self._end()

    def _end(self) -> None:
        self._ends = True
        _settle(self._waiting)

    def _take(self, call: _Call) -> None:
        if self._ends:
            return
        if not self._is_async:
            self._calls.append(call)
            _settle(self._waiting)
            return
        call.begun()
        if self._is_alone:  # the loop runs, and need not stop for it
            given, done = self._function(call.context), self._loop.create_future()
            done.add_done_callback(lambda done: call.settle(agents.ended(call.context, *done.result())))
            self._give(_Step(given, self._variables_of(call), call.context, done))
            return
        self._begin_beside(self._function(call.context), self._variables_of(call), call.context, call.settle)

    def _variables_of(self, call: _Call) -> contextvars.Context:
        variables = self._variables.copy()
        variables.run(call.context.enter)
        return variables

    def _function(self, context: Context) -> Callable[[], Any]:
        return lambda: self._agent(context.rollout.input, context)

    def _begin_beside(
        self, given: Any, variables: contextvars.Context, context: Context, settle: Callable[[Ending], None]
    ) -> None:
        """Await one call in a task of its own."""
        if context.cancelled:
            settle(agents.ended(context, *_given_up(given)))
            return
        coroutine = self._beside(given, context, settle)
        self._tasks[context] = self._loop.create_task(coroutine, context=variables)

    async def _beside(self, given: Any, context: Context, settle: Callable[[Ending], None]) -> None:
        try:
            outcome: Outcome = await _awaited(given), None
        except BaseException as error:
            outcome = _failed(error)
        finally:
            del self._tasks[context]
        settle(agents.ended(context, *outcome))

    def _cancel(self, context: Context) -> None:
        if self._step is not None and self._step.context is context:
            self._cancels += 1
            self._keeper.cancel()
        elif context in self._tasks:
            self._tasks[context].cancel()

    # -- in a thread beside ------------------------------------------------------------------------------------------

    def _run_beside(self, call: _Call) -> None:
        """Make one call of a plain agent; what it gives to await is awaited on the loop of this life."""
        if self._ends:
            return
        call.begun()
        if call.context.cancelled:
            call.settle(Ending(None))
            return
        variables = self._variables_of(call)
        result, error = _tried(functools.partial(variables.run, self._function(call.context)))
        if error is not None or not inspect.isawaitable(result):
            call.settle(agents.ended(call.context, result, error))
            return
        done: Future[Ending] = Future()
        try:
            self._loop.call_soon_threadsafe(self._begin_beside, result, variables, call.context, done.set_result)
        except RuntimeError as closed:
            _given_up(result)
            call.settle(agents.ended(call.context, None, closed))
        else:
            call.settle(done.result())

    # -- in any thread -----------------------------------------------------------------------------------------------

    def begin(self, context: Context, settle: Callable[[Ending], None], begun: Callable[[], None]) -> None:
        """Ask for a call. `begun` is called when it begins, and `settle` when it has ended, each on some thread.

        It never begins if this life is over; RuntimeError says so if that is known already.
        """
        call = _Call(context, settle, begun)
        if self._is_alone or self._is_async:
            self._loop.call_soon_threadsafe(self._take, call)
        else:
            self._threads.submit(functools.partial(self._run_beside, call))

    def cancel(self, context: Context) -> None:
        """Cancel what is awaited for a call, whose context says why. What does not await is left alone."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nothing is awaited any more
            self._loop.call_soon_threadsafe(self._cancel, context)

    def end(self) -> None:
        """Let `serve` return, as soon as no call runs."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._end)


async def _first(futures: list[asyncio.Future[Any]]) -> None:
    """Wait for one of them, however it ends."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _settle(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)


def _take_back(task: asyncio.Task[Any]) -> None:
    """Count no cancel of a task that went to something in it which has ended."""
    while task.cancelling():
        task.uncancel()


def _result(outcome: Outcome) -> Any:
    result, error = outcome
    if error is None:
        return result
    try:
        raise error
    finally:
        del outcome, error  # no cycle with the traceback


def _tried(function: Callable[[], Any]) -> Outcome:
    try:
        return function(), None
    except BaseException as error:  # SystemExit, too, would end more than this call
        return _failed(error)


def _failed(error: BaseException) -> Outcome:
    """An error as an outcome; one that is due to the thread says what to do."""
    if threading.current_thread() is not threading.main_thread():
        for one in agents.and_causes(error):
            if isinstance(one, (ValueError, RuntimeError)) and "main thread" in text_of(one):
                add_note(error, NEEDS_MAIN_THREAD)
                break
    return None, error


async def _awaited(given: Any) -> Any:
    """What an agent gives in the end: its awaitables awaited, however they came to be."""
    result = given if inspect.isawaitable(given) else given()
    while inspect.isawaitable(result):
        result = await result
    return result


def _given_up(given: Any) -> Outcome:
    """The outcome of what is not awaited any more."""
    if inspect.iscoroutine(given):
        given.close()  # or Python warns that it was never awaited
    return None, asyncio.CancelledError()


@types.coroutine
def _driven(coroutine: Any, variables: contextvars.Context) -> Generator[Any, Any, Outcome]:
    """Await a coroutine in the calling task, but with context variables of its own: what it sets ends with it."""
    step = functools.partial(coroutine.send, None)
    while True:
        try:
            awaited = variables.run(step)
        except StopIteration as stop:
            return stop.value, None
        except BaseException as error:
            return _failed(error)
        try:
            step = functools.partial(coroutine.send, (yield awaited))
        except GeneratorExit:  # the task itself is given up, not by the agent
            variables.run(coroutine.close)
            raise
        except BaseException as error:
            step = functools.partial(coroutine.throw, error)


class _Threads:
    """Threads that the end of the interpreter does not wait for, unlike those of `concurrent.futures`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._started = 0
        self._free = 0  # threads that nobody has given anything
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def submit(self, function: Callable[[], None]) -> None:
        """Run a function, which raises nothing, in a thread."""
        with self._lock:
            starts = not self._free and self._started < self._most
            self._started += starts
            self._free -= not starts
            name = f"raystore-agent-{self._started}"
        self._work.put(function)
        if starts:
            threading.Thread(target=self._serve, name=name, daemon=True).start()

    def _serve(self) -> None:
        loop = asyncio.new_event_loop()  # for agents that ask for one; it runs when they run it
        while (work := self._work.get()) is not None:
            if loop.is_closed():
                loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
            work()
            del work  # with all that it refers to, while nothing follows
            with self._lock:
                self._free += 1
        loop.close()

    def close(self) -> None:
        """End them, as soon as nothing runs in them."""
        for _ in range(self._started):
            self._work.put(None)
