"""Retry rules, backoffs, and requeuing by hand in the core."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raystore.core import check, expiry, retries
from raystore.core.records import Config, RetryRule
from raystore.core.retries import REQUEUED, delay_before
from raystore.core.schema import MAX_BACKOFF_SECONDS
from raystore.core.snapshot import digest, parts
from raystore.core.state import CLAIM_SECONDS, State
from raystore.core.verbs import STEPS
from raystore.errors import InvalidValueError, OverloadedError, RolloutNotFoundError, RolloutSucceededError
from raystore.journal import snapshot_file
from raystore.journal.format import FileHead
from tests.core.conftest import Core
from tests.core.test_groups import at_work
from tests.core.test_groups import enqueue as enqueue_group
from tests.core.test_publishing import hold_back, publish


def rule(outcome: str, max_retries: int, seconds: float = 10.0, **more: Any) -> list[Any]:
    """A rule without jitter as it travels."""
    given = {"factor": 2.0, "longest": None, "jitter": 0.0, **more}
    return [outcome, max_retries, seconds, *given.values()]


def ruled(*rules: list[Any], usual: Any = (None, None, 1, [])) -> list[Any]:
    """A configuration with rules."""
    return [*usual, list(rules)]


def attempt(core: Core, status: str = "failed", outcome: str = "agent_error") -> tuple[str, str]:
    """The next rollout is claimed, and its attempt ends so."""
    known = core.state.sessions.get("runner")
    (key,) = core.hold(core.open("runner") if known is None or known.ended_at is not None else known)
    core.finish(key, status, outcome)
    return key


def places(core: Core) -> list[str]:
    """What waits, in the order of the queue, whether it may be handed out or not."""
    return sorted(core.state.queues, key=lambda rollout_id: core.state.entries[rollout_id].order or (0, 0))


def kinds(core: Core, rollout_id: str) -> list[str]:
    return [change.kind for change in core.state.changes.of(rollout_id)]


# -- rules -------------------------------------------------------------------------------------------------------------


def test_delays_grow_up_to_the_longest() -> None:
    """Each is `factor` times the one before; chance only shortens it."""
    one = RetryRule("timeout", 9, 2.0, 3.0, 50.0, 0.5)
    assert [delay_before(one, number, 0.0) for number in range(1, 6)] == [2.0, 6.0, 18.0, 50.0, 50.0]
    assert delay_before(one, 2, 1.0) == 3.0
    endless = RetryRule("timeout", 1_000, 1.0, 1_000.0, None, 0.0)
    assert delay_before(endless, 1_000, 0.0) == MAX_BACKOFF_SECONDS
    assert delay_before(RetryRule("timeout", 1_000, 0.0, 2.0, None, 1.0), 1_000, 0.9) == 0.0


def test_what_backs_off_keeps_its_place_and_is_passed_over(core: Core) -> None:
    """It is "requeuing" and counts as waiting; when its time has come it stands before what came later."""
    first = core.enqueue("1", config=ruled(rule("agent_error", 2)))
    attempt(core)
    second = core.enqueue("2")
    runner = core.state.sessions["runner"]
    assert (core.status(first), places(core)) == ("requeuing", [first, second])
    assert [key[0] for key in core.hold(runner, limit=5)] == [second]
    core.tick(10.0)
    assert core.claim(runner) == []  # deadlines are strict
    third = core.enqueue("3")
    core.state.take_effects()
    core.tick(0.1)
    assert "default" in core.state.effects.queues  # so that whoever waits is looked at
    assert [key[0] for key in core.claim(runner, limit=5)] == [first, third]
    assert kinds(core, first) == ["enqueued", "claimed", "requeuing", "backs_off", "backoff_over", "claimed"]


def test_a_rule_bounds_the_attempts_with_its_outcome(core: Core) -> None:
    """After `max_retries` of them the rollout fails; the delays double meanwhile."""
    made = core.enqueue(config=ruled(rule("agent_error", 2)))
    attempt(core)
    core.tick(10.1)
    attempt(core)
    core.tick(10.1)
    assert core.claim(core.state.sessions["runner"]) == []
    core.tick(10.1)
    attempt(core)
    assert (core.status(made), len(core.outcomes(made))) == ("failed", 3)
    seconds = [
        change.detail["seconds"] for change in core.state.changes if change.kind == "backs_off" and change.detail
    ]
    assert seconds == [10.0, 20.0]


def test_a_rule_without_retries_goes_before_the_retry_condition(core: Core) -> None:
    """Of an outcome that it speaks of; of the others the contract's fields decide as ever."""
    usual = (5.0, None, 3, ["failed", "timeout"])
    made = core.enqueue(config=ruled(rule("timeout", 0), usual=usual))
    attempt(core)
    assert core.status(made) == "requeuing" and not core.state.queues.backing_off
    core.hold(core.state.sessions["runner"])
    core.tick(5.1)
    assert (core.status(made), core.outcomes(made)) == ("failed", ["agent_error", "timeout"])


def test_each_outcome_has_an_allowance_of_its_own(core: Core) -> None:
    """What a rule decides does not use up `max_attempts`, nor the allowance of another rule."""
    usual = (5.0, None, 2, ["failed"])
    made = core.enqueue(config=ruled(rule("timeout", 1, 0.0), rule("unresponsive", 1, 0.0), usual=usual))
    for status, outcome, after in [
        ("timeout", "timeout", "requeuing"), ("unresponsive", "unresponsive", "requeuing"),
        ("failed", "agent_error", "requeuing"), ("failed", "agent_error", "failed"),
    ]:  # fmt: skip
        attempt(core, status, outcome)
        assert core.status(made) == after
    assert core.state.queues.backing_off == []  # delays of 0 seconds are none


def test_a_rule_for_aborts_stands_in_for_max_deliveries(make_core: Callable[..., Core]) -> None:
    """In both directions; and aborts do not use up the deliveries of losses."""
    core = make_core(max_deliveries=2)
    many = core.enqueue("1", config=ruled(rule("infra", 4, 0.0)))
    for _ in range(4):
        attempt(core, outcome="infra")
        assert core.status(many) == "requeuing"
    lost = core.open("dying")
    core.hold(lost)
    core.end(lost)
    assert core.status(many) == "requeuing"  # one delivery of two
    core.hold(core.open("idle"))
    none = core.enqueue("2", config=ruled(rule("infra", 0)))
    attempt(core, outcome="infra")
    assert core.status(none) == "failed"


def test_a_rule_for_losses_counts_those_that_are_to_blame(make_core: Callable[..., Core]) -> None:
    """What was lost beside another one that is to blame is not charged, and backs off all the same."""
    core = make_core(max_deliveries=1)
    poison = core.enqueue("poison", config=ruled(rule("runner_lost", 2)))
    for number in range(3):
        assert core.status(poison) in ("queuing", "requeuing")
        session = core.open(f"s{number}")
        core.hold(session)
        core.end(session)
        core.tick(60)
    assert (core.status(poison), core.state.entries[poison].deliveries) == ("failed", 3)
    innocent = [core.enqueue(str(number), config=ruled(rule("runner_lost", 0))) for number in range(2)]
    session = core.open("both")
    core.hold(session, limit=2)
    core.end(session)
    assert [core.status(rollout_id) for rollout_id in innocent] == ["requeuing"] * 2
    assert set(core.state.queues.backing_off) == set(innocent) and not core.state.suspects
    core.tick(10.1)
    assert set(core.state.suspects) == set(innocent)  # then they wait aside, as ever


def test_chance_is_of_the_step(core: Core) -> None:
    """Two that fail in one step come at different times, and a replay of the step finds the same ones."""
    one, other = core.step(), core.step()
    one.seed = other.seed = 7
    drawn = [one.chance("a"), one.chance("b")]
    assert drawn == [other.chance("a"), other.chance("b")] and drawn[0] != drawn[1]
    assert all(0 <= number < 1 for number in drawn)
    for task in "ab":
        core.enqueue(task, config=ruled(rule("unresponsive", 1, jitter=1.0), usual=(None, 3.0, 1, [])))
    core.hold(core.open("runner"), limit=2)
    core.tick(3.1)
    ends = core.state.queues.backoffs("default", 9)
    assert len(set(ends)) == 2 and all(core.now <= until <= core.now + 10 for until in ends)


def test_the_default_configuration_may_have_rules(make_core: Callable[..., Core]) -> None:
    """As any other."""
    core = make_core(default_config=Config.of(ruled(rule("timeout", 1), usual=(5.0, None, 1, []))))
    made = core.enqueue()
    core.hold(core.open("runner"))
    core.tick(5.1)
    assert core.status(made) == "requeuing" and core.state.queues.backing_off == [made]


def test_a_report_that_comes_twice_is_one_retry(core: Core) -> None:
    """Its delay stays what it was."""
    made = core.enqueue(config=ruled(rule("agent_error", 1)))
    key = attempt(core)
    until = core.state.queues.backs_off_until(made)
    core.tick(2)
    core.report(key, "failed")
    assert (core.status(made), core.state.queues.backs_off_until(made)) == ("requeuing", until)
    core.report(key, "succeeded")  # late, and it wins
    assert (core.status(made), core.state.queues.backing_off) == ("succeeded", [])


# -- what else happens to a rollout that backs off ---------------------------------------------------------------------


@pytest.fixture
def backing_off(core: Core) -> tuple[str, str]:
    """A rollout that backs off after its attempt was silent."""
    core.enqueue("first", config=ruled(rule("unresponsive", 1, 100.0), usual=(None, 3.0, 1, [])))
    (key,) = core.hold(core.open("runner"))
    core.tick(3.1)
    assert core.state.queues.backing_off == [key[0]]
    return key


def test_cancelled_or_deleted_it_is_gone_from_the_queue(core: Core, backing_off: tuple[str, str]) -> None:
    """And nothing comes of its time."""
    core.run("cancel_rollouts", rollout_ids=[backing_off[0]], group_id=None, tags=None)
    assert (core.status(backing_off[0]), len(core.state.queues)) == ("cancelled", 0)
    core.tick(200)
    assert core.status(backing_off[0]) == "cancelled"
    other = core.enqueue("other", config=ruled(rule("agent_error", 1)))
    attempt(core)
    core.run("delete_rollouts", rollout_ids=[other])
    core.tick(200)
    assert not core.state.queues and not core.state.queues.backing_off


def test_started_by_hand_it_runs(core: Core, backing_off: tuple[str, str]) -> None:
    """Whoever starts an attempt asks for it now."""
    core.run("start_attempt", session=core.state.sessions["runner"], rollout_id=backing_off[0], worker_id=None)
    assert (core.status(backing_off[0]), core.state.queues.backing_off) == ("preparing", [])
    core.tick(3.1)
    assert core.status(backing_off[0]) == "failed"


@pytest.mark.parametrize("status", ["queuing", "requeuing"])
def test_queued_by_hand_it_is_offered_at_once(core: Core, backing_off: tuple[str, str], status: str) -> None:
    """At the place that it kept."""
    later = core.enqueue("later")
    core.state.take_effects()
    core.run("update_rollout", rollout_id=backing_off[0], changes={"status": status})
    assert "default" in core.state.effects.queues and not core.state.queues.backing_off
    assert [key[0] for key in core.claim(core.state.sessions["runner"], limit=5)] == [backing_off[0], later]


def test_what_was_queued_by_hand_does_not_back_off(core: Core) -> None:
    """It is wanted, and stays in line when the attempt that still ran fails."""
    made = core.enqueue(config=ruled(rule("agent_error", 1)))
    (key,) = core.hold(core.open("runner"))
    core.run("update_rollout", rollout_id=made, changes={"status": "queuing"})
    core.report(key, "failed")
    assert (core.status(made), core.state.queues.backing_off) == ("requeuing", [])
    assert "backs_off" not in kinds(core, made)
    assert [key[0] for key in core.claim(core.state.sessions["runner"])] == [made]


def test_other_fields_set_by_hand_leave_it_backing_off(core: Core, backing_off: tuple[str, str]) -> None:
    """Also another configuration: the delay was drawn when the attempt ended."""
    until = core.state.queues.backs_off_until(backing_off[0])
    changes: dict[str, Any] = {"config": [None, None, 1, []], "resources_id": "other", "mode": "val"}
    core.run("update_rollout", rollout_id=backing_off[0], changes=changes)
    assert core.state.queues.backs_off_until(backing_off[0]) == until


def test_requeued_by_hand_it_is_left_alone(core: Core, backing_off: tuple[str, str]) -> None:
    """It has not finished, and waits already."""
    before = list(parts(core.state))
    ((rollout, _),) = core.run("requeue", rollout_ids=[backing_off[0]])
    assert (rollout.rollout_id, list(parts(core.state))) == (backing_off[0], before)


def test_a_late_span_brings_its_attempt_back(core: Core, backing_off: tuple[str, str]) -> None:
    """The runner only looked dead: there is nothing to try again."""
    row = [-1, "s", "t", None, "n", None, None, None, b"\x01", -1]
    core.run("add_spans", rollout_id=backing_off[0], attempt_id=backing_off[1], spans=[row])
    assert (core.status(backing_off[0]), core.state.queues.backing_off) == ("running", [])


def test_resources_that_are_missing_meanwhile_are_asked_for_afterwards(core: Core) -> None:
    """A rollout waits for one thing after the other, and its group's deadline rests for the second only."""
    driver = core.open("driver")
    publish(core, driver)
    group = enqueue_group(core, 1, member={"config": ruled(rule("agent_error", 1))}, deadline_seconds=500.0)
    (made,) = group.members
    attempt(core)
    hold_back(core)
    assert core.state.queues.backing_off == [made] and not core.state.queues.held_counts()
    assert not group.held
    check.check(core.state)
    core.tick(10.1)
    assert core.state.queues.held_counts() == {"w": 1} and not core.state.queues.backing_off
    assert list(group.held) == [made]  # so that the deadline rests
    publish(core, driver)
    assert [key[0] for key in core.claim(core.state.sessions["runner"])] == [made]
    assert not group.held


def test_it_counts_as_queued_and_is_told_of(make_core: Callable[..., Core]) -> None:
    """In `max_queued`, in the statistics, and in its story."""
    core = make_core(max_queued=1)
    made = core.enqueue(config=ruled(rule("agent_error", 1)), queue="q")
    (key,) = [
        (rollout.rollout_id, tried.attempt_id)
        for rollout, tried, _ in core.run("dequeue", session=core.open("runner"), queues=["q"], limit=1, worker_id=None)
    ]
    core.finish(key, "failed", "agent_error")
    with pytest.raises(OverloadedError):
        core.enqueue("another")
    counted = check.counts(core.state)
    assert (counted["backing_off"], counted["backing_off_by_queue"]) == (1, {"q": 1})
    assert counted["queue_lengths"] == {"q": 1} and not counted["held_back"]
    (told,) = retries.why_it_backs_off(core.state, core.state.entries[made], core.now)
    assert told.text.startswith(f"Rollout {made} backs off for another 10.0 s after attempt 1 ended")


def test_a_store_that_stood_still_moves_the_end(core: Core, backing_off: tuple[str, str]) -> None:
    """As all deadlines."""
    core.now += 500.0
    STEPS["pause"](core.state, core.step(), 500.0)
    core.tick(0)
    assert core.state.queues.backing_off == [backing_off[0]]
    core.tick(100.1)
    assert not core.state.queues.backing_off


def test_it_survives_a_snapshot_and_another_process(core: Core, backing_off: tuple[str, str], tmp_path: Path) -> None:
    """The state is the same, the time goes on, and is met."""
    path = tmp_path / "snapshot"
    snapshot_file.write(path, FileHead("s", 1, 1, 1, more={}), core.state, None, {})
    found = State(core.state.settings)
    snapshot_file.read(path, found)
    assert digest(found) == digest(core.state)
    found.gather()
    expiry.resume(found, core.step(), 0.0)
    check.check(found)
    core.state = found
    core.tick(99)
    assert found.queues.backing_off == [backing_off[0]]
    core.tick(2)
    assert not found.queues.backing_off and core.status(backing_off[0]) == "requeuing"
    check.check(found)


# -- requeuing by hand -------------------------------------------------------------------------------------------------


def requeue(core: Core, *rollout_ids: str) -> list[str]:
    """Requeue rollouts; those that stand for them now."""
    return [rollout.rollout_id for rollout, _ in core.run("requeue", rollout_ids=list(rollout_ids))]


def failed(core: Core, task: str = "x", **request: Any) -> str:
    """A rollout that has failed."""
    made = core.enqueue(task, **request)
    assert attempt(core)[0] == made
    assert core.status(made) == "failed"
    return made


def consumed(core: Core, *rollout_ids: str) -> None:
    """A consumer trains on these rollouts, which are all that it is given."""
    trainer = core.state.sessions.get("trainer") or core.open("trainer")
    pairs, number = core.run("take", session=trainer, consumer="c", count=99, status_in=["failed", "succeeded"])
    assert {rollout.rollout_id for rollout, _ in pairs} == set(rollout_ids)
    core.run("ack", session=trainer, consumer="c", batch=number, at_step=number, note=None)


def test_a_requeued_rollout_has_its_allowances_anew(core: Core) -> None:
    """It waits at the tail, with the attempts that it has; and may be tried as often as before."""
    made = core.enqueue(config=[None, None, 2, ["failed"]])
    for _ in range(2):
        attempt(core)
    assert core.status(made) == "failed"
    other = core.enqueue("other")
    assert requeue(core, made) == [made]
    entry = core.state.entries[made]
    assert (core.status(made), entry.rollout.end_time, places(core)) == ("requeuing", None, [other, made])
    assert made not in core.state.completions and kinds(core, made)[-1] == "requeued"
    core.hold(core.state.sessions["runner"])
    for after in ("requeuing", "failed"):
        attempt(core)
        assert core.status(made) == after
    assert [one.sequence_id for one in entry.attempts] == [1, 2, 3, 4]


def test_deliveries_suspicion_and_rules_start_anew(make_core: Callable[..., Core]) -> None:
    """Whatever has used them up."""
    core = make_core(max_deliveries=1)
    made = core.enqueue(config=ruled(rule("agent_error", 1, 0.0)))
    session = core.open("dying")
    core.hold(session)
    core.end(session)
    entry = core.state.entries[made]
    assert (core.status(made), entry.suspect, entry.deliveries) == ("failed", True, 1)
    for _ in range(2):
        requeue(core, made)
        assert (entry.suspect, entry.deliveries, entry.losses, entry.withdrawals) == (False, 0, 0, 0)
        attempt(core)
        assert core.status(made) == "requeuing"
        attempt(core)
        assert core.status(made) == "failed"


def test_a_repeated_call_changes_nothing(core: Core) -> None:
    """Nor does one for a rollout that waits or runs, or that is named twice."""
    made, running = failed(core), core.enqueue("running")
    core.hold(core.state.sessions["runner"])
    waiting = core.enqueue("waiting")
    assert requeue(core, made, running, made, waiting) == [made, running, made, waiting]
    before = list(parts(core.state))
    assert requeue(core, made, running, waiting) == [made, running, waiting]
    assert list(parts(core.state)) == before


def test_all_of_them_or_none(make_core: Callable[..., Core]) -> None:
    """An unknown id, one that has succeeded, or too many that would wait."""
    core = make_core(max_queued=2)
    made, done = failed(core), core.enqueue("done")
    core.report(core.hold(core.state.sessions["runner"])[0], "succeeded")
    others = [failed(core, task) for task in "ab"]
    before = list(parts(core.state))
    with pytest.raises(RolloutNotFoundError, match="ro-gone") as gone:
        requeue(core, made, "ro-gone", "ro-away")
    assert (gone.value.rollout_id, gone.value.others) == ("ro-gone", ("ro-away",))
    with pytest.raises(RolloutSucceededError, match=rf"{done} has succeeded.*enqueue_rollout"):
        requeue(core, made, done)
    with pytest.raises(OverloadedError) as full:
        requeue(core, made, *others, made)
    assert (full.value.bound, full.value.asked) == (2, 3)
    with pytest.raises(InvalidValueError, match="at most 10,000 ids"):
        requeue(core, *["ro-gone"] * (REQUEUED + 1))
    assert list(parts(core.state)) == before
    assert requeue(core, made, others[0], made) == [made, others[0], made]


def test_a_cancelled_rollout_is_requeued(core: Core) -> None:
    """Also one that was never tried. It is cancelled no more: it follows its attempts again."""
    made = core.enqueue()
    core.run("cancel_rollouts", rollout_ids=[made], group_id=None, tags=None)
    assert requeue(core, made) == [made]
    attempt(core, "succeeded", "ok")
    assert core.status(made) == "succeeded"


def test_a_late_failure_does_not_end_it_and_a_late_success_does(core: Core) -> None:
    """Of an attempt that was given up before: its failure is old news."""
    made = core.enqueue(config=[5.0, None, 1, []])
    (key,) = core.hold(core.open("runner"))
    core.tick(5.1)
    requeue(core, made)
    core.report(key, "failed")
    assert core.status(made) == "requeuing"
    core.report(key, "succeeded")
    assert core.status(made) == "succeeded"


def test_a_claim_that_is_taken_back_is_no_attempt_that_was_forgiven(core: Core) -> None:
    """The rollout was failed by hand and requeued while nobody had acknowledged its claim."""
    made = core.enqueue(config=[None, None, 1, []])
    core.claim(core.open("silent"))
    core.run("update_rollout", rollout_id=made, changes={"status": "failed"})
    requeue(core, made)
    assert core.state.entries[made].forgiven == 1
    core.tick(CLAIM_SECONDS + 0.1)
    assert core.state.entries[made].forgiven == 0
    attempt(core)
    assert core.status(made) == "failed"


def test_what_was_released_is_needed_again(make_core: Callable[..., Core]) -> None:
    """A rollout that nobody needed is not deleted for its age once it has run again."""
    core = make_core(retention_seconds=10.0)
    made = failed(core)
    core.run("release", rollout_ids=[made])
    requeue(core, made)
    attempt(core)
    core.tick(60)
    assert core.status(made) == "failed"


# -- what cannot change any more ---------------------------------------------------------------------------------------


def test_for_a_sealed_rollout_a_new_one_is_made(core: Core) -> None:
    """With the same content, at the tail of the same queue; the old one stays as the consumer took it."""
    config = ruled(rule("timeout", 1), usual=(7.0, None, 1, []))
    given = {"mode": "train", "priority": 2, "tags": {"k": 1}, "group_id": "label", "resources_id": "r"}
    old = failed(core, "task", config=config, rollout_id="mine", **given)
    consumed(core, old)
    before = core.state.entries[old].rollout
    (made,) = requeue(core, old)
    assert made != old and core.state.entries[old].rollout is before
    rollout = core.state.entries[made].rollout
    assert rollout == before.evolve(
        rollout_id=made, start_time=core.now, end_time=None, status="queuing", requeued_from=old
    )
    assert (kinds(core, old)[-1], kinds(core, made)) == ("requeued", ["enqueued"])
    assert f"requeued from {old}" in check.story(core.state, made)
    assert f"requeued as {made}" in check.story(core.state, old)
    assert core.state.entries[made].charged == 0 and not core.state.entries[made].is_sealed


def test_one_successor_stands_for_a_sealed_rollout(core: Core) -> None:
    """As long as it has not finished; if it fails, it is what is requeued, and once it has succeeded all is done."""
    old = failed(core)
    consumed(core, old)
    (made,) = requeue(core, old)
    assert requeue(core, old, made, old) == [made] * 3
    assert len(core.state.entries) == 2
    attempt(core)
    assert core.status(made) == "failed"
    assert requeue(core, old, made) == [made, made] and len(core.state.queues) == 1
    attempt(core)
    consumed(core, made)
    (third,) = requeue(core, old)
    assert core.state.entries[third].rollout.requeued_from == made
    assert requeue(core, made) == [third]
    attempt(core, "succeeded", "ok")
    before = list(parts(core.state))
    assert requeue(core, old, made) == [third, third]
    assert list(parts(core.state)) == before
    core.run("delete_rollouts", rollout_ids=[third])
    (fourth,) = requeue(core, old)
    assert core.state.entries[fourth].rollout.requeued_from == made


def test_what_a_consumer_gave_back_is_requeued_itself(core: Core) -> None:
    """And the consumer no longer awaits it."""
    old = failed(core)
    trainer = core.open("trainer")
    core.run("take", session=trainer, consumer="c", count=1, status_in=["failed"])
    core.run("nack", session=trainer, consumer="c", batch=1)
    assert requeue(core, old) == [old]
    assert core.run("take", session=trainer, consumer="c", count=1, status_in=["failed"]) == ([], 0)


def test_the_successor_of_a_deleted_rollout_is_not_that_of_another_with_its_id(core: Core) -> None:
    """A caller-given id that is used again."""
    old = failed(core, rollout_id="mine")
    trainer = core.open("trainer")
    core.run("take", session=trainer, consumer="c", count=1, status_in=["failed"])
    core.run("ack", session=trainer, consumer="c", batch=1, at_step=1, note=None)
    (made,) = requeue(core, old)
    core.run("checkpoint", session=trainer, consumer="c", at_step=1)
    core.run("delete_rollouts", rollout_ids=[old])
    core.run("cancel_rollouts", rollout_ids=[made], group_id=None, tags=None)
    again = failed(core, "another task", rollout_id="mine")
    assert requeue(core, again) == [again]


def test_a_member_of_an_ended_group_is_requeued_outside_of_it(core: Core) -> None:
    """A group that has ended stays what it was, whether it failed or was trained on."""
    group = enqueue_group(core, 2, min_size=None, replace=1)
    keys = at_work(core, group)
    core.report(keys[0], "succeeded")
    core.report(keys[1], "failed")
    attempt(core, "succeeded", "ok")  # its replacement
    assert group.status == "complete"
    core.run("take_groups", session=core.open("trainer"), consumer="c", count=1)
    core.run("ack", session=core.state.sessions["trainer"], consumer="c", batch=1, at_step=1, note=None)
    members = list(group.members)
    (made,) = requeue(core, keys[1][0])
    rollout = core.state.entries[made].rollout
    assert (rollout.group_id, rollout.requeued_from) == (None, keys[1][0])
    assert (group.status, list(group.members), core.status(keys[1][0])) == ("trained", members, "failed")
    attempt(core, "succeeded", "ok")
    assert (group.status, list(group.members)) == ("trained", members)
    assert requeue(core, keys[1][0]) == [made]


def test_a_member_of_an_open_group_that_was_replaced_is_a_spare_again(make_core: Callable[..., Core]) -> None:
    """It has lost its place, and may take over that of another one that fails."""
    core = make_core(max_deliveries=1)
    group = enqueue_group(core, 2, replace=1, min_size=2)
    keys = at_work(core, group)
    core.report(keys[1], "failed")
    assert group.is_open and keys[1][0] not in group.places
    assert requeue(core, keys[1][0]) == [keys[1][0]]
    assert list(group.spares) == [keys[1][0]]
    runner = core.state.sessions[f"runner of {group.group_id}"]
    replacement, again = core.hold(runner, limit=2)
    assert again[0] == keys[1][0]
    core.report(again, "succeeded")
    core.report(keys[0], "succeeded")
    core.finish(replacement, "failed", "infra")
    assert group.status == "complete" and list(group.chosen) == [keys[0][0], keys[1][0]]
