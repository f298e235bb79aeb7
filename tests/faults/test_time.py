"""Rows 23 to 25 and 49 of the fault suite: clocks that jump, that disagree, and time in which nobody calls."""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

import raystore as rs
from tests.conftest import MakeRayStore
from tests.faults.processes import kill, later
from tests.helpers import make_span, present, status_of, until

HOUR, YEAR = 3600.0, 365 * 24 * 3600.0

#: Found by Python when it starts: the wall clock of the process is off by the number in the file beside it.
SHIFTED = """
import pathlib, time
_real, _by = time.time, pathlib.Path(__file__).with_name("seconds")
time.time = lambda: _real() + float(_by.read_text())
"""


def shifted_clock(directory: Path, seconds: float = 0.0) -> Any:
    """A runtime environment whose processes read a wall clock that is off; and what sets it anew."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(SHIFTED)
    new, file = directory / "new", directory / "seconds"

    def shift(seconds: float) -> None:
        new.write_text(str(seconds))
        new.replace(file)

    shift(seconds)
    return {"env_vars": {"PYTHONPATH": str(directory)}}, shift


async def test_the_wall_clock_jumps(
    make_ray_store: MakeRayStore, tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """An hour or a year, forth and back, in the store's process: timers go by time that passed."""
    environment, shift = shifted_clock(tmp_path / "clock")
    store = make_ray_store(actor_options={"runtime_env": environment})
    shift(1000.0)
    assert abs(await store.actor.__ray_call__.remote(lambda actor: time.time()) - time.time() - 1000) < 5
    shift(0.0)
    soon = rs.RolloutConfig(timeout_seconds=1.5, unresponsive_seconds=60)
    late = rs.RolloutConfig(timeout_seconds=120, unresponsive_seconds=60)
    early = missed = rounds = 0
    for _ in range(amount(1, 20)):
        for seconds in (HOUR, -HOUR, YEAR, -YEAR):
            rounds += 1
            configs = [soon] * 5 + [late] * 5
            for config in configs:
                await store.enqueue_rollout("x", config=config)
            started = time.monotonic()
            claimed = [await store.dequeue_rollout() for _ in configs]
            await asyncio.sleep(0.2)
            shift(seconds)
            await asyncio.sleep(started + 1.2 - time.monotonic())
            early += sum([await status_of(store, rollout) != "preparing" for rollout in claimed])
            await asyncio.sleep(started + 2.5 - time.monotonic())
            missed += sum([await status_of(store, rollout) != "failed" for rollout in claimed[:5]])
            early += sum([await status_of(store, rollout) != "preparing" for rollout in claimed[5:]])
    report(23, "the store's wall clock jumps", figure={"spurious timeouts": early, "missed": missed}, bar="0; 0",
           met=not early and not missed, did=f"{rounds} jumps of ±1 h and ±1 year, 10 attempts each")  # fmt: skip


async def test_a_store_that_was_down_for_hours(
    make_ray_store: MakeRayStore, tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """Attempts that ran when it died get a full period from when it is back; then they are dealt with."""
    environment, shift = shifted_clock(tmp_path / "clock")
    store = make_ray_store(journal=tmp_path / "j", actor_options={"runtime_env": environment})
    early, missed, count, period = 0, 0, amount(20, 500), 2.0
    for hours in (2, 0):  # down for two hours; and back with a clock that is two hours behind
        config = rs.RolloutConfig(unresponsive_seconds=period)
        await asyncio.gather(*(store.enqueue_rollout(number, config=config) for number in range(count)))
        made = [present(rollout) for rollout in await asyncio.gather(*(store.dequeue_rollout() for _ in range(count)))]
        await asyncio.gather(*(store.add_span(make_span(rollout)) for rollout in made))
        ids = [rollout.rollout_id for rollout in made]
        assert {rollout.status for rollout in await store.query_rollouts(rollout_ids=ids)} == {"running"}
        shift(hours * HOUR)
        before = await kill(store)
        killed = time.monotonic()
        await until(functools.partial(later, store, before["epoch"]))
        back = time.monotonic()
        while time.monotonic() < killed + period - 0.2:
            early += sum(rollout.status != "running" for rollout in await store.query_rollouts(rollout_ids=ids))
            await asyncio.sleep(0.1)
        await asyncio.sleep(back + period + 0.5 - time.monotonic())
        missed += sum(rollout.status != "failed" for rollout in await store.query_rollouts(rollout_ids=ids))
    report(24, "down for hours", figure={"requeued within the grace": early, "missed": missed}, bar="0",
           met=not early and not missed,
           did=f"{count} running attempts, down for 2 h, and back with a clock 2 h behind")  # fmt: skip


class _Off:
    """A runner whose wall clock is off."""

    def __init__(self, handle: Any) -> None:
        self.store = rs.RayLightningStore(handle)

    async def write(self, rollout_id: str, attempt_id: str) -> Any:
        number = await self.store.get_next_span_sequence_id(rollout_id, attempt_id)
        now = time.time()
        await self.store.add_span(
            make_span(rollout_id, number, attempt_id=attempt_id, start_time=now, end_time=now + 0.001)
        )
        return number, now


Off: Any = ray.remote(num_cpus=0)(_Off)


async def test_clocks_of_runners_disagree(
    make_ray_store: MakeRayStore, tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """Spans of one attempt come from processes ten minutes apart: their order is that of their sequence ids."""
    store, count = make_ray_store(), amount(60, 5_000)
    writers = [
        Off.options(runtime_env=shifted_clock(tmp_path / str(minutes), minutes * 60)[0]).remote(store.actor)
        for minutes in (-10, 0, 10)
    ]
    for writer in writers:  # before the attempt begins, which must not be silent for as long as a process takes
        await writer.__ray_ready__.remote()
    rollout = await store.start_rollout("x", config=rs.RolloutConfig(unresponsive_seconds=5))
    ids = rollout.rollout_id, rollout.attempt.attempt_id
    told = [await writers[number % 3].write.remote(*ids) for number in range(count)]
    spans = await store.query_spans(rollout.rollout_id)
    misordered = sum(span.sequence_id != number + 1 for number, span in enumerate(spans)) + abs(len(spans) - count)
    backwards = sum(
        present(later.start_time) < present(earlier.start_time) for earlier, later in itertools.pairwise(spans)
    )
    assert [number for number, _ in told] == list(range(1, count + 1))
    assert backwards > count / 4, "the clocks agreed"
    assert await status_of(store, rollout) == "running", await store.story(rollout.rollout_id)
    report(25, "clocks of runners ten minutes apart", figure={"misordered": misordered}, bar="0", met=not misordered,
           did=f"{count} spans of three processes, {backwards} of which start before the span before")  # fmt: skip


class _Empty:
    """What Ray takes for an actor that does nothing."""

    async def cpu_seconds(self) -> float:
        return time.process_time()


Empty: Any = ray.remote(num_cpus=0)(_Empty)


async def test_nobody_calls(
    make_ray_store: MakeRayStore, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """Deadlines are met without any client's help, and an idle store uses next to no processor."""
    store, empty, seconds = make_ray_store(), Empty.remote(), amount(4, 300)
    rollout = await store.start_rollout("x", config=rs.RolloutConfig(timeout_seconds=seconds / 2))
    bare, ours = await empty.cpu_seconds.remote(), (await store.statistics())["cpu_seconds"]
    await asyncio.sleep(seconds)
    bare, ours = await empty.cpu_seconds.remote() - bare, (await store.statistics())["cpu_seconds"] - ours
    ended = present((await store.get_rollout_by_id(rollout.rollout_id)).end_time)
    late = ended - rollout.attempt.start_time - seconds / 2
    figure = {"expired late by s": round(late, 3), "share of a core": round(ours / seconds, 4),
              "of an empty actor": round(bare / seconds, 4)}  # fmt: skip
    report(49, "no calls at all", figure=figure, bar="≤ 1 s; < 0.005 more than an empty actor",
           met=0 <= late <= 1 and ours - bare < 0.005 * seconds, did=f"{seconds} s")  # fmt: skip
