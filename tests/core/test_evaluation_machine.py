"""Evaluations of the core against a small reference model, under any sequence of operations (hypothesis).

The model looks at all rollouts after each step: what each sample came to, whether an evaluation has ended, and which
kind of work a claim is to be given. Consumers ask for everything, and must be given nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from raystore.core.check import check
from raystore.core.snapshot import restore, sections
from raystore.core.state import State
from raystore.errors import VersionNotFoundError
from tests.core.conftest import Core
from tests.core.test_evaluations import Bench

THRESHOLD, FAILURE = 0.5, -1.0
ENDED = ("succeeded", "failed", "cancelled")
STEPS = 1_000  #: that are looked at, at least
ENDINGS = ("ok", "ok", "agent_error", "infra")


@dataclass
class Model:
    """One evaluation as prose has it."""

    row: dict[str, Any]
    total: int
    samples: int
    share: float
    pin: int | None
    groups: list[str] = field(default_factory=list)
    members: dict[str, str] = field(default_factory=dict)  # group of each
    came_to: dict[str, float | None] = field(default_factory=dict)
    ended: Any = None  # the result at its end
    is_dropped: bool = False

    @property
    def is_whole(self) -> bool:
        return len(self.groups) == self.total and len(self.came_to) == self.total * self.samples


ended_seen: set[str] = set()
steps_checked: list[None] = []


class EvaluationMachine(RuleBasedStateMachine):
    """Operations on evaluations and beside them, and what must be equal."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(Core(max_deliveries=1))
        self.core = self.bench.core
        self.models: list[Model] = []
        self.published = 0
        self.newest: dict[int, int] = {}  # version of the resources by version of the policy
        for unit in ("take", "take_groups"):
            self.core.run(unit, session=self.bench.driver, consumer=unit, count=1)

    # -- the model -----------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Note what has become of samples, and end what is whole."""
        entries = self.core.state.entries
        for model in self.models:
            if model.ended is not None:
                continue
            for rollout_id in model.members:
                entry = entries.get(rollout_id)
                if entry is None:
                    model.came_to.setdefault(rollout_id, None)
                elif entry.rollout.status in ENDED:
                    has = entry.rollout.status == "succeeded"
                    model.came_to[rollout_id] = entry.rollout.reward if has else None
                else:
                    model.came_to.pop(rollout_id, None)
            if model.is_whole or model.is_dropped:
                model.ended = self.expected(model)
                ended_seen.add("dropped" if model.is_dropped else "finished")

    def expected(self, model: Model) -> tuple[Any, ...]:
        """Samples, passed, failed and mean."""
        values = list(model.came_to.values())
        by_group: dict[str, list[float]] = {}
        for rollout_id, value in model.came_to.items():
            by_group.setdefault(model.members[rollout_id], []).append(FAILURE if value is None else value)
        mean = fmean(fmean(one) for one in by_group.values()) if by_group else None
        return len(values), sum(v is not None and v > THRESHOLD for v in values), values.count(None), mean

    def run(self, verb: str, **arguments: Any) -> Any:
        answer = self.core.run(verb, session=self.bench.driver, **arguments)
        self.follow()
        return answer

    def pick(self, number: int, statuses: tuple[str, ...]) -> str | None:
        found = [i for i, entry in self.core.state.entries.items() if entry.rollout.status in statuses]
        return found[number % len(found)] if found else None

    # -- operations ----------------------------------------------------------------------------------------------------

    @rule()
    def publish(self) -> None:
        self.published += 1
        self.newest[self.published] = self.bench.publish(self.published, holds_objects=True, objects=[(None, 1)])

    @rule(total=st.integers(1, 2), samples=st.integers(1, 3), share=st.sampled_from([0.1, 0.5]), back=st.integers(0, 2))
    def begin(self, total: int, samples: int, share: float, back: int) -> None:
        """Pinned to the newest version, or to one that may be freed; its items come at once or in two parts."""
        version = self.published - back if self.published else None
        arguments: dict[str, Any] = {
            "name": f"e{len(self.models)}", "resources_id": "policy", "total": total, "samples": samples,
            "share": share, "threshold": THRESHOLD, "failure_reward": FAILURE,
        }  # fmt: skip
        held = None if version is None else self.newest.get(version)
        is_there = held is not None and self.core.state.resources.is_there("policy", held)
        if version is not None and not is_there:
            with pytest.raises(VersionNotFoundError):
                self.bench.begin(version, **arguments)
            return
        row = self.bench.begin(version, **arguments)
        self.models.append(Model(row, total, samples, share, held if version is not None else None))
        self.add(len(self.models) - 1)

    @rule(number=st.integers(0, 9))
    def add(self, number: int) -> None:
        """Enqueue the next item of an evaluation."""
        if not self.models:
            return
        model = self.models[number % len(self.models)]
        if model.ended is not None or len(model.groups) == model.total:
            return
        before = set(self.core.state.groups.by_id)
        self.bench.add({**model.row, "enqueued": len(model.groups)}, 1)
        (group_id,) = set(self.core.state.groups.by_id) - before
        model.groups.append(group_id)
        for rollout_id in self.core.state.groups.by_id[group_id].members:
            model.members[rollout_id] = group_id
        self.follow()

    @rule(count=st.integers(1, 4))
    def enqueue_other(self, count: int) -> None:
        for _ in range(count):
            self.core.enqueue(mode="val")

    @rule(count=st.integers(1, 4))
    def claim(self, count: int) -> None:
        """Each claim is given what the share says, and what is first of that kind."""
        entries, queues = self.core.state.entries, self.core.state.queues
        known = self.core.state.evaluations.by_rollout
        for _ in range(count):
            waiting = sorted(queues, key=lambda i: entries[i].order or (0, 0))
            mine = [i for i in waiting if i in known]
            others = [i for i in waiting if i not in known]
            runs = [i for i, entry in entries.items() if entry.rollout.status in ("preparing", "running")]
            expected: str | None = next(iter(mine or others), None)
            if mine and others:
                share = next((m.share for m in self.models if mine[0] in m.members and m.ended is None), 0.25)
                is_due = sum(i in known for i in runs) < max(share * (len(runs) + 1), 1)
                expected = mine[0] if is_due else others[0]
            assert self.bench.claim(1) == ([] if expected is None else [expected])
            model = next((m for m in self.models if expected in m.members and m.ended is None), None)
            if model is not None and expected is not None and model.pin is not None:
                assert entries[expected].attempts[-1].resources_version == model.pin
        self.follow()

    @rule(number=st.integers(0, 99), reward=st.sampled_from([None, 0.5, 1.0]), ending=st.sampled_from(ENDINGS))
    def finish(self, number: int, reward: float | None, ending: str) -> None:
        keys = list(self.bench.keys)
        if keys:
            status = "succeeded" if ending == "ok" else "failed"
            self.bench.end(keys[number % len(keys)], reward, status, ending)
            self.follow()

    @rule(number=st.integers(0, 99), how=st.sampled_from(["cancel", "delete", "requeue"]))
    def meddle(self, number: int, how: str) -> None:
        """By hand, whatever it is."""
        rollout_id = self.pick(number, ("failed", "cancelled") if how == "requeue" else ("queuing", "running", *ENDED))
        if rollout_id is None:
            return
        if how == "cancel":
            self.run("cancel_rollouts", rollout_ids=[rollout_id], group_id=None, tags=None)
        elif how == "delete":
            if not self.core.state.entries[rollout_id].is_held:
                self.run("delete_rollouts", rollout_ids=[rollout_id])
        else:
            self.run("requeue", rollout_ids=[rollout_id])
        self.bench.keys = {i: key for i, key in self.bench.keys.items() if i in self.core.state.entries
                           and self.core.status(i) in ("preparing", "running")}  # fmt: skip

    @rule(number=st.integers(0, 9))
    def drop(self, number: int) -> None:
        if not self.models:
            return
        model = self.models[number % len(self.models)]
        model.is_dropped = model.is_dropped or model.ended is None
        if model.is_dropped and model.ended is None:
            model.ended = self.expected(model)
            ended_seen.add("dropped")
        self.run("drop_evaluation", name=model.row["name"], version=None)
        self.bench.keys = {i: k for i, k in self.bench.keys.items() if self.core.status(i) in ("preparing", "running")}

    @rule()
    def look_into_a_snapshot(self) -> None:
        """Another process knows the same."""
        state = State(self.core.state.settings)
        restore(state, list(sections(self.core.state, {})), lambda columns: columns)
        here, there = self.core.state, state
        assert there.evaluations.shown() == here.evaluations.shown()
        assert there.evaluations.active.keys() == here.evaluations.active.keys()
        assert there.evaluations.unfinished.keys() == here.evaluations.unfinished.keys()
        assert sorted(there.queues.orders()) == sorted(here.queues.orders())

    # -- what must be --------------------------------------------------------------------------------------------------

    @invariant()
    def same(self) -> None:
        for model in self.models:
            found = self.bench.result(model.row)
            _, samples, passed, failed, mean, _ = found["overall"]
            expected = self.expected(model) if model.ended is None else model.ended
            assert (samples, passed, failed) == expected[:3], model
            assert (mean is None) == (expected[3] is None) and (mean is None or mean[0] == pytest.approx(expected[3]))
            status = "running" if model.ended is None else "dropped" if model.is_dropped else "finished"
            assert found["status"] == status
        for unit in ("take", "take_groups"):
            known = self.core.state.consumers[unit]
            evaluated = self.core.state.evaluations
            assert not known.awaiting.keys() & evaluated.by_rollout.keys()
            assert not known.groups.keys() & evaluated.by_group.keys()

    @invariant()
    def invariants_hold(self) -> None:
        steps_checked.append(None)
        check(self.core.state)


def test_evaluations_are_as_the_model_says() -> None:
    """Whatever is done to them, in whatever order."""
    options = settings(
        max_examples=60, stateful_step_count=40, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    ended_seen.clear()
    steps_checked.clear()
    while len(steps_checked) < STEPS or ended_seen != {"finished", "dropped"}:
        run_state_machine_as_test(EvaluationMachine, settings=options)
