"""Agents in processes of their own, on the runner's side: `RunnerPool(isolation="process")`.

Each place of the runner has a process, which stays for the next rollout; it is killed, with all that it started, when
its agent was told to stop and the grace period is over, and another one is forked for the next rollout. A process that
ends by itself takes its own rollout with it and nothing else.
Not here: forking and killing (`nursery`), the process itself (`child`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

from raystore.errors import AgentNotPicklableError, AgentProcessError
from raystore.runner import fork_server
from raystore.runner.agent_process import (
    CANCEL,
    CLOSE,
    DONE,
    FAILED,
    LENGTH,
    LOST,
    READY,
    SPAN,
    STARTED,
    Run,
    Setup,
    pack,
)
from raystore.runner.agents import RETRY_MOST_SECONDS, RETRY_SECONDS, Ending
from raystore.runner.context import Context
from raystore.spans import Span
from raystore.types import ObjectResource
from raystore.values import pickler

logger: logging.Logger = logging.getLogger("raystore.runner")

CLOSE_SECONDS = 1.0  #: that an agent's `close` may take
REMEMBERED = 64  #: rollouts of a process whose late spans still find their way


def pickled(agent: Any) -> bytes:
    """An agent as it is sent to another process; raises `AgentNotPicklableError`."""
    try:
        return pickler.dumps(agent)
    except Exception as error:
        raise AgentNotPicklableError(getattr(agent, "__name__", repr(agent)), str(error)) from error


class _Process:
    """One agent's process."""

    def __init__(
        self,
        kill: Callable[[], None],
        exited: asyncio.Future[int],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.exited = exited
        self._kill = kill
        self.killed = False
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader = reader
        self._writer = writer
        self._started = False
        self._done: asyncio.Future[Ending] | None = None
        self._sinks: dict[tuple[str, str], Callable[[Span], None]] = {}
        self._lose: Callable[..., None] = lambda *loss: None
        self._version: tuple[str | None, int | None] | None = None  # of the resources that it has
        self._reading = asyncio.create_task(self._read())

    @property
    def is_usable(self) -> bool:
        """Whether it can take another rollout."""
        return not self.killed and not self.exited.done()

    async def run(self, context: Context) -> Ending | None:
        """Run the agent on one rollout; an Ending also if the process dies of it, None if it died before."""
        self._sinks[context.rollout.rollout_id, context.attempt.attempt_id] = context.sink
        if len(self._sinks) > REMEMBERED:
            del self._sinks[next(iter(self._sinks))]
        self._lose = context.lose
        resources = None
        version = (context.rollout.resources_id, context.attempt.resources_version)
        if version != self._version:
            resources = {name: await _fetched(resource) for name, resource in context.resources.items()}
            self._version = version
        self._started = False
        done = self._done = asyncio.get_running_loop().create_future()
        self.tell(Run(context.rollout, resources))
        await asyncio.wait([done, self.exited], return_when=asyncio.FIRST_COMPLETED)
        if not done.done():  # what it said last is still on its way, unless something that it started keeps its socket
            await asyncio.wait([self._reading], timeout=0.2)
        self._done = None
        if not self._started:
            self._version = None  # they may not have arrived
        if done.done():
            ending: Ending = done.result()
            return ending
        if context.cancelled:
            return Ending(None)
        if not self._started:
            return None
        fate = f"the agent's process {_fate(self.exited.result())}"
        return Ending("unresponsive", "runner_lost", fate, place="isolation='process'", died=True)

    def tell(self, message: Any) -> None:
        """Send a message; to a process that has ended it is lost, which `exited` tells."""
        self._writer.write(pack(message))

    async def _read(self) -> None:
        try:
            while True:
                (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
                kind, *values = pickle.loads(await self._reader.readexactly(length))
                if kind == STARTED:
                    self._started = True
                elif kind == SPAN:
                    (span,) = values
                    if (sink := self._sinks.get((span.rollout_id, span.attempt_id))) is not None:
                        sink(span)
                    else:
                        whose = f"Span {span.name!r} of rollout {span.rollout_id}"
                        self._lose("too_late", span.name, f"{whose} ended long after its rollout, and is lost")
                elif kind == LOST:
                    self._lose(*values)
                elif kind == DONE and self._done is not None:
                    self._done.set_result(values[0])
                elif kind == READY:
                    self.ready.set_result(None)
                elif kind == FAILED:
                    self.ready.set_exception(AgentProcessError(*values))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception:  # a span of a class that cannot be imported here, say
            logger.exception("An agent's process says what cannot be understood; it is killed")
            self.kill()
        finally:
            if not self.ready.done():
                self.ready.set_exception(AgentProcessError("it ended while the agent was set up"))

    def kill(self) -> None:
        """Kill it, with all that it started."""
        self.killed = True
        self._kill()

    def close(self) -> None:
        """Listen to it no longer; if it still lives, it takes that for its end."""
        self._reading.cancel()
        self._writer.close()


class ForkedAgents:
    """Runs an agent up to `concurrency` times at once, each in a process of its own."""

    def __init__(self, agent: bytes, concurrency: int, worker_id: str) -> None:
        self._setup = Setup(agent, list(sys.path), worker_id)
        self._concurrency = concurrency
        self._nursery: _Nursery | None = None
        self._idle: list[_Process] = []
        self._running: dict[Context, _Process] = {}
        self._wanted: dict[Context, asyncio.Event] = {}  # set when the rollout is cancelled

    async def open(self) -> None:
        self._nursery = _Nursery()
        first = await asyncio.gather(*(self._fork() for _ in range(self._concurrency)), return_exceptions=True)
        self._idle = [made for made in first if isinstance(made, _Process)]
        for made in first:
            if isinstance(made, BaseException):
                await self.close()
                raise made

    async def run(self, context: Context) -> Ending:
        self._wanted[context] = asyncio.Event()
        try:
            while not context.cancelled:
                process = self._take_idle() or await self._fork_for(context)
                if process is None:
                    break
                self._running[context] = process
                try:
                    ending = await process.run(context)
                except BaseException:
                    process.kill()
                    raise
                finally:
                    del self._running[context]
                    self._put_back(process)
                if ending is not None:
                    return ending
            return Ending(None)
        finally:
            del self._wanted[context]

    def _take_idle(self) -> _Process | None:
        while self._idle:
            process = self._idle.pop()
            if process.is_usable:
                return process
            process.close()
        return None

    def _put_back(self, process: _Process) -> None:
        if process.is_usable and self._nursery is not None:
            self._idle.append(process)
        else:
            process.close()

    async def _fork_for(self, context: Context) -> _Process | None:
        """Another process for a rollout, however often that takes; None if the rollout is cancelled meanwhile."""
        delay = RETRY_SECONDS
        while not context.cancelled:
            try:
                return await self._fork(context)
            except AgentProcessError as error:
                if context.cancelled or self._nursery is None:
                    break
                logger.error("No process for an agent; trying again in %g s. %s", delay, error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._wanted[context].wait()
            delay = min(2 * delay, RETRY_MOST_SECONDS)
        return None

    def cancel(self, context: Context) -> None:
        if (wanted := self._wanted.get(context)) is not None:
            wanted.set()
        if (process := self._running.get(context)) is not None:
            process.tell((CANCEL, context.rollout.rollout_id, context.attempt.attempt_id, context.why))

    def kill(self, context: Context) -> None:
        if (process := self._running.get(context)) is not None:
            process.kill()

    abandon = kill

    async def _fork(self, context: Context | None = None) -> _Process:
        """Another process, with the agent set up in it; that of a rollout may be killed meanwhile."""
        if self._nursery is None:
            raise AgentProcessError("the runner has ended")
        if self._nursery.has_ended:  # killed by somebody, and its processes with it
            self._nursery = _Nursery()
        nursery = self._nursery
        ours, theirs = socket.socketpair()
        pid, exited = await nursery.fork(theirs)
        process = _Process(lambda: nursery.kill(pid), exited, *await asyncio.open_connection(sock=ours))
        process.tell(self._setup)
        if context is not None:
            self._running[context] = process
        try:
            await process.ready
        except BaseException:
            process.kill()
            process.close()
            raise
        finally:
            self._running.pop(context, None)  # type: ignore[arg-type]
        return process

    async def close(self) -> None:
        idle, self._idle = [process for process in self._idle if process.is_usable], []
        for process in idle:
            process.tell((CLOSE,))
        if idle:
            await asyncio.wait([process.exited for process in idle], timeout=CLOSE_SECONDS)
        for process in idle:
            process.close()
        nursery, self._nursery = self._nursery, None
        if nursery is not None:
            await nursery.close()


class _Nursery:
    """The process that forks and kills the others, asked over a socket."""

    def __init__(self) -> None:
        self.has_ended = False
        self._control, theirs = socket.socketpair()
        self._control.setblocking(False)
        # A session of its own: Ctrl+C is for the driver, and the runner says when to end.
        starter = subprocess.Popen(
            [sys.executable, "-c", fork_server.PROGRAM.format(path=sys.path, fd=theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | _ray_of_agents(),
        )
        self._starting = asyncio.create_task(asyncio.to_thread(starter.wait))
        theirs.close()
        self._forking: deque[asyncio.Future[tuple[int, asyncio.Future[int]]]] = deque()
        self._exits: dict[int, asyncio.Future[int]] = {}
        self._listening = asyncio.create_task(self._listen())

    async def fork(self, end: socket.socket) -> tuple[int, asyncio.Future[int]]:
        """Fork a process with this socket: its id, and a future of its exit status."""
        forked: asyncio.Future[tuple[int, asyncio.Future[int]]] = asyncio.get_running_loop().create_future()
        with end:
            try:
                socket.send_fds(self._control, [fork_server.REQUEST.pack(fork_server.FORK, 0)], [end.fileno()])
            except OSError as error:
                raise AgentProcessError(f"the process that forks agents cannot be asked: {error}") from error
            self._forking.append(forked)
        return await forked

    def kill(self, pid: int) -> None:
        """Kill a process with all that it started."""
        with contextlib.suppress(OSError):  # the nursery has ended, and so have they
            self._control.send(fork_server.REQUEST.pack(fork_server.KILL, pid))

    async def _listen(self) -> None:
        """Take what it says."""
        loop = asyncio.get_running_loop()
        pending = b""
        with contextlib.suppress(ConnectionError):
            while data := await loop.sock_recv(self._control, 4096):
                pending += data
                while len(pending) >= fork_server.REPLY.size:
                    pid, status = fork_server.REPLY.unpack_from(pending)
                    pending = pending[fork_server.REPLY.size :]
                    if status == fork_server.FORKED:
                        exited = self._exits[pid] = loop.create_future()
                        self._forking.popleft().set_result((pid, exited))
                    else:
                        self._exits.pop(pid).set_result(status)
        self.has_ended = True
        for forked in self._forking:
            forked.set_exception(AgentProcessError("the process that forks agents has ended"))
        for exited in self._exits.values():
            exited.set_result(signal.SIGKILL)

    async def close(self) -> None:
        """End it, with all that it forked."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        await self._starting
        await asyncio.wait([self._listening], timeout=CLOSE_SECONDS)  # it closes its end when it has killed them
        self._listening.cancel()
        self._control.close()


def _ray_of_agents() -> dict[str, str]:
    """What makes Ray in an agent's process join the cluster of its runner, and never start another one unasked."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    if os.environ.get("RAY_ADDRESS", "local") == "local":
        return {"RAY_ENABLE_AUTO_CONNECT": "0"}  # an agent may still call ray.init()
    return {}


async def _fetched(resource: Any) -> Any:
    """A resource as a process without Ray can use it: an object instead of a reference to it."""
    return ObjectResource(value=await resource.aget()) if isinstance(resource, ObjectResource) else resource


def _fate(status: int) -> str:
    """How a process ended, for people."""
    code = os.waitstatus_to_exitcode(status)
    return f"exited with status {code}" if code >= 0 else f"was killed by signal {-code} ({signal.Signals(-code).name})"
