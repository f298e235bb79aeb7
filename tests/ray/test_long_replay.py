"""A journal that takes longer to read than anybody waits for an answer: it is waited for as long as it comes on."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from raystore.remote import session
from tests.conftest import MakeRayStore
from tests.helpers import until

POINTS = "RAYSTORE_FAILPOINTS"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of some hundred records."""
    store = rs.InMemoryLightningStore(journal=tmp_path / "journal", durability="process")
    for number in range(120):
        store.sync.enqueue_rollout(number)
    store.close()
    return tmp_path / "journal"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "STANDSTILL_SECONDS", 3.0)
    monkeypatch.setattr(session, "LOG_SECONDS", 1.0)


def with_points(points: Any) -> dict[str, dict[str, dict[str, Any]]]:
    return {"runtime_env": {"env_vars": {POINTS: points}}}


async def test_a_long_replay_is_waited_for_at_the_start_and_when_the_store_comes_back(
    make_ray_store: MakeRayStore, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By whoever starts it, connects, or was a client before; a list of stores does not wait."""
    caplog.set_level(logging.INFO, "raystore")
    started = time.monotonic()
    slow = with_points("replay.record=sleep:0.05")
    starting = asyncio.ensure_future(asyncio.to_thread(make_ray_store, name="long", journal=path, actor_options=slow))

    async def is_reading() -> bool:
        return "reads its journal: at record" in caplog.text

    await until(is_reading)
    assert "long" not in {info.name for info in await asyncio.to_thread(rs.list_stores)}
    connecting = asyncio.ensure_future(asyncio.to_thread(rs.connect, "long"))
    store = await starting
    assert time.monotonic() - started > 2 * session.STANDSTILL_SECONDS
    assert (await store.statistics())["total_rollouts"] == 120
    assert (await (await connecting).statistics())["total_rollouts"] == 120
    os.kill((await store.actor.describe.remote())["pid"], signal.SIGKILL)
    assert (await store.enqueue_rollout("meanwhile")).status == "queuing"
    assert (await store.statistics())["total_rollouts"] == 121
    assert time.monotonic() - started > 4 * session.STANDSTILL_SECONDS


async def test_a_replay_that_stands_still_is_not_waited_for(make_ray_store: MakeRayStore, path: Path) -> None:
    """The error says where it stands."""
    with pytest.raises(rs.StoreUnavailableError, match="not come on in its journal for 3 s, at record 30 of"):
        await asyncio.to_thread(make_ray_store, journal=path, actor_options=with_points("replay.record=sleep:60@30"))


async def test_a_journal_that_cannot_be_read_is_refused_by_name(make_ray_store: MakeRayStore, path: Path) -> None:
    """Whoever starts the store is told at once, as it was when nobody else could ask."""
    (segment,) = path.glob("*.journal")
    segment.write_bytes(b"nothing of ours" + segment.read_bytes())
    with pytest.raises(rs.JournalDamagedError, match="does not begin like"):
        await asyncio.to_thread(make_ray_store, journal=path)
