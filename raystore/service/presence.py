"""Who is there to work: queues that nobody serves, pools whose runners do not come up, sessions that may be dead.

Known to the process of the store only, and told anew to the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from raystore.core.lifecycle import ACTIVE
from raystore.core.state import State
from raystore.errors import PoolFailedError

NO_QUEUES: frozenset[str] = frozenset()
UNSERVED_SECONDS = 30.0  #: that rollouts wait in a queue which nobody serves, before it is named
ASKED_AT_ONCE = 16  #: suspended sessions
PAUSE_SECONDS = 1.0  #: until the next ones are asked


@dataclass(slots=True, frozen=True)
class FailedPool:
    """A pool that cannot work."""

    session_id: str
    queues: tuple[str, ...]
    failures: int
    error: str


class Pools:
    """The pools of one store that cannot work, and who else asks for work.

    A pool tells its store when its runners fail before they are ready, each time it has tried again, and when one is
    ready. Whoever asked for work of a queue, and lives, serves it; a queue in which rollouts wait and that nobody
    serves is named after a while, once.
    """

    def __init__(self) -> None:
        self.failed: dict[str, FailedPool] = {}  #: by pool id
        self.servers: dict[str, dict[str, None]] = {}  #: sessions that asked for work, by queue; if there are any
        self.asked_by: dict[str, set[str]] = {}  #: queues that each session has asked for work of
        self._unserved: dict[str, float] = {}  # queues in which something waits, and since when
        self._named: set[str] = set()  # of these
        self.at: float | None = None  #: when the next is to be named, on the clock by which sessions age

    def asked(self, session_id: str, queues: Iterable[str]) -> None:
        """A session has asked for work of these queues."""
        served = self.asked_by.setdefault(session_id, set())
        for queue in queues:
            if queue not in served:
                served.add(queue)
                self.servers.setdefault(queue, {})[session_id] = None
                self._unserved.pop(queue, None)
                self._named.discard(queue)

    def report(self, pool_id: str, session_id: str, queues: Iterable[str], failures: int, error: str | None) -> None:
        """A pool says that its runners fail, or (without an error) that one is ready."""
        if error is None:
            self.failed.pop(pool_id, None)
        else:
            self.failed[pool_id] = FailedPool(session_id, tuple(queues), failures, error)

    def drop_session(self, session_id: str) -> list[str]:
        """A process has ended, and what it served is served by it no more; the queues that nobody serves now."""
        left = []
        for queue in self.asked_by.pop(session_id, ()):
            servers = self.servers[queue]
            del servers[session_id]
            if not servers:
                del self.servers[queue]
                left.append(queue)
        if self.failed:
            self.failed = {name: pool for name, pool in self.failed.items() if pool.session_id != session_id}
        return left

    def wait_in(self, queues: Iterable[str], age: float) -> None:
        """Rollouts wait in these queues."""
        for queue in queues:
            if queue not in self.servers and queue not in self._unserved:
                self._unserved[queue] = age
                if self.at is None:
                    self.at = age + UNSERVED_SECONDS

    def unserved(self, lengths: Mapping[str, int], age: float) -> dict[str, float]:
        """For how long each queue was served by nobody while rollouts waited in it."""
        return {queue: age - since for queue, since in self._unserved.items() if queue in lengths}

    def unserved_for(self, queue: str, age: float) -> float | None:
        """For how long a queue in which rollouts wait was served by nobody; None if somebody serves it."""
        since = self._unserved.get(queue)
        return None if since is None else age - since

    def to_name(self, lengths: Mapping[str, int], age: float) -> list[str]:
        """The queues that nobody has served for too long and that were not named yet."""
        self._unserved = {queue: since for queue, since in self._unserved.items() if queue in lengths}
        self._named.intersection_update(self._unserved)
        others = {queue: since for queue, since in self._unserved.items() if queue not in self._named}
        due = [queue for queue, since in others.items() if since + UNSERVED_SECONDS <= age]
        self._named.update(due)
        self.at = min((since + UNSERVED_SECONDS for queue, since in others.items() if queue not in due), default=None)
        return due

    @property
    def have_failed(self) -> bool:
        """Whether there is a pool that cannot work."""
        return bool(self.failed)

    def why_never(self, state: State, rollout_ids: Iterable[str] | None = None) -> PoolFailedError | None:
        """The error if all these rollouts (None: all) wait for pools that cannot work; None if one may finish."""
        if not self.failed:
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
        in_charge = list(map(self.failing, sorted(queues)))
        name = next(iter(in_charge), None)
        if name is None or None in in_charge:
            return None
        pool = self.failed[name]
        return PoolFailedError(name, pool.failures, sorted(queues), pool.error)

    def failing(self, queue: str) -> str | None:
        """The pool that a queue waits for, since nobody else serves it, and whose runners fail; None: there is none."""
        if queue in self.servers:
            return None
        return next((name for name, pool in self.failed.items() if queue in pool.queues), None)


class LivenessChecks:
    """The sessions that must show that they live before they are handed work, in the order in which they are asked.

    A claim that nobody acknowledged was perhaps handed to a dead process, and others may have died with it. So every
    session that waits for work is suspended until it speaks. Some are asked at once, the next ones a second later.
    """

    def __init__(self) -> None:
        self.suspended: dict[str, None] = {}  #: sessions that are handed nothing
        self.at: float | None = None  #: when the next sessions are to be asked, on the clock by which sessions age

    def suspend(self, session_ids: Iterable[str], age: float) -> None:
        """Hand nothing to these sessions until they have spoken."""
        self.suspended.update(dict.fromkeys(session_ids))
        self.at = age

    def ask_soon(self, age: float) -> None:
        """There is work for a suspended session: ask it, unless that is planned already."""
        if self.at is None:
            self.at = age

    def spoke(self, session_id: str) -> bool:
        """A session has spoken; whether it was suspended."""
        return self.suspended.pop(session_id, 0) is None

    def due(self, age: float, *, is_work_waiting: bool) -> list[str]:
        """Sessions to ask now; plans when to ask the next ones."""
        if self.at is None or age < self.at:
            return []
        asked = list(self.suspended)[:ASKED_AT_ONCE]
        for session_id in asked:  # to the end of the line
            del self.suspended[session_id]
            self.suspended[session_id] = None
        self.at = age + PAUSE_SECONDS if asked and is_work_waiting else None
        return asked
