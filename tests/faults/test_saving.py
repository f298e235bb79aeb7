"""Row 77 of the fault suite: runners of long rollouts are killed, and what was saved is neither run again nor lost."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from tests.conftest import MakeRayStore
from tests.faults.processes import broken
from tests.helpers import present, until

TURNS = 30


def note(task: dict[str, Any], *words: object) -> None:
    """Append a line to the ledger of a test, at once."""
    with open(task["ledger"], "a") as file:
        file.write(" ".join(map(str, (task["game"], *words))) + "\n")


async def playing(task: dict[str, Any], ctx: rs.Context) -> float:
    """Draws a token in each turn, and saves all of them; spans of turns that are not saved yet reach the store, too."""
    tokens: list[str] = ctx.saved or []
    note(task, "begins", len(tokens))
    for turn in range(len(tokens), TURNS):
        note(task, "plays", turn)
        with ctx.span("turn", token=(token := secrets.token_hex(4))):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.03)
        tokens.append(token)
        await ctx.save(tokens)
        note(task, "saved", len(tokens))
    with ctx.span("all", tokens=tokens):
        pass
    return 1.0


async def kill_in_long_rollouts(store: rs.RayLightningStore, ledger: Path, kills: int) -> Any:
    """Kill runners in the middle of long rollouts, one after the other: what came of the turns."""
    lots = random.Random(77)
    killed: set[str | None] = set()
    made: list[str] = []
    async with rs.RunnerPool(store, playing, size=2, concurrency=4, flush_seconds=0.01) as pool:
        for _ in range(kills):
            games = [{"game": len(made) + number, "ledger": str(ledger)} for number in range(8)]
            requests = [rs.EnqueueRolloutRequest(input=game) for game in games]
            made += [rollout.rollout_id for rollout in await store.enqueue_many_rollouts(requests)]

            async def at_work() -> list[Any]:
                found = await store.query_rollouts(status_in=["running"])
                return sorted({r.attempt.worker_id for r in found} & {*pool.worker_ids} - killed)

            victim = present(await store.get_worker_by_id(lots.choice(await until(at_work, within=60))))
            await asyncio.sleep(lots.uniform(0.0, 1.0))
            os.kill(present(victim.heartbeat_stats)["pid"], signal.SIGKILL)
            killed.add(victim.worker_id)
        done = await store.wait_for_rollouts(rollout_ids=made, timeout=60 + 10 * kills)
    spans = await store.query_many_spans(made)
    attempts = [await store.query_attempts(rollout_id) for rollout_id in made]
    saved: dict[str, int] = defaultdict(int)
    again = behind = plays = 0
    for line in ledger.read_text().splitlines():
        game, what, number = line.split()
        if what == "saved":
            saved[game] = max(saved[game], int(number))
        elif what == "plays":
            plays += 1
            again += int(number) < saved[game]
        else:
            behind += int(number) < saved[game]
    differing = 0
    for rollout_id in made:
        tokens = [span.attributes["token"] for span in spans[rollout_id] if span.name == "turn"]
        ends = [span.attributes["tokens"] for span in spans[rollout_id] if span.name == "all"]
        differing += ends != [tokens] or len(tokens) != TURNS
    figure = {
        "not succeeded": len(made) - sum(rollout.status == "succeeded" for rollout in done),
        "saved turns run again": again,
        "attempts that began before what was saved": behind,
        "spans that are not the turns of the state": differing,
    }
    return figure, plays / (len(made) * TURNS), sum(len(tried) - 1 for tried in attempts)


@pytest.mark.timeout(3000)
async def test_runners_of_long_rollouts_are_killed(
    make_ray_store: MakeRayStore, tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """Over and over: each turn that was saved is there once, with its span, and what was not saved is played again."""
    kills = amount(4, 200)
    store = make_ray_store(max_deliveries=kills + 1, suspect_patience_seconds=0.5)
    figure, price, lost = await kill_in_long_rollouts(store, tmp_path / "ledger", kills)
    report(77, "runners killed in long rollouts that save", figure=figure, bar="0 of each",
           met=not any(figure.values()), seed=77,
           did=f"{kills} kills lost {lost} attempts; each of {TURNS} turns was played {price:.3f} times")  # fmt: skip
    assert lost >= kills


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "code",
    [
        "keep = saved.keep\n"
        "def forgetful(state, entry, attempt, payload):\n"
        "    keep(state, entry, attempt, payload)\n"
        "    entry.saved.mark = 10**9\n"
        "saved.keep = forgetful\n",
        "keep = saved.keep\n"
        "def stale(state, entry, attempt, payload):\n"
        "    if entry.saved is None: keep(state, entry, attempt, payload)\n"
        "saved.keep = stale\n",
    ],
    ids=["forgets the mark", "keeps the first state"],
)
async def test_row_77_finds_a_store_that_errs(make_ray_store: MakeRayStore, tmp_path: Path, code: str) -> None:
    """Spans of turns that were not saved count as the next attempt's; or the state is an old one."""
    options = broken(tmp_path, f"from raystore.core import saved\n{code}")
    store = make_ray_store(max_deliveries=10, suspect_patience_seconds=0.5, **options)
    figure, *_ = await kill_in_long_rollouts(store, tmp_path / "ledger", 2)
    assert any(figure.values()) and not figure["not succeeded"]
