"""The life of an agent, from `__init__` to `close`: in one thread, with everything that it awaits in one task.

The thread that enters a `Life` is the agent's thread. `__init__`, `setup`, the calls and `close` run there one after
the other, and an awaitable that one of them returns is awaited in the one main task of an event loop that belongs to
this life. A plain agent is called while that loop is stopped, so it may run another loop (`asyncio.run`) or this one
(`get_event_loop`); an async agent is called in the main task. Between calls the loop runs, and with it the agent's
background tasks.
With `concurrency` above 1 calls may overlap: then each async call has a task of its own on the same loop, and each
plain call a thread of its own.
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
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from raystore.errors.text import add_note, text_of, with_causes
from raystore.reports.log import a_minute, logger_of
from raystore.runner import agents
from raystore.runner.agents import Agent, Ending
from raystore.runner.context import Context, outside_rollouts

logger: logging.Logger = logger_of("raystore.runner")

NEEDS_MAIN_THREAD = (
    "this can be done in the main thread of a process only, and the agent runs in another one here; "
    "RunnerPool(isolation='process') gives each agent a process with a main thread of its own"
)

T = TypeVar("T")
Result = tuple[Any, BaseException | None]  #: of a call: the returned value, or the raised error if that is not None


@dataclass(slots=True, eq=False)
class _Step:
    """An awaitable for the main task, or a function that it calls."""

    target: Any
    variables: contextvars.Context
    context: Context | None  # of a call; None for a step that cannot be cancelled
    done: asyncio.Future[Result]


@dataclass(slots=True, eq=False)
class _Call:
    """A call of the agent that another thread asked for."""

    context: Context
    on_end: Callable[[Ending], None]
    on_begin: Callable[[], None]

    def begin(self) -> bool:
        """Note that the call begins; False if it was cancelled before, which ends it."""
        self.on_begin()
        if self.context.cancelled:
            self.on_end(Ending(None))
            return False
        return True

    def end(self, result: Any, error: BaseException | None) -> None:
        self.on_end(agents.ending_of(self.context, result, error))


class Life:
    """One agent and its life: entering it makes the agent and sets it up, leaving it closes the agent.

    `is_over` says that it ended early: the agent's code cancelled the main task (a task group that was entered in
    `setup` has failed), closed the loop, or raised SystemExit in a background task.
    """

    def __init__(self, source: Agent, concurrency: int = 1) -> None:
        self.is_over: bool = False
        self._source = source
        self._is_class = agents.is_class(source)
        self._is_async = agents.is_async(source)
        self._is_sequential = concurrency == 1
        self._agent: Agent | None = None
        self._variables = contextvars.copy_context()  # of `setup`; each call gets a copy
        self._runner = asyncio.Runner()
        self._loop: asyncio.AbstractEventLoop
        self._main_task: asyncio.Task[None]
        self._steps: deque[_Step | None] = deque()  # for the main task; None ends it
        self._new_step: asyncio.Future[None] | None = None  # for which the main task waits
        self._step: _Step | None = None  # that the main task awaits
        self._cancels = 0  # of that step, by `cancel`
        self._calls: deque[_Call] = deque()
        self._is_ending = False
        self._new_call: asyncio.Future[None] | None = None  # for which `serve` waits
        self._tasks: dict[Context, asyncio.Task[None]] = {}  # of overlapping calls
        self._threads = _Threads(concurrency)

    # -- in the agent's thread ---------------------------------------------------------------------------------------

    def __enter__(self) -> Life:
        """Make the agent and set it up; raises the agent's own errors."""
        self._loop = self._runner.get_loop()
        self._main_task = self._loop.create_task(self._run_steps())
        try:
            if self._is_class:
                with outside_rollouts():
                    self._agent = returned(self._call(self._source, self._variables))
                    self._call_method("setup")
            else:
                self._agent = self._source
        except BaseException:
            self._agent = None
            self._close_loop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        """Close an agent that was made here; an error is logged and changes nothing."""
        try:
            if self._is_class:
                with outside_rollouts():
                    self._call_method("close")
        except Exception:
            logger.exception("close() of the agent failed", extra=a_minute("close"))
        finally:
            self._agent = None  # collected in its own thread
            self._threads.close()
            self._close_loop()

    def run(self, context: Context) -> Result:
        """Call the agent for one rollout, now and in this thread."""
        return self._call(self._bound(context), self._variables_for(context), context)

    def serve(self) -> None:
        """Run the calls that other threads `begin`, until one of them calls `end`, or this life is over."""
        try:
            while not self._is_ending and not self._loop.is_closed():
                if self._calls:
                    self._serve_call(self._calls.popleft())
                else:
                    self._new_call = self._loop.create_future()
                    self._run_until(self._new_call)
        except BaseException:  # SystemExit in a background task of the agent
            self._set_over()
            raise

    def _serve_call(self, call: _Call) -> None:
        if not call.begin():
            return
        try:
            result = self.run(call.context)
        except BaseException as error:  # the loop was stopped
            call.end(None, error)
            raise
        call.end(*result)

    def _call_method(self, name: str) -> None:
        method = getattr(self._agent, name, None)
        if callable(method):
            returned(self._call(method, self._variables))

    def _call(
        self, function: Callable[[], Any], variables: contextvars.Context, context: Context | None = None
    ) -> Result:
        """Call a function of the agent, and await the awaitable that it returns."""
        target: Any = function
        if not self._loop.is_closed():
            asyncio.set_event_loop(self._loop)  # `asyncio.run` in the call before has unset it
        if not self._is_async:
            target, error = _result_of(functools.partial(variables.run, function))
            if error is not None or not inspect.isawaitable(target):
                return target, error
        if self._main_task.done() or self._loop.is_closed():
            return None, RuntimeError("the event loop of this agent was closed")
        step = _Step(target, variables, context, self._loop.create_future())
        self._add_step(step)
        try:
            return self._run_until(step.done)
        finally:
            if not step.done.done():  # Ctrl+C, or SystemExit in a background task of the agent
                self._set_over()
                self._main_task.cancel()
                self._run_until(self._loop.create_task(_wait_for_any([self._main_task, step.done])))

    def _run_until(self, future: asyncio.Future[T]) -> T:
        """Run the loop until its future is done, even if something else stops it meanwhile."""
        future.add_done_callback(self._stop_loop)
        try:
            while not future.done():
                self._loop.run_forever()
        finally:
            future.remove_done_callback(self._stop_loop)
        return future.result()

    def _stop_loop(self, future: asyncio.Future[Any]) -> None:
        self._loop.stop()

    def _add_step(self, step: _Step | None) -> None:
        """Queue a step for the main task; it runs when the loop does."""
        self._steps.append(step)
        _resolve(self._new_step)

    def _close_loop(self) -> None:
        if self._loop.is_closed():
            self._main_task._log_destroy_pending = False  # type: ignore[attr-defined]  # the agent closed the loop
            return
        self._add_step(None)
        self._run_until(self._loop.create_task(_wait_for_any([self._main_task])))
        self._runner.close()

    # -- on its loop -------------------------------------------------------------------------------------------------

    async def _run_steps(self) -> None:
        """The main task: await one step after the other."""
        task = asyncio.current_task()
        assert task is not None
        while True:
            while not self._steps:
                self._new_step = self._loop.create_future()
                try:
                    await self._new_step
                except asyncio.CancelledError:  # not by `cancel`, but by a task group that the agent entered here
                    self._set_over()
                    _clear_cancels(task)
            self._step = self._steps.popleft()
            if self._step is None:
                return
            if self._step.context is not None and self._step.context.cancelled:
                result = _discarded(self._step.target)
            else:
                result = await _run_with(_awaited(self._step.target), self._step.variables)
            done, self._step = self._step.done, None
            if task.cancelling() > self._cancels:
                self._set_over()
            self._cancels = 0
            _clear_cancels(task)
            done.set_result(result)
            del done, result  # they must not live while the task waits

    def _set_over(self) -> None:
        self.is_over = True
        self._end()

    def _end(self) -> None:
        self._is_ending = True
        _resolve(self._new_call)

    def _accept(self, call: _Call) -> None:
        if self._is_ending:
            return
        if not self._is_async:
            self._calls.append(call)
            _resolve(self._new_call)
            return
        call.on_begin()
        target, variables = self._bound(call.context), self._variables_for(call.context)
        if self._is_sequential:  # a step, for which the loop need not stop
            done: asyncio.Future[Result] = self._loop.create_future()
            done.add_done_callback(lambda done: call.end(*done.result()))
            self._add_step(_Step(target, variables, call.context, done))
        else:
            self._start_task(target, variables, call.context, call.on_end)

    def _variables_for(self, context: Context) -> contextvars.Context:
        variables = self._variables.copy()
        variables.run(context.enter)
        return variables

    def _bound(self, context: Context) -> Callable[[], Any]:
        """The agent with its arguments for one rollout."""
        agent = self._agent
        assert agent is not None
        return lambda: agent(context.rollout.input, context)

    def _start_task(
        self, target: Any, variables: contextvars.Context, context: Context, on_end: Callable[[Ending], None]
    ) -> None:
        """Await an overlapping call in a task of its own."""
        coroutine = self._run_task(target, context, on_end)
        self._tasks[context] = self._loop.create_task(coroutine, context=variables)

    async def _run_task(self, target: Any, context: Context, on_end: Callable[[Ending], None]) -> None:
        try:
            result = _discarded(target) if context.cancelled else (await _awaited(target), None)
        except BaseException as error:
            result = _failed(error)
        finally:
            del self._tasks[context]
        on_end(agents.ending_of(context, *result))

    def _cancel(self, context: Context) -> None:
        if self._step is not None and self._step.context is context:
            context.is_told = True
            self._cancels += 1
            self._main_task.cancel()
        elif context in self._tasks:  # `call_soon`: a task that is cancelled before its first step never runs
            context.is_told = True
            self._loop.call_soon(self._tasks[context].cancel)

    # -- in a thread of `_Threads` -----------------------------------------------------------------------------------

    def _run_in_thread(self, call: _Call) -> None:
        """Run an overlapping call of a plain agent; an awaitable that it returns is awaited on the loop."""
        if self._is_ending or not call.begin():
            return
        variables = self._variables_for(call.context)
        result, error = _result_of(functools.partial(variables.run, self._bound(call.context)))
        if error is not None or not inspect.isawaitable(result):
            call.end(result, error)
            return
        done: Future[Ending] = Future()
        try:
            self._loop.call_soon_threadsafe(self._start_task, result, variables, call.context, done.set_result)
        except RuntimeError as closed:
            _discarded(result)
            call.end(None, closed)
        else:
            call.on_end(done.result())

    # -- in any thread -----------------------------------------------------------------------------------------------

    def begin(self, context: Context, on_end: Callable[[Ending], None], on_begin: Callable[[], None]) -> None:
        """Ask for a call; `on_begin` and `on_end` are called on some thread when it begins and has ended.

        If this life is over, the call never begins; RuntimeError if that is known already.
        """
        call = _Call(context, on_end, on_begin)
        if self._is_sequential or self._is_async:
            self._loop.call_soon_threadsafe(self._accept, call)
        else:
            self._threads.submit(functools.partial(self._run_in_thread, call))

    def cancel(self, context: Context) -> None:
        """Cancel what a call awaits; its context says why. A call that awaits nothing goes on."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nothing is awaited
            self._loop.call_soon_threadsafe(self._cancel, context)

    def end(self) -> None:
        """Let `serve` return as soon as no call runs."""
        with contextlib.suppress(RuntimeError):  # it has returned
            self._loop.call_soon_threadsafe(self._end)


async def _wait_for_any(futures: list[asyncio.Future[Any]]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _resolve(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)


def _clear_cancels(task: asyncio.Task[Any]) -> None:
    """Forget the cancellations of a task, which were for a step that has ended."""
    while task.cancelling():
        task.uncancel()


def returned(result: Result) -> Any:
    """What a call returned; raises the error that it raised."""
    value, error = result
    if error is None:
        return value
    try:
        raise error
    finally:
        del result, error  # no cycle with the traceback


def _result_of(function: Callable[[], Any]) -> Result:
    try:
        return function(), None
    except BaseException as error:  # also SystemExit, which would end more than this call
        return _failed(error)


def _failed(error: BaseException) -> Result:
    """An error as a result, with a note if it was raised because this is not the main thread."""
    if threading.current_thread() is not threading.main_thread():
        for one in with_causes(error):
            if isinstance(one, (ValueError, RuntimeError)) and "main thread" in text_of(one):
                add_note(error, NEEDS_MAIN_THREAD)
                break
    return None, error


async def _awaited(target: Any) -> Any:
    """Call a target if it is a function, and await until the result is no awaitable."""
    result = target if inspect.isawaitable(target) else target()
    while inspect.isawaitable(result):
        result = await result
    return result


def _discarded(target: object) -> Result:
    """The result of a target that is not awaited, because its call was cancelled."""
    if inspect.iscoroutine(target):
        target.close()  # or Python warns that it was never awaited
    return None, asyncio.CancelledError()


@types.coroutine
def _run_with(coroutine: Coroutine[Any, Any, Any], variables: contextvars.Context) -> Generator[Any, Any, Result]:
    """Await a coroutine in the calling task, but with other context variables."""
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
        except GeneratorExit:  # the task itself is discarded
            variables.run(coroutine.close)
            raise
        except BaseException as error:
            step = functools.partial(coroutine.throw, error)


class _Threads:
    """Daemon threads for calls. The interpreter does not wait for them at exit, as it would for an executor's."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._started = 0
        self._idle = 0  # threads, minus functions that no thread has taken yet
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def submit(self, function: Callable[[], None]) -> None:
        """Run a function, which must not raise, in a thread."""
        with self._lock:
            starts = not self._idle and self._started < self._limit
            self._started += starts
            self._idle -= not starts
            name = f"raystore-agent-{self._started}"
        self._queue.put(function)
        if starts:
            threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        loop = asyncio.new_event_loop()  # for agents that call `get_event_loop`; they run it themselves
        while (function := self._queue.get()) is not None:
            if loop.is_closed():
                loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
            function()
            del function  # it must not live while the thread waits
            with self._lock:
                self._idle += 1
        loop.close()

    def close(self) -> None:
        """End each thread as soon as its function has returned."""
        for _ in range(self._started):
            self._queue.put(None)
