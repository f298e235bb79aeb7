"""The list of differences: the same in the docs and in the comparison, and each of them is one."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from tests.lockstep.differences import DIFFERENCES
from tests.lockstep.examples import EXAMPLES, OPTIONS
from tests.lockstep.pair import Pair, Unlisted
from tests.lockstep.sides import Made

CONFORMANCE = Path(__file__).parents[2] / "docs" / "conformance.md"


def test_the_list_in_the_docs_is_the_list_of_the_comparison() -> None:
    """No difference without a line that says what and why, no line without a difference."""
    text = CONFORMANCE.read_text().split("## Differences from the reference")[1].split("\nAnd what")[0]
    assert re.findall(r"^\| `([a-z0-9-]+)` \|", text, re.MULTILINE) == list(DIFFERENCES)
    assert EXAMPLES.keys() == DIFFERENCES.keys()


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_is_one(name: str) -> None:
    """Its program meets it, and nothing that is not on the list."""

    async def run() -> None:
        pair = Pair(**OPTIONS[name])
        await EXAMPLES[name](pair)
        assert pair.met[name], f"raystore and the reference do not differ in {name!r} any more; met: {dict(pair.met)}"
        pair.close()

    asyncio.run(run())


def test_what_is_not_on_the_list_is_found() -> None:
    """A store that answers otherwise in one field fails."""

    async def run() -> None:
        pair = Pair()
        made = await pair.ask("start_rollout", input=1, config=Made("RolloutConfig", max_attempts=2))
        pair.theirs.store.collections.rollouts._items[made.rollout_id].mode = "val"
        with pytest.raises(Unlisted, match="mode"):
            await pair.ask("get_rollout_by_id", rollout_id=made.rollout_id)
        pair.close()

    asyncio.run(run())


def test_an_attempt_that_runs_again_is_timed_out_by_both() -> None:
    """Also if its rollout was left out before, as one that runs without an attempt that does."""

    async def run() -> None:
        pair = Pair()
        config = Made("RolloutConfig", unresponsive_seconds=1.5, max_attempts=3, retry_condition=["unresponsive"])
        made = await pair.ask("start_rollout", input=1, config=config)
        await pair.ask("update_attempt", rollout_id=made.rollout_id, attempt_id="latest", status="failed")
        await pair.ask("update_rollout", rollout_id=made.rollout_id, status="running")
        ours, beat = pair.ours.store, pair.now
        await pair.ask("update_attempt", rollout_id=made.rollout_id, attempt_id="latest", last_heartbeat_time=beat)
        await pair.tick(2.0)
        assert pair.met["only-attempts-that-run-time-out"]
        await pair.ask(
            "update_attempt", rollout_id=made.rollout_id, attempt_id="latest", status="running",
            last_heartbeat_time=pair.now,
        )  # fmt: skip
        await pair.tick(2.0)
        assert (await ours.get_rollout_by_id(made.rollout_id)).status == "requeuing"
        pair.close()

    asyncio.run(run())
