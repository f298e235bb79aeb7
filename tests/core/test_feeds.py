"""Feeds in the core: places, lag, what the next batch is made of, publishing, failures, and what a rewind undoes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from raystore.core.check import check
from raystore.core.expiry import forget_session
from raystore.core.feed_table import CLOSED, FeedEntry, Item
from raystore.core.snapshot import digest, restore, sections
from raystore.core.state import Session, State
from raystore.errors import (
    BatchConflictError,
    DatasetChangedError,
    FailureBudgetError,
    FeedHeldError,
    FilteredTooManyError,
    VersionConflictError,
)
from tests.core.conftest import Core

RULE: dict[str, Any] = {
    "resources_id": "policy", "batch": 2, "max_lag": 1, "max_running": None, "late": "wait", "order": "oldest",
    "on_failure": "mask", "failure_reward": None, "race": False, "judged": False, "batch_tokens": None,
    "max_filtered": None, "in_a_row": None, "share": None, "window": 200, "requeues": 2,
}  # fmt: skip


class Loop:
    """A feed with all who have a part in it: pump, runner and trainer."""

    def __init__(self, core: Core, length: int = 100, *, size: int = 2, streams: Any = None, **rule: Any) -> None:
        self.core, self.size, self.length = core, size, length
        self.member: dict[str, Any] = {}
        self.group: dict[str, Any] = {}
        self.rule = RULE | rule
        self.streams = streams or [["", 1.0, length, "f"]]
        self.runner, self.driver = core.open("runner"), core.open("driver")
        self.keys: dict[str, str] = {}
        self.seen, self.pump = 0, "p1"
        self.position: dict[str, list[int]] = {}
        self.open()

    def open(self, session: Session | None = None, **more: Any) -> Any:
        self.driver = session or self.driver
        given = {"feed": "f", "pump": self.pump, "rule": self.rule, "streams": self.streams, "changed": "refuse"}
        answer = self.core.run("open_feed", session=self.driver, **(given | more))
        self.position = {name: [epoch, cursor] for name, epoch, cursor, *_ in answer[3]}
        return answer

    @property
    def feed(self) -> FeedEntry:
        return self.core.state.feeds.by_name["f"]

    def item(self, group_id: str) -> Item:
        return {**self.feed.items, **self.feed.trained}[group_id]

    def publish(self, version: int = 0, digest: str = "d") -> Any:
        return self.core.run(
            "publish_feed", session=self.driver, feed="f", pump=self.pump, version=version, digest=digest,
            resources=b"w", holds_objects=False, objects=[],
        )  # fmt: skip

    def work(self) -> dict[str, Any]:
        found: dict[str, Any] = self.core.run(
            "feed_work", session=self.driver, feed="f", pump=self.pump, seen=self.seen, timeout=0.0
        )
        return found

    def draw(self, most: int = 1_000_000) -> list[str]:
        """Draw as many items as may be; the ids of their groups."""
        made: list[str] = []
        for name, places in self.work()["places"].items():
            length = next(row[2] for row in self.streams if row[0] == name)
            epoch, cursor = self.position[name]
            count = min(places, length - cursor, most)
            ids = [
                f"f/{name}/{epoch}/{index}" if name else f"f/{epoch}/{index}" for index in range(cursor, cursor + count)
            ]
            requests = [
                {
                    "member": {"input": b"x", "metadata": None, **self.member},
                    "n": self.size,
                    "group_id": i,
                    **self.group,
                }
                for i in ids
            ]
            to = [epoch, cursor + count]
            self.position[name] = self.core.run(
                "feed_add", session=self.driver, feed="f", pump=self.pump, stream=name, at=[epoch, cursor], to=to,
                over=cursor + count >= length, state_after=None, requests=requests,
                items=[[name or "f", epoch, index] for index in range(cursor, cursor + count)], skipped=[],
            )  # fmt: skip
            made += ids
        return made

    def claim(self, count: int = 1000) -> list[str]:
        """Claim what is offered."""
        got = dict(self.core.hold(self.runner, limit=count))
        self.keys.update(got)
        return list(got)

    def end(self, rollout_id: str, how: str = "succeeded", outcome: str | None = None) -> None:
        usual = {"succeeded": "ok", "failed": "agent_error"}[how]
        self.core.finish((rollout_id, self.keys.pop(rollout_id)), how, outcome or usual, self.runner)

    def complete(self, *group_ids: str) -> None:
        """Let all members of these groups run and succeed."""
        self.claim()
        for group_id in group_ids:
            for rollout_id in list(self.core.state.groups.by_id[group_id].places):
                if rollout_id in self.keys:
                    self.end(rollout_id)

    def take(self, **more: Any) -> tuple[list[str], int]:
        """The groups of the next batch, and its number."""
        items, number = self.core.run(
            "take_groups", session=self.driver, consumer="f", count=self.rule["batch"], timeout=0.0, **more
        )
        return [item.group_id for item in items if not isinstance(item, tuple)], number

    def ack(self, number: int, step: int) -> None:
        self.core.run("ack", session=self.driver, consumer="f", batch=number, at_step=step, note=None)

    def rewind(self, step: int) -> Any:
        return self.core.run("rewind", session=self.driver, consumer="f", at_step=step)


@pytest.fixture
def make(make_core: Callable[..., Core]) -> Callable[..., Loop]:
    """Makes loops."""
    return lambda *args, **rule: Loop(make_core(), *args, **rule)


# -- places and publishing ---------------------------------------------------------------------------------------------


def test_nothing_is_drawn_or_handed_out_before_the_first_publish(make: Callable[..., Loop]) -> None:
    """Then as many groups as max_lag and batch allow; what is acknowledged makes room."""
    loop = make()
    assert loop.work()["places"] == {}
    loop.publish()
    groups = loop.draw()
    assert groups == [f"f/0/{i}" for i in range(4)] and loop.draw() == []
    assert len(loop.claim()) == 8
    loop.complete(*groups)
    taken, number = loop.take()
    assert taken == groups[:2] and loop.draw() == []  # taken, and not acknowledged
    loop.ack(number, 1)
    assert loop.draw() == ["f/0/4", "f/0/5"]


def test_a_rewind_closes_the_feed_until_it_publishes_in_a_new_branch(make: Callable[..., Loop]) -> None:
    """What is queued keeps its place; attempts say with which branch and step they ran."""
    loop = make(max_lag=2)
    loop.publish(7)
    groups = loop.draw()
    loop.complete(*groups[:2])
    for rollout_id in list(loop.keys):
        loop.core.finish((rollout_id, loop.keys.pop(rollout_id)), "failed", "infra", loop.runner)
    taken, number = loop.take()
    loop.ack(number, 8)
    loop.publish(8)
    assert loop.rewind(7) == 2 and loop.feed.branch == 1
    assert loop.claim() == [] and loop.work()["places"] == {}
    waits = loop.core.state.queues
    assert {waits.waits_for(i) for i in waits} == {CLOSED}
    loop.publish(7, "other content, another branch")
    loop.complete(*groups[2:4])
    assert loop.take()[0] == taken  # what was undone comes first
    rows = loop.core.run("feed_items", feed="f", group_ids=[groups[0], groups[2]])
    assert [[(branch, step) for _, branch, step in row[10]] for row in rows] == [[(0, 7)] * 2, [(1, 7)] * 2]


def test_what_comes_again_comes_as_it_came(make: Callable[..., Loop]) -> None:
    """The same batches, no larger than before; what was under way meanwhile is not late by that."""
    loop = make(12)
    loop.publish()
    batches = []
    for step in range(1, 5):
        loop.draw()
        loop.complete(*loop.feed.items)
        taken, number = loop.take()
        batches.append(taken)
        loop.ack(number, step)
        if step == 2:
            loop.core.run("checkpoint", session=loop.driver, consumer="f", at_step=2)
    loop.rewind(2)
    loop.publish()
    again = []
    for step in range(3, 7):
        loop.draw()
        loop.complete(*loop.feed.items)
        taken, number = loop.take()
        assert len(taken) == 2
        again.append(taken)
        loop.ack(number, step)
    assert again[:2] == batches[2:] and sorted(itertools.chain(*batches[:2], *again)) == sorted(
        f"f/0/{i}" for i in range(12)
    )


def test_in_order_stays_in_order_after_a_rewind(make: Callable[..., Loop]) -> None:
    """A draw that was on its way meanwhile is not made; later ones follow what comes again."""
    loop = make(12, order="in_order")
    loop.publish()
    loop.complete(*loop.draw()[:2])
    _, number = loop.take()
    loop.ack(number, 1)
    on_its_way = loop.work()
    loop.complete("f/0/2", "f/0/3")
    loop.rewind(0)
    loop.work = lambda: on_its_way  # type: ignore[method-assign]
    loop.draw()
    assert list(loop.feed.items) == [f"f/0/{index}" for index in (2, 3, 0, 1)]
    del loop.work
    loop.publish()
    for step, expected in enumerate((["f/0/0", "f/0/1"], ["f/0/2", "f/0/3"], ["f/0/4", "f/0/5"]), 1):
        loop.complete(*loop.draw())
        taken, number = loop.take()
        assert taken == expected
        loop.ack(number, step)


def test_a_version_is_published_once_in_order(make: Callable[..., Loop]) -> None:
    """Again with the same content it is the same; with other content, or earlier, it is refused."""
    loop = make()
    made = loop.publish(3)
    assert loop.publish(3).version == made.version
    with pytest.raises(VersionConflictError, match="version 3: other content"):
        loop.publish(3, "other")
    with pytest.raises(VersionConflictError, match="step 3 is published already"):
        loop.publish(2)


def test_one_pump_draws_the_items(make: Callable[..., Loop]) -> None:
    """A second one is refused while the process of the first lives; then the first one is."""
    loop = make()
    loop.publish()
    other = loop.core.open("other")
    with pytest.raises(FeedHeldError, match="session driver"):
        loop.open(other, pump="p2")
    loop.core.end(loop.core.state.sessions["driver"])
    loop.pump = "p2"
    loop.open(other)
    assert len(loop.draw()) == 4
    loop.pump, loop.driver = "p1", other
    with pytest.raises(FeedHeldError):
        loop.work()
    loop.pump = "p2"


def test_a_session_that_has_ended_holds_no_feed(make: Callable[..., Loop]) -> None:
    """Also if another process has its id, as that of a store in process after a restart."""
    loop = make()
    loop.publish()
    loop.core.end(loop.core.state.sessions["driver"])
    forget_session(loop.core.state, "driver")
    loop.pump = "p2"
    loop.open(loop.core.open("driver"))
    assert len(loop.draw()) == 4


def test_a_draw_that_comes_twice_draws_once(make: Callable[..., Loop]) -> None:
    """Position and groups advance in one step: who is not at the position draws nothing."""
    loop = make()
    loop.publish()
    loop.draw(most=1)
    loop.position[""] = [0, 0]
    loop.draw(most=1)
    assert loop.position[""] == [0, 1] and list(loop.feed.items) == ["f/0/0"]


def test_a_draw_without_places_draws_nothing(make: Callable[..., Loop]) -> None:
    """As one that was on its way while batches were undone."""
    loop = make()
    loop.publish()
    places = loop.work()["places"][""]
    assert places == 4
    loop.rewind(0)
    request = {"member": {"input": b"x", "metadata": None}, "n": 2, "group_id": "f/0/0"}
    draw: dict[str, Any] = {
        "feed": "f", "pump": "p1", "stream": "", "at": [0, 0], "to": [0, 1], "over": False, "state_after": None,
        "requests": [request], "items": [["f", 0, 0]], "skipped": [],
    }  # fmt: skip
    assert loop.core.run("feed_add", session=loop.driver, **draw) == [0, 0] and not loop.feed.items
    loop.publish()
    assert loop.core.run("feed_add", session=loop.driver, **draw) == [0, 1] and list(loop.feed.items) == ["f/0/0"]


def test_another_dataset_is_refused(make: Callable[..., Loop]) -> None:
    """Unless one says that the feed goes on with it."""
    loop = make()
    loop.core.run("close_feed", session=loop.driver, feed="f", pump="p1")
    loop.pump, loop.streams = "p2", [["", 1.0, 7, "g"]]
    with pytest.raises(DatasetChangedError, match="had 100 items and has 7"):
        loop.open()
    loop.open(changed="continue")


def test_so_many_rollouts_run_at_once(make: Callable[..., Loop]) -> None:
    """The others wait for one of them to end."""
    loop = make(max_running=3)
    loop.publish()
    loop.draw()
    first = loop.claim()
    assert len(first) == 3
    loop.end(first[0])
    assert len(loop.claim()) == 1
    loop.end(first[1], "failed", "infra")
    assert len(loop.claim()) == 1 and len(loop.feed.slots) == 3


# -- lag and order -----------------------------------------------------------------------------------------------------


def test_the_next_batch_waits_for_a_group_that_would_be_late(make: Callable[..., Loop]) -> None:
    """A straggler holds up the batch after which its lag would be more than max_lag, and no other."""
    loop = make()
    loop.publish()
    slow, *quick = loop.draw()
    loop.complete(*quick)
    _, number = loop.take()
    loop.ack(number, 1)
    more = loop.draw()
    loop.complete(*more)
    assert loop.take() == ([], 0)
    loop.complete(slow)
    taken, number = loop.take()
    assert slow in taken
    assert loop.core.run("feed_items", feed="f", group_ids=[slow])[0][4:6] == [1, 0]
    loop.ack(number, 2)
    assert loop.item(slow).lag == (1, 0)


@pytest.mark.parametrize("max_lag", [1, 2, 4])
def test_no_group_is_late_where_several_are_slow(make: Callable[..., Loop], max_lag: int) -> None:
    """A batch has those for which the later ones have no room, though quicker groups are there."""
    loop = make(max_lag=max_lag)
    loop.publish()
    slow = loop.draw()[: 2 * max_lag]
    worst = step = 0
    for _ in range(40):
        loop.draw()
        loop.complete(*(group_id for group_id in loop.feed.items if group_id not in slow))
        taken, number = loop.take()
        if not number:
            assert slow
            loop.complete(slow.pop())
            continue
        step += 1
        loop.ack(number, step)
        worst = max(worst, *(sum(loop.item(group_id).lag or ()) for group_id in taken))
    assert worst == max_lag and not slow


def test_late_groups_are_trained_dropped_or_queued_again(make: Callable[..., Loop]) -> None:
    """As the feed is to do; none of these waits for a straggler."""
    ends = {}
    for late in ("train", "drop", "requeue"):
        loop = make(late=late)
        loop.publish()
        slow, *rest = loop.draw()
        for step in range(1, 3 if late == "requeue" else 5):
            loop.complete(*rest)
            taken, number = loop.take()
            assert len(taken) == 2 and slow not in taken
            loop.ack(number, step)
            rest = [i for i in (*rest, *loop.draw()) if i in loop.feed.items]
        state = loop.core.state
        ends[late] = state.groups.by_id[slow].status
        if late == "train":
            loop.complete(slow)
            _, number = loop.take()
            loop.ack(number, 5)
            assert loop.item(slow).lag == (4, 0)
        elif late == "drop":
            assert loop.feed.streams[""].endings["stale"] == 1 and "2 batches were trained" in str(
                state.groups.by_id[slow].why
            )
        else:
            again = state.groups.by_id[f"{slow}~1"]
            assert again.status == "open" and loop.item(f"{slow}~1").requeued_from == slow
            assert {loop.core.status(i) for i in state.groups.by_id[slow].members} == {"cancelled"}
            assert "stale" not in loop.feed.streams[""].endings
    assert ends == {"train": "open", "drop": "stale", "requeue": "stale"}


def test_orders(make: Callable[..., Loop]) -> None:
    """Who is taken first: drawn first, complete first, in order whatever is complete, or as a function chooses."""
    for order, expected in [("oldest", [0, 2]), ("ready_first", [3, 2]), ("in_order", []), ("chosen", [2, 3])]:
        loop = make(order=order, max_lag=3)
        loop.publish()
        groups = loop.draw()
        for index in (3, 2, 0):
            loop.complete(groups[index])
        if order == "chosen":
            assert loop.work()["choose"] == [groups[3], groups[2], groups[0]]
            loop.core.run("feed_choose", session=loop.driver, feed="f", pump="p1", group_ids=[groups[2], groups[3]])
        taken, number = loop.take()
        assert taken == [groups[index] for index in expected], order
        if order == "in_order":
            for rollout_id in list(loop.core.state.groups.by_id[groups[1]].places):
                loop.end(rollout_id, "failed")  # it fails, and the next one takes its position
            taken, number = loop.take()
            assert taken == [groups[0], groups[2]]
        loop.ack(number, 1)


def test_shares_hold_for_batches(make: Callable[..., Loop]) -> None:
    """In each batch, or over several; a stream that is over leaves its share to the others."""
    loop = make(streams=[["a", 3.0, 1000, "f"], ["b", 1.0, 5, "f"]], batch=2, max_lag=2, size=1)
    loop.publish()
    seen: list[str] = []
    for step in range(1, 20):
        loop.draw()
        loop.complete(*loop.feed.items)
        taken, number = loop.take()
        assert len(taken) == 2, step
        seen += [group_id.split("/")[1] for group_id in taken]
        loop.ack(number, step)
    assert [seen[i : i + 4].count("b") for i in range(0, 20, 4)] == [1] * 5 and "b" not in seen[20:]


# -- members that fail -------------------------------------------------------------------------------------------------


def test_what_fails_is_scored_masked_or_replaced(make: Callable[..., Loop]) -> None:
    """As the feed says, of what the policy has to answer for; the infrastructure's failures are replaced."""
    for on_failure in ("reward", "mask", "replace"):
        loop = make(on_failure=on_failure, failure_reward=0.0, size=3)
        loop.group = {"min_size": 2, "replace": 1}
        loop.publish()
        group = loop.core.state.groups.by_id[loop.draw()[0]]
        loop.claim()
        a, b, c = group.in_place
        loop.end(a, "failed")
        loop.end(b, "failed", "infra")
        loop.end(c)
        loop.claim()
        for rollout_id in group.in_place:
            if rollout_id in loop.keys:
                loop.end(rollout_id)
        assert group.status == "complete"
        counted = {"reward": 3, "mask": 2, "replace": 3}[on_failure]
        assert len(group.chosen) == counted and (a in group.chosen) == (on_failure == "reward")
        failed = loop.core.run("feed_items", feed="f", group_ids=[group.group_id])[0][9]
        assert failed == ([a] if on_failure == "reward" else [])


def test_a_group_that_is_all_masked_has_failed(make: Callable[..., Loop]) -> None:
    """It is not trained with less than its minimum."""
    loop = make(size=3)
    loop.group = {"min_size": 2}
    loop.publish()
    first, *_ = loop.draw()
    loop.claim()
    places = loop.core.state.groups.by_id[first].in_place
    for rollout_id in places:
        loop.end(rollout_id, "succeeded" if rollout_id == places[0] else "failed")
    assert loop.core.state.groups.by_id[first].status == "failed"
    assert loop.feed.streams[""].endings == {"failed": 1} and loop.work()["places"] == {"": 1}


def test_a_race_is_won_by_the_first(make: Callable[..., Loop]) -> None:
    """The others are cancelled."""
    loop = make(race=True, size=2)
    loop.group = {"spare": 2}
    loop.publish()
    group = loop.core.state.groups.by_id[loop.draw()[0]]
    loop.claim()
    spares = list(group.spares)
    for rollout_id in spares:
        loop.end(rollout_id)
    assert (group.status == "complete" and list(group.chosen) == spares[::-1]) or set(group.chosen) == set(spares)
    assert {loop.core.status(i) for i in group.members} == {"succeeded", "cancelled"}


def test_the_budget_for_failures_pauses_the_feed(make: Callable[..., Loop]) -> None:
    """The error names the commonest errors; what is queued keeps its place; `resume_feed` goes on."""
    loop = make(in_a_row=3, size=4)
    loop.publish()
    loop.draw()
    for rollout_id in loop.claim(3):
        loop.end(rollout_id, "failed")
    assert loop.claim() == []
    with pytest.raises(FailureBudgetError, match="3 rollouts failed in a row.*3 x 'agent_error'"):
        loop.take()
    loop.core.run("resume_feed", feed="f")
    assert loop.claim() != [] and loop.take() == ([], 0)


# -- judging -----------------------------------------------------------------------------------------------------------


def test_groups_are_judged_before_they_are_given(make: Callable[..., Loop]) -> None:
    """What does not pass makes room at once; too many in a row are told."""
    loop = make(judged=True, max_filtered=2, max_lag=2)
    loop.publish()
    groups = loop.draw()
    loop.complete(*groups)
    assert loop.take() == ([], 0) and loop.work()["judge"] == groups

    def judge(*verdicts: Any) -> None:
        loop.core.run("feed_judge", session=loop.driver, feed="f", pump="p1", verdicts=list(verdicts))

    judge([groups[0], "all rewards are equal", 10, []], [groups[1], None, 10, []])
    assert loop.core.state.groups.by_id[groups[0]].status == "filtered" and loop.work()["places"] == {"": 1}
    unusable = list(loop.core.state.groups.by_id[groups[2]].chosen)
    judge([groups[2], None, 10, unusable], [groups[3], None, 10, []])
    assert loop.core.state.groups.by_id[groups[2]].status == "failed"
    taken, number = loop.take()
    assert taken == [groups[1], groups[3]]
    loop.ack(number, 1)
    more = loop.draw()
    loop.complete(*more)
    judge(*([i, "flat", 1, []] for i in loop.work()["judge"][:3]))
    with pytest.raises(FilteredTooManyError, match="flat"):
        loop.take()


def test_a_batch_is_packed_by_tokens(make: Callable[..., Loop]) -> None:
    """It ends before it has more than so many, and has one group at least."""
    loop = make(judged=True, batch_tokens=25, batch=4)
    loop.publish()
    groups = loop.draw()
    loop.complete(*groups)
    verdicts: list[Any] = [[group_id, None, 10, []] for group_id in groups]
    loop.core.run("feed_judge", session=loop.driver, feed="f", pump="p1", verdicts=verdicts)
    assert loop.take()[0] == groups[:2]


# -- the end, and any history ------------------------------------------------------------------------------------------


def test_the_last_batch_is_smaller_and_then_the_feed_is_over(make: Callable[..., Loop]) -> None:
    """Whoever waits for another one learns so."""
    loop = make(3)
    loop.publish()
    groups = loop.draw()
    loop.complete(*groups)
    for step, expected in enumerate([groups[:2], groups[2:]], 1):
        assert not loop.work()["over"]
        taken, number = loop.take()
        assert taken == expected
        loop.ack(number, step)
    assert loop.work()["over"] and loop.take() == ([], 0)
    with pytest.raises(BatchConflictError):
        loop.ack(number, 1)


@pytest.mark.parametrize("late", ["wait", "train", "drop", "requeue"])
@pytest.mark.parametrize("order", ["oldest", "ready_first", "in_order"])
def test_any_history_trains_each_item_once(make_core: Callable[..., Core], late: str, order: str) -> None:
    """Whatever fails, is rewound, or dies: at the end each item has one ending, and all places are free."""
    for seed in range(4):
        _run(make_core(max_deliveries=2), Random(f"{seed}/{late}/{order}"), late, order)


def _run(core: Core, random: Random, late: str, order: str) -> None:
    streams = random.choice([[["", 1.0, 30, "f"]], [["a", 0.7, 20, "f"], ["b", 0.3, 10, "f"]]])
    loop = Loop(
        core, 30, streams=streams, late=late, order=order, max_lag=random.randrange(3), batch=random.randrange(1, 5),
        on_failure=random.choice(["mask", "reward", "replace"]), race=random.random() < 0.3,
        judged=random.random() < 0.5, max_running=random.choice([None, 3]),
    )  # fmt: skip
    loop.group = {"spare": random.choice([0, 2]), "replace": random.choice([0, 3])}
    step = durable = 0
    model: dict[str, int] = {}  # groups that were trained on, and in which step
    open_batch: tuple[list[str], int] | None = None
    loop.publish(0)
    for turn in range(4000):
        match random.randrange(9 if turn < 1500 else 6):
            case 0:
                loop.draw(random.randrange(1, 5))
            case 1:
                loop.claim(random.randrange(1, 6))
            case 2 | 3 if loop.keys:
                end = random.choices(["succeeded", "failed", "infra"], [9, 1, 1])[0]
                rollout_id = random.choice(list(loop.keys))
                if core.status(rollout_id) not in ("preparing", "running"):
                    del loop.keys[rollout_id]
                else:
                    loop.end(
                        rollout_id, "succeeded" if end == "succeeded" else "failed", end if end == "infra" else None
                    )
            case 4:
                work = loop.work()
                verdicts = [[i, random.choice([None, None, "flat"]), 5, []] for i in work["judge"]]
                if verdicts:
                    core.run("feed_judge", session=loop.driver, feed="f", pump=loop.pump, verdicts=verdicts)
            case 5:
                if open_batch is None:
                    taken, number = loop.take()
                    open_batch = (taken, number) if number else None
                else:
                    step += 1
                    loop.ack(open_batch[1], step)
                    assert not set(open_batch[0]) & model.keys()
                    trained = map(loop.item, open_batch[0])
                    lag = max((sum(item.lag or ()) for item in trained if not item.is_excused), default=0)
                    assert late == "train" or lag <= loop.rule["max_lag"]
                    model.update(dict.fromkeys(open_batch[0], step))
                    open_batch = None
                    loop.publish(step)
            case 6:
                durable = step
                core.run("checkpoint", session=loop.driver, consumer="f", at_step=step)
            case 7 if random.random() < 0.2:
                loop.rewind(durable)
                step, open_batch = durable, None
                model = {group_id: at for group_id, at in model.items() if at <= durable}
                loop.publish(step)
            case 8 if random.random() < 0.2:
                core.end(core.state.sessions[loop.runner.session_id])
                loop.runner, loop.keys = core.open(f"runner {turn}"), {}
        assert sum(not item.is_excused for item in loop.feed.items.values()) <= loop.feed.places
        if turn % 50 == 0:
            check(core.state)
            copy = State(core.state.settings)
            restore(copy, list(sections(core.state, {})), lambda chunk: chunk)
            assert digest(copy) == digest(core.state)
        if loop.feed.is_over and open_batch is None:
            break
    assert loop.feed.is_over, (late, order, loop.rule, core.run("feed_status", feed="f"))
    endings: dict[str, int] = {}
    for stream in loop.feed.streams.values():
        for name, count in stream.endings.items():
            endings[name] = endings.get(name, 0) + count
    assert sum(endings.values()) == 30 and endings.get("trained", 0) == len(model) and not loop.feed.items
