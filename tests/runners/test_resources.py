"""What runners do with the resources of their rollouts: fetch them once, and let go of them."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray._private.internal_api import memory_summary

import raystore as rs
from raystore.runner import worker
from raystore.runner.worker import ResourceCache
from raystore.types.contract import ObjectResource, PromptTemplate
from tests.conftest import MakeMemoryStore, MakeRayStore
from tests.helpers import claim, present, until

WEIGHTS = 100_000  # numbers of 8 bytes: enough to go to the object store


def in_object_store() -> int:
    """How many objects are in Ray's object store."""
    told = memory_summary(address=ray.get_runtime_context().gcs_address, stats_only=True)
    return int(told.partition("Plasma memory usage")[2].partition("MiB, ")[2].split()[0])


async def test_superseded_weights_leave_the_object_store(make_ray_store: MakeRayStore) -> None:
    """Twelve versions, each used by a pool: in the end the newest alone is anywhere."""

    async def agent(task: Any, ctx: rs.Context) -> float:
        return float((await ctx.resources["policy"].aget())[0])

    store = make_ray_store()
    before = in_object_store()
    async with rs.RunnerPool(store, agent, size=2, concurrency=2):
        for version in range(12):
            weights = np.full(WEIGHTS, float(version))
            await store.update_resources("policy", {"policy": ObjectResource(value=weights)}, policy_version=version)
            requests = [rs.EnqueueRolloutRequest(input=i) for i in range(4)]
            made = [rollout.rollout_id for rollout in await store.enqueue_many_rollouts(requests)]
            done = await store.wait_for_rollouts(rollout_ids=made, timeout=30)
            assert [(rollout.status, rollout.reward) for rollout in done] == [("succeeded", float(version))] * 4

        async def only_the_newest() -> bool:
            gc.collect()
            return in_object_store() <= before + 1

        await until(only_the_newest)


def version_of(rollout: rs.AttemptedRollout) -> tuple[str | None, int | None]:
    return rollout.resources_id, rollout.attempt.resources_version


async def test_a_version_stays_in_the_cache_as_long_as_it_is_used(
    make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is fetched once for all who use it, goes a moment after the last, and at once if there is a newer one."""
    monkeypatch.setattr(worker, "RESOURCES_IDLE_SECONDS", 0.05)
    store = make_memory_store()
    await store.update_resources("w", {"p": PromptTemplate(template="1", engine="f-string")})
    first, second = await claim(store), await claim(store)
    await store.update_resources("w", {"p": PromptTemplate(template="2", engine="f-string")})
    third = await claim(store)
    cached = ResourceCache(store)
    taken = [await cached.acquire(*version_of(rollout)) for rollout in (first, second, third)]
    assert [resources["p"].template for resources in taken] == ["1", "1", "2"]
    assert taken[0] is taken[1] and len(cached) == 2
    cached.release(*version_of(first))
    assert len(cached) == 2
    cached.release(*version_of(second))
    assert len(cached) == 1
    cached.release(*version_of(third))
    assert len(cached) == 1

    async def is_empty() -> bool:
        return not len(cached)

    await until(is_empty)


async def test_nothing_of_a_rollout_is_kept_while_its_runner_waits(make_memory_store: MakeMemoryStore) -> None:
    """What the agent was given can be collected once it has returned, without a look for cycles."""
    seen = []

    async def agent(task: Any, ctx: rs.Context) -> float:
        resource = ctx.resources["p"]
        seen.append(weakref.ref(resource))
        return 1.0

    store = make_memory_store()
    await store.update_resources("w", {"p": PromptTemplate(template="1", engine="f-string")})
    gc.collect()
    gc.disable()
    try:
        async with rs.RunnerPool(store, agent, size=1):
            rollout = await store.enqueue_rollout("x")
            assert present(await store.wait_for_rollout(rollout.rollout_id, timeout=10)).status == "succeeded"

            async def is_gone() -> bool:
                return seen[0]() is None

            await until(is_gone, within=5)
    finally:
        gc.enable()


BLOCKING = """
import asyncio, sys, numpy as np, ray, raystore as rs
ray.init(address=sys.argv[1], logging_level="ERROR")

def agent(task, ctx):
    return float(ctx.resources["w"].get()[0])

async def main():
    async with rs.start() as store, rs.RunnerPool(store, agent, size=1):
        await store.update_resources("w", {"w": rs.ObjectResource(value=np.ones(100_000))})
        rollout = await store.enqueue_rollout("x")
        print((await store.wait_for_rollout(rollout.rollout_id, timeout=30)).reward)
        await asyncio.sleep(1)  # for what the runner writes to arrive here

asyncio.run(main())
"""


def test_ray_does_not_warn_of_blocking(cluster: None, tmp_path: Path) -> None:
    """An agent that is no coroutine has a thread of its own, in which it may wait for its weights."""
    (tmp_path / "agent.py").write_text(BLOCKING)
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, tmp_path / "agent.py", ray.get_runtime_context().gcs_address]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.stdout.startswith("1.0"), done.stderr
    assert "blocking" not in done.stdout + done.stderr


async def test_an_object_can_be_awaited(make_ray_store: MakeRayStore) -> None:
    """`aget` gives the object of a reference, of a value, and says that there is none in time."""
    store = make_ray_store()
    await store.add_resources({"large": ObjectResource(value=np.ones(WEIGHTS)), "small": ObjectResource(value=[1])})
    resources: Any = present(await store.get_latest_resources()).resources
    assert (await resources["large"].aget()).sum() == WEIGHTS
    assert await resources["small"].aget() == [1]

    def slow() -> None:
        import time

        time.sleep(3)

    late = ObjectResource(value=ray.remote(num_cpus=0)(slow).remote())
    with pytest.raises(ray.exceptions.GetTimeoutError):
        await late.aget(timeout=0.1)
    with pytest.raises(ray.exceptions.GetTimeoutError):
        await asyncio.to_thread(late.get, 0.1)
