"""Rows 3 and 4 of the fault suite: what concurrent clients saw could have happened one call at a time.

The store is killed in mid-run, so that the histories go over the end of a process.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

import raystore as rs
from tests.conftest import MakeRayStore
from tests.faults.histories import NEVER, Call, is_register, wrong_in_queue
from tests.faults.processes import kill
from tests.helpers import until


def put(value: int, start: int, end: float = NEVER) -> Call:
    return Call("put", value, start, end)


def get(value: int | None, start: int, end: int) -> Call:
    return Call("get", value, start, end)


@pytest.mark.parametrize(("calls", "pattern"), [
    ([put(1, 0, 1), get(2, 2, 3)], "never went in"),
    ([put(1, 0, 1), get(1, 2, 3), get(1, 2, 4)], "twice"),
    ([put(1, 0, 1), put(2, 2, 3), get(2, 4, 5), get(1, 6, 7)], "overtook"),
    ([put(1, 0, 1), put(2, 2, 3), get(2, 4, 5)], "overtook"),
    ([put(1, 0, 1), get(None, 2, 3), get(1, 4, 5)], "empty"),
    ([put(1, 0, 1), get(None, 2, 3)], "empty"),
    ([put(1, 4, 5), get(1, 2, 3)], "before it went in"),
])  # fmt: skip
def test_a_queue_that_is_wrong_is_found_out(calls: list[Call], pattern: str) -> None:
    """Each of the four patterns."""
    assert any(pattern in line for line in wrong_in_queue(calls))


@pytest.mark.parametrize("calls", [
    [put(1, 0, 1), put(2, 0, 1), get(2, 2, 3), get(1, 4, 5)],  # went in at the same time
    [put(1, 0, 1), put(2, 2, 3), get(1, 4, 7), get(2, 4, 5)],  # came out at the same time
    [put(1, 0, 3), get(None, 2, 4), get(1, 5, 6)],
    [put(1, 0, 1), get(None, 2, 6), get(1, 4, 5)],
    [put(1, 0), put(2, 1, 2), get(2, 3, 4)],  # of an outcome that nobody knows
])  # fmt: skip
def test_a_queue_that_is_right_is_not(calls: list[Call]) -> None:
    """Overlapping calls may be in either order."""
    assert wrong_in_queue(calls) == []


def write(value: int, start: int, end: float = NEVER) -> Call:
    return Call("write", value, start, end)


def read(value: int | None, start: float, end: float) -> Call:
    return Call("read", value, start, end)


@pytest.mark.parametrize(("calls", "is_right"), [
    ([write(1, 0, 1), read(1, 2, 3)], True),
    ([write(1, 0, 1), read(None, 2, 3)], False),
    ([write(1, 0, 3), read(None, 1, 2), read(1, 2.5, 2.8)], True),
    ([write(1, 0, 3), read(1, 1, 2), read(None, 2.5, 2.8)], False),
    ([write(1, 0, 1), write(2, 2, 3), read(1, 4, 5)], False),
    ([write(1, 0, 5), write(2, 0, 5), read(1, 6, 7), read(2, 8, 9)], False),
    ([write(1, 0), read(None, 1, 2), read(1, 8, 9)], True),  # took effect late
    ([write(1, 0), write(2, 1, 2), read(2, 3, 4)], True),
])  # fmt: skip
def test_registers_are_told_apart(calls: list[Call], is_right: bool) -> None:
    """Histories that could have happened, and that could not."""
    assert is_register(calls) is is_right


class _Client:
    """A process that calls and remembers when."""

    def __init__(self, handle: Any, name: str, seed: int) -> None:
        self.store, self.name, self.lots = rs.RayLightningStore(handle), name, random.Random(seed)

    async def queue(self, coroutines: int, count: int) -> list[Any]:
        """Put and get, with what came of it."""
        calls = []

        async def one(number: Any) -> None:
            for step in range(count):
                start = time.monotonic()
                if self.lots.random() < 0.5:
                    value = f"{self.name}/{number}/{step}"
                    await self.store.enqueue_rollout(value)
                    calls.append(Call("put", value, start, time.monotonic()))
                else:
                    claimed = await self.store.dequeue_rollout()
                    calls.append(Call("get", claimed and claimed.input, start, time.monotonic()))

        await asyncio.gather(*(one(number) for number in range(coroutines)))
        return calls

    async def registers(self, ids: list[Any], coroutines: int, count: int) -> dict[Any, list[Any]]:
        """Read and write the modes of rollouts."""
        calls: dict[Any, list[Call]] = {rollout_id: [] for rollout_id in ids}

        async def one(number: Any) -> None:
            for step in range(count):
                rollout_id, start = self.lots.choice(ids), time.monotonic()
                if self.lots.random() < 0.5:
                    value = f"{self.name}/{number}/{step}"
                    await self.store.update_rollout(rollout_id, metadata={"value": value})
                    calls[rollout_id].append(Call("write", value, start, time.monotonic()))
                else:
                    found = await self.store.get_rollout_by_id(rollout_id)
                    seen = (found.metadata or {}).get("value")
                    calls[rollout_id].append(Call("read", seen, start, time.monotonic()))

        await asyncio.gather(*(one(number) for number in range(coroutines)))
        return calls


Client: Any = ray.remote(num_cpus=0)(_Client)


@pytest.mark.timeout(900)
async def test_a_queue_is_linearizable(
    make_ray_store: MakeRayStore, tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """First in, first out, for whoever looks, also over the death of the store."""
    store = make_ray_store(journal=tmp_path / "j")
    clients = [Client.remote(store.actor, f"c{number}", number) for number in range(4)]
    each = amount(40, 4_000)
    running = [client.queue.remote(8, each) for client in clients]
    await until(lambda: _have_come(store, each * 4), within=60)  # a quarter of all that will
    await kill(store)
    killed = time.monotonic()
    calls = [call for told in running for call in await told]
    wrong = wrong_in_queue(calls)
    out = sum(call.kind == "get" and call.value is not None for call in calls)
    report(3, "concurrent queue use, the store killed once", figure={"violations": len(wrong)}, bar="0",
           met=not wrong, seed="0-3",
           did=f"{len(calls)} operations of 4 processes x 8 coroutines; {out} came out")  # fmt: skip
    assert out > len(calls) / 5, wrong[:3]
    assert sum(call.end > killed for call in calls) > len(calls) / 5


async def _have_come(store: rs.RayLightningStore, count: int) -> bool:
    return sum((await store.statistics())["rollouts_by_status"].values()) >= count


async def _are_written(store: rs.RayLightningStore) -> bool:
    return all(rollout.metadata for rollout in await store.query_rollouts())


@pytest.mark.timeout(900)
async def test_each_rollout_is_linearizable(
    make_ray_store: MakeRayStore, tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """What is read of a rollout is what was written last, for whoever looks, also over the death of the store."""
    store = make_ray_store(journal=tmp_path / "j")
    ids = [(await store.enqueue_rollout("x")).rollout_id for _ in range(amount(20, 400))]
    clients = [Client.remote(store.actor, f"c{number}", 10 + number) for number in range(4)]
    running = [client.registers.remote(ids, 4, amount(25, 2_000)) for client in clients]
    await until(lambda: _are_written(store), within=60)
    await kill(store)
    killed = time.monotonic()
    told = [await answer for answer in running]
    by_key = {rollout_id: [call for calls in told for call in calls[rollout_id]] for rollout_id in ids}
    wrong = [rollout_id for rollout_id, calls in by_key.items() if not is_register(calls)]
    total = sum(map(len, by_key.values()))
    report(4, "concurrent updates of rollouts, the store killed once", figure={"violations": len(wrong)}, bar="0",
           met=not wrong, seed="10-13",
           did=f"{total} operations on {len(ids)} rollouts by 4 processes x 4 coroutines")  # fmt: skip
    assert sum(call.end > killed for calls in by_key.values() for call in calls) > total / 5
