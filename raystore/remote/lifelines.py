"""Noticing that a client's process is gone, long before its silence would tell.

A session says which process it is. One on the store's own machine is looked for there; of another one Ray tells that
its node has ended, and breaks its lifeline when it ends: the answer that it never gets to a call whose result it owns,
and which the store waits for as well (`hold`). What Ray and the machine cannot tell, silence does.
A process that ended since its job did says nothing about what it ran: its driver was stopped. So before a session ends,
Ray is asked about its job; it tells of a driver's end a moment before or after it ends the others.
Not here: what the end of a session means (`raystore.core.claims`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ray

from raystore.core.claims import JOB_ENDED
from raystore.core.state import Session
from raystore.remote.processes import Process, here, is_gone, process_of
from raystore.service.service import Service

logger: logging.Logger = logging.getLogger("raystore.store")

LOOK_SECONDS = 1.0  #: between looks at the processes of sessions
AGAIN_SECONDS = 0.5  #: to the next look when a process is gone: by then Ray has told of its job
MISSED_SECONDS = 3.0  #: after a restart, in which whoever lives speaks to the store again
EARLY_SECONDS = 10.0  #: that a lifeline may be there without its session
GONE = "process gone"


class Cluster(NamedTuple):
    """What Ray says of a cluster."""

    nodes: dict[str, bool]  #: by id, whether they live; those that ended are known for a while
    jobs: dict[str, bool]  #: by id, whether they have ended


def ask_ray() -> Cluster:
    """What Ray says of this cluster now; blocks."""
    nodes = {str(node["NodeID"]): bool(node["Alive"]) for node in ray.nodes()}
    jobs = {str(job["JobID"]): bool(job["IsDead"]) for job in ray._private.state.state.job_table()}
    return Cluster(nodes, jobs)


class Watched(NamedTuple):
    """A process to look for."""

    session_id: str
    process: Process
    is_missed: bool  #: it was there before the store's process, and has not spoken since


class Lifelines:
    """Watches over the processes of all sessions of a store, on its loop."""

    def __init__(self, service: Service, ask: Callable[[], Cluster] = ask_ray) -> None:
        self._service = service
        self._ask = ask
        self._here = here()
        self._thread = ThreadPoolExecutor(1, "raystore-lifelines")
        self._started = service.clock.age()
        self._processes: dict[str, Process] = {}  # of live sessions
        self._of_before: set[str] = set()  # sessions that began with a process of the store before this one
        self._suspected: set[str] = set()  # sessions whose process was gone at the look before
        self._broken: set[str] = set()  # sessions of which Ray says that their process is gone
        self._held: dict[str, tuple[asyncio.Event, float]] = {}  # and since when
        self._hurry = asyncio.Event()
        self._is_idle = False
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin with the sessions that are there, of a process before this one."""
        for session in self._service.state.sessions.values():
            if session.ended_at is None:
                self.opened(session)
        self._of_before.update(self._processes)
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    def opened(self, session: Session) -> None:
        """A session has begun."""
        process = process_of(session.process)
        if process is None:
            return
        self._processes[session.session_id] = process
        if self._is_idle:
            self._hurry.set()

    def close(self) -> None:
        """Watch no longer."""
        if self._watching is not None:
            self._watching.cancel()
        self._thread.shutdown(wait=False)

    # -- lifelines that Ray breaks -----------------------------------------------------------------------------------

    async def linger(self, session_id: str) -> None:
        """A call that comes back when its session has ended: its caller owns the result, and lends it to `hold`."""
        over, _ = self._held.setdefault(session_id, (asyncio.Event(), self._service.clock.age()))
        await over.wait()

    async def hold(self, session_id: str, lifeline: Any) -> None:
        """Wait for the result of `linger`, which is lost when the process that owns it is gone."""
        try:
            await lifeline
        except ray.exceptions.OwnerDiedError:
            self._broken.add(session_id)
            self._hurry.set()
        except ray.exceptions.RayError:  # of our own end, say: it tells nothing of the session's process
            pass

    # -- looking -----------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._hurry.clear()
            watched = self._watched()
            try:
                if watched:
                    ended = await loop.run_in_executor(self._thread, self._look, watched)
                    self._service.end_sessions(ended)
                self._forget()
            except Exception:  # the others are still to be watched, and Ray may be asked again
                logger.exception("The processes of clients could not be looked for")
            seconds = EARLY_SECONDS if self._held else None
            if watched:
                seconds = AGAIN_SECONDS if self._suspected else LOOK_SECONDS
            self._is_idle = not watched
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._hurry.wait()

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
        """Sessions that have ended, and why; on a thread, since it reads files and may ask Ray."""
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
                elif session_id in self._suspected or session_id in self._broken:  # Ray took its time for that
                    ended.append((session_id, GONE))
        self._suspected = gone.keys() - {session_id for session_id, _ in ended}
        return ended

    def _is_gone(self, one: Watched, cluster: Cluster | None) -> bool:
        if one.session_id in self._broken:
            return True
        if self._is_here(one.process):
            is_gone_by_itself = is_gone(one.process)
        else:
            is_gone_by_itself = _is_node_gone(one.process, cluster)
        if is_gone_by_itself or not one.is_missed or cluster is None:
            return is_gone_by_itself
        return _is_node_gone(one.process, cluster) or _has_job_ended(one.process, cluster)

    def _is_here(self, process: Process) -> bool:
        return process.machine == self._here != ""

    def _forget(self) -> None:
        early = self._service.clock.age() - EARLY_SECONDS  # a lifeline may be there before its session
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
    """Whether the job of a process has ended, perhaps with its whole cluster, whose jobs were numbered alike."""
    if process.job is None or process.node is None:
        return False
    return process.node not in cluster.nodes or cluster.jobs.get(process.job, True)
