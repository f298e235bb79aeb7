"""Random operations of every verb through the actor's protocol, with a journal: `python -m tests.journal.fuzz 0 10000`.

A seed is a history of a store: sessions that send batches (some twice, some with nonsense in them), time that passes,
processes that follow each other. Whatever is asked: every invariant holds, no operation breaks the state, one that is
refused changes nothing, and what another process finds in the journal, with a snapshot and without, is the same state.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import logging
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raystore.core import check
from raystore.core.findings import KINDS
from raystore.core.snapshot import digest, parts
from raystore.journal.compaction import compact
from raystore.journal.files import Directory
from raystore.journal.opening import read_run
from raystore.remote import server_session
from raystore.wire import frames
from raystore.wire.codec import encode
from tests.journal.peers import Peer, Store

STATUSES = ["queuing", "preparing", "running", "failed", "succeeded", "cancelled", "requeuing"]
TRIED = ["preparing", "running", "failed", "succeeded", "unresponsive", "timeout"]
NONSENSE: list[Any] = [
    None, True, -1, 0, 1.5, float("nan"), float("inf"), 2**63, "", "x" * 600, "a\nb", "\ud800", "ro-none", b"", b"\x01",
    [], {}, [None], ["a", 1], [[]], {"a": 1}, {1: 2},
]  # fmt: skip


NONSENSE_SHARE = 0.1  #: of the operations


class History:
    """What a fuzzer knows of a store: enough to ask for what may be there."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.rollouts: list[str] = []
        self.attempts: list[tuple[str, str]] = []
        self.sessions: list[str] = []
        self.positions: dict[str, list[int]] = {}  # of the streams of the feed
        self.evaluations: dict[str, list[Any]] = {}  # name, version, branch and position of some
        self.judged: list[str] = []  # groups that it is to judge

    # -- arguments -------------------------------------------------------------------------------------------------

    def rollout(self) -> str:
        return self.rng.choice(self.rollouts) if self.rollouts and self.rng.random() < 0.95 else "ro-none"

    def some_rollouts(self) -> list[str]:
        return [self.rollout() for _ in range(self.rng.choice([1, 1, 3, 130, 250]))]

    def attempt(self) -> dict[str, Any]:
        rollout_id, attempt_id = self.rng.choice(self.attempts) if self.attempts else ("ro-none", "at-none")
        return {"rollout_id": rollout_id, "attempt_id": attempt_id}

    def maybe(self, chance: float, **more: Any) -> dict[str, Any]:
        return more if self.rng.random() < chance else {}

    def request(self) -> dict[str, Any]:
        rng = self.rng
        config: list[Any] = [rng.choice([None, 5.0]), rng.choice([None, 3.0]), rng.randint(1, 3)]
        config += [rng.sample(["failed", "timeout", "unresponsive"], rng.randint(0, 3))]
        config += [self.rules()] if rng.random() < 0.5 else []
        return {
            "input": encode(rng.randint(0, 3), "input", 10**6),
            "metadata": None,
            **self.maybe(0.3, group_id=rng.choice(["g1", "g2"])),
            **self.maybe(0.3, tags={"k": rng.choice([1, 2])}),
            **self.maybe(0.3, priority=rng.randint(-2, 2)),
            **self.maybe(0.5, config=config),
            **self.maybe(0.2, rollout_id=f"mine-{rng.randint(0, 9)}"),
            **self.maybe(0.2, queue="other"),
            **self.maybe(0.2, mode=rng.choice(["train", "val"])),
            **self.maybe(0.2, resources_id=rng.choice(["r1", "r2"])),
        }

    def rules(self) -> list[Any]:
        rng = self.rng
        outcomes = rng.sample(["agent_error", "timeout", "unresponsive", "infra", "runner_lost"], rng.randint(2, 5))
        return [
            [one, rng.randint(0, 3), rng.choice([0.0, 1.0, 6.0]), rng.choice([1.0, 3.0]), rng.choice([None, 9.0]), 0.5]
            for one in outcomes
        ]

    def span(self) -> list[Any]:
        rng = self.rng
        number, name = rng.choice([-1, rng.randint(0, 40)]), f"s{rng.randint(0, 60)}"
        return [number, name, "t", None, "n", None, None, rng.choice([None, 1.0]), b"\x01body", -1]

    def consumer(self) -> str:
        return self.rng.choice(["c1", "c2", "of groups", "feed"])

    def group_id(self) -> str:
        return f"group-{self.rng.randint(0, 9)}"

    def group(self) -> dict[str, Any]:
        rng, n = self.rng, self.rng.choice([1, 2, 2, 3, 4])
        return {
            "member": self.request(),
            "n": n,
            **self.maybe(0.7, group_id=self.group_id()),
            **(self.maybe(0.5, min_size=rng.randint(2, n)) if n > 1 else {}),
            **self.maybe(0.3, spare=rng.randint(0, 2)),
            **self.maybe(0.5, replace=rng.randint(0, 2)),
            **self.maybe(0.3, deadline_seconds=rng.choice([3.0, 60.0])),
        }

    def pump(self) -> dict[str, Any]:
        return {"feed": "feed", "pump": self.rng.choice(["p", "p", "p", "p", "q"])}

    def rule_of_feed(self) -> dict[str, Any]:
        rng = self.rng
        return {
            "resources_id": "r1", "batch": rng.randint(1, 2), "max_lag": rng.randint(0, 2),
            "max_running": rng.choice([None, None, 2]), "late": rng.choice(["wait", "train", "drop", "requeue"]),
            "order": rng.choice(["oldest", "ready_first", "in_order", "chosen"]),
            "on_failure": rng.choice(["mask", "replace", "reward"]), "failure_reward": 0.0,
            "race": rng.random() < 0.2, "judged": rng.random() < 0.3, "batch_tokens": rng.choice([None, 10]),
            "max_filtered": rng.choice([None, 2]), "in_a_row": rng.choice([None, 3]), "share": rng.choice([None, 0.5]),
            "window": rng.choice([4, 20]), "requeues": 1,
        }  # fmt: skip

    def draw(self) -> dict[str, Any]:
        rng = self.rng
        stream = rng.choice(["a", "b"])
        at = self.positions.get(stream, [0, 0]) if rng.random() < 0.9 else [0, 0]
        count = rng.randint(0, 3)
        groups = [{**self.group(), "group_id": f"{stream}/{at[1] + n}"} for n in range(count)]
        return {
            "stream": stream, "at": at, "to": [at[0], at[1] + count], "over": rng.random() < 0.05,
            "state_after": None, "requests": groups, "items": [[stream, at[0], at[1] + n] for n in range(count)],
            "skipped": [[f"{stream}/skipped", "unreadable"]] if rng.random() < 0.1 else [],
        }  # fmt: skip

    def evaluation(self) -> dict[str, Any]:
        known = self.rng.choice(list(self.evaluations.values()) or [["e", None, 0, 0]])
        return dict(zip(("name", "version", "branch"), known, strict=False))

    def of_evaluation(self) -> dict[str, Any]:
        name, version, branch, at = self.rng.choice(list(self.evaluations.values()) or [["e", None, 0, 0]])
        count = self.rng.choice([0, 1, 1, 2])
        member = {**self.request(), "mode": "val"}
        requests = [{"member": member, "n": 1, "group_id": f"{name}@{n}"} for n in range(count)]
        return {
            "name": name, "version": version, "branch": branch, "at": at, "requests": requests,
            "items": [["math", at + n] for n in range(count)],
        }  # fmt: skip

    def page(self) -> dict[str, Any]:
        rng = self.rng
        return {"sort_by": None, "sort_order": rng.choice(["asc", "desc"]), "limit": rng.choice([-1, 2]), "offset": 0}

    def changes_of_rollout(self) -> dict[str, Any]:
        rng = self.rng
        return rng.choice(
            [
                {"status": rng.choice(STATUSES)}, {"mode": "val"}, {"metadata": encode({"x": 1}, "m", 10**6)},
                {"resources_id": rng.choice(["r1", None])}, {"config": [2.0, None, 2, ["failed"]]}, {},
                {"config": [5.0, None, 1, [], self.rules()]},
            ]
        )  # fmt: skip

    def changes_of_attempt(self) -> dict[str, Any]:
        rng = self.rng
        return rng.choice(
            [
                {"status": rng.choice(TRIED)}, {"worker_id": rng.choice([None, "w2"])}, {"metadata": None},
                {"last_heartbeat_time": rng.choice([0.0, 2e9])}, {"metadata": encode({"n": 1}, "m", 10**6)},
            ]
        )  # fmt: skip

    def end_of_attempt(self) -> dict[str, Any]:
        return self.rng.choice(
            [
                {"status": "succeeded"},
                {"status": "succeeded", "calls": {
                    "turns": 1, "prompt_tokens": 9, "response_tokens": 2, "finish_reasons": {"stop": 1}}},
                {"status": "failed", "outcome": "infra", "error": "x"},
                {"status": "failed", "outcome": "dropped"}, {"status": "timeout", "outcome": "timeout"},
                {"status": "unresponsive", "outcome": "runner_lost", "died": True},
            ]
        )  # fmt: skip

    def learn(self, verb: str, value: Any) -> None:
        """Remember what an answer says there is."""
        if verb in ("enqueue", "requeue"):
            self.rollouts += [pair[0][0] for pair in value]
        elif verb == "enqueue_groups":
            self.rollouts += [i for row in value for i in (row[-1] if isinstance(row[0], str) else [row[0][0]])]
        elif verb == "open_feed":
            self.positions = {name: [epoch, cursor] for name, epoch, cursor, *_ in value[3]}
        elif verb in ("begin_evaluation", "evaluation_result") and value:
            known = [value["name"], value["version"], value["branch"], value["enqueued"]]
            self.evaluations[repr(known[:3])] = known
        elif verb == "feed_work":
            self.judged = value["judge"] + (value["choose"] or [])
        elif verb in ("start_rollout", "start_attempt"):
            self.rollouts.append(value[0][0])
            self.attempts.append((value[0][0], value[1][1]))
        elif verb == "dequeue":
            self.attempts += [(rollout[0], attempt[1]) for rollout, attempt, _ in value]
        del self.rollouts[:-80], self.attempts[:-40]


#: Arguments of each verb of a store; a test holds the names equal to the tables of verbs.
ARGUMENTS: dict[str, Callable[[History, random.Random], dict[str, Any]]] = {
    "start_rollout": lambda h, rng: {
        "request": {k: v for k, v in h.request().items() if k != "rollout_id"}, "worker_id": rng.choice([None, "w1"]),
    },
    "enqueue": lambda h, rng: {
        "requests": [h.request() for _ in range(rng.choice([1, 2, 3, 3, 60]))],
        **h.maybe(0.2, admit=1, chain=[rng.randint(1, 5), rng.random() < 0.5]),
    },
    "dequeue": lambda h, rng: {
        "queues": rng.choice([["default"], ["other", "default"]]), "limit": rng.randint(0, 3),
        "worker_id": rng.choice([None, "w1", "w2"]), "timeout": rng.choice([0.0, 20.0]),
    },
    "query_rollouts": lambda h, rng: {
        "status_in": rng.choice([None, ["failed", "queuing"]]), "rollout_id_in": rng.choice([None, [h.rollout()]]),
        "rollout_id_contains": rng.choice([None, "mine"]), "filter_logic": rng.choice(["and", "or"]),
        "must": rng.choice([{}, {"tags": {"k": 1}}, {"group_id": "g1", "queue": "default"}]), **h.page(),
    },
    "get_rollout": lambda h, rng: {"rollout_id": h.rollout()},
    "update_rollout": lambda h, rng: {"rollout_id": h.rollout(), "changes": h.changes_of_rollout()},
    "cancel_rollouts": lambda h, rng: rng.choice(
        [
            {"rollout_ids": h.some_rollouts(), "group_id": None, "tags": None},
            {"rollout_ids": None, "group_id": rng.choice(["g1", "g2"]), "tags": rng.choice([None, {"k": 1}])},
            {"rollout_ids": None, "group_id": h.group_id(), "tags": rng.choice([None, None, {"k": 1}])},
        ]
    ),
    "requeue": lambda h, rng: {"rollout_ids": [h.rollout() for _ in range(rng.choice([1, 1, 1, 2, 4]))]},
    "release": lambda h, rng: {"rollout_ids": h.some_rollouts()},
    "delete_rollouts": lambda h, rng: {"rollout_ids": h.some_rollouts()},
    "start_attempt": lambda h, rng: {"rollout_id": h.rollout(), "worker_id": rng.choice([None, "w1"])},
    "query_attempts": lambda h, rng: {"rollout_id": h.rollout(), **h.page()},
    "get_latest_attempt": lambda h, rng: {"rollout_id": h.rollout()},
    "update_attempt": lambda h, rng: {
        **h.attempt(), **h.maybe(0.3, attempt_id="latest"), "changes": h.changes_of_attempt(),
    },
    "heartbeat": lambda h, rng: {"attempts_alive": [list(h.attempt().values()) for _ in range(3)]},
    "decline": lambda h, rng: h.attempt(),
    "acknowledge": lambda h, rng: {"keys": [list(h.attempt().values())]},
    "add_spans": lambda h, rng: {
        **h.attempt(), **h.maybe(0.2, attempt_id="latest"), "spans": [h.span() for _ in range(rng.randint(0, 3))],
    },
    "finish": lambda h, rng: {
        **h.attempt(), "spans": [h.span() for _ in range(rng.randint(0, 2))], "changes": h.end_of_attempt(),
    },
    "save": lambda h, rng: {
        **h.attempt(), "saved_state": rng.choice([None, *(encode("x" * n, "s", 10**6) for n in (1, 9, 40_000))]),
        "spans": [h.span() for _ in range(rng.randint(0, 2))],
    },
    "get_saved": lambda h, rng: h.attempt(),
    "refresh": lambda h, rng: h.attempt(),
    "next_numbers": lambda h, rng: {"rollout_ids": [h.rollout(), rng.choice(["mine-3", "ro-none"])]},
    "query_spans": lambda h, rng: {
        "rollout_id": h.rollout(), "attempt_id": rng.choice([None, "latest"]), "equal": {}, "containing": {},
        "filter_logic": "and", "allow_partial": True, **h.page(),
    },
    "query_many_spans": lambda h, rng: {
        "rollout_ids": [h.rollout(), h.rollout()], "attempt_id": rng.choice([None, "latest"]), "allow_partial": True,
    },
    "take": lambda h, rng: {
        "consumer": rng.choice(["c1", "c2"]), "count": rng.randint(1, 4), "timeout": rng.choice([0.0, 0.0, 10.0]),
        **h.maybe(0.2, mode="train"), **h.maybe(0.2, status_in=["succeeded", "failed"]),
        **h.maybe(0.2, group_id="g1"), **h.maybe(0.5, max_open=rng.randint(1, 3)),
    },
    "enqueue_groups": lambda h, rng: {
        "groups": [h.group() for _ in range(rng.choice([1, 1, 2]))], "gives": rng.choice(["rollouts", "groups"]),
        **h.maybe(0.2, admit=1, chain=[rng.randint(6, 9), rng.random() < 0.5]),
    },
    "get_group": lambda h, rng: {"group_id": h.group_id()},
    "query_groups": lambda h, rng: {
        "status_in": rng.choice([None, ["open"], ["complete", "trained"]]),
        "group_id_in": rng.choice([None, [h.group_id()]]), **h.page(),
    },
    "take_groups": lambda h, rng: {
        "consumer": rng.choice(["of groups", "of groups", "feed", "feed", "c2"]), "count": rng.randint(1, 2),
        "timeout": rng.choice([0.0, 0.0, 10.0]), **h.maybe(0.5, max_open=rng.randint(1, 3)),
    },
    "get_batch": lambda h, rng: {"consumer": h.consumer(), "batch": rng.randint(1, 6)},
    "ack": lambda h, rng: {
        "consumer": h.consumer(), "batch": rng.randint(1, 6), "at_step": rng.randint(0, 8), "note": None,
    },
    "nack": lambda h, rng: {"consumer": h.consumer(), "batch": rng.randint(1, 6)},
    "checkpoint": lambda h, rng: {"consumer": h.consumer(), "at_step": rng.randint(0, 6)},
    "rewind": lambda h, rng: {"consumer": h.consumer(), "at_step": rng.randint(0, 6)},
    "forget_consumer": lambda h, rng: {"consumer": h.consumer()},
    "ledger": lambda h, rng: {"consumer": h.consumer()},
    "pause_queues": lambda h, rng: {
        "queues": rng.choice([None, ["default"], ["other"], []]), "keep": rng.random() < 0.3,
    },
    "resume_queues": lambda h, rng: {
        "queues": rng.choice([None, None, ["default", "other"]]), "others": rng.random() < 0.5,
    },
    "limit_queue": lambda h, rng: {
        "queue": rng.choice(["default", "other"]), "max_running": rng.choice([None, 2, 5]),
        "per_minute": rng.choice([None, 1, 4]),
    },
    "open_feed": lambda h, rng: {
        **h.pump(), "rule": h.rule_of_feed(),
        "streams": [["a", 2.0, 9, "f"], ["b", 1.0, None, None]][: rng.choice([1, 2, 2])],
        "changed": rng.choice(["refuse", "continue", "continue"]),
    },
    "feed_work": lambda h, rng: {
        **h.pump(), "seen": rng.randint(0, 3), "over": rng.random() < 0.3, "timeout": rng.choice([0.0, 0.0, 5.0]),
    },
    "feed_add": lambda h, rng: {**h.pump(), **h.draw()},
    "feed_judge": lambda h, rng: {
        **h.pump(),
        "verdicts": [
            [group_id, rng.choice([None, None, "flat"]), rng.choice([None, 4]), rng.choice([[], [h.rollout()]])]
            for group_id in h.judged
        ],
    },
    "feed_choose": lambda h, rng: {**h.pump(), "group_ids": h.judged},
    "publish_feed": lambda h, rng: {
        **h.pump(), "version": rng.randint(0, 4), "digest": rng.choice(["x", "y"]), "resources": b"\x01\x80",
        "holds_objects": False, "objects": [],
    },
    "feed_items": lambda h, rng: {"feed": "feed", "group_ids": [f"a/{rng.randint(0, 5)}"]},
    "selection": lambda h, rng: {"consumer": rng.choice(["feed", h.consumer()]), "since": rng.choice([None, 0.0])},
    "feed_status": lambda h, rng: {"feed": "feed"},
    "resume_feed": lambda h, rng: {"feed": "feed"},
    "close_feed": lambda h, rng: h.pump(),
    "begin_evaluation": lambda h, rng: {
        "name": rng.choice(["e", "e", "f"]), "feed": rng.choice([None, "feed", "feed"]),
        "resources_id": rng.choice([None, "r1"]), "version": rng.choice([None, None, rng.randint(0, 4)]),
        "rule": {
            "total": rng.choice([3, 3, 1]), "items": "x", "samples": rng.choice([2, 2, 1]), "threshold": 0.0,
            "failure_reward": 0.0, "share": rng.choice([0.1, 0.5, 1.0]),
        },
        "overtaken": rng.choice(["finish", "finish", "drop"]),
    },
    "evaluation_add": lambda h, rng: {**h.evaluation(), **h.of_evaluation()},
    "evaluation_result": lambda h, rng: {**h.evaluation(), "timeout": rng.choice([0.0, 5.0])},
    "evaluations": lambda h, rng: {"name": rng.choice([None, "e"]), **h.maybe(0.5, feed="feed")},
    "drop_evaluation": lambda h, rng: {
        **{name: value for name, value in h.evaluation().items() if name != "branch"}, **h.maybe(0.3, branch=0),
    } if rng.random() < 0.3 else {"name": "none", "version": None},
    "put_resources": lambda h, rng: {
        "resources_id": rng.choice([None, "r1", "r2"]), "resources": b"\x01\x80",
        "policy_version": rng.choice([None, 1, 2]), "holds_objects": rng.random() < 0.3,
        **h.maybe(0.3, objects=[(rng.choice([None, "ab" * 20, "cd" * 20]), 100)]),
    },
    "hold_objects": lambda h, rng: {"versions": [(rng.choice(["r1", "r2"]), rng.randint(1, 2), b"\x01\x80")]},
    "unread": lambda h, rng: {
        **h.attempt(), "resources_id": rng.choice(["r1", "r2"]), "version": rng.randint(1, 2), "error": "gone",
    },
    "get_resources": lambda h, rng: {"resources_id": rng.choice(["r1", "r9"]), "version": rng.choice([None, 1, 2])},
    "get_latest_resources": lambda h, rng: {},
    "query_resources": lambda h, rng: {"resources_id": None, "resources_id_contains": "r", **h.page()},
    "delete_resources": lambda h, rng: {"resources_id": rng.choice(["r1", "r2"])},
    "update_worker": lambda h, rng: {
        "worker_id": rng.choice(["w1", "w3"]), "changes": rng.choice([{}, {"heartbeat_stats": b"\x01\x80"}]),
    },
    "query_workers": lambda h, rng: {
        "status_in": None, "worker_id_contains": None, "filter_logic": "and", **h.page(),
    },
    "get_worker": lambda h, rng: {"worker_id": "w1"},
    "end_chain": lambda h, rng: {"chain_id": rng.randint(1, 5)},
    "report_session": lambda h, rng: {
        "session_id": rng.choice([None, "zz", *h.sessions[-2:]]), "worker_id": rng.choice([None, "w2"]),
        "stopped": rng.random() < 0.3,
    },
    "wait": lambda h, rng: {"rollout_ids": [h.rollout(), h.rollout()], "timeout": rng.choice([0.0, 5.0, None])},
    "sort_out": lambda h, rng: {"rollout_ids": [h.rollout(), h.rollout()]},
    "completed": lambda h, rng: {
        "cursor": rng.choice([None, 3]), "limit": 5, "timeout": rng.choice([0.0, 5.0]),
        "filters": rng.choice([{}, {"group_id": "g1"}]),
    },
    "changes": lambda h, rng: {
        "cursor": rng.choice([None, 3]), "kinds": rng.choice([None, ["lost"]]), "limit": 5,
        "timeout": rng.choice([0.0, 5.0]),
    },
    "cancel_wait": lambda h, rng: {"of": rng.randint(1, 60)},
    "report_pool": lambda h, rng: {
        "pool_id": "p", "queues": [rng.choice(["default", "other"])], "failures": 3,
        "error": rng.choice([None, "no model server"]),
    },
    "report_spans_lost": lambda h, rng: {"counts": {rng.choice(["sampled_out", "refused"]): rng.randint(1, 9)}},
    "statistics": lambda h, rng: {},
    "metrics": lambda h, rng: {"seconds": rng.choice([0.0, 60.0, 3600.0]), "versions": rng.choice([0, 1, 100])},
    "story": lambda h, rng: {"rollout_id": h.rollout()},
    "why": lambda h, rng: {"rollout_id": None, "group_id": None, "consumer": None}
    | rng.choice([{}, {"rollout_id": h.rollout()}, {"group_id": "g1"}, {"consumer": "c"}]),
    "check": lambda h, rng: {},
    "tick": lambda h, rng: {
        "seconds": rng.choice([0.5, 2.0, 8.0, 70.0]), "sessions": rng.random() < 0.15,
    },
}  # fmt: skip

#: What is asked for more often than the rest.
OFTEN = [
    "begin_evaluation",
    "evaluation_add",
    "enqueue",
    "enqueue",
    "dequeue",
    "dequeue",
    "dequeue",
    "add_spans",
    "save",
    "finish",
    "finish",
    "update_attempt",
    "requeue",
    "take",
    "enqueue_groups",
    "take_groups",
    "open_feed",
    "publish_feed",
    "feed_add",
    "feed_add",
]


class Client(Peer):
    """One process, which opens another session when its own has ended."""

    def __init__(self, name: str, history: History) -> None:
        super().__init__(name)
        self.history = history
        self.generation = 0
        self.begin()

    def begin(self) -> None:
        self.generation += 1
        self.name = f"{self.name.split('/')[0]}/{self.generation}"
        self.ticket, self.sequence, self.sent = 1, 0, {}
        self.claims: list[list[str]] = []
        self.tickets: list[int] = []
        self.verbs: dict[int, str] = {}
        self.history.sessions.append(self.name)

    def header(self, sequence: int, answered: int | None = None, ahead: list[int] | None = None) -> list[Any]:
        header = super().header(sequence, answered, ahead)
        header[7:9] = [self.claims, self.tickets]
        return header


class Broken(AssertionError):
    """What must not be."""


async def _send(store: Store, client: Client, operations: list[Any], rng: random.Random) -> list[Any] | None:
    """Send a batch, perhaps twice at once; its replies, None if the session had ended."""
    if rng.random() < 0.2:
        client.claims = []  # acknowledged never, or late
    sequence = client.batch(*operations)
    sent = client.parts(sequence)
    client.claims, client.tickets = [], []
    copies = 2 if rng.random() < 0.2 else 1
    answers = await asyncio.gather(*(store.endpoint.exchange(sent) for _ in range(copies)))
    _, outcome, *rest = frames.unpack_answer(answers[0])
    if outcome == frames.ENDED:
        client.begin()
        return None
    replies, later, *_ = rest
    first = client.sent[sequence][0]
    for number, (operation, reply) in enumerate(zip(operations, replies, strict=True)):
        verb = operation[0] if isinstance(operation[0], str) else ""
        if reply[0] == frames.PARKED:
            client.verbs[first + number] = verb
        _learn(client, verb, reply)
    for ticket, reply in later:
        client.tickets.append(ticket)
        _learn(client, client.verbs.pop(ticket, ""), reply)
    return list(replies)


def _learn(client: Client, verb: str, reply: list[Any]) -> None:
    if reply[0] == frames.ERROR and reply[1] in ("StoreCorruptError", "StoreError"):
        raise Broken(f"{verb} broke the state: {reply}")
    if reply[0] != frames.VALUE:
        return
    client.history.learn(verb, reply[1])
    if verb == "dequeue":
        client.claims += [[rollout[0], attempt[1]] for rollout, attempt, _ in reply[1]]


def _operation(history: History, rng: random.Random) -> list[Any]:
    verb = rng.choice(OFTEN) if rng.random() < 0.5 else rng.choice(sorted(ARGUMENTS))
    arguments = ARGUMENTS[verb](history, rng)
    if rng.random() < NONSENSE_SHARE and arguments:
        arguments = _spoilt(arguments, rng)
    return [verb, arguments]


def _spoilt(arguments: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Arguments of which one value, at any depth, is nonsense; or one is missing, or one too many."""
    name = rng.choice(sorted(arguments))
    lot = rng.random()
    if lot < 0.1:
        return {key: value for key, value in arguments.items() if key != name}
    if lot < 0.2:
        return {**arguments, "nonsense": 1}
    return {**arguments, name: _spoilt_value(arguments[name], rng)}


def _spoilt_value(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.7:
        return _spoilt(value, rng) if all(isinstance(key, str) for key in value) else rng.choice(NONSENSE)
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], _spoilt_value(value[at], rng), *value[at + 1 :]]
    return rng.choice(NONSENSE)


def options(rng: random.Random) -> dict[str, Any]:
    """A configuration of a store."""
    return {
        "max_queued": rng.choice([None, 60]),
        "keep_resources": rng.choice([None, 2]),
        "retention": rng.choice([None, {"max_rollouts": 15}, {"max_age_seconds": 50}]),
        "duplicate_spans": rng.choice(["reject", "keep"]),
        "max_deliveries": rng.choice([1, 3]),
        "consumers": rng.choice([{}, {"c1": None}, {"c1": None, "c2": None}]),
    }


def _seeded(store: Store, rng: random.Random) -> Store:
    """A store whose ids follow from the seed of the history, so that it can be looked at again."""
    store.service._seeds = random.Random(rng.random())
    return store


def _same(one: Any, other: Any, what: str) -> None:
    if digest(one) != digest(other):
        pairs = zip(parts(one), parts(other), strict=False)
        differing = [pair for pair in pairs if repr(pair[0]) != repr(pair[1])]  # a NaN is the same as another
        raise Broken(f"{what} differs: {differing[:1]}")


def _explain(store: Store) -> None:
    """Ask why nothing goes on, of all and of some things: there is an answer, in one line, and nothing is changed."""
    state, ask = store.state, store.service.why
    named: dict[str, Any] = {"rollout_id": state.entries, "group_id": state.groups.by_id, "consumer": state.consumers}
    before = digest(state) if store.service.operations % 8 == 0 else None
    answers = [ask(), *(ask(**{name: one}) for name, table in named.items() for one in sorted(table)[-4:])]
    for found in itertools.chain(*answers):
        if not (found.text.isprintable() and found.remedy.isprintable() and found.kind in KINDS):
            raise Broken(f"a finding cannot be shown: {found}")
    if not all(answers) or (before is not None and digest(state) != before):
        raise Broken(f"no answer to why, or one that changed something: {answers}")


async def run(seed: int, path: Path, batches: int = 60) -> collections.Counter[str]:
    """One history; the errors that were answered, by class. Raises `Broken`, or whatever the store raises."""
    rng = random.Random(seed)
    server_session.SLICE_SECONDS = rng.choice([-1.0, 1.0])
    store = _seeded(Store(path, **options(rng)), rng)
    history = History(rng)
    clients = [Client(name, history) for name in "abc"]
    refused: collections.Counter[str] = collections.Counter()
    try:
        for _ in range(batches):
            client = rng.choice(clients)
            operations = [_operation(history, rng) for _ in range(rng.choice([1, 1, 2, 4]))]
            is_alone = len(operations) == 1 and not client.claims and "chain" not in operations[0][1]
            is_alone = is_alone and client.name not in store.service.liveness.suspended  # else speaking brings it work
            store.service.catch_up()
            store.service.advance()  # and those who wait have what that brought
            before = digest(store.state) if is_alone else ""
            ended = len(store.state.sessions)
            replies = await _send(store, client, operations, rng)
            for reply in replies or []:
                if reply[0] == frames.ERROR:
                    refused[reply[1]] += 1
            _explain(store)
            is_refused = is_alone and replies is not None and replies[0][0] == frames.ERROR
            if is_refused and ended == len(store.state.sessions) and digest(store.state) != before:
                raise Broken(f"a refused operation changed something: {operations} {replies}")
            if rng.random() < 0.03:
                store = _seeded(store.follow(), rng)
        check.check(store.state)
        store.writer.close()  # so that all of it is on disk
        again = read_run(path)
        if again.differences:
            raise Broken(f"a replay differs at records {again.differences}")
        _same(store.state, again.state, "a replay")
        directory = Directory(path)
        epoch, number, _ = directory.segments()[-1]
        outcome = compact(directory, epoch, number)
        if "differs" in outcome:
            raise Broken(f"a snapshot differs at records {outcome['differs']}")
        from_snapshot = read_run(path)
        _same(store.state, from_snapshot.state, "a snapshot")
        from_snapshot.state.guard_all()
        check.check(from_snapshot.state)
        return refused
    finally:
        if store.service.journal is not None and store.service.journal.recorder is not None:
            store.service.journal.recorder.writer.close()
        shutil.rmtree(path, ignore_errors=True)


def run_seed(seed: int) -> tuple[int, str, collections.Counter[str]]:
    """One history in a folder of its own: the seed, why it is broken (empty if it is not), the errors answered."""
    logging.disable(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp())
    try:
        return seed, "", asyncio.run(run(seed, folder / "journal"))
    except Exception as error:
        return (
            seed,
            f"{type(error).__name__}: {str(error)[:1500]}\n{traceback.format_exc()[-1500:]}",
            collections.Counter(),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Run the seeds from one number to another, on all processors."""
    first, last = int(sys.argv[1]), int(sys.argv[2])
    started, broken, total = time.monotonic(), 0, collections.Counter[str]()
    with multiprocessing.Pool(os.cpu_count()) as pool:
        for seed, why, refused in pool.imap_unordered(run_seed, range(first, last), chunksize=8):
            total += refused
            if why:
                broken += 1
                sys.stdout.write(f"seed {seed}: {why}\n")
    seconds = time.monotonic() - started
    sys.stdout.write(f"{last - first} seeds in {seconds:.0f} s, {broken} broken; refused: {dict(total)}\n")
    return bool(broken)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
