"""The fork server: a process that forks the processes of agents, kills them with their children and reports exits.

It has one thread and has imported all that an agent needs, so a fork is safe and takes milliseconds; the runner's own
process has an event loop and Ray's threads. When its runner ends, the server kills every process that it forked, and
ends. It is not a child of the runner, because Ray kills the children of a worker that ends.

`ForkServer` is the runner's end, `main` the server's. A request is (operation, pid), and a FORK also carries the socket
of the new process. A reply is (pid, status), where the status is FORKED or the result of `os.waitpid`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from typing import NoReturn

import psutil

from raystore.errors import AgentProcessError
from raystore.values import pickler

#: What the server's interpreter runs. It forks and its parent exits, so the server is no child of the runner.
PROGRAM = (
    "import os, sys; os.fork() and os._exit(0); sys.path[:] = {path!r}; "
    "from raystore.runner import fork_server, process_agents; fork_server.main({fd}, process_agents.main)"
)
REQUEST = struct.Struct("<cq")
REPLY = struct.Struct("<qq")
FORK, KILL = b"f", b"k"
FORKED = -1
CLOSE_SECONDS = 1.0  #: that the server may take to end

Exit = asyncio.Future[int]  # of a process: its status, as `os.waitpid` gives it


def kill_tree(pid: int) -> None:
    """Kill the leader of a process group and all its descendants; it may be the calling process."""
    try:
        descendants = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        descendants = []
    for process in descendants:  # some may have left the group
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    kill_group(pid)


def kill_group(pid: int) -> None:
    """Kill a process and the group that it leads."""
    # macOS answers PermissionError for a group in which all processes have ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # a fork that has not become the leader of its group yet
        os.kill(pid, signal.SIGKILL)


# -- the runner's end --------------------------------------------------------------------------------------------------


class ForkServer:
    """Starts a fork server and sends it requests; on the runner's event loop."""

    def __init__(self) -> None:
        self.has_ended: bool = False
        self._control, theirs = socket.socketpair()
        self._control.setblocking(False)
        starter = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(path=sys.path, fd=theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl+C is for the driver; the runner decides when to end
            env=os.environ | _ray_environment(),
        )
        self._starting = asyncio.create_task(asyncio.to_thread(starter.wait))
        theirs.close()
        self._forking: deque[asyncio.Future[tuple[int, Exit]]] = deque()
        self._exits: dict[int, Exit] = {}
        self._reading = asyncio.create_task(self._read_replies())

    async def fork(self, end: socket.socket) -> tuple[int, Exit]:
        """Fork a process that gets this socket; returns its pid and its exit."""
        forked: asyncio.Future[tuple[int, Exit]] = asyncio.get_running_loop().create_future()
        with end:
            try:
                socket.send_fds(self._control, [REQUEST.pack(FORK, 0)], [end.fileno()])
            except OSError as error:
                raise AgentProcessError(f"the fork server cannot be reached: {error}") from error
            self._forking.append(forked)
        return await forked

    def kill(self, pid: int) -> None:
        """Kill a forked process with everything that it started."""
        with contextlib.suppress(OSError):  # the server has ended, and has killed its processes
            self._control.send(REQUEST.pack(KILL, pid))

    async def _read_replies(self) -> None:
        loop = asyncio.get_running_loop()
        pending = b""
        with contextlib.suppress(ConnectionError):
            while data := await loop.sock_recv(self._control, 4096):
                pending += data
                while len(pending) >= REPLY.size:
                    pid, status = REPLY.unpack_from(pending)
                    pending = pending[REPLY.size :]
                    if status == FORKED:
                        exited = self._exits[pid] = loop.create_future()
                        self._forking.popleft().set_result((pid, exited))
                    else:
                        self._exits.pop(pid).set_result(status)
        self.has_ended = True
        for forked in self._forking:
            forked.set_exception(AgentProcessError("the fork server has ended"))
        for exited in self._exits.values():
            exited.set_result(signal.SIGKILL)

    async def close(self) -> None:
        """End the server and every process that it forked."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        await self._starting
        await asyncio.wait([self._reading], timeout=CLOSE_SECONDS)  # the server closes its end after it killed them
        self._reading.cancel()
        self._control.close()


def _ray_environment() -> dict[str, str]:
    """Variables that make Ray in an agent's process join its runner's cluster, and never start one by itself."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    if os.environ.get("RAY_ADDRESS", "local") == "local":
        return {"RAY_ENABLE_AUTO_CONNECT": "0"}  # an agent may still call ray.init()
    return {}


# -- the server's end --------------------------------------------------------------------------------------------------


def main(control_fd: int, agent_main: Callable[[socket.socket], NoReturn]) -> NoReturn:
    """Serve the runner at the other end of a socket until it is gone; a forked process calls `agent_main`."""
    pickler.prepare()  # before the first fork, as all imports
    control = socket.socket(fileno=control_fd)
    child_ended, wakeup = socket.socketpair()
    child_ended.setblocking(False)
    wakeup.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    children: set[int] = set()
    gc.collect()
    gc.freeze()  # so that forks share the memory pages
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(child_ended, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is child_ended:
                    with contextlib.suppress(BlockingIOError):
                        child_ended.recv(4096)
                    _reap(children, control)
                    continue
                operation, pid, end = _receive_request(control)
                if operation == FORK and end is not None:
                    forked = os.fork()
                    if forked == 0:
                        selector.close()
                        _become_agent_process(control, child_ended, wakeup)
                        agent_main(end)
                    end.close()
                    children.add(forked)
                    _reply(control, forked, FORKED)
                elif operation == KILL and pid in children:
                    kill_tree(pid)
                elif operation == b"":
                    for pid in children:
                        kill_tree(pid)
                    os._exit(0)  # closes the socket, for which the runner may wait


def _receive_request(control: socket.socket) -> tuple[bytes, int, socket.socket | None]:
    """The next request; its operation is empty if the runner is gone."""
    data, fds, _, _ = socket.recv_fds(control, REQUEST.size, 1)
    while data and len(data) < REQUEST.size:
        more = control.recv(REQUEST.size - len(data))
        data = data + more if more else b""
    if not data:
        return b"", 0, None
    operation, pid = REQUEST.unpack(data)
    return operation, pid, socket.socket(fileno=fds[0]) if fds else None


def _become_agent_process(*inherited: socket.socket) -> None:
    """Give a fork its own session and default signals, and close the server's sockets in it."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for end in inherited:
        end.close()
    os.setsid()


def _reap(children: set[int], control: socket.socket) -> None:
    """Collect the children that have ended, and report them."""
    for pid in list(children):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            kill_group(pid)  # before `waitpid`: until then no other process can have this pid
            _, status = os.waitpid(pid, 0)
            children.discard(pid)
            _reply(control, pid, status)


def _reply(control: socket.socket, pid: int, status: int) -> None:
    with contextlib.suppress(OSError):  # the runner is gone, as the next request will show
        control.sendall(REPLY.pack(pid, status))
