"""Processes that are gone, and those that only look so; what a store makes of what it is told of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from raystore.core.state import Entry
from raystore.remote import lifelines
from raystore.remote.lifelines import Cluster, Lifelines, Process, here, is_gone, process_of, this_process
from raystore.service.clock import LoopAlarm
from raystore.service.service import Service
from raystore.types.options import StoreConfig
from raystore.wire.codec import encode
from tests.helpers import until

SAYING = "import sys; from raystore.remote.lifelines import this_process; print(*this_process()[1:4], flush=True); "
pytestmark = pytest.mark.skipif(not here(), reason="processes are looked for on Linux only")


@contextlib.contextmanager
def child(node: str = "n", job: str = "j", *, is_driver: bool = False) -> Iterator[Any]:
    """Another process, and who it says it is."""
    started = subprocess.Popen([sys.executable, "-c", SAYING + "sys.stdin.read()"], stdin=-1, stdout=-1)
    assert started.stdout is not None
    machine, pid, since = started.stdout.readline().decode().split()
    try:
        yield started, Process(node, machine, int(pid), int(since), job, is_driver)
    finally:
        started.kill()
        started.communicate()


def test_only_what_is_certainly_gone_is_gone() -> None:
    """Frozen is there; a zombie is not; an id that is used again is another process."""
    with child() as (started, process):
        assert process.machine == here() and not is_gone(process)
        assert is_gone(process._replace(started=process.started + 1))
        os.kill(process.pid, signal.SIGSTOP)
        assert not is_gone(process)
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has fetched it
        assert is_gone(process)
        started.wait()
        assert is_gone(process)
    assert not is_gone(this_process())


def test_what_is_no_process_is_not_looked_for() -> None:
    """A peer may say anything."""
    assert process_of(list(this_process())) == this_process()
    for told in (None, [], "process", ["n", "m", "4", 5, "j", False], [1, "m", 4, 5, "j", False], [*this_process(), 1]):
        assert process_of(told) is None


class Watched:
    """A service with lifelines, and what Ray says."""

    def __init__(self, nodes: Any, jobs: Any) -> None:
        self.said = Cluster(nodes, jobs)
        self.is_silent = False
        loop = asyncio.get_running_loop()
        alarm = lambda ring: LoopAlarm(loop, ring)  # noqa: E731
        self.service = Service(StoreConfig(), capacity_bytes=2**33, alarm=alarm, name="s")
        self.lifelines = Lifelines(self.service, self.ask)
        self.lifelines.start()

    def ask(self) -> Cluster:
        if self.is_silent:
            raise ConnectionError("no answer")
        return self.said

    def holding(self, name: str, process: Any) -> Callable[..., Entry]:
        """A session of a process, with a rollout that it runs."""
        session = self.service.open_session(name, process=list(process))
        self.lifelines.opened(session)
        request = {"input": encode("x", "input", 1000), "metadata": None}
        arguments = {"request": request, "worker_id": None}
        rollout, _ = self.service.call(session, 1, "start_rollout", arguments, lambda ticket, value: False)
        return lambda: self.service.state.entries[rollout.rollout_id]


@pytest.fixture
async def watched(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Any]]:
    """Makes watched services, whose looks follow each other quickly."""
    monkeypatch.setattr(lifelines, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(lifelines, "AGAIN_SECONDS", 0.05)
    made = []

    def make(nodes: Any = None, jobs: Any = None) -> Any:
        made.append(Watched({"n": True} if nodes is None else nodes, {"j": False} if jobs is None else jobs))
        return made[-1]

    yield make
    for one in made:
        one.lifelines.close()
        one.service.close()


async def outcome(entry: Any) -> Any:
    """How the attempt ended, once it has."""

    async def ended() -> Any:
        return entry().attempts[-1].outcome

    return await until(ended)


async def test_a_process_of_this_machine_is_looked_for(watched: Callable[..., Any]) -> None:
    """Killed, its session ends and what it ran is lost; its neighbour goes on."""
    store = watched()
    with child() as (_, dead), child() as (_, alive):
        lost, kept = store.holding("dead", dead), store.holding("alive", alive)
        await asyncio.sleep(0.2)
        assert lost().attempts[-1].outcome is None
        os.kill(dead.pid, signal.SIGKILL)
        assert await outcome(lost) == "runner_lost"
        assert kept().attempts[-1].outcome is None and store.service.is_live("alive")


@pytest.mark.parametrize("is_driver", [False, True])
async def test_a_process_whose_job_has_ended_was_stopped(watched: Callable[..., Any], is_driver: bool) -> None:
    """Also if Ray says so a moment later; the driver itself did not stop what it ran: that is lost."""
    store = watched()
    with child(is_driver=is_driver) as (_, process):
        entry = store.holding("a", process)
        os.kill(process.pid, signal.SIGKILL)
        await asyncio.sleep(0.03)
        store.said.jobs["j"] = True
        assert await outcome(entry) == ("runner_lost" if is_driver else "withdrawn")
        assert entry().deliveries == (1 if is_driver else 0)


@pytest.mark.parametrize(("nodes", "expected"), [
    ({"n": True, "far": False}, "runner_lost"),  # it has ended
    ({"n": True}, "withdrawn"),  # of another cluster, and its jobs with it
])  # fmt: skip
async def test_what_is_elsewhere_is_gone_with_its_node(
    watched: Callable[..., Any], nodes: dict[str, bool], expected: str
) -> None:
    """Its process id says nothing here, be it in use or not."""
    store = watched(nodes=nodes)
    entry = store.holding("far", this_process()._replace(node="far", machine="another", job="j", is_driver=False))
    assert await outcome(entry) == expected


@pytest.mark.parametrize("speaks", [False, True])
async def test_who_was_there_before_a_restart_speaks_or_is_gone_with_its_job(
    watched: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, speaks: bool
) -> None:
    """A process may outlive its job (a detached actor): it speaks to the store that came back."""
    monkeypatch.setattr(lifelines, "MISSED_SECONDS", 0.2)
    store = watched(jobs={"j": True})
    entry = store.holding("a", this_process()._replace(node="n", job="j", is_driver=False))
    await asyncio.sleep(0.1)
    assert entry().attempts[-1].outcome is None  # nobody asks for the job of a process that is there
    store.lifelines.close()
    again = Lifelines(store.service, store.ask)
    again.start()
    if speaks:
        store.service.heard(store.service.state.sessions["a"])
        await asyncio.sleep(0.5)
        assert entry().attempts[-1].outcome is None
    else:
        assert await outcome(entry) == "withdrawn"
    again.close()


async def test_nobody_is_gone_because_nothing_is_known(watched: Callable[..., Any]) -> None:
    """Of a machine nobody can look at, a node that lives, a Ray that does not answer, or that knows no node at all."""
    store = watched(nodes={})
    with child() as (_, process):
        ended = process._replace(pid=2**22 + 1)
    entries = [
        store.holding("unknown", ended._replace(machine="")),
        store.holding("container", ended._replace(machine="another")),
        store.holding("nowhere", ended._replace(machine="another", node=None)),
    ]
    await asyncio.sleep(0.3)
    store.is_silent = True
    await asyncio.sleep(0.3)
    store.is_silent = False
    store.said.nodes["n"] = True
    await asyncio.sleep(0.3)
    assert [entry().attempts[-1].outcome for entry in entries] == [None] * 3
    late = store.holding("late", ended._replace(machine=here()))  # it is still looked
    assert await outcome(late) == "runner_lost"


async def test_looks_go_on_when_ray_does_not_answer(watched: Callable[..., Any]) -> None:
    """Who was gone meanwhile is found when it does."""
    store = watched()
    store.is_silent = True
    with child() as (_, process):
        entry = store.holding("a", process)
    await asyncio.sleep(0.2)
    assert entry().attempts[-1].outcome is None
    store.is_silent = False
    assert await outcome(entry) == "runner_lost"


async def test_those_that_are_gone_together_get_nothing_of_each_other(watched: Callable[..., Any]) -> None:
    """A claim that a dead process was handed goes to no other dead one, but to who lives."""
    store = watched()
    with child() as (_, first), child() as (_, second):
        for name, process in (("first", first), ("second", second)):
            store.holding(name, process)
        os.kill(first.pid, signal.SIGKILL)
        os.kill(second.pid, signal.SIGKILL)
    told: dict[str, Any] = {}
    for name in ("first", "second"):
        session = store.service.state.sessions[name]
        wanted = {"queues": ["default"], "limit": 1, "worker_id": None, "timeout": 60.0}
        store.service.call(session, 2, "dequeue", wanted, lambda ticket, value, name=name: told.setdefault(name, value))
    made = store.service.call(
        store.service.state.sessions["first"], 3, "enqueue",
        {"requests": [{"input": encode("y", "input", 1000), "metadata": None}]}, lambda ticket, value: False,
    )  # fmt: skip
    entry = store.service.state.entries[made[0][0].rollout_id]

    async def ended() -> bool:
        return not store.service.is_live("first") and not store.service.is_live("second")

    await until(ended)
    assert (entry.rollout.status, entry.withdrawals, entry.suspect) == ("queuing", 1, False)
