"""What the core keeps: ids that nobody has, numbers given once, sums that know of all bytes, and records that go."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raystore.core import check, claims, expiry, state, verbs, workers
from raystore.core.payload import ERROR_BYTES, bounded_error, text_bytes
from raystore.core.snapshot import digest
from raystore.core.verbs import STEPS
from raystore.journal import snapshot_file
from raystore.journal.format import FileHead
from tests.core.conftest import Core
from tests.support.ids import mint_short_ids


@pytest.fixture
def few_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are minted of one digit, so that most of them are taken."""
    mint_short_ids(monkeypatch, 1)


def test_ids_are_minted_until_nobody_has_them(core: Core, few_ids: None) -> None:
    """Of rollouts, of the attempts of each, and of resources; the next one is as good as the first."""
    session = core.open("s")
    made = [core.enqueue(str(number)) for number in range(50)]
    assert len(set(made)) == 50
    for _ in range(40):
        core.run("start_attempt", session=session, rollout_id=made[0], worker_id=None)
    assert len({attempt.attempt_id for attempt in core.state.entries[made[0]].attempts}) == 40
    for _ in range(30):
        core.run("put_resources", resources_id=None, resources=b"\x01x", policy_version=None, holds_objects=False)
    assert len(core.state.resources) == 30
    assert core.claim(session, limit=100)[0][0] == made[1]


def test_the_same_step_mints_the_same_ids(make_core: Callable[..., Core], few_ids: None) -> None:
    """Also where it had to look for another one."""
    states = []
    for core in (make_core(), make_core()):
        session = core.open("s")
        for number in range(40):
            core.enqueue(str(number))
        core.claim(session, limit=20)
        states.append(digest(core.state))
    assert states[0] == states[1]


def add(core: Core, rollout_id: str, attempt_id: str, *numbers: Any) -> None:
    rows = [[n, f"s{i}-{core.seed}", "t", None, "n", 1.0, 2.0, None, b"\x01x", -1] for i, n in enumerate(numbers)]
    core.run("add_spans", rollout_id=rollout_id, attempt_id=attempt_id, spans=rows)


@pytest.mark.parametrize("asked", [0, 1, 7])
def test_span_numbers_are_given_once_also_before_there_is_the_rollout(core: Core, asked: int) -> None:
    """The counter of a rollout that does not exist is the one that it begins with; deletion ends it."""
    session = core.open("s")
    given = [core.run("next_numbers", rollout_ids=["mine", "other"])[0] for _ in range(asked)]
    core.enqueue(rollout_id="mine")
    ((_, attempt_id),) = core.claim(session)
    given += [core.run("next_numbers", rollout_ids=["mine"])[0] for _ in range(3)]
    add(core, "mine", attempt_id, -1, -1)
    given += [span.sequence_id for span in core.state.spans.of("mine")]
    given += core.run("next_numbers", rollout_ids=["mine"])
    assert given == list(range(1, asked + 7))
    core.run("delete_rollouts", rollout_ids=["mine"])
    assert core.run("next_numbers", rollout_ids=["mine"]) == [1]


@pytest.mark.parametrize("numbers", [(0,), (0, 0), (3,), ()])
def test_a_counter_of_zero_is_none(
    make_core: Callable[..., Core], tmp_path: Path, numbers: tuple[int] | tuple[int, int] | tuple[Any]
) -> None:
    """A snapshot cannot tell them apart, so nobody does."""
    core = make_core(on_disk=True)
    session = core.open("s")
    core.enqueue(rollout_id="mine")
    ((_, attempt_id),) = core.claim(session)
    rows = [[n, f"s{i}", "t", None, "n", 1.0, 2.0, None, b"\x01x", -1] for i, n in enumerate(numbers)]
    step = core.step(session)
    step.record = 1  # of a journal, which has the bodies
    verbs.run(core.state, step, "add_spans", {"rollout_id": "mine", "attempt_id": attempt_id, "spans": rows})
    path = tmp_path / "s"
    snapshot_file.write(path, FileHead("s", 1, 1, 1, more={}), core.state, None, {})
    found = Core(on_disk=True)
    snapshot_file.read(path, found.state)
    assert digest(found.state) == digest(core.state)
    found.state.spans._held("mine")
    assert digest(found.state) == digest(core.state)
    assert found.run("next_numbers", rollout_ids=["mine"]) == core.run("next_numbers", rollout_ids=["mine"])


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["x", "ü", "€", "\ud800", "𐍈"])
@pytest.mark.parametrize("length", [0, 10, 16_384, 65_536, 65_537, 300_001])
def test_an_error_is_bounded_and_says_so(text: str, length: int) -> None:
    """Whatever it is made of: a short one is kept as it is, of a long one the beginning and the end."""
    error = "the first line\n" + text * length + "\nValueError: the last line"
    kept = bounded_error(error)
    assert text_bytes(kept) <= ERROR_BYTES
    assert (kept == error) == (text_bytes(error) <= ERROR_BYTES)
    if kept != error:
        assert kept.startswith("the first line") and kept.endswith("ValueError: the last line")
        assert f"of {text_bytes(error)} bytes left out" in kept
        assert bounded_error(kept) == kept


def test_every_value_of_a_user_is_in_the_sums(core: Core) -> None:
    """Of rollouts, attempts, workers: as it comes, is replaced, is taken back, and goes."""
    session = core.open("s")
    sums = core.state

    def grown(verb: str, **arguments: Any) -> int:
        before = sums.total_bytes
        core.run(verb, session=session, **arguments)
        check.check(core.state)
        return sums.total_bytes - before

    text = b"\x01" + b"y" * 50_000
    rollout_id = core.enqueue(tags={"a": "t" * 20_000})
    assert sums.total_bytes > 20_000
    ((_, attempt_id),) = core.claim(session)
    names = {"rollout_id": rollout_id, "attempt_id": attempt_id}
    assert grown("update_attempt", **names, changes={"metadata": text}) == len(text)
    assert grown("update_attempt", **names, changes={"metadata": text[:10]}) == 10 - len(text)
    assert core.decline(session, (rollout_id, attempt_id))
    check.check(core.state)
    ((_, attempt_id),) = core.claim(session)
    names = {"rollout_id": rollout_id, "attempt_id": attempt_id}
    assert grown("update_attempt", **names, changes={"metadata": text}) == len(text)
    assert grown("update_worker", worker_id="w", changes={"heartbeat_stats": text}) == len(text)
    assert grown("update_worker", worker_id="w", changes={"heartbeat_stats": text[:7]}) == 7 - len(text)
    assert grown("update_worker", worker_id="w", changes={}) == 0
    assert grown("update_rollout", rollout_id=rollout_id, changes={"input": text}) == len(text) - 1
    changes = {"status": "failed", "error": "z" * 1_000_000}
    assert 60_000 < grown("finish", **names, spans=[], changes=changes) <= ERROR_BYTES
    assert grown("update_attempt", **names, changes={"metadata": None}) == -len(text)
    assert grown("finish", **names, spans=[], changes=changes | {"error": "short"}) < -60_000
    core.run("delete_rollouts", rollout_ids=[rollout_id])
    workers.forget(core.state, core.step(), ["w"])
    check.check(core.state)
    assert sums.total_bytes == sums.payload_bytes == 0


# -- records that go ---------------------------------------------------------------------------------------------------


@pytest.fixture
def few_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "ENDED_SESSIONS", 20)
    for module in (state, workers):
        monkeypatch.setattr(module, "IDLE_WORKERS", 20)
    for module in (state, claims):
        monkeypatch.setattr(module, "SURPLUS", 5)


def work_off(core: Core) -> None:
    """What a service does when there is a surplus."""
    if core.state.take_effects().has_surplus:
        expiry.advance(core.state, core.step(), expiry.surplus(core.state))
        STEPS["forget_workers"](core.state, core.step(), workers.surplus(core.state))


def test_workers_that_were_not_heard_of_for_the_longest_time_go_and_busy_ones_stay(
    core: Core, few_records: None
) -> None:
    """Whatever order they came in; who comes back is a worker again."""
    dice, heard = random.Random(1), dict[str, float]()
    session = core.open("s")
    for number in range(10):
        core.enqueue()
        core.acknowledge(session, core.claim(session, worker_id=f"busy-{number}"))
    for _ in range(400):
        core.now += 1
        session.last_heard = core.now
        worker_id = f"w-{dice.randrange(60)}"
        heard.pop(worker_id, None)
        heard[worker_id] = core.now
        if dice.random() < 0.5:
            core.run("update_worker", worker_id=worker_id, changes={"heartbeat_stats": b"\x01\x80"})
        else:
            core.claim(session, worker_id=worker_id)
        work_off(core)
        check.check(core.state)
        there = [name for name in core.state.workers if not name.startswith("busy")]
        assert len(there) < 25 and len(core.state.workers) - len(there) == 10
        assert set(list(heard)[-20:]) <= set(there)


def test_records_of_ended_sessions_are_bounded_in_number(core: Core, few_records: None) -> None:
    """The one that ended first goes first; those that live are counted without walking all."""
    living = [core.open(f"living-{number}") for number in range(5)]
    for number in range(300):
        session = core.open(f"s-{number}")
        core.enqueue()
        core.hold(session)
        core.end(session)
        work_off(core)
        check.check(core.state)
        assert len(core.state.sessions) < 5 + 25
        assert len(core.state.session_deadlines) < 5 + 25 + 1
    assert {session.session_id for session in living} <= core.state.sessions.keys()
    assert "s-299" in core.state.sessions and "s-0" not in core.state.sessions
