"""Evaluations in the core: what counts as what, pins and branches, their share, and that nothing is trained on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from raystore.core import evaluation_table
from raystore.core.check import check
from raystore.core.snapshot import digest, restore, sections
from raystore.core.state import Session, State
from raystore.errors import (
    EvaluationConflictError,
    EvaluationNotFoundError,
    FeedNotFoundError,
    InvalidValueError,
    OverloadedError,
    VersionNotFoundError,
)
from tests.core.conftest import Core
from tests.core.test_feeds import Loop

RULE: dict[str, Any] = {"samples": 2, "threshold": 0.0, "failure_reward": 0.0, "share": 0.25, "total": 2, "items": "x"}


class Bench:
    """A store with an evaluation, and a runner."""

    def __init__(self, core: Core) -> None:
        self.core, self.driver, self.runner = core, core.open("driver"), core.open("runner")
        self.keys: dict[str, str] = {}

    def publish(self, version: int, resources_id: str = "policy", **more: Any) -> int:
        given = {"resources": b"w%d" % version, "holds_objects": False, "objects": [], **more}
        made = self.core.run(
            "put_resources", session=self.driver, resources_id=resources_id, policy_version=version, **given
        )
        return int(made.version)

    def begin(self, version: int | None = None, *, name: str = "e", overtaken: str = "finish", **more: Any) -> Any:
        where = {name: more.pop(name, None) for name in ("feed", "resources_id")}
        rule = RULE | more
        return self.core.run("begin_evaluation", name=name, version=version, overtaken=overtaken, rule=rule, **where)

    def add(self, row: Any, count: int | None = None, **member: Any) -> int:
        """Enqueue the items that are left, or some of them."""
        at = row["enqueued"]
        more = row["items"] - at if count is None else count
        key = {name: row[name] for name in ("name", "version", "branch")}
        made = f"{row['name']}@{row['version']}"
        requests = [
            {"member": {"input": b"x", "metadata": None, "mode": "val"} | member, "n": 1, "group_id": f"{made}/{index}"}
            for index in range(at, at + more)
        ]
        rows = [["even" if index % 2 == 0 else "odd", index // 2] for index in range(at, at + more)]
        position: int = self.core.run("evaluation_add", **key, at=at, requests=requests, items=rows)
        return position

    def start(self, version: int | None = None, **more: Any) -> Any:
        row = self.begin(version, **more)
        self.add(row)
        return row

    def claim(self, count: int = 1000) -> list[str]:
        got = dict(self.core.hold(self.runner, limit=count))
        self.keys.update(got)
        return list(got)

    def end(self, rollout_id: str, reward: float | None, status: str = "succeeded", outcome: str = "ok") -> None:
        spans = (
            [] if reward is None else [[-1, f"r{rollout_id}", "t", None, "reward", None, None, reward, b"\x01b", -1]]
        )
        self.core.run(
            "finish", session=self.runner, rollout_id=rollout_id, attempt_id=self.keys.pop(rollout_id), spans=spans,
            changes={"status": status, "outcome": outcome},
        )  # fmt: skip

    def result(self, row: Any) -> Any:
        key = {name: row[name] for name in ("name", "version", "branch")}
        return self.core.run("evaluation_result", **key, timeout=0.0)

    def sampled(self, rollout_id: str) -> Any:
        return self.core.state.entries[rollout_id].rollout


@pytest.fixture
def bench(core: Core) -> Bench:
    """A bench on a core with default settings."""
    return Bench(core)


# -- what counts -------------------------------------------------------------------------------------------------------


def test_each_item_is_sampled_and_scored(bench: Bench) -> None:
    """It ends with its last sample; after that only its scores are kept."""
    row = bench.start(samples=4)
    ids = bench.claim()
    assert len(ids) == 8 and row["status"] == "running" and bench.result(row)["enqueued"] == 2
    for rollout_id, reward in zip(ids, [1.0, 0.0, 0.0, 0.0, 1.0, 0.5, 2.0, 0.5], strict=True):
        assert bench.result(row)["status"] == "running"
        bench.end(rollout_id, reward)
    found = bench.result(row)
    items, samples, passed, failed, mean, chances = found["overall"]
    assert (found["status"], items, samples, passed, failed) == ("finished", 2, 8, 5, 0)
    assert mean[0] == pytest.approx(0.625) and [k for k, _ in chances] == [1, 2, 4]
    assert [value for _, (value, _, _) in chances] == pytest.approx([0.625, 0.75, 1.0])
    assert [name for name, _ in found["environments"]] == ["even", "odd"]
    assert found["environments"][0][1][4] == [0.25, None, None] and found["end_time"] == bench.core.now
    kept = bench.core.state.evaluations.by_key["e@-"]
    assert not kept.items and not bench.core.state.evaluations.unfinished


def test_failures_stay_in_the_denominator(bench: Bench) -> None:
    """What failed, was cancelled, dropped or deleted, ran out of time or has no reward is a sample like any other."""
    row = bench.start(samples=8, total=1, failure_reward=-1.0, threshold=0.5)
    ids = bench.claim()
    bench.end(ids[0], 1.0)
    bench.end(ids[1], 0.5)  # not above the threshold
    bench.end(ids[2], 1.0, "failed", "agent_error")  # its reward does not count
    bench.end(ids[3], None)
    bench.end(ids[4], None, "failed", "dropped")
    bench.core.run("cancel_rollouts", rollout_ids=[ids[5]], group_id=None, tags=None)
    bench.core.run("delete_rollouts", rollout_ids=[ids[6]])
    bench.end(ids[7], None, "timeout", "timeout")
    found = bench.result(row)
    assert found["status"] == "finished" and found["overall"][1:4] == [8, 1, 6]
    assert found["overall"][4][0] == pytest.approx((1.0 + 0.5 - 6.0) / 8)
    assert found["overall"][5][0] == [1, [pytest.approx(1 / 8), None, None]]


def test_a_sample_counts_once_it_has_ended_for_good(bench: Bench) -> None:
    """One that is tried again does not count before; a late success, or a requeue, changes what it came to."""
    row = bench.begin(total=1)
    bench.add(row, config=[None, None, 2, ["failed"]])
    first, second = bench.claim()
    bench.end(first, None, "failed", "agent_error")
    assert bench.result(row)["overall"][1] == 0 and bench.claim() == [first]
    bench.end(first, None, "failed", "agent_error")
    assert bench.result(row)["overall"][1:4] == [1, 0, 1]
    ((again, _),) = bench.core.run("requeue", rollout_ids=[first])
    assert again.rollout_id == first and bench.result(row)["overall"][1] == 0
    assert bench.claim() == [first]
    bench.end(first, 1.0)
    bench.end(second, 1.0)
    assert bench.result(row)["overall"][1:4] == [2, 2, 0]


def test_a_reward_that_comes_after_the_end_of_a_sample_counts(bench: Bench) -> None:
    """As long as the evaluation runs."""
    row = bench.start(total=1)
    first, second = bench.claim()
    attempt = bench.keys[first]
    bench.end(first, None)
    span = [-1, "late", "t", None, "reward", None, None, 1.0, b"\x01b", -1]
    bench.core.run("add_spans", session=bench.runner, rollout_id=first, attempt_id=attempt, spans=[span])
    bench.end(second, 0.0)
    assert bench.result(row)["overall"][1:4] == [2, 1, 0]


def test_a_result_survives_what_it_was_made_of(make_core: Callable[..., Core]) -> None:
    """Rollouts that retention deletes meanwhile, or afterwards."""
    bench = Bench(make_core(retention_count=0))
    row = bench.start(total=1, samples=3)
    ids = bench.claim()
    for rollout_id in ids:
        bench.end(rollout_id, 1.0)
        bench.core.run("release", rollout_ids=[rollout_id])
        bench.core.tick(1)
    assert bench.result(row)["overall"][1:4] == [3, 3, 0] and not bench.core.state.entries
    assert not bench.core.state.evaluations.by_group and not bench.core.state.evaluations.by_rollout


def test_of_those_that_ended_the_newest_are_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name; what is gone is forgotten, and its rollouts are still no rollouts to train on."""
    monkeypatch.setattr(evaluation_table, "KEPT", 2)
    for version in range(4):
        bench.publish(version)
        bench.start(version, total=1, samples=1, resources_id="policy")
        (rollout_id,) = bench.claim()
        bench.end(rollout_id, 1.0)
    rows = bench.core.run("evaluations", name="e").items
    assert [row["version"] for row in rows] == [2, 3]
    with pytest.raises(EvaluationNotFoundError, match=r"'e' of version 0"):
        bench.result({"name": "e", "version": 0, "branch": 0})
    assert bench.core.run("take", session=bench.driver, consumer="c", count=9) == ([], 0)
    again = bench.start(3, name="other", total=1, samples=1, resources_id="policy")
    assert again["status"] == "running"


# -- versions ----------------------------------------------------------------------------------------------------------


def test_a_pinned_version_is_kept_and_is_what_attempts_get(bench: Bench) -> None:
    """Retries too, however many versions come meanwhile; then it is freed."""
    objects: dict[str, Any] = {"holds_objects": True, "objects": [(None, 100)]}
    pinned = bench.publish(7, **objects)
    row = bench.begin(7, total=1, resources_id="policy")
    bench.add(row, config=[None, None, 2, ["failed"]])
    for version in range(8, 30):
        bench.publish(version, **objects)
    first, second = bench.claim()
    bench.end(first, None, "failed", "agent_error")
    assert bench.claim() == [first]
    for rollout_id in (first, second):
        attempts = bench.core.state.entries[rollout_id].attempts
        assert {(one.resources_version, one.policy_version) for one in attempts} == {(pinned, 7)}
    assert bench.core.state.resources.is_there("policy", pinned)
    bench.end(first, 1.0)
    bench.end(second, 1.0)
    found = bench.result(row)
    assert found["pinned"] and found["versions"] == [7, 7]
    assert not bench.core.state.resources.is_there("policy", pinned)


def test_without_a_pin_the_versions_are_told(bench: Bench) -> None:
    """It is known by the newest one when it began, and found again by that."""
    bench.publish(3)
    row = bench.start(samples=1, total=3)
    assert row["version"] == 3 and not row["pinned"]
    for version in (4, 5, 6):
        (rollout_id,) = bench.claim(1)
        bench.end(rollout_id, 1.0)
        bench.publish(version)
    assert bench.result(row)["versions"] == [3, 5]


@pytest.mark.parametrize("version", [5, 0, -1])
def test_a_version_that_cannot_be_had_is_refused(bench: Bench, version: int) -> None:
    """Never published, or freed: the error says which are there; nothing is changed."""
    with pytest.raises(VersionNotFoundError, match="None can be had"):
        bench.begin(version, resources_id="policy")
    for step in range(3):
        bench.publish(step, holds_objects=True, objects=[(None, 1)])
    before = digest(bench.core.state)
    with pytest.raises(VersionNotFoundError, match=r"can be had are 2\.") as caught:
        bench.begin(version, resources_id="policy")
    assert (caught.value.version, caught.value.there) == (version, [2])
    assert digest(bench.core.state) == before


def test_the_same_again_is_the_same(bench: Bench) -> None:
    """Whatever is measured must be the same; how it is run may differ."""
    bench.publish(1)
    row = bench.start(1, resources_id="policy")
    again = bench.begin(1, resources_id="policy", share=0.5)
    assert again["enqueued"] == 2 and bench.core.state.evaluations.made == 1
    assert bench.core.state.evaluations.by_key["e@1"].rule["share"] == 0.5
    others: dict[str, Any] = {"samples": 3, "items": "y", "threshold": 1.0, "failure_reward": 1.0}
    for name, value in others.items():
        with pytest.raises(EvaluationConflictError, match=f"other content \\({name} differ"):
            bench.begin(1, resources_id="policy", **{name: value})
    with pytest.raises(EvaluationConflictError, match="version differ"):
        bench.begin(None, resources_id="policy")
    bench.publish(1, "other")
    with pytest.raises(EvaluationConflictError, match="resources_id differ"):
        bench.begin(1, resources_id="other")
    assert bench.begin(1)["enqueued"] == 2  # who names no resources means those of then, whatever is latest now
    for rollout_id in bench.claim():
        bench.end(rollout_id, 1.0)
    assert bench.begin(1, resources_id="policy")["status"] == "finished"
    assert row["version"] == 1


def test_an_enqueue_goes_on_where_it_was(bench: Bench) -> None:
    """Position and groups advance in one step: who is not at the position enqueues nothing."""
    row = bench.begin(total=3, samples=1)
    assert bench.add(row, 1) == 1
    assert bench.add(row, 2) == 1  # it was at 0: somebody has enqueued that
    again = bench.begin(total=3, samples=1)
    assert again["enqueued"] == 1 and bench.add(again) == 3
    assert [bench.sampled(i).group_id for i in bench.claim()] == ["e@None/0", "e@None/1", "e@None/2"]
    with pytest.raises(InvalidValueError, match="at most 0"):
        bench.add({**row, "enqueued": 3}, 1)


def test_a_full_queue_refuses_a_part_and_changes_nothing(make_core: Callable[..., Core]) -> None:
    """It may be sent again."""
    bench = Bench(make_core(max_queued=3))
    row = bench.begin()
    before = digest(bench.core.state)
    with pytest.raises(OverloadedError):
        bench.add(row)
    assert digest(bench.core.state) == before
    assert bench.add(row, 1) == 1


def test_it_does_not_end_before_all_is_enqueued(bench: Bench) -> None:
    """Though all that was enqueued has finished."""
    row = bench.begin(total=2, samples=1)
    bench.add(row, 1)
    (rollout_id,) = bench.claim()
    bench.end(rollout_id, 1.0)
    assert bench.result(row)["status"] == "running"
    bench.add(bench.begin(total=2, samples=1))
    (rollout_id,) = bench.claim()
    bench.end(rollout_id, 1.0)
    assert bench.result(row)["status"] == "finished"


# -- versions that are lost --------------------------------------------------------------------------------------------


def test_what_is_pinned_to_a_lost_version_waits_for_it(bench: Bench) -> None:
    """Once its process has died, until the same version is published again; newer ones do not help."""
    publisher = bench.core.open("publisher")
    objects: dict[str, Any] = {"holds_objects": True, "objects": [(None, 100)]}
    bench.driver, driver = publisher, bench.driver
    bench.publish(7, **objects)
    row = bench.start(7, total=1, resources_id="policy")
    bench.publish(8, **objects)
    bench.core.end(publisher)
    bench.driver = driver
    assert bench.claim() == [] and "cannot be had" in bench.result(row)["why"]
    bench.publish(8, **objects)
    assert bench.claim() == []
    again = bench.publish(7, **objects)
    ids = bench.claim()
    assert {bench.core.state.entries[i].attempts[0].resources_version for i in ids} == {again} and len(ids) == 2
    assert bench.result(row)["why"] is None


def test_a_deleted_version_is_lost(bench: Bench) -> None:
    """A user may delete what an evaluation needs."""
    bench.publish(7)
    row = bench.start(7, total=1, resources_id="policy")
    bench.core.run("delete_resources", resources_id="policy")
    assert bench.claim() == [] and "was deleted" in bench.result(row)["why"]
    bench.publish(7)
    assert len(bench.claim()) == 2


def test_the_newest_version_may_be_missing_for_others(bench: Bench) -> None:
    """What is pinned to one that can be had goes on."""
    bench.publish(7)
    bench.start(7, total=1, resources_id="policy")
    publisher = bench.core.open("publisher")
    bench.driver = publisher
    bench.publish(8, holds_objects=True, objects=[(None, 100)])
    bench.core.end(publisher)
    other = bench.core.enqueue(resources_id="policy")
    assert len(bench.claim()) == 2 and other in bench.core.state.queues


# -- its share ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "mine"), [(0.01, 1), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_an_evaluation_has_its_share_of_what_runs(bench: Bench, share: float, mine: int) -> None:
    """While other work waits as well, and one rollout at least."""
    for _ in range(20):
        bench.core.enqueue()
    bench.start(total=10, samples=2, share=share)
    ids = bench.claim(8)
    assert sum(bench.sampled(i).mode == "val" for i in ids) == mine
    for _ in range(8):  # one ends, another is claimed
        done = ids.pop(0)
        bench.end(done, 1.0)
        ids += bench.claim(1)
        assert sum(bench.sampled(i).mode == "val" for i in ids) == mine


def test_whatever_waits_alone_has_everything(bench: Bench) -> None:
    """No runner is idle for a share, and the share counts what runs already."""
    bench.start(total=4, samples=2, share=0.25)
    assert len(bench.claim(6)) == 6
    others = [bench.core.enqueue() for _ in range(3)]
    assert bench.claim(3) == others
    assert len(bench.claim(9)) == 2


def test_pauses_and_limits_hold_for_evaluations(bench: Bench) -> None:
    """As for any rollout of their queue."""
    bench.start(total=4, samples=2)
    bench.core.run("limit_queue", queue="default", max_running=3, per_minute=None)
    assert len(bench.claim()) == 3
    bench.core.run("pause_queues", session=bench.driver, queues=None, keep=False)
    assert bench.claim() == []


def test_a_suspect_of_an_evaluation_comes_back(bench: Bench) -> None:
    """It waits for a session of its own, like others, and counts once."""
    row = bench.start(total=1, samples=2)
    bench.claim()
    bench.core.end(bench.core.state.sessions["runner"])
    bench.keys.clear()
    for name in "ab":
        bench.runner = bench.core.open(name)
        (rollout_id,) = bench.claim()
        bench.end(rollout_id, 1.0)
    assert bench.result(row)["overall"][1:4] == [2, 2, 0]


# -- never trained on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{}, {"mode": "val"}, {"tags": {"k": 1}}])
@pytest.mark.parametrize("is_known", [True, False])
def test_no_consumer_of_rollouts_is_given_any(bench: Bench, asked: dict[str, Any], is_known: bool) -> None:
    """Whether it was known before or is later; and it waits for none of them."""
    take = {"session": bench.driver, "consumer": "c", "count": 5, **asked}
    if is_known:
        assert bench.core.run("take", **take, timeout=0.0) == ([], 0)
    row = bench.begin(total=2)
    bench.add(row, tags={"k": 1})
    mine = bench.core.enqueue(mode="val", tags={"k": 1})
    ids = bench.claim()
    bench.end(mine, 1.0)
    items, number = bench.core.run("take", **take, timeout=10.0)  # at once: nothing else will come
    assert [rollout.rollout_id for rollout, _ in items] == [mine] and number == 1
    bench.core.run("ack", session=bench.driver, consumer="c", batch=1, at_step=1, note=None)
    for rollout_id in ids:
        if rollout_id != mine:
            bench.end(rollout_id, 1.0)
    assert bench.core.run("take", **take, timeout=0.0) == ([], 0)
    assert bench.result(row)["status"] == "finished"


@pytest.mark.parametrize("asked", [{}, {"mode": "val"}])
def test_no_consumer_of_groups_is_given_any(bench: Bench, asked: dict[str, Any]) -> None:
    """Neither complete ones nor open ones count for it."""
    take = {"session": bench.driver, "consumer": "g", "count": 5, **asked}
    bench.core.run("take_groups", **take, timeout=0.0)
    bench.start(total=2)
    request = {"member": {"input": b"x", "metadata": None, "mode": "val"}, "n": 1, "group_id": "mine"}
    bench.core.run("enqueue_groups", groups=[request], gives="groups")
    for rollout_id in bench.claim():
        if bench.sampled(rollout_id).group_id != "e@None/1":
            bench.end(rollout_id, 1.0)
    items, _ = bench.core.run("take_groups", **take, timeout=10.0)
    assert [one.group_id for one in items if not isinstance(one, tuple)] == ["mine"]
    later = bench.core.run("take_groups", session=bench.driver, consumer="later", count=5, timeout=10.0)
    assert [one.group_id for one in later[0] if not isinstance(one, tuple)] == ["mine"]


def test_what_is_made_of_a_sample_is_not_trained_on(bench: Bench) -> None:
    """A requeue after the end makes a new rollout, which no consumer is given, and the result stands."""
    row = bench.start(total=1, samples=1)
    (rollout_id,) = bench.claim()
    bench.end(rollout_id, None, "failed", "agent_error")
    ((made, _),) = bench.core.run("requeue", rollout_ids=[rollout_id])
    assert made.rollout_id != rollout_id and bench.claim() == [made.rollout_id]
    bench.end(made.rollout_id, 1.0)
    assert bench.core.run("take", session=bench.driver, consumer="c", count=5) == ([], 0)
    assert bench.result(row)["overall"][1:4] == [1, 0, 1]


# -- beside a feed -----------------------------------------------------------------------------------------------------


class Beside(Bench):
    """The same beside the training loop of a feed."""

    def __init__(self, core: Core, **rule: Any) -> None:
        self.loop = Loop(core, **rule)
        self.core, self.driver, self.runner, self.keys = core, self.loop.driver, self.loop.runner, self.loop.keys


@pytest.fixture
def beside(core: Core) -> Beside:
    """A feed that has published step 0."""
    made = Beside(core)
    made.loop.publish(0)
    return made


def test_a_feed_does_not_know_of_evaluations(make_core: Callable[..., Core]) -> None:
    """Places, slots and the failure budget are those of its items; a closed feed holds nothing else back."""
    beside = Beside(make_core(), max_running=1, in_a_row=2)
    beside.loop.publish(0)
    beside.loop.draw()
    before = beside.core.run("feed_status", feed="f")
    row = beside.start(0, feed="f", total=3)
    ids = beside.claim()
    mine = [i for i in ids if beside.sampled(i).mode == "val"]
    assert len(mine) == 6 and len(ids) == 7
    for rollout_id in mine[:5]:
        beside.end(rollout_id, None, "failed", "agent_error")
    after = beside.core.run("feed_status", feed="f")
    assert {name: after[name] for name in before} == before
    beside.loop.rewind(0)  # closed until it publishes
    beside.core.run("requeue", rollout_ids=mine[:1])
    assert beside.claim() == mine[:1]
    assert beside.result(row)["overall"][1] == 4


def test_a_step_that_stands_is_found_again_after_a_rewind(beside: Beside) -> None:
    """One that was undone is another evaluation, of the new branch; what runs of it is dropped."""
    first = beside.start(0, feed="f", total=1)
    beside.loop.publish(1)
    beside.loop.publish(2)
    undone = beside.start(2, feed="f", total=1)
    ids = beside.claim()
    beside.end(ids[2], 1.0)
    beside.loop.rewind(1)
    found = beside.result(undone)
    assert found["status"] == "dropped" and found["undone"] and "undone by a restore" in found["why"]
    assert found["overall"][1:4] == [1, 1, 0] and beside.core.status(ids[3]) == "cancelled"
    assert beside.result(first)["status"] == "running" and not beside.result(first)["undone"]
    for version in (2, 3):
        with pytest.raises(VersionNotFoundError, match="can be had are 0, 1"):
            beside.begin(version, feed="f", total=1)
    with pytest.raises(InvalidValueError, match="has published none since"):
        beside.begin(None, feed="f", total=1)
    beside.loop.publish(1)
    beside.loop.publish(2)
    again = beside.start(2, feed="f", total=1)
    assert (again["branch"], again["version"]) == (1, 2)
    assert beside.begin(0, feed="f", total=1)["enqueued"] == 1
    rows = beside.core.run("evaluations", name="e").items
    assert [(row["version"], row["branch"], row["undone"]) for row in rows] == [
        (0, 0, False),
        (2, 0, True),
        (2, 1, False),
    ]


@pytest.mark.parametrize(
    ("rewinds", "branches"),
    [([], [0] * 7), ([3], [0, 0, 0, 0, 1, 1, 1]), ([5, 2], [0, 0, 0, 2, 2, 2, 2]), ([2, 5], [0, 0, 0, 1, 1, 1, 2])],
)
def test_a_step_belongs_to_the_branch_in_which_it_was_made(
    beside: Beside, rewinds: list[int], branches: list[int]
) -> None:
    """That of the last rewind before it that went further back than it."""
    feed = beside.loop.feed
    beside.loop.publish(6)
    for at_step in rewinds:
        beside.loop.rewind(at_step)
        beside.loop.publish(6)
    assert [feed.branch_of_step(step) for step in range(7)] == branches


def test_two_rewinds_without_a_publish_are_one(beside: Beside) -> None:
    """They begin one branch, at the earlier step."""
    beside.loop.publish(9)
    beside.loop.rewind(5)
    beside.loop.rewind(3)
    assert beside.loop.feed.rewinds == [(1, 3)] and beside.loop.feed.branch == 1


def test_one_that_is_overtaken_may_be_dropped(beside: Beside) -> None:
    """As the later one says; those of other names go on."""
    other = beside.start(0, feed="f", name="other")
    rows = []
    for version, overtaken in ((0, "finish"), (1, "finish"), (2, "drop")):
        beside.loop.publish(version)
        rows.append(beside.start(version, feed="f", overtaken=overtaken))
    found = [beside.result(row) for row in rows]
    assert [one["status"] for one in found] == ["dropped", "dropped", "running"] and "overtaken" in found[0]["why"]
    assert beside.result(other)["status"] == "running"
    assert beside.begin(0, feed="f")["status"] == "dropped"  # and is not begun again


def test_an_unknown_feed_is_refused(bench: Bench) -> None:
    """It must have begun."""
    with pytest.raises(FeedNotFoundError):
        bench.begin(0, feed="none")


# -- dropping ----------------------------------------------------------------------------------------------------------


def test_a_dropped_one_keeps_what_was_scored(bench: Bench) -> None:
    """What waits and runs of it is cancelled, and does not count; its version is free."""
    pinned = bench.publish(1, holds_objects=True, objects=[(None, 1)])
    row = bench.start(1, resources_id="policy")
    bench.publish(2)
    first, second = bench.claim(2)
    bench.end(first, 1.0)
    with pytest.raises(EvaluationNotFoundError, match="there are 'e'"):
        bench.core.run("drop_evaluation", name="f", version=None)
    with pytest.raises(EvaluationNotFoundError, match="of version 9"):
        bench.core.run("drop_evaluation", name="e", version=9)
    assert bench.core.run("drop_evaluation", name="e", version=1) == 1
    found = bench.result(row)
    assert (found["status"], found["overall"][1:4]) == ("dropped", [1, 1, 0]) and found[
        "why"
    ] == "it was dropped by hand"
    assert bench.core.status(second) == "cancelled" and not bench.core.state.queues
    assert not bench.core.state.resources.is_there("policy", pinned)
    assert bench.core.run("drop_evaluation", name="e", version=None) == 0
    assert bench.add({**row, "enqueued": 1}, 1) == 2 and not bench.core.state.queues  # whoever enqueued stops


def test_one_may_be_dropped_before_all_is_enqueued(bench: Bench) -> None:
    """It has nothing then."""
    row = bench.begin()
    assert bench.core.run("drop_evaluation", name="e", version=None) == 1
    assert bench.result(row)["overall"] == [0, 0, 0, 0, None, []] and bench.add(row) == 2


# -- as a whole --------------------------------------------------------------------------------------------------------


def again(core: Core) -> Core:
    """The same state, of a snapshot."""
    made = Core()
    made.state = State(core.state.settings)
    made.now, made.seed = core.now, core.seed
    restore(made.state, list(sections(core.state, {})), lambda columns: columns)
    made.state.guard_all()
    return made


def test_a_snapshot_has_everything(beside: Beside) -> None:
    """What goes on from it comes to the same."""
    beside.loop.draw()
    beside.start(0, feed="f", total=3)
    beside.loop.publish(1)
    ids = beside.claim(5)
    mine = [i for i in ids if beside.sampled(i).mode == "val"]
    beside.end(mine[0], None, "failed", "agent_error")
    ended = beside.start(1, feed="f", total=1, name="short")
    beside.core.run("drop_evaluation", name="short", version=None)
    copy = again(beside.core)
    assert digest(copy.state) == digest(beside.core.state)
    check(copy.state)
    assert copy.state.evaluations.active.keys() == beside.core.state.evaluations.active.keys()
    assert copy.state.queues.evaluated == beside.core.state.queues.evaluated > 0
    other = Bench.__new__(Bench)
    other.core, other.keys, other.runner = copy, dict(beside.keys), copy.state.sessions["runner"]
    for one in (beside, other):
        while True:
            one.claim()
            if not one.keys:
                break
            for rollout_id in list(one.keys):
                one.end(rollout_id, 1.0)
    assert digest(copy.state) == digest(beside.core.state)
    assert other.result({"name": "e", "version": 0, "branch": 0})["overall"][1:4] == [6, 5, 1]
    assert ended["name"] == "short"


def test_a_store_without_evaluations_shows_none(core: Core) -> None:
    """Its snapshots and digests are as they were."""
    assert "evaluations" not in dict(sections(core.state, {}))
    session: Session = core.open("s")
    assert session.is_idle and not core.state.evaluations.are_used
