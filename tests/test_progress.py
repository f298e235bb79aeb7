"""Progress: drawn on a terminal of a driver and nowhere else, with rate, time left, failures, and why it stands."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest

import raystore as rs
from raystore.client import claims, client
from raystore.reports import progress
from raystore.reports.progress import Progress
from tests.conftest import MakeMemoryStore, MakeRayStore
from tests.terminals import run_on_terminal

#: A program whose store is slow: eight rollouts of half a second, of which one fails.
WAITING = """
    import asyncio, sys, time, raystore as rs
    def agent(task, ctx):
        time.sleep(0.5)
        if task == 3:
            raise ValueError("bad")
        return 1.0
    async def main():
        with rs.InMemoryLightningStore() as store, rs.RunnerPool(store, agent, size=1):
            made = await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=i) for i in range(8)])
            ids = [rollout.rollout_id for rollout in made]
            WAIT
            print([rollout.input for rollout in done])
            print(type(sys.stdout).__name__, type(sys.stderr).__name__)
    asyncio.run(main())
"""
AWAITED = "done = await store.wait_for_rollouts(rollout_ids=ids, timeout=60, progress=True)"
BLOCKING = "done = store.sync.wait_for_rollouts(rollout_ids=ids, progress=True)"


def plain(drawn: str) -> str:
    """What was drawn, without escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)


@pytest.mark.parametrize("wait", [AWAITED, BLOCKING], ids=["awaited", "blocking"])
def test_waiting_is_drawn_on_a_terminal(wait: str) -> None:
    """How many have finished, how fast, how long still, how many failed; and nothing is left on the screen."""
    printed, drawn = run_on_terminal(WAITING.replace("WAIT", wait))
    assert printed == "[0, 1, 2, 3, 4, 5, 6, 7]\nTextIOWrapper TextIOWrapper\n"
    assert re.search(r"rollouts  [2-7]/8  [\d.]+/(s|min)  ETA 0:0\d  1 failed", plain(drawn)), plain(drawn)
    assert drawn.endswith("\x1b[2K") or "\x1b[?25h" in drawn[-40:]  # the cursor is back, the lines are erased
    assert "The agent failed on rollout" in plain(drawn)  # above the picture, in one piece


@pytest.mark.parametrize("environment", [{"RAYSTORE_PROGRESS": "0"}, {"TERM": "dumb"}])
def test_nothing_is_drawn_where_it_is_forbidden(environment: dict[str, str]) -> None:
    """By a variable, or by a terminal that cannot erase."""
    _, drawn = run_on_terminal(WAITING.replace("WAIT", AWAITED), environment=environment)
    assert "\x1b" not in drawn and "rollouts  " not in drawn


def test_nothing_is_drawn_without_a_terminal() -> None:
    """Into a file or a pipe, as in a notebook and a worker; and rich is not even loaded."""
    code = WAITING.replace("WAIT", AWAITED).replace("print(type", "assert 'rich' not in sys.modules; print(type")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[0, 1, 2") and "\x1b" not in done.stderr and "rollouts  " not in done.stderr


async def test_workers_draw_nothing(make_ray_store: MakeRayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if their stderr should be a terminal."""

    def agent(task: Any, ctx: rs.Context) -> float:
        import sys

        from raystore.reports.progress import can_draw

        class Terminal:
            def isatty(self) -> bool:
                return True

        stderr, sys.stderr = sys.stderr, Terminal()
        try:
            return float(can_draw())
        finally:
            sys.stderr = stderr

    store = make_ray_store()
    async with rs.RunnerPool(store, agent, size=1):
        rollout = await store.enqueue_rollout("x")
        (done,) = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=60)
    assert done.reward == 0.0


def test_a_feed_is_drawn_while_its_trainer_waits() -> None:
    """Items that have ended of all there are, and how much of the batch is there."""
    printed, drawn = run_on_terminal("""
        import asyncio, time, raystore as rs
        def agent(task, ctx):
            time.sleep(0.6)
            return task % 2
        async def main():
            with rs.InMemoryLightningStore() as store, rs.RunnerPool(store, agent, size=1):
                feed = store.feed("train", list(range(6)), resources_id="p", size=2, batch=2, require=None)
                await feed.publish("w", version=0)
                step = 0
                async for batch in feed.batches(progress=True):
                    step += 1
                    print("training")
                    await batch.ack(step=step)
            print("over")
        asyncio.run(main())
    """)
    assert printed == "training\n" * 3 + "over\n"
    assert re.search(r"feed train  [24]/6", plain(drawn)), plain(drawn)
    assert re.search(r"next batch: [01] of 2 groups are complete", plain(drawn))


def test_the_start_of_a_pool_is_drawn() -> None:
    """If it takes long, as it does where an agent loads a model."""
    _, drawn = run_on_terminal("""
        import time, raystore as rs
        class Agent:
            def setup(self):
                time.sleep(2.5)
            def __call__(self, task, ctx):
                return 1.0
        with rs.InMemoryLightningStore() as store, rs.RunnerPool(store, Agent, size=2):
            pass
    """)
    assert "starting runners  0/2" in plain(drawn) and "__init__ or setup() of the agent" in plain(drawn)


def test_reading_a_long_journal_is_drawn(tmp_path: Any) -> None:
    """By whoever opens it, with how far it is."""
    with rs.InMemoryLightningStore(journal=tmp_path) as store:
        for _ in range(300):
            store.sync.enqueue_rollout("x" * 10_000)
    code = f"""
        import time, raystore as rs
        from raystore.journal import replay
        replay.failpoint = lambda name: time.sleep(0.01)
        store = rs.recover({str(tmp_path)!r})
        print(store.sync.statistics()["total_rollouts"])
    """
    printed, drawn = run_on_terminal(code)
    assert printed == "300\n"
    assert re.search(r"reading the journal, kB  [12],\d{3}/3,\d{3}  [\d,.]+/s  ETA 0:0\d", plain(drawn)), plain(drawn)
    assert re.search(r"at record 1\d\d of", plain(drawn))


def test_a_store_on_ray_that_reads_its_journal_is_waited_for_visibly(cluster: None, tmp_path: Any) -> None:
    """By whoever starts it, who knows from the store how far it is."""
    import ray

    with rs.InMemoryLightningStore(journal=tmp_path) as store:
        for _ in range(120):
            store.sync.enqueue_rollout("x" * 10_000)
    code = f"""
        import ray, raystore as rs
        ray.init(log_to_driver=False, logging_level="ERROR")
        slow = {{"runtime_env": {{"env_vars": {{"RAYSTORE_FAILPOINTS": "replay.record=sleep:0.06"}}}}}}
        with rs.start("long", journal={str(tmp_path)!r}, actor_options=slow) as store:
            print(store.sync.statistics()["total_rollouts"])
    """
    address = ray.get_runtime_context().gcs_address
    printed, drawn = run_on_terminal(code, environment={"RAY_ADDRESS": address})
    assert printed == "120\n"
    assert re.search(r"waiting for a store that reads its journal, kB  [\d,]+/1,\d{3}", plain(drawn)), plain(drawn)
    assert re.search(r"at record \d+ of \d+ or more", plain(drawn))


async def test_waiting_with_progress_gives_what_waiting_gives(
    make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finished ones in the given order, without those that do not exist; at the timeout those that have by then."""
    monkeypatch.setattr(progress, "can_draw", lambda: True)
    monkeypatch.setattr(progress, "DELAY_SECONDS", 1e9)
    monkeypatch.setattr(client, "SHOWN_SECONDS", 0.05)
    store = make_memory_store()
    made = await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=i) for i in range(3)])
    ids = [made[2].rollout_id, "ro-none", made[0].rollout_id, made[1].rollout_id]
    for status in ("failed", "succeeded"):
        claimed = await store.dequeue_rollout()
        assert claimed is not None
        await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status=status)
    found = await store.wait_for_rollouts(rollout_ids=ids, timeout=0.2, progress=True)
    assert [one.input for one in found] == [0, 1]
    assert await store.wait_for_rollouts(rollout_ids=ids, timeout=0, progress=True) == found
    await store.delete_rollouts([made[2].rollout_id])
    assert await store.wait_for_rollouts(rollout_ids=ids, progress=True) == found
    with pytest.raises(rs.InvalidValueError, match="progress"):
        await store.wait_for_rollouts(rollout_ids=ids, progress="yes")  # type: ignore[arg-type]
    with pytest.raises(rs.InvalidValueError, match="timeout"):
        await store.wait_for_rollouts(rollout_ids=ids, timeout=float("nan"), progress=True)


async def test_after_half_a_minute_without_a_claim_it_is_said_why(
    make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first sentence of what the store finds; until the next claim."""
    now = 1000.0
    monkeypatch.setattr(claims, "monotonic", lambda: now)
    store = make_memory_store()

    class Finding:
        text = "No runner serves queue 'gpu'. Start one."

    async def why() -> list[Finding]:
        return [Finding()]

    monkeypatch.setattr(store, "why", why, raising=False)
    await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=i) for i in range(2)])
    looked = claims.Claims(store)
    told = []
    for _ in range(9):
        now += 5.0
        told.append(await looked.why_none())
    said = [f"Nothing was claimed for {seconds} s: No runner serves queue 'gpu'" for seconds in (30, 35, 40)]
    assert told == [""] * 6 + said
    await store.dequeue_rollout()
    now += 5.0
    assert await looked.why_none() == ""


def test_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates above one a second by the second, lower ones by the minute; a text of the user's cannot move the cursor."""
    now = 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    monkeypatch.setattr(progress, "can_draw", lambda: True)
    monkeypatch.setattr(progress, "DELAY_SECONDS", 1e9)
    shown = Progress("feed \x1b[2J", 10_000)
    shown.update(0)
    assert shown.words() == "feed \\x1b[2J  0/10,000"
    now = 10.0
    shown.update(25, failed=1_500, note="a\r\nb")
    assert shown.words() == "feed \\x1b[2J  25/10,000  2.5/s  ETA 1:06:30  1,500 failed"
    assert shown.note() == "a\\r     b"
    now = 1000.0
    shown.update(35)
    assert shown.words().endswith("35/10,000  0.6/min  ETA 274:02:15")
    assert Progress("x").words() == "x  0" and Progress("x", is_wanted=False).can_draw is False
