"""What happens in a process of its own for an agent: take a rollout, run the agent, send its spans and how it ended.

A span is sent when it ends, so that none is lost when the process is killed. The process belongs to one place of its
runner and runs one rollout after the other; an agent class has one instance in it. It is not connected to Ray.
Messages are pickles with their length in front.
Not here: how it is forked and killed (`nursery`), the runner's side (`forked`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import queue
import signal
import socket
import struct
import sys
import threading
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

from ray import cloudpickle

from raystore.runner import agents
from raystore.runner.context import Context
from raystore.types import AttemptedRollout

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
    data: bytes = cloudpickle.dumps(message)
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
        self._context: Context | None = None
        self._task: asyncio.Task[Any] | None = None
        self._resources: dict[str, Any] = {}

    def work(self) -> None:
        setup: Setup = self._channel.receive()
        sys.path[:] = setup.path
        try:
            agent = self._loop.run_until_complete(agents.load(cloudpickle.loads(setup.agent)))
        except BaseException as error:
            self._channel.send(FAILED, "".join(traceback.format_exception(error)))
            return
        self._channel.send(READY)
        threading.Thread(target=self._listen, name="raystore-listen", daemon=True).start()
        while (run := self._runs.get()) is not None:
            if run.resources is not None:
                self._resources = run.resources
            context = Context(run.rollout, self._resources, setup.worker_id, self._send_span)
            self._context = context
            self._channel.send(STARTED)
            if agents.is_async(agent):
                self._task = self._loop.create_task(agents.run_async(agent, context))
                ending = self._loop.run_until_complete(self._task)
            else:
                ending = agents.run_sync(agent, context)  # in the main thread, where an agent may do anything
            self._context = self._task = None
            self._channel.send(DONE, ending)
        self._loop.run_until_complete(agents.unload(agent))

    def _send_span(self, span: Any) -> None:
        self._channel.send(SPAN, span)

    def _listen(self) -> None:
        """Take messages while the agent works."""
        while True:
            try:
                message = self._channel.receive()
            except (EOFError, OSError):  # the runner and the nursery are gone: end with all that the agent started
                os.killpg(0, signal.SIGKILL)
                return
            if isinstance(message, Run):
                self._runs.put(message)
            elif message[0] == CLOSE:
                self._runs.put(None)
            else:
                self._cancel(*message[1:])

    def _cancel(self, rollout_id: str, attempt_id: str, why: str) -> None:
        context, task = self._context, self._task
        if context is None or (context.rollout.rollout_id, context.attempt.attempt_id) != (rollout_id, attempt_id):
            return  # it has ended meanwhile
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
