"""Rows 27 and 28: a step of a trainer's loop with a feed, and what an item costs, however many there are."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack, closing

import psutil

import raystore as rs
from benchmarks.parties import Agl, Runners, has_peers
from benchmarks.scope import Scope
from benchmarks.table import Line, Measure, alternate, at_most, bound, compare

SIZE = 8  #: rollouts of a group
LARGE, SMALL = 1_000_000, 1_000  #: items of a dataset
KEPT = 500  #: finished rollouts that the store keeps
FILLS = 15_000  #: items until the change feed is as long as it gets


async def step(scope: Scope) -> list[Line]:
    """Row 27."""
    groups = scope.amount(64)
    rollouts = groups * SIZE
    with ExitStack() as stack:
        ours = stack.enter_context(rs.start())
        runners = stack.enter_context(closing(Runners(ours, 4)))
        agl = stack.enter_context(closing(Agl(4))) if has_peers() else None
        feed = ours.feed(
            "train", range(100 * groups), resources_id="policy", size=SIZE, batch=groups, max_lag=0, require=()
        )
        stack.callback(feed.close_now)
        await feed.publish(version=0)
        batches = feed.batches()
        trained: list[rs.FeedBatch] = []

        async def mine() -> float:
            started = time.perf_counter()
            number = len(trained)
            if trained:
                await feed.publish(version=number)
                await trained[-1].ack(step=number)
                await feed.checkpoint(number)
            running = asyncio.create_task(runners.work("step", 16, rollouts))
            batch = await anext(batches)
            spans = await batch.spans()
            seconds = time.perf_counter() - started
            await running
            trained.append(batch)
            if sum(map(len, spans.values())) != 10 * rollouts:
                raise RuntimeError("not all spans came back")
            return seconds

        async def theirs() -> float:
            assert agl is not None
            started = time.perf_counter()
            ids = await agl.enqueue(rollouts)
            running = asyncio.create_task(agl.work("step", 16, rollouts))
            if await agl.driver.ask("collect", rollout_ids=ids) != 10 * rollouts:
                raise RuntimeError("not all spans came back")
            seconds = time.perf_counter() - started
            await running
            return seconds

        parties: dict[str, Measure | None] = {"ours": mine, "agl-http": theirs if agl else None}
        samples = await alternate(scope.rounds, parties, warm=False)
    did = f"publish, ack, {groups} groups of {SIZE} drawn, run by 4 processes of 16 coroutines, taken, read with spans"
    return [compare(27, "a step of a feed", samples, "agl-http", at_most(0.1), unit="s", did=did)]


class _Loop:
    """A feed over a dataset, and one who does its work, in this process."""

    def __init__(self, length: int) -> None:
        self.store = rs.InMemoryLightningStore(retention={"max_rollouts": KEPT})
        self.feed = self.store.feed(
            "train", range(length), resources_id="policy", size=2, batch=16, max_lag=1, epochs=10**6, require=(),
            seed=None,
        )  # fmt: skip
        self.batches = self.feed.batches()
        self.step = 0

    async def begin(self) -> None:
        """Open the feed."""
        await self.feed.publish(version=0)

    async def run(self, items: int) -> float:
        """Microseconds of this thread and the pump's for each of so many items."""
        store, feed = self.store, self.feed
        started = time.process_time()
        for _ in range(items // 16):
            while not (claimed := await store.dequeue_many_rollouts(limit=64, timeout=1.0)):
                pass
            for rollout in claimed:
                await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")
            batch = await anext(self.batches)
            self.step += 1
            await feed.publish(version=self.step)
            await batch.ack(step=self.step)
            await feed.checkpoint(self.step)
        return (time.process_time() - started) / (items // 16 * 16) * 1e6

    def close(self) -> None:
        """End it."""
        self.feed.close_now()
        self.store.close()


async def items(scope: Scope) -> list[Line]:
    """Row 28."""
    some = scope.amount(4_000)
    total = LARGE if scope.long else scope.amount(40_000)
    with ExitStack() as stack:
        loops = {name: stack.enter_context(closing(_Loop(n))) for name, n in (("ours", LARGE), ("small", SMALL))}
        for loop in loops.values():
            await loop.begin()

        def measured(loop: _Loop) -> Measure:
            return lambda: loop.run(some)

        samples = await alternate(scope.rounds, {name: measured(loop) for name, loop in loops.items()})
        process, large = psutil.Process(), loops["ours"]
        await large.run(FILLS)
        before = process.memory_info().rss
        await large.run(total)
        growth = (process.memory_info().rss - before) / 2**20 / (total / 100_000)
    did = f"groups of 2 drawn, run, taken, trained; {LARGE:,} items against {SMALL:,}, {some:,} a round"
    grown = f"over {total:,} of {LARGE:,} items, in a store that keeps {KEPT} rollouts"
    return [
        compare(28, "an item of a large dataset", samples, "small", at_most(1.1), unit="µs", did=did),
        bound(28, "growth per 100,000 items", [growth], at_most(1.0, "MiB"), did=grown),
    ]


ROWS = {27: step, 28: items}
