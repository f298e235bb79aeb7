"""Rows 70 and 71 of the fault suite: a trainer that is slower than its runners, and one that is killed as it takes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import ray

import raystore as rs
from tests.conftest import SLACK, MakeRayStore
from tests.helpers import until


async def agent(task: Any, ctx: rs.Context) -> float:
    """Its span is a twelfth of the store's memory."""
    with ctx.span("w", text="x" * 5_000):
        await asyncio.sleep(0.001)
    return 1.0


async def train_slowly(count: int, seconds: int = 60, retention: int | None = 3) -> dict[str, int]:
    """What became of so many rollouts in a small store beside a trainer that checkpoints every other step."""
    store = rs.InMemoryLightningStore(
        eviction_memory_threshold=60_000, safe_memory_threshold=30_000, consumers=["t"],
        retention=None if retention is None else {"max_rollouts": retention},
    )  # fmt: skip
    trained: list[Any] = []
    lost = pauses = 0
    with store:
        async with rs.RunnerPool(store, agent, size=1, concurrency=4):
            made = await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=n) for n in range(count)])
            ids = [rollout.rollout_id for rollout in made]
            deadline, step = time.monotonic() + seconds, 0
            while len(trained) < count and time.monotonic() < deadline:
                batch = await store.take(8, consumer="t", timeout=1)
                if not batch.rollouts:
                    if lost:  # a store that loses what it should keep may have nothing left to give
                        break
                    await store.checkpoint("t", step)
                    continue
                await asyncio.sleep(0.02)
                for rollout in batch.rollouts:
                    try:
                        lost += not await store.query_spans(rollout.rollout_id)
                    except rs.SpansEvictedError:
                        lost += 1
                    trained.append(rollout.rollout_id)
                await store.query_many_spans(ids, allow_partial=True)  # somebody watches
                step += 1
                await store.ack(batch, step=step)
                if step % 2 == 0:
                    await store.checkpoint("t", step)
            pauses = sum(change.kind == "memory_full" for change in (await store.changes(kinds=["memory_full"])).items)
    return {
        "not trained": len(set(ids) - set(trained)), "trained twice": len(trained) - len(set(trained)),
        "without spans": lost, "pauses": pauses,
    }  # fmt: skip


def is_met(figure: dict[str, int]) -> bool:
    return not figure["not trained"] and not figure["trained twice"] and not figure["without spans"]


@pytest.mark.timeout(300)
async def test_memory_is_full_beside_a_slow_trainer(
    report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """Everything is trained on once, with all its spans; the store has waited for its trainer instead."""
    count = amount(60, 2_000)
    figure = await train_slowly(count, amount(60, 250))
    report(70, "memory full beside a slow trainer", figure=figure, bar="0; 0; 0; ≥ 1",
           met=is_met(figure) and figure["pauses"] > 0, did=f"{count} rollouts of 6 KB, room for ten")  # fmt: skip


@pytest.mark.parametrize("broken", ["reading counts", "memory counts"])
async def test_a_store_that_lets_go_too_early_is_found_out(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """What somebody has read is deleted; or what a consumer awaits or holds goes once memory is full."""
    if broken == "reading counts":
        monkeypatch.setattr("raystore.core.training.is_wanted", lambda state, entry: entry.is_held)
        assert not is_met(await train_slowly(60, 20))
    else:
        monkeypatch.setattr("raystore.core.training.is_wanted", lambda state, entry: False)
        assert not is_met(await train_slowly(60, 20, retention=None))


# -- a taker that dies -------------------------------------------------------------------------------------------------


class _Taker:
    """A process whose take waits."""

    def __init__(self, handle: Any) -> None:
        self.store = rs.RayLightningStore(handle)

    async def park(self, count: int) -> list[Any]:
        return [rollout.rollout_id for rollout in (await self.store.take(count, consumer="t", timeout=120)).rollouts]

    async def pid(self) -> int:
        return os.getpid()


Taker: Any = ray.remote(num_cpus=0, max_concurrency=4)(_Taker)


@pytest.mark.timeout(600)
async def test_a_trainer_is_killed_while_its_take_waits(
    make_ray_store: MakeRayStore, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """What the dead one would have had comes to the next, first and in its order; nothing is lost or given twice."""
    store, kills, delays = make_ray_store(), amount(3, 40), []
    given: list[str] = []
    made: list[str] = []
    for number in range(kills):
        taker = Taker.remote(store.actor)
        pid = await taker.pid.remote()
        running = [await store.start_rollout(f"{number}/{n}") for n in range(3)]
        waiting = taker.park.remote(2)
        await until(lambda: _waits(store))
        os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        for rollout in running:
            await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
            made.append(rollout.rollout_id)
        while len(given) < len(made):
            batch = await store.take(2, consumer="t", timeout=15)
            given += [rollout.rollout_id for rollout in batch.rollouts]
            await store.ack(batch, step=len(given))
        delays.append(time.monotonic() - started)
        del waiting
    figure = {"lost": len(set(made) - set(given)), "twice": len(given) - len(set(given)),
              "out of order": sum(a != b for a, b in zip(made, given, strict=False)),
              "given after s, at most": round(max(delays), 1)}  # fmt: skip
    met = given == made and max(delays) <= 8 * SLACK
    report(71, "trainer killed while its take waits", figure=figure, bar=f"0; 0; 0; ≤ {8 * SLACK}", met=met,
           did=f"{kills} kills")  # fmt: skip


async def _waits(store: rs.RayLightningStore) -> bool:
    return (await store.statistics())["waiters"] >= 1
