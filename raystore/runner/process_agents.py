"""Agents in processes of their own: `RunnerPool(isolation="process")`. A runner and its processes talk over sockets.

Each slot of the runner has a process, which runs one rollout at a time and stays for the next one. It is killed, with
everything that it started, when its agent was cancelled and the grace period is over; then another one is forked for
the next rollout. A process that ends by itself takes its own rollout with it and nothing else.

The process is not connected to Ray. It sends a span as soon as it ends, so that none is lost when it is killed. A
message is a pickle with its length in front. `ProcessAgents` is the runner's end, `main` the process's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, NoReturn

from raystore.errors import AgentProcessError, PayloadNotPicklableError
from raystore.errors.text import portable, report, summary
from raystore.reports.log import a_minute, logger_of
from raystore.runner.agents import Ending, retry_delays
from raystore.runner.context import Context, EndedError, Version, new_question
from raystore.runner.fork_server import Exit, ForkServer, kill_tree
from raystore.runner.life import Life
from raystore.types.contract import ObjectResource
from raystore.types.spans import Span
from raystore.values import pickler
from raystore.values.models import not_readable
from raystore.wire.convert import to_state

logger: logging.Logger = logger_of("raystore.runner")

CLOSE_SECONDS = 1.0  #: that an agent's `close` may take
LAST_MESSAGES_SECONDS = 0.2  #: that the last messages of a process that has ended may take to arrive
SINKS_KEPT = 64  #: rollouts of a process whose late spans are still accepted
KILL_SECONDS = 2.0  #: that the fork server has to kill a process whose runner is gone, before it kills itself
LENGTH = struct.Struct("<Q")

# Messages are tuples with a kind first. To the process: SETUP, with its agent, `sys.path` and worker id; then RUN, with
# a rollout, its resources (None: those of the rollout before) and the state that it goes on from, still encoded; then
# CANCEL, with rollout id, attempt id and why; and ANSWER, with the number of an ASK. The message after it is its
# answer and an error, one of which is None; if it cannot be read there, whoever asked is told.
SETUP, RUN, CANCEL, ANSWER, CLOSE = "setup", "run", "cancel", "answer", "close"
# Messages from it. ASK is one of the questions of `Context`, with a number and what `Ask` takes.
READY, FAILED, STARTED, SPAN, LOST, ASK, DONE = "ready", "failed", "started", "span", "lost", "ask", "done"


def pack(message: tuple[Any, ...]) -> bytes:
    """Encode a message; classes that the other end cannot import are pickled by value.

    Raises `PayloadNotPicklableError`, also for what was unpickled here.
    """
    try:
        data = pickler.dumps(message)
    except Exception as error:  # whatever a value's own `__reduce__` raises
        raise PayloadNotPicklableError("What an agent's process and its runner send", summary(error)) from error
    return LENGTH.pack(len(data)) + data


# -- the runner's end --------------------------------------------------------------------------------------------------


class _Process:
    """The process of one agent, seen from the runner."""

    def __init__(
        self, kill: Callable[[], None], exited: Exit, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.exited = exited
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._kill = kill
        self._is_killed = False
        self._reader = reader
        self._writer = writer
        self._has_started = False  # the rollout that was sent last
        self._done: asyncio.Future[Ending] | None = None
        self._sinks: dict[tuple[str, str], Callable[[Span], None]] = {}
        self._lose: Callable[..., None] = lambda *loss: None
        self._context: Context | None = None  # of the rollout that runs
        self._answering: set[asyncio.Task[None]] = set()  # questions of its agent
        self._version: tuple[str | None, int | None] | None = None  # of the resources that it has
        self._reading = asyncio.create_task(self._read())

    @property
    def is_usable(self) -> bool:
        """Whether it can take another rollout."""
        return not self._is_killed and not self.exited.done()

    async def run(self, context: Context) -> Ending | None:
        """Run the agent on one rollout; None if the process ended before the agent was called.

        Raises if the task or a resource cannot be had, or not be sent; then the process is as it was before.
        """
        version = (context.rollout.resources_id, context.attempt.resources_version)
        resources = None if version == self._version else await _all_without_references(context.resources)
        message = pack((RUN, context.rollout, resources, context.saved))
        self._sinks[context.rollout.rollout_id, context.attempt.attempt_id] = context.sink
        if len(self._sinks) > SINKS_KEPT:
            del self._sinks[next(iter(self._sinks))]
        self._lose = context.lose
        self._context = context
        self._version = version
        self._has_started = False
        done: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._done = done
        self._writer.write(message)
        del message, resources  # they may be large
        either: list[asyncio.Future[Any]] = [done, self.exited]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():  # unless a child of the agent holds the socket open, it closes after the last message
            await asyncio.wait([self._reading], timeout=LAST_MESSAGES_SECONDS)
        self._done = self._context = None
        if not self._has_started:
            self._version = None  # the resources may not have arrived
        if done.done():
            return done.result()
        if context.cancelled:
            return Ending(None)
        if not self._has_started:
            return None
        error = f"the agent's process {_exit_text(self.exited.result())}"
        return Ending("unresponsive", "runner_lost", error, place="isolation='process'", died=True)

    def send(self, *message: Any) -> None:
        """Send a message; if the process has ended, the message is lost and `exited` is set."""
        self._writer.write(pack(message))

    async def _read(self) -> None:
        try:
            while True:
                (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
                self._on_message(*pickle.loads(await self._reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception:  # a span of a class that cannot be imported here, for example
            logger.exception(
                "A message of an agent's process cannot be read; the process is killed",
                extra=a_minute("unread message"),
            )
            self.kill()
        finally:
            if not self.ready.done():
                self.ready.set_exception(AgentProcessError("it ended while the agent was set up"))

    def _on_message(self, kind: str, *values: Any) -> None:
        if kind == STARTED:
            self._has_started = True
            if self._context is not None:
                self._context.saved = None  # which the process has; it may be large
        elif kind == SPAN:
            (span,) = values
            if (sink := self._sinks.get((span.rollout_id, span.attempt_id))) is not None:
                sink(span)
            else:
                which = f"Span {span.name!r} of rollout {span.rollout_id}"
                self._lose("too_late", span.name, f"{which} ended long after its rollout, and is lost")
        elif kind == LOST:
            self._lose(*values)
        elif kind == ASK:
            self._on_question(*values)
        elif kind == DONE and self._done is not None:
            self._done.set_result(values[0])
        elif kind == READY:
            self.ready.set_result(None)
        elif kind == FAILED:
            self.ready.set_exception(AgentProcessError(*values))

    def _on_question(self, number: int, what: str, given: Any) -> None:
        if self._context is None:  # the rollout is over
            self.send(ANSWER, number)
            self.send(None, EndedError("the rollout is over"))
            return
        loop = asyncio.get_running_loop()

        def answer(asked: Future[Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._start_to_answer, number, asked)

        self._context.ask(what, given).add_done_callback(answer)

    def _start_to_answer(self, number: int, asked: Future[Any]) -> None:
        task = asyncio.create_task(self._answer(number, asked))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, number: int, asked: Future[Any]) -> None:
        try:
            answer = asked.result()
            if isinstance(answer, Version):
                answer = answer._replace(resources=await _all_without_references(answer.resources))
            message = pack((answer, None))
        except Exception as error:  # it was refused, or a resource cannot be had, or not be pickled again
            message = pack((None, portable(error)))
        self.send(ANSWER, number)
        self._writer.write(message)

    def kill(self) -> None:
        """Kill it with everything that it started."""
        self._is_killed = True
        self._kill()

    def close(self) -> None:
        """Close the socket; a process that still lives takes this for the end of its runner."""
        self._reading.cancel()
        self._writer.close()


class ProcessAgents:
    """Runs an agent up to `concurrency` times at once, each in a process of its own."""

    def __init__(self, agent: bytes, concurrency: int, worker_id: str) -> None:
        self._setup = (agent, list(sys.path), worker_id)
        self._concurrency = concurrency
        self._server: ForkServer | None = None  # None before `open` and after `close`
        self._idle: list[_Process] = []
        self._running: dict[Context, _Process] = {}
        self._cancelled: dict[Context, asyncio.Event] = {}

    async def open(self) -> None:
        self._server = ForkServer()
        first = await asyncio.gather(*(self._fork() for _ in range(self._concurrency)), return_exceptions=True)
        self._idle = [process for process in first if isinstance(process, _Process)]
        for error in first:
            if isinstance(error, BaseException):
                await self.close()
                raise error

    async def run(self, context: Context) -> Ending:
        self._cancelled[context] = asyncio.Event()
        try:
            while not context.cancelled:
                process = self._take_idle() or await self._fork_for(context)
                if process is None:
                    break
                self._running[context] = process
                try:
                    ending = await process.run(context)
                except asyncio.CancelledError:  # an error: nothing was sent to it
                    process.kill()
                    raise
                finally:
                    del self._running[context]
                    self._give_back(process)
                if ending is not None:
                    return ending
            return Ending(None)
        finally:
            del self._cancelled[context]

    def _take_idle(self) -> _Process | None:
        while self._idle:
            process = self._idle.pop()
            if process.is_usable:
                return process
            process.close()
        return None

    def _give_back(self, process: _Process) -> None:
        if process.is_usable and self._server is not None:
            self._idle.append(process)
        else:
            process.close()

    async def _fork_for(self, context: Context) -> _Process | None:
        """A new process for a rollout, after any number of tries; None if the rollout is cancelled first."""
        for delay in retry_delays():
            if context.cancelled:
                return None
            try:
                return await self._fork(context)
            except AgentProcessError as error:
                if context.cancelled or self._server is None:
                    return None
                logger.error(
                    "No process for an agent; trying again in %g s. %s", delay, error, extra=a_minute("no process")
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._cancelled[context].wait()
        return None

    def cancel(self, context: Context) -> None:
        if (cancelled := self._cancelled.get(context)) is not None:
            cancelled.set()
        if (process := self._running.get(context)) is not None:
            process.send(CANCEL, context.rollout.rollout_id, context.attempt.attempt_id, context.why)

    def kill(self, context: Context) -> None:
        if (process := self._running.get(context)) is not None:
            process.kill()

    abandon = kill

    async def _fork(self, context: Context | None = None) -> _Process:
        """A new process with its agent set up; if it is for a rollout, `kill` ends it also before that."""
        if self._server is None:
            raise AgentProcessError("the runner has ended")
        if self._server.has_ended:  # it was killed, and its processes ended with it
            self._server = ForkServer()
        server = self._server
        ours, theirs = socket.socketpair()
        pid, exited = await server.fork(theirs)
        process = _Process(lambda: server.kill(pid), exited, *await asyncio.open_connection(sock=ours))
        process.send(SETUP, *self._setup)
        if context is not None:
            self._running[context] = process
        try:
            await process.ready
        except BaseException:
            process.kill()
            process.close()
            raise
        finally:
            if context is not None:
                self._running.pop(context, None)
        return process

    async def close(self) -> None:
        idle, self._idle = [process for process in self._idle if process.is_usable], []
        for process in idle:
            process.send(CLOSE)
        if idle:
            await asyncio.wait([process.exited for process in idle], timeout=CLOSE_SECONDS)
        for process in idle:
            process.close()
        server, self._server = self._server, None
        if server is not None:
            await server.close()


async def _all_without_references(resources: Mapping[str, Any]) -> dict[str, Any]:
    return {name: await _without_references(resource) for name, resource in resources.items()}


async def _without_references(resource: Any) -> Any:
    """A resource as a process without Ray can use it: an object instead of a reference to it."""
    return ObjectResource(value=await resource.aget()) if isinstance(resource, ObjectResource) else resource


def _exit_text(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exited with status {code}" if code >= 0 else f"was killed by signal {-code} ({signal.Signals(-code).name})"


# -- the process's end -------------------------------------------------------------------------------------------------


class _Channel:
    """The socket to the runner."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._file = end.makefile("rb")
        self._lock = threading.Lock()

    def send(self, *message: Any) -> None:
        with self._lock:
            self._end.sendall(pack(message))

    def receive(self) -> Any:
        """The next message; raises EOFError if the runner is gone."""
        head = self._file.read(LENGTH.size)
        if len(head) < LENGTH.size:
            raise EOFError
        return pickle.loads(self._file.read(LENGTH.unpack(head)[0]))


class _AgentProcess:
    """The agent, in the main thread of this process; another thread reads the messages."""

    def __init__(self, channel: _Channel) -> None:
        self._channel = channel
        self._context: Context | None = None
        self._resources: dict[str, Any] = {}
        self._worker_id = ""
        self._asked: dict[int, Future[Any]] = {}  # questions to the runner, by number
        self._numbers = itertools.count()

    def run(self) -> None:
        """Set the agent up and serve the runner until it closes the agent."""
        _, agent, sys.path[:], self._worker_id = self._channel.receive()
        with contextlib.ExitStack() as stack:
            try:
                life = stack.enter_context(Life(pickler.loads_agent(agent)))
            except BaseException as error:
                self._channel.send(FAILED, report(error))
                return
            self._channel.send(READY)
            threading.Thread(target=self._read_messages, args=[life], name="raystore-listen", daemon=True).start()
            life.serve()

    def _read_messages(self, life: Life) -> None:
        while True:
            try:
                message = self._channel.receive()
            except (EOFError, OSError):  # the runner is gone
                time.sleep(KILL_SECONDS)
                kill_tree(os.getpid())  # the fork server is gone, too
                return
            except Exception as error:
                why = f"the task or a resource cannot be opened in the agent's process: {summary(error)}"
                self._channel.send(DONE, Ending("failed", "infra", why))
                continue
            self._on_message(life, *message)
            del message  # it must not live while the thread waits

    def _on_message(self, life: Life, kind: str, *values: Any) -> None:
        if kind == RUN:
            rollout, resources, encoded = values
            self._resources = self._resources if resources is None else resources
            sink = functools.partial(self._channel.send, SPAN)
            try:
                saved = None if encoded is None else to_state(encoded.payload, rollout.rollout_id)
            except Exception as error:
                self._channel.send(DONE, Ending("failed", "infra", summary(error)))
                return
            self._context = Context(
                rollout, self._resources, self._worker_id, sink, self._send_loss, saved=saved, ask=self._ask
            )
            with contextlib.suppress(RuntimeError):  # the agent is over, and this process about to exit
                life.begin(self._context, self._on_end, functools.partial(self._channel.send, STARTED))
        elif kind == CANCEL:
            self._cancel(life, *values)
        elif kind == ANSWER:
            (number,) = values
            asked = self._asked.pop(number)
            try:
                answer, refusal = self._channel.receive()
            except Exception as error:  # a value cannot be unpickled in this process; or the runner is gone
                answer, refusal = None, not_readable("runner's answer, the newest resources or an error,", error)
            if refusal is not None:
                asked.set_exception(refusal)
            else:
                asked.set_result(answer)
        elif kind == CLOSE:
            life.end()

    def _ask(self, what: str, given: Any) -> Future[Any]:
        number = next(self._numbers)
        asked = self._asked[number] = new_question()
        self._channel.send(ASK, number, what, given)
        return asked

    def _send_loss(self, *loss: str) -> None:
        with contextlib.suppress(OSError):  # the runner is gone
            self._channel.send(LOST, *loss)

    def _on_end(self, ending: Ending) -> None:
        if self._context is not None:
            self._context.leave()
        self._context = None
        self._channel.send(DONE, ending)

    def _cancel(self, life: Life, rollout_id: str, attempt_id: str, why: str) -> None:
        context = self._context  # messages are in order: if this is another rollout, the cancelled one has ended
        if context is None or (context.rollout.rollout_id, context.attempt.attempt_id) != (rollout_id, attempt_id):
            return
        context.cancel(why)
        life.cancel(context)


def main(end: socket.socket) -> NoReturn:
    """Be the process of an agent, with this socket to the runner; does not return."""
    status = 1
    try:
        _AgentProcess(_Channel(end)).run()
        status = 0
    except (EOFError, OSError):
        pass  # the runner is gone
    except BaseException:
        logger.exception("An agent's process failed")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
