"""The process of an agent: it takes rollouts from its runner, runs the agent, and sends spans and endings back.

A span is sent as soon as it ends, so that none is lost when the process is killed. The process belongs to one slot of
its runner and runs one rollout at a time; an agent class has one instance in it. It is not connected to Ray.
A message is a pickle with its length in front.
Not here: the runner's end of the socket (`process_agents`).
"""

from __future__ import annotations

import contextlib
import functools
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

from raystore.runner.agent_errors import report, summary
from raystore.runner.agents import Ending
from raystore.runner.context import Context
from raystore.runner.life import Life
from raystore.runner.process_tree import kill_tree
from raystore.types import AttemptedRollout
from raystore.values import pickler

KILL_SECONDS = 2.0  #: that the fork server has to kill this process when the runner is gone, before it kills itself
LENGTH = struct.Struct("<Q")

# Messages to the process: first a Setup, then a RunRequest for each rollout, (CANCEL, rollout id, attempt id, why) and
# (CLOSE,).
CANCEL, CLOSE = "cancel", "close"
# Messages from it, each a tuple with this kind first.
READY, FAILED, STARTED, SPAN, LOST, DONE = "ready", "failed", "started", "span", "lost", "done"


@dataclass(slots=True)
class Setup:
    """What a process needs before its first rollout."""

    agent: bytes
    path: list[str]  # `sys.path`
    worker_id: str


@dataclass(slots=True)
class RunRequest:
    """A rollout to run; `resources` is None if they are those of the rollout before."""

    rollout: AttemptedRollout
    resources: dict[str, Any] | None


def pack(message: object) -> bytes:
    """Encode a message; classes that the other end cannot import are pickled by value."""
    data = pickler.dumps(message)
    return LENGTH.pack(len(data)) + data


class _Channel:
    """The socket to the runner."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._file = end.makefile("rb")
        self._lock = threading.Lock()

    def send(self, *message: object) -> None:
        with self._lock:
            self._end.sendall(pack(message))

    def receive(self) -> Any:
        """The next message; raises EOFError if the runner is gone."""
        head = self._file.read(LENGTH.size)
        if len(head) < LENGTH.size:
            raise EOFError
        return pickle.loads(self._file.read(LENGTH.unpack(head)[0]))


class _AgentProcess:
    """Runs the agent in the main thread of this process, and reads messages in another one."""

    def __init__(self, channel: _Channel) -> None:
        self._channel = channel
        self._context: Context | None = None
        self._resources: dict[str, Any] = {}
        self._worker_id = ""

    def run(self) -> None:
        """Set the agent up and serve the runner until it closes the agent."""
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
            if isinstance(message, RunRequest):
                if message.resources is not None:
                    self._resources = message.resources
                sink = functools.partial(self._channel.send, SPAN)
                self._context = Context(message.rollout, self._resources, self._worker_id, sink, self._send_loss)
                with contextlib.suppress(RuntimeError):  # the agent is over, and this process about to exit
                    life.begin(self._context, self._on_end, functools.partial(self._channel.send, STARTED))
            elif message[0] == CLOSE:
                life.end()
            else:
                self._cancel(life, *message[1:])
            del message  # it must not live while the thread waits

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
        logging.getLogger("raystore.runner").exception("An agent's process failed")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
