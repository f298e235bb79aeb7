"""Cancelling reaches the agent: how it is told, how soon, and what its place does then."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

import raystore as rs
from raystore.types.contract import RolloutConfig
from tests.conftest import MakeRayStore
from tests.helpers import AnyStore, mostly_in_memory, present, until
from tests.runners.sleepers import patient, sleeping


async def running(store: AnyStore | rs.RayLightningStore, rollout_ids: list[Any]) -> None:
    """Wait until all of these have emitted a span."""

    async def all_run() -> bool:
        return all((await store.query_many_spans(rollout_ids)).values())  # a heartbeat sets it running before

    await until(all_run)


@mostly_in_memory
@pytest.mark.parametrize("agent", [patient, sleeping])
@pytest.mark.parametrize("by", ["ids", "group", "tags", "timeout", "superseded"])
async def test_ways_to_be_of_no_use_any_more(
    store: AnyStore, agent: Callable[..., float] | Callable[..., Coroutine[Any, Any, float]], by: str
) -> None:
    """By ids, group or tags, by a timeout, or superseded: the agent is told why, and its place takes the next one."""
    config = RolloutConfig(timeout_seconds=1.0) if by == "timeout" else None
    made = await store.enqueue_rollout("long", group_id="g", tags={"kind": "slow"}, config=config)
    async with rs.RunnerPool(store, agent, size=1, flush_seconds=0.02):
        await running(store, [made.rollout_id])
        if by == "ids":
            await store.cancel_rollouts([made.rollout_id])
        elif by == "group":
            await store.cancel_rollouts(group_id="g")
        elif by == "tags":
            await store.cancel_rollouts(tags={"kind": "slow"})
        elif by == "superseded":
            await store.start_attempt(made.rollout_id)
        quick = await store.enqueue_rollout("quick")
        assert present(await store.wait_for_rollout(quick.rollout_id, timeout=10)).status == "succeeded"
    first = (await store.query_attempts(made.rollout_id))[0]
    why = by if by in ("timeout", "superseded") else "cancelled"
    assert first.outcome == why
    last = (await store.query_spans(made.rollout_id, first.attempt_id))[-1]
    assert (last.name, last.attributes) == ("ended", {"why": why, "cancelled": True})
    status = {"timeout": "failed", "superseded": "preparing"}.get(by, "cancelled")
    assert (await store.get_rollout_by_id(made.rollout_id)).status == status


async def test_a_cancel_that_overtakes_its_claim(store: AnyStore) -> None:
    """Issued together with the enqueuing: the runner hears of the cancel before it has its claim."""
    async with rs.RunnerPool(store, sleeping, size=1, heartbeat_seconds=1000) as pool:

        async def parked() -> int:
            return (await store.statistics())["waiters"]

        for number in range(10):
            await until(parked)
            name = f"long-{number}"
            made, cancelled = await asyncio.gather(
                store.enqueue_rollout("long", rollout_id=name), store.cancel_rollouts([name])
            )
            assert (made.rollout_id, [r.status for r in cancelled]) == (name, ["cancelled"])
            assert [cancelled[0].attempt.worker_id] == pool.worker_ids
        quick = await store.enqueue_rollout("quick")
        assert present(await store.wait_for_rollout(quick.rollout_id, timeout=10)).status == "succeeded"


@mostly_in_memory
async def test_an_agent_that_does_not_listen_is_told_of(store: AnyStore, caplog: pytest.LogCaptureFixture) -> None:
    """It keeps its place until it returns; a warning says what to do."""

    def deaf(task: Any, ctx: rs.Context) -> float:
        with ctx.span("begun"):
            pass
        time.sleep(1.5 if task == "long" else 0)
        return 1.0

    made = await store.enqueue_rollout("long")
    async with rs.RunnerPool(store, deaf, size=1, flush_seconds=0.02, cancel_grace_seconds=0.1):
        await running(store, [made.rollout_id])
        await store.cancel_rollouts([made.rollout_id])
        quick = await store.enqueue_rollout("quick")
        assert present(await store.wait_for_rollout(quick.rollout_id, timeout=10)).status == "succeeded"
    assert (await store.get_rollout_by_id(made.rollout_id)).status == "cancelled"
    if store.info.name is None:  # a runner on Ray logs in its own process
        assert "isolation='process'" in caplog.text and made.rollout_id in caplog.text


@pytest.mark.timeout(300)
@pytest.mark.parametrize("cancels", [20, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("isolation", ["actor", "process"])
async def test_cancels_are_quick(
    make_ray_store: MakeRayStore, tmp_path: Path, isolation: Literal["actor", "process"], cancels: int
) -> None:
    """From the driver's call: an async agent has seen it, or its process is dead, within 1 s; so is its place busy."""
    store = make_ray_store()
    size, concurrency = 2, 5

    async def agent(task: Any, ctx: rs.Context) -> None:
        with ctx.span("begun", pid=os.getpid()):
            pass
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            with ctx.span("seen"):
                pass
            raise

    seen, busy = [], []
    async with rs.RunnerPool(
        store, agent, size, concurrency=concurrency, isolation=isolation, cancel_grace_seconds=0, flush_seconds=0.02
    ):
        made: Sequence[rs.Rollout] = [await store.enqueue_rollout(i) for i in range(size * concurrency)]
        await running(store, [r.rollout_id for r in made])
        for _ in range(cancels // len(made)):
            began = await store.query_many_spans([r.rollout_id for r in made])
            following = await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=0)] * len(made))
            cancelled = time.time()
            await store.cancel_rollouts([r.rollout_id for r in made])

            async def ended(
                made: Sequence[rs.Rollout] = made, began: dict[str, list[rs.Span]] = began
            ) -> list[float] | list[Any] | None:
                """When each agent was seen to have ended."""
                if isolation == "process":
                    pids: list[Any] = [spans[0].attributes["pid"] for spans in began.values()]
                    return [time.time() for pid in pids] if not any(map(psutil.pid_exists, pids)) else None
                spans = await store.query_many_spans([r.rollout_id for r in made])
                times = [of_one[-1].end_time for of_one in spans.values() if of_one[-1].name == "seen"]
                return times if len(times) == len(made) else None

            seen += [moment - cancelled for moment in await until(ended)]
            await running(store, [r.rollout_id for r in following])
            spans = await store.query_many_spans([r.rollout_id for r in following])
            busy += [present(of_one[0].start_time) - cancelled for of_one in spans.values()]
            made = following
    assert len(seen) == len(busy) == cancels
    seen.sort()
    busy.sort()
    print(f"{isolation}: seen p50 {seen[cancels // 2]:.3f} s, p99 {seen[int(cancels * 0.99) - 1]:.3f} s; "
          f"busy again p50 {busy[cancels // 2]:.3f} s, last {busy[-1]:.3f} s")  # fmt: skip
    assert seen[int(cancels * 0.99) - 1] <= 1.0 and busy[int(cancels * 0.99) - 1] <= 1.0
