"""What a store in process owes its process: claims that come back, handlers that may use it, threads that go on, no
store that stays for ever."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from raystore.core import state as core_state
from raystore.core.snapshot import digest
from raystore.journal.opening import read_run
from raystore.service import clock
from raystore.service.clock import LoopAlarm, NoAlarm, ThreadAlarm
from raystore.service.service import Service
from raystore.types.options import StoreConfig
from tests.conftest import MakeMemoryStore
from tests.helpers import claim, present, until


class Blocked:
    """A parked dequeue of three whose event loop stands still until `go`."""

    def __init__(self, store: rs.InMemoryLightningStore, timeout: float) -> None:
        self.parked, self.go = threading.Event(), threading.Event()
        self.got: Sequence[rs.AttemptedRollout] | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work(store, timeout)))
        self._thread.start()
        self.parked.wait()

    async def _work(self, store: rs.InMemoryLightningStore, timeout: float) -> None:
        started = time.monotonic()
        waiting = asyncio.ensure_future(store.dequeue_many_rollouts(limit=3, timeout=timeout))
        await asyncio.sleep(0.05)
        self.parked.set()
        self.go.wait()  # claims arrive and are withdrawn meanwhile
        self.got = await waiting
        self.seconds = time.monotonic() - started

    def end(self) -> None:
        self.go.set()
        self._thread.join(30)


@pytest.mark.parametrize("stolen", [1, 2, 3])
def test_claims_that_came_too_late_in_part_come_back(
    make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch, stolen: int
) -> None:
    """What nobody else has is delivered, and nothing is held by nobody; with nothing left the caller goes on waiting,
    for what is left of its time."""
    monkeypatch.setattr(core_state, "CLAIM_SECONDS", 0.3)
    store = make_memory_store()
    victim = Blocked(store, timeout=2.0)
    made = store.sync.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=n) for n in range(3)])
    deadline = time.monotonic() + 10
    while store.sync.statistics()["withdrawals"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    thieves = store.sync.dequeue_many_rollouts(limit=stolen)
    assert len(thieves) == stolen
    victim.end()
    got = present(victim.got)
    assert [rollout.input for rollout in got] == [0, 1, 2][stolen:]
    assert victim.seconds < 3.0, "the time of the call began anew"
    for rollout in [*thieves, *got]:
        store.sync.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")
    finished = store.sync.wait_for_rollouts(rollout_ids=[r.rollout_id for r in made], timeout=0)
    assert [rollout.status for rollout in finished] == ["succeeded"] * 3


async def test_a_handler_of_notices_that_uses_the_store_leaves_a_journal_whole(
    tmp_path: Path, make_memory_store: MakeMemoryStore
) -> None:
    """Whatever it does becomes a record of its own, behind the change that it was told of."""
    store = make_memory_store(journal=tmp_path / "j", durability="process")
    rollouts = [await claim(store) for _ in range(4)]

    def handler(kind: Any, rollout_id: str, attempt_id: str) -> None:
        store.sync.update_worker(f"w-{rollout_id}", {"told": kind})
        store.sync.enqueue_rollout("another", rollout_id=f"after-{rollout_id}")
        store.sync.cancel_rollouts([rollout.rollout_id for rollout in rollouts[-2:]])

    store.listen_for_notices(handler)
    await store.cancel_rollouts([rollouts[0].rollout_id])
    await store.start_attempt(rollouts[1].rollout_id)  # tells the holder of the attempt before
    await store.enqueue_rollout("last")
    assert len(await store.query_workers()) == 4
    assert digest(read_run(tmp_path / "j").state) == digest(store._service.state)


async def test_handlers_are_called_one_at_a_time_from_all_threads(make_memory_store: MakeMemoryStore) -> None:
    """Changes of several threads, and of the store's own clock: no notice is lost, none comes twice."""
    store = make_memory_store()
    told, busy = [], threading.Lock()

    def handler(kind: Any, rollout_id: str, attempt_id: str) -> None:
        assert busy.acquire(blocking=False)
        told.append((kind, rollout_id))
        store.sync.update_worker("w", {})
        busy.release()

    store.listen_for_notices(handler)
    rollouts = [await claim(store, timeout_seconds=0.2 if n % 4 == 0 else None) for n in range(80)]
    mine = [[r for n, r in enumerate(rollouts) if n % 4 == number] for number in (1, 2, 3)]
    threads = [
        threading.Thread(target=lambda part=part: [store.sync.cancel_rollouts([r.rollout_id]) for r in part])
        for part in mine
    ]
    for thread in threads:
        thread.start()

    async def all_told() -> bool:
        return len(told) == 80

    await until(all_told)
    expected = [("timeout" if n % 4 == 0 else "cancelled", r.rollout_id) for n, r in enumerate(rollouts)]
    assert sorted(told) == sorted(expected)


@pytest.mark.parametrize("with_journal", [False, True])
def test_a_store_that_is_not_closed_is_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_journal: bool
) -> None:
    """With its threads, and a journal is let go of, so that another store may go on with it."""
    monkeypatch.setattr(clock, "IDLE_SECONDS", 0.05)
    options: dict[str, Any] = {"journal": tmp_path / "j", "durability": "process"} if with_journal else {}
    before = set(threading.enumerate())

    def use() -> Any:
        store = rs.InMemoryLightningStore(**options)
        store.sync.start_rollout("x", config=rs.RolloutConfig(timeout_seconds=3600))
        store.sync.start_rollout("y", config=rs.RolloutConfig(timeout_seconds=0.01))
        return weakref.ref(store._service)

    service = use()
    deadline = time.monotonic() + 10
    while service() is not None or set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, [thread.name for thread in threading.enumerate()]
        gc.collect()
        time.sleep(0.01)
    if with_journal:
        again = rs.InMemoryLightningStore(**options)
        assert len(again.sync.query_rollouts()) == 2
        again.close()


@pytest.mark.parametrize("kind", ["thread", "loop"])
async def test_an_alarm_goes_on_after_an_error_that_nobody_foresaw(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """It is told with its traceback, once a minute, and what was due is tried again."""
    monkeypatch.setattr(clock, "AGAIN_SECONDS", 0.05)
    rung = []

    def ring() -> None:
        rung.append(threading.current_thread().name)
        if len(rung) < 3:
            raise RuntimeError("a bug of ours")

    alarm = ThreadAlarm(ring) if kind == "thread" else LoopAlarm(asyncio.get_running_loop(), ring)
    alarm.set(0.01)

    async def rang() -> bool:
        return len(rung) == 3

    await until(rang)
    alarm.close()
    assert len(set(rung)) == 1
    told = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(told) == 1 and told[0].exc_info is not None


async def test_what_somebody_waits_for_is_named_again_when_the_store_has_let_go_of_it(
    make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More sets than are kept: each caller gets its own, and what is kept stays within its bound."""
    monkeypatch.setattr("raystore.core.indexes.WATCHED", 25)
    store = make_memory_store()
    groups = [[await claim(store) for _ in range(10)] for _ in range(6)]

    async def collect(group: list[rs.AttemptedRollout]) -> list[Any]:
        return [r.rollout_id async for r in store.as_completed([r.rollout_id for r in group], timeout=30)]

    tasks = [asyncio.ensure_future(collect(group)) for group in groups]
    for number in range(10):
        for group in groups:
            await asyncio.sleep(0)
            await store.update_attempt(group[number].rollout_id, "latest", status="succeeded")
            assert len(store._service.state.watched) <= 25
    for group, task in zip(groups, tasks, strict=True):
        assert sorted(await task) == sorted(rollout.rollout_id for rollout in group)


async def test_sets_of_a_process_that_ended_are_let_go_of() -> None:
    """And one that is named again takes the place of the one before."""
    service = Service(StoreConfig(), capacity_bytes=2**33, alarm=NoAlarm)
    session = service.open_session("s")

    def call(verb: Any, **arguments: Any) -> Any:
        return service.call(session, 1, verb, arguments, lambda ticket, value: True)

    made = call("enqueue", requests=[{"input": b"\x01x", "metadata": None}] * 20)
    ids = [rollout.rollout_id for rollout, _ in made]
    token: Any = None
    for _ in range(50):
        _, (_, unfinished, token) = call("sort_out", rollout_ids=ids, instead_of=token)
        assert unfinished == ids and len(service.state.watched) == 20
    with pytest.raises(rs.AnswerGoneError):
        call("completed", cursor=0, limit=1, timeout=1.0, filters={}, among=token + 1)
    service.end_session(session, why="closed")
    assert len(service.state.watched) == 0


def seconds_of(service: Service, verb: str, **arguments: Any) -> Any:
    """How long an operation takes at best."""
    session = service.state.sessions["s"]
    found = []
    for _ in range(15):
        started = time.perf_counter()
        service.call(session, 0, verb, arguments, lambda ticket, value: True)
        found.append(time.perf_counter() - started)
    return min(found)


def test_what_is_asked_often_does_not_cost_more_with_every_rollout_that_ever_was() -> None:
    """Statistics, heartbeats, stories, among finished rollouts with groups, tags and workers of their own."""
    service = Service(StoreConfig(), capacity_bytes=2**33, alarm=NoAlarm)
    session = service.open_session("s")

    def call(verb: Any, **arguments: Any) -> Any:
        return service.call(session, 0, verb, arguments, lambda ticket, value: True)

    def measure() -> dict[str, Any]:
        request = {"input": b"\x01x", "metadata": None, "queue": "last"}
        ((rollout, _),) = call("enqueue", requests=[request])
        ((_, attempt, _),) = call("dequeue", queues=["last"], limit=1, worker_id="w", timeout=0.0)
        service.acknowledge(session, [(attempt.rollout_id, attempt.attempt_id)])
        alive = [(attempt.rollout_id, attempt.attempt_id)]
        return {
            "statistics": seconds_of(service, "statistics"),
            "heartbeat": seconds_of(service, "heartbeat", attempts_alive=alive),
            "story": seconds_of(service, "story", rollout_id=rollout.rollout_id),
            "completed": seconds_of(
                service, "completed", cursor=service.state.completions.last, limit=9, timeout=0.0, filters={}
            ),
        }

    before = measure()
    for number in range(8_000):
        mine = {"group_id": f"g-{number}", "tags": {"t": f"t-{number}"}, "input": b"\x01x", "metadata": None}
        call("enqueue", requests=[mine])
        ((_, attempt, _),) = call("dequeue", queues=["default"], limit=1, worker_id=f"w-{number}", timeout=0.0)
        names = {"rollout_id": attempt.rollout_id, "attempt_id": attempt.attempt_id}
        call("update_attempt", **names, changes={"status": "succeeded"})
    after = measure()
    grown = {name: after[name] / before[name] for name in before}
    assert max(grown.values()) < 8, grown
