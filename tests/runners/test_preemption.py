"""Nodes that go away: `RunnerPool(preempt=)` hands rollouts on, and what it says may be wrong."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

import raystore as rs
from tests.conftest import MakeMemoryStore
from tests.helpers import AnyStore, present, until

Isolation = Literal["actor", "process"]
both = pytest.mark.parametrize("isolation", ["actor", "process"])


class Node:
    """A node of which a file says whether it goes away: the file is read as a Python value."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def says(self, value: Any) -> None:
        self.path.write_text(repr(value))

    def __call__(self) -> Any:
        return eval(self.path.read_text()) if self.path.exists() else None


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """The node of the runners of a test."""
    return Node(tmp_path / "node")


async def saving(task: Any, ctx: rs.Context) -> float:
    """Saves over and over."""
    if ctx.saved is not None:
        return float(ctx.saved)
    for turn in range(10_000):
        with ctx.span("turn"):
            await asyncio.sleep(0.02)
        await ctx.save(turn)
    return -1.0


def saving_in_thread(task: Any, ctx: rs.Context) -> float:
    """The same for an agent that is not async."""
    if ctx.saved is not None:
        return float(ctx.saved)
    for turn in range(10_000):
        with ctx.span("turn"):
            time.sleep(0.02)
        ctx.sync.save(turn)
    return -1.0


async def saving_late(task: Any, ctx: rs.Context) -> float:
    """Saves only when it is interrupted."""
    if ctx.saved is not None:
        return float(ctx.saved)
    with ctx.span("turn"):
        pass
    try:
        await asyncio.sleep(1_000)
    except asyncio.CancelledError:
        assert ctx.stopped
        await asyncio.sleep(0.7)  # for longer than the runner of a pool that stops would wait
        await ctx.save(7)
        raise
    return -1.0


async def attempts_of(store: AnyStore, made: rs.Rollout, count: int) -> list[rs.Attempt]:
    """The attempts of a rollout, once so many have ended."""

    async def ended() -> list[rs.Attempt]:
        found = [one for one in await store.query_attempts(made.rollout_id) if one.outcome is not None]
        return found if len(found) >= count else []

    found: list[rs.Attempt] = await until(ended)
    return found


async def has_turned(store: AnyStore, made: rs.Rollout) -> None:
    async def turned() -> Any:
        return await store.query_spans(made.rollout_id, name="turn")

    await until(turned)


@both
@pytest.mark.parametrize("agent", [saving, saving_in_thread])
async def test_rollouts_are_handed_on_when_they_have_saved(
    store: AnyStore, node: Node, isolation: Isolation, agent: Callable[..., Any]
) -> None:
    """At the next save, without a charge; the runner claims nothing until its node stays, and then goes on."""
    async with rs.RunnerPool(
        store, agent, size=1, isolation=isolation, flush_seconds=0.05, preempt=node, heartbeat_seconds=1000
    ) as pool:
        made = await store.enqueue_rollout("x")
        await has_turned(store, made)
        node.says(1_000.0)
        (first,) = await attempts_of(store, made, 1)
        assert (first.status, first.outcome) == ("unresponsive", "withdrawn")

        async def rests() -> bool:
            worker = present(await store.get_worker_by_id(pool.worker_ids[0]))
            return bool((worker.heartbeat_stats or {}).get("resting"))

        await until(rests)
        await asyncio.sleep(0.3)
        waiting = present(await store.get_rollout_by_id(made.rollout_id))
        assert waiting.status == "requeuing" and len(await store.query_attempts(made.rollout_id)) == 1
        assert any("rest" in finding.text for finding in await store.why())
        node.says(False)
        done = present(await store.wait_for_rollout(made.rollout_id, timeout=20))

        async def goes_on() -> bool:
            return not await rests()

        await until(goes_on)
    assert (done.status, done.attempt.resumed_from) == ("succeeded", first.attempt_id)
    assert done.reward is not None and done.reward >= 0


@both
async def test_whoever_does_not_save_is_interrupted_in_time(
    make_memory_store: MakeMemoryStore, node: Node, isolation: Isolation
) -> None:
    """When half of the time is over; its agent then has cancel_grace_seconds to save."""
    store = make_memory_store()
    pool = rs.RunnerPool(
        store, saving_late, size=1, isolation=isolation, flush_seconds=0.05, preempt=node, cancel_grace_seconds=3
    )
    async with pool:
        made = await store.enqueue_rollout("x")
        await has_turned(store, made)
        began = time.monotonic()
        node.says(2.0)
        (first,) = await attempts_of(store, made, 1)
        assert 1.0 <= time.monotonic() - began < 8.0
        assert first.outcome == "withdrawn"
        node.says(None)
        done = present(await store.wait_for_rollout(made.rollout_id, timeout=20))
    assert (done.status, done.reward) == ("succeeded", 7.0)


async def test_what_ends_in_time_is_reported_as_ever(make_memory_store: MakeMemoryStore, node: Node) -> None:
    """And nothing is claimed after it."""
    store = make_memory_store()

    async def brief(task: Any, ctx: rs.Context) -> float:
        with ctx.span("turn"):
            pass
        await asyncio.sleep(2)
        return 1.0

    async with rs.RunnerPool(store, brief, size=1, flush_seconds=0.05, preempt=node):
        first, second = [await store.enqueue_rollout(n) for n in range(2)]
        await has_turned(store, first)
        node.says(True)
        assert present(await store.wait_for_rollout(first.rollout_id, timeout=10)).status == "succeeded"
        await asyncio.sleep(0.3)
        assert present(await store.get_rollout_by_id(second.rollout_id)).status == "queuing"


@pytest.mark.parametrize("wrong", ["'soon'", "float('nan')", "1 / 0", "object()"])
async def test_nonsense_counts_as_no(
    make_memory_store: MakeMemoryStore, tmp_path: Path, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, with what was expected, and the runner works on."""
    node = Node(tmp_path / "node")
    node.path.write_text(wrong)
    store = make_memory_store()

    async def agent(task: Any, ctx: rs.Context) -> float:
        return 1.0

    with caplog.at_level(logging.ERROR, "raystore"):
        async with rs.RunnerPool(store, agent, size=1, preempt=node):
            made = await store.enqueue_rollout("x")
            assert present(await store.wait_for_rollout(made.rollout_id, timeout=10)).status == "succeeded"
            await asyncio.sleep(0.1)
    assert "counts as no" in caplog.text and "None or False, True, or the seconds" in caplog.text


async def test_a_pool_that_rests_says_so_and_stops_at_once(
    make_memory_store: MakeMemoryStore, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """Its log has why nothing goes on; `stop` does not wait for the node."""
    store = make_memory_store()
    node.says(True)

    async def agent(task: Any, ctx: rs.Context) -> float:
        return 1.0

    with caplog.at_level(logging.WARNING, "raystore"):
        pool = rs.RunnerPool(store, agent, size=2, preempt=node)
        pool.start()
        await asyncio.sleep(0.2)
        await store.enqueue_rollout("x")
        began = time.monotonic()
        await asyncio.to_thread(pool.stop)
    assert time.monotonic() - began < 2.0
    assert "rests, as preempt= says that its node goes away" in caplog.text


def test_what_is_no_function_is_refused(make_memory_store: MakeMemoryStore) -> None:
    """Before any runner starts."""
    with pytest.raises(rs.InvalidValueError, match="preempt=True is not valid: expected a function"):
        rs.RunnerPool(make_memory_store(), saving, preempt=True)  # type: ignore[arg-type]
