"""`raystore top` and `limits`: a live page on a real terminal, its keys, and what follows from what was read."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import time
from typing import Any

import pytest
import ray
from rich.console import Console

import raystore as rs
from raystore.cli.limits import REMEDIES, findings
from raystore.cli.top import Choice, Page, Place, draw, places_of, read
from raystore.service.sampling import CAUSES
from tests.cli.commands import ROOT, piped, process
from tests.helpers import until
from tests.terminals import Terminal


class Agent:
    """Works in a span until it is told to end."""

    async def __call__(self, task: Any, ctx: rs.Context) -> float:
        with ctx.span("tool.search"):
            await asyncio.sleep(0.05 if task == "short" else 120)
        return 0.5


@pytest.mark.timeout(180)
async def test_a_live_page_tells_what_goes_on_and_takes_keys(cluster: None) -> None:
    """Of a run in another process, without any environment of that process."""
    async with (
        rs.start("watched") as store,
        rs.RunnerPool(store, Agent, size=1, concurrency=3, heartbeat_seconds=0.5),
    ):
        short = [await store.enqueue_rollout("short", mode="train") for _ in range(4)]
        await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id for rollout in short], timeout=60)
        long = await store.enqueue_rollout("long")
        await store.enqueue_rollout("waits", queue="gpu")

        async def is_told() -> Any:
            (worker,) = (await store.query_workers()).items
            places = [place for place in places_of(worker, time.time()) if place.rollout_id == long.rollout_id]
            return places and places[0].span

        assert await until(is_told, within=60) == "tool.search"
        terminal = Terminal(130)
        environment = {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(ROOT.home())}
        where = ["--name", "watched", "--address", ray.get_runtime_context().gcs_address]
        command = [sys.executable, "-m", "raystore", "top", *where, "--interval", "300ms"]
        ends: Any = {"stdin": terminal.stream, "stdout": terminal.stream, "stderr": terminal.stream}
        top = subprocess.Popen(command, cwd=ROOT, env=environment, **ends)  # noqa: ASYNC220 - it does not block
        try:
            for part in ("store watched", "4 succeeded", "gpu 1", long.rollout_id, "tool.search", "q quit"):
                await asyncio.to_thread(terminal.until, part, 60)
            terminal.type("/nothing\r")
            await asyncio.to_thread(terminal.until, "filter 'nothing'")
            terminal.type("/search\r")
            await asyncio.to_thread(terminal.until, "filter 'search'")
            terminal.type("p")
            await asyncio.to_thread(terminal.until, "PAUSED")
            terminal.type("\r")
            await asyncio.to_thread(terminal.until, f"rollout {long.rollout_id}")
            await asyncio.to_thread(terminal.until, "any key goes back")
            terminal.type("xq")
            assert await asyncio.to_thread(top.wait, 20) == 0
        finally:
            top.kill()
            terminal.close()
        assert "Traceback" not in terminal.text
        limited = process("limits", *where, "--json", HOME=str(ROOT.home()))
        out, err = await asyncio.to_thread(limited.communicate, timeout=60)
        assert limited.returncode == 0, err
        assert json.loads(out)["shares"]["runners_idle"] > 0
        await store.cancel_rollouts([long.rollout_id])


async def test_a_page_of_many_rollouts_and_places_is_read_and_drawn_at_once() -> None:
    """100,000 rollouts, 500 places: what is read is bounded, and the picture fits the terminal."""
    async with rs.InMemoryLightningStore() as store:
        for first in range(0, 100_000, 5_000):
            await store.enqueue_many_rollouts(
                [rs.EnqueueRolloutRequest(input=number) for number in range(first, first + 5_000)]
            )
        claimed = await store.dequeue_many_rollouts(limit=500)
        for runner in range(50):
            places = [
                {
                    "rollout_id": one.rollout_id,
                    "since": one.attempt.start_time,
                    "span": "step",
                    "span_since": time.time(),
                }
                for one in claimed[10 * runner : 10 * runner + 10]
            ]
            await store.update_worker(f"runner-{runner}", {"places": places})
        view: Any = type("View", (), {"store": store, "is_journal": False, "now": time.time()})()
        page = await read(view)
        assert len(page.places) == 500 and page.workers == 50
        for width, height in ((200, 50), (80, 24), (40, 12)):
            console = Console(width=width, height=height, record=True, file=io.StringIO())
            console.print(draw(page, Choice(), name="store x", width=width, height=height))
            lines = console.export_text().splitlines()
            assert len(lines) <= height and max(map(len, lines)) <= width
        took = []
        for _ in range(5):
            started = time.perf_counter()
            page = await read(view)
            console.print(draw(page, Choice(), name="store x", width=200, height=50))
            took.append(time.perf_counter() - started)
        assert sorted(took)[2] < 0.2, took


def test_keys_choose_what_is_shown() -> None:
    """Sorting, a filter that is typed and taken back, the row, and the rollout that is opened."""
    places = [Place("b", 1.0, "ro-1", 5.0, "think"), Place("a", 9.0, "ro-2", 7.0, "search"), Place("c", 0.1)]
    choice = Choice()
    assert [place.runner for place in choice.select(places)] == ["a", "b", "c"]
    choice.press("s")
    assert [place.runner for place in choice.select(places)] == ["a", "b", "c"]
    choice.press("s")
    assert [place.runner for place in choice.select(places)] == ["a", "b", "c"]
    for key in ("/", "t", "h", "x", "\x7f"):
        choice.press(key)
    assert [place.runner for place in choice.select(places)] == ["b"]
    choice.press("\r")
    choice.press("\r")
    assert choice.opened == "ro-1"
    choice.press("/")
    choice.press("\x1b")
    assert len(choice.select(places)) == 3 and choice.press("j") and choice.press("\x1b[A")
    assert not choice.press("q")


def test_what_took_most_of_the_time_has_a_remedy() -> None:
    """The largest share first; of what took little nothing is said."""
    shares = dict.fromkeys(CAUSES, 0.0) | {"trainer_waited": 0.7, "journal": 0.3, "store": 0.1}
    assert [line.split(":")[0] for line in findings({"shares": shares})] == ["70%", "30%"]
    assert REMEDIES.keys() == CAUSES.keys()


def test_without_a_terminal_top_writes_one_page(killed: Any) -> None:
    """Into a pipe, without codes."""
    shown = piped("top", "--journal", killed)
    assert shown.code == 0 and "runner-3" in shown.out and "\x1b" not in shown.out


def test_a_page_is_what_was_read(killed: Any) -> None:
    """Also as JSON."""
    document = json.loads(piped("top", "--json", "--journal", killed).out)
    assert document.keys() == {"statistics", "metrics", "places"}
    assert {place["runner"] for place in document["places"]} >= {"runner-1", "runner-3"}
    assert Page(document["statistics"], document["metrics"], [], 0, 0.0).told["consumers"]
