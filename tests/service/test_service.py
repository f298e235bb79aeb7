"""The service and the in-memory store: several loops and threads, the timer, the clock, failure of the core."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from asyncio import Task
from collections.abc import Callable
from typing import Any

import pytest

import raystore as rs
from raystore.core import expiry
from raystore.core.verbs import VERBS, Verb
from raystore.journal.writer import FULL_SECONDS
from raystore.service.clock import ThreadAlarm
from raystore.service.parking import ParkedCall, Parking
from raystore.service.service import Service
from raystore.types.contract import RolloutConfig
from raystore.types.options import StoreConfig
from tests.conftest import MakeMemoryStore
from tests.helpers import claim, make_span, present, until


def test_several_loops_and_threads_use_one_store(make_memory_store: MakeMemoryStore) -> None:
    """What the reference's loop-aware lock and threaded wrapper were for: 8 threads, each with loops of its own."""
    store = make_memory_store()
    failures = []

    async def work(number: Any) -> None:
        for i in range(10):
            rollout = await store.enqueue_rollout((number, i))
            claimed = present(await store.dequeue_rollout(f"w{number}"))
            spans = [store.add_span(make_span(claimed, n)) for n in range(1, 6)]
            await asyncio.gather(*spans)
            await store.update_attempt(claimed.rollout_id, "latest", status="succeeded")
            await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=20)

    def thread(number: Any) -> None:
        try:
            for _ in range(3):
                asyncio.run(work(number))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=thread, args=[n]) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []
    found = store.sync.statistics()
    assert (found["rollouts_by_status"], found["total_spans"]) == ({"succeeded": 240}, 1200)


def test_no_lock_is_held_across_an_await(make_memory_store: MakeMemoryStore) -> None:
    """Overlapping coroutines of one loop, one of them waiting, do not lock each other out."""
    store = make_memory_store()

    async def main() -> rs.AttemptedRollout | None:
        waiting = asyncio.ensure_future(store.dequeue_rollout(timeout=20))
        await asyncio.sleep(0)
        await asyncio.to_thread(store.sync.enqueue_rollout, "x")
        return await waiting

    assert present(asyncio.run(main())).input == "x"


async def test_work_goes_to_those_who_wait_longest_and_nobody_else_is_tried(
    make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that wait for several queues among them."""
    store, before = make_memory_store(), Parking.offer
    tried: list[ParkedCall] = []

    def offer(parking: Parking, call: ParkedCall) -> None:
        tried.append(call)
        before(parking, call)

    wanted = [["a"], ["b"], ["b", "a"], ["c"], ["a", "b"], *[["a"]] * 500]
    calls = [asyncio.ensure_future(store.dequeue_rollout(f"w{n}", queues=q, timeout=20)) for n, q in enumerate(wanted)]
    await asyncio.sleep(0)
    monkeypatch.setattr(Parking, "offer", offer)
    for number, queue in zip([0, 2, 1, 4, 5], "aabaa", strict=True):
        await store.enqueue_rollout("x", queue=queue)
        assert present(await calls[number]).attempt.worker_id == f"w{number}"
    assert len(tried) == 5 and sum(call.done() for call in calls) == 5
    for call in calls:
        call.cancel()


def test_waiters_on_different_loops_are_woken_by_one_change(make_memory_store: MakeMemoryStore) -> None:
    """A completion in one thread wakes waiting coroutines of others at once."""
    store = make_memory_store()
    rollout = store.sync.enqueue_rollout("x")
    woken = []

    def wait() -> None:
        async def one() -> None:
            await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=20)
            woken.append(time.monotonic())

        asyncio.run(one())

    threads = [threading.Thread(target=wait) for _ in range(5)]
    for t in threads:
        t.start()
    while store.sync.statistics()["waiters"] < 5:
        time.sleep(0.001)
    finished = time.monotonic()
    store.sync.cancel_rollouts([rollout.rollout_id])
    for t in threads:
        t.join()
    assert max(woken) - finished < 1.0


async def test_attempts_time_out_although_nobody_calls(make_memory_store: MakeMemoryStore) -> None:
    """The store's own timer settles an attempt: the waiter makes no call while it waits."""
    store = make_memory_store()
    rollout = await claim(store, timeout_seconds=0.2)
    (finished,) = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=10)
    assert finished.status == "failed"
    silent = await claim(store, unresponsive_seconds=0.2)
    (finished,) = await store.wait_for_rollouts(rollout_ids=[silent.rollout_id], timeout=10)
    assert present(await store.get_latest_attempt(silent.rollout_id)).status == "unresponsive"


async def test_a_jump_of_the_wall_clock_changes_nothing_but_stamps(
    make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour forward or back: nothing times out, nothing lives longer, time goes on."""
    store = make_memory_store()
    rollout = await claim(store, timeout_seconds=1.0)
    real = time.time
    for jump in (3600, -3600):
        monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
        assert (await store.get_rollout_by_id(rollout.rollout_id)).status == "preparing"
    (finished,) = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=10)
    assert finished.status == "failed"
    assert 0.9 < present(finished.end_time) - rollout.attempt.start_time < 5


def test_a_store_that_stood_still_moves_its_deadlines() -> None:
    """A process that was stopped (SIGSTOP, frozen machine) finds its deadlines moved by as long, and says so."""

    class Silent:
        """An alarm that does not ring by itself: the process is stopped."""

        def __init__(self, ring: Callable[[], None]) -> None:
            alarms.append(ring)

        def set(self, seconds: float | None) -> None:
            self.seconds = seconds

        def close(self) -> None:
            self.seconds = None

    alarms: list[Callable[[], None]] = []
    service = Service(StoreConfig(), capacity_bytes=10**9, alarm=Silent)
    session = service.open_session("a", eternal=True)

    def call(verb: str, **arguments: Any) -> Any:
        return service.call(session, 0, verb, arguments, lambda ticket, value: False)

    request: dict[str, Any] = {"input": b"\x01\xc0", "metadata": None, "config": [10.0, None, 1, []]}
    rollout, _ = call("start_rollout", request=request, worker_id=None)
    service.clock.offset += 300
    assert call("get_rollout", rollout_id=rollout.rollout_id)[0].status == "preparing"
    assert any(change.kind == "paused" for change in call("changes", cursor=None, kinds=None, limit=10, timeout=0)[0])
    for _ in range(8):  # seconds in which it was not stopped count, as its alarm tells
        service.clock.offset += 1.0
        alarms[0]()
        assert call("get_rollout", rollout_id=rollout.rollout_id)[0].status == "preparing"
    service.clock.offset += 1.5
    assert call("get_rollout", rollout_id=rollout.rollout_id)[0].status == "failed"


def test_the_timer_is_set_for_what_is_due_before_it_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """And left for what is due later; also where the disk is full, and something is due for the first time."""
    moment, has_space = [1000.0], [True]
    monkeypatch.setattr(time, "monotonic", lambda: moment[0])
    monkeypatch.setattr(Service, "regain_space", lambda self: has_space[0])

    class Recorded:
        """An alarm that rings only when the test says so."""

        def __init__(self, ring: Callable[[], None]) -> None:
            self.ring = ring
            alarms.append(self)

        def set(self, seconds: float | None) -> None:
            settings.append(seconds)

        def close(self) -> None:
            pass

    alarms: list[Recorded] = []
    settings: list[float | None] = []

    def set_to_hundredths() -> list[float | None]:
        """What the alarm was set to since this was asked last."""
        made = [seconds and round(seconds, 2) for seconds in settings]
        settings.clear()
        return made

    service = Service(StoreConfig(), capacity_bytes=10**9, alarm=Recorded)
    session = service.open_session("a", eternal=True)

    def start(timeout_seconds: float) -> None:
        config: list[Any] = [timeout_seconds, None, 1, []]
        request: dict[str, Any] = {"input": b"\x01\xc0", "metadata": None, "config": config}
        service.call(session, 0, "start_rollout", {"request": request, "worker_id": None}, lambda ticket, value: False)

    assert set_to_hundredths() == []
    start(30.0)
    assert set_to_hundredths() == [1.0]  # a look at the clock each second
    start(20.0)
    start(2.0)
    assert set_to_hundredths() == []
    start(0.5)
    assert set_to_hundredths() == [0.5]
    moment[0] += 0.6
    alarms[0].ring()
    assert set_to_hundredths() == [1.0]

    full = Service(StoreConfig(), capacity_bytes=10**9, alarm=Recorded)
    session, service, has_space[0] = full.open_session("a", eternal=True), full, False
    start(0.5)
    start(0.3)
    assert set_to_hundredths() == [0.5, 0.3]
    start(0.01)
    assert set_to_hundredths() == [FULL_SECONDS]
    moment[0] += 0.05
    start(0.01)
    assert set_to_hundredths() == []  # or each call would put it off


async def test_a_failing_core_takes_no_more_writes(
    make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An unexpected exception inside the core: reads go on, writes raise with story and traceback."""
    with rs.InMemoryLightningStore() as store:
        rollout = await store.enqueue_rollout("x")

        def broken(state: Any, step: Any, *, rollout_id: str, changes: Any) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setitem(VERBS, "update_rollout", Verb(broken))
        with (
            caplog.at_level(logging.CRITICAL),
            pytest.raises(rs.StoreCorruptError, match="ZeroDivisionError: a bug") as e,
        ):
            await store.update_rollout(rollout.rollout_id, status="failed")
        assert "enqueued" in str(e.value)
        with pytest.raises(rs.StoreCorruptError):
            await store.enqueue_rollout("y")
        assert (await store.get_rollout_by_id(rollout.rollout_id)).status == "queuing"


async def test_close_answers_those_who_wait(make_memory_store: MakeMemoryStore) -> None:
    """Waiting calls are answered with what there is; later ones raise."""
    store = make_memory_store()
    rollout = await store.enqueue_rollout("x")
    waiting = asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=[rollout.rollout_id]))
    empty = asyncio.ensure_future(store.dequeue_rollout(timeout=50, queues=["other"]))
    await asyncio.sleep(0)
    store.close()
    assert (await waiting, await empty) == ([], None)
    with pytest.raises(rs.StoreClosedError):
        await store.enqueue_rollout("y")


async def test_a_blocked_loop_and_its_claim(make_memory_store: MakeMemoryStore) -> None:
    """A claim handed to a loop that is blocked for too long goes to another; the blocked caller gets the next one."""
    store = make_memory_store()
    got: list[rs.AttemptedRollout | None] = []

    def run() -> None:
        async def block() -> None:
            waiting = asyncio.ensure_future(store.dequeue_rollout(timeout=30))
            await asyncio.sleep(0.1)
            time.sleep(6.5)  # noqa: ASYNC251 - the answer comes meanwhile
            got.append(await waiting)

        asyncio.run(block())

    thread = threading.Thread(target=run)
    thread.start()
    await asyncio.sleep(0.3)
    first = await store.enqueue_rollout("first")
    claimed = present(await store.dequeue_rollout(timeout=10))
    assert (claimed.rollout_id, claimed.attempt.sequence_id) == (first.rollout_id, 1)
    second = await store.enqueue_rollout("second")
    await asyncio.to_thread(thread.join)
    assert [present(r).rollout_id for r in got] == [second.rollout_id]


async def test_a_closed_loop_and_its_claim(make_memory_store: MakeMemoryStore) -> None:
    """Work for a loop that has ended goes to the next who waits."""
    store = make_memory_store()

    def run() -> Task[Any]:
        loop = asyncio.new_event_loop()
        task = loop.create_task(store.dequeue_rollout(timeout=30))
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.close()
        return task

    abandoned = await asyncio.to_thread(run)
    made = await store.enqueue_rollout("x")
    assert present(await store.dequeue_rollout(timeout=5)).rollout_id == made.rollout_id
    coroutine = abandoned.get_coro()
    assert coroutine is not None
    coroutine.close()


async def test_eviction_is_logged_and_unread_rollouts_warn(
    make_memory_store: MakeMemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    """One line for each pass with counts, bytes and duration; a WARNING if nobody had read what goes."""
    store = make_memory_store(eviction_memory_threshold=3, safe_memory_threshold=1, span_size_estimator=lambda span: 1)
    with caplog.at_level(logging.INFO, "raystore.store"):
        for number in range(4):
            rollout = await claim(store)
            await store.add_span(make_span(rollout, number))
            await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
    records = [record for record in caplog.records if record.name == "raystore.store"]
    assert [record.levelname for record in records] == ["WARNING"]
    assert "Evicted 3 spans (3 bytes) of 3 rollouts in" in records[0].getMessage()


async def test_many_ids_that_hold_objects_warn_once(
    make_memory_store: MakeMemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    """More than 16 ids with objects are likely a leak; the warning names what to use instead."""
    store = make_memory_store()
    with caplog.at_level(logging.WARNING, "raystore.store"):
        for _ in range(20):
            await store.add_resources({"w": rs.ObjectResource(value=1)})
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "update_resources" in record.getMessage() and "keep_resources" in record.getMessage()


def test_the_alarm_rings_once_and_can_be_moved() -> None:
    """Later or earlier than first said; not after it is closed."""
    rung = threading.Event()
    alarm = ThreadAlarm(rung.set)
    alarm.set(30)
    alarm.set(0.05)
    assert rung.wait(5)
    rung.clear()
    alarm.set(0.05)
    alarm.set(None)
    assert not rung.wait(0.3)
    alarm.set(0.2)
    alarm.close()
    assert not rung.wait(0.5)


async def test_a_due_timer_costs_nothing_when_nothing_is_due(make_memory_store: MakeMemoryStore) -> None:
    """Deadlines that moved later are met once, not again and again."""
    store = make_memory_store()
    rollout = await claim(store, unresponsive_seconds=0.5)
    for _ in range(4):
        await asyncio.sleep(0.2)
        await store.add_span(make_span(rollout))
    assert (await store.get_rollout_by_id(rollout.rollout_id)).status == "running"
    assert (await store.statistics())["deadline_fires"] == 0

    async def silent() -> bool:
        return present(await store.get_latest_attempt(rollout.rollout_id)).status == "unresponsive"

    await until(silent)
    assert (await store.statistics())["deadline_fires"] == 1


async def test_advance_is_sliced(make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many deadlines at once are worked off in slices, by the timer, although nobody calls."""
    monkeypatch.setattr(expiry, "SLICE", 10)
    store = make_memory_store()
    made = await store.enqueue_group("x", 95, config=RolloutConfig(timeout_seconds=0.3))
    await store.dequeue_many_rollouts(limit=95)
    finished = await store.wait_for_rollouts(rollout_ids=[r.rollout_id for r in made], timeout=10)
    assert {r.status for r in finished} == {"failed"}


async def test_eviction_goes_on_in_slices(make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that frees much is cut, so that nobody waits for all of it; it goes on although nobody calls."""
    monkeypatch.setattr("raystore.core.retention.SLICE_SPANS", 5)
    store = make_memory_store(eviction_memory_threshold=400_000, safe_memory_threshold=100_000)
    rollouts = [await store.start_rollout(number) for number in range(40)]
    text = "x" * 10_000
    for rollout in rollouts[:-1]:
        await store.add_span(make_span(rollout, attributes={"text": text}))
        before = (await store.statistics())["evicted_spans"]
        if before:
            break
    assert before == 5 and (await store.statistics())["eviction_passes"] == 0

    async def is_over() -> bool:
        return store._service.state.eviction_passes == 1

    await until(is_over)
    found = await store.statistics()
    assert found["accounted_bytes"] <= 100_000 and found["evicted_spans"] > 20


async def test_the_alarm_is_set_for_a_deadline_that_returns(make_memory_store: MakeMemoryStore) -> None:
    """A deadline that lost its meaning and got it back is met although nobody calls."""
    store = make_memory_store()
    rollout = await store.start_rollout("task", config=RolloutConfig(timeout_seconds=0.5))
    await store.add_span(make_span(rollout))
    await store.update_rollout(rollout.rollout_id, status="queuing")
    waiting = asyncio.create_task(store.wait_for_rollout(rollout.rollout_id, timeout=20))
    await asyncio.sleep(0)
    await store.add_span(make_span(rollout, 2))  # its agent goes on
    started = time.monotonic()
    assert present(await waiting).status == "failed"
    assert time.monotonic() - started < 10


async def test_slices_of_an_eviction_spare_what_is_written(
    make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the slices that come later, from the alarm: the rollout being written goes last."""
    monkeypatch.setattr("raystore.core.retention.SLICE_SPANS", 5)
    store = make_memory_store(eviction_memory_threshold=400_000, safe_memory_threshold=300_000)
    written, *others = [await store.start_rollout(number) for number in range(10)]
    text = "x" * 5_000
    for number in range(90):
        for rollout in others if number < 6 else [written]:
            await store.add_span(make_span(rollout, number + 1, attributes={"text": text}))
        if store._service.state.eviction_pass is not None:
            break

    async def is_over() -> bool:
        return store._service.state.eviction_passes == 1

    await until(is_over)
    assert len(await store.query_spans(written.rollout_id)) > 0
