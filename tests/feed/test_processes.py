"""Feeds and processes: drivers and stores that are killed, a second driver, ranks that read their shards."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

import raystore as rs
from tests.conftest import MakeRayStore
from tests.feed.conftest import RIGHT, running, trained
from tests.feed.loop import CODE, MATH

ROOT = Path(__file__).parent.parent.parent


def loop(directory: Path, kind: str, *, kill_after: int | None = None) -> Any:
    """Run the loop to its end, and give what it says; or kill it once it has made so many more steps."""
    directory.mkdir(exist_ok=True)
    steps = directory / "steps.jsonl"

    def made() -> int:
        return len(steps.read_text().splitlines()) if steps.exists() else 0

    pause = "0" if kill_after is None else "0.05"
    command = [sys.executable, "-m", "tests.feed.loop", str(directory), kind, "1000", pause]
    environment = os.environ | {"RAY_ADDRESS": "local"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if kill_after is not None:
        wanted, deadline = made() + kill_after, time.monotonic() + 60
        while made() < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        return None
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(said.splitlines()[-1])


def batches(directory: Path) -> dict[int, list[str]]:
    """The groups of each step of the model that is left in the end."""
    lines = [json.loads(line) for line in (directory / "steps.jsonl").read_text().splitlines()]
    last = lines[-1]["step"]
    return {line["step"]: line["groups"] for line in lines if line["step"] <= last}


@pytest.mark.parametrize(
    ("kind", "kills"), [("memory", (1, 2, 0, 3)), pytest.param("ray", (2, 3), marks=pytest.mark.long)]
)
@pytest.mark.timeout(400)
def test_killed_and_run_again_to_the_same_ledger(tmp_path: Path, kind: str, kills: tuple[int, ...]) -> None:
    """The driver, and with it the store, dies in the midst of steps: the batches are those of an undisturbed run."""
    whole = loop(tmp_path / "whole", kind)
    items = [item for item in (*MATH, *CODE) if item % 5]
    assert whole["over"] and whole["ledger"] == sorted(items * 4)
    assert whole["endings"] == {"trained": len(items), "filtered": len(MATH) + len(CODE) - len(items)}
    for steps in kills:
        loop(tmp_path / "killed", kind, kill_after=steps)
    assert loop(tmp_path / "killed", kind) == whole
    assert batches(tmp_path / "killed") == batches(tmp_path / "whole")


@pytest.fixture
def store(make_ray_store: MakeRayStore, tmp_path: Path) -> rs.RayLightningStore:
    """A store on Ray with a journal."""
    return make_ray_store(journal=tmp_path / "journal")


@ray.remote(num_cpus=0)
class Driver:
    """Another process that has the same feed."""

    def __init__(self, store: Any) -> None:
        self.store = store

    async def publish(self) -> str:
        """Begin the feed; what came of it."""
        self.feed = self.store.feed("train", list(range(12)), **RIGHT)
        try:
            await self.feed.publish([0.0], version=0)
        except rs.FeedHeldError as error:
            return f"{type(error).__name__}: {error.holder}"
        return "published"

    async def pid(self) -> int:
        return os.getpid()


@pytest.mark.timeout(120)
async def test_another_process_is_refused_until_the_first_has_ended(store: rs.RayLightningStore) -> None:
    """Then it goes on where that was, also if it asks before the store knows of the end."""
    driver: Any = Driver.remote(store)  # type: ignore[attr-defined]  # ray adds it
    assert await driver.publish.remote() == "published"
    pid = await driver.pid.remote()
    feed = store.feed("train", list(range(12)), **RIGHT)
    with pytest.raises(rs.FeedHeldError, match="session"):
        await feed.restore(None)
    assert feed.is_pumping is False
    os.kill(pid, signal.SIGKILL)
    await feed.restore(None)
    async with running(store, lambda rollout: 1.0):
        groups = [group for batch in await trained(feed) for group in batch]
    assert sorted(group.input for group in groups) == list(range(12))


@pytest.mark.timeout(120)
async def test_a_feed_rides_through_the_death_of_its_store(store: rs.RayLightningStore) -> None:
    """Draws, judgements, batches and publishes: each item is trained once, and nobody is told."""
    feed = store.feed("train", list(range(24)), **RIGHT | {"max_lag": 2})

    async def kill(batch: rs.FeedBatch) -> None:
        if batch.number in (2, 5, 8):
            known = await store.actor.describe.remote()
            os.kill(known["pid"], signal.SIGKILL)

    async with running(store, lambda rollout: float(rollout.input % 4)):
        batches = await trained(feed, keep=rs.keep(successes=(1, 2)), after=kill)
    groups = [group for batch in batches for group in batch]
    assert sorted(group.input for group in groups) == [item for item in range(24) if item % 4]
    assert all(len(batch) == 2 for batch in batches)
    status = await feed.status()
    assert status.streams[""].endings == {"trained": 18, "filtered": 6} and status.free == status.places


def spans_in(shard: rs.BatchShard) -> dict[str, int]:
    """How many model calls each rollout of a shard has, read by this process."""
    spans = asyncio.run(shard.spans())
    return {rollout_id: len(rs.triplets(found)) for rollout_id, found in spans.items()}


@pytest.mark.timeout(120)
async def test_ranks_read_their_shards(store: rs.RayLightningStore) -> None:
    """In processes of their own; what they are passed has no spans."""
    feed = store.feed("train", list(range(5)), **RIGHT | {"batch": 5})
    async with running(store, lambda rollout: 1.0):
        await feed.publish(version=0)
        async for batch in feed.batches():
            rank_of: Any = ray.remote(num_cpus=0)(spans_in)
            answers = [rank_of.remote(batch.shard(rank, 2)) for rank in range(2)]
            found = [await answer for answer in answers]
            assert {k: v for one in found for k, v in one.items()} == {r.rollout_id: 1 for r in batch.rollouts}
            assert all(found)
            await batch.ack(step=1)


@pytest.mark.timeout(60)
def test_ctrl_c_ends_a_driver(tmp_path: Path) -> None:
    """Also one that waits for a batch, and with a function of its user's that does not return."""
    program = """
import asyncio, signal, sys, time
import raystore as rs

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

def items():
    yield from range(4)
    time.sleep(600)

async def main():
    async with rs.InMemoryLightningStore() as store:
        feed = store.feed("train", items(), resources_id="policy", size=2, batch=2)
        await feed.publish(version=0)
        print("waiting", flush=True)
        async for batch in feed.batches():
            pass

asyncio.run(main())
"""
    (tmp_path / "driver.py").write_text(program)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "driver.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors and time.monotonic() - started < 15
