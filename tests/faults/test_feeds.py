"""Rows 75 and 78 of the fault suite: driver, store and runners of a feed are killed in turn, over and over.

In row 78 evaluations run beside it.
"""

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
from raystore.core.evaluation_table import Evaluation, EvaluationTable
from tests.conftest import MakeMemoryStore
from tests.faults import eval_trainer, feed_trainer
from tests.faults.processes import ROOT, kill
from tests.helpers import until

VICTIMS = ("driver", "store", "runner")


def begin(directory: Path, groups: int, *cluster: str, program: str = "feed_trainer") -> subprocess.Popen[bytes]:
    """A driver of a feed."""
    command = [sys.executable, "-m", f"tests.faults.{program}", str(directory), str(groups), *cluster]
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


async def killed_in_turn(
    directory: Path, groups: int, kills: int, total: int, lots: random.Random, program: str = "feed_trainer"
) -> dict[str, int]:
    """Run a driver to its end, which makes so many steps in total, with so many kills; how often each was killed."""
    directory.mkdir()
    address, namespace = ray.get_runtime_context().gcs_address, f"faults-{os.getpid()}"
    driver, killed = begin(directory, groups, address, namespace, program=program), dict.fromkeys(VICTIMS, 0)
    try:
        while driver.poll() is None or driver.returncode != 0:
            if driver.poll() is not None:
                assert driver.returncode == -signal.SIGKILL, (directory / "log").read_text()[-3_000:]
                driver = begin(directory, groups, address, namespace, program=program)
            made = sum(killed.values())
            victim = VICTIMS[made % len(VICTIMS)]
            steps = (made + 1) * total // (kills + 2) if made < kills else None
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
    rs.stop(feed_trainer.STORE, namespace=namespace)
    return killed


@pytest.mark.timeout(2_400)
async def test_all_of_a_feed_are_killed_in_turn(
    cluster: None, tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """Each item is trained once in the final model, in the batches of an undisturbed run, and all places are free."""
    groups, kills, seed = amount(120, 2_000), amount(6, 100), 72
    lots = random.Random(seed)
    expected = await undisturbed(tmp_path / "calm", groups)
    directory = tmp_path / "run"
    started = time.monotonic()
    killed = await killed_in_turn(directory, groups, kills, len(expected), lots)
    seconds = time.monotonic() - started
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


@pytest.mark.timeout(2_400)
async def test_evaluations_beside_a_feed_whose_processes_are_killed(
    cluster: None, tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """Each item is sampled k times, with the pinned version; training goes as if there were none."""
    groups, kills, seed = amount(120, 2_000), amount(6, 100), 78
    lots = random.Random(seed)
    expected = await undisturbed(tmp_path / "calm", groups)
    directory = tmp_path / "run"
    started = time.monotonic()
    killed = await killed_in_turn(directory, groups, kills, len(expected), lots, "eval_trainer")
    seconds = time.monotonic() - started
    found = json.loads((directory / "model.json").read_text())
    results, samples = (json.loads((directory / f"{name}.json").read_text()) for name in ("results", "samples"))
    wrong = eval_trainer.judged(results, samples, len(expected))
    ahead = eval_trainer.too_far_ahead((directory / "drawn").read_text().splitlines())
    standing = [one for one in results if not one["undone"]]
    figure = {
        **wrong, "too far ahead": ahead, "batches that differ": differing(expected, found),
        "evaluations": len(standing), "undone": len(results) - len(standing), "samples": len(samples),
        "kills": killed, "seconds": round(seconds),
    }  # fmt: skip
    met = found == expected and not ahead and not any(wrong.values()) and sum(killed.values()) == kills
    did = f"{groups} groups, {len(standing)} evaluations of {sum(map(len, eval_trainer.ITEMS.values()))} items"
    did += f" x {eval_trainer.SAMPLES} beside them"
    what = "driver, store and runners killed in turn while evaluations run beside a feed"
    report(78, what, figure=figure, bar="0 of each", met=met, seed=seed, did=did)


@pytest.mark.parametrize("mutation", ["pins", "retries", "end", None])
async def test_the_row_would_find_it(
    make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch, mutation: str | None
) -> None:
    """Attempts with the newest version, or retries alone; an evaluation that ends before its last sample."""
    pin_of = EvaluationTable.pin_of
    if mutation == "pins":
        monkeypatch.setattr(EvaluationTable, "pin_of", lambda table, rollout: None)
    elif mutation == "retries":
        monkeypatch.setattr(
            EvaluationTable,
            "pin_of",
            lambda table, rollout: None if rollout.status == "requeuing" else pin_of(table, rollout),
        )
    elif mutation == "end":
        monkeypatch.setattr(Evaluation, "is_whole", property(lambda one: one.counted > 20))
    store = make_memory_store(max_deliveries=5)
    feed = store.feed("train", [1], resources_id="policy", size=1, batch=1, require=())
    await feed.publish([0.0], version=0)
    evaluation = await eval_trainer.evaluate(feed, 0)
    await feed.publish([1.0], version=1)
    first = await store.dequeue_many_rollouts(limit=5)
    for rollout in first:  # their runner is killed
        await store.finish_attempt(rollout.rollout_id, rollout.attempt.attempt_id, [], "failed", outcome="infra")
    while (await evaluation.status()).status == "running":
        for rollout in await store.dequeue_many_rollouts(limit=100, timeout=1):
            await store.finish_attempt(rollout.rollout_id, rollout.attempt.attempt_id, [], "succeeded")
    results = [one.model_dump() for one in await store.evaluations()]
    wrong = eval_trainer.judged(results, await eval_trainer.samples_of(store), 0)
    expected = {"pins": "versions wrong", "retries": "versions wrong", "end": "numbers wrong"}
    assert [name for name, count in wrong.items() if count] == ([expected[mutation]] if mutation else [])
    await feed.close()


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
