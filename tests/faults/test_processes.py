"""Rows 11 to 18, 20 to 22 and 48 of the fault suite: processes and nodes that die or freeze."""

from __future__ import annotations

import asyncio
import functools
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

import psutil
import pytest
import ray

import raystore as rs
from raystore.remote.session_state import SessionState
from tests.channel import CODE
from tests.conftest import SLACK, MakeRayStore
from tests.faults.processes import describe, kill, later, program
from tests.helpers import make_span, present, until

HERE = Path(__file__).parent


# -- runners and callers -----------------------------------------------------------------------------------------------


class _Claimer:
    """A process whose dequeue waits."""

    def __init__(self, handle: Any) -> None:
        self.store = rs.RayLightningStore(handle)

    async def park(self) -> str | None:
        claimed = await self.store.dequeue_rollout(timeout=60)
        return claimed.rollout_id if claimed else None

    async def pid(self) -> int:
        return os.getpid()


Claimer: Any = ray.remote(num_cpus=0, max_concurrency=10)(_Claimer)


@pytest.mark.timeout(900)
async def test_a_runner_is_killed_while_its_dequeue_waits(
    make_ray_store: MakeRayStore, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """Nothing is handed to the dead and lost: it is offered again within 8 s, as if it had never been handed out."""
    store, batch, lost, delays, kills = make_ray_store(), amount(4, 10), 0, [], amount(4, 200)
    for _ in range(kills // batch):
        claimers = [Claimer.remote(store.actor) for _ in range(batch)]
        pids = await asyncio.gather(*(claimer.pid.remote() for claimer in claimers))
        waiting = [claimer.park.remote() for claimer in claimers]
        await until(lambda: _waiters(store, batch))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        made = await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=i) for i in range(batch)])
        got: set[str] = set()
        while len(got) < batch and (claimed := await store.dequeue_rollout(timeout=15)) is not None:
            assert claimed.attempt.sequence_id == 1
            got.add(claimed.rollout_id)
            await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="succeeded")
        delays.append(time.monotonic() - started)
        lost += len({rollout.rollout_id for rollout in made} - got)
        del waiting
    figure = {"lost": lost, "offered again after s, at most": round(max(delays), 1)}
    report(12, "runner killed while its dequeue waits", figure=figure, bar=f"0; ≤ {8 * SLACK} s", did=f"{kills} kills",
           met=not lost and max(delays) <= 8 * SLACK)  # fmt: skip


async def _waiters(store: rs.RayLightningStore, count: int) -> bool:
    return (await store.statistics())["waiters"] >= count


async def test_callers_that_give_up(
    make_ray_store: MakeRayStore, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """Time-outs of a call, `wait_for`, and cancellation around the answer: nothing is lost, no slot is held."""
    store, lots, lost, count = make_ray_store(), random.Random(13), 0, amount(60, 3_000)
    for number in range(count):
        way = number % 3
        waiting = asyncio.ensure_future(store.dequeue_rollout(timeout=0.02 if way == 0 else 30))
        if way == 1:
            waiting = asyncio.ensure_future(asyncio.wait_for(waiting, 0.02))
        await asyncio.sleep(lots.uniform(0.01, 0.025))
        enqueuing = asyncio.ensure_future(store.enqueue_rollout(number))
        if way == 2:
            await asyncio.sleep(lots.uniform(0, 0.006))
            waiting.cancel()
        (claimed,) = await asyncio.gather(waiting, return_exceptions=True)
        made = await enqueuing
        if not isinstance(claimed, rs.AttemptedRollout):
            claimed = await store.dequeue_rollout(timeout=6)
        lost += claimed is None or claimed.rollout_id != made.rollout_id
        if claimed is not None:
            await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="succeeded")
    await until(lambda: _nobody_waits(store), within=2)
    report(13, "callers that time out, are cancelled, or drop their call", figure={"lost": lost, "slots held": 0},
           bar="0; 0 after 2 s", met=not lost, seed=13, did=f"{count} calls")  # fmt: skip


async def _nobody_waits(store: rs.RayLightningStore) -> bool:
    return (await store.statistics())["waiters"] == 0


LOSING = (
    CODE
    + """
import asyncio, json, os, sys
lost, operations = int(sys.argv[1]), int(sys.argv[2])
lose = {"num_failures": -1, "req_failure_prob": 0, "resp_failure_prob": lost}
os.environ["RAY_testing_rpc_failure"] = json.dumps({"CoreWorkerService.grpc_client.PushTask": lose})
import ray, raystore as rs
ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="error", log_to_driver=False)
store = rs.start()

async def one(number):
    numbers = [await store.get_next_span_sequence_id(f"r{number}", "a") for _ in range(operations)]
    made = [await store.enqueue_rollout(f"{number}/{i}") for i in range(operations)]
    return numbers == list(range(1, operations + 1)), [r.rollout_id for r in made]

async def main():
    told = await asyncio.gather(*(one(number) for number in range(4)))
    made = {i for _, ids in told for i in ids}
    claimed, doubled = set(), 0
    while len(claimed) < len(made):  # a claim whose reply is lost for too long is withdrawn, and offered again
        rollout = await store.dequeue_rollout(timeout=10)
        if rollout is None:
            break
        doubled += rollout.rollout_id in claimed
        try:
            await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")
            claimed.add(rollout.rollout_id)
        except rs.ClaimLostError:
            pass
    statistics = await store.statistics()
    wrong = sum(not right for right, _ in told) + len(made - claimed) + doubled
    wrong += statistics["total_rollouts"] != len(made)
    told = {"wrong": wrong, "done": len(made) * 3, "calls": statistics["actor_calls"]}
    print(json.dumps(told), file=channel)

asyncio.run(main())
"""
)


@pytest.mark.skipif(
    tuple(map(int, ray.__version__.split(".")[:2])) < (2, 60), reason="Ray's knob for losing replies had another form"
)
@pytest.mark.long
@pytest.mark.timeout(900)
def test_replies_are_lost(tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]) -> None:
    """Ray drops a part of its replies: every operation has its effect exactly once, and all succeed."""
    script = tmp_path / "losing.py"
    script.write_text(LOSING)
    for percent in (10, 25, 50):
        count = str(amount(1, 25 if percent < 50 else 6))  # each waits until Ray lets an answer through
        told = subprocess.run(
            [sys.executable, script, str(percent), count], capture_output=True, text=True, timeout=400
        )
        assert told.returncode == 0, told.stderr
        found = json.loads(told.stdout)
        did = f"{found['done']} operations in {found['calls']} calls that arrived"
        figure = {"wrong effects": found["wrong"], "succeeded": "all"}
        report(14, f"{percent} % of replies lost", figure=figure, bar="0", met=found["wrong"] == 0, did=did)


async def test_a_store_without_a_journal_dies_loudly(make_ray_store: MakeRayStore, report: Callable[..., None]) -> None:
    """Every call and every waiter gets a typed error soon; nobody is told that there is nothing."""
    store = make_ray_store()
    rollout = await store.enqueue_rollout("x", queue="other")
    told = {}

    async def call(name: str, coroutine: Any) -> None:
        try:
            told[name] = ("answered", await coroutine)
        except rs.StoreError as error:
            told[name] = (type(error).__name__, time.monotonic())

    calls = [
        asyncio.ensure_future(call("dequeue", store.dequeue_rollout(timeout=60))),
        asyncio.ensure_future(call("wait", store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=60))),
        asyncio.ensure_future(call("completed", store.completed(timeout=60))),
        asyncio.ensure_future(call("take", store.take(1, consumer="t", timeout=60))),
    ]
    await until(lambda: _waiters(store, 4))
    await kill(store)
    killed = time.monotonic()
    await call("enqueue", store.enqueue_rollout("y"))
    await call("query", store.query_rollouts())
    await asyncio.gather(*calls)
    silent = sorted(name for name, (what, _) in told.items() if what == "answered")
    slowest = max(when - killed for _, when in told.values())
    store.close()
    report(15, "store without a journal killed", figure={"silent": silent, "slowest notice s": round(slowest, 2)},
           bar="none; ≤ 5 s", met=not silent and slowest <= 5, did=f"{len(told)} kinds of calls")  # fmt: skip


DRIVER = (
    CODE
    + """
import asyncio, sys, ray, raystore as rs
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
async def agent(task, ctx):
    await asyncio.sleep(0.01)
    return 1.0
async def main():
    kind = sys.argv[2]
    store = rs.start(f"driven-{kind}", detached=kind == "detached")
    made = [(await store.enqueue_rollout(i)).rollout_id for i in range(50)]
    async with rs.RunnerPool(store, agent, size=2):
        await asyncio.sleep(0.3)
        print((await store.actor.describe.remote())["pid"], *made, file=channel)
        await asyncio.sleep(1000)
asyncio.run(main())
"""
)


async def test_the_driver_is_killed(cluster: None, report: Callable[..., None]) -> None:
    """A detached store is there for the next driver with all it had; of an owned one nothing is left."""
    address = ray.get_runtime_context().gcs_address
    figure: dict[str, Any] = {}
    for kind in ("detached", "owned"):
        driver = await asyncio.create_subprocess_exec(
            sys.executable, "-c", DRIVER, address, kind, stdout=asyncio.subprocess.PIPE
        )
        pid, *made = (await present(driver.stdout).readline()).decode().split()
        driver.kill()
        await driver.wait()
        if kind == "detached":
            store = rs.connect("driven-detached")
            there = {rollout.rollout_id for rollout in await store.query_rollouts()}
            figure["lost"] = len(set(made) - there)
            rs.stop("driven-detached")
            store.close()
        else:
            await until(functools.partial(_is_gone, int(pid)), within=30)
            figure["left"] = [info.name for info in rs.list_stores() if info.name == "driven-owned"]
    report(16, "driver killed", figure=figure, bar="0 lost; nothing left after 30 s",
           met=figure == {"lost": 0, "left": []})  # fmt: skip


async def _is_gone(pid: Any) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_node_of_the_store_is_killed(
    tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """With a shared directory the store moves to another node, and nothing is lost."""
    found = program("nodes", tmp_path / "j", amount(1, 5), timeout=800)
    met = found["lost"] == 0 and found["slowest"] <= 6 * SLACK
    figure = {"lost": found["lost"], "first answer after s, at most": round(found["slowest"], 1)}
    report(17, "node of the store killed", figure=figure, bar=f"0; ≤ {6 * SLACK} s", met=met,
           did=f"{found['kills']} nodes of three; Ray was told to look every 0.5 s")  # fmt: skip


async def test_two_incarnations(
    make_ray_store: MakeRayStore, tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """One is frozen and believed dead; when it wakes up it acknowledges nothing more, and ends."""
    late, backwards, slowest, slowest_word, rounds = 0, 0, 0.0, 0.0, amount(1, 12)
    for number in range(rounds):
        path = tmp_path / str(number)
        old = make_ray_store(name=f"old-{number}", journal=path)
        made = [(await old.enqueue_rollout(i)).rollout_id for i in range(20)]
        known = await describe(old)
        os.kill(known["pid"], signal.SIGSTOP)
        frozen = asyncio.ensure_future(old.enqueue_rollout("late"))
        await asyncio.sleep(0.1)
        new = make_ray_store(name=f"new-{number}", journal=path, resume="must")
        backwards += (await describe(new))["epoch"] <= known["epoch"]
        made += [(await new.enqueue_rollout(i)).rollout_id for i in range(20)]
        os.kill(known["pid"], signal.SIGCONT)
        woken = time.monotonic()
        await until(functools.partial(_is_gone, known["pid"]), within=10)
        slowest = max(slowest, time.monotonic() - woken)
        (told,) = await asyncio.gather(frozen, return_exceptions=True)  # by the process that Ray starts in its place
        slowest_word = max(slowest_word, time.monotonic() - woken)
        late += not isinstance(told, rs.FencedError)
        there = [rollout.rollout_id for rollout in await new.query_rollouts()]
        assert sorted(there) == sorted(made)
        old.close()
    figure = {
        "acknowledged by the old one": late,
        "epochs backwards": backwards,
        "old one gone after s": round(slowest, 2),
        "its caller told after s": round(slowest_word, 1),
    }
    report(18, "two incarnations, the older one frozen", figure=figure, bar=f"0; 0; ≤ {3 * SLACK} s",
           met=not late and not backwards and slowest <= 3 * SLACK, did=f"{rounds} times")  # fmt: skip


@pytest.mark.timeout(300)
def test_the_whole_cluster_is_killed(tmp_path: Path, report: Callable[..., None]) -> None:
    """A new cluster goes on with the same directory: all that was acknowledged is there."""
    found = program("whole_cluster", tmp_path)
    report(20, "whole cluster killed", figure={"lost": found["lost"]}, bar="0", met=not found["lost"],
           did=f"{found['acknowledged']} operations acknowledged, in two clusters")  # fmt: skip


@pytest.mark.timeout(300)
async def test_the_store_stands_still(
    make_ray_store: MakeRayStore, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """Frozen for longer than any deadline: nobody is to blame, and nothing expires when it wakes up."""
    store, seconds = make_ray_store(), amount(6, 60)
    config = rs.RolloutConfig(unresponsive_seconds=5, timeout_seconds=20, max_attempts=3, retry_condition=["timeout"])
    for number in range(10):
        await store.enqueue_rollout(number, config=config)
    claimed = [present(await store.dequeue_rollout()) for _ in range(10)]
    pid = (await describe(store))["pid"]
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(seconds)
    os.kill(pid, signal.SIGCONT)
    await asyncio.sleep(1.5)
    rollouts = await store.query_rollouts()
    spurious = sum(rollout.status not in ("preparing", "running") for rollout in rollouts)
    for rollout in claimed:
        await store.add_span(make_span(rollout))
        await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")
    report(21, "store frozen", figure={"spurious requeues": spurious}, bar="0", met=not spurious,
           did=f"{seconds} s with 10 attempts that are silent for too long after 5 s")  # fmt: skip


async def test_a_crash_loop(make_ray_store: MakeRayStore, tmp_path: Path, report: Callable[..., None]) -> None:
    """A record that ends every process that reads it: after two the store serves what was before, and says which."""
    points = {"env_vars": {"RAYSTORE_FAILPOINTS": "replay.record=kill@12"}}
    store = make_ray_store(journal=tmp_path / "j", actor_options={"runtime_env": points})
    made = [(await store.enqueue_rollout(i)).rollout_id for i in range(20)]
    before = (await kill(store))["epoch"]
    known = await until(lambda: later(store, before), within=60)
    readable = [rollout.rollout_id for rollout in await store.query_rollouts()]
    with pytest.raises(rs.JournalHeldError, match="Record 12") as told:
        await store.enqueue_rollout("more")
    restarts = known["epoch"] - before
    assert readable == made[: len(readable)] and len(readable) >= 5
    assert any("Record 12" in remark for remark in known["remarks"]) and "resume='must'" in str(told.value)
    rs.stop(store)
    report(22, "crash loop", figure={"restarts before it holds": restarts, "readable": len(readable)}, bar="≤ 3",
           met=restarts <= 3)  # fmt: skip
    again = make_ray_store(name="again", journal=tmp_path / "j", resume="must")  # without what killed it
    assert (await again.statistics())["total_rollouts"] == 20


class _Crowd:
    """A client process with many callers, which counts how often it sends again what got no answer."""

    def __init__(self, handle: Any, count: int) -> None:
        self.store, self.count = rs.RayLightningStore(handle), count
        self.is_over, self.done, self.slowest, self.again = False, 0, 0.0, 0
        no_answer = SessionState.no_answer

        def counted(state: Any, *arguments: Any) -> Any:
            self.again += 1
            return no_answer(state, *arguments)

        SessionState.no_answer = counted  # type: ignore[method-assign, assignment]  # its arguments are handed on

    async def work(self) -> Any:
        async def one() -> None:
            while not self.is_over:
                started = time.monotonic()
                await self.store.enqueue_rollout("x")
                self.slowest = max(self.slowest, time.monotonic() - started)
                self.done += 1
                await asyncio.sleep(0.2)

        await asyncio.gather(*(one() for _ in range(self.count)))
        return self.done, self.slowest, self.again

    async def stop(self) -> None:
        self.is_over = True


Crowd: Any = ray.remote(num_cpus=0)(_Crowd)


@pytest.mark.timeout(300)
async def test_a_restart_under_many_clients(
    make_ray_store: MakeRayStore, tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """No stampede: what got no answer is sent again with pauses, and everybody is served again soon."""
    store, processes, callers = make_ray_store(journal=tmp_path / "j"), amount(3, 24), 50
    crowds = [Crowd.remote(store.actor, callers) for _ in range(processes)]
    working = [crowd.work.remote() for crowd in crowds]
    await until(lambda: _rollouts(store, 2 * processes * callers), within=120)
    known = await kill(store)
    killed = time.monotonic()
    await until(lambda: later(store, known["epoch"]))
    back = time.monotonic() - killed
    await asyncio.sleep(2)
    await asyncio.gather(*(crowd.stop.remote() for crowd in crowds))
    told = [await answer for answer in working]
    assert (await store.statistics())["total_rollouts"] == sum(done for done, _, _ in told)
    rate = sum(again for _, _, again in told) / processes / max(back, 1.0)
    figure = {"back after s": round(back, 1), "sent again by a client per s": round(rate, 1),
              "longest call s": round(max(slow for _, slow, _ in told), 1)}  # fmt: skip
    report(48, "restart under many clients", figure=figure, bar=f"≤ {5 * SLACK} s; ≤ 4 /s",
           met=back <= 5 * SLACK and rate <= 4,
           did=f"{processes} client processes with {callers} callers each")  # fmt: skip


async def _rollouts(store: rs.RayLightningStore, count: int) -> bool:
    return (await store.statistics())["total_rollouts"] >= count
