"""How many actor calls a rollout costs, counted by the store."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

import raystore as rs
from tests.conftest import MakeRayStore
from tests.helpers import until

ROLLOUTS = 60


@pytest.mark.parametrize(("work_waits", "limit"), [(True, 1.25), (False, 2.25)])
async def test_actor_calls_of_a_runner_with_concurrency_1(
    make_ray_store: MakeRayStore, work_waits: bool, limit: float
) -> None:
    """One call while work is waiting: report, acknowledgement, next claim; two when each claim has to wait for work.

    The quarter is for what time brings: a listen call each half a minute, an acknowledgement that met no batch.
    """
    store = make_ray_store()

    def agent(task: Any, ctx: rs.Context) -> float:
        for _ in range(8):
            with ctx.span("step", text="x" * 500):
                time.sleep(0.002)
        return 1.0

    async with rs.RunnerPool(store, agent, size=1, heartbeat_seconds=1000) as pool:

        async def has_begun() -> Any:
            worker = await store.get_worker_by_id(pool.worker_ids[0])
            return worker and worker.heartbeat_stats and (await store.statistics())["waiters"] == 1

        await until(has_begun)  # its first heartbeat is sent, and its claim waits
        before = (await store.statistics())["actor_calls"]
        own = 0  # calls of this process
        if work_waits:
            await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input="x")] * ROLLOUTS)
            own += 1
        else:
            for _ in range(ROLLOUTS):
                await store.enqueue_rollout("x")
                own += 1
                while (await store.statistics())["waiters"] == 0:  # its next claim finds an empty queue
                    own += 1
                    await asyncio.sleep(0.02)
                own += 1
        while True:
            statistics = await store.statistics()
            own += 1
            if statistics["rollouts_by_status"] == {"succeeded": ROLLOUTS}:
                break
            await asyncio.sleep(0.1)
    assert (statistics["actor_calls"] - before - own) / ROLLOUTS <= limit
