"""The trainer of `feed_trainer`, which also evaluates; with an address: `python -m tests.faults.eval_trainer ...`.

Every few steps it begins an evaluation that is pinned to the step, and waits for it only at the end; when it begins
with a step, it says the same of that step again. It notes how far its feed has drawn, and in the end what the
evaluations came to, and each of their rollouts.
"""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import raystore as rs
from tests.faults.feed_trainer import BATCH, main

ITEMS, SAMPLES, EVERY = {"math": list(range(8)), "code": list(range(100, 104))}, 3, 4
NAME = "eval"


async def evaluate(feed: rs.Feed, step: int) -> rs.Evaluation:
    """Begin to evaluate a step, or go on."""
    return await feed.evaluate(ITEMS, version=step, samples=SAMPLES, name=NAME, eval_share=0.3)


async def beside(directory: Path, store: Any, feed: rs.Feed, step: int) -> None:
    """Evaluate every few steps, and note how much the feed has drawn that is trained or under way."""
    if step % EVERY == 0:
        await evaluate(feed, step)
    status = await feed.status()
    with (directory / "drawn").open("a") as file:
        others = sum(n for one in status.streams.values() for ending, n in one.endings.items() if ending != "trained")
        file.write(f"{step} {status.drawn - others} {status.places}\n")


async def last(directory: Path, store: Any, feed: rs.Feed, step: int) -> None:
    """Wait for all evaluations that stand, and note everything."""
    for at in range(0, step + 1, EVERY):
        await (await evaluate(feed, at)).result()
    results = await store.evaluations(NAME)
    (directory / "results.json").write_text(json.dumps([one.model_dump() for one in results]))
    (directory / "samples.json").write_text(json.dumps(await samples_of(store)))
    await store.check()


async def samples_of(store: Any) -> list[Any]:
    """Of each rollout of an evaluation: its group, status, and the versions that its attempts had."""
    rows = []
    for rollout in await store.query_rollouts(tags={"eval": NAME}):
        attempts = await store.query_attempts(rollout.rollout_id)
        versions = sorted({attempt.policy_version for attempt in attempts})
        rows.append([rollout.group_id, rollout.status, versions])
    return rows


def judged(results: list[Any], samples: list[Any], steps: int) -> dict[str, int]:
    """What is wrong: steps without a result, items that were not sampled exactly so often, samples of other versions.

    Of evaluations that stand; those of steps that were undone were dropped.
    """
    items = [(name, index) for name, data in ITEMS.items() for index in range(len(data))]
    standing = {one["version"]: one for one in results if not one["undone"] and one["status"] == "finished"}
    wrong_numbers = wrong_versions = 0
    for version, one in standing.items():
        key = f"{NAME}@{version}" + (f".{one['branch']}" if one["branch"] else "")
        for environment, index in items:
            found = [row for row in samples if row[0] == f"{key}/{environment}/{index}"]
            wrong_numbers += len(found) != SAMPLES or any(row[1] not in ("succeeded", "failed") for row in found)
            wrong_versions += any(versions != [version] for _, _, versions in found)
        wrong_numbers += one["overall"]["samples"] != SAMPLES * len(items)
        wrong_versions += list(one["versions"]) != [version, version] or not one["pinned"]
    missing = set(range(0, steps + 1, EVERY)) - standing.keys()
    return {"not evaluated": len(missing), "numbers wrong": wrong_numbers, "versions wrong": wrong_versions}


def too_far_ahead(lines: list[str]) -> int:
    """How often more was drawn than places, and batches that may have been acknowledged by then, allow.

    What a rewind undoes comes again beside what is under way, and lets nothing more be drawn.
    """
    found = trained = 0
    for step, drawn, places in (map(int, line.split()) for line in lines):
        found += drawn > BATCH * max(trained, step - 1) + places
        trained = max(trained, step)  # it is acknowledged after this was noted
    return found


if __name__ == "__main__":
    where = Path(sys.argv[1])
    asyncio.run(main(where, int(sys.argv[2]), sys.argv[3], sys.argv[4], partial(beside, where), partial(last, where)))
