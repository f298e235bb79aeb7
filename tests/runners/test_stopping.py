"""Stopping is not losing: pools that are stopped, or made smaller, give back what they run, and nobody is charged."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Literal

import pytest
import ray

import raystore as rs
from tests.conftest import MakeMemoryStore, MakeRayStore
from tests.helpers import AnyStore, mostly_in_memory, present, until


def running(store: AnyStore | AnyStore, *made: Any) -> Callable[..., Coroutine[Any, Any, bool]]:
    """Whether all of these rollouts are worked on."""

    async def are() -> bool:
        found = await store.query_rollouts(rollout_ids=[rollout.rollout_id for rollout in made])
        return all(rollout.status == "running" for rollout in found)

    return are


async def patient(task: Any, ctx: rs.Context) -> None:
    """Goes on for longer than anybody waits, and listens."""
    with ctx.span("begun"):
        pass
    await asyncio.sleep(100)


def blocking(task: Any, ctx: rs.Context) -> None:
    """The same in a thread of its own."""
    with ctx.span("begun"):
        pass
    while not ctx.cancelled:
        time.sleep(0.01)
    ctx.check()


def stubborn(task: Any, ctx: rs.Context) -> None:
    """The same, and goes on writing spans, whatever it is told."""
    for _ in range(200):
        with ctx.span("turn"):
            time.sleep(0.05)


def deaf(task: Any, ctx: rs.Context) -> None:
    """The same, and does not listen."""
    with ctx.span("begun"):
        pass
    threading.Event().wait(20)


@pytest.mark.parametrize(
    ("agent", "isolation"), [(patient, "actor"), (blocking, "actor"), (stubborn, "actor"), (stubborn, "process")]
)
@mostly_in_memory
async def test_a_polite_stop_charges_nobody(
    store: AnyStore,
    agent: Callable[..., Coroutine[Any, Any, None]] | Callable[..., None],
    isolation: Literal["actor", "process"],
) -> None:
    """More often than there are deliveries: each time the rollout waits at its old place, before younger ones."""
    made = await store.enqueue_rollout("long")
    for number in range(4):
        async with rs.RunnerPool(store, agent, size=1, flush_seconds=0.05, isolation=isolation) as pool:
            await until(running(store, made))
            if not number:
                await store.enqueue_rollout("younger")
            await asyncio.to_thread(pool.stop, drain_seconds=0.1)
        found = await store.get_rollout_by_id(made.rollout_id)
        assert (found.status, found.attempt.outcome, found.attempt.error) == ("requeuing", "withdrawn", None)
        assert (await store.statistics())["suspects"] == 0
    claimed = present(await store.dequeue_rollout())
    assert (claimed.rollout_id, claimed.attempt.sequence_id) == (made.rollout_id, 5)


async def test_an_agent_that_does_not_listen_is_no_loss_either(make_ray_store: MakeRayStore) -> None:
    """Its process is ended with it; what it ran goes back as if it had listened."""
    store = make_ray_store(max_deliveries=1)
    made = await store.enqueue_rollout("long")
    async with rs.RunnerPool(store, deaf, size=1, flush_seconds=0.05) as pool:
        await until(running(store, made))
        await asyncio.to_thread(pool.stop, drain=False)
    found = await store.get_rollout_by_id(made.rollout_id)
    assert (found.status, found.attempt.outcome) == ("requeuing", "withdrawn")
    assert (await store.statistics())["suspects"] == 0


async def test_a_stop_waits_for_as_long_as_it_is_told_to(make_memory_store: MakeMemoryStore) -> None:
    """What finishes within `drain_seconds` has finished."""
    store = make_memory_store()

    async def agent(task: Any, ctx: rs.Context) -> float:
        await asyncio.sleep(0.3)
        return 1.0

    made = await store.enqueue_rollout("x")
    pool = rs.RunnerPool(store, agent, size=1, flush_seconds=0.05)
    pool.start()
    await until(running(store, made))
    await asyncio.to_thread(pool.stop, drain_seconds=60)
    assert (await store.get_rollout_by_id(made.rollout_id)).status == "succeeded"
    with pytest.raises(rs.InvalidValueError, match="drain_seconds"):
        pool.stop(drain_seconds=-1)


async def test_pools_beside_each_other(store: AnyStore) -> None:
    """Their runners are told apart, and one pool's stop is none of the other's."""
    made = [await store.enqueue_rollout("x", queue=queue) for queue in "ab"]
    a = rs.RunnerPool(store, patient, size=2, queues=["a"], flush_seconds=0.05)
    b = rs.RunnerPool(store, patient, size=2, queues=["b"], flush_seconds=0.05)
    async with a, b:
        await until(running(store, *made))
        assert len({*a.worker_ids, *b.worker_ids}) == 4
        workers = {worker.worker_id for worker in await store.query_workers(status_in=["busy"])}
        assert len(workers & {*a.worker_ids}) == len(workers & {*b.worker_ids}) == 1
        await asyncio.to_thread(a.stop, drain_seconds=0)
        stopped, other = [await store.get_rollout_by_id(rollout.rollout_id) for rollout in made]
        assert (stopped.status, other.status) == ("requeuing", "running")
        assert len(await store.query_attempts(other.rollout_id)) == 1
        await asyncio.to_thread(b.stop, drain_seconds=0)


async def test_a_pool_is_resized(store: AnyStore) -> None:
    """Up: more run at once. Down: those beyond finish, or give back; the others are not touched."""
    made = await store.enqueue_group("x", 3)
    async with rs.RunnerPool(store, patient, size=1, flush_seconds=0.05) as pool:
        (first,) = pool.worker_ids
        await asyncio.to_thread(pool.resize, 3)
        await until(running(store, *made))
        assert len(pool.worker_ids) == 3 and first in pool.worker_ids
        await asyncio.to_thread(pool.resize, 1, drain_seconds=0)
        assert pool.worker_ids == [first]
        statuses = [rollout.status for rollout in await store.query_rollouts()]
        assert sorted(statuses) == ["requeuing", "requeuing", "running"]
        await asyncio.to_thread(pool.resize, 2)
        assert len(pool.worker_ids) == 2 and not {*pool.worker_ids} & {f"runner-{pool.pool_id}-1"}
        wrongs: list[Any] = [0, -1, 1.5, True, "2"]
        for wrong in wrongs:
            with pytest.raises(rs.InvalidValueError, match="size"):
                pool.resize(wrong)
        await asyncio.to_thread(pool.stop, drain_seconds=0)
    with pytest.raises(rs.PoolStartError, match="does not run"):
        pool.resize(2)


async def test_a_pool_that_cannot_grow_stays_as_it_was(store: AnyStore, tmp_path: Path) -> None:
    """The error says why; those who were there go on."""

    class Agent:
        def setup(self) -> None:
            if (tmp_path / "broken").exists():
                raise ConnectionError("no model server")

        def __call__(self, task: Any, ctx: rs.Context) -> float:
            return 1.0

    async with rs.RunnerPool(store, Agent, size=1) as pool:
        before = pool.worker_ids
        (tmp_path / "broken").touch()
        with pytest.raises(rs.PoolStartError, match="no model server"):
            await asyncio.to_thread(pool.resize, 2)
        assert pool.worker_ids == before
        made = await store.enqueue_rollout("x")
        assert present(await store.wait_for_rollout(made.rollout_id, timeout=20)).status == "succeeded"


async def test_what_did_not_grow_is_not_replaced(make_ray_store: MakeRayStore, tmp_path: Path) -> None:
    """Of two new runners one dies and one never comes up: neither they nor who replaced them stay."""

    class Agent:
        def setup(self) -> None:
            name = ray.get_runtime_context().get_actor_name()
            if name.endswith("-1"):
                threading.Event().wait(60)
            elif not name.endswith("-0"):
                raise ConnectionError("no model server")

        def __call__(self, task: Any, ctx: rs.Context) -> float:
            return 1.0

    async with rs.RunnerPool(make_ray_store(), Agent, size=1) as pool:
        before, told = pool.worker_ids, ""
        for seconds in (8.0, 16.0, 32.0):  # on a slow machine the process that never comes up takes longer to be there
            pool._runners._start_timeout = seconds
            with pytest.raises(rs.PoolStartError, match="did not start in time") as refusal:
                await asyncio.to_thread(pool.resize, 3)
            assert pool.worker_ids == before
            if "1 of them are there" in (told := str(refusal.value)):
                break
        assert "1 of them are there" in told


async def test_runners_and_stores_have_names_in_the_tools_of_ray(make_ray_store: MakeRayStore) -> None:
    """By which whoever looks at a cluster finds them."""
    from ray.util import list_named_actors

    store = make_ray_store()
    async with rs.RunnerPool(store, patient, size=1) as pool:
        names = {(actor["namespace"], actor["name"]) for actor in list_named_actors(all_namespaces=True)}
        assert {("raystore-runners", worker_id) for worker_id in pool.worker_ids} <= names
        assert store.info.name in {info.name for info in rs.list_stores()}
