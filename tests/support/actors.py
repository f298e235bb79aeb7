"""Actors beside a store: one that does nothing, and one that makes small calls and remembers how long each took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

import raystore as rs


@contextmanager
def killing(actor: Any) -> Iterator[Any]:
    """An actor that ends with the block."""
    try:
        yield actor
    finally:
        ray.kill(actor)


class _Limit:
    """An actor that does nothing."""

    async def take(self, data: bytes) -> None:
        """Take bytes."""

    async def echo(self, data: bytes) -> bytes:
        """Give the bytes back."""
        return data


Limit: Any = ray.remote(num_cpus=0, max_concurrency=1000)(_Limit)


class _Prober:
    """A process that makes small calls one after the other and remembers how long each took."""

    def __init__(self, actor: Any) -> None:
        self.store = rs.RayLightningStore(actor)
        self.stopped = False
        self.attempt: Any = None

    async def _timed(self, call: Any) -> float:
        started = time.perf_counter()
        await call
        return time.perf_counter() - started

    async def calls(self, count: int) -> list[float]:
        """So many reads; seconds each."""
        return [await self._timed(self.store.get_rollout_by_id("ro-0")) for _ in range(count)]

    async def calls_until_stopped(self) -> list[float]:
        """Reads, until `stop`."""
        self.stopped = False
        taken = []
        while not self.stopped:
            taken.append(await self._timed(self.store.get_rollout_by_id("ro-0")))
        return taken

    async def stop(self) -> None:
        """Let `calls_until_stopped` and `spans_until_stopped` return."""
        self.stopped = True

    async def spans_until_stopped(self, every_seconds: float) -> list[tuple[float, float]]:
        """Add small spans at a fixed rate, whether earlier ones are answered or not: (issued, seconds)."""
        self.stopped = False
        rollout = await self.store.start_rollout("probe")
        taken: list[tuple[float, float]] = []

        async def one(number: int) -> None:
            span = rs.Span.from_attributes(
                attributes={"k": "v"}, rollout_id=rollout.rollout_id, attempt_id=rollout.attempt.attempt_id,
                sequence_id=number,
            )  # fmt: skip
            issued = time.monotonic()
            await self.store.add_span(span)
            taken.append((issued, time.monotonic() - issued))

        pending: list[asyncio.Task[None]] = []
        started = time.monotonic()
        while not self.stopped:
            pending.append(asyncio.create_task(one(len(pending) + 1)))
            await asyncio.sleep(max(started + len(pending) * every_seconds - time.monotonic(), 0))
        await asyncio.gather(*pending)
        return taken

    async def finish(self, rollout_id: str, attempt_id: str) -> float:
        """Let an attempt succeed; when that was asked, on the machine's monotonic clock."""
        issued = time.monotonic()
        await self.store.update_attempt(rollout_id, attempt_id, status="succeeded")
        return issued


Prober: Any = ray.remote(num_cpus=0)(_Prober)
