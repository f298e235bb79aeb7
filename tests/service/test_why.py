"""Why work does not go on: a prepared situation for each kind of constraint, which names it first; and many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from raystore.core import pauses
from raystore.core.findings import KINDS, Finding, found, lasting, plain
from raystore.core.state import Session
from raystore.core.training import GROUPS
from raystore.errors import (
    InvalidValueError,
    JournalFailedError,
    JournalFullError,
    ReadOnlyError,
    RolloutNotFoundError,
    StoreCorruptError,
)
from raystore.journal import failpoints
from raystore.journal.writer import FULL_SECONDS
from raystore.service.diagnosis import work
from raystore.service.diagnosis.known import Journal, Known
from raystore.service.diagnosis.why import why
from raystore.service.presence import Pools
from raystore.wire.codec import encode
from tests.conftest import MakeMemoryStore
from tests.core.conftest import Core
from tests.core.conftest import make_core as make_core  # a fixture
from tests.core.test_evaluations import Bench
from tests.core.test_feeds import Loop

MakeCore = Callable[..., Core]


class Scene:
    """A core, and what the process of its store knows; its default queue is served."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.pools = Pools()
        self.pools.asked("runner", ["default"])
        self.known: dict[str, Any] = {}
        self.runner: Session | None = None

    def loop(self, *args: Any, **rule: Any) -> Loop:
        """A feed that has published, and its runner and trainer."""
        loop = Loop(self.core, *args, **rule)
        self.runner = loop.runner
        loop.publish()
        return loop

    def session(self) -> Session:
        """The runner."""
        if self.runner is None:
            self.runner = self.core.open("runner")
        return self.runner

    def run_some(self, seconds: float = 2.0, count: int = 3) -> None:
        """Rollouts that took so long, so that a median is known."""
        for _ in range(count):
            self.core.enqueue()
        keys = self.core.hold(self.session(), limit=count)
        self.wait(seconds)
        for key in keys:
            self.core.finish(key, "succeeded", "ok", self.session())

    def wait(self, seconds: float) -> None:
        """Let time pass; no process falls silent."""
        while seconds > 0:
            for session in self.core.state.sessions.values():
                session.last_heard = self.core.now
            self.core.tick(min(seconds, 30.0))
            seconds -= 30.0

    def ask(self, **whose: Any) -> list[Finding]:
        """The answer now; every sentence is in one line, and says the next thing to do."""
        usual: dict[str, Any] = {"now": self.core.now, "age": self.core.now, "pools": self.pools}
        told = why(self.core.state, Known(**usual | self.known), **whose)
        for one in told:
            assert one.text.isprintable() and one.remedy.isprintable() and "{" not in one.remedy, one
            assert one.kind in KINDS and one.text[-1] in ".?", one
        return told


@pytest.fixture
def scene(make_core: MakeCore) -> Scene:
    """A store in which nothing has happened."""
    return Scene(make_core())


def kinds(told: list[Finding]) -> list[str]:
    return [one.kind for one in told]


def names(told: list[Finding], kind: str, *words: str) -> Finding:
    """The first finding, which must be of this kind, and say these words."""
    assert told, "nothing is found"
    first = told[0]
    assert first.kind == kind, told
    for word in words:
        assert word in first.text, first.text
    return first


# -- one constraint each -----------------------------------------------------------------------------------------------


def no_tasks(scene: Scene) -> None:
    scene.known["idle"] = 4
    names(scene.ask(), "no_tasks", "Nothing is queued and nothing runs; 4 calls wait for work")


def store_failed(scene: Scene) -> None:
    scene.core.enqueue()
    scene.known["failed"] = JournalFailedError("/j", "EIO")
    names(scene.ask(), "store_failed", "takes no changes any more", "EIO")


def journal_full(scene: Scene) -> None:
    scene.known["journal"] = Journal("/j", True, 0.0, 0)
    told = names(scene.ask(), "journal_full", "/j is full")
    assert "Free some space on the disk of /j" in told.remedy


def journal_slow(scene: Scene) -> None:
    scene.known["journal"] = Journal("/j", False, 0.5, 900)
    assert "journal_slow" not in kinds(scene.ask())
    scene.known["journal"] = Journal("/j", False, 4.2, 12_000)
    told = names(scene.ask(), "journal_slow", "for 4.2 s", "12,000 bytes")
    assert told.evidence == {"seconds": 4.2, "bytes": 12_000, "path": "/j"}


def memory_full(scene: Scene) -> None:
    core = Core(eviction_bytes=20_000, safe_bytes=10_000)
    scene.core = core
    driver, runner = core.open("driver"), scene.session()
    core.run("take", session=driver, consumer="slow", count=1)
    for number in range(8):
        core.enqueue()
        (key,) = core.hold(runner) or [("", "")]
        if not key[0]:
            break
        row = [1, f"s{number}", "t", None, "n", None, None, None, b"\x01" * 6_000, -1]
        core.run("add_spans", session=runner, rollout_id=key[0], attempt_id=key[1], spans=[row])
        core.finish(key, "succeeded", "ok", runner)
    assert core.state.memory_full
    told = names(scene.ask(), "memory_full", "no work is handed out", "consumer 'slow' awaits 3 rollouts and holds 0")
    assert told.evidence["consumer"] == "slow" and "forget_consumer" in told.remedy


def budget_spent(scene: Scene) -> None:
    loop = scene.loop(in_a_row=2)
    loop.draw()
    for rollout_id in loop.claim()[:2]:
        loop.core.finish((rollout_id, loop.keys[rollout_id]), "failed", "agent_error", loop.runner)
    told = names(scene.ask(), "budget_spent", "Feed 'f' is paused: 2 rollouts failed in a row", "2 x ")
    assert "feed.resume()" in told.remedy
    assert kinds(scene.ask(consumer="f"))[0] == "budget_spent"


def filtered_too_many(scene: Scene) -> None:
    loop = scene.loop(judged=True, max_filtered=1)
    loop.complete(*loop.draw())
    judged(loop, *[(i, "all are equal\x1b[2J") for i in list(loop.feed.items)[:2]])
    scene.known["asking"] = frozenset({"f"})
    names(scene.ask(), "filtered_too_many", "2 groups in a row were filtered", "all are equal\\x1b[2J")


def judged(loop: Loop, *verdicts: tuple[str, str | None]) -> None:
    rows: list[Any] = [(group_id, verdict, None, []) for group_id, verdict in verdicts]
    loop.core.run("feed_judge", session=loop.driver, feed="f", pump=loop.pump, verdicts=rows)


def paused(scene: Scene) -> None:
    person = scene.core.open("person")
    made = scene.core.enqueue()
    scene.core.run("pause_queues", session=person, queues=["default"], keep=True)
    scene.wait(90)
    told = names(
        scene.ask(), "paused", "Queue 'default' is paused by session 'person' for 90.0 s, until somebody resumes"
    )
    assert told.evidence["keep"] is True
    names(scene.ask(rollout_id=made), "paused")
    scene.core.run("resume_queues", session=person, queues=None, others=False)
    scene.core.run("pause_queues", session=scene.core.open("other"), queues=None, keep=False)
    names(scene.ask(), "paused", "All queues are paused by session 'other'", "until that session resumes or ends")


def limit_reached(scene: Scene) -> None:
    scene.core.run("limit_queue", queue="default", max_running=1, per_minute=None)
    scene.core.enqueue()
    scene.core.enqueue()
    scene.core.hold(scene.session(), limit=2)
    names(scene.ask(), "limit_reached", "Queue 'default' has reached max_running=1: 1 of its rollouts run")
    scene.core.run("limit_queue", queue="default", max_running=None, per_minute=1)
    scene.core.enqueue()
    scene.core.hold(scene.session())
    scene.wait(20)
    names(scene.ask(), "limit_reached", "has reached per_minute=1; it hands out again in 40.0 s")


def evaluated(scene: Scene, version: int | None = None) -> list[str]:
    """Begin an evaluation of two items, and enqueue them; their rollouts."""
    bench = Bench.__new__(Bench)
    bench.core = scene.core
    bench.start(version, resources_id="w", samples=1)
    return list(scene.core.state.evaluations.unfinished)


def evaluation_share(scene: Scene) -> None:
    others = [scene.core.enqueue() for _ in range(3)]
    first, second = evaluated(scene)
    held = [rollout_id for rollout_id, _ in scene.core.hold(scene.session(), limit=3)]
    assert first in held and others[0] in held
    said = f"Rollout {second} waits for its evaluation's share: 1 of 3 rollouts that run are of evaluations"
    told = names(scene.ask(rollout_id=second), "evaluation_share", said, "eval_share=0.25", "1 other waits")
    assert "a larger eval_share=" in told.remedy
    scene.core.hold(scene.session(), limit=1)  # nothing else waits now: it is only behind what runs
    assert "evaluation_share" not in kinds(scene.ask(rollout_id=second))


def evaluation_version_gone(scene: Scene) -> None:
    owner, made = scene.core.open("owner"), list[str]()
    for version in (7, 8):
        scene.core.run(
            "put_resources", session=owner, resources_id="w", resources=b"\x01w", policy_version=version,
            holds_objects=True, objects=[(None, 9)],
        )  # fmt: skip
        made = made or evaluated(scene, version)
    scene.core.end(owner)
    said = "Evaluation e@7 waits for version 7 of resources w, which cannot be had"
    told = names(scene.ask(), "evaluation_version_gone", said, "2 rollouts have not finished")
    assert "store.drop_evaluation('e')" in told.remedy
    names(scene.ask(rollout_id=made[0]), "evaluation_version_gone")


def pool_failed(scene: Scene) -> None:
    scene.pools = Pools()
    scene.pools.report("pool-1", "s", ["default"], 3, "Traceback ...\nConnectionError: no model\x07 server\n")
    scene.core.enqueue()
    told = names(
        scene.ask(), "pool_failed", "pool pool-1 fail before they are ready, 3 in a row", "no model\\x07 server"
    )
    assert told.evidence["failures"] == 3 and "Traceback" not in told.text


def unserved_queue(scene: Scene) -> None:
    made = scene.core.enqueue(queue="defautl")
    scene.pools.wait_in(["defautl"], scene.core.now)
    scene.wait(33)
    told = names(scene.ask(), "unserved_queue", "for 33.0 s", "did you mean 'default'?")
    assert "queues=['defautl']" in told.remedy
    names(scene.ask(rollout_id=made), "unserved_queue")


def resources_gone(scene: Scene) -> None:
    core = scene.core
    owner = core.open("owner")
    core.run(
        "put_resources", session=owner, resources_id="w", resources=b"\x01w", policy_version=7, holds_objects=True,
        objects=[(None, 9)],
    )  # fmt: skip
    made = core.enqueue(resources_id="w")
    core.end(owner)
    told = names(
        scene.ask(), "resources_gone", "Resources w version 1, policy version 7, cannot be had", "1 rollout waits"
    )
    assert "Publish 'w' again" in told.remedy
    names(scene.ask(rollout_id=made), "resources_gone")


def not_published(scene: Scene) -> None:
    loop = Loop(scene.core)
    names(scene.ask(), "not_published", "Nothing was published to feed 'f' yet")
    loop.publish(3)
    loop.draw()
    loop.rewind(3)
    told = names(scene.ask(), "not_published", "since its restore", "8 rollouts wait for that")
    assert "feed.publish(weights, version=step)" in told.remedy
    names(scene.ask(rollout_id=next(iter(scene.core.state.entries))), "not_published")
    names(scene.ask(group_id="f/0/0"), "not_published")


def runners_silent(scene: Scene) -> None:
    scene.core.enqueue()
    scene.known |= {"suspended": 2, "idle": 2}
    names(scene.ask(), "runners_silent", "2 processes must show first that they live")


def suspect_waits(scene: Scene) -> None:
    made = scene.core.enqueue()
    scene.core.hold(scene.session())
    scene.core.end(scene.session())
    scene.wait(4)
    names(scene.ask(), "suspect_waits", made, "was lost with its process 1 time", "for an idle runner for 4.0 s")
    names(scene.ask(rollout_id=made), "suspect_waits", made)


def backing_off(scene: Scene) -> None:
    rules = [["agent_error", 2, 30.0, 1.0, None, 0.0]]
    made = scene.core.enqueue(config=[None, None, 1, [], rules])
    (key,) = scene.core.hold(scene.session())
    changes = {"status": "failed", "outcome": "agent_error", "error": "ValueError: no\x1b[31m"}
    scene.core.run("finish", rollout_id=key[0], attempt_id=key[1], spans=[], changes=changes)
    scene.wait(10)
    names(scene.ask(), "backing_off", "1 of 1 rollouts in queue 'default' back off", "for another 20.0 s")
    names(scene.ask(rollout_id=made), "backing_off", made, "outcome agent_error (ValueError: no\\x1b[31m)")


def runners_busy(scene: Scene) -> None:
    scene.run_some()
    for _ in range(3):
        scene.core.enqueue()
    (key,) = scene.core.hold(scene.session())
    scene.wait(28)
    told = names(
        scene.ask(), "runners_busy", "2 rollouts wait in queue 'default'", key[0], "14 times the median of 2.0 s"
    )
    assert "concurrency=" in told.remedy


def runners_rest(scene: Scene) -> None:
    """As long as they say so; a heartbeat of long ago says nothing."""
    session = scene.session()
    for name in ("a", "b"):
        stats = encode({"resting": True}, "heartbeat_stats", 10**6)
        scene.core.run("update_worker", session=session, worker_id=name, changes={"heartbeat_stats": stats})
    scene.core.enqueue()
    told = names(scene.ask(), "runners_rest", "2 runners rest", "preempt= says that their nodes go away")
    assert "preempt=" in told.remedy
    scene.wait(3600)
    assert "runners_rest" not in kinds(scene.ask())


def no_pump(scene: Scene) -> None:
    loop = scene.loop()
    loop.complete(*loop.draw()[:1])
    loop.core.run("close_feed", feed="f", pump=loop.pump)
    told = names(scene.ask(), "no_pump", "Nobody draws the items of feed 'f'")
    assert "store.feed('f', ...)" in told.remedy


def not_drawn(scene: Scene) -> None:
    scene.loop()
    names(scene.ask(), "not_drawn", "4 places are free in feed 'f'")


def finished(scene: Scene, count: int = 1) -> None:
    """Rollouts that a consumer may take."""
    for _ in range(count):
        scene.core.enqueue()
    for key in scene.core.hold(scene.session(), limit=count):
        scene.core.finish(key, "succeeded", "ok", scene.session())


def batch_left(scene: Scene) -> None:
    finished(scene)
    trainer = scene.core.open("trainer")
    scene.core.run("take", session=trainer, consumer="t", count=1)
    scene.core.end(trainer)
    names(scene.ask(consumer="t"), "batch_left", "Batch 1 of 't' was held by a process that has ended")


def batch_held(scene: Scene) -> None:
    finished(scene)
    trainer = scene.core.open("trainer")
    items, number = scene.core.run("take", session=trainer, consumer="t", count=1)
    assert items and scene.core.acknowledge(trainer, [("t", number)]) == []
    scene.wait(12)
    told = names(scene.ask(consumer="t"), "batch_held", "batch 1 is held for 12.0 s by session 'trainer'")
    assert told.evidence["seconds"] == 12.0


def batch_ready(scene: Scene) -> None:
    scene.core.run("take", session=scene.core.open("trainer"), consumer="t", count=1)
    finished(scene, 2)
    names(scene.ask(consumer="t"), "batch_ready", "2 rollouts wait to be taken by consumer 't'")


def admission_closed(scene: Scene) -> None:
    loop = scene.loop()
    loop.complete(*loop.draw())
    _, number = loop.take()
    assert loop.core.acknowledge(loop.driver, [("f", number)]) == []
    scene.wait(312)
    scene.known["idle"] = 3
    told = names(
        scene.ask(), "admission_closed", "all 4 places are taken (max_lag=1: 2 batches of 2 groups under way)",
        "The trainer is the bottleneck: batch 1 is held for 312 s by session 'driver'", "2 more groups are complete",
        "3 calls wait for work",
    )  # fmt: skip
    assert told.evidence["batches"] == [1] and told.evidence["held_seconds"] == 312
    names(scene.ask(consumer="f"), "admission_closed")


def not_judged(scene: Scene) -> None:
    loop = scene.loop(judged=True)
    loop.complete(*loop.draw())
    scene.known["asking"] = frozenset({"f"})
    names(scene.ask(), "not_judged", "4 complete groups wait for the process of feed 'f'")


def group_waits(scene: Scene) -> None:
    scene.run_some()
    loop = scene.loop()
    groups = loop.draw()
    (slow, *others) = loop.claim()
    span = [1, "s", "t", None, "tool.search\x1b]0;", scene.core.now, scene.core.now + 8, None, b"\x01", -1]
    loop.core.run("add_spans", session=loop.runner, rollout_id=slow, attempt_id=loop.keys[slow], spans=[span])
    scene.wait(2)
    for rollout_id in others[:2]:
        loop.end(rollout_id)
    scene.wait(98)
    scene.known["asking"] = frozenset({"f"})
    said = (f"Group {groups[0]} has 1 of 2, and waits for rollout {slow}", "50 times the median of 2.0 s")
    told = names(scene.ask(), "group_waits", *said, "'tool.search\\x1b]0;', which ended 92.0 s ago")
    assert told.evidence["rollout_id"] == slow and told.evidence["median_seconds"] == 2.0
    assert told.evidence["span_seconds"] == 92.0
    names(scene.ask(consumer="f"), "group_waits", *said)
    names(scene.ask(group_id=groups[0]), "group_waits", *said)


def rollout_runs(scene: Scene) -> None:
    scene.run_some()
    made = scene.core.enqueue(config=[600.0, None, 1, []])
    scene.core.claim(scene.session(), worker_id="pool-w1")
    said = f"Rollout {made} has not ended: claimed 0.00 s ago, on worker pool-w1, of at most 600 s"
    names(scene.ask(rollout_id=made), "rollout_runs", said)
    scene.known["now"] = scene.core.now + 8
    names(scene.ask(rollout_id=made), "rollout_runs", "claimed 8.0 s ago, without a sign of life since, 4.0 times")


def all_claimed(scene: Scene) -> None:
    scene.run_some()
    made = [scene.core.enqueue() for _ in range(2)]
    scene.core.hold(scene.session(), limit=2)
    scene.wait(28)
    told = names(scene.ask(), "all_claimed", "2 rollouts run, the oldest of them " + made[0], "14 times the median")
    assert told.evidence["running"] == 2 and made[0] in told.remedy


def feed_over(scene: Scene) -> None:
    loop = scene.loop(2)
    loop.complete(*loop.draw())
    _, number = loop.take()
    names(scene.ask(), "feed_over", "its batch 1 is held")
    loop.ack(number, 1)
    names(scene.ask(), "feed_over", "has given out all its items (2 trained)")
    names(scene.ask(consumer="f"), "feed_over")


def nothing_fits(scene: Scene) -> None:
    trainer = scene.core.open("trainer")
    scene.core.enqueue()
    scene.core.run("take", session=trainer, consumer="t", count=1, timeout=60.0, queue="eval")
    scene.core.hold(scene.session())
    said = "Nothing that waits or runs would come to consumer 't', which takes rollouts of {'queue': 'eval'}"
    names(scene.ask(consumer="t"), "nothing_fits", said)


def rollout_finished(scene: Scene) -> None:
    made = scene.core.enqueue()
    (key,) = scene.core.hold(scene.session())
    changes = {"status": "failed", "outcome": "agent_error", "error": "Traceback\nKeyError: 'x'\x9b"}
    scene.core.run("finish", rollout_id=key[0], attempt_id=key[1], spans=[], changes=changes)
    scene.wait(7)
    names(scene.ask(rollout_id=made), "rollout_finished", "7.0 s ago: failed, after 1 attempt", "KeyError: 'x'\\x9b")


def group_ended(scene: Scene) -> None:
    loop = scene.loop()
    groups = loop.draw()
    loop.core.run("cancel_rollouts", rollout_ids=None, group_id=groups[0], tags=None)
    names(scene.ask(group_id=groups[0]), "group_ended", "it is cancelled")


SITUATIONS: list[Callable[[Scene], None]] = [
    no_tasks, store_failed, journal_full, journal_slow, memory_full, budget_spent, filtered_too_many, paused,
    evaluation_share, evaluation_version_gone,
    limit_reached, pool_failed, unserved_queue, resources_gone, not_published, runners_silent, suspect_waits,
    backing_off, runners_busy, runners_rest, no_pump, not_drawn, batch_left, batch_held, batch_ready, admission_closed,
    not_judged,
    group_waits, rollout_runs, all_claimed, feed_over, nothing_fits, rollout_finished, group_ended,
]  # fmt: skip

#: Kinds of what does not bind, which other tests are about.
REMARKS = {"pool_fails", "budget_low", "filtered_many", "read_only"}


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
def test_each_constraint_is_named_first(scene: Scene, situation: Callable[[Scene], None]) -> None:
    """With its evidence and its remedy."""
    situation(scene)


def test_there_is_a_situation_for_each_kind() -> None:
    """Also for one that is added."""
    assert {situation.__name__ for situation in SITUATIONS} | REMARKS == KINDS.keys()


# -- what may bind soon ------------------------------------------------------------------------------------------------


def test_what_may_bind_soon_comes_behind_what_binds(scene: Scene) -> None:
    """A failure budget of which 80 % is spent, filtered groups, a pool that fails beside one that works."""
    loop = scene.loop(in_a_row=5, share=0.5, window=100, max_filtered=5, judged=True)
    loop.complete(*loop.draw())
    judged(loop, *[(i, "equal") for i in list(loop.feed.items)[:3]])
    loop.draw()
    for rollout_id in loop.claim()[:4]:
        loop.core.finish((rollout_id, loop.keys[rollout_id]), "failed", "agent_error", loop.runner)
    scene.pools.report("pool-1", "s", ["default"], 2, "boom")
    told = scene.ask()
    assert {"pool_fails", "budget_low"} <= set(kinds(told)) and kinds(told)[0] not in REMARKS
    (low,) = [one for one in told if one.kind == "budget_low"]
    assert low.text.startswith(
        "80% of the failure budget of feed 'f' is spent: 4 rollouts failed in a row, of 5 that may"
    )
    assert "filtered_many" not in kinds(told)
    loop.complete(*list(loop.feed.items))
    judged(loop, *[(i, "equal") for i in list(loop.feed.items)])
    loop.feed.filtered = 4
    (many,) = [one for one in scene.ask() if one.kind == "filtered_many"]
    assert "4 groups of feed 'f' in a row were filtered, of 5 that may. The last one: equal" in many.text


def test_a_run_that_is_only_read_says_so_at_the_end(scene: Scene) -> None:
    """What was binding comes first; nobody knows who asked for work."""
    scene.core.enqueue(queue="q")
    scene.known |= {"failed": ReadOnlyError("/j"), "pools": None}
    told = scene.ask()
    assert kinds(told) == ["runners_busy", "read_only"] and "no runner asks for work" in told[0].text
    assert "rs.start(name, journal='/j')" in told[1].remedy


# -- many at once ------------------------------------------------------------------------------------------------------


def test_what_holds_up_most_comes_first(scene: Scene) -> None:
    """What stops the store before all; then the queue in which most waits; a pause before a want of runners."""
    core = scene.core
    for queue, count in (("default", 5), ("eval", 3), ("few", 1)):
        for _ in range(count):
            core.enqueue(queue=queue)
    scene.pools.wait_in(["eval", "few"], core.now)
    core.run("pause_queues", session=core.open("person"), queues=["eval"], keep=False)
    told = scene.ask()
    assert [(one.kind, one.evidence.get("queue")) for one in told] == [
        ("runners_busy", "default"), ("paused", "eval"), ("unserved_queue", "eval"), ("unserved_queue", "few"),
    ]  # fmt: skip
    core.run("pause_queues", session=core.open("other"), queues=None, keep=True)
    assert kinds(scene.ask())[:2] == ["paused", "paused"] and "All queues" in scene.ask()[0].text
    scene.known["journal"] = Journal("/j", True, 0.0, 0)
    assert kinds(scene.ask())[0] == "journal_full"


def test_what_ends_by_itself_is_a_remark_beside_what_runs(scene: Scene) -> None:
    """One rollout that backs off does not bind a run of which most is at work."""
    backing_off(scene)
    for _ in range(5):
        scene.core.enqueue()
    scene.core.hold(scene.session(), limit=5)
    told = kinds(scene.ask())
    assert told[0] == "all_claimed" and "backing_off" in told[1:]


def test_a_trainer_whose_batch_must_have_one_more_group_waits_for_that(scene: Scene) -> None:
    """Although others are complete and more could be claimed: it would be too late in the batch after that."""
    loop = scene.loop(late="wait")
    slow, *others = loop.draw()
    loop.complete(*others)
    _, number = loop.take()
    loop.ack(number, 1)
    loop.complete(*loop.draw())
    assert loop.take() == ([], 0)
    for _ in range(50):
        loop.core.enqueue()
    (first, second, *_) = loop.core.state.groups.by_id[slow].places
    loop.end(first)
    scene.wait(100)
    told = names(
        scene.ask(), "group_waits", "The next batch of feed 'f' has 3 of 2 groups, and must have one that",
        f"would otherwise lag more than 1. Group {slow} has 1 of 2, and waits for rollout {second}",
    )  # fmt: skip
    assert told.evidence["group_id"] == slow and kinds(scene.ask())[1] == "runners_busy"


def test_a_trainer_at_work_binds_only_while_runners_are_idle(scene: Scene) -> None:
    """Else both are busy, and that it admits nothing more is a remark."""
    loop = scene.loop()
    loop.complete(*loop.draw()[:2])
    _, number = loop.take()
    assert loop.core.acknowledge(loop.driver, [("f", number)]) == []
    told = scene.ask()
    assert kinds(told) == ["all_claimed", "admission_closed"] and "The trainer is at work" in told[1].text
    names(scene.ask(consumer="f"), "batch_held", "batch 1 is held")
    scene.known["idle"] = 1
    assert kinds(scene.ask()) == ["admission_closed", "all_claimed"]


def test_an_order_of_items_is_waited_for_in_the_same_way(scene: Scene) -> None:
    """The first item that is not there holds up those behind it."""
    loop = scene.loop(order="in_order")
    slow, *others = loop.draw()
    loop.complete(*others)
    names(scene.ask(consumer="f"), "group_waits", "must have one before these (order='in_order')", slow)


def test_a_queue_whose_name_and_session_are_odd_is_shown_plainly() -> None:
    """Escapes, line breaks, directions and halves of characters are spelt out."""
    assert plain("a\x1b[31m\r\nb\u202ec\ud800") == "a\\x1b[31m\\r\\nb\\u202ec\\ud800"
    told = found("unserved_queue", "text \x07", queue="q\x1b", seconds=1.0)
    assert told.text == "text \\x07." and told.evidence["queue"] == "q\\x1b" and "\x1b" not in told.remedy


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-3, "0.00 s"), (0.5, "0.50 s"), (9.96, "10.0 s"), (312, "312 s"), (7_200, "2.0 h"), (864_000, "10.0 days")],
)
def test_durations_are_short(seconds: float, shown: str) -> None:
    """Three digits or less, with a unit."""
    assert lasting(seconds) == shown


# -- a journal that is in trouble --------------------------------------------------------------------------------------


async def test_a_disk_that_is_full_is_named(
    make_memory_store: MakeMemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a store that goes on once there is space."""
    store = make_memory_store(journal=tmp_path / "j")
    monkeypatch.setitem(failpoints._actions, "writer.allocating", ("full", 0))
    with pytest.raises(JournalFullError):
        await store.enqueue_rollout("x" * 6_000_000)
    binding, *_ = await store.why()
    assert binding.kind == "journal_full" and str(tmp_path / "j") in binding.text
    monkeypatch.undo()
    await asyncio.sleep(FULL_SECONDS)
    await store.enqueue_rollout("x" * 6_000_000)
    assert (await store.why())[0].kind == "unserved_queue"


async def test_a_disk_that_is_slow_is_named(
    make_memory_store: MakeMemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer waits for it like any other."""
    store = make_memory_store(journal=tmp_path / "j")
    monkeypatch.setitem(failpoints._actions, "writer.gathered", ("sleep:2.0", 0))
    waiting = asyncio.ensure_future(store.enqueue_rollout("x"))
    await asyncio.sleep(1.3)
    binding, *_ = await store.why()
    assert binding.kind == "journal_slow" and 1.0 < binding.evidence["seconds"] < 3.0
    await waiting
    monkeypatch.undo()
    assert (await store.why())[0].kind == "unserved_queue"


async def test_a_store_that_has_failed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads go on, and why is one."""
    with rs.InMemoryLightningStore() as store:
        service: Any = store._service
        monkeypatch.setattr(service.state.queues, "tail", lambda priority: 1 / 0)
        with pytest.raises(StoreCorruptError):
            await store.enqueue_rollout("x")
        binding, *_ = await store.why()
        assert binding.kind == "store_failed" and "ZeroDivisionError" in binding.text


# -- questions that have no answer -------------------------------------------------------------------------------------


def test_what_is_unknown_is_an_error(scene: Scene) -> None:
    """It names the value, and what there is."""
    finished(scene)
    scene.core.run("take", session=scene.core.open("trainer"), consumer="train", count=1)
    scene.core.enqueue(group_id="carried")
    with pytest.raises(RolloutNotFoundError, match="nope"):
        scene.ask(rollout_id="nope")
    with pytest.raises(InvalidValueError, match="group_id='nope'.*the id of a group of this store"):
        scene.ask(group_id="nope")
    with pytest.raises(InvalidValueError, match="1 rollout only carry this group_id"):
        scene.ask(group_id="carried")
    with pytest.raises(InvalidValueError, match="consumer='trian'.*there are 'train'; did you mean 'train'"):
        scene.ask(consumer="trian")
    with pytest.raises(InvalidValueError, match="group_id='g'.*None, since rollout_id is given"):
        scene.ask(rollout_id="r", group_id="g")


# -- what it costs -----------------------------------------------------------------------------------------------------


class Counting(dict[Any, Any]):
    """A table that counts how many of its records are looked at."""

    looks = 0

    def __getitem__(self, key: Any) -> Any:
        Counting.looks += 1
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        Counting.looks += 1
        return super().get(key, default)

    def __iter__(self) -> Iterator[Any]:
        for key in super().__iter__():
            Counting.looks += 1
            yield key

    def values(self) -> Any:
        return [self[key] for key in self]

    def items(self) -> Any:
        return [(key, self[key]) for key in self]


def test_a_thousand_queues_are_answered_with_some_sentences(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are made for those that are told, whatever the queues wait for."""
    core, made = scene.core, {"input": b"\x01x", "metadata": None}
    for kind in ("served", "not", "paused", "limited"):
        names = [f"{kind}-{n}" for n in range(500)]
        core.run("enqueue", requests=[made | {"queue": name} for name in names for _ in range(2)])
        if kind == "not":
            scene.pools.wait_in(names, core.now)
        else:
            scene.pools.asked("runner", names)
        if kind == "paused":
            core.run("pause_queues", session=core.open("person"), queues=names, keep=True)
            core.run("pause_queues", session=core.open("other"), queues=None, keep=True)
    told: list[str] = []

    def counted(kind: str, *rest: Any, **more: Any) -> Finding:
        told.append(kind)
        return found(kind, *rest, **more)

    monkeypatch.setattr(work, "found", counted)
    monkeypatch.setattr(pauses, "found", counted)
    answer = scene.ask()
    assert answer[0].text.startswith("All queues are paused") and len(told) < 50, told
    assert {one.kind for one in answer} == {"paused", "unserved_queue"}


def test_a_large_store_is_answered_by_looking_at_little() -> None:
    """100,000 rollouts: finished, running, queued, in groups; each question looks at some hundred records."""
    core = Core()
    scene = Scene(core)
    made = {"input": b"\x01x", "metadata": None}
    core.run("enqueue", requests=[dict(made) for _ in range(30_000)])
    for _ in range(30):
        keys = core.hold(scene.session(), limit=1_000)
        for key in keys[:990]:
            core.finish(key, "succeeded", "ok", scene.session())
    core.run("enqueue", requests=[made | {"queue": f"q{n % 300}"} for n in range(40_000)])
    core.run(
        "enqueue_groups",
        groups=[{"member": dict(made), "n": 8, "group_id": f"g{n}"} for n in range(3_750)],
        gives="groups",
    )
    assert len(core.state.entries) == 100_000
    trainer = core.open("trainer")
    core.run("take_groups", session=trainer, consumer="g", count=4, timeout=9.0)
    core.run("take", session=trainer, consumer="r", count=4)
    scene.pools.wait_in([f"q{n}" for n in range(300)], core.now)
    scene.known["asking"] = frozenset({"g"})
    core.state.entries = Counting(core.state.entries)
    core.state.groups.by_id = Counting(core.state.groups.by_id)
    core.state.queues.line_of = Counting(core.state.queues.line_of)
    first = next(iter(core.state.queues.line_of))
    for whose in ({}, {"rollout_id": first}, {"group_id": "g7"}, {"consumer": "g"}, {"consumer": "r"}):
        Counting.looks = 0
        assert scene.ask(**whose)
        assert Counting.looks < 1_500, (whose, Counting.looks)
    assert core.state.consumers["g"].takes == GROUPS


@pytest.mark.parametrize(
    ("stats", "said"),
    [
        ({"places": [{"rollout_id": "other", "span": "x", "span_since": 1.0},
                     {"rollout_id": "mine", "span": "tool.search\x1b[2J", "span_since": 1030.0}]},
         r"in span 'tool.search\x1b[2J' for 92.0 s"),
        ({"places": [{"rollout_id": "mine", "span": None, "span_since": None}]}, "on worker w"),
        ({"places": "none"}, "on worker w"),
        (None, "on worker w"),
    ],
)  # fmt: skip
def test_the_open_span_of_a_runner_is_named(make_core: MakeCore, stats: Any, said: str) -> None:
    """As its last heartbeat says; whatever else a heartbeat holds, the store does not stumble over it."""
    core = make_core()
    session = core.open("runner")
    core.enqueue(rollout_id="mine")
    core.run("dequeue", session=session, queues=["default"], limit=1, worker_id="w")
    core.run("update_worker", session=session, worker_id="w", changes={"heartbeat_stats": encode(stats, "s", 10**6)})
    core.now = 1122.0
    first = why(core.state, Known(core.now, core.now), rollout_id="mine")[0]
    assert said in first.text and "\x1b" not in first.text


@pytest.mark.parametrize("data", [b"\x01", b"\x01body", b"\x80\x05garbage", b"\x01\xd4\x07x", None])
def test_bytes_that_are_no_value_say_nothing(make_core: MakeCore, data: bytes | None) -> None:
    """The store never unpickles, and a peer may have sent anything."""
    core = make_core()
    session = core.open("runner")
    core.enqueue(rollout_id="mine")
    core.run("dequeue", session=session, queues=["default"], limit=1, worker_id="w")
    core.run("update_worker", session=session, worker_id="w", changes={"heartbeat_stats": data})
    assert why(core.state, Known(core.now, core.now), rollout_id="mine")[0].kind
