"""Notices the end of a client's process long before the timeout of its session.

A session names its process. The store looks for a process of its own machine by itself. For any other process, Ray
reports the end of its node; and when the process ends, Ray breaks its *lifeline*: the result of a call that never
returns, which the process owns and the store waits for (`hold`). If neither helps, the session times out.

A process that ended because its job did is not to blame for the rollouts that it ran: its driver was stopped. So before
a session ends, Ray is asked about its job; Ray knows of a driver's end a moment before or after it ends the workers.

A process id alone does not identify a process: ids are used again, and each container has its own. So a process is
identified by its machine (the boot of its kernel, and its namespaces), its id, and its start time. If one of these is
unknown, the store does not look for it. A frozen process has not ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ray

from raystore.core.claims import JOB_ENDED
from raystore.core.state import Session
from raystore.reports.log import a_minute, logger_of
from raystore.service.service import Service

logger: logging.Logger = logger_of("raystore.store")

LOOK_SECONDS = 1.0  #: between two looks at the processes of sessions
AGAIN_SECONDS = 0.5  #: to the next look when a process is gone; then Ray knows whether its job has ended
MISSED_SECONDS = 3.0  #: after a restart of the store, in which every living client calls it again
EARLY_SECONDS = 10.0  #: that a lifeline may arrive before its session
GONE = "process gone"


# -- processes ---------------------------------------------------------------------------------------------------------


class Process(NamedTuple):
    """A process of a Ray cluster, as it describes itself."""

    node: str | None  #: id of its node
    machine: str  #: to which its id belongs, see `here`; empty if unknown
    pid: int
    started: int  #: in clock ticks since its machine started
    job: str | None  #: id of its job
    is_driver: bool  #: whether it is the driver of that job


def here() -> str:
    """The machine of this process: boot of the kernel, and namespaces. Empty if unknown."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # a /proc of another namespace
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        files = [f"/proc/self/ns/{name}" for name in ("pid", "time")]
        spaces = [os.stat(file).st_ino for file in files if os.path.exists(file)]
    except OSError:  # no Linux, or one that hides it
        return ""
    return f"{boot}/{'/'.join(map(str, spaces))}" if spaces else ""


def this_process() -> Process:
    """Who this process is."""
    pid = os.getpid()
    state = _look(pid)
    machine = here() if state is not None else ""
    node = job = None
    is_driver = False
    if ray.is_initialized():
        context = ray.get_runtime_context()
        node, job = context.get_node_id(), context.get_job_id()
        is_driver = context.worker.mode == ray.SCRIPT_MODE
    return Process(node, machine, pid, state[1] if state is not None else 0, job, is_driver)


def process_of(told: Any) -> Process | None:
    """The process that a peer describes; None if its description is invalid."""
    match told:
        case [str() | None, str(), int(), int(), str() | None, bool()]:
            return Process(*told)
    return None


def is_gone(process: Process) -> bool:
    """Whether a process of this machine has certainly ended."""
    state = _look(process.pid)
    if state is None:
        return not _exists(process.pid)  # processes of other users may be hidden
    status, started = state
    if started != process.started:
        return True  # another process has its id now
    return status in "ZX" and not _has_threads(process.pid)


def _look(pid: int) -> tuple[str, int] | None:
    """The status of a process and when it started; None if no such process is visible."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = text[text.rindex(b")") + 1 :].split()  # after the name, which may contain anything
    return fields[0].decode(), int(fields[19])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        pass
    return True


def _has_threads(pid: int) -> bool:
    """Whether a process goes on although its first thread has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


# -- watching ----------------------------------------------------------------------------------------------------------


class Cluster(NamedTuple):
    """The nodes and jobs of a cluster."""

    nodes: dict[str, bool]  #: by id, whether they live; Ray remembers nodes that ended for a while
    jobs: dict[str, bool]  #: by id, whether they have ended


def ask_ray() -> Cluster:
    """Ask Ray about this cluster; blocks."""
    nodes = {str(node["NodeID"]): bool(node["Alive"]) for node in ray.nodes()}
    jobs = {str(job["JobID"]): bool(job["IsDead"]) for job in ray._private.state.state.job_table()}
    return Cluster(nodes, jobs)


class Watched(NamedTuple):
    """A process to look for."""

    session_id: str
    process: Process
    is_missed: bool  #: its session is older than the store's process, which has not heard from it


class Lifelines:
    """Watches the processes of all sessions of a store, on its loop."""

    def __init__(self, service: Service, ask: Callable[[], Cluster] = ask_ray) -> None:
        self._service = service
        self._ask = ask
        self._here = here()
        self._thread = ThreadPoolExecutor(1, "raystore-lifelines")
        self._started = service.clock.age()
        self._processes: dict[str, Process] = {}  # of live sessions
        self._of_before: set[str] = set()  # sessions that began with an earlier process of the store
        self._suspected: set[str] = set()  # sessions whose process was gone at the look before
        self._broken: set[str] = set()  # sessions whose lifeline Ray has broken
        self._held: dict[str, tuple[asyncio.Event, float]] = {}  # by session: lets `linger` return; since when
        self._look_now = asyncio.Event()
        self._is_idle = False
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to watch, with the sessions of the store's earlier process."""
        for session in self._service.state.sessions.values():
            if session.ended_at is None:
                self.opened(session)
        self._of_before.update(self._processes)
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    def opened(self, session: Session) -> None:
        """Watch the process of a new session."""
        process = process_of(session.process)
        if process is None:
            return
        self._processes[session.session_id] = process
        if self._is_idle:
            self._look_now.set()

    def close(self) -> None:
        """Watch no longer."""
        if self._watching is not None:
            self._watching.cancel()
        self._thread.shutdown(wait=False)

    # -- lifelines that Ray breaks -----------------------------------------------------------------------------------

    async def linger(self, session_id: str) -> None:
        """Return when a session has ended. The caller owns the result, and lends it to `hold`."""
        over, _ = self._held.setdefault(session_id, (asyncio.Event(), self._service.clock.age()))
        await over.wait()

    async def hold(self, session_id: str, lifeline: Any) -> None:
        """Wait for the result of `linger`, which is lost when the process that owns it ends."""
        try:
            await lifeline
        except ray.exceptions.OwnerDiedError:
            self._broken.add(session_id)
            self._look_now.set()
        except ray.exceptions.RayError:  # it tells nothing about the session's process
            pass

    # -- looking -----------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._look_now.clear()
            watched = self._watched()
            try:
                if watched:
                    ended = await loop.run_in_executor(self._thread, self._look, watched)
                    self._service.end_sessions(ended)
                self._forget()
            except Exception:  # Ray may answer next time
                logger.exception("The processes of clients could not be looked for", extra=a_minute("lifelines"))
            seconds = EARLY_SECONDS if self._held else None
            if watched:
                seconds = AGAIN_SECONDS if self._suspected else LOOK_SECONDS
            self._is_idle = not watched
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._look_now.wait()

    def _watched(self) -> list[Watched]:
        sessions = self._service.state.sessions
        self._processes = {name: process for name, process in self._processes.items() if self._service.is_live(name)}
        missed: set[str] = set()
        if self._of_before and self._service.clock.age() > self._started + MISSED_SECONDS:
            self._of_before.intersection_update(self._processes)
            missed = {name for name in self._of_before if sessions[name].last_heard <= self._started}
            self._of_before = missed
        return [Watched(name, process, name in missed) for name, process in self._processes.items()]

    def _look(self, watched: list[Watched]) -> list[tuple[str, str]]:
        """Sessions whose process has ended, and why. Runs on a thread, since it reads files and may ask Ray."""
        cluster = None
        if any(one.is_missed or not self._is_here(one.process) for one in watched):
            cluster = self._ask()
        gone = {one.session_id: one for one in watched if self._is_gone(one, cluster)}
        ended = []
        if gone:
            cluster = self._ask() if cluster is None else cluster
            for session_id, one in gone.items():
                if not one.process.is_driver and _has_job_ended(one.process, cluster):
                    ended.append((session_id, JOB_ENDED))
                elif session_id in self._suspected or session_id in self._broken:  # Ray would know of its job's end
                    ended.append((session_id, GONE))
        self._suspected = gone.keys() - {session_id for session_id, _ in ended}
        return ended

    def _is_gone(self, one: Watched, cluster: Cluster | None) -> bool:
        if one.session_id in self._broken:
            return True
        if is_gone(one.process) if self._is_here(one.process) else _is_node_gone(one.process, cluster):
            return True
        if not one.is_missed or cluster is None:
            return False
        return _is_node_gone(one.process, cluster) or _has_job_ended(one.process, cluster)

    def _is_here(self, process: Process) -> bool:
        return process.machine == self._here != ""

    def _forget(self) -> None:
        """Forget lifelines of sessions that have ended."""
        early = self._service.clock.age() - EARLY_SECONDS
        over = [name for name, (_, since) in self._held.items() if since < early and not self._service.is_live(name)]
        for session_id in over:
            self._held.pop(session_id)[0].set()
        self._broken = {session_id for session_id in self._broken if self._service.is_live(session_id)}


def _is_node_gone(process: Process, cluster: Cluster | None) -> bool:
    """Whether the node of a process has ended, or belonged to a cluster that has."""
    if process.node is None or cluster is None or not any(cluster.nodes.values()):
        return False
    return not cluster.nodes.get(process.node, False)


def _has_job_ended(process: Process, cluster: Cluster) -> bool:
    """Whether the job of a process has ended, perhaps with its cluster (each cluster numbers its jobs alike)."""
    if process.job is None or process.node is None:
        return False
    return process.node not in cluster.nodes or cluster.jobs.get(process.job, True)
