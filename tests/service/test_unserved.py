"""A queue in which rollouts wait and that nobody serves is named: once, with the nearest name that is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from raystore.service.presence import UNSERVED_SECONDS
from tests.conftest import MakeMemoryStore
from tests.helpers import until
from tests.service.near import NearStore
from tests.service.test_sessions import DEQUEUE, ENQUEUE


@pytest.fixture
def store(make_memory_store: MakeMemoryStore) -> rs.InMemoryLightningStore:
    return make_memory_store(clock="manual")


def named(caplog: Any) -> list[Any]:
    """What was said of queues."""
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if message.startswith("Rollouts wait in queue ")]


async def test_it_is_named_once_with_the_nearest_name(
    store: rs.InMemoryLightningStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Also in `statistics` and in the story of a rollout; not before its time."""
    await store.dequeue_rollout(queues=["default", "math"])
    made = await store.enqueue_rollout("x", queue="maht")
    await store.testing.tick(UNSERVED_SECONDS - 1, sessions=True)
    assert named(caplog) == []
    for _ in range(3):
        await store.testing.tick(1.5, sessions=True)
        await store.enqueue_rollout("x", queue="maht")
    (told,) = named(caplog)
    assert "in queue 'maht' (1)" in told and "Served are 'default', 'math'; did you mean 'math'?" in told, told
    assert (await store.statistics())["unserved_queues"] == {"maht": pytest.approx(UNSERVED_SECONDS + 3.5, abs=5)}
    assert "and no process has asked for work of it for 3" in (await store.story(made.rollout_id))[-1]
    await store.testing.tick(3600, sessions=True)
    assert len(named(caplog)) == 1


async def test_one_that_is_served_or_empty_is_not(
    store: rs.InMemoryLightningStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever else waits, and however long."""
    await store.enqueue_rollout("x")
    emptied = await store.enqueue_rollout("x", queue="emptied")
    await store.testing.tick(UNSERVED_SECONDS - 1, sessions=True)
    assert (await store.statistics())["unserved_queues"].keys() == {"default", "emptied"}
    await store.dequeue_rollout()
    await store.enqueue_rollout("more")
    await store.cancel_rollouts([emptied.rollout_id])
    await store.testing.tick(3600, sessions=True)
    assert named(caplog) == [] and (await store.statistics())["unserved_queues"] == {}


async def test_each_of_several_is_named_when_its_time_has_come(
    store: rs.InMemoryLightningStore, caplog: pytest.LogCaptureFixture
) -> None:
    """And where nobody serves anything, that is said."""
    await store.enqueue_rollout("x", queue="first")
    await store.testing.tick(10, sessions=True)
    await store.enqueue_rollout("x", queue="second")
    await store.testing.tick(UNSERVED_SECONDS - 10 + 1, sessions=True)
    (told,) = named(caplog)
    assert "'first'" in told and "No queue is served" in told
    await store.testing.tick(10, sessions=True)
    assert len(named(caplog)) == 2 and "'second'" in named(caplog)[1]


async def test_one_whose_server_has_ended_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the timer, without another call."""
    monkeypatch.setattr("raystore.service.presence.UNSERVED_SECONDS", 0.3)
    near = NearStore()
    try:
        driver, runner = near.connect(), near.connect()
        for _ in range(2):
            await driver.call("enqueue", ENQUEUE)
        assert await runner.call("dequeue", DEQUEUE)
        near.service.end_session(near.service.state.sessions[runner.state.session_id], why="it has ended")

        async def is_named() -> bool:
            return bool(named(caplog))

        await until(is_named, within=20)
        assert "in queue 'default' (2)" in named(caplog)[0]
    finally:
        near.close()


async def test_a_journal_whose_queue_nobody_serves(
    make_memory_store: MakeMemoryStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is noticed after a restart as well."""
    first = make_memory_store(journal=tmp_path / "j", clock="manual")
    await first.enqueue_rollout("x", queue="left")
    first.close()
    second = make_memory_store(journal=tmp_path / "j", clock="manual")
    await second.testing.tick(UNSERVED_SECONDS + 1, sessions=True)
    assert "'left'" in named(caplog)[0]
