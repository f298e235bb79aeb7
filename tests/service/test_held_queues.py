"""Paused and limited queues of a store that runs: sessions that die, the alarm, the log, and any history."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator
from typing import Any

import pytest

from raystore.core import gates as core_gates
from raystore.core.check import check
from raystore.core.state import Session
from raystore.remote import session
from raystore.service.clock import ManualClock, NoAlarm
from raystore.service.parking import PARKED
from raystore.service.service import Service
from raystore.types.options import StoreConfig
from tests.conftest import MakeMemoryStore
from tests.helpers import present, until
from tests.service.near import NearStore
from tests.service.test_sessions import DEQUEUE, ENQUEUE

ALL: dict[str, Any] = {"queues": None, "keep": False}


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> Iterator[NearStore]:
    """A store in this process, behind its protocol."""
    monkeypatch.setattr(session, "ray_connection", lambda: ("here", "me"))
    store = NearStore()
    yield store
    store.close()


@pytest.mark.parametrize("how", ["close", "reported", "process gone"])
async def test_a_session_that_ends_ends_its_pause(near: NearStore, how: str) -> None:
    """A dequeue that another process has parked is answered at once."""
    pauses, works = near.connect(), near.connect()
    ((_, session_id, _, _),) = await pauses.call("pause_queues", ALL)
    await works.call("enqueue", ENQUEUE)
    waiting = asyncio.ensure_future(works.call("dequeue", {**DEQUEUE, "timeout": 600.0}))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    if how == "close":
        pauses.close()
    elif how == "reported":
        assert await works.call("report_session", {"session_id": session_id})
    else:
        near.service.end_sessions([(session_id, how)])
    assert len(await asyncio.wait_for(waiting, 20)) == 1
    assert (await works.call("statistics", {}))["paused"] == []


async def test_a_kept_pause_outlives_its_session(near: NearStore) -> None:
    """Until another one resumes it."""
    pauses, works = near.connect(), near.connect()
    await works.call("enqueue", ENQUEUE)
    await pauses.call("pause_queues", ALL | {"keep": True})
    pauses.close()

    async def has_ended() -> bool:
        return bool((await works.call("statistics", {}))["sessions"] == 1)

    await until(has_ended)
    assert await works.call("dequeue", DEQUEUE) == []
    assert await works.call("resume_queues", {"queues": None, "others": False}) == []
    assert len(await works.call("dequeue", DEQUEUE)) == 1


async def test_a_process_that_pauses_is_not_silent(near: NearStore) -> None:
    """It keeps a listen call parked as long as it pauses something, so that its pause does not end by silence."""
    pauses = near.connect()
    await pauses.call("enqueue", ENQUEUE)
    (served,) = (one for name, one in near.endpoint._sessions.items() if name != "local")
    assert served._listener is None
    await pauses.call("pause_queues", ALL)

    async def listens() -> bool:
        return served._listener is not None

    await until(listens)
    await pauses.call("resume_queues", {"queues": None, "others": False})


async def test_the_alarm_rings_when_the_rate_allows_more(
    make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody calls meanwhile."""
    monkeypatch.setattr(core_gates, "RATE_SECONDS", 0.3)
    store = make_memory_store()
    await store.limit_queue("default", per_minute=1)
    for number in range(3):
        await store.enqueue_rollout(number)
    started = asyncio.get_running_loop().time()
    got = [present(await store.dequeue_rollout(timeout=20)).input for _ in range(3)]
    assert got == [0, 1, 2]
    assert asyncio.get_running_loop().time() - started > 0.6


async def test_the_log_says_who_paused_and_resumed_what(
    make_memory_store: MakeMemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    """One line for each decision that changed something, at INFO."""
    store = make_memory_store()
    with caplog.at_level(logging.INFO, "raystore.store"):
        await store.pause(["a", "b"])
        await store.pause(["a"])
        await store.pause(keep=True)
        await store.resume(["a"])
        await store.resume()
        await store.resume()
        await store.limit_queue("a", max_running=2, per_minute=30)
        await store.limit_queue("a", max_running=2, per_minute=30)
        await store.limit_queue("a")
    assert [record.getMessage() for record in caplog.records] == [
        "Paused queues 'a', 'b', by session 'local', until that session resumes it or ends",
        "Paused all queues, by session 'local', until it is resumed",
        "Resumed queue 'a', by session 'local'",
        "Resumed all queues, by session 'local'",
        "Queue 'a' has max_running=2 and per_minute=30 now, by session 'local'",
        "Queue 'a' has no limits now, by session 'local'",
    ]
    assert {record.levelno for record in caplog.records} == {logging.INFO}


# -- any history -------------------------------------------------------------------------------------------------------

QUEUES = ("a", "b")


class History:
    """Sessions that claim, park, pause, limit and die, against lists of what was handed out and who paused what."""

    def __init__(self, seed: int) -> None:
        self.lots = random.Random(seed)
        self.service = Service(StoreConfig(clock="manual"), capacity_bytes=2**33, alarm=NoAlarm)
        self.made = 0
        self.sessions: list[Session] = []
        for _ in range(3):
            self._open()
        self.tickets = 0
        self.parked: dict[int, tuple[Session, list[str]]] = {}
        self.pauses: set[tuple[str | None, str]] = set()  # queue or None, session or ""
        self.limits: dict[str, tuple[int | None, int | None]] = {}
        self.claims: list[tuple[str, float]] = []  # queue and time of each that a rate counts
        self.mine: list[tuple[Session, str, str]] = []

    def _open(self) -> None:
        self.made += 1
        self.sessions.append(self.service.open_session(f"s{self.made}"))

    def _call(self, given: Session, verb: str, **arguments: Any) -> Any:
        self.tickets += 1
        return self.service.call(given, self.tickets, verb, arguments, self._deliver)

    def _deliver(self, ticket: int, value: Any) -> bool:
        given, _ = self.parked.pop(ticket)
        self._handed(given, value)
        return True

    def _handed(self, given: Session, claimed: Any) -> None:
        """Nothing is handed out of a paused queue, or beyond a limit."""
        now = self.service.clock.now()
        for rollout, attempt, _ in claimed:
            queue = rollout.queue
            assert not any(name in (None, queue) for name, _ in self.pauses), "handed out of a paused queue"
            most, rate = self.limits.get(queue, (None, None))
            self.claims.append((queue, now))
            assert most is None or self._running(queue) <= most, "more run than may"
            recent = [at for name, at in self.claims if name == queue and at >= now - 60]
            assert rate is None or len(recent) <= rate, "more were claimed in a minute than may"
            given.claims.pop((rollout.rollout_id, attempt.attempt_id))  # as if acknowledged
            given.held[rollout.rollout_id, attempt.attempt_id] = None
            self.mine.append((given, rollout.rollout_id, attempt.attempt_id))

    def _running(self, queue: str) -> int:
        entries = self.service.state.entries.values()
        return sum(e.rollout.queue == queue and e.rollout.status in ("preparing", "running") for e in entries)

    # -- what may happen ---------------------------------------------------------------------------------------------

    def enqueue(self, given: Session) -> None:
        config = [50.0, None, 3, ["timeout", "failed"]]
        request = {"input": b"\x01\xc0", "metadata": None, "queue": self.lots.choice(QUEUES), "config": config}
        self._call(given, "enqueue", requests=[request] * self.lots.randint(1, 3))

    def dequeue(self, given: Session) -> None:
        queues = self.lots.choice([["a"], ["b"], ["a", "b"], ["b", "a"]])
        self.parked[self.tickets + 1] = (given, queues)
        timeout = self.lots.choice([0.0, 1e9, 1e9])
        answer = self._call(
            given, "dequeue", queues=queues, limit=self.lots.randint(1, 3), worker_id=None, timeout=timeout
        )
        if answer is not PARKED:
            del self.parked[self.tickets]
            self._handed(given, answer)

    def report(self, given: Session) -> None:
        if self.mine:
            holder, rollout_id, attempt_id = self.mine.pop(self.lots.randrange(len(self.mine)))
            if any(a.attempt_id == attempt_id for a in self.service.state.entries[rollout_id].attempts):
                changes = {"status": self.lots.choice(["running", "succeeded", "failed", "unresponsive"])}
                self._call(holder, "update_attempt", rollout_id=rollout_id, attempt_id=attempt_id, changes=changes)

    def update_rollout(self, given: Session) -> None:
        if self.service.state.entries:
            rollout_id = self.lots.choice(list(self.service.state.entries))
            changes = {"status": self.lots.choice(["queuing", "running", "succeeded", "cancelled"])}
            self._call(given, "update_rollout", rollout_id=rollout_id, changes=changes)

    def pause(self, given: Session) -> None:
        queues: list[str] | None = self.lots.choice([None, ["a"], ["b"]])
        keep = self.lots.random() < 0.3
        self._call(given, "pause_queues", queues=queues, keep=keep)
        named: list[str | None] = [None] if queues is None else [*queues]
        for name in named:
            if keep:
                self.pauses.discard((name, given.session_id))
            self.pauses.add((name, "" if keep else given.session_id))

    def resume(self, given: Session) -> None:
        queues, others = self.lots.choice([None, None, ["a"], ["b"]]), self.lots.random() < 0.6
        self.pauses = {
            (name, whose) for name, whose in self.pauses
            if not ((queues is None or name in queues) and (others or whose in ("", given.session_id)))
        }  # fmt: skip
        left = self._call(given, "resume_queues", queues=queues, others=others)
        assert {(row[0], "" if row[3] else row[1]) for row in left} == self.pauses

    def limit(self, given: Session) -> None:
        queue, rate = self.lots.choice(QUEUES), self.lots.choice([None, None, 2, 4])
        most = self.lots.choice([None, 1, 2, 4])
        if self.limits.get(queue, (None, None))[1] is None:  # what was claimed before is not counted
            self.claims = [one for one in self.claims if one[0] != queue]
        self.limits[queue] = (most, rate)
        self._call(given, "limit_queue", queue=queue, max_running=most, per_minute=rate)

    def tick(self, given: Session) -> None:
        assert isinstance(self.service.clock, ManualClock)
        self.service.clock.tick(self.lots.choice([0.5, 20.0, 40.0, 60.0]), sessions=False)
        self.service.advance()

    def end_session(self, given: Session) -> None:
        self.sessions.remove(given)
        self.pauses = {(name, whose) for name, whose in self.pauses if whose != given.session_id}
        self.parked = {ticket: call for ticket, call in self.parked.items() if call[0] is not given}
        self.mine = [one for one in self.mine if one[0] is not given]
        self.service.end_session(given, why=self.lots.choice(["closed", "process gone"]))
        self._open()

    # -- what must be so ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """The right queues are held back, and where a dequeue is parked nothing waits that it may have."""
        state, now = self.service.state, self.service.clock.now()
        check(state)
        for queue in QUEUES:
            is_paused = any(name in (None, queue) for name, _ in self.pauses)
            assert (state.gates.hindrance(queue, now) == "paused") == is_paused
        waiting = {state.queues.line_of[rollout_id][0] for rollout_id in state.queues}
        is_served = {queue for queue in waiting if state.gates.hindrance(queue, now) is None}
        for given, queues in self.parked.values():
            is_free = not state.suspects and given.reserved_since is None  # else it may be kept for a suspect
            assert not (is_free and is_served & {*queues}), "a rollout waits, and so does a dequeue that may have it"


WEIGHTS = {
    History.enqueue: 6, History.dequeue: 8, History.report: 5, History.update_rollout: 1, History.pause: 1,
    History.resume: 2, History.limit: 2, History.tick: 3, History.end_session: 1,
}  # fmt: skip


@pytest.mark.parametrize("seeds", [range(first, first + 25) for first in (0, 25, 50, 75)], ids=str)
def test_whatever_happens_limits_hold_and_nobody_waits_for_nothing(seeds: range) -> None:
    """Random histories of several sessions, with everything checked after each call."""
    for seed in seeds:
        history = History(seed)
        for _ in range(80):
            (happens,) = history.lots.choices(list(WEIGHTS), list(WEIGHTS.values()))
            happens(history, history.lots.choice(history.sessions))
            history.check()
