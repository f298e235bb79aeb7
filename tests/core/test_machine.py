"""The core against a small reference model, under any sequence of operations (hypothesis).

The model knows the rules as prose states them, keeps everything in plain lists and scans; after each step both must
show the same, and every invariant of the core must hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from raystore.core.check import check
from raystore.core.queues import Order
from raystore.core.saved import spans_of
from raystore.errors import AttemptOverError, BatchConflictError, BatchHeldError, RolloutSucceededError, SealedError
from tests.core.conftest import Core

ACTIVE = ("preparing", "running")
QUEUED = ("queuing", "requeuing")
FINISHED = ("failed", "succeeded", "cancelled")


@dataclass
class ModelAttempt:
    id: str
    status: str
    start: float
    beat: float | None = None
    superseded: bool = False
    cancelled: bool = False
    spans: list[str] = field(default_factory=list)  # with those that it took over


@dataclass
class ModelSaved:
    """What an attempt saved, and the spans that it had then."""

    attempt_id: str
    value: bytes
    spans: list[str]


@dataclass
class ModelRollout:
    id: str
    priority: int
    timeout: float | None
    silence: float | None
    max_attempts: int
    retry: list[str]
    status: str = "queuing"
    place: tuple[int, int] = (0, 0)
    former: str = "queuing"
    attempts: list[ModelAttempt] = field(default_factory=list)
    rules: dict[str, tuple[int, float]] = field(default_factory=dict)  # retries and first delay by status
    until: float | None = None  # it backs off
    forgiven: int = 0
    requeued_from: str | None = None
    saved: ModelSaved | None = None

    def counted(self) -> list[ModelAttempt]:
        return [attempt for attempt in self.attempts[self.forgiven :] if not attempt.cancelled]


@dataclass
class ModelConsumer:
    """One that takes what has these statuses."""

    statuses: tuple[str, ...]
    awaiting: list[str] = field(default_factory=list)
    batches: dict[int, list[str]] = field(default_factory=dict)
    open: list[int] = field(default_factory=list)
    steps: dict[int, int] = field(default_factory=dict)
    made: int = 0
    checkpoint: int | None = None
    durable: set[str] = field(default_factory=set)

    def holds(self, rollout_id: str) -> bool:
        return any(rollout_id in batch for batch in self.batches.values())

    def has_taken(self, rollout_id: str) -> bool:
        return rollout_id in self.durable or self.holds(rollout_id)

    def give_back(self, batches: list[int]) -> None:
        back = [rollout_id for batch in sorted(batches) for rollout_id in self.batches.pop(batch)]
        for batch in batches:
            self.steps.pop(batch, None)
            if batch in self.open:
                self.open.remove(batch)
        self.awaiting = back + self.awaiting


class Model:
    """What the contract says, the slow way."""

    def __init__(self) -> None:
        self.rollouts: dict[str, ModelRollout] = {}
        self.now = 0.0
        self.arrivals = 0
        self.completions: list[str] = []
        self.consumers = {"c": ModelConsumer(("succeeded",)), "d": ModelConsumer(("failed", "succeeded"))}

    def is_sealed(self, rollout_id: str) -> bool:
        return any(consumer.has_taken(rollout_id) for consumer in self.consumers.values())

    def is_held(self, rollout_id: str) -> bool:
        return any(consumer.holds(rollout_id) for consumer in self.consumers.values())

    def queue(self) -> list[str]:
        waiting = [r for r in self.rollouts.values() if r.status in QUEUED]
        return [r.id for r in sorted(waiting, key=lambda r: r.place)]

    def offered(self) -> list[str]:
        return [i for i in self.queue() if self.rollouts[i].until is None]

    def to_tail(self, rollout: ModelRollout) -> None:
        self.arrivals += 1
        rollout.place = (-rollout.priority, self.arrivals)

    def move(self, rollout: ModelRollout, status: str) -> None:
        if status in QUEUED and rollout.status not in QUEUED:
            self.to_tail(rollout)
        if rollout.id in self.completions and (status in FINISHED or rollout.status in FINISHED):
            self.completions.remove(rollout.id)
        if status in FINISHED:
            self.completions.append(rollout.id)
        rollout.status = status
        rollout.until = None
        if status in ("succeeded", "cancelled"):
            rollout.saved = None
        for consumer in self.consumers.values():
            if rollout.id in consumer.awaiting:
                consumer.awaiting.remove(rollout.id)
            if status in consumer.statuses and not consumer.has_taken(rollout.id):
                consumer.awaiting.append(rollout.id)

    def follow(self, rollout: ModelRollout) -> None:
        if rollout.status == "cancelled" or self.is_sealed(rollout.id):
            return
        ended = status = rollout.attempts[-1].status
        used = [attempt.status for attempt in rollout.counted()].count(ended)
        if ended in rollout.rules:
            status = "requeuing" if used <= rollout.rules[ended][0] else "failed"
        elif ended in ("failed", "timeout", "unresponsive"):
            cancelled = sum(attempt.cancelled for attempt in rollout.attempts[rollout.forgiven :])
            charged = sum(attempt.status not in rollout.rules for attempt in rollout.counted()) + cancelled
            again = ended in rollout.retry and charged < rollout.max_attempts
            status = "requeuing" if again else "failed"
        if status == "failed" and rollout.status in QUEUED and len(rollout.attempts) <= rollout.forgiven:
            return
        if status != rollout.status:
            is_waiting = rollout.status in QUEUED  # since somebody queued it by hand
            self.move(rollout, status)
            if status == "requeuing" and ended in rollout.rules and rollout.rules[ended][1] and not is_waiting:
                rollout.until = self.now + rollout.rules[ended][1] * 2 ** (max(used, 1) - 1)

    def newest(self, rollout: ModelRollout) -> ModelRollout:
        while rollout.status in ("failed", "cancelled"):
            successor = [r for r in self.rollouts.values() if r.requeued_from == rollout.id]
            if not successor:
                break
            rollout = successor[-1]
        return rollout

    def requeue(self, rollout: ModelRollout, made: str) -> ModelRollout:
        """What stands for a rollout that has ended; `made` is the id of a new one, if there must be one."""
        if self.is_sealed(rollout.id):
            new = ModelRollout(
                made, rollout.priority, rollout.timeout, rollout.silence, rollout.max_attempts, rollout.retry,
                rules=rollout.rules, requeued_from=rollout.id,
            )  # fmt: skip
            self.rollouts[made] = new
            self.to_tail(new)
            return new
        rollout.forgiven = len(rollout.attempts)
        self.move(rollout, "requeuing")
        return rollout

    def advance(self, now: float) -> None:
        self.now = now
        for rollout in self.rollouts.values():
            if rollout.until is not None and now > rollout.until:
                rollout.until = None
            attempt = rollout.attempts[-1] if rollout.attempts else None
            if rollout.status not in ACTIVE or attempt is None or attempt.status not in ACTIVE:
                continue
            beat = attempt.start if attempt.beat is None else attempt.beat
            if rollout.timeout is not None and now - attempt.start > rollout.timeout:
                attempt.status = "timeout"
            elif rollout.silence is not None and now - beat > rollout.silence:
                attempt.status = "unresponsive"
            else:
                continue
            self.follow(rollout)


steps_checked: list[None] = []


class Machine(RuleBasedStateMachine):
    """Operations on both, and what must be equal."""

    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.core = Core()
        self.model = Model()
        self.session = self.core.open("s")
        self.session.eternal = True
        for name, consumer in self.model.consumers.items():
            self.core.run("take", session=self.session, consumer=name, count=1, status_in=list(consumer.statuses))

    def _catch_up(self) -> None:
        """Every operation sees what has become due before it, and so does one that the rules then do not ask for."""
        self.core.tick(0)
        self.model.advance(self.core.now)

    def _known(self, key: tuple[str, str]) -> ModelAttempt | None:
        rollout = self.model.rollouts.get(key[0])
        return next((a for a in rollout.attempts if a.id == key[1]), None) if rollout else None

    def _pick(self, number: int) -> ModelRollout | None:
        everything = list(self.model.rollouts.values())
        return everything[number % len(everything)] if everything else None

    def _begin(self, rollout: ModelRollout, attempt_id: str) -> tuple[str, str]:
        spans = list(rollout.saved.spans) if rollout.saved is not None else []
        rollout.attempts.append(ModelAttempt(attempt_id, "preparing", self.core.now, spans=spans))
        rollout.former = rollout.status
        self.model.move(rollout, "preparing")
        return rollout.id, attempt_id

    @rule(
        priority=st.integers(-1, 1),
        timeout=st.sampled_from([None, 5.0, 20.0]),
        silence=st.sampled_from([None, 3.0]),
        max_attempts=st.integers(1, 3),
        retry=st.lists(st.sampled_from(["failed", "timeout", "unresponsive"]), unique=True),
        rules=st.dictionaries(
            st.sampled_from(["failed", "timeout", "unresponsive"]),
            st.tuples(st.integers(0, 2), st.sampled_from([0.0, 2.0, 10.0])),
            max_size=2,
        ),
    )
    def enqueue(self, priority: Any, timeout: Any, silence: Any, max_attempts: Any, retry: Any, rules: Any) -> None:
        self._catch_up()
        config = [timeout, silence, max_attempts, retry]
        rows = [["agent_error" if s == "failed" else s, *of_one, 2.0, None, 0.0] for s, of_one in rules.items()]
        rollout_id = self.core.enqueue(priority=priority, config=[*config, rows] if rows else config)
        rollout = ModelRollout(rollout_id, priority, timeout, silence, max_attempts, retry, rules=rules)
        self.model.rollouts[rollout_id] = rollout
        self.model.to_tail(rollout)

    @rule(target=attempts, limit=st.integers(1, 3), acknowledge=st.booleans())
    def claim(self, limit: Any, acknowledge: Any) -> Any:
        self._catch_up()
        expected = self.model.offered()[:limit]
        keys = self.core.claim(self.session, limit)
        assert [rollout_id for rollout_id, _ in keys] == expected
        for rollout_id, attempt_id in keys:
            self._begin(self.model.rollouts[rollout_id], attempt_id)
        if acknowledge:
            self.core.acknowledge(self.session, keys)
            return multiple(*keys)
        for key in reversed(keys):
            assert self.core.decline(self.session, key)
            rollout = self.model.rollouts[key[0]]
            rollout.attempts.pop()
            rollout.status = rollout.former
            rollout.forgiven = min(rollout.forgiven, len(rollout.attempts))
        return multiple()

    @rule(target=attempts, number=st.integers(0, 99))
    def start_attempt(self, number: Any) -> Any:
        self._catch_up()
        rollout = self._pick(number)
        if rollout is None:
            return multiple()
        if self.model.is_sealed(rollout.id):
            with pytest.raises(SealedError):
                self.core.run("start_attempt", session=self.session, rollout_id=rollout.id, worker_id=None)
            return multiple()
        _, attempt = self.core.run("start_attempt", session=self.session, rollout_id=rollout.id, worker_id=None)
        return self._begin(rollout, attempt.attempt_id)

    @rule(
        key=attempts, status=st.sampled_from(["preparing", "running", "failed", "succeeded", "unresponsive", "timeout"])
    )
    def report(self, key: Any, status: Any) -> None:
        attempt = self._known(key)
        if attempt is None:
            return
        self._catch_up()
        self.core.report(key, status, self.session)
        attempt.status, attempt.cancelled = status, False
        rollout = self.model.rollouts[key[0]]
        if rollout.attempts[-1] is attempt:
            self.model.follow(rollout)

    @rule(key=attempts)
    def span(self, key: Any) -> None:
        attempt = self._known(key)
        if attempt is None:
            return
        self._catch_up()
        row = self._span_of(attempt)
        self.core.run("add_spans", session=self.session, rollout_id=key[0], attempt_id=key[1], spans=[row])
        self._lives(key, attempt)

    def _span_of(self, attempt: ModelAttempt) -> list[Any]:
        attempt.spans.append(f"s{self.core.seed}")
        return [-1, attempt.spans[-1], "t", None, "n", None, None, None, b"\x01", -1]

    @rule(key=attempts, value=st.sampled_from([None, b"\x01a", b"\x01bc"]), with_span=st.booleans())
    def save(self, key: Any, value: Any, with_span: Any) -> None:
        attempt = self._known(key)
        if attempt is None:
            return
        self._catch_up()
        rollout = self.model.rollouts[key[0]]
        of_it: dict[str, Any] = {"rollout_id": key[0], "attempt_id": key[1]}
        is_over = attempt.status in ("failed", "succeeded", "timeout") or rollout.status in FINISHED
        if is_over or rollout.attempts[-1] is not attempt:
            for verb, more in (("save", {"saved_state": value, "spans": []}), ("get_saved", {})):
                with pytest.raises(AttemptOverError):
                    self.core.run(verb, session=self.session, **of_it, **more)
            return
        spans = [self._span_of(attempt)] if with_span else []
        self.core.run("save", session=self.session, **of_it, saved_state=value, spans=spans)
        self._lives(key, attempt)
        if value is not None:
            rollout.saved = ModelSaved(attempt.id, value, list(attempt.spans))
        elif rollout.saved is not None or self.core.state.entries[key[0]].marks:
            rollout.saved = None
            own = {span.span_id for span in self.core.state.spans.of(*key)}
            attempt.spans = [span for span in attempt.spans if span in own]
        assert self.core.run("get_saved", session=self.session, **of_it) == (rollout.saved and rollout.saved.value)

    def _lives(self, key: tuple[str, str], attempt: ModelAttempt) -> None:
        attempt.beat = self.core.now
        if attempt.status in ("preparing", "unresponsive"):
            attempt.status = "running"
        rollout = self.model.rollouts[key[0]]
        waits = rollout.status in (*QUEUED, "preparing")
        if rollout.attempts[-1] is attempt and attempt.status == "running" and waits:
            self.model.move(rollout, "running")

    @rule(number=st.integers(0, 99), status=st.sampled_from([*QUEUED, *ACTIVE, *FINISHED]))
    def update_rollout(self, number: Any, status: Any) -> None:
        self._catch_up()
        rollout = self._pick(number)
        if rollout is None:
            return
        if self.model.is_sealed(rollout.id):
            with pytest.raises(SealedError):
                self.core.run("update_rollout", rollout_id=rollout.id, changes={"status": status})
            return
        self.core.run("update_rollout", rollout_id=rollout.id, changes={"status": status})
        self.model.move(rollout, status)  # which ends a backoff

    @rule(number=st.integers(0, 99))
    def cancel(self, number: Any) -> None:
        self._catch_up()
        rollout = self._pick(number)
        if rollout is None:
            return
        self.core.run("cancel_rollouts", rollout_ids=[rollout.id], group_id=None, tags=None)
        if rollout.status in FINISHED:
            return
        if rollout.status in ACTIVE and rollout.attempts and rollout.attempts[-1].status in ACTIVE:
            rollout.attempts[-1].status, rollout.attempts[-1].cancelled = "failed", True
        self.model.move(rollout, "cancelled")

    @rule(numbers=st.lists(st.integers(0, 99), min_size=1, max_size=3))
    def requeue(self, numbers: Any) -> None:
        self._catch_up()
        rollouts = [rollout for rollout in map(self._pick, numbers) if rollout is not None]
        ids = [rollout.id for rollout in rollouts]
        if any(rollout.status == "succeeded" for rollout in rollouts):
            with pytest.raises(RolloutSucceededError):
                self.core.run("requeue", session=self.session, rollout_ids=ids)
            return
        pairs = self.core.run("requeue", session=self.session, rollout_ids=ids)
        newest = [self.model.newest(rollout) for rollout in rollouts]
        done: dict[str, str] = {}
        for rollout, (made, _) in zip(newest, pairs, strict=True):
            if rollout.id not in done:
                has_ended = rollout.status in ("failed", "cancelled")
                done[rollout.id] = self.model.requeue(rollout, made.rollout_id).id if has_ended else rollout.id
            assert made.rollout_id == done[rollout.id]

    @rule(number=st.integers(0, 99))
    def delete(self, number: Any) -> None:
        self._catch_up()
        rollout = self._pick(number)
        if rollout is None:
            return
        if self.model.is_held(rollout.id):
            with pytest.raises(SealedError):
                self.core.run("delete_rollouts", rollout_ids=[rollout.id])
            return
        self.core.run("delete_rollouts", rollout_ids=[rollout.id])
        del self.model.rollouts[rollout.id]
        if rollout.id in self.model.completions:
            self.model.completions.remove(rollout.id)
        for consumer in self.model.consumers.values():
            consumer.durable.discard(rollout.id)
            if rollout.id in consumer.awaiting:
                consumer.awaiting.remove(rollout.id)

    @rule(name=st.sampled_from("cd"), count=st.integers(1, 3), max_open=st.integers(1, 2))
    def take(self, name: Any, count: Any, max_open: Any) -> None:
        self._catch_up()
        consumer = self.model.consumers[name]
        arguments = {"consumer": name, "count": count, "max_open": max_open, "status_in": list(consumer.statuses)}
        if len(consumer.open) >= max_open:
            with pytest.raises(BatchHeldError):
                self.core.run("take", session=self.session, **arguments)
            return
        pairs, number = self.core.run("take", session=self.session, **arguments)
        chosen = consumer.awaiting[:count]
        assert [rollout.rollout_id for rollout, _ in pairs] == chosen
        if not chosen:
            assert number == 0
            return
        del consumer.awaiting[:count]
        consumer.made += 1
        assert number == consumer.made
        consumer.batches[number] = chosen
        consumer.open.append(number)
        self.core.acknowledge(self.session, [(name, number)])

    @rule(name=st.sampled_from("cd"), first=st.booleans(), further=st.integers(-1, 2))
    def ack(self, name: Any, first: Any, further: Any) -> None:
        self._catch_up()
        consumer = self.model.consumers[name]
        if not consumer.open:
            return
        batch = consumer.open[0 if first else -1]
        newest = max(consumer.steps.values(), default=consumer.checkpoint or 0)
        step = max(newest + further, 0)
        call = {"consumer": name, "batch": batch, "at_step": step, "note": None}
        is_late = consumer.checkpoint is not None and step <= consumer.checkpoint
        if is_late or step < max(consumer.steps.values(), default=step):
            with pytest.raises(BatchConflictError):
                self.core.run("ack", session=self.session, **call)
            return
        self.core.run("ack", session=self.session, **call)
        consumer.open.remove(batch)
        consumer.steps[batch] = step

    @rule(name=st.sampled_from("cd"))
    def nack(self, name: Any) -> None:
        self._catch_up()
        consumer = self.model.consumers[name]
        if consumer.open:
            batch = consumer.open[-1]
            self.core.run("nack", session=self.session, consumer=name, batch=batch)
            consumer.give_back([batch])

    @rule(name=st.sampled_from("cd"), step=st.integers(0, 4), back=st.booleans())
    def checkpoint_or_rewind(self, name: Any, step: Any, back: Any) -> None:
        self._catch_up()
        consumer = self.model.consumers[name]
        call = ("rewind" if back else "checkpoint", {"consumer": name, "at_step": step})
        if consumer.checkpoint is not None and step < consumer.checkpoint:
            with pytest.raises(BatchConflictError):
                self.core.run(call[0], session=self.session, **call[1])
            return
        self.core.run(call[0], session=self.session, **call[1])
        if back:
            consumer.give_back([b for b in consumer.batches if b in consumer.open or consumer.steps[b] > step])
            return
        consumer.checkpoint = step
        for batch in [b for b, consumed in consumer.steps.items() if consumed <= step]:
            del consumer.steps[batch]
            consumer.durable.update(consumer.batches.pop(batch))

    @rule(seconds=st.sampled_from([0.5, 2.0, 4.0, 30.0]))
    def tick(self, seconds: Any) -> None:
        # Several deadlines within one tick would be worked off in their own order: the model knows only "all at once".
        due = {r.id for r in self.model.rollouts.values()}
        self.core.tick(seconds)
        before = self.model.queue(), list(self.model.completions)
        self.model.advance(self.core.now)
        if len(due) > 1:
            self._adopt_order(before)

    def _order(self, rollout_id: str) -> Order:
        """The place of a rollout that is queued."""
        order = self.core.state.entries[rollout_id].order
        assert order is not None
        return order

    def _adopt_order(self, before: tuple[list[str], list[str]]) -> None:
        """Take over the core's order among those that became due in the same tick."""
        new = [i for i in self.model.queue() if i not in before[0]]
        orders = sorted(self.model.rollouts[i].place for i in new)
        core_new = sorted(new, key=self._order)
        by_priority: dict[int, list[Order]] = {}
        for place in orders:
            by_priority.setdefault(place[0], []).append(place)
        for rollout_id in core_new:
            rollout = self.model.rollouts[rollout_id]
            rollout.place = by_priority[-rollout.priority].pop(0)
        ended = set(self.model.completions) - set(before[1])
        order = [i for _, i in self.core.state.completions.after(None)]
        self.model.completions.sort(key=lambda i: order.index(i) if i in ended else -1)
        for consumer in self.model.consumers.values():
            consumer.awaiting.sort(key=lambda i: order.index(i) if i in ended else -1)

    @invariant()
    def same(self) -> None:
        entries = self.core.state.entries
        assert {i: e.rollout.status for i, e in entries.items()} == {
            i: r.status for i, r in self.model.rollouts.items()
        }
        for rollout in self.model.rollouts.values():
            shown = [(a.attempt_id, a.status) for a in entries[rollout.id].attempts]
            assert shown == [(a.id, a.status) for a in rollout.attempts]
            entry = entries[rollout.id]
            for attempt in rollout.attempts:
                spans = spans_of(self.core.state, entry, attempt.id)
                assert [span.span_id for span in spans] == attempt.spans
                assert {span.attempt_id for span in spans} <= {attempt.id}
            assert (entry.saved and entry.saved.attempt_id) == (rollout.saved and rollout.saved.attempt_id)
        queue = self.core.state.queues
        assert sorted(queue, key=self._order) == self.model.queue()
        backing_off = {r.id: r.until for r in self.model.rollouts.values() if r.until is not None}
        assert {i: queue.backs_off_until(i) for i in queue.backing_off} == backing_off
        assert [i for _, i in self.core.state.completions.after(None)] == self.model.completions
        for name, consumer in self.model.consumers.items():
            known = self.core.state.consumers[name]
            assert list(known.awaiting) == consumer.awaiting
            assert (list(known.holders), known.batches) == (consumer.open, consumer.batches)

    @invariant()
    def sound(self) -> None:
        steps_checked.append(None)
        check(self.core.state)


def run(examples: int, steps: int) -> None:
    """Run the machine for up to `examples` times `steps` operations."""
    options = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Machine, settings=options)


@pytest.mark.fault
@pytest.mark.timeout(3000)
def test_core_and_model_agree(report: Callable[..., None], amount: Callable[[int, int], int]) -> None:
    """Random calls, after each of which everything is compared; a divergence comes with the shortest way to it."""
    steps_checked.clear()
    while len(steps_checked) < amount(2_500, 1_000_000):
        run(examples=amount(100, 500), steps=amount(50, 100))
    report(1, "random calls against a model", figure={"divergences": 0}, bar="0", met=True,
           did=f"{len(steps_checked)} steps")  # fmt: skip
