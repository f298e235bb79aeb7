"""What happens in a process of its own for an agent: take a rollout, run the agent, send its spans and how it ended.

A span is sent when it ends, so that none is lost when the process is killed. The process belongs to one place of its
runner and runs one rollout after the other; an agent class has one instance in it. It is not connected to Ray.
Messages are pickles with their length in front.
Not here: how it is forked and killed (`nursery`), the runner's side (`forked`).
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import pickle
import queue
import socket
import struct
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

from raystore import pickler
from raystore.runner import agents, nursery
from raystore.runner.agents import Ending
from raystore.runner.context import Context
from raystore.types import AttemptedRollout

NURSERY_SECONDS = 2.0  #: that the nursery has to end this process, before it does so itself
LENGTH = struct.Struct("<Q")

# Messages to the process: a Setup first; a Run each time; CANCEL with rollout id, attempt id and why; CLOSE.
CANCEL, CLOSE = "cancel", "close"
# Messages from it.
READY, FAILED, STARTED, SPAN, DONE = "ready", "failed", "started", "span", "done"


@dataclass(slots=True)
class Setup:
    """What a process is told once."""

    agent: bytes
    path: list[str]
    worker_id: str


@dataclass(slots=True)
class Run:
    """One rollout to run. `resources` is None if the version is that of the run before."""

    rollout: AttemptedRollout
    resources: dict[str, Any] | None


def pack(message: Any) -> bytes:
    """A message as it travels; by value, where the other side could not import a class."""
    data = pickler.dumps(message)
    return LENGTH.pack(len(data)) + data


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
        """The next message; EOFError if the runner is gone."""
        head = self._file.read(LENGTH.size)
        if len(head) < LENGTH.size:
            raise EOFError
        return pickle.loads(self._file.read(LENGTH.unpack(head)[0]))


class _Child:
    """One agent's process."""

    def __init__(self, channel: _Channel) -> None:
        self._channel = channel
        self._runs: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()  # over the three that follow
        self._context: Context | None = None
        self._task: asyncio.Task[Any] | None = None
        self._early: tuple[str, str, str] | None = None  # a cancel of a rollout that is not there yet
        self._resources: dict[str, Any] = {}

    def work(self) -> None:
        setup: Setup = self._channel.receive()
        sys.path[:] = setup.path
        try:
            agent = self._loop.run_until_complete(agents.load(pickler.loads_agent(setup.agent)))
        except BaseException as error:
            self._channel.send(FAILED, "".join(traceback.format_exception(error)))
            return
        self._channel.send(READY)
        threading.Thread(target=self._listen, name="raystore-listen", daemon=True).start()
        while (run := self._runs.get()) is not None:
            if run.resources is not None:
                self._resources = run.resources
            context = Context(run.rollout, self._resources, setup.worker_id, self._send_span)
            self._channel.send(STARTED)
            with self._lock:
                self._context = context
                if agent.is_async:
                    self._task = self._loop.create_task(agents.run_async(agent.call, context))
            if self._early is not None:
                self._cancel(*self._early)
            if self._task is not None:
                ending = self._ended(self._task)
            else:  # in the main thread, where an agent may do anything
                ending = contextvars.copy_context().run(agents.run_sync, agent.call, context)
            with self._lock:
                self._context = self._task = None
            self._channel.send(DONE, ending)
        self._loop.run_until_complete(agent.close())

    def _ended(self, task: asyncio.Task[Ending]) -> Ending:
        try:
            return self._loop.run_until_complete(task)
        except asyncio.CancelledError:  # before it had begun
            return Ending(None)

    def _send_span(self, span: Any) -> None:
        self._channel.send(SPAN, span)

    def _listen(self) -> None:
        """Take messages while the agent works."""
        while True:
            try:
                message = self._channel.receive()
            except (EOFError, OSError):  # the runner is gone; the nursery ends this process, if it is there
                time.sleep(NURSERY_SECONDS)
                nursery.kill_tree(os.getpid())
                return
            except Exception as error:
                why = f"the task or a resource cannot be opened in the agent's process: {type(error).__name__}: {error}"
                self._channel.send(DONE, Ending("failed", "infra", why))
                continue
            if isinstance(message, Run):
                self._runs.put(message)
            elif message[0] == CLOSE:
                self._runs.put(None)
            else:
                self._cancel(*message[1:])

    def _cancel(self, rollout_id: str, attempt_id: str, why: str) -> None:
        with self._lock:
            context, task = self._context, self._task
            if context is None or (context.rollout.rollout_id, context.attempt.attempt_id) != (rollout_id, attempt_id):
                self._early = (rollout_id, attempt_id, why)  # it has not begun yet, or has ended meanwhile
                return
            context.cancel(why)
        if task is not None:
            self._loop.call_soon_threadsafe(task.cancel)


def main(end: socket.socket) -> NoReturn:
    """Be an agent's process; does not return."""
    status = 1
    try:
        _Child(_Channel(end)).work()
        status = 0
    except (EOFError, OSError):
        pass  # the runner is gone
    except BaseException:
        logging.getLogger("raystore.runner").exception("An agent's process failed")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
