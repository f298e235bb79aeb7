"""Rollouts whose resources cannot be had: who says so, what it does to them, and what ends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from raystore.core import check
from raystore.core.payload import Payload
from raystore.core.snapshot import parts
from raystore.core.state import State
from raystore.core.verbs import STEPS
from tests.core.conftest import Core

PUBLISHED = Payload(b"\x02x", ("reference",))


def publish(
    core: Core,
    session: Any = None,
    resources_id: str = "w",
    objects: tuple[tuple[None, int]] | list[tuple[str, int]] | list[Any] = ((None, 100_000),),
) -> Any:
    """A new version of resources with objects, which no journal keeps unless an address is given."""
    made = core.run(
        "put_resources", session=session, resources_id=resources_id, resources=PUBLISHED, policy_version=None,
        holds_objects=True, objects=list(objects),
    )  # fmt: skip
    return made.version


def hold_back(core: Core, resources_id: str = "w", version: int = 1, why: str = "it is gone") -> Any:
    """What is known of the world outside comes as a step."""
    return STEPS["hold_back"](core.state, core.step(), resources_id, version, why)


def test_what_is_held_back_keeps_its_place_and_is_passed_over(core: Core) -> None:
    """Others are handed out; a newer version puts it in line again where it stood."""
    driver, runner = core.open("driver"), core.open("runner")
    publish(core, driver)
    first = core.enqueue("1")
    other = core.enqueue("2", resources_id="other")
    last = core.enqueue("3")
    assert hold_back(core)
    assert [key[0] for key in core.claim(runner, limit=3)] == [other]
    assert len(core.state.queues) == 2 and core.state.queues.held_counts() == {"w": 2}
    check.check(core.state)
    late = core.enqueue("4")
    assert core.state.queues.is_held(late)
    assert core.state.queues.waits_for(first) == "w"
    publish(core, driver)
    assert [(key[0]) for key in core.claim(runner, limit=5)] == [first, last, late]
    assert {core.state.entries[i].attempts[0].resources_version for i in (first, last, late)} == {2}
    kinds = [change.kind for change in core.state.changes]
    assert kinds.count("held_back") == kinds.count("offered_again") == 1


def test_it_counts_as_queued(make_core: Callable[..., Core]) -> None:
    """`max_queued` counts it, and it can be cancelled and given other resources."""
    core = make_core(max_queued=2)
    publish(core, core.open("driver"))
    first, second = core.enqueue("1"), core.enqueue("2")
    hold_back(core)
    with pytest.raises(Exception, match="2 rollouts"):
        core.enqueue("3")
    core.run("cancel_rollouts", rollout_ids=[first], group_id=None, tags=None)
    core.run("update_rollout", rollout_id=second, changes={"resources_id": None})
    assert core.state.queues.held_counts() == {}
    assert core.claim(core.open("runner"))[0][0] == second


def test_one_report_is_no_proof_and_two_sessions_are(core: Core) -> None:
    """An attempt that could not read its resources goes back without a charge, however often."""
    core.open("driver")
    publish(core, core.state.sessions["driver"])
    rollout_id = core.enqueue()
    one, two = core.open("one"), core.open("two")

    def fail(session: Any) -> None:
        ((_, attempt_id),) = core.hold(session)
        names = {"rollout_id": rollout_id, "attempt_id": attempt_id, "resources_id": "w", "version": 1}
        core.run("unread", session=session, **names, error="lost")

    for _ in range(5):
        fail(one)
        assert core.state.entries[rollout_id].rollout.status == "requeuing"
    assert core.state.resources.missing == {}
    fail(two)
    assert core.state.queues.is_held(rollout_id)
    entry = core.state.entries[rollout_id]
    assert (entry.deliveries, entry.charged, {attempt.outcome for attempt in entry.attempts}) == (0, 0, {"withdrawn"})
    assert core.claim(one) == []


@pytest.mark.parametrize(("why", "held"), [("closed", False), ("silence", True), ("reported", True)])
def test_the_end_of_the_publisher_is_proof_unless_it_only_stops_using_the_store(
    core: Core, why: str, held: bool
) -> None:
    """A process that closes its client still has its objects; one that is gone has not."""
    publish(core, core.open("driver"))
    rollout_id = core.enqueue()
    STEPS["end_session"](core.state, core.step(), "driver", why)
    assert core.state.queues.is_held(rollout_id) == held
    runner = core.open("runner")
    if not held:  # then the first who cannot read them is believed
        ((_, attempt_id),) = core.hold(runner)
        names = {"rollout_id": rollout_id, "attempt_id": attempt_id, "resources_id": "w", "version": 1}
        core.run("unread", session=runner, **names, error="lost")
    assert core.state.queues.is_held(rollout_id)
    again = core.open("driver-again")
    told = [("w", 1, PUBLISHED), ("w", 7, PUBLISHED)]
    assert core.run("hold_objects", session=again, versions=told) == [("w", 7)]
    assert core.claim(runner)[0][0] == rollout_id


def test_objects_that_the_journal_keeps_are_not_missing(core: Core) -> None:
    """The end of who published them changes nothing."""
    publish(core, core.open("driver"), objects=[("a" * 40, 100)])
    core.enqueue()
    STEPS["end_session"](core.state, core.step(), "driver", "silence")
    assert core.state.resources.missing == {}


def test_a_suspect_that_is_held_back_drains_nobody(core: Core) -> None:
    """While it cannot be handed out, no session waits for it."""
    publish(core, core.open("driver"))
    rollout_id = core.enqueue("suspect")
    core.hold(core.open("dies"))
    STEPS["end_session"](core.state, core.step(), "dies", "silence")
    assert list(core.state.suspects) == [rollout_id]
    hold_back(core)
    assert not core.state.suspects
    check.check(core.state)
    other = core.enqueue("other", resources_id="none")
    runner = core.open("runner")
    assert [key[0] for key in core.hold(runner)] == [other]
    publish(core, core.state.sessions["driver"])
    assert list(core.state.suspects) == [rollout_id]


def test_what_is_freed_is_told(core: Core) -> None:
    """Of each version whose value goes: who held it, and the objects of the journal that nobody needs any more."""
    driver = core.open("driver")
    a, b, c = (letter * 40 for letter in "abc")
    for addresses in ([a, b], [b, c], [c]):
        publish(core, driver, objects=[(address, 100) for address in addresses])
    freed = core.state.take_effects().freed
    assert [(one.version, one.publisher, one.addresses) for one in freed] == [
        (1, "driver", [a]),
        (2, "driver", [b]),
    ]
    assert sorted(core.state.resources.addresses) == [c]
    core.run("delete_resources", resources_id="w")
    assert [one.addresses for one in core.state.take_effects().freed] == [[c]]
    assert not core.state.resources.is_publishing("driver")


def test_deleting_what_is_missing_offers_the_rollouts_again(core: Core) -> None:
    """As for every rollout whose resources were deleted, their attempts have no version."""
    publish(core, core.open("driver"))
    rollout_id = core.enqueue()
    hold_back(core)
    core.run("delete_resources", resources_id="w")
    ((found, _),) = core.claim(core.open("runner"))
    assert found == rollout_id and core.state.entries[found].attempts[0].resources_version is None


def test_it_is_in_a_snapshot(core: Core) -> None:
    """Lines, reasons, reports, publishers and addresses come back as they were."""
    driver, runner = core.open("driver"), core.open("runner")
    publish(core, driver, "w")
    publish(core, driver, "kept", objects=[("a" * 40, 5), (None, 7)])
    rollout_id = core.enqueue(resources_id="w")
    ((_, attempt_id),) = core.hold(runner)
    names = {"rollout_id": rollout_id, "attempt_id": attempt_id, "resources_id": "w", "version": 1}
    core.run("unread", session=runner, **names, error="lost")
    hold_back(core)
    restored = State(core.state.settings)
    restored.resources.restore(core.state.resources.image())
    restored.queues.restore(core.state.queues.orders(), core.state.queues.arrivals)
    assert restored.resources.shown() == core.state.resources.shown()
    assert restored.queues.held("w") == [rollout_id]
    restored.queues.check()
    restored.resources.check()
    assert dict(part[:2] for part in parts(core.state) if part[0] == "objects")
