"""A process that forks the processes in which agents run, kills them with their children, and says how they ended.

It has one thread and has imported what every agent needs, so a fork takes milliseconds; a runner's own process (Ray's
threads, an event loop) could not be forked safely. When its runner ends for whatever reason, it kills all that it has
forked, and ends. It is no child of the runner, since Ray kills the children of a worker that ends, before they could do
anything.
Protocol: a request is (operation, pid), with a socket for the agent's process if it is a fork; a reply is (pid,
status), where status is FORKED or what `os.waitpid` gave.
Not here: what happens in a forked process (`child`), asking for one (`forked`).
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import struct
from typing import NoReturn

import psutil

#: What an interpreter runs to become a nursery for the socket with this number.
PROGRAM = (
    "import os, sys; os.fork() and os._exit(0); "  # the runner waits for the parent; the child is nobody's child then
    "sys.path[:] = {path!r}; from raystore.runner import fork_server; fork_server.main({fd})"
)
REQUEST = struct.Struct("<cq")
REPLY = struct.Struct("<qq")
FORK, KILL = b"f", b"k"
FORKED = -1


def main(control_fd: int) -> NoReturn:
    """Serve the runner at the other end of this socket, until it is gone."""
    from raystore.runner import agent_process
    from raystore.values import pickler  # all that an agent's process needs, before the first fork

    pickler.prepare()
    control = socket.socket(fileno=control_fd)
    rung, bell = socket.socketpair()
    rung.setblocking(False)
    bell.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)
    children: set[int] = set()
    gc.collect()
    gc.freeze()  # pages that are never written stay shared
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(rung, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is rung:
                    with contextlib.suppress(BlockingIOError):
                        rung.recv(4096)
                    _reap(children, control)
                    continue
                operation, pid, end = _request(control)
                if operation == FORK and end is not None:
                    made = os.fork()
                    if made == 0:
                        selector.close()
                        _become(control, rung, bell)
                        agent_process.main(end)
                    end.close()
                    children.add(made)
                    _reply(control, made, FORKED)
                elif operation == KILL and pid in children:
                    kill_tree(pid)
                elif operation == b"":
                    for pid in children:
                        kill_tree(pid)
                    os._exit(0)  # which closes the socket, for a runner that waits


def _request(control: socket.socket) -> tuple[bytes, int, socket.socket | None]:
    """The next request; an empty operation if the runner is gone."""
    data, fds, _, _ = socket.recv_fds(control, REQUEST.size, 1)
    while data and len(data) < REQUEST.size:
        more = control.recv(REQUEST.size - len(data))
        data = data + more if more else b""
    if not data:
        return b"", 0, None
    operation, pid = REQUEST.unpack(data)
    return operation, pid, socket.socket(fileno=fds[0]) if fds else None


def _become(*inherited: socket.socket) -> None:
    """Turn a fork of this process into one of its own: session, signals, no sockets of the nursery."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for end in inherited:
        end.close()
    os.setsid()


def _reap(children: set[int], control: socket.socket) -> None:
    for pid in list(children):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            _kill_group(pid)  # what it left behind, while nobody else can have its id
            _, status = os.waitpid(pid, 0)
            children.discard(pid)
            _reply(control, pid, status)


def _reply(control: socket.socket, pid: int, status: int) -> None:
    with contextlib.suppress(OSError):  # the runner is gone: the next request will say so
        control.sendall(REPLY.pack(pid, status))


def kill_tree(pid: int) -> None:
    """End a process that leads its group, with everything that it started; also the calling process itself."""
    try:
        descendants = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        descendants = []
    for process in descendants:  # also those that left the group
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _kill_group(pid)


def _kill_group(pid: int) -> None:
    # PermissionError: the system's answer (of macOS) for a group of which only dead processes are left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # forked just now, and no leader of a group yet
        os.kill(pid, signal.SIGKILL)
