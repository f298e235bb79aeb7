"""`raystore evaluations`, and the curves of evaluations beside those of training, from a journal and from a store."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from tests.cli.commands import here, piped
from tests.feed.conftest import RIGHT, Failed, running


async def fill(store: Any) -> None:
    """Three steps of a policy that gets better, each evaluated; the last is undone, and one is under way."""
    feed = store.feed("train", list(range(4)), **RIGHT)

    def agent(rollout: Any) -> float:
        if rollout.input == "hard" and rollout.attempt.policy_version < 2:
            raise Failed
        return 0.25 * float(rollout.attempt.policy_version) if rollout.mode == "val" else 0.5

    items = {"math": ["easy", "hard"], "code": ["easy"]}
    async with running(store, agent):
        for version in range(4):
            await feed.publish([float(version)] * 10, version=version)
            evaluation = await feed.evaluate(items, version=version, samples=2)
            await evaluation.result(timeout=30)
        await (await store.evaluate("drift", ["x"], resources_id="policy")).result(timeout=30)
    await feed.restore(2)
    await feed.publish([2.0], version=2)
    await feed.publish([3.5], version=3)
    await feed.evaluate(items, version=3, samples=2)
    await feed.close()


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with evaluations, as its journal has it."""
    path = tmp_path_factory.mktemp("evaluated") / "journal"
    store = rs.InMemoryLightningStore(journal=str(path))
    asyncio.run(fill(store))
    store.close()
    return path


def test_the_newest_of_each_name(journal: Path) -> None:
    """Where it stands, and what it came to."""
    shown = here("evaluations", "--journal", journal)
    assert shown.code == 0 and shown.err == ""
    assert re.search(r"eval +3\.1 +running +3 +0%", shown.text), shown.text
    assert re.search(r"drift +3 +finished +1 +1 +0\.75 +1 +3 ", shown.text), shown.text


def test_the_versions_of_one(journal: Path) -> None:
    """With its environments; one that was undone is marked."""
    shown = here("evaluations", "eval", "--journal", journal)
    assert re.search(r"eval +0 +finished +3 +6 +2 +0 +0 to 0 +0 +0 \(k=2\) +0 ", shown.text), shown.text
    assert re.search(r"eval +3 +finished, undone +3 +6 +0\.75", shown.text), shown.text
    assert re.search(r"1 +math +2 +4 +2 +0\.125", shown.text) and re.search(r"1 +code +1 +2 +0\.25", shown.text)
    assert "2 of 5; --limit shows more" in here("evaluations", "eval", "--limit", "2", "--journal", journal).text


def test_as_json(journal: Path) -> None:
    """All that the store knows; each is a result again."""
    found = json.loads(piped("evaluations", "eval", "--json", "--journal", journal).out)["evaluations"]
    results = [rs.EvaluationResult.model_validate(one) for one in found]
    assert [(one.version, one.branch, one.status, one.undone) for one in results] == [
        (0, 0, "finished", False), (1, 0, "finished", False), (2, 0, "finished", False), (3, 0, "finished", True),
        (3, 1, "running", False),
    ]  # fmt: skip


def test_a_curve_beside_that_of_training(journal: Path) -> None:
    """Of what stands; rollouts of evaluations are in no other curve."""
    found = json.loads(piped("curve", "--json", "--journal", journal).out)["curves"]
    assert found["eval eval"]["points"] == [[0, 0.0], [1, pytest.approx(0.5 / 3)], [2, 0.5]]
    assert (found["eval eval"]["rollouts"], found["eval eval"]["without_reward"]) == (18, 4)
    assert found["eval drift"]["points"] == [[3, 0.75]] and "val" not in found
    only = json.loads(piped("curve", "--mode", "train", "--json", "--journal", journal).out)["curves"]
    assert only.keys() <= {"train"}
    by_time = json.loads(piped("curve", "--by", "time", "--json", "--journal", journal).out)["curves"]
    assert len(by_time["eval eval"]["points"]) == 3
    assert re.search(r"eval eval +mean reward by policy version", here("curve", "--journal", journal).text)


def test_mistakes(journal: Path, tmp_path: Path) -> None:
    """A name that there is not, and a run without evaluations."""
    shown = piped("evaluations", "evla", "--journal", journal)
    assert shown.code == 2 and "did you mean 'eval'" in shown.err and "there are drift, eval" in shown.err
    empty = rs.InMemoryLightningStore(journal=str(tmp_path / "empty"))
    empty.close()
    assert "no evaluation has begun" in here("evaluations", "--journal", tmp_path / "empty").text


def test_it_fits_forty_columns(journal: Path) -> None:
    """What matters least is left out first."""
    for command in (["evaluations"], ["evaluations", "eval"]):
        shown = here(*command, "--journal", journal, columns=40)
        assert shown.code == 0 and max(map(len, shown.lines)) <= 40, shown.text


def test_a_group_of_an_evaluation_is_explained(journal: Path) -> None:
    """Whose it is; why a sample waits."""
    with_store = rs.recover(str(journal))
    group = with_store.sync.get_group("eval@3.1/math/0")
    assert group is not None
    story = with_store.sync.story(group.members[0])
    assert "of evaluation eval@3.1: no consumer is given it" in story
    assert any("an item of evaluation eval@3.1" in line for line in with_store.sync.story("eval@3.1/math/0"))
    assert here("show", group.members[0], "--journal", journal).code == 0
    assert here("why", group.members[0], "--journal", journal).code in (0, 1)
    assert [one.version for one in with_store.sync.evaluations("drift")] == [3]
    with_store.close()
