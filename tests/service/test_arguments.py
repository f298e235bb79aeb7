"""Every verb and every argument, through the actor's protocol, with every kind of wrong value.

The clients here are written by hand, as one of another version or a hostile one would be: an answer or a named error,
nothing changed and nothing written by an error, others go on, and a journal that replays equal.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raystore import errors
from raystore.core.check import check
from raystore.core.snapshot import parts
from raystore.core.verbs import VERBS
from raystore.remote.server_session import OWN
from raystore.service.service import PROCESS_VERBS, PROTOCOL
from raystore.wire import frames
from tests.journal.peers import Peer, Store, enqueue, request

DEEP: Any = []
for _ in range(60):
    DEEP = [DEEP]

WRONG: list[Any] = [
    None, True, 0, -7, 2**62, 2**63, 2**64 - 1, -(2**63), 0.5, math.nan, math.inf, "", "x", "x" * 100_000, "a\nb",
    "\ud800", b"", b"\x01", [], ["x"], [[]], [["x", "y"]], {}, {"x": 1}, {1: 2}, DEEP,
]  # fmt: skip

_CONFIG = [5.0, None, 2, ["failed"]]
_RULED = [*_CONFIG, [["timeout", 2, 1.5, 2.0, 60.0, 0.1], ["infra", 0, 0.0, 1.0, None, 0.0]]]
_ROW = [3, "span", "trace", "parent", "name", 1.0, 2.0, 0.5, b"\x01body", -1]
_RULE = {
    "resources_id": "m", "batch": 1, "max_lag": 1, "max_running": 2, "late": "wait", "order": "oldest",
    "on_failure": "reward", "failure_reward": 0.0, "race": False, "judged": True, "batch_tokens": 9, "max_filtered": 9,
    "in_a_row": 9, "share": 0.5, "window": 9, "requeues": 1,
}  # fmt: skip
_PUMPED = {"feed": "f", "pump": "p"}
_EVALUATION = {"name": "e", "version": 1, "branch": 0}  # that of the resources
_PAGE = {"sort_by": None, "sort_order": "asc", "limit": -1, "offset": 0}
_NAMES = {"rollout_id": "r0", "attempt_id": "ATTEMPT"}  # which runs, and whose id is put here
_FILTERS = {"group_id": "g", "tags": {"k": 1}, "queue": "default", "mode": "train"}
_REQUEST = {
    "input": b"\x01\xc0", "mode": "train", "resources_id": "m", "config": _CONFIG, "metadata": b"\x01\x80",
    "rollout_id": "mine", "group_id": "g", "queue": "q", "priority": 2, "tags": {"k": 1, "t": "x"},
}  # fmt: skip

#: Arguments that are right, with everything that may be given.
RIGHT: dict[str, dict[str, Any]] = {
    "start_rollout": {"request": {"input": b"\x01\xc0", "metadata": None, "config": _RULED}, "worker_id": "w"},
    "enqueue": {"requests": [_REQUEST], "admit": 1, "chain": [7, True]},
    "dequeue": {"queues": ["default"], "limit": 1, "worker_id": "w", "timeout": 1.0, "of": 3},
    "query_rollouts": {
        "status_in": ["queuing"], "rollout_id_in": ["r0"], "rollout_id_contains": "r", "filter_logic": "and",
        "must": {**_FILTERS, "worker_id": "w"}, **_PAGE,
    },
    "get_rollout": {"rollout_id": "r0"},
    "update_rollout": {
        "rollout_id": "r0",
        "changes": {"input": b"\x01\xc0", "mode": "val", "resources_id": "m", "status": "queuing", "config": _RULED,
                    "metadata": b"\x01\x80"},
    },
    "cancel_rollouts": {"rollout_ids": ["r1", "r2"], "group_id": "g", "tags": {"k": 1}},
    "requeue": {"rollout_ids": ["r1", "r2"]},
    "release": {"rollout_ids": ["r1", "r2"]},
    "delete_rollouts": {"rollout_ids": ["r2", "r3"]},
    "pause_queues": {"queues": ["nothing"], "keep": True},
    "resume_queues": {"queues": ["nothing", "default"], "others": True},
    "limit_queue": {"queue": "nothing", "max_running": 2, "per_minute": 3},
    "start_attempt": {"rollout_id": "r0", "worker_id": "w"},
    "query_attempts": {"rollout_id": "r0", **_PAGE},
    "get_latest_attempt": {"rollout_id": "r0"},
    "update_attempt": {
        **_NAMES,
        "changes": {"status": "running", "worker_id": "w", "last_heartbeat_time": 1e9, "metadata": b"\x01\x80"},
    },
    "heartbeat": {"attempts_alive": [["r0", "ATTEMPT"]]},
    "decline": {"rollout_id": "r0", "attempt_id": "a"},
    "acknowledge": {"keys": [["r0", "a"]]},
    "add_spans": {**_NAMES, "spans": [_ROW], "chain": [8, True]},
    "finish": {
        **_NAMES, "spans": [_ROW],
        "changes": {"status": "failed", "outcome": "agent_error", "error": "why", "died": False, "worker_id": "w",
                    "calls": {"turns": 1, "prompt_tokens": 2, "response_tokens": 3, "finish_reasons": {"stop": 1}},
                    "last_heartbeat_time": 1e9, "metadata": None},
    },
    "next_numbers": {"rollout_ids": ["r0", "unknown"]},
    "query_spans": {
        **_NAMES, "equal": {"name": "name"}, "containing": {"trace_id": "t", "parent_id": "p"}, "filter_logic": "or",
        **_PAGE, "allow_partial": True,
    },
    "query_many_spans": {"rollout_ids": ["r0"], "attempt_id": "latest", "allow_partial": False},
    "take": {
        "consumer": "c", "count": 2, "timeout": 1.0, "mode": "train", "tags": {"k": 1}, "queue": "q", "group_id": "g",
        "status_in": ["succeeded"], "max_open": 2, "of": 7,
    },
    "enqueue_groups": {
        "groups": [{"member": _REQUEST, "n": 2, "group_id": "gr", "min_size": 2, "spare": 1, "replace": 1,
                    "deadline_seconds": 5.0}],
        "gives": "rollouts", "admit": 1, "chain": [9, True],
    },
    "get_group": {"group_id": "gr"},
    "query_groups": {"status_in": ["open"], "group_id_in": ["gr"], **_PAGE},
    "take_groups": {
        "consumer": "g", "count": 2, "timeout": 1.0, "mode": "train", "tags": {"k": 1}, "queue": "q", "group_id": "gr",
        "max_open": 2, "of": 7,
    },
    "get_batch": {"consumer": "c", "batch": 1},
    "ack": {"consumer": "c", "batch": 1, "at_step": 3, "note": "n", "notes": {"r0": "x"}},
    "nack": {"consumer": "c", "batch": 1},
    "checkpoint": {"consumer": "c", "at_step": 3},
    "rewind": {"consumer": "c", "at_step": 3},
    "forget_consumer": {"consumer": "c"},
    "ledger": {"consumer": "c"},
    "open_feed": {**_PUMPED, "rule": _RULE, "streams": [["", 1.0, 9, "x"]], "changed": "refuse"},
    "feed_work": {**_PUMPED, "seen": 0, "over": False, "timeout": 1.0},
    "feed_add": {
        **_PUMPED, "stream": "", "at": [0, 0], "to": [0, 1], "over": False, "state_after": b"s",
        "requests": [{"member": _REQUEST, "n": 2, "group_id": "f/0/0"}], "items": [["e", 0, 0]],
        "skipped": [["f/0/1", "why"]],
    },
    "begin_evaluation": {
        "name": "e", "feed": None, "resources_id": None, "version": None, "overtaken": "drop",
        "rule": {"total": 2, "items": "x", "samples": 2, "threshold": 0.0, "failure_reward": 0.0, "share": 0.5},
    },
    "evaluation_add": {
        **_EVALUATION, "at": 0, "requests": [{"member": _REQUEST, "n": 1, "group_id": "e@-/0"}], "items": [["e", 0]],
    },
    "evaluation_result": {**_EVALUATION, "timeout": 1.0},
    "evaluations": {"name": "e", "feed": None},
    "drop_evaluation": _EVALUATION,
    "feed_judge": {**_PUMPED, "verdicts": [["f/0/0", "why", 3, ["r0"]]]},
    "feed_choose": {**_PUMPED, "group_ids": ["f/0/0"]},
    "publish_feed": {
        **_PUMPED, "version": 1, "digest": "d", "resources": b"\x01\x80", "holds_objects": False,
        "objects": [["a" * 40, 100], [None, 0]],
    },
    "feed_items": {"feed": "f", "group_ids": ["f/0/0"]},
    "feed_status": {"feed": "f"},
    "selection": {"consumer": "c", "since": 1.0},
    "save": {"rollout_id": "r0", "attempt_id": "ATTEMPT", "saved_state": b"\x01\xc0", "spans": []},
    "get_saved": {"rollout_id": "r0", "attempt_id": "ATTEMPT"},
    "refresh": {"rollout_id": "r0", "attempt_id": "ATTEMPT"},
    "resume_feed": {"feed": "f"},
    "close_feed": _PUMPED,
    "put_resources": {
        "resources_id": "m", "resources": b"\x01\x80", "policy_version": 1, "holds_objects": False,
        "objects": [["a" * 40, 100], [None, 0]],
    },
    "hold_objects": {"versions": [["m", 1, b"\x01\xc0"], ["gone", 1, b"\x01\xc0"]]},
    "unread": {**_NAMES, "resources_id": "m", "version": 1, "error": "lost"},
    "get_resources": {"resources_id": "m", "version": 1},
    "get_latest_resources": {},
    "query_resources": {"resources_id": "m", "resources_id_contains": "m", **_PAGE},
    "delete_resources": {"resources_id": "m"},
    "update_worker": {"worker_id": "w", "changes": {"heartbeat_stats": b"\x01\x80"}},
    "query_workers": {"status_in": ["idle"], "worker_id_contains": "w", "filter_logic": "and", **_PAGE},
    "get_worker": {"worker_id": "w"},
    "report_session": {"session_id": "gone", "worker_id": "gone", "stopped": True},
    "wait": {"rollout_ids": ["r0"], "timeout": 1.0},
    "sort_out": {"rollout_ids": ["r0"]},
    "completed": {"cursor": 0, "limit": 2, "timeout": 1.0, "filters": _FILTERS},
    "changes": {"cursor": 0, "kinds": ["enqueued"], "limit": 2, "timeout": 1.0},
    "cancel_wait": {"of": 1},
    "report_pool": {"pool_id": "p", "queues": ["nothing"], "failures": 3, "error": "x"},
    "report_spans_lost": {"counts": {"sampled_out": 2, "refused": 1}},
    "statistics": {},
    "metrics": {"seconds": 60.0, "versions": 10},
    "story": {"rollout_id": "r0"},
    "why": {"rollout_id": "r0", "group_id": None, "consumer": None},
    "check": {},
    "tick": {"seconds": 0.001, "sessions": False},
    "end_chain": {"chain_id": 7},
    "more": {"token": 1},
    "close_session": {},
}  # fmt: skip


def with_attempt(value: Any, attempt_id: str) -> Any:
    """Arguments that name this attempt."""
    if isinstance(value, dict):
        return {name: with_attempt(item, attempt_id) for name, item in value.items()}
    if isinstance(value, list):
        return [with_attempt(item, attempt_id) for item in value]
    return attempt_id if value == "ATTEMPT" else value


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in arguments something stands, whole and within."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed(arguments: Any, path: tuple[Any, ...], change: Any) -> Any:
    """A copy of arguments with something done to what stands at a place."""
    made = copy.deepcopy(arguments)
    holder = made
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return made


def variants(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments with one thing wrong, or odd."""
    for path in places(arguments):
        for wrong in WRONG:
            yield changed(arguments, path, lambda holder, key, wrong=wrong: holder.__setitem__(key, wrong))
        yield changed(arguments, path, lambda holder, key: holder.__delitem__(key))
    for path in ((), *(p for p in places(arguments))):
        for key in ("more", "", 1, "\ud800"):
            made = copy.deepcopy(arguments)
            holder: Any = made
            for step in path:
                holder = holder[step]
            if isinstance(holder, dict):
                holder[key] = 1
                yield made


@pytest.mark.parametrize("verb", sorted(VERBS | PROCESS_VERBS | OWN))
async def test_whatever_the_arguments_are(tmp_path: Path, verb: str) -> None:
    """One wrong argument hurts nobody, its sender included."""
    store, peer, other = Store(tmp_path / "journal"), Peer("peer"), Peer("other")
    made = [request(rollout_id=f"r{n}", group_id="g", tags={"k": 1}) for n in range(4)]
    await other.call(store, "enqueue", requests=made)
    await other.call(store, "put_resources", **RIGHT["put_resources"])
    started = await other.call(store, "start_attempt", rollout_id="r0", worker_id="w")
    right = with_attempt(RIGHT[verb], started[1][1][1])
    await other.call(store, "update_rollout", rollout_id="r1", changes={"status": "succeeded"})
    await other.call(store, "take", consumer="c", count=1)
    log = store.writer
    await peer.send(store, peer.batch())
    if "evaluation" in verb and verb != "begin_evaluation":
        await peer.call(store, "begin_evaluation", **RIGHT["begin_evaluation"])
    if "feed" in verb and verb != "open_feed":
        await peer.call(store, "open_feed", **RIGHT["open_feed"])
    if verb == "feed_add":
        await peer.call(store, "publish_feed", **RIGHT["publish_feed"])
    answered = refused = 0
    before: Any = None
    for number, arguments in enumerate([right, *variants(right)]):
        before = before or (list(parts(store.state)), log.last)
        (reply,) = await peer.send(store, peer.batch([verb, arguments]))
        if reply[0] != frames.ERROR:
            answered += 1
            before = None
        else:
            refused += 1
            kind = errors.BY_NAME[reply[1]]
            assert issubclass(kind, errors.StoreError), (arguments, reply)
            assert kind not in (errors.StoreError, errors.StoreCorruptError), (arguments, reply)
            assert len(str(errors.from_record(*reply[1:]))) < 4_000
            if "chain" not in arguments:
                assert list(parts(store.state)) == before[0], arguments
                assert kind is not errors.InvalidValueError or log.last == before[1], arguments
            before = None if log.last != before[1] else before
        if number % 50 == 0:
            replies = await other.send(store, other.batch(enqueue(), ["statistics", {}]))
            assert [reply[0] for reply in replies] == [frames.VALUE, frames.VALUE]
            check(store.state)
            before = None
        if verb == "close_session":
            peer, before = Peer(f"peer-{number}"), None
            await peer.send(store, peer.batch())
    assert answered or verb == "more"
    assert refused
    check(store.state)
    assert store.difference() == []
    log.close()


@pytest.mark.parametrize("place", range(8))
async def test_whatever_the_header_is(tmp_path: Path, place: int) -> None:
    """A batch whose header says nonsense is refused by name, and is not executed."""
    store, other = Store(tmp_path / "journal"), Peer("other")
    for wrong in WRONG:
        header = ["test", "p", 1, 0, [], 1, [], []]
        if type(wrong) is type(header[place]) and wrong not in ("", "a\nb", "\x00", "\ud800"):
            continue
        before = list(parts(store.state))
        header[place] = wrong
        made = frames.join([PROTOCOL, *header], [frames.pack_operation(*enqueue())])
        _, outcome, *rest = frames.unpack_answer(await store.endpoint.exchange(tuple(made)))
        if place == 0 and isinstance(wrong, str):  # the client's name is anything
            continue
        assert outcome == frames.BROKEN, wrong
        assert rest[0][0] == "InvalidValueError"
        assert list(parts(store.state)) == before
    assert (await other.call(store, "statistics"))[0] == frames.VALUE
    assert store.difference() == []
