"""Rows 4 and 5: spans in bulk and large spans, against the same bytes through an empty actor."""

from __future__ import annotations

import asyncio
import os
import random
import time
from contextlib import ExitStack
from typing import Any

import raystore as rs
from benchmarks.scope import Scope
from benchmarks.table import Line, alternate, at_least, at_most, compare
from tests.support import shapes
from tests.support.actors import Limit, Prober, killing
from tests.support.measure import percentile

IN_FLIGHT = 4  #: callers at once, on both sides


async def _through(limit: Any, size: int, calls: int) -> float:
    """Calls of so many bytes per second, through an empty actor."""
    data = os.urandom(size)
    left = iter(range(calls))

    async def one() -> None:
        for _ in left:
            await limit.take.remote(data)

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(IN_FLIGHT)))
    return calls / (time.perf_counter() - started)


def frame_bytes(store: Any, spans: list[Any]) -> int:
    """What these spans are on the wire."""
    from raystore.wire.frames import pack_operation

    rows = [store._encoder.span(span) for span in spans]
    arguments = {"rollout_id": spans[0].rollout_id, "attempt_id": spans[0].attempt_id, "spans": rows}
    return len(pack_operation("add_spans", arguments).frame)


async def _addressed(store: Any, templates: list[Any], calls: int, per_call: int) -> tuple[list[list[Any]], list[str]]:
    """So many lists of spans, each for an attempt of its own, which has started; and the rollouts."""
    made, rollouts = [], await asyncio.gather(*(store.start_rollout("bulk") for _ in range(calls)))
    for number, rollout in enumerate(rollouts):
        ids = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
        made.append(
            [
                shapes.renamed(
                    templates[index % len(templates)], f"{number:08x}{index:08x}", sequence_id=index + 1, **ids
                )
                for index in range(per_call)
            ]
        )
    return made, [rollout.rollout_id for rollout in rollouts]


async def bulk_spans(scope: Scope) -> list[Line]:
    """Row 4."""
    calls, per_call = scope.amount(48), 512
    templates = [shapes.desks(rs.Span, "lifecycle", 1)[0].spans[n % 8] for n in range(8)]
    with ExitStack() as stack:
        store = stack.enter_context(rs.start())
        limit = stack.enter_context(killing(Limit.remote()))
        size = frame_bytes(store, (await _addressed(store, templates, 1, per_call))[0][0])

        async def ours() -> float:
            lists, rollout_ids = await _addressed(store, templates, calls, per_call)

            async def one() -> None:
                while lists:
                    await store.add_many_spans(lists.pop())

            started = time.perf_counter()
            await asyncio.gather(*(one() for _ in range(IN_FLIGHT)))
            rate = calls * per_call / (time.perf_counter() - started)
            await store.delete_rollouts(rollout_ids)
            return rate

        async def theirs() -> float:
            return per_call * await _through(limit, size, calls)

        samples = await alternate(scope.rounds, {"ours": ours, "limit": theirs})
    did = f"{calls} calls of {per_call} spans, {size / per_call:,.0f} bytes each on the wire, {IN_FLIGHT} callers"
    return [compare(4, "bulk span ingest", samples, "limit", at_least(0.6), unit="spans/s", did=did)]


async def large_spans(scope: Scope) -> list[Line]:
    """Row 5."""
    lines = []
    with ExitStack() as stack:
        store = stack.enter_context(rs.start())
        limit = stack.enter_context(killing(Limit.remote()))
        prober = stack.enter_context(killing(Prober.remote(store.actor)))
        for name, size, per_rollout, per_call in (
            ("20 spans of 64 KiB", 64 * 1024, 20, 16),
            ("spans of 1 MiB", 1024 * 1024, 2, 1),
        ):
            rollouts = scope.amount(96)
            attributes = {"gen_ai.output.messages": shapes.words(random.Random(1), size - 300)}
            template = rs.Span.from_attributes(attributes=attributes, name="openai.chat.completion")
            mebibytes = rollouts * per_rollout * size / 2**20

            async def ours(
                template: Any = template, rollouts: int = rollouts, per: int = per_rollout, mb: float = mebibytes
            ) -> float:
                lists, rollout_ids = await _addressed(store, [template], rollouts, per)

                async def one() -> None:
                    while lists:
                        await asyncio.gather(*(store.add_span(span) for span in lists.pop()))

                started = time.perf_counter()
                await asyncio.gather(*(one() for _ in range(IN_FLIGHT)))
                rate = mb / (time.perf_counter() - started)
                await store.delete_rollouts(rollout_ids)
                return rate

            async def theirs(size: int = size * per_call, mb: float = mebibytes) -> float:
                return await _through(limit, size, round(mb * 2**20 / size)) * size / 2**20

            samples = await alternate(scope.rounds, {"ours": ours, "limit": theirs})
            did = f"{rollouts} rollouts of {per_rollout} spans, {mebibytes:,.0f} MiB a round, {IN_FLIGHT} callers"
            lines.append(compare(5, name, samples, "limit", at_least(0.7), unit="MiB/s", did=did))

            quiet: list[float] = []
            busy: list[float] = []
            for _ in range(scope.rounds):
                quiet.append(percentile(await prober.calls.remote(400), 99) * 1000)
                probing = prober.calls_until_stopped.remote()
                await ours()
                prober_stop = prober.stop.remote()
                busy.append(percentile(await probing, 99) * 1000)
                await prober_stop
            did = f"p99 of another process's get_rollout_by_id, while {name} come in and while all is quiet"
            lines.append(
                compare(
                    5,
                    f"small calls beside {name}",
                    {"ours": busy, "quiet": quiet},
                    "quiet",
                    at_most(3),
                    unit="ms",
                    did=did,
                )
            )
    return lines


ROWS = {4: bulk_spans, 5: large_spans}
