"""What happens in a process of its own for an agent: take a rollout, run the agent, send its spans and how it ended.

A span is sent when it ends, so that none is lost when the process is killed. The process belongs to one place of its
runner and runs one rollout after the other; an agent class has one instance in it. It is not connected to Ray.
Messages are pickles with their length in front.
Not here: how it is forked and killed (`nursery`), the runner's side (`forked`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, NoReturn

from raystore.runner import fork_server
from raystore.runner.agents import Ending
from raystore.runner.context import Context
from raystore.runner.life import Life
from raystore.runner.told import report, summary
from raystore.types import AttemptedRollout
from raystore.values import pickler

NURSERY_SECONDS = 2.0  #: that the nursery has to end this process, before it does so itself
LENGTH = struct.Struct("<Q")

# Messages to the process: a Setup first; a Run each time; CANCEL with rollout id, attempt id and why; CLOSE.
CANCEL, CLOSE = "cancel", "close"
# Messages from it.
READY, FAILED, STARTED, SPAN, LOST, DONE = "ready", "failed", "started", "span", "lost", "done"


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
    """One agent's process, whose main thread leads the agent's life."""

    def __init__(self, channel: _Channel) -> None:
        self._channel = channel
        self._context: Context | None = None
        self._resources: dict[str, Any] = {}
        self._worker_id = ""

    def work(self) -> None:
        setup: Setup = self._channel.receive()
        sys.path[:] = setup.path
        self._worker_id = setup.worker_id
        with contextlib.ExitStack() as stack:
            try:
                life = stack.enter_context(Life(pickler.loads_agent(setup.agent)))
            except BaseException as error:
                self._channel.send(FAILED, report(error))
                return
            self._channel.send(READY)
            threading.Thread(target=self._listen, args=[life], name="raystore-listen", daemon=True).start()
            life.serve()

    def _listen(self, life: Life) -> None:
        """Take messages while the agent works."""
        while True:
            try:
                message = self._channel.receive()
            except (EOFError, OSError):  # the runner is gone; the nursery ends this process, if it is there
                time.sleep(NURSERY_SECONDS)
                fork_server.kill_tree(os.getpid())
                return
            except Exception as error:
                why = f"the task or a resource cannot be opened in the agent's process: {summary(error)}"
                self._channel.send(DONE, Ending("failed", "infra", why))
                continue
            if isinstance(message, Run):
                if message.resources is not None:
                    self._resources = message.resources
                ours = (self._worker_id, self._send_span, self._send_loss)
                self._context = Context(message.rollout, self._resources, *ours)
                with contextlib.suppress(RuntimeError):  # the agent is over, and so is this process: it never begins
                    life.begin(self._context, self._settle, self._begun)
            elif message[0] == CLOSE:
                life.end()
            else:
                self._cancel(life, *message[1:])
            del message

    def _begun(self) -> None:
        self._channel.send(STARTED)

    def _send_span(self, span: Any) -> None:
        self._channel.send(SPAN, span)

    def _send_loss(self, *loss: str) -> None:
        with contextlib.suppress(OSError):  # the runner is gone
            self._channel.send(LOST, *loss)

    def _settle(self, ending: Ending) -> None:
        if self._context is not None:
            self._context.leave()
        self._context = None
        self._channel.send(DONE, ending)

    def _cancel(self, life: Life, rollout_id: str, attempt_id: str, why: str) -> None:
        context = self._context  # messages are in order: if it is another one, the rollout has ended
        if context is None or (context.rollout.rollout_id, context.attempt.attempt_id) != (rollout_id, attempt_id):
            return
        context.cancel(why)
        life.cancel(context)


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
