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
from raystore.service import Service

logger = logging.getLogger("raystore.store")

LOOK_SECONDS = 1.0  #: between looks at the processes of sessions
AGAIN_SECONDS = 0.5  #: to the next look when a process is gone: by then Ray has told of its job
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


class Lifelines:
    """Watches over the processes of all sessions of a store, on its loop."""

    def __init__(self, service: Service, ask: Callable[[], Cluster] = ask_ray) -> None:
        self._service = service
        self._ask = ask
        self._here = here()
        self._thread = ThreadPoolExecutor(1, "raystore-lifelines")
        self._suspected: set[str] = set()  # sessions whose process was gone at the look before
        self._broken: set[str] = set()  # sessions of which Ray says that their process is gone
        self._held: dict[str, tuple[asyncio.Event, float]] = {}  # and since when
        self._hurry = asyncio.Event()
        self._is_idle = False
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin with the sessions that are there, of a process before this one."""
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    def opened(self, session: Session) -> None:
        """A session has begun."""
        if self._is_idle and session.process is not None:
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

    def _watched(self) -> list[tuple[str, Process]]:
        sessions = self._service.state.sessions.values()
        told = [(s.session_id, process_of(s.process)) for s in sessions if s.ended_at is None and s.process is not None]
        return [(session_id, process) for session_id, process in told if process is not None]

    def _look(self, watched: list[tuple[str, Process]]) -> list[tuple[str, str]]:
        """Sessions that have ended, and why; on a thread, since it reads files and may ask Ray."""
        cluster = None
        if any(not self._is_here(process) for _, process in watched):
            cluster = self._ask()
        gone = {
            session_id: process
            for session_id, process in watched
            if session_id in self._broken
            or (is_gone(process) if self._is_here(process) else _is_node_gone(process, cluster))
        }
        ended = []
        if gone:
            cluster = self._ask() if cluster is None else cluster
            for session_id, process in gone.items():
                if not process.is_driver and _has_job_ended(process, cluster):
                    ended.append((session_id, JOB_ENDED))
                elif session_id in self._suspected or session_id in self._broken:  # Ray took its time for that
                    ended.append((session_id, GONE))
        self._suspected = gone.keys() - {session_id for session_id, _ in ended}
        return ended

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
