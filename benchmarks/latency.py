"""Rows 8, 14, 15 and 20: how soon one answer comes."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from contextlib import ExitStack
from typing import Any

import ray

import raystore as rs
from benchmarks.ingest import frame_bytes
from benchmarks.parties import enqueue
from benchmarks.scope import Scope
from benchmarks.table import Line, alternate, at_most, bound, compare
from tests.support import shapes
from tests.support.actors import Limit, Prober, killing
from tests.support.measure import percentile


async def single_call(scope: Scope) -> list[Line]:
    """Row 8."""
    count = scope.amount(2000) // scope.rounds
    medians: dict[str, list[float]] = {"ours": [], "empty": []}
    tails: dict[str, list[float]] = {"ours": [], "empty": []}
    with ExitStack() as stack:
        store = stack.enter_context(rs.start())
        limit = stack.enter_context(killing(Limit.remote()))
        (desk,) = shapes.desks(rs.Span, "lifecycle", 1)
        data = os.urandom(frame_bytes(store, desk.spans[:1]))
        for _ in range(scope.rounds):
            rollout = await store.start_rollout("one")
            ids = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
            spans = [shapes.renamed(desk.spans[0], f"{n:016x}", **ids) for n in range(count)]
            taken: dict[str, list[float]] = {"ours": [], "empty": []}
            for span in spans:
                started = time.perf_counter()
                await store.add_span(span)
                between = time.perf_counter()
                await limit.take.remote(data)
                taken["empty"].append(time.perf_counter() - between)
                taken["ours"].append(between - started)
            for name, times in taken.items():
                medians[name].append(statistics.median(times) * 1000)
                tails[name].append(percentile(times, 95) * 1000)
            await store.delete_rollouts([rollout.rollout_id])
    did = f"{count * scope.rounds} add_span of 1.6 KB, interleaved with empty calls of as many bytes ({len(data)})"
    return [
        compare(8, "a single call, median", medians, "empty", at_most(1.15), unit="ms", did=did),
        compare(8, "a single call, p95", tails, "empty", at_most(1.3), unit="ms", did=did),
    ]


async def waking(scope: Scope) -> list[Line]:
    """Row 14."""
    many = scope.amount(10_000)
    with ExitStack() as stack:
        store = stack.enter_context(rs.start())
        limit = stack.enter_context(killing(Limit.remote()))
        prober = stack.enter_context(killing(Prober.remote(store.actor)))
        woken: dict[str, list[float]] = {"ours": [], "empty": []}
        for _ in range(scope.rounds):
            waits, empties = [], []
            for _ in range(scope.amount(100)):
                rollout = await store.start_rollout("wake")
                waiting = asyncio.create_task(_woken(store, rollout.rollout_id))
                await asyncio.sleep(0.005)  # the call is parked by now
                issued = prober.finish.remote(rollout.rollout_id, rollout.attempt.attempt_id)
                waits.append(await waiting - await issued)
                started = time.perf_counter()
                await limit.take.remote(b"")
                empties.append(time.perf_counter() - started)
            woken["ours"].append(statistics.median(waits) * 1000)
            woken["empty"].append(statistics.median(empties) * 1000)
        lines = [
            compare(
                14,
                "a waiter wakes",
                woken,
                "empty",
                at_most(2),
                unit="ms",
                did="from another process's update_attempt being issued to wait_for_rollout returning here; median",
            )
        ]
        after_reply, beside = [], []
        for number in range(scope.rounds):
            ids = await enqueue(store, many, group_id=f"g{number}")
            many_waiting = [asyncio.create_task(_woken(store, rollout_id)) for rollout_id in ids]
            while (await store.statistics())["waiters"] < many:  # noqa: ASYNC110 - the store tells nobody who waits
                await asyncio.sleep(0.05)
            probing = prober.spans_until_stopped.remote(0.005)
            await asyncio.sleep(0.7)
            await store.cancel_rollouts(group_id=f"g{number}")
            replied = time.monotonic()
            instants = await asyncio.gather(*many_waiting)
            after_reply.append(percentile([max(at - replied, 0.0) for at in instants], 99) * 1000)
            await asyncio.sleep(max(replied + 0.7 - time.monotonic(), 0))
            await prober.stop.remote()
            near = [seconds for issued, seconds in await probing if abs(issued - replied) <= 0.5]
            beside.append(percentile(near, 99) * 1000)
            await store.delete_rollouts(ids)
        did = f"{many} coroutines on {many} rollouts that one cancel_rollouts(group_id=...) ends; p99 from its reply on"
        lines.append(bound(14, f"{many} waiters wake", after_reply, at_most(500, "ms"), did=did))
        did = "p99 of another process's add_span, one every 5 ms, within 0.5 s of that reply"
        lines.append(bound(14, "others meanwhile", beside, at_most(50, "ms"), did=did))
    return lines


async def _woken(store: Any, rollout_id: str) -> float:
    """When a wait for a rollout returned."""
    await store.wait_for_rollout(rollout_id)
    return time.monotonic()


async def snapshot(scope: Scope) -> list[Line]:
    """Row 15."""
    with ExitStack() as stack:
        store = stack.enter_context(rs.start())
        ids = await enqueue(store, 10_000)
        taken = []
        for _ in range(max(scope.rounds, 5) * 4):
            started = time.perf_counter()
            await store.wait_for_rollouts(rollout_ids=ids, timeout=0)
            taken.append((time.perf_counter() - started) * 1000)
    did = f"wait_for_rollouts(timeout=0) on 10,000 unfinished ids, {len(taken)} times"
    return [bound(15, "a snapshot of 10,000", taken, at_most(20, "ms"), did=did)]


async def start(scope: Scope) -> list[Line]:
    """Row 20."""

    async def ours() -> float:
        started = time.perf_counter()
        with rs.start() as store:
            await store.get_rollout_by_id("ro-0")
            return time.perf_counter() - started

    async def empty() -> float:
        started = time.perf_counter()
        actor = Limit.remote()
        await actor.take.remote(b"")
        seconds = time.perf_counter() - started
        ray.kill(actor)
        return seconds

    samples = await alternate(max(scope.rounds, 3), {"ours": ours, "empty": empty})
    extra = [a - b for a, b in zip(samples["ours"], samples["empty"], strict=True)]
    did = (
        f"rs.start() to the first answer, {statistics.median(samples['ours']):.2f} s; "
        f"an empty actor to its first answer, {statistics.median(samples['empty']):.2f} s"
    )
    return [bound(20, "start, beyond an empty actor", extra, at_most(0.25, "s"), did=did, against="empty actor")]


ROWS = {8: single_call, 14: waking, 15: snapshot, 20: start}
