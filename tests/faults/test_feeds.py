"""Row 75 of the fault suite: driver, store and runners of a feed are killed in turn, over and over."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

import raystore as rs
from tests.faults import feed_trainer
from tests.faults.processes import ROOT, kill
from tests.helpers import until

VICTIMS = ("driver", "store", "runner")


def begin(directory: Path, groups: int, *cluster: str) -> subprocess.Popen[bytes]:
    """A driver of a feed."""
    command = [sys.executable, "-m", "tests.faults.feed_trainer", str(directory), str(groups), *cluster]
    with (directory / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def kill_runner(directory: Path, lots: random.Random) -> bool:
    """SIGKILL one of the runners that live; whether there was one."""
    pids = [int(path.name.partition("-")[2]) for path in directory.glob("runner-*")]
    alive = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    if not alive:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(lots.choice(alive), signal.SIGKILL)
    return True


async def undisturbed(directory: Path, groups: int) -> list[Any]:
    """What each step is trained on if nothing fails."""
    directory.mkdir()
    await asyncio.to_thread(begin(directory, groups).wait, 600)
    batches: list[Any] = json.loads((directory / "model.json").read_text())
    return batches


@pytest.mark.timeout(2_400)
async def test_all_of_a_feed_are_killed_in_turn(
    cluster: None, tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """Each item is trained once in the final model, in the batches of an undisturbed run, and all places are free."""
    groups, kills, seed = amount(120, 2_000), amount(6, 100), 72
    lots = random.Random(seed)
    expected = await undisturbed(tmp_path / "calm", groups)
    directory = tmp_path / "run"
    directory.mkdir()
    address, namespace = ray.get_runtime_context().gcs_address, f"faults-{os.getpid()}"
    driver, killed = begin(directory, groups, address, namespace), dict.fromkeys(VICTIMS, 0)
    started = time.monotonic()
    try:
        while driver.poll() is None or driver.returncode != 0:
            if driver.poll() is not None:
                assert driver.returncode == -signal.SIGKILL, (directory / "log").read_text()[-3_000:]
                driver = begin(directory, groups, address, namespace)
            made = sum(killed.values())
            victim = VICTIMS[made % len(VICTIMS)]
            steps = (made + 1) * len(expected) // (kills + 2) if made < kills else None
            await until(functools.partial(has_come_to, directory, steps, driver), within=120)
            await asyncio.sleep(lots.uniform(0, 0.3))
            if driver.poll() is not None:
                continue
            if victim == "driver":
                driver.kill()
                await asyncio.to_thread(driver.wait)
                for path in directory.glob("runner-*"):  # they end with it, and others come
                    path.unlink(missing_ok=True)
            elif victim == "store":
                await kill(rs.connect(feed_trainer.STORE, namespace=namespace))
            elif not kill_runner(directory, lots):
                continue
            killed[victim] += 1
    finally:
        driver.kill()
        driver.wait()
    seconds = time.monotonic() - started
    rs.stop(feed_trainer.STORE, namespace=namespace)
    found = json.loads((directory / "model.json").read_text())
    items = [row[0] for batch in found for row in batch]
    status = rs.FeedStatus.model_validate_json((directory / "status.json").read_text())
    endings = [stream.endings for stream in status.streams.values()]
    figure = {
        "trained": len(items), "twice": len(items) - len(set(items)), "batches that differ": differing(expected, found),
        "kills": killed, "seconds": round(seconds),
    }  # fmt: skip
    met = found == expected and len(items) == len(set(items)) and sum(killed.values()) == kills
    assert sum(sum(counts.values()) for counts in endings) == groups and status.over and not status.under_way
    did = f"{groups} groups of {feed_trainer.SIZE}, batches of {feed_trainer.BATCH}, in order"
    what = "driver, store and runners of a feed killed in turn"
    report(75, what, figure=figure, bar="twice 0, differ 0", met=met, seed=seed, did=did)


async def has_come_to(directory: Path, count: int | None, driver: subprocess.Popen[bytes]) -> bool:
    """Whether a runner works and so many steps were made, some of them again; or the driver has ended."""
    if driver.poll() is not None:
        return True
    steps = directory / "steps"
    made = len(steps.read_text().splitlines()) if steps.exists() else 0
    return count is not None and made >= count and any(directory.glob("runner-*"))


def differing(expected: list[Any], found: list[Any]) -> int:
    """How many batches are not as they were to be."""
    pairs = itertools.zip_longest(expected, found)
    return sum(1 for was_to_be, is_now in pairs if was_to_be != is_now)
