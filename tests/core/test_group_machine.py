"""Groups of the core against a small reference model, under any sequence of operations (hypothesis).

The model looks at all rollouts after each step and draws the conclusions that prose states, in plain lists. What
rollouts do by themselves is `test_machine`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from raystore.core.check import check
from raystore.core.lifecycle import GROUP_STATUSES
from raystore.errors import BatchConflictError, BatchHeldError, RolloutSucceededError, SealedError
from tests.core.conftest import Core

STATUSES = set(GROUP_STATUSES) - {"filtered", "stale"}  #: those that a group comes to without a feed
FALLEN = ("failed", "dropped", "infra", "cancelled", "gone")
STANDING = ("live", "succeeded")
CONSUMERS: dict[str, dict[str, Any]] = {"all": {}, "trains": {"mode": "train"}}


@dataclass
class ModelGroup:
    id: str
    mode: str | None
    n: int
    min_size: int | None
    spare: int
    replace: int
    deadline: float | None
    places: list[str]
    members: dict[str, str]  # how each stands
    standby: list[str]
    status: str = "open"
    chosen: list[str] = field(default_factory=list)
    replaced: int = 0
    renewed: int = 0

    @property
    def least(self) -> int:
        return self.n if self.min_size is None else self.min_size

    @property
    def has_rule(self) -> bool:
        return bool(self.min_size or self.spare or self.replace or self.deadline)

    @property
    def is_ready(self) -> bool:
        return self.status in ("complete", "trained") and len(self.chosen) >= self.least


@dataclass
class ModelConsumer:
    mode: str | None
    awaiting: list[str] = field(default_factory=list)
    batches: dict[int, list[str]] = field(default_factory=dict)
    open: list[int] = field(default_factory=list)
    steps: dict[int, int] = field(default_factory=dict)
    made: int = 0
    checkpoint: int | None = None
    durable: set[str] = field(default_factory=set)

    def has(self, group_id: str) -> bool:
        return group_id in self.durable or any(group_id in batch for batch in self.batches.values())


steps_checked: list[None] = []
statuses_seen: set[str] = set()


class GroupMachine(RuleBasedStateMachine):
    """Operations on groups, their rollouts and their consumers, and what must be equal."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Core(max_deliveries=1)
        self.session = self.core.open("s")
        self.session.eternal = True
        self.groups: dict[str, ModelGroup] = {}
        self.made_for: dict[str, list[str]] = {}  # rollouts that were requeued beside one that stays as it is
        self.consumers = {name: ModelConsumer(asked.get("mode")) for name, asked in CONSUMERS.items()}
        for name, asked in CONSUMERS.items():
            self.core.run("take_groups", session=self.session, consumer=name, count=1, **asked)

    # -- the model -----------------------------------------------------------------------------------------------------

    def stand(self, rollout_id: str) -> str:
        """How a rollout stands, as it is in the core."""
        entry = self.core.state.entries.get(rollout_id)
        if entry is None:
            return "gone"
        status = entry.rollout.status
        if status not in ("succeeded", "failed", "cancelled"):
            return "live"
        outcome = entry.latest.outcome if entry.latest is not None else None
        if status != "failed":  # whatever its attempt says: it may have succeeded by hand
            return status
        return "dropped" if outcome == "dropped" else "infra" if outcome in ("infra", "runner_lost") else "failed"

    def is_sealed(self, rollout_id: str) -> bool:
        return any(
            consumer.has(group.id)
            for group in self.groups.values()
            if rollout_id in group.chosen
            for consumer in self.consumers.values()
        )

    def is_held(self, rollout_id: str) -> bool:
        held = {i for c in self.consumers.values() for batch in c.batches.values() for i in batch}
        return any(rollout_id in group.chosen and group.id in held for group in self.groups.values())

    def follow(self, *named: str) -> None:
        """Draw the conclusions for all groups from how their members stand now, those that a call `named` above all.

        Others that are cancelled now were cancelled by the end of their group, which is still to be found.
        """
        for group in list(self.groups.values()):
            changed = {
                i: now
                for i, before in group.members.items()
                if (now := self.stand(i)) != before and (now != "cancelled" or i in named)
            }
            group.members |= changed
            for rollout_id, now in changed.items():
                if rollout_id not in group.places:
                    if now not in STANDING and rollout_id in group.standby:
                        group.standby.remove(rollout_id)
                    elif now in STANDING and rollout_id not in group.standby:
                        group.standby.append(rollout_id)
                elif rollout_id in group.chosen and now != "succeeded":
                    self.unchoose(group, rollout_id)
            if group.status == "open":
                self.fill(group, [i for i in group.places if changed.get(i) in FALLEN])
            self.bury(group)
            self.await_(group)

    def unchoose(self, group: ModelGroup, rollout_id: str) -> None:
        is_over = group.deadline is not None and self.core.now > group.deadline
        if group.status == "complete" and len(group.chosen) == group.n and not is_over:
            group.status, group.chosen = "open", []
            self.await_(group)
            return
        group.chosen.remove(rollout_id)
        if group.status == "complete" and len(group.chosen) < group.least:
            group.status = "failed"

    def fill(self, group: ModelGroup, fallen: list[str]) -> None:
        core = self.core.state.groups.by_id.get(group.id)
        new = [i for i in core.members if i not in group.members] if core is not None else []
        before = (group.renewed, group.replaced, list(group.places), list(group.standby))
        lost = []
        for rollout_id in fallen:
            stand = group.members[rollout_id]
            is_free = stand == "infra" and (bool(group.standby) or group.renewed < 1)
            is_paid = stand in ("failed", "infra") and not is_free and group.replaced < group.replace
            if not group.has_rule or not (is_free or is_paid):
                lost.append(stand)
                continue
            group.renewed += is_free and not group.standby
            group.replaced += is_paid
            other = group.standby.pop(0) if group.standby else new.pop(0) if new else "nobody, since it ends"
            group.places[group.places.index(rollout_id)] = other
        if lost:  # then nobody is replaced
            group.renewed, group.replaced, group.places, group.standby = before
        for rollout_id in group.places:
            group.members.setdefault(rollout_id, "live")
        done = [i for i in group.places if group.members[i] == "succeeded"]
        if lost and len(done) < group.least:
            self.close(group, "cancelled" if {"cancelled", "gone"} & set(lost) else "failed", [])
        elif lost or len(done) == group.n:
            self.close(group, "complete", done)
        assert not new, "a member that nobody asked for"

    def close(self, group: ModelGroup, status: str, chosen: list[str]) -> None:
        group.status, group.chosen = status, chosen
        for rollout_id, stand in group.members.items():
            if stand == "live" and group.has_rule:
                group.members[rollout_id] = "cancelled"
        group.standby = [i for i in group.standby if group.members[i] in STANDING]

    def bury(self, group: ModelGroup) -> None:
        for rollout_id in [i for i, stand in group.members.items() if stand == "gone"]:
            del group.members[rollout_id]
        if not group.members:
            del self.groups[group.id]

    def await_(self, group: ModelGroup) -> None:
        for consumer in self.consumers.values():
            is_asked = consumer.mode in (None, group.mode) and group.id in self.groups
            if is_asked and group.is_ready and not consumer.has(group.id):
                if group.id not in consumer.awaiting:
                    consumer.awaiting.append(group.id)
            elif group.id in consumer.awaiting:
                consumer.awaiting.remove(group.id)

    def is_trained(self, group_id: str) -> bool:
        """Whether a step of anybody has consumed a group, and that still holds."""
        return any(
            group_id in consumer.durable or any(group_id in consumer.batches[batch] for batch in consumer.steps)
            for consumer in self.consumers.values()
        )

    def give_back(self, consumer: ModelConsumer, batches: list[int]) -> None:
        back = [group_id for batch in sorted(batches) for group_id in consumer.batches.pop(batch)]
        for batch in batches:
            consumer.steps.pop(batch, None)
            if batch in consumer.open:
                consumer.open.remove(batch)
        for group_id in back:
            if not self.is_trained(group_id):
                self.groups[group_id].status = "complete"
        consumer.awaiting = back + consumer.awaiting

    # -- operations ----------------------------------------------------------------------------------------------------

    def run(self, verb: str, **arguments: Any) -> Any:
        answer = self.core.run(verb, session=self.session, **arguments)
        self.follow(arguments.get("rollout_id", ""), *(arguments.get("rollout_ids") or ()))
        return answer

    def pick(self, number: int, *, is_live: bool = False) -> str | None:
        """A rollout of some group; one that has not ended, if it is to be and there is one."""
        everything = list(self.core.state.entries)
        if is_live:
            everything = [i for i in everything if self.stand(i) == "live"] or everything
        return everything[number % len(everything)] if everything else None

    @rule(
        n=st.integers(1, 3), least=st.integers(1, 3), spare=st.integers(0, 1), replace=st.integers(0, 1),
        deadline=st.sampled_from([None, None, 10.0, 30.0]), mode=st.sampled_from([None, "train"]),
        timeout=st.sampled_from([None, 5.0]),
    )  # fmt: skip
    def enqueue(self, n: int, least: int, spare: int, replace: int, deadline: Any, mode: Any, timeout: Any) -> None:
        min_size = least if 2 <= least <= n else None
        member = {"input": b"x", "metadata": None, "mode": mode, "config": [timeout, None, 1, []]}
        request = {
            "member": member, "n": n, "min_size": min_size, "spare": spare, "replace": replace,
            "deadline_seconds": deadline,
        }  # fmt: skip
        (made,) = self.run("enqueue_groups", groups=[request], gives="groups")
        due = None if deadline is None else self.core.now + deadline
        ids = made.members
        self.groups[made.group_id] = ModelGroup(
            made.group_id, mode, n, min_size, spare, replace, due, ids[:n], dict.fromkeys(ids, "live"), ids[n:]
        )

    @rule(number=st.integers(0, 99), ending=st.sampled_from(["succeeded"] * 4 + ["failed", "infra", "dropped", ""]))
    def work(self, number: int, ending: str) -> None:
        rollout_id = self.pick(number, is_live=number < 90)
        if rollout_id is None or self.is_sealed(rollout_id):
            return
        _, attempt = self.run("start_attempt", rollout_id=rollout_id, worker_id=None)
        if not ending or self.stand(rollout_id) != "live":
            return
        key = {"rollout_id": rollout_id, "attempt_id": attempt.attempt_id, "spans": []}
        outcome = {"outcome": ending} if ending in ("infra", "dropped") else {}
        self.run("finish", **key, changes={"status": "succeeded" if ending == "succeeded" else "failed", **outcome})

    @rule(number=st.integers(0, 99))
    def finish(self, number: int) -> None:
        """All members of a group succeed that have not ended, as far as that is asked of them."""
        groups = list(self.groups.values())
        for rollout_id in list(groups[number % len(groups)].members) if groups else ():
            if self.stand(rollout_id) == "live":
                self.run("update_rollout", rollout_id=rollout_id, changes={"status": "succeeded"})

    @rule(number=st.integers(0, 99), status=st.sampled_from(["queuing", "failed", "succeeded", "cancelled"]))
    def update(self, number: int, status: str) -> None:
        rollout_id = self.pick(number)
        if rollout_id is None:
            return
        if self.is_sealed(rollout_id):
            with pytest.raises(SealedError):
                self.run("update_rollout", rollout_id=rollout_id, changes={"status": status})
            return
        self.run("update_rollout", rollout_id=rollout_id, changes={"status": status})

    @rule(number=st.integers(0, 99))
    def requeue(self, number: int) -> None:
        """What has ended waits again in an open group; beside one that has ended, another rollout does."""
        rollout_id = self.pick(number)
        if rollout_id is None:
            return
        if self.core.status(rollout_id) == "succeeded":
            with pytest.raises(RolloutSucceededError):
                self.run("requeue", rollout_ids=[rollout_id])
            return
        newest, entries = rollout_id, self.core.state.entries
        while self.core.status(newest) in ("failed", "cancelled"):
            there = [made for made in self.made_for.get(newest, ()) if made in entries]
            if not there:
                break
            newest = there[-1]
        status = self.core.status(newest)
        group = next((group for group in self.groups.values() if newest in group.members), None)
        is_fixed = group is not None and group.status != "open" and status in ("failed", "cancelled")
        ((made, _),) = self.run("requeue", rollout_ids=[rollout_id])
        assert (made.rollout_id != newest) == is_fixed
        if is_fixed:
            self.made_for.setdefault(newest, []).append(made.rollout_id)
            assert made.group_id is None and made.requeued_from == newest
        assert made.status not in ("failed", "cancelled")
        assert self.core.status(newest) == (status if is_fixed else made.status)

    @rule(number=st.integers(0, 99))
    def delete(self, number: int) -> None:
        rollout_id = self.pick(number)
        if rollout_id is None:
            return
        if self.is_held(rollout_id):
            with pytest.raises(SealedError):
                self.run("delete_rollouts", rollout_ids=[rollout_id])
            return
        self.run("delete_rollouts", rollout_ids=[rollout_id])

    @rule(number=st.integers(0, 99), whole=st.booleans())
    def cancel(self, number: int, whole: bool) -> None:
        if not whole:
            if (rollout_id := self.pick(number)) is not None:
                self.run("cancel_rollouts", rollout_ids=[rollout_id], group_id=None, tags=None)
            return
        if not self.groups:
            return
        group = list(self.groups.values())[number % len(self.groups)]
        for rollout_id in [i for i, stand in group.members.items() if stand == "live"]:
            group.members[rollout_id] = "cancelled"
        group.standby = [i for i in group.standby if group.members[i] in STANDING]
        if group.status == "open":
            self.close(group, "cancelled", [])
        self.run("cancel_rollouts", rollout_ids=None, group_id=group.id, tags=None)

    @rule(name=st.sampled_from(list(CONSUMERS)), count=st.integers(1, 3), max_open=st.integers(1, 2))
    def take(self, name: str, count: int, max_open: int) -> None:
        self.take_now(name, count, max_open)

    def take_now(self, name: str, count: int, max_open: int) -> None:
        consumer = self.consumers[name]
        arguments = {"consumer": name, "count": count, "max_open": max_open}
        if len(consumer.open) >= max_open:
            with pytest.raises(BatchHeldError):
                self.run("take_groups", **arguments)
            return
        items, number = self.run("take_groups", **arguments)
        chosen = consumer.awaiting[:count]
        given = [item.group_id if not isinstance(item, tuple) else item[0].rollout_id for item in items]
        assert given == [i for group_id in chosen for i in (group_id, *self.groups[group_id].chosen)]
        if not chosen:
            assert number == 0
            return
        for group_id in chosen:
            assert len(self.groups[group_id].chosen) >= self.groups[group_id].least and not consumer.has(group_id)
        del consumer.awaiting[:count]
        consumer.made += 1
        consumer.batches[number] = chosen
        consumer.open.append(number)
        self.core.acknowledge(self.session, [(name, number)])

    @rule(name=st.sampled_from(list(CONSUMERS)), first=st.booleans(), further=st.integers(0, 2))
    def ack(self, name: str, first: bool, further: int) -> None:
        consumer = self.consumers[name]
        if not consumer.open:
            self.take_now(name, 2, 1)
        if not consumer.open:
            return
        batch = consumer.open[0 if first else -1]
        step = max([*consumer.steps.values(), (consumer.checkpoint or 0) + 1]) + further
        self.run("ack", consumer=name, batch=batch, at_step=step, note=None)
        consumer.open.remove(batch)
        consumer.steps[batch] = step
        for group_id in consumer.batches[batch]:
            self.groups[group_id].status = "trained"

    @rule(name=st.sampled_from(list(CONSUMERS)))
    def nack(self, name: str) -> None:
        consumer = self.consumers[name]
        if consumer.open:
            batch = consumer.open[-1]
            self.run("nack", consumer=name, batch=batch)
            self.give_back(consumer, [batch])

    @rule(name=st.sampled_from(list(CONSUMERS)), step=st.integers(0, 6), back=st.booleans())
    def checkpoint_or_rewind(self, name: str, step: int, back: bool) -> None:
        consumer, verb = self.consumers[name], "rewind" if back else "checkpoint"
        if consumer.checkpoint is not None and step < consumer.checkpoint:
            with pytest.raises(BatchConflictError):
                self.run(verb, consumer=name, at_step=step)
            return
        self.run(verb, consumer=name, at_step=step)
        if back:
            self.give_back(consumer, [b for b in consumer.batches if b in consumer.open or consumer.steps[b] > step])
            return
        consumer.checkpoint = step
        for batch in [b for b, consumed in consumer.steps.items() if consumed <= step]:
            del consumer.steps[batch]
            consumer.durable.update(consumer.batches.pop(batch))

    @rule(seconds=st.sampled_from([1.0, 4.0, 8.0]))
    def tick(self, seconds: float) -> None:
        self.core.tick(seconds)
        before = {name: list(consumer.awaiting) for name, consumer in self.consumers.items()}
        overdue = [
            group for group in self.groups.values()
            if group.status == "open" and group.deadline is not None and self.core.now > group.deadline
        ]  # fmt: skip
        for group in overdue:  # what they have is what they had: a tick lets nobody succeed
            done = [i for i in group.places if group.members[i] == "succeeded"]
            self.close(
                group, "complete" if len(done) >= group.least else "failed", done if len(done) >= group.least else []
            )
        self.follow()
        for name, consumer in self.consumers.items():  # several at once come in an order of their own
            order = list(self.core.state.consumers[name].groups)
            assert set(order) == set(consumer.awaiting)
            new = sorted(set(order) - set(before[name]), key=order.index)
            consumer.awaiting = [i for i in before[name] if i in order] + new

    # -- what must be --------------------------------------------------------------------------------------------------

    @invariant()
    def same(self) -> None:
        table = self.core.state.groups
        assert table.by_id.keys() == self.groups.keys()
        for group in self.groups.values():
            known = table.by_id[group.id]
            assert (known.status, list(known.chosen)) == (group.status, group.chosen), group
            assert {i: self.stand(i) for i in known.members} == group.members
            assert list(known.spares) == group.standby
            if group.status == "open":
                assert known.in_place == group.places
            statuses_seen.add(group.status)
        for name, consumer in self.consumers.items():
            there = self.core.state.consumers[name]
            assert list(there.groups) == consumer.awaiting
            assert (list(there.holders), there.grouped) == (consumer.open, consumer.batches)

    @invariant()
    def sound(self) -> None:
        steps_checked.append(None)
        state = self.core.state
        check(state)
        for rollout_id, entry in state.entries.items():
            is_member = state.groups.of(entry.rollout) is not None
            assert is_member == (entry.rollout.requeued_from is None), f"{rollout_id} should be in a group, or in none"
        for known in state.consumers.values():
            taken = [rollout_id for batch in known.batches.values() for rollout_id in batch]
            assert len(taken) == len(set(taken)), "a rollout is in two batches"


def run(examples: int, steps: int) -> None:
    """Run the machine for up to `examples` times `steps` operations."""
    options = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(GroupMachine, settings=options)


@pytest.mark.fault
@pytest.mark.timeout(3000)
def test_groups_and_their_model_agree(report: Callable[..., None], amount: Callable[[int, int], int]) -> None:
    """Random calls, after each of which everything is compared; a divergence comes with the shortest way to it."""
    steps_checked.clear()
    statuses_seen.clear()
    while len(steps_checked) < amount(2_500, 1_000_000) or statuses_seen != STATUSES:
        run(examples=amount(100, 500), steps=amount(50, 100))
    report(1, "random calls of groups against a model", figure={"divergences": 0}, bar="0", met=True,
           did=f"{len(steps_checked)} steps")  # fmt: skip
