"""Every field of every record is in rows, snapshots and digests, or on the list of those that are not to be."""

from __future__ import annotations

from collections import OrderedDict, deque
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from raystore.core.gates import Limit
from raystore.core.group_table import GroupEntry
from raystore.core.payload import OnDisk, Payload
from raystore.core.records import Attempt, Config, Group, RetryRule, Rollout, Span, declared, packed, unpacked
from raystore.core.snapshot import digest
from raystore.core.state import (
    AttemptClock,
    BatchReplies,
    Chain,
    Consumer,
    Entry,
    ReplyCache,
    Saved,
    Session,
    Settings,
    State,
    Taken,
)
from raystore.errors import OverloadedError
from raystore.journal import snapshot_file
from raystore.journal.format import FileHead

CHAIN = Chain()
CHAIN.notes, CHAIN.refusal = {"latest": "rs-1"}, OverloadedError(1, 2, 3.0)
RULE = RetryRule("timeout", 2, 1.5, 2.0, None, 0.1)
ATTEMPT = Attempt("mine", "at-9", 9, 1.0, None, "running", None, None, None, None, None, None, None, None)

#: For each field of each record a value that it does not have by itself.
SAMPLES: dict[Any, dict[str, Any]] = {
    Rollout: {
        "input": b"\x01\x02", "start_time": 5.0, "end_time": 6.0, "mode": "val", "resources_id": "rs-1",
        "status": "running", "config": Config(1.0, 2.0, 3, ("failed",), (RULE,)), "metadata": b"\x01\x80",
        "group_id": "g", "queue": "other", "priority": 3, "tags": {"k": 1}, "reward": 0.5, "requeued_from": "ro-before",
    },
    Attempt: {
        "sequence_id": 7, "start_time": 5.0, "end_time": 6.0, "status": "failed", "worker_id": "w",
        "last_heartbeat_time": 7.0, "metadata": b"\x01\x80", "outcome": "infra", "error": "why",
        "resources_version": 2, "policy_version": 3, "reward": 0.5, "attempt_id": "at-other",
        "resumed_from": "at-before",
    },
    Span: {
        "attempt_id": "at-other", "sequence_id": 9, "span_id": "other", "trace_id": "other", "parent_id": "p",
        "name": "other", "start_time": 1.5, "end_time": 2.5, "reward": 0.5, "body": OnDisk(0, 99), "size": 77,
    },
    AttemptClock: {"start": 7.0, "beat": 8.0},
    Entry: {
        "rollout": Rollout("mine", b"", 9.0, None, None, None, "queuing", Config(), None, None, "q", 0, {}, None),
        "number": 99, "given": (b"\x01a", None, None), "bytes": 123, "attempts": [ATTEMPT],
        "clocks": [AttemptClock(4.0)], "order": (-1, 5), "read": True, "released": True, "evicts_as": 3,
        "former": "requeuing", "suspect": True, "deliveries": 2, "blames": 1, "losses": 3, "withdrawals": 1,
        "forgiven": 1,
        "holders": {"at-gone": "s"}, "taken": MappingProxyType({"t": Taken(3)}),
        "saved": Saved("at", 7, 0.5, Payload(b"\x01state", ())), "marks": {"at": 7}, "refreshed": 3,
    },
    Limit: {"max_running": 4, "per_minute": 9, "running": 2, "claims": deque([5.0, 6.0])},
    Taken: {"batch": 9, "step": 2, "note": "n", "is_durable": True},
    Consumer: {
        "takes": "groups", "groups": OrderedDict({"g": None}), "grouped": {2: ["g"]},
        "filter": {"mode": "val", "status_in": ["failed"]}, "awaiting": OrderedDict({"mine": None}),
        "returned": {"mine": None}, "coming": {"mine": None}, "made": 3, "holders": {2: "s"}, "inherited": {2: None},
        "since": {2: 5.5},
        "batches": {2: ["mine"]}, "steps": {1: 4}, "checkpoint": 1, "cursor": 5, "open": 2,
    },
    GroupEntry: {
        "group_id": "other", "number": 9, "n": 9, "min_size": 2, "spare": 3, "replace": 4, "start_time": 9.0,
        "deadline": 8.0, "mode": "val", "queue": "other", "priority": 3, "tags": {"k": 1}, "given": (1, b"\x01a"),
        "status": "complete", "why": "because", "end_time": 9.0, "members": {"mine": "succeeded"},
        "places": {"mine": 1}, "spares": {"mine": None}, "chosen": {"mine": None}, "missing": 1,
        "replaced": 3, "renewed": 4, "completion": 5, "held": {"mine": None}, "rests_since": 6.0,
    },
    Session: {
        "session_id": "other", "last_heard": 9.0, "eternal": True, "ended_at": 9.0, "claims": {("mine", "at"): 1.0},
        "held": {("mine", "at"): None}, "batches": {("c", 1): 2.0}, "lost": {("mine", "at-9"): ATTEMPT},
        "notices": [("cancelled", "mine", "at")], "chains": {3: CHAIN}, "deleting": {"mine": None},
        "replies": ReplyCache(expected=4), "process": ["node", "machine", 4, 5, "job", False], "reserved_since": 9.0,
    },
    ReplyCache: {
        "expected": 3, "answered": 2, "ahead": {5}, "kept": {2: BatchReplies(1, [[0, None]])},
        "handed": {4: [("mine", "at")]},
    },
}  # fmt: skip

#: What a snapshot does not hold: reading costs nothing in a journal, so that it is no step. What may come to a consumer
#: is found anew.
NOT_IN_SNAPSHOTS = {(Entry, "read"), (Entry, "evicts_as"), (Consumer, "coming")}

#: What a replay need not reproduce: what only a process knows, and what is still to be sent.
NOT_IN_DIGESTS = {
    (Entry, "read"), (Entry, "evicts_as"), (Consumer, "coming"), (Consumer, "since"),
    (Session, "last_heard"), (Session, "notices"), (Session, "replies"), (Span, "body"), (Span, "size"),
    *((ReplyCache, field.name) for field in declared(ReplyCache)),
}  # fmt: skip


def named(value: Any) -> Any:
    return value.__name__ if isinstance(value, type) else value


def made_state(kind: Any = None, name: Any = None, value: Any = None) -> State:
    """A small state, in which one field of one record has another value."""
    state = State(Settings(eviction_bytes=10**9, safe_bytes=10**8, on_disk=True))
    entry = state.entries["mine"] = Entry(
        Rollout("mine", b"\x01x", 1.0, None, None, None, "queuing", Config(), None, None, "default", 0, {}, None),
        1, attempts=[ATTEMPT.evolve(attempt_id="at", sequence_id=1)], clocks=[AttemptClock(1.0)],
        holders={"at": "s"}, taken=MappingProxyType({"t": Taken(1)}),
    )  # fmt: skip
    span = Span("mine", "at", 1, "s1", "t", None, "n", 1.0, 2.0, None, OnDisk(0, 5), 10)
    records: dict[Any, Any] = {
        Entry: entry, AttemptClock: entry.clocks[0], Taken: entry.taken["t"],
        Consumer: Consumer(), Session: Session("s", 1.0), Limit: Limit(),
        GroupEntry: GroupEntry("g", 1, 2, None, 0, 0, 1.0, None, None, "default", 0, {}),
    }  # fmt: skip
    records[ReplyCache] = records[Session].replies
    if kind is Rollout:
        entry.rollout = entry.rollout.evolve(**{name: value})
    elif kind is Attempt:
        entry.attempts[0] = entry.attempts[0].evolve(**{name: value})
        entry.holders = {entry.attempts[0].attempt_id: "s"}
    elif kind is Span:
        span = span.evolve(**{name: value})
    elif kind is not None:
        setattr(records[kind], name, value)
    state.spans._add_on_disk("mine", [span], [0])
    state.consumers["c"] = records[Consumer]
    state.gates.limits["q"] = records[Limit]
    state.sessions[records[Session].session_id] = records[Session]
    state.groups.add(records[GroupEntry])
    return state


def restored(state: State, path: Path) -> State:
    """The state that a snapshot of a state makes."""
    snapshot_file.write(path, FileHead("s", 1, 1, 1, more={}), state, None, {})
    found = State(state.settings)
    snapshot_file.read(path, found)
    return found


def value_in(state: State, kind: Any, name: Any) -> Any:
    """The value of a field, as plain as a snapshot has it."""
    entry = state.entries["mine"]
    if kind is Span:
        return getattr(state.spans.of("mine")[0], name)
    (session,), (group,) = state.sessions.values(), state.groups
    record = {
        Rollout: entry.rollout, Attempt: entry.attempts[0], Entry: entry, AttemptClock: entry.clocks[0],
        Taken: entry.taken["t"], Consumer: state.consumers["c"], Session: session, ReplyCache: session.replies,
        GroupEntry: group,
        Limit: state.gates.limits["q"],
    }[kind]  # fmt: skip
    value = getattr(record, name)
    return next(field.pack(value) for field in declared(kind) if field.name == name)


def plain(value: Any) -> Any:
    """For comparing: records as rows, clocks and the like as their fields, tuples as lists."""
    if isinstance(value, OnDisk):
        return value.size
    if isinstance(value, Payload):
        return value.data
    if hasattr(value, "row"):
        return [plain(item) for item in value.row()]
    if isinstance(value, AttemptClock):
        return packed(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def test_every_field_has_a_sample() -> None:
    """Whoever adds a field adds a value for it here, and it is looked for everywhere."""
    missing = [
        (kind.__name__, field.name)
        for kind, samples in SAMPLES.items()
        for field in declared(kind)
        if field.name not in samples and field.name != "rollout_id"
    ]
    assert missing == []


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in SAMPLES for name in SAMPLES[kind]], ids=named)
def test_a_field_is_in_snapshots_and_digests(kind: Any, name: Any, tmp_path: Path) -> None:
    """What a snapshot holds comes back as it was; what a replay must reproduce makes another digest."""
    state = made_state(kind, name, SAMPLES[kind][name])
    usual = made_state()
    before, after = value_in(state, kind, name), value_in(restored(state, tmp_path / "s"), kind, name)
    is_kept = plain(before) == plain(after)
    assert is_kept == ((kind, name) not in NOT_IN_SNAPSHOTS)
    assert (digest(state) != digest(usual)) == ((kind, name) not in NOT_IN_DIGESTS)


def test_a_field_that_a_snapshot_lacks_takes_its_default(tmp_path: Path) -> None:
    """So does one that was added since; and what is there no longer is left out."""
    values = packed(Consumer(made=3)) | {"no such field": 1}
    del values["checkpoint"]
    consumer = unpacked(Consumer, values)
    assert (consumer.made, consumer.checkpoint) == (3, None)


def test_rows_have_all_fields_in_order() -> None:
    """A record crosses as its row, and comes back from it."""
    for kind in (Rollout, Attempt, Span, Group):
        record = kind(*range(len(declared(kind))))
        assert kind(*record.row()) == record
        assert list(record.row()) == list(range(len(declared(kind))))
