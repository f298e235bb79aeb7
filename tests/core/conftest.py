"""The pure core on a fake clock; every invariant is checked after each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from raystore.core import check, expiry, feeds, retention, verbs
from raystore.core.claims import open_session, take_back
from raystore.core.state import HandedKey, Session, Settings, State, Step


class Core:
    """A state with a clock, in the words of the tests."""

    def __init__(self, **settings: Any) -> None:
        options = {"eviction_bytes": 10**9, "safe_bytes": 10**8, **settings}
        self.state = State(Settings(**options))
        self.now = 1000.0
        self.seed = 0

    def step(self, session: Session | None = None) -> Step:
        self.seed += 1
        return Step(self.now, self.now, self.seed, session)

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.advance(self.step())

    def advance(self, step: Step) -> None:
        verbs.STEPS["advance"](self.state, step, *expiry.due(self.state, step).lists())

    def run(self, verb: str, *, session: Session | None = None, **arguments: Any) -> Any:
        step = self.step(session)
        self.advance(step)
        answer = verbs.run(self.state, step, verb, arguments)
        retention.relieve_memory(self.state, step, arguments.get("rollout_id"))
        return answer

    def open(self, name: str) -> Session:
        return open_session(self.state, self.step(), name)

    def enqueue(self, task: str = "x", **request: Any) -> str:
        ((rollout, _),) = self.run("enqueue", requests=[{"input": task.encode(), "metadata": None, **request}])
        rollout_id: str = rollout.rollout_id
        return rollout_id

    def claim(self, session: Session, limit: int = 1, worker_id: str | None = None) -> list[tuple[str, str]]:
        got = self.run("dequeue", session=session, queues=["default"], limit=limit, worker_id=worker_id)
        return [(rollout.rollout_id, attempt.attempt_id) for rollout, attempt, _ in got]

    def acknowledge(self, session: Session, keys: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        lost: list[tuple[str, Any]] = verbs.STEPS["acknowledge"](
            self.state, self.step(session), session.session_id, keys
        )
        return lost

    def hold(self, session: Session, limit: int = 1) -> list[tuple[str, str]]:
        keys = self.claim(session, limit)
        assert self.acknowledge(session, keys) == []
        return keys

    def decline(self, session: Session, key: HandedKey) -> bool:
        step = self.step(session)
        was_there = take_back(self.state, step, session, key, why="declined")
        feeds.settle(self.state, step)
        return was_there

    def end(self, session: Session) -> None:
        verbs.STEPS["end_session"](self.state, self.step(), session.session_id, "test")

    def report(self, key: tuple[str, str], status: str, session: Session | None = None) -> Any:
        return self.run(
            "update_attempt", session=session, rollout_id=key[0], attempt_id=key[1], changes={"status": status}
        )

    def finish(self, key: tuple[str, str], status: str, outcome: str, session: Session | None = None) -> Any:
        changes = {"status": status, "outcome": outcome}
        return self.run("finish", session=session, rollout_id=key[0], attempt_id=key[1], spans=[], changes=changes)

    def status(self, rollout_id: str) -> str:
        return self.state.entries[rollout_id].rollout.status

    def outcomes(self, rollout_id: str) -> list[str | None]:
        return [attempt.outcome for attempt in self.state.entries[rollout_id].attempts]


@pytest.fixture
def make_core() -> Iterator[Callable[..., Core]]:
    """Makes cores with any settings."""
    made: list[Core] = []

    def make(**settings: Any) -> Core:
        made.append(Core(**settings))
        return made[-1]

    yield make
    for core in made:
        check.check(core.state)


@pytest.fixture
def core(make_core: Callable[..., Core]) -> Core:
    """A core with default settings."""
    return make_core()
