"""Groups in the core: places and who holds them, how a group ends, who is given it, what a snapshot keeps of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raystore.core import check, expiry, training
from raystore.core.group_table import GroupEntry
from raystore.core.snapshot import digest, verify
from raystore.core.state import Session, State
from raystore.core.verbs import STEPS
from raystore.errors import ConsumerFilterError, ConsumerUnitError, GroupConflictError, InvalidValueError, SealedError
from raystore.journal import snapshot_file
from raystore.journal.format import FileHead
from tests.core.conftest import Core

RETRIED = [None, None, 9, ["failed", "timeout", "unresponsive"]]


def enqueue(core: Core, n: int, task: str = "x", member: dict[str, Any] | None = None, **rule: Any) -> GroupEntry:
    """A new group."""
    request = {"member": {"input": task.encode(), "metadata": None, **(member or {})}, "n": n, **rule}
    (shown,) = core.run("enqueue_groups", groups=[request], gives="groups")
    group: GroupEntry = core.state.groups.by_id[shown.group_id]
    return group


def at_work(core: Core, group: GroupEntry, session: Session | None = None) -> list[tuple[str, str]]:
    """Members, all of which run now, in the order of places; spares behind them."""
    session = session or core.open(f"runner of {group.group_id}")
    keys = dict(core.hold(session, limit=len(group.members)))
    return [(rollout_id, keys[rollout_id]) for rollout_id in [*group.in_place, *group.spares] if rollout_id in keys]


def trainer(core: Core) -> Session:
    """The session that takes batches."""
    return core.state.sessions.get("trainer") or core.open("trainer")


def take(core: Core, count: int = 9, consumer: str = "c", **more: Any) -> tuple[list[list[str]], int]:
    """The groups that a consumer is given, each as the ids of its rollouts, and the number of the batch."""
    items, number = core.run("take_groups", session=trainer(core), consumer=consumer, count=count, **more)
    groups: list[list[str]] = []
    for item in items:
        if isinstance(item, tuple):
            groups[-1].append(item[0].rollout_id)
        else:
            groups.append([])
    return groups, number


def test_a_group_is_complete_when_all_of_its_places_have_succeeded(core: Core) -> None:
    """In the order of places, whoever was quicker; then consumers are given it, each once."""
    group = enqueue(core, 3)
    keys = at_work(core, group)
    assert take(core) == ([], 0)
    for key in reversed(keys):
        assert group.status == "open"
        core.report(key, "succeeded")
    assert (group.status, group.why, list(group.chosen)) == ("complete", None, [key[0] for key in keys])
    assert take(core)[0] == [[key[0] for key in keys]]
    assert take(core, consumer="d")[0] == [[key[0] for key in keys]]
    assert take(core, max_open=2) == ([], 0)


def test_groups_come_in_the_order_in_which_they_became_complete(core: Core) -> None:
    """To a consumer that was there, and to one that comes later."""
    groups = [enqueue(core, 1, str(number)) for number in range(4)]
    keys = [at_work(core, group)[0] for group in groups]
    take(core)
    for number in (2, 0, 3, 1):
        core.report(keys[number], "succeeded")
    expected = [[keys[number][0]] for number in (2, 0, 3, 1)]
    assert take(core, 3)[0] == expected[:3]
    core.run("ack", consumer="c", batch=1, at_step=1, note=None)
    assert [group.status for group in groups] == ["trained", "complete", "trained", "trained"]
    assert take(core, consumer="late")[0] == expected


@pytest.mark.parametrize("min_size", [None, 2, 3])
def test_a_group_that_cannot_be_complete_any_more_ends_at_once(core: Core, min_size: int | None) -> None:
    """Short if enough have succeeded, else failed; what still ran for it is cancelled if it was given a rule."""
    group = enqueue(core, 4, min_size=min_size)
    keys = at_work(core, group)
    core.report(keys[0], "succeeded")
    core.report(keys[1], "succeeded")
    core.report(keys[2], "failed")
    assert group.status == ("complete" if min_size == 2 else "failed")
    assert group.why == f"2 of 4 succeeded: {keys[2][0]} is failed (agent_error)"
    assert core.status(keys[3][0]) == ("preparing" if min_size is None else "cancelled")
    assert take(core)[0] == ([[keys[0][0], keys[1][0]]] if min_size == 2 else [])


def test_a_failed_member_is_replaced_as_often_as_is_allowed(core: Core) -> None:
    """By a new rollout of the same content, in its place and at its place in line."""
    group = enqueue(core, 2, replace=1, member={"priority": 1, "tags": {"k": 1}, "config": RETRIED})
    behind = core.enqueue("behind")
    first, second = at_work(core, group)
    core.report(first, "failed")  # is tried again, as its config says: no business of the group's
    assert (core.status(first[0]), len(group.members)) == ("requeuing", 2)
    core.run("update_rollout", rollout_id=first[0], changes={"status": "failed"})
    new = group.in_place[0]
    assert new not in (first[0], second[0]) and len(group.members) == 3
    made = core.state.entries[new].rollout
    assert (made.input, made.tags, made.priority, made.group_id) == (b"x", {"k": 1}, 1, group.group_id)
    session = core.open("other")
    assert [key[0] for key in core.hold(session, 2)] == [new, behind]
    core.report(second, "succeeded")
    core.run("update_rollout", rollout_id=new, changes={"status": "failed"})
    assert (group.status, group.replaced) == ("failed", 1)


def test_a_dropped_member_is_not_replaced(core: Core) -> None:
    """Its agent has said that nobody shall try again."""
    group = enqueue(core, 3, replace=3, min_size=2)
    keys = at_work(core, group)
    core.report(keys[0], "succeeded")
    core.report(keys[1], "succeeded")
    core.finish(keys[2], "failed", "dropped")
    assert (group.status, len(group.members)) == ("complete", 3)


def test_a_late_word_that_drops_a_member_of_a_taken_group_changes_its_attempt_only(core: Core) -> None:
    """As with rollouts: what is in a batch is sealed."""
    group = enqueue(core, 1, replace=3, min_size=None)
    (key,) = at_work(core, group)
    core.run("update_rollout", rollout_id=key[0], changes={"status": "succeeded"})
    session = core.open("trainer")
    _, number = core.run("take_groups", session=session, consumer="t", count=1)
    core.finish(key, "failed", "dropped")
    assert core.outcomes(key[0]) == ["dropped"]
    assert (core.status(key[0]), group.status, list(group.chosen)) == ("succeeded", "complete", [key[0]])
    core.run("ack", session=session, consumer="t", batch=number, at_step=1, note=None)
    assert group.status == "trained"


@pytest.mark.parametrize("outcome", ["infra", "runner_lost"])
def test_what_the_infrastructure_failed_is_replaced_beside_that(make_core: Callable[..., Core], outcome: str) -> None:
    """As often as the store delivers a rollout again; after that the group ends."""
    core = make_core(max_deliveries=2)
    group = enqueue(core, 2, min_size=2)
    session = core.open("s")
    first, other = at_work(core, group, session)
    status = {"infra": "failed", "runner_lost": "unresponsive"}[outcome]
    losing = first[0]
    for replaced in range(3):
        for delivery in range(2):
            (key,) = [first] if (replaced, delivery) == (0, 0) else core.hold(session)
            assert key[0] == losing
            step = {"status": status, "outcome": outcome, "died": True}
            core.run("finish", session=session, rollout_id=key[0], attempt_id=key[1], spans=[], changes=step)
        assert core.status(losing) == "failed"
        losing = group.in_place[0]
    assert (group.status, group.renewed, core.status(other[0])) == ("failed", 2, "cancelled")


def test_a_spare_takes_the_place_of_a_member_that_failed_and_of_no_slow_one(core: Core) -> None:
    """So that what is trained on is not what happened to be quick; one that is needed by nobody is cancelled."""
    group = enqueue(core, 2, spare=2)
    first, second, spare, last = at_work(core, group)
    core.report(spare, "succeeded")
    core.report(first, "succeeded")
    assert (group.status, group.missing) == ("open", 1)
    core.finish(second, "failed", "infra")
    for _ in range(2):
        core.finish(core.hold(core.open(f"again {_}"))[0], "failed", "infra")
    assert (group.status, list(group.chosen)) == ("complete", [first[0], spare[0]])
    assert (core.status(last[0]), group.renewed, len(group.members)) == ("cancelled", 0, 4)


def test_a_spare_does_not_stand_in_for_what_the_policy_failed_at(core: Core) -> None:
    """Unless failed members may be replaced: then it costs nothing more than a new rollout would."""
    group = enqueue(core, 2, spare=1)
    keys = at_work(core, group)
    core.report(keys[2], "succeeded")
    core.report(keys[0], "failed")
    assert group.status == "failed"
    group = enqueue(core, 2, spare=1, replace=1)
    keys = at_work(core, group)
    core.report(keys[0], "failed")
    assert (group.status, group.in_place, group.replaced) == ("open", [keys[2][0], keys[1][0]], 1)


def test_a_success_that_comes_late_is_a_spare(core: Core) -> None:
    """Of one that was replaced, and of one whose group has ended."""
    group = enqueue(core, 2, replace=1, member={"config": [5.0, None, 1, []]})
    first, second = at_work(core, group)
    core.report(second, "running")
    core.run("heartbeat", attempts_alive=[])
    core.tick(3)
    core.report(second, "succeeded")
    core.tick(3)
    assert core.status(first[0]) == "failed" and group.status == "open"
    new = group.in_place[0]
    core.report(first, "succeeded")
    assert list(group.spares) == [first[0]] and group.in_place == [new, second[0]] and group.status == "open"
    (key,) = core.hold(core.open("other"))
    core.tick(6)  # the new one is late too, and nothing more may be replaced
    assert (group.status, key[0]) == ("failed", new)
    core.report(key, "succeeded")
    assert (group.status, set(group.spares)) == ("failed", {first[0]})


def test_a_deadline_ends_a_group_with_what_it_has(core: Core) -> None:
    """What has not finished is cancelled; a pause of the store does not count."""
    group = enqueue(core, 3, deadline_seconds=10.0, min_size=2)
    other = enqueue(core, 3, deadline_seconds=10.0)
    keys = at_work(core, group)
    core.report(keys[0], "succeeded")
    core.report(keys[2], "succeeded")
    expiry.pause(core.state, core.step(), 100.0)
    core.tick(105)
    assert group.status == "open"
    assert expiry.next_deadline(core.state) == core.now + 5
    core.tick(6)
    assert (group.status, other.status) == ("complete", "failed")
    assert group.why == "2 of 3 succeeded: the deadline has passed"
    assert list(group.chosen) == [keys[0][0], keys[2][0]] and core.status(keys[1][0]) == "cancelled"
    assert {core.status(rollout_id) for rollout_id in other.members} == {"cancelled"}


def test_a_deadline_rests_while_a_member_is_held_back(core: Core) -> None:
    """Its resources cannot be had, which is not the group's fault."""
    published: dict[str, Any] = {"holds_objects": False, "policy_version": None, "resources": b"\x01\x80"}
    core.run("put_resources", resources_id="m", objects=[], **published)
    group = enqueue(core, 1, deadline_seconds=10.0, member={"resources_id": "m"})
    core.tick(4)
    assert STEPS["hold_back"](core.state, core.step(), "m", 1, "gone")
    core.tick(50)
    assert group.status == "open"
    core.run("put_resources", resources_id="m", objects=[], **published)
    core.tick(5)
    assert group.status == "open"
    core.tick(2)
    assert group.status == "failed"


def test_cancelling(core: Core) -> None:
    """By its id a group ends cancelled whatever it has; by its members it ends by its rule."""
    group = enqueue(core, 3, min_size=2)
    keys = at_work(core, group)
    core.report(keys[0], "succeeded")
    core.report(keys[1], "succeeded")
    core.run("cancel_rollouts", rollout_ids=None, group_id=group.group_id, tags=None)
    assert (group.status, group.why) == ("cancelled", "2 of 3 succeeded: it was cancelled")
    short, none = enqueue(core, 3, min_size=2), enqueue(core, 3, min_size=2)
    keys = at_work(core, short)
    core.report(keys[0], "succeeded")
    core.report(keys[1], "succeeded")
    for some in (short, none):
        core.run("cancel_rollouts", rollout_ids=list(some.members)[2:], group_id=None, tags=None)
    assert (short.status, none.status) == ("complete", "cancelled")
    assert {core.status(rollout_id) for rollout_id in none.members} == {"cancelled"}


def test_a_member_that_is_run_again_opens_its_group_again(core: Core) -> None:
    """Until somebody trains on it; a short group can only become too short."""
    take(core)
    group = enqueue(core, 2)
    keys = at_work(core, group)
    for key in keys:
        core.report(key, "succeeded")
    core.run("update_rollout", rollout_id=keys[0][0], changes={"status": "queuing"})
    assert (group.status, group.end_time, take(core)[0]) == ("open", None, [])
    core.report(core.hold(core.open("t"))[0], "succeeded")
    assert group.status == "complete"
    assert take(core)[0] == [[key[0] for key in keys]]
    with pytest.raises(SealedError):
        core.run("update_rollout", rollout_id=keys[0][0], changes={"status": "queuing"})
    short = enqueue(core, 3, min_size=2)
    keys = at_work(core, short)
    for key, status in zip(keys, ["succeeded", "succeeded", "failed"], strict=True):
        core.report(key, status)
    assert short.status == "complete"
    core.run("update_rollout", rollout_id=keys[0][0], changes={"status": "queuing"})
    assert (short.status, take(core, max_open=2)[0]) == ("failed", [])


def test_deleting_members(core: Core) -> None:
    """One that runs counts as cancelled, one that succeeded as lost; a group goes with its last member."""
    group = enqueue(core, 3, min_size=2)
    keys = at_work(core, group)
    core.report(keys[0], "succeeded")
    core.report(keys[1], "succeeded")
    core.run("delete_rollouts", rollout_ids=[keys[2][0]])
    assert (group.status, list(group.members)) == ("complete", [keys[0][0], keys[1][0]])
    core.run("delete_rollouts", rollout_ids=[keys[0][0]])
    assert (group.status, group.why) == ("failed", f"1 of 3 succeeded: {keys[0][0]} was deleted")
    core.run("delete_rollouts", rollout_ids=[keys[1][0]])
    assert len(core.state.groups) == 0 and core.state.groups.bytes == 0


def test_retention_keeps_what_an_open_group_needs(make_core: Callable[..., Core]) -> None:
    """Also if it was read; and what a consumer of groups awaits. The rest goes."""
    core = make_core(retention_seconds=10.0)
    group = enqueue(core, 2)
    keys = at_work(core, group)
    core.report(keys[0], "succeeded")
    core.run("release", rollout_ids=[keys[0][0]])
    core.tick(20)
    assert keys[0][0] in core.state.entries
    take(core)
    core.report(keys[1], "succeeded")
    core.run("release", rollout_ids=[keys[1][0]])
    core.tick(20)
    assert set(group.members) <= core.state.entries.keys()
    take(core)
    core.tick(20)
    core.run("ack", consumer="c", batch=1, at_step=1, note=None)
    core.run("checkpoint", consumer="c", at_step=1)
    core.tick(20)
    assert not core.state.entries and not len(core.state.groups)


def write(core: Core, key: tuple[str, str], size: int) -> None:
    """A span of so many bytes."""
    row = [-1, f"s{core.seed}", "t", None, "n", None, None, None, b"\x01" + b"x" * size, -1]
    core.run("add_spans", rollout_id=key[0], attempt_id=key[1], spans=[row])


def is_full(core: Core) -> bool:
    """Whether a store hands out no work."""
    return core.state.memory_full


def test_what_an_open_group_has_finished_does_not_pause_the_store(make_core: Callable[..., Core]) -> None:
    """Nobody could take it, and the rest would never run; a complete group pauses it until it is taken."""
    core = make_core(eviction_bytes=60_000, safe_bytes=30_000)
    take(core)
    group = enqueue(core, 2)
    keys = at_work(core, group)
    write(core, keys[0], 70_000)
    core.report(keys[0], "succeeded")
    core.enqueue("more")
    assert not is_full(core) and core.state.spans.has(keys[0][0])
    core.report(keys[1], "succeeded")
    core.enqueue("and more")
    assert is_full(core) and core.state.waits_for == "c"
    asked = {"consumer": "c", "count": 5, "timeout": 9.0}
    enqueue(core, 2, "may come")
    items, batch = core.run("take_groups", session=trainer(core), **asked)  # a short batch, since nothing runs
    assert len(items) == 3
    core.run("ack", consumer="c", batch=batch, at_step=1, note=None)
    core.run("checkpoint", consumer="c", at_step=1)
    core.enqueue("goes on")
    assert not is_full(core) and not core.state.spans.has(keys[0][0])


def test_batches_of_groups_come_again_as_they_were_taken(core: Core) -> None:
    """After a nack and a rewind, before what became complete since; and not after a checkpoint."""
    groups = [enqueue(core, 1, str(number)) for number in range(4)]
    keys = [at_work(core, group)[0] for group in groups]
    for key in keys[:3]:
        core.report(key, "succeeded")
    taken, batch = take(core, 2)
    core.run("nack", consumer="c", batch=batch)
    assert take(core, 1) == (taken[:1], 2)
    core.run("ack", consumer="c", batch=2, at_step=1, note=None)
    core.run("checkpoint", consumer="c", at_step=1)
    _, batch = take(core, 1)
    core.run("ack", consumer="c", batch=batch, at_step=2, note=None)
    core.report(keys[3], "succeeded")
    take(core, 1)
    assert [group.status for group in groups] == ["trained", "trained", "complete", "complete"]
    assert core.run("rewind", consumer="c", at_step=1) == 2
    assert [group.status for group in groups] == ["trained", "complete", "complete", "complete"]
    assert take(core)[0] == [[key[0]] for key in keys[1:]]
    assert [row[:2] for row in core.run("ledger", consumer="c").items] == [
        (keys[0][0], 2), *((key[0], 5) for key in keys[1:])
    ]  # fmt: skip
    assert core.run("forget_consumer", consumer="c") == 3
    assert take(core)[0] == [[key[0]] for key in keys[1:]]


def test_a_consumer_takes_rollouts_or_groups(core: Core) -> None:
    """From its first take on, also if that gave nothing; until it is forgotten."""
    group = enqueue(core, 1)
    key = at_work(core, group)[0]
    core.run("rewind", consumer="c", at_step=0)
    assert take(core) == ([], 0)
    core.report(key, "succeeded")
    with pytest.raises(ConsumerUnitError, match="taken groups .* asks for rollouts"):
        core.run("take", consumer="c", count=1)
    assert core.run("take", consumer="d", count=1)[1] == 1
    with pytest.raises(ConsumerUnitError, match="taken rollouts"):
        take(core, consumer="d")
    core.run("forget_consumer", consumer="d")
    assert take(core, consumer="d")[0] == [[key[0]]]
    with pytest.raises(ConsumerFilterError, match="train"):
        take(core, mode="train")


def test_a_consumer_that_was_named_at_the_start_may_take_groups(make_core: Callable[..., Core]) -> None:
    """With the filter that it has; one that asks for failed rollouts cannot, since a group has none to train on."""
    wanted = {"mode": "train", "status_in": ["succeeded"]}
    core = make_core(consumers={"c": wanted, "d": {"status_in": ["failed"]}})
    training.introduce(core.state, core.state.settings)
    group = enqueue(core, 1, member={"mode": "train"})
    core.report(at_work(core, group)[0], "succeeded")
    assert take(core)[0] == [list(group.members)]
    with pytest.raises(ConsumerFilterError, match="failed"):
        take(core, consumer="d")


def test_filters_are_compared_with_what_a_group_was_made_with(core: Core) -> None:
    """Mode, tags, queue and id."""
    plain = enqueue(core, 1)
    asked = enqueue(core, 1, member={"mode": "train", "tags": {"k": 1}, "queue": "q"}, group_id="mine")
    filters: list[dict[str, Any]] = [{"mode": "train"}, {"tags": {"k": 1}}, {"queue": "q"}, {"group_id": "mine"}]
    for number, wanted in enumerate(filters):
        assert take(core, consumer=f"before {number}", **wanted) == ([], 0)
    for group in (plain, asked):
        (rollout_id,) = group.members
        core.run("update_rollout", rollout_id=rollout_id, changes={"status": "succeeded"})
    for number, wanted in enumerate(filters):
        assert take(core, consumer=f"before {number}")[0] == [list(asked.members)]
        assert take(core, consumer=f"after {number}", **wanted)[0] == [list(asked.members)]
    assert len(take(core, consumer="all")[0]) == 2


def test_a_take_waits_as_long_as_open_groups_may_become_complete(core: Core) -> None:
    """And not for those that its filter leaves out."""
    first, other = enqueue(core, 1, member={"mode": "train"}), enqueue(core, 1)
    asked = {"consumer": "c", "count": 2, "timeout": 5.0, "mode": "train"}
    assert core.run("take_groups", session=trainer(core), **asked) is None
    core.run("update_rollout", rollout_id=next(iter(first.members)), changes={"status": "succeeded"})
    assert len(core.run("take_groups", session=trainer(core), **asked)[0]) == 2  # the group and its rollout
    assert other.status == "open"


def test_a_group_id_makes_the_call_repeatable(core: Core) -> None:
    """The same content gives the same group, other content is refused, and a bare group id of a rollout is no group."""
    bare = core.enqueue("bare", group_id="mine")
    group = enqueue(core, 2, group_id="mine", spare=1)
    again = enqueue(core, 2, group_id="mine", spare=1)
    assert again is group and bare not in group.members and len(core.state.entries) == 4
    others: list[dict[str, Any]] = [
        {"n": 3}, {"spare": 2}, {"task": "y"}, {"min_size": 2}, {"member": {"mode": "val"}},
    ]  # fmt: skip
    for other in others:
        arguments = {"n": 2, "spare": 1, **other}
        with pytest.raises(GroupConflictError, match="mine"):
            enqueue(core, group_id="mine", **arguments)
    core.run("update_rollout", rollout_id=bare, changes={"status": "failed"})
    assert (group.status, core.run("get_group", group_id="mine").members) == ("open", list(group.members))


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        ({"n": 2, "min_size": 3}, "min_size=3.*2 to n, which is 2"), ({"n": 2, "min_size": 1}, "min_size=1"),
        ({"n": 2, "deadline_seconds": 0.0}, "deadline_seconds=0.0"), ({"n": 9_999, "spare": 2}, "n=9999.*10,000"),
        ({"n": 2_000_000}, "n=2000000.*1,000,000"), ({"n": 0}, "n=0"), ({"n": 1, "spare": -1}, "spare=-1"),
        ({"n": 1, "replace": -1}, "replace=-1"),
    ],
    ids=str,
)  # fmt: skip
def test_a_rule_by_which_no_group_can_end_well_is_refused(core: Core, rule: dict[str, Any], named: str) -> None:
    """Named, and nothing changed."""
    before = digest(core.state)
    with pytest.raises(InvalidValueError, match=named):
        core.run("enqueue_groups", groups=[{"member": {"input": b"x"}, **rule}], gives="groups")
    assert digest(core.state) == before


def test_queries(core: Core) -> None:
    """By status and id, in the order of creation, and in pages."""
    groups = [enqueue(core, 1, str(number)) for number in range(5)]
    for number in (3, 1):
        core.run("update_rollout", rollout_id=next(iter(groups[number].members)), changes={"status": "succeeded"})

    def query(**asked: Any) -> list[int]:
        usual = {"status_in": None, "group_id_in": None, "sort_by": None, "sort_order": "asc", "limit": -1, "offset": 0}
        found = core.run("query_groups", **(usual | asked))
        ids = [group.group_id for group in groups]
        return [ids.index(shown.group_id) for shown in found.items] + [found.total]

    assert query() == [0, 1, 2, 3, 4, 5]
    assert query(limit=2, offset=3) == [3, 4, 5]
    assert query(status_in=["complete"]) == [1, 3, 2]
    assert query(status_in=["open", "complete"], limit=2, offset=1) == [1, 2, 5]
    assert query(group_id_in=[groups[4].group_id, groups[1].group_id, "none"]) == [1, 4, 2]
    assert query(group_id_in=[groups[4].group_id, groups[1].group_id], status_in=["open"]) == [4, 1]
    assert query(sort_by="status", sort_order="desc", limit=3) == [0, 2, 4, 5]
    with pytest.raises(InvalidValueError, match="sort_by"):
        query(sort_by="members")


def test_stories(core: Core) -> None:
    """Of a group, and of a rollout that is in one."""
    group = enqueue(core, 2, replace=1, min_size=2)
    keys = at_work(core, group)
    core.report(keys[0], "failed")
    core.report(keys[1], "succeeded")
    (key,) = core.hold(core.open("s"))
    core.report(key, "succeeded")
    take(core)
    story = "\n".join(check.story(core.state, group.group_id))
    for said in (
        "group_opened", "replaced", f"by={key[0]}", "group_complete", "now: complete, 2 of 2", "1 replaced",
        f"member {keys[0][0]}: failed", f"member {key[0]}: succeeded, place 1", "taken by 'c': batch 1, not consumed",
    ):  # fmt: skip
        assert said in story, said
    assert f"in group {group.group_id}, which is complete: in place 1 of 2" in check.story(core.state, key[0])
    assert check.story(core.state, "nobody") == ["now: rollout nobody does not exist"]


def test_a_snapshot_keeps_groups_and_their_batches(make_core: Callable[..., Core], tmp_path: Path) -> None:
    """With all that is known of them; and what has changed since is verified."""
    core = make_core(on_disk=True)
    group, other = enqueue(core, 2, deadline_seconds=50.0, spare=1, group_id="mine"), enqueue(core, 1)
    keys = at_work(core, group)
    core.report(keys[0], "succeeded")
    core.run("update_rollout", rollout_id=next(iter(other.members)), changes={"status": "succeeded"})
    take(core)
    snapshot_file.write(tmp_path / "s", FileHead("s", 1, 1, 1, more={}), core.state, None, {})
    found = State(core.state.settings)
    snapshot_file.read(tmp_path / "s", found)
    found.guard_all()
    check.check(found)
    assert digest(found) == digest(core.state)
    assert found.group_deadlines.next() == core.state.group_deadlines.next() == 1050.0
    assert verify(found, 100) == verify(core.state, 100)
    found.groups.by_id["mine"].missing += 1
    for state in (found, core.state):
        state.touch_group("mine")
    assert verify(found, 100) != verify(core.state, 100)
