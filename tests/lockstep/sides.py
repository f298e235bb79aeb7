"""The two stores side by side: how each is made, asked, and looked into.

Both run on one clock, which moves only when it is told to, and the reference is given the ids that raystore minted, so
that answers can be compared field by field. Looking in disturbs neither: no deadline passes, nothing counts as read.
Not here: what is asked (`operations`), what may differ (`differences`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network for prices

import agentlightning.store.collection_based as reference_store
import agentlightning.store.utils as reference_utils
import agentlightning.types as reference_types
from agentlightning.store.memory import InMemoryLightningStore as ReferenceStore
from agentlightning.utils.id import generate_id
from pydantic import BaseModel

import raystore as rs
from raystore.core.lifecycle import ACTIVE
from raystore.types import contract as types
from raystore.wire import convert

State = dict[tuple[str, ...], Any]  #: what a store holds, by place: ("rollout", id, field), ("queue",), ...

SPAN_BYTES = 20  #: of every span, on both sides, where memory is limited

_clock = SimpleNamespace(now=0.0)
_minted: dict[str, deque[str]] = {"ro": deque(), "at": deque(), "rs": deque()}


def _id(kind: str, length: int) -> Any:
    return lambda: _minted[kind].popleft() if _minted[kind] else f"{kind}-{generate_id(length)}"


_time = SimpleNamespace(time=lambda: _clock.now, perf_counter=lambda: _clock.now)
reference_store.time = reference_utils.time = _time
reference_store._generate_rollout_id = _id("ro", 12)
reference_store._generate_attempt_id = _id("at", 8)
reference_store._generate_resources_id = _id("rs", 12)


class Made:
    """A model to be made by each side with its own class."""

    def __init__(self, name: str, /, **fields: Any) -> None:
        self.name, self.fields = name, fields

    def by(self, module: Any) -> Any:
        return getattr(module, self.name)(**{k: made_by(module, v) for k, v in self.fields.items()})

    def __repr__(self) -> str:
        return f"Made({self.name!r}, {', '.join(f'{k}={v!r}' for k, v in self.fields.items())})"


def made_by(module: Any, value: Any) -> Any:
    """An argument with all its models made by one side."""
    if isinstance(value, Made):
        return value.by(module)
    if type(value) is list:
        return [made_by(module, item) for item in value]
    if type(value) is dict:
        return {key: made_by(module, item) for key, item in value.items()}
    return value


def plain(value: Any, fields: dict[str, list[str]]) -> Any:
    """An answer as plain data: models become a dict of the fields that the reference has, with the name of their class.

    An object by reference would change later; this does not.
    """
    if isinstance(value, BaseModel):
        name = type(value).__name__.partition("[")[0]
        known = fields.get(name)
        values = {**value.__dict__, **(value.__pydantic_extra__ or {})}
        shown = {key: plain(item, fields) for key, item in values.items() if known is None or key in known}
        return {"is a": name, **shown}
    if isinstance(value, dict):
        return {key: plain(item, fields) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, fields) for item in value]
    return value


_SCALARS = frozenset({str, int, float, bool, bytes, type(None)})

#: The fields of the reference's classes; spans keep whatever they are given, on both sides.
FIELDS = {
    name: list(getattr(reference_types, name).model_fields)
    for name in ("Rollout", "Attempt", "AttemptedRollout", "RolloutConfig", "Worker", "ResourcesUpdate")
}


class Ours:
    """raystore's store."""

    types = types

    def __init__(self, *, memory: bool, **options: Any) -> None:
        if memory:
            options |= {
                "eviction_memory_threshold": 5 * SPAN_BYTES, "safe_memory_threshold": 3 * SPAN_BYTES,
                "span_size_estimator": lambda span: SPAN_BYTES,
            }  # fmt: skip
        self.store = rs.InMemoryLightningStore(clock="manual", **options)
        self._state = self.store._service.state
        self._known: dict[int, tuple[Any, State]] = {}
        _clock.now = self.store._service.clock.now()

    async def tick(self, seconds: float) -> None:
        await self.store.testing.tick(seconds)
        _clock.now = self.store._service.clock.now()

    def state(self) -> State:
        """All that the reference has too."""
        state = self._state
        seen: State = {}
        for rollout_id, entry in state.entries.items():
            self._put(seen, ("rollout", rollout_id), (entry.rollout, None), convert.to_any_rollout)
            for attempt in entry.attempts:
                self._put(seen, ("attempt", rollout_id, attempt.attempt_id), attempt, convert.to_attempt)
            for span in state.spans.of(rollout_id):
                seen["span", rollout_id, span.attempt_id, span.span_id] = (span.sequence_id, span.name)
        for worker_id, worker in state.workers.items():
            self._put(seen, ("worker", worker_id), worker, convert.to_worker)
        for resources in state.resources.all_newest():
            self._put(seen, ("resources", resources.resources_id), resources, self.opened)
        seen["latest resources",] = state.resources.latest_id
        waiting = sorted(state.queues.orders(), key=lambda placed: placed[2])
        seen["queue",] = [rollout_id for rollout_id, _, _ in waiting]
        for rollout_id, number in state.spans.counters():
            seen["counter", rollout_id] = number
        for rollout_id in state.spans.evicted:
            seen["evicted", rollout_id] = True
        return seen

    def opened(self, resources: Any) -> types.ResourcesUpdate:
        """Resources as its callers see them."""
        return convert.to_resources(resources, self.store._objects_at)

    def _put(self, seen: State, place: tuple[str, ...], record: Any, opened: Callable[[Any], BaseModel]) -> None:
        """The fields of a record, which is replaced and never edited, so that it needs to be looked at once."""
        known = self._known.get(id(record))
        if known is None:
            fields: State = {}
            _put(fields, place, opened(record))
            known = self._known[id(record)] = (record, fields)
        seen.update(known[1])

    @property
    def moves(self) -> int:
        """How many things have changed so far."""
        return int(self._state.changes.last)

    def close(self) -> None:
        self.store.sync.check()
        self.store.close()


class Theirs:
    """The reference's store."""

    types = reference_types

    def __init__(self, *, memory: bool) -> None:
        for ids in _minted.values():
            ids.clear()
        options: dict[str, Any] = {}
        if memory:
            options = {
                "eviction_memory_threshold": 5 * SPAN_BYTES, "safe_memory_threshold": 3 * SPAN_BYTES,
                "span_size_estimator": lambda span: SPAN_BYTES,
            }  # fmt: skip
        self.store = ReferenceStore(scan_debounce_seconds=0, **options)
        self.memory = memory
        self.looked_at: set[str] = set()  # rollouts that run without an attempt that does, and were timed out for that

    def expect_ids(self, answer: Any) -> None:
        """The ids that raystore minted for the same operation."""
        for ids in _minted.values():
            ids.clear()
        for made in answer if isinstance(answer, list) else [answer]:
            if isinstance(made, types.Rollout):
                _minted["ro"].append(made.rollout_id)
                if isinstance(made, types.AttemptedRollout):
                    _minted["at"].append(made.attempt.attempt_id)
            elif isinstance(made, types.ResourcesUpdate):
                _minted["rs"].append(made.resources_id)

    async def scan(self) -> None:
        """What its methods do before their work: look for attempts that have timed out."""
        await self.store._scan_for_unhealthy_rollouts()

    async def is_due(self) -> bool:
        """Whether that would find any."""
        running = await self.store._unlocked_get_running_rollouts(self.store.collections)
        return bool(await reference_utils.scan_unhealthy_rollouts(running))

    def state(self) -> State:
        """The same places as in ours."""
        held, seen = self.store.collections, {}
        for rollout in held.rollouts._items.values():
            _put(seen, ("rollout", rollout.rollout_id), rollout)
        for attempt in _leaves(held.attempts._items, 2):
            _put(seen, ("attempt", attempt.rollout_id, attempt.attempt_id), attempt)
        for span in _leaves(held.spans._items, 3):
            seen["span", span.rollout_id, span.attempt_id, span.span_id] = (span.sequence_id, span.name)
        for worker in held.workers._items.values():
            _put(seen, ("worker", worker.worker_id), worker)
        for resources in held.resources._items.values():
            _put(seen, ("resources", resources.resources_id), resources)
        latest = self.store._latest_resources_id
        seen["latest resources",] = latest if isinstance(latest, str) else None
        waiting = [i for i in held.rollout_queue._items if held.rollouts._items[i].status in ("queuing", "requeuing")]
        seen["queue",] = waiting
        for rollout_id, number in held.span_sequence_ids._values.items():
            seen["counter", rollout_id] = number
        for rollout_id in self.store._evicted_rollout_span_sets:
            seen["evicted", rollout_id] = True
        return seen

    @property
    def left_in_queue(self) -> list[str]:
        """Rollouts that it will pass over when it meets them."""
        held = self.store.collections
        return [i for i in held.rollout_queue._items if held.rollouts._items[i].status not in ("queuing", "requeuing")]

    def look_again(self, ours: Ours) -> None:
        """Look for deadlines again of those rollouts that were left out, once their attempts are at work again."""
        entries = ours._state.entries
        for rollout_id in self.looked_at & entries.keys():
            rollout, attempt = entries[rollout_id].pair
            if rollout.status in ACTIVE and attempt is not None and attempt.status in ACTIVE:
                self.looked_at.discard(rollout_id)
                self.store._running_rollout_ids.add(rollout_id)

    def become(self, ours: Ours) -> None:
        """Take over what ours holds, after a difference that is on the list."""
        state, held, made = ours._state, self.store.collections, reference_types
        rollouts, attempts, spans = {}, {}, {}
        for rollout_id, entry in state.entries.items():
            rollouts[rollout_id] = _model(made.Rollout, convert.to_any_rollout((entry.rollout, None)))
            if entry.attempts:
                own = {a.attempt_id: _model(made.Attempt, convert.to_attempt(a)) for a in entry.attempts}
                attempts[rollout_id] = own
            for span in state.spans.of(rollout_id):
                place = spans.setdefault(rollout_id, {}).setdefault(span.attempt_id, {})
                place[span.span_id] = made.Span.model_validate(convert.to_span(span).model_dump())
        workers = {i: _model(made.Worker, convert.to_worker(w)) for i, w in state.workers.items()}
        resources = {}
        for row in state.resources.all_newest():
            resources[row.resources_id] = _model(made.ResourcesUpdate, ours.opened(row))
        for collection, items, count in (
            (held.rollouts, rollouts, len(rollouts)),
            (held.attempts, attempts, sum(map(len, attempts.values()))),
            (held.spans, spans, sum(1 for _ in _leaves(spans, 3))),
            (held.workers, workers, len(workers)),
            (held.resources, resources, len(resources)),
        ):
            collection._items, collection._size = items, count
        held.rollout_queue._items = deque(ours.state()["queue",])
        held.span_sequence_ids._values = dict(state.spans.counters())
        store = self.store
        store._latest_resources_id = state.resources.latest_id
        over = {i for i in self.looked_at & state.entries.keys() if state.entries[i].latest.status not in ACTIVE}
        store._running_rollout_ids = {i for i, r in rollouts.items() if r.status in ACTIVE} - over
        store._start_time_by_rollout = {i: r.start_time for i, r in rollouts.items()}
        store._evicted_rollout_span_sets = set(state.spans.evicted)
        store._span_bytes_by_rollout.clear()
        for span in _leaves(spans, 3):
            store._span_bytes_by_rollout[span.rollout_id] += SPAN_BYTES
        store._total_span_bytes = SPAN_BYTES * held.spans._size


def _leaves(items: dict[Any, Any], depth: int) -> Iterator[Any]:
    for item in items.values():
        if depth == 1:
            yield item
        else:
            yield from _leaves(item, depth - 1)


def _model(cls: Any, model: BaseModel) -> Any:
    return cls.model_validate({name: value for name, value in model.model_dump().items() if name in cls.model_fields})


def _put(seen: State, place: tuple[str, ...], model: BaseModel) -> None:
    values = model.__dict__
    for name in FIELDS[type(model).__name__]:
        value = values[name]
        seen[*place, name] = value if type(value) in _SCALARS else plain(value, FIELDS)
