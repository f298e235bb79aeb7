"""Row 29: what the selection report of a feed over a million rollouts takes, in time and in memory."""

from __future__ import annotations

import math
import random
import time
import tracemalloc

from benchmarks.scope import Scope
from benchmarks.table import Line, at_most, bound
from raystore.core import fates
from raystore.core.feed_table import FeedEntry
from raystore.core.selection import Fate, Selection
from raystore.core.state import Settings, State, Step

SIZE = 8  #: rollouts of a group, one of which ends each second
ENVIRONMENTS = ("math", "code", "web", "tools")


def _fate(drawn: random.Random, ending: str, version: int) -> Fate:
    return Fate(
        ending if drawn.random() < 0.95 else "masked",
        "ok" if drawn.random() < 0.9 else "agent_error",
        drawn.random() < 0.1,
        math.exp(drawn.gauss(3, 1.2)),
        drawn.randint(1, 40),
        drawn.randint(10, 20_000),
        drawn.uniform(-1, 1),
        version,
    )


def _filled(rollouts: int) -> tuple[Selection, float]:
    """What a feed knows of so many rollouts, and the time then."""
    drawn, known, now = random.Random(1), Selection(), 0.0
    for group in range(rollouts // SIZE):
        now += 1.0
        ending = "trained" if drawn.random() < 0.7 else drawn.choice(["stale", "filtered", "failed"])
        environment = ENVIRONMENTS[group % len(ENVIRONMENTS)]
        fates_of_group = [_fate(drawn, ending, int(now // 100)) for _ in range(SIZE)]
        values = [("environment", environment), ("tag level", str(group % 10))]
        known.count(now, fates_of_group, values, ending)
        known.count_item(now, environment, group // len(ENVIRONMENTS), ending)
    return known, now


async def report(scope: Scope) -> list[Line]:
    """Row 29."""
    rollouts = scope.amount(1_000_000)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    known, now = _filled(rollouts)
    grown = (tracemalloc.get_traced_memory()[0] - before) / 2**20
    tracemalloc.stop()
    state = State(Settings(10**9, 10**8))
    feed = FeedEntry("feed", {})
    feed.selection = known
    state.feeds.by_name["feed"] = feed
    samples = []
    for _ in range(scope.rounds):
        started = time.perf_counter()
        fates.selection(state, Step(now, now), consumer="feed", since=None)
        samples.append((time.perf_counter() - started) * 1000)
    did = f"over {rollouts:,} rollouts of 4 environments, in {now / 3600:.0f} hours, by the store"
    return [
        bound(29, "selection report", samples, at_most(50, "ms"), did=did),
        bound(29, "kept for it", [grown], at_most(2, "MiB"), did=did),
    ]


ROWS = {29: report}
