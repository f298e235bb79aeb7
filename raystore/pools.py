"""Pools whose runners do not come up, and who else asks for work: whether a call waits for what nobody will do.

A pool tells its store when its runners fail before they are ready, each time it has tried again, and when one is ready.
Known to the process of the store only, and told anew to the next one. Whoever asked for work of a queue, and lives,
serves it.
Not here: trying again (`runner.actors`), answering those who wait (`offers`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from raystore.core.lifecycle import ACTIVE
from raystore.core.state import State
from raystore.errors import PoolFailedError


@dataclass(slots=True, frozen=True)
class _Failed:
    """A pool that cannot work."""

    session_id: str
    queues: tuple[str, ...]
    failures: int
    error: str


class Pools:
    """What is known of the pools of one store."""

    def __init__(self) -> None:
        self._failed: dict[str, _Failed] = {}
        self._servers: dict[str, dict[str, None]] = {}  # sessions that asked for work, by queue
        self._served: dict[str, set[str]] = {}  # and the other way round

    def serves(self, session_id: str, queues: Iterable[str]) -> None:
        """A session has asked for work of these queues."""
        served = self._served.get(session_id)
        if served is None:
            served = self._served[session_id] = set()
        for queue in queues:
            if queue not in served:
                served.add(queue)
                self._servers.setdefault(queue, {})[session_id] = None

    def report(self, pool_id: str, session_id: str, queues: Iterable[str], failures: int, error: str | None) -> None:
        """A pool says that its runners fail, or (without an error) that one is ready."""
        if error is None:
            self._failed.pop(pool_id, None)
        else:
            self._failed[pool_id] = _Failed(session_id, tuple(queues), failures, error)

    def drop_session(self, session_id: str) -> None:
        """A process has ended, and what it served is served by it no more."""
        for queue in self._served.pop(session_id, ()):
            servers = self._servers[queue]
            del servers[session_id]
            if not servers:
                del self._servers[queue]
        if self._failed:
            self._failed = {name: pool for name, pool in self._failed.items() if pool.session_id != session_id}

    @property
    def have_failed(self) -> bool:
        """Whether there is a pool that cannot work."""
        return bool(self._failed)

    def why_never(self, state: State, rollout_ids: Iterable[str] | None = None) -> PoolFailedError | None:
        """Why none of these rollouts (of all, without them) will finish: all wait for pools that cannot work."""
        if not self._failed:
            return None
        if rollout_ids is None:
            if any(state.indexes.find(("status", status)) for status in ACTIVE):
                return None
            queues = {queue for queue, length in state.queues.lengths().items() if length}
        else:
            queues = set()
            for rollout_id in rollout_ids:
                if rollout_id not in state.queues:  # it runs, or is there no more
                    return None
                queues.add(state.entries[rollout_id].rollout.queue)
        if not queues or any(queue in self._servers for queue in queues):
            return None
        in_charge = [(name, pool) for name, pool in self._failed.items() if queues & {*pool.queues}]
        if not in_charge or not queues <= {queue for _, pool in in_charge for queue in pool.queues}:
            return None
        name, pool = in_charge[0]
        return PoolFailedError(name, pool.failures, sorted(queues), pool.error)
