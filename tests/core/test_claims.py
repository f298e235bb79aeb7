"""Claims, sessions, losses and suspects, decided without a process in sight."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from raystore.core.state import CLAIM_SECONDS, SESSION_SILENCE_SECONDS
from raystore.core.verbs import VERBS
from raystore.errors import ClaimLostError, InvalidValueError
from raystore.service.service import PROCESS_VERBS
from tests.core.conftest import Core


def test_unacknowledged_claim_is_withdrawn_without_a_trace(core: Core) -> None:
    """The attempt never was: its number is used again, the place kept, nothing charged; the story keeps a line."""
    session, other = core.open("a"), core.open("b")
    first, second = core.enqueue("first"), core.enqueue("second")
    (key,) = core.claim(session)
    core.tick(CLAIM_SECONDS)
    assert core.status(first) == "preparing"
    core.tick(0.1)
    assert (core.status(first), core.outcomes(first)) == ("queuing", [])
    assert core.state.entries[first].deliveries == 0
    got = core.claim(other, 2)
    assert [rollout_id for rollout_id, _ in got] == [first, second]  # one withdrawn claim makes no suspect
    assert core.state.entries[first].attempts[0].sequence_id == 1
    core.acknowledge(other, got)
    core.report(got[0], "succeeded", other)
    kinds = [change.kind for change in core.state.changes.of(first)]
    assert kinds == ["enqueued", "claimed", "withdrawn", "claimed", "succeeded"]
    assert key[1] != got[0][1]


def test_withdrawn_worker_goes_back_to_idle(core: Core) -> None:
    """Its row no longer names the attempt."""
    session = core.open("a")
    core.enqueue()
    core.claim(session, worker_id="w")
    core.tick(CLAIM_SECONDS + 1)
    worker = core.state.workers["w"]
    assert (worker.status, worker.current_attempt_id) == ("idle", None)


def test_late_acknowledgement_reinstates_if_nobody_has_it(core: Core) -> None:
    """The same attempt comes back, with its number."""
    session = core.open("a")
    rollout_id = core.enqueue()
    keys = core.claim(session)
    core.tick(CLAIM_SECONDS + 1)
    assert core.acknowledge(session, keys) == []
    assert core.status(rollout_id) == "preparing"
    core.report(keys[0], "succeeded", session)
    assert core.status(rollout_id) == "succeeded"


def test_late_acknowledgement_of_a_taken_rollout_is_lost(core: Core) -> None:
    """It and every write of that attempt get ClaimLostError."""
    session, other = core.open("a"), core.open("b")
    rollout_id = core.enqueue()
    keys = core.claim(session)
    core.tick(CLAIM_SECONDS + 1)
    core.hold(other)
    assert core.acknowledge(session, keys) == keys
    with pytest.raises(ClaimLostError, match=keys[0][1]):
        core.report(keys[0], "succeeded", session)
    assert core.status(rollout_id) == "preparing"


def test_a_write_is_as_good_as_an_acknowledgement(core: Core) -> None:
    """An attempt that was written to is no longer a claim."""
    session = core.open("a")
    rollout_id = core.enqueue()
    (key,) = core.claim(session)
    core.report(key, "running", session)
    core.tick(CLAIM_SECONDS + 1)
    assert core.status(rollout_id) == "running"


def test_declined_claim_goes_back_at_once_and_counts_for_nothing(core: Core) -> None:
    """Also just after its acknowledgement; the rollout is no suspect."""
    session = core.open("a")
    first = core.enqueue()
    core.enqueue()
    (key,) = core.claim(session)
    assert core.decline(session, key)
    (key,) = core.hold(session)
    assert core.decline(session, key)
    assert not core.state.entries[first].suspect
    assert core.claim(session, 2)[0][0] == first
    assert not core.decline(session, key)


def test_a_claim_that_was_written_to_cannot_be_declined(core: Core) -> None:
    """It is work that somebody does."""
    session = core.open("a")
    core.enqueue()
    (key,) = core.hold(session)
    core.run("heartbeat", session=session, attempts_alive=[key])
    assert not core.decline(session, key)


def test_retry_that_is_declined_is_requeuing_again(core: Core) -> None:
    """A rollout gets back the status it had."""
    session = core.open("a")
    rollout_id = core.enqueue(config=[None, None, 2, ["failed"]])
    (key,) = core.hold(session)
    core.report(key, "failed", session)
    (key,) = core.claim(session)
    core.decline(session, key)
    assert core.status(rollout_id) == "requeuing"


def test_session_that_ends_gives_everything_back(core: Core) -> None:
    """Claims never were, attempts are lost; both stand at their old place, before what came later."""
    session, other = core.open("a"), core.open("b")
    held, claimed = core.enqueue("held"), core.enqueue("claimed")
    core.hold(session)
    core.claim(session)
    core.enqueue("later")
    core.end(session)
    assert (core.status(held), core.outcomes(held)) == ("requeuing", ["runner_lost"])
    assert (core.status(claimed), core.outcomes(claimed)) == ("queuing", [])
    order = []
    for _ in range(3):
        ((rollout_id, attempt_id),) = core.hold(other)
        order.append(core.state.entries[rollout_id].rollout.input)
        core.report((rollout_id, attempt_id), "succeeded", other)
    assert order == [b"held", b"claimed", b"later"]


def test_session_that_is_not_heard_has_ended(core: Core) -> None:
    """Silence for a minute ends a session; its record answers late batches and goes in the end."""
    session = core.open("a")
    rollout_id = core.enqueue()
    core.hold(session)
    core.tick(SESSION_SILENCE_SECONDS - 1)
    assert core.status(rollout_id) == "preparing"
    core.tick(2)
    assert core.status(rollout_id) == "requeuing" and session.ended_at is not None
    core.tick(601)
    assert "a" not in core.state.sessions


def test_started_rollout_of_a_dead_process_goes_to_the_tail(core: Core) -> None:
    """It was never in the queue, so it has no old place."""
    session, other = core.open("a"), core.open("b")
    core.run("start_rollout", session=session, request={"input": b"s", "metadata": None}, worker_id=None)
    queued = core.enqueue("q")
    core.end(session)
    assert core.status(queued) == "queuing"
    got = core.hold(other)
    assert core.state.entries[got[0][0]].rollout.input == b"s"  # a suspect, so it comes before anything else
    assert len(core.state.queues) == 1


def test_losses_alone_are_charged_and_neighbours_are_not(core: Core) -> None:
    """A rollout that kills its runner is found in 1 + max_deliveries losses; the one beside it goes on."""
    deadly, innocent = core.enqueue("deadly"), core.enqueue("innocent")
    first = core.open("s0")
    core.hold(first, 2)
    core.end(first)
    losses = 1
    number = 0
    while core.status(deadly) != "failed":
        number += 1
        session = core.open(f"s{number}")
        (key,) = core.hold(session)
        if key[0] == innocent:
            core.report(key, "succeeded", session)
            continue
        assert core.claim(session) == []  # it runs alone
        core.end(session)
        losses += 1
    assert losses == 1 + core.state.settings.max_deliveries
    assert core.status(innocent) == "succeeded" or core.state.entries[innocent].deliveries == 0
    assert set(core.outcomes(deadly)) == {"runner_lost"}


def test_a_busy_session_is_drained_for_a_suspect(core: Core) -> None:
    """While a suspect waits, one busy session takes nothing else, and the suspect when it is idle."""
    busy, dying = core.open("busy"), core.open("dying")
    core.enqueue("long")
    (running,) = core.hold(busy)
    suspect = core.enqueue("suspect")
    core.hold(dying)
    core.enqueue("other")
    core.state.sessions["dying"].held[running] = None  # it had company
    del core.state.sessions["dying"].held[running]
    core.state.entries[suspect].suspect = True
    core.end(dying)
    assert core.status(suspect) == "requeuing"
    assert core.claim(busy) == []
    core.report(running, "succeeded", busy)
    assert [rollout_id for rollout_id, _ in core.claim(busy)] == [suspect]


def test_infra_is_delivered_again_up_to_the_limit(make_core: Callable[..., Core]) -> None:
    """An agent that aborts does not use up attempts, only deliveries; a drop ends it."""
    core = make_core(max_deliveries=2)
    session = core.open("a")
    rollout_id = core.enqueue(config=[None, None, 1, []])
    (key,) = core.hold(session)
    core.finish(key, "failed", "infra", session)
    assert core.status(rollout_id) == "requeuing"
    (key,) = core.hold(session)
    core.finish(key, "failed", "infra", session)
    assert (core.status(rollout_id), core.outcomes(rollout_id)) == ("failed", ["infra", "infra"])
    dropped = core.enqueue(config=[None, None, 5, ["failed"]])
    (key,) = core.hold(session)
    core.finish(key, "failed", "dropped", session)
    assert (core.status(dropped), core.outcomes(dropped)) == ("failed", ["dropped"])


def test_lost_attempts_do_not_use_up_max_attempts(core: Core) -> None:
    """`max_attempts` counts charged attempts only."""
    rollout_id = core.enqueue(config=[None, None, 2, ["failed"]])
    dying = core.open("dying")
    core.hold(dying)
    core.end(dying)
    session = core.open("a")
    for expected in ("requeuing", "failed"):
        (key,) = core.hold(session)
        core.report(key, "failed", session)
        assert core.status(rollout_id) == expected


def test_a_report_from_another_session_moves_the_attempt_only_with_a_worker_id(core: Core) -> None:
    """Spans and statuses from elsewhere do not make a holder; naming a worker does."""
    runner, proxy = core.open("runner"), core.open("proxy")
    rollout_id = core.enqueue()
    (key,) = core.hold(runner)
    core.report(key, "running", proxy)
    core.end(proxy)
    assert core.status(rollout_id) == "running"
    core.run("update_attempt", session=(new := core.open("new")), rollout_id=key[0], attempt_id=key[1],
             changes={"worker_id": "w"})  # fmt: skip
    core.end(runner)
    assert core.status(rollout_id) == "running"
    core.end(new)
    assert core.status(rollout_id) == "requeuing"


def test_superseded_holder_is_told(core: Core) -> None:
    """Notices reach the session that holds the attempt: superseded, cancelled, timed out."""
    runner, other = core.open("runner"), core.open("other")
    rollout_id = core.enqueue(config=[5.0, None, 2, ["timeout"]])
    core.hold(runner)
    core.tick(6)
    core.hold(other)
    core.run("cancel_rollouts", rollout_ids=[rollout_id], group_id=None, tags=None)
    assert [notice[0] for notice in runner.notices] == ["timeout", "superseded"]
    assert [notice[0] for notice in other.notices] == ["cancelled"]


def test_every_verb_checks_its_arguments() -> None:
    """A peer's nonsense is refused before it can fail inside the core."""
    for name, verb in (VERBS | PROCESS_VERBS).items():
        if not name.startswith(("query_rollouts", "query_workers")):  # which hand on what they get, and change nothing
            with pytest.raises(InvalidValueError):
                verb.require(name, {"nonsense": 1})


def test_a_claim_given_back_does_not_resurrect_what_was_decided_meanwhile(core: Core) -> None:
    """A rollout that was cancelled by hand between claim and acknowledgement stays cancelled."""
    session = core.open("a")
    for end in ("withdraw", "decline"):
        rollout_id = core.enqueue()
        (key,) = core.claim(session)
        core.run("update_rollout", rollout_id=rollout_id, changes={"status": "cancelled"})
        if end == "decline":
            assert core.decline(session, key)
        else:
            core.tick(CLAIM_SECONDS + 1)
        assert core.status(rollout_id) == "cancelled"


def test_a_silent_process_that_comes_back_holds_its_work_again(core: Core) -> None:
    """Its span revives the attempt in its new session, whose end is then noticed too."""
    old = core.open("old")
    rollout_id = core.enqueue()
    (key,) = core.hold(old)
    core.end(old)
    new = core.open("new")
    row = [-1, "s", "t", None, "n", None, None, None, b"\x01", -1]
    core.run("add_spans", session=new, rollout_id=key[0], attempt_id=key[1], spans=[row])
    assert core.status(rollout_id) == "running" and list(new.held) == [key]
    core.end(new)
    assert core.status(rollout_id) == "requeuing"


def test_a_runner_that_stops_gives_its_work_back_unblamed(core: Core) -> None:
    """An orderly loss is not charged and makes no suspect."""
    session = core.open("a")
    rollout_id = core.enqueue()
    (key,) = core.hold(session)
    core.finish(key, "unresponsive", "runner_lost", session)
    entry = core.state.entries[rollout_id]
    assert (core.status(rollout_id), entry.deliveries, entry.suspect) == ("requeuing", 0, False)


def test_a_process_is_reported_by_the_worker_that_it_was(core: Core) -> None:
    """Also when its session is another one by now."""
    session = core.open("renewed")
    rollout_id = core.enqueue()
    keys = core.claim(session, worker_id="w")
    core.acknowledge(session, keys)
    assert core.run("report_session", session_id="forgotten", worker_id="w")
    assert core.status(rollout_id) == "requeuing"
    assert not core.run("report_session", session_id="forgotten", worker_id="w")


def test_queues_are_looked_at_again_when_a_suspect_is_done(core: Core) -> None:
    """A session that ran a suspect may claim again, and so may one that was drained for it."""
    dying, runner, drained = core.open("dying"), core.open("runner"), core.open("drained")
    suspect = core.enqueue("suspect")
    core.hold(dying)
    core.end(dying)
    core.enqueue("long")
    (key,) = core.hold(runner)
    assert key[0] == suspect
    core.enqueue("next")
    assert core.claim(runner) == []
    core.state.take_effects()
    core.report(key, "succeeded", runner)
    assert "default" in core.state.effects.queues
    assert len(core.claim(runner, 5)) == 2
    assert core.claim(drained) == []


def test_a_superseded_attempt_holds_no_resources_to_move(core: Core) -> None:
    """Naming other resources by hand moves the references of live attempts only."""
    session = core.open("a")
    core.run("put_resources", resources_id="R", resources=b"r", policy_version=None, holds_objects=True)
    first, second = core.enqueue("1"), core.enqueue("2")
    core.hold(session, 2)
    core.run("start_attempt", session=session, rollout_id=first, worker_id=None)
    core.run("put_resources", resources_id="R", resources=b"r2", policy_version=None, holds_objects=True)
    core.run("put_resources", resources_id="Q", resources=b"q", policy_version=None, holds_objects=True)
    core.run("update_rollout", rollout_id=first, changes={"resources_id": "Q"})
    assert core.run("get_resources", resources_id="R", version=1).resources == b"r"
    assert core.status(second) == "preparing"


def test_an_agent_process_that_dies_is_charged_and_no_suspect(core: Core) -> None:
    """The runner knows what died with the process: it counts as a delivery, and nobody is drained for it."""
    session = core.open("s")
    core.enqueue()
    for delivery in range(1, 5):
        ((rollout_id, attempt_id),) = core.hold(session)
        changes = {"status": "unresponsive", "outcome": "runner_lost", "error": "signal 9", "died": True}
        core.run("finish", session=session, rollout_id=rollout_id, attempt_id=attempt_id, spans=[], changes=changes)
        entry = core.state.entries[rollout_id]
        assert entry.latest is not None
        assert (entry.deliveries, entry.suspect, entry.latest.error) == (delivery, False, "signal 9")
        assert entry.rollout.status == ("requeuing" if delivery < 3 else "failed")
        if delivery == 3:
            break


def test_a_heartbeat_tells_what_is_of_no_use_any_more(core: Core) -> None:
    """Superseded, cancelled, timed out or gone; not what only looked dead and may come back."""
    session, other = core.open("s"), core.open("other")
    config = [5.0, 3.0, 2, ["unresponsive"]]
    superseded, waits, fine, cancelled = (core.enqueue(config=c) for c in (config, config, None, None))
    keys = core.hold(session, 4)
    core.tick(4)
    assert [core.state.entries[i].rollout.status for i in (superseded, waits)] == ["requeuing", "requeuing"]
    core.hold(other)
    core.run("cancel_rollouts", rollout_ids=[cancelled], group_id=None, tags=None)
    told = core.run("heartbeat", session=session, attempts_alive=[*keys, ("ro-gone", "at-gone")])
    assert [key[0] for key in told] == [superseded, cancelled, "ro-gone"]
    latest = core.state.entries[fine].latest
    assert latest is not None and latest.last_heartbeat_time == core.now


@pytest.mark.parametrize(
    ("status", "outcome"), [("failed", "infra"), ("failed", "dropped"), ("unresponsive", "runner_lost")]
)
def test_a_report_of_a_settled_attempt_does_not_reopen_its_rollout(core: Core, status: str, outcome: str) -> None:
    """A rollout that has ended stays so, whatever its runner still says of it."""
    session = core.open("s")
    core.enqueue(config=[5.0, None, 1, []])
    (key,) = core.hold(session)
    core.tick(6)
    assert core.status(key[0]) == "failed"
    core.finish(key, status, outcome, session)
    entry = core.state.entries[key[0]]
    assert entry.latest is not None
    assert (entry.rollout.status, entry.latest.status, entry.latest.outcome) == ("failed", "timeout", "timeout")
