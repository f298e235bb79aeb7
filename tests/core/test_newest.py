"""Which rollouts are the newest, and how many records a look for them passes."""

from __future__ import annotations

import random
import sys
from typing import Any

from raystore.core.indexes import CROWD, CROWDED, Crowds
from tests.core.conftest import Core


def enqueue(core: Core, count: int, **more: Any) -> list[str]:
    """So many rollouts in one call, and so at one instant."""
    made = core.run("enqueue", requests=[{"input": b"x", "metadata": None, **more} for _ in range(count)])
    return [rollout.rollout_id for rollout, _ in made]


def newest(core: Core, limit: int = -1, offset: int = 0) -> list[str]:
    found = core.run(
        "query_rollouts", status_in=None, rollout_id_in=None, rollout_id_contains=None, filter_logic="and", must={},
        sort_by="start_time", sort_order="desc", limit=limit, offset=offset,
    )  # fmt: skip
    return [rollout.rollout_id for rollout, _ in found.items]


def functions_run(core: Core, **page: int) -> int:
    """How many functions, comprehensions and generators run for a page of the newest."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        newest(core, **page)
    finally:
        sys.setprofile(None)
    return count


def test_a_crowd_is_walked_past_once(core: Core) -> None:
    """Of the newest instant the first ones are shown first; a second look does not pass all the others again."""
    made = enqueue(core, 20 * CROWD)
    assert newest(core, limit=5) == made[:5]
    assert functions_run(core, limit=5) < CROWD
    core.now += 1
    alone = core.enqueue()
    assert newest(core, limit=3) == [alone, *made[:2]]
    assert functions_run(core, limit=5) < CROWD


def test_what_is_kept_of_crowds_is_bounded() -> None:
    """All that queries have met would grow with the calls of a run; the newest one is kept, however large it is."""
    crowds, ids = Crowds(), [str(number) for number in range(CROWDED // 2)]
    for time in range(9):
        crowds.keep(float(time), time + 1, ids)
        assert len(crowds) <= CROWDED and crowds.find(float(time), time + 1) is ids
    crowds.keep(9.0, 99, [*ids, *ids, *ids])
    assert len(crowds) == 3 * len(ids) and crowds.find(9.0, 99) is not None
    crowds.keep(10.0, 999, ids[:CROWD])
    assert crowds.find(10.0, 999) is None, "it is not many"


def test_the_newest_are_those_of_a_stable_sort(core: Core) -> None:
    """Whatever came in one instant, was deleted since, or was made anew at the same or another time."""
    rng = random.Random(7)
    there: dict[str, float] = {}
    for number in range(100):
        core.now += rng.choice([0, 0, 1])
        for rollout_id in rng.sample(sorted(there), min(len(there), rng.choice([0, 0, 1, CROWD // 2]))):
            core.run("delete_rollouts", rollout_ids=[rollout_id])
            del there[rollout_id]
            if rng.random() < 0.5:
                core.enqueue(rollout_id=rollout_id)
                there[rollout_id] = core.now
        there |= dict.fromkeys(enqueue(core, rng.choice([1, 3, CROWD + 1, 2 * CROWD])), core.now)
        expected = sorted(there, key=there.__getitem__, reverse=True)
        offset = rng.choice([0, 0, 1, 90, len(expected) // 2])
        assert newest(core, 150, offset) == expected[offset : offset + 150], number
        if len(there) > 3_000:
            gone = rng.sample(sorted(there), 2_500)
            core.run("delete_rollouts", rollout_ids=gone)
            there = {rollout_id: time for rollout_id, time in there.items() if rollout_id not in set(gone)}
    assert newest(core) == sorted(there, key=there.__getitem__, reverse=True)
