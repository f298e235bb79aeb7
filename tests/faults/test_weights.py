"""Rows 66 and 67 of the fault suite: weights whose publisher, or whose store, is killed."""

from __future__ import annotations

import asyncio
import collections
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

import raystore as rs
from tests.channel import CODE
from tests.conftest import MakeRayStore
from tests.faults.processes import kill
from tests.helpers import present, until

ROLLOUTS = 30

# Starts a store and a pool. Publishes in its first run, and after a crash only when it is told to. Says again and again
# what has become of the rollouts.
DRIVER = (
    CODE
    + """
import asyncio, collections, json, sys, threading
import numpy as np, ray, raystore as rs
address, journal, name, number, count, mutation = sys.argv[1:]
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
exec(mutation)

async def agent(task, ctx):
    weights = await ctx.resources["policy"].aget()
    await asyncio.sleep(0.3)
    return float(weights[-1])

async def publish(store, version):
    weights = np.full(int(number), float(version))
    await store.update_resources("policy", {"policy": rs.ObjectResource(value=weights)}, policy_version=version)

async def main():
    store = rs.start(name, journal=journal, **globals().get("options", {}))
    is_first = not (await store.statistics())["total_rollouts"]
    if is_first:
        await publish(store, 1)
        await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=i) for i in range(int(count))])
    told, loop = asyncio.Event(), asyncio.get_running_loop()
    threading.Thread(target=lambda: sys.stdin.readline() and loop.call_soon_threadsafe(told.set), daemon=True).start()
    async with rs.RunnerPool(store, agent, size=2):
        while True:
            rollouts = await store.query_rollouts()
            stories = await asyncio.gather(*(store.story(rollout.rollout_id) for rollout in rollouts))
            statistics = await store.statistics()
            print(json.dumps({
                "status": collections.Counter(rollout.status for rollout in rollouts),
                "attempts": statistics["total_attempts"], "held_back": statistics["held_back"],
                "charged": sum("charged deliveries" in line for story in stories for line in story),
            }), file=channel)
            if told.is_set():
                told.clear()
                await publish(store, 2)
            await asyncio.sleep(0.2)

asyncio.run(main())
"""
)


class Driver:
    """A driver that can be killed."""

    def __init__(self, journal: Path, name: str, number: int, mutation: str = "") -> None:
        self._arguments = [
            ray.get_runtime_context().gcs_address,
            str(journal),
            name,
            str(number),
            str(ROLLOUTS),
            mutation,
        ]

    async def __aenter__(self) -> Driver:
        pipe = asyncio.subprocess.PIPE
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", DRIVER, *self._arguments, stdin=pipe, stdout=pipe, start_new_session=True
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self.process.returncode is None:
            os.kill(self.process.pid, signal.SIGKILL)
        await self.process.wait()

    async def says(self, condition: Callable[..., Any] | Callable[..., bool], within: float = 120.0) -> Any:
        """What it says once that fulfils a condition; the last thing it said if nothing does in time."""
        said = {}
        try:
            async with asyncio.timeout(within):
                while line := await present(self.process.stdout).readline():
                    said = json.loads(line)
                    if condition(said):
                        break
        except TimeoutError:
            pass
        assert said, "the driver said nothing"
        return said

    async def publish(self) -> None:
        """Let it publish weights."""
        stdin = present(self.process.stdin)
        stdin.write(b"\n")
        await stdin.drain()


def _done(said: Any) -> Any:
    return said["status"].get("succeeded", 0)


async def driver_killed(journal: Path, name: str, number: int, *, mutation: str = "", within: float = 120.0) -> Any:
    """Kill a driver in the middle of its rollouts, and go on with the next; what that says before and after it has
    published again, if it has to.
    """
    async with Driver(journal, name, number, mutation) as driver:
        before = await driver.says(lambda said: _done(said) >= 5)
    async with Driver(journal, name, number, mutation) as driver:
        resumed = await driver.says(lambda said: said["held_back"] or _done(said) == ROLLOUTS)
        later = await driver.says(lambda said: _done(said) == ROLLOUTS, within=3.0) if resumed["held_back"] else resumed
        if _done(later) < ROLLOUTS:
            await driver.publish()
        after = await driver.says(lambda said: _done(said) == ROLLOUTS, within) if _done(later) < ROLLOUTS else later
    return before, resumed, later, after


async def test_a_driver_is_killed_with_small_weights(
    cluster: None, report: Callable[..., None], tmp_path: Path
) -> None:
    """Weights of 1 MB are in the journal: the next driver's runners go on with them, and nobody publishes again."""
    before, resumed, later, after = await driver_killed(tmp_path / "j", "small-weights", 125_000)
    figure = {"done before": _done(before), "held back": resumed["held_back"], "succeeded": _done(later),
              "charged": after["charged"]}  # fmt: skip
    report(66, "driver killed, weights of 1 MB", figure=figure, bar="0 held back; all succeed; 0 charged",
           met=not resumed["held_back"] and _done(later) == ROLLOUTS and not after["charged"],
           did=f"{ROLLOUTS} rollouts")  # fmt: skip


@pytest.mark.long
async def test_a_driver_is_killed_with_large_weights(
    cluster: None, report: Callable[..., None], tmp_path: Path
) -> None:
    """Weights of 100 MB are above the bound: what waits for them is not tried until they are published again."""
    before, resumed, later, after = await driver_killed(tmp_path / "j", "large-weights", 12_500_000)
    figure = {"done before": _done(before), "held back": resumed["held_back"],
              "tried meanwhile": later["attempts"] - resumed["attempts"], "succeeded": _done(after),
              "charged": after["charged"]}  # fmt: skip
    met = resumed["held_back"] > 0 and figure["tried meanwhile"] == 0
    report(66, "driver killed, weights of 100 MB", figure=figure,
           bar="held back; 0 tried; all succeed once published again; 0 charged",
           met=met and _done(after) == ROLLOUTS and not after["charged"], did=f"{ROLLOUTS} rollouts")  # fmt: skip


NOTHING_IS_KEPT = "from raystore.remote import store; store.keep = lambda *arguments: None"
NOTHING_IS_HELD_BACK = """
import os, tempfile
folder = tempfile.mkdtemp()
open(os.path.join(folder, "sitecustomize.py"), "w").write(
    "from raystore.core import publishing; publishing.hold_back = lambda *arguments: False")
paths = os.pathsep.join([folder, *filter(None, sys.path)])
options = {"actor_options": {"runtime_env": {"env_vars": {"PYTHONPATH": paths}}}}
"""


@pytest.mark.long
async def test_weights_that_are_not_written_would_be_noticed(cluster: None, tmp_path: Path) -> None:
    """Row 66 finds a publisher that says that its weights are in the journal, and has not put them there."""
    _, resumed, later, _ = await driver_killed(tmp_path / "j", "unwritten", 125_000, mutation=NOTHING_IS_KEPT)
    assert resumed["held_back"] and _done(later) < ROLLOUTS


@pytest.mark.long
async def test_rollouts_that_are_not_held_back_would_be_noticed(cluster: None, tmp_path: Path) -> None:
    """Row 66 finds a store that hands out what cannot run."""
    async with Driver(tmp_path / "j", "unheld", 12_500_000) as driver:
        await driver.says(lambda said: _done(said) >= 5)
    async with Driver(tmp_path / "j", "unheld", 12_500_000, NOTHING_IS_HELD_BACK) as driver:
        first = await driver.says(lambda said: True)
        said = await driver.says(lambda said: said["attempts"] > first["attempts"] or said["held_back"])
    assert said["attempts"] > first["attempts"]


async def agent(task: Any, ctx: rs.Context) -> float:
    weights = ctx.resources["policy"].get()
    await asyncio.sleep(0.05)
    return float(weights.sum() >= 0)


async def store_killed(store: rs.RayLightningStore, count: int) -> Counter[str]:
    """Kill a store in the middle of rollouts with weights of 400 KB; what became of them."""
    weights = rs.ObjectResource(value=np.zeros(50_000))
    await store.update_resources("policy", {"policy": weights}, policy_version=0)
    async with rs.RunnerPool(store, agent, size=2, concurrency=4):
        requests = [rs.EnqueueRolloutRequest(input=i) for i in range(count)]
        made = [rollout.rollout_id for rollout in await store.enqueue_many_rollouts(requests)]
        await store.wait_for_rollout(made[count // 5])
        await kill(store)
        done = await store.wait_for_rollouts(rollout_ids=made, timeout=60)
    return collections.Counter(rollout.status for rollout in done)


@pytest.mark.parametrize(("what", "options"), [("in the journal", {}), ("held", {"journal_object_bytes": 0})])
async def test_the_store_is_killed_with_weights(
    make_ray_store: MakeRayStore,
    report: Callable[..., None],
    amount: Callable[[int, int], int],
    tmp_path: Path,
    what: str,
    options: dict[Any, Any] | dict[str, int],
) -> None:
    """Weights of 400 KB: its journal has them, or who published them gives them to the next process."""
    count = amount(100, 200)
    found = await store_killed(make_ray_store(journal=tmp_path / "j", **options), count)
    report(67, f"store killed, weights of 400 KB {what}", figure=dict(found), bar="all succeed",
           met=found == {"succeeded": count}, did=f"{count} rollouts")  # fmt: skip


@pytest.mark.long
async def test_weights_that_are_not_given_again_would_be_noticed(
    make_ray_store: MakeRayStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 67 finds a process that does not tell the next process of the store what it holds."""
    monkeypatch.setattr("raystore.remote.session_state.SessionState.hold_again", lambda *arguments: None)
    monkeypatch.setattr("raystore.remote.store.keep", lambda *arguments: None)
    store = make_ray_store(journal=tmp_path / "j", journal_object_bytes=0)
    found = await asyncio.wait_for(_partly(store), 60)
    assert found["held_back"] > 0


async def _partly(store: rs.RayLightningStore) -> Any:
    weights = rs.ObjectResource(value=np.zeros(50_000))
    await store.update_resources("policy", {"policy": weights}, policy_version=0)
    await store.enqueue_rollout("x")
    await kill(store)

    async def statistics() -> rs.LightningStoreStatistics:
        return await store.statistics()

    return await until(statistics)
