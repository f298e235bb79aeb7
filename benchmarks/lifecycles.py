"""Rows 1, 2, 3, 7, 16 and 17: rollouts from claim to success, in the ways in which they are run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, closing
from typing import Any

import raystore as rs
from benchmarks.parties import Agl, Naive, Program, Runners, enqueue, has_peers
from benchmarks.scope import Scope
from benchmarks.table import Line, Measure, alternate, at_least, at_most, bound, compare
from tests.support import shapes

LIFECYCLE = "claim, 8 spans of 1.6 KB, succeed"


def lifecycle_rate(store: Any, workers: list[shapes.Desk], rollouts: int, shape: str = "lifecycle") -> Measure:
    """Rollouts per second of workers in this process."""

    async def measure() -> float:
        await enqueue(store, rollouts)
        return rollouts / await shapes.work(store, shape, workers, rollouts)

    return measure


def _agl_rate(agl: Agl | None, concurrency: int, rollouts: int) -> Measure | None:
    if agl is None:
        return None

    async def measure() -> float:
        await agl.enqueue(rollouts)
        asked = agl.clients[0].ask("work", shape="lifecycle", concurrency=concurrency, rollouts=rollouts)
        return rollouts / float(await asked)

    return measure


def _peer(stack: ExitStack, clients: int) -> Agl | None:
    return stack.enter_context(closing(Agl(clients))) if has_peers() else None


async def concurrent(scope: Scope) -> list[Line]:
    """Row 1."""
    lines = []
    with ExitStack() as stack:
        ours = stack.enter_context(rs.start())
        naive = stack.enter_context(closing(Naive()))
        agl = _peer(stack, 1)
        for concurrency in (64, 256):
            workers = shapes.desks(rs.Span, "lifecycle", concurrency)
            many, few = scope.amount(4096), scope.amount(192)
            samples = await alternate(
                scope.rounds,
                {
                    "ours": lifecycle_rate(ours, workers, many),
                    "naive": lifecycle_rate(naive, workers, few),
                    "agl-http": _agl_rate(agl, concurrency, scope.amount(128)) if concurrency == 64 else None,
                },
            )
            did = f"{LIFECYCLE}; {concurrency} coroutines; {many} rollouts a round (naive {few})"
            name = f"lifecycle, {concurrency} coroutines"
            goals = {"naive": 15, "agl-http": 30} if concurrency == 64 else {"naive": 25}
            for against, goal in goals.items():
                lines.append(compare(1, name, samples, against, at_least(goal), unit="rollouts/s", did=did))
    return lines


def _shared_rate(work: Callable[[], Awaitable[Any]], prepare: Callable[[], Awaitable[Any]], rollouts: int) -> Measure:
    async def measure() -> float:
        await prepare()
        started = time.perf_counter()
        await work()
        return rollouts / (time.perf_counter() - started)

    return measure


async def _over_processes(scope: Scope, shape: str, *, against_naive: bool) -> dict[str, list[float]]:
    """Rollouts per second over four processes of 16 workers each."""
    is_queued = shapes.SHAPES[shape][3]

    async def nothing() -> None:
        pass

    with ExitStack() as stack:
        ours, naive = stack.enter_context(rs.start()), stack.enter_context(closing(Naive()))
        mine = stack.enter_context(closing(Runners(ours, 4)))
        theirs = stack.enter_context(closing(Runners(naive, 4)))
        agl = _peer(stack, 4)
        many, few = scope.amount(4096), scope.amount(160)

        def rate(store: Any, runners: Any, rollouts: int) -> Measure:
            async def prepare() -> None:
                await (store.enqueue(rollouts) if isinstance(store, Agl) else enqueue(store, rollouts))

            return _shared_rate(
                lambda: runners.work(shape, 16, rollouts), prepare if is_queued else nothing, rollouts
            )  # fmt: skip

        parties: dict[str, Measure | None] = {
            "ours": rate(ours, mine, many),
            "naive": rate(naive, theirs, few) if against_naive else None,
            "agl-http": rate(agl, agl, few) if agl else None,
        }
        return await alternate(scope.rounds, parties)


async def processes(scope: Scope) -> list[Line]:
    """Row 2."""
    samples = await _over_processes(scope, "lifecycle", against_naive=True)
    did = f"{LIFECYCLE}; 4 processes of 16 coroutines; {scope.amount(4096)} rollouts a round"
    return [
        compare(2, "lifecycle, 4 processes", samples, against, at_least(goal), unit="rollouts/s", did=did)
        for against, goal in (("naive", 10), ("agl-http", 20))
    ]


async def micro_shapes(scope: Scope) -> list[Line]:
    """Row 17."""
    lines = []
    for shape in ("rollout", "dequeue-update-attempt"):
        samples = await _over_processes(scope, shape, against_naive=False)
        did = f"agentlightning's micro shape; 4 processes of 16 coroutines; {scope.amount(4096)} rollouts a round"
        lines.append(compare(17, shape, samples, "agl-http", at_least(20), unit="rollouts/s", did=did))
    return lines


async def sequential(scope: Scope) -> list[Line]:
    """Row 3."""
    many, few = scope.amount(800), scope.amount(160)
    calls: dict[str, list[float]] = {"plain": [], "pool": []}
    with ExitStack() as stack:
        ours, naive = stack.enter_context(rs.start()), stack.enter_context(closing(Naive()))
        pooled = stack.enter_context(rs.start())
        (desk,) = shapes.desks(rs.Span, "gathered", 1)

        async def counted(kind: str, store: Any, measure: Measure) -> float:
            before = (await store.statistics())["actor_calls"]
            rate = await measure()
            calls[kind].append(((await store.statistics())["actor_calls"] - before - 1) / many)
            return rate

        async def plain() -> float:
            await enqueue(ours, many)

            async def measure() -> float:
                return many / await shapes.work(ours, "gathered", [desk], many)

            return await counted("plain", ours, measure)

        spans = desk.spans

        async def agent(task: Any, ctx: Any) -> None:
            for span in spans:
                ctx.add(span)

        stack.enter_context(rs.RunnerPool(pooled, agent, size=1, concurrency=1))

        async def in_pool() -> float:
            async def measure() -> float:
                started = time.perf_counter()
                await pooled.wait_for_rollouts(rollout_ids=await enqueue(pooled, many))
                return many / (time.perf_counter() - started)

            return await counted("pool", pooled, measure)

        samples = await alternate(
            scope.rounds, {"plain": plain, "pool": in_pool, "naive": lifecycle_rate(naive, [desk], few, "gathered")}
        )
    did = f"one sequential runner; {many} rollouts a round (naive {few}); 8 spans and the status gathered"
    did_pool = f"RunnerPool(size=1, concurrency=1), work waiting, {many} rollouts a round"
    calls = {kind: counts[-scope.rounds :] for kind, counts in calls.items()}  # a first round warms up
    return [
        bound(3, "(a) actor calls per rollout", calls["plain"], at_most(2.0, "calls"), did=did),
        compare(3, "(a) plain code", samples, "naive", at_least(3.5), unit="rollouts/s", did=did, ours="plain"),
        bound(3, "(b) actor calls per rollout", calls["pool"], at_most(1.1, "calls"), did=did_pool),
        compare(3, "(b) in a pool", samples, "naive", at_least(8), unit="rollouts/s", did=did_pool, ours="pool"),
    ]


async def in_process(scope: Scope) -> list[Line]:
    """Row 7."""
    concurrency, many, few = 16, scope.amount(4000), scope.amount(500)
    with ExitStack() as stack:
        ours = stack.enter_context(rs.InMemoryLightningStore())
        agl = stack.enter_context(closing(Program("work"))) if has_peers() else None
        workers = shapes.desks(rs.Span, "lifecycle", concurrency)

        async def mine() -> float:
            await enqueue(ours, many)
            return many / await shapes.work_in_process(ours, workers, many)

        async def theirs() -> float:
            assert agl is not None
            return few / float(await agl.ask("lifecycle_in_process", rollouts=few, concurrency=concurrency))

        samples = await alternate(scope.rounds, {"ours": mine, "agl-memory": theirs if agl else None})
    did = f"{LIFECYCLE}; InMemoryLightningStore, {concurrency} coroutines, {many} rollouts a round (agl {few})"
    return [compare(7, "lifecycle in process", samples, "agl-memory", at_least(10), unit="rollouts/s", did=did)]


async def training_step(scope: Scope) -> list[Line]:
    """Row 16."""
    rollouts = scope.amount(512)
    with ExitStack() as stack:
        ours = stack.enter_context(rs.start())
        runners = stack.enter_context(closing(Runners(ours, 4)))
        agl = _peer(stack, 4)

        async def mine() -> float:
            started = time.perf_counter()
            ids = await enqueue(ours, rollouts)
            running = asyncio.create_task(runners.work("step", 16, rollouts))
            await ours.wait_for_rollouts(rollout_ids=ids)
            spans = await ours.query_many_spans(ids)
            seconds = time.perf_counter() - started
            await running
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
    did = f"{rollouts} rollouts of 10 spans enqueued, run by 4 processes of 16 coroutines, waited for, read with spans"
    return [compare(16, "a training step", samples, "agl-http", at_most(0.1), unit="s", did=did)]


ROWS = {1: concurrent, 2: processes, 3: sequential, 7: in_process, 16: training_step, 17: micro_shapes}
