"""A pool that cannot work says so to whoever waits for what nobody else would do."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from tests.conftest import MakeMemoryStore, MakeRayStore
from tests.helpers import AnyStore, present, until

WHY = "ConnectionError: no model server"


async def tell(
    store: AnyStore | rs.InMemoryLightningStore,
    *,
    queues: tuple[str] | list[str] = ("default",),
    error: str | None = WHY,
) -> None:
    await store.report_pool("p", queues, failures=3, error=error)


def waiting(store: AnyStore, made: list[Any]) -> list[Any]:
    """Calls that wait for what is queued, each in its own way."""
    ids = [rollout.rollout_id for rollout in made]
    calls = [
        store.wait_for_rollouts(rollout_ids=ids, timeout=60),
        store.wait_for_rollout(ids[0], timeout=60),
        store.take(1, consumer="t", timeout=60),
        store.completed(timeout=60),
    ]
    return [asyncio.ensure_future(call) for call in calls]


async def test_those_who_wait_are_told(store: AnyStore) -> None:
    """At once, whichever comes first: the call, or the failure; with the runners' own error."""
    made = [await store.enqueue_rollout(n) for n in range(2)]
    calls = waiting(store, made)

    async def parked() -> bool:
        return (await store.statistics())["waiters"] == len(calls)

    await until(parked)
    await tell(store)
    for call in [*calls, *waiting(store, made)]:
        with pytest.raises(rs.PoolFailedError, match="'default'.*failed 3 times.*no model server"):
            await asyncio.wait_for(call, 10)
    assert (await store.statistics())["waiters"] == 0


async def test_who_waits_for_an_evaluation_is_told(store: AnyStore) -> None:
    """It waits for nothing but what such pools would run."""
    evaluation = await store.evaluate("bench", [1])
    call = asyncio.ensure_future(evaluation.result())

    async def parked() -> bool:
        return (await store.statistics())["waiters"] == 1

    await until(parked)
    await tell(store)
    with pytest.raises(rs.PoolFailedError, match="no model server"):
        await asyncio.wait_for(call, 10)


async def test_those_who_wait_for_something_else_are_not(make_memory_store: MakeMemoryStore) -> None:
    """What runs, what somebody else serves, a queue that the pool does not serve, a pool that works again."""
    store = make_memory_store()
    made = [await store.enqueue_rollout(n, queue=queue) for n, queue in enumerate(["default", "other"])]

    async def is_told(*rollouts: Any) -> bool:
        ids = [rollout.rollout_id for rollout in rollouts]
        try:
            await store.wait_for_rollouts(rollout_ids=ids, timeout=0.05)
        except rs.PoolFailedError:
            return True
        return False

    await tell(store)
    assert await is_told(made[0])
    assert not await is_told(made[1]) and not await is_told(*made)
    await tell(store, queues=["default", "other"])
    assert await is_told(*made)
    await tell(store, error=None)
    assert not await is_told(*made)
    await tell(store, queues=["default", "other"])
    running = await store.start_rollout("runs")
    assert not await is_told(running) and not await is_told(running, *made)
    assert (await store.take(1, consumer="t", timeout=0.05)).rollouts == []
    await store.update_attempt(running.rollout_id, running.attempt.attempt_id, status="succeeded")
    assert len((await store.take(2, consumer="t", timeout=60)).rollouts) == 1  # what there is, at once
    await store.dequeue_rollout(queues=["nothing", "other"])  # this process serves it
    assert await is_told(made[0]) and not await is_told(made[1])


async def test_a_pool_whose_runners_stop_coming_up(make_ray_store: MakeRayStore, tmp_path: Path) -> None:
    """The driver hears why; once the cause is mended the pool goes on, and what waited is done."""
    store = make_ray_store()
    flag, died = tmp_path / "server", tmp_path / "died"
    flag.touch()

    class Agent:
        def setup(self) -> None:
            if not flag.exists():
                raise ConnectionError("no model server")

        def __call__(self, task: Any, ctx: rs.Context) -> float:
            if not died.exists():
                died.touch()
                flag.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            return 1.0

    async with rs.RunnerPool(store, Agent, size=1):
        made = await store.enqueue_rollout("x")
        with pytest.raises(rs.PoolFailedError, match="no model server"):
            await store.wait_for_rollout(made.rollout_id, timeout=60)
        flag.touch()

        async def is_done() -> Any:
            return (await store.get_rollout_by_id(made.rollout_id)).status == "succeeded"

        await until(is_done, within=40)
        assert present(await store.wait_for_rollout(made.rollout_id, timeout=10)).reward == 1.0


class Slow:
    """An agent that takes its time to get ready."""

    seconds = 60.0

    def setup(self) -> None:
        threading.Event().wait(self.seconds)

    def __call__(self, task: Any, ctx: rs.Context) -> float:
        return 1.0


async def test_a_slow_setup_is_not_taken_for_missing_resources(
    store: AnyStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said while it is waited for, and by the error if that takes too long."""
    is_here = isinstance(store, rs.InMemoryLightningStore)  # elsewhere its process takes a while until it is there
    for module in ("actors", "pool"):
        monkeypatch.setattr(f"raystore.runner.{module}.EXPLAIN_SECONDS", 0.2 if is_here else 20.0)
    pool = rs.RunnerPool(store, Slow, size=1, start_timeout=0.5 if is_here else 21.0)
    with pytest.raises(rs.PoolStartError, match=r"not for want of resources: 1 of them are there, and __init__"):
        await asyncio.to_thread(pool.start)
    said = [record.getMessage() for record in caplog.records if "Still waiting" in record.getMessage()]
    assert len(said) == 1 and "setup() of the agent" in said[0], said
    await asyncio.to_thread(pool.stop)


async def test_missing_resources_are_not_taken_for_a_slow_setup(
    make_ray_store: MakeRayStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was asked for, and what the cluster has."""
    monkeypatch.setattr("raystore.runner.actors.EXPLAIN_SECONDS", 0.5)
    pool = rs.RunnerPool(make_ray_store(), Slow, size=1, resources={"moon": 1}, start_timeout=1.0)
    with pytest.raises(rs.PoolStartError, match=r"did not start in time\. Asked for: .*'moon': 1.*ask for less"):
        await asyncio.to_thread(pool.start)
    said = [record.getMessage() for record in caplog.records if "Still waiting" in record.getMessage()]
    assert len(said) == 1 and "to be scheduled" in said[0] and "'moon'" in said[0], said


async def test_a_patience_without_end(make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for ever waits for as long as a thread can."""
    monkeypatch.setattr("raystore.runner.pool.EXPLAIN_SECONDS", 0.05)

    class Late(Slow):
        seconds = 0.3

    store = make_memory_store()
    pool = rs.RunnerPool(store, Late, size=1, start_timeout=float("inf"))
    await asyncio.to_thread(pool.start)
    made = await store.enqueue_rollout("x")
    assert present(await store.wait_for_rollout(made.rollout_id, timeout=20)).reward == 1.0
    await asyncio.to_thread(pool.stop, drain_seconds=float("inf"))


@pytest.mark.parametrize("late", [False, True])
async def test_a_pool_in_process_that_cannot_grow_in_time(make_memory_store: MakeMemoryStore, late: bool) -> None:
    """It says why and stays as it was; who gets ready after that is closed again, and the pool may grow later."""
    held, closed = threading.Event(), threading.Event()

    class Agent:
        made = 0

        def setup(self) -> None:
            Agent.made += 1
            if Agent.made == 2:
                held.wait(60)

        def __call__(self, task: Any, ctx: rs.Context) -> float:
            return 1.0

        def close(self) -> None:
            closed.set()

    store = make_memory_store()
    async with rs.RunnerPool(store, Agent, size=1, start_timeout=1.0) as pool:
        before = pool.worker_ids
        with pytest.raises(rs.PoolStartError, match=r"not for want of resources: 1 of them are there"):
            await asyncio.to_thread(pool.resize, 2)
        assert pool.worker_ids == before
        if late:
            held.set()
            assert await asyncio.to_thread(closed.wait, 20)
            assert pool.worker_ids == before
        await asyncio.to_thread(pool.resize, 2)
        assert len(pool.worker_ids) == 2
        made = await store.enqueue_rollout("x")
        assert present(await store.wait_for_rollout(made.rollout_id, timeout=20)).reward == 1.0
        held.set()
