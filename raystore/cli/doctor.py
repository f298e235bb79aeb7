"""What is wrong with a run although it runs: looked for in the rollouts that finished last, each finding with a remedy.

`examine` reads, page by page, through methods that every store has; `seen` says of one rollout what counts, and
`findings_of` makes findings of that, both without asking anybody. Reading the spans of a rollout marks it as read, as
any reader does.
Not here: why work does not go on (`store.why`), of which the findings about queues, pools and resources are taken over.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from raystore.api import LightningStore
from raystore.core.findings import Kind, finding, lasting
from raystore.errors import PayloadNotReadableError, RolloutNotFoundError, SpansEvictedError
from raystore.tracing.calls import ModelCall, model_calls
from raystore.tracing.evidence import lacking
from raystore.types.contract import AnyRollout, Attempt, Finding, Group, LightningStoreStatistics, Worker, is_finished
from raystore.types.evaluations import is_sample
from raystore.types.spans import Span
from raystore.wire import checks

PAGE = 200  #: rollouts that are read at once
WORKERS = 10_000  #: that are looked at
SKEW_SECONDS = 2.0  #: by which the clocks of a runner and of the store may differ
MEMORY_SHARE = 0.8  #: of the threshold of eviction, from which on it is named
EQUAL_SHARE = 0.2  #: of the groups: that so many have nothing to teach is usual, and DAPO leaves them out

TRUNCATED = frozenset({"length", "max_tokens", "max_output_tokens", "model_length"})  #: as tracers call it
TOOLS_ANNOUNCED = frozenset({"tool_calls", "tool_use"})  #: a model that stops so has called a tool

WRONG, COSTLY, ODD = 1, 2, 3  #: what is trained on is wrong or lacks; work is lost or held up; to be looked at


class Check(NamedTuple):
    """One thing that is looked for."""

    severity: int
    kind: Kind


#: All that is looked for, by the kind of its findings.
CHECKS: dict[str, Check] = {
    "no_reward": Check(WRONG, Kind(
        "Rollouts succeeded without a reward.",
        "Let the agent return a number, or call ctx.reward(x); `rs.find_final_reward` says what counts as one.",
    )),
    "no_model_call": Check(WRONG, Kind(
        "Rollouts succeeded, and no call of a model was recorded for them.",
        "Record calls with ctx.llm(...), or say rs.otel.instrument() in the agent, and look at "
        "statistics()['spans_lost'].",
    )),
    "without_token_ids": Check(WRONG, Kind(
        "Calls of a model have no token ids of prompt and response, so that they cannot be trained on.",
        "Ask the server for them (vLLM: return_token_ids=True in the extra body), or record the call with "
        "ctx.llm(prompt_ids=, response_ids=, logprobs=).",
    )),
    "without_logprobs": Check(WRONG, Kind(
        "Calls of a model have no log-probabilities, so that no importance ratio can be computed.",
        "Ask the server for them (logprobs=True), or give them to ctx.llm(logprobs=).",
    )),
    "spans_evicted": Check(WRONG, Kind(
        "Spans of finished rollouts were evicted, since memory was full.",
        "Start the store with journal=..., which keeps spans on disk; or train and release() sooner.",
    )),
    "resources_missing": Check(WRONG, Kind(
        "Rollouts ran without the resources that they name, since nothing was published under that id.",
        "Publish them before the first claim: store.update_resources(id, ...); or correct resources_id=.",
    )),
    "bad_tool_calls": Check(COSTLY, Kind(
        "Models called tools without a name, or with arguments that are no JSON object.",
        "Look at an example with `rs.model_calls`: the server may parse tools as another model writes them, or answers "
        "are cut off.",
    )),
    "truncated": Check(COSTLY, Kind(
        "Answers of a model ended at the limit of their length.",
        "Raise max_tokens, or leave out what is truncated: its reward says little about the answer.",
    )),
    "equal_rewards": Check(COSTLY, Kind(
        "All members of a group have the same reward, so that their advantages are 0.",
        "Leave them out with rs.keep(std=1e-6), take items of another difficulty, or a reward that tells more apart.",
    )),
    "memory_high": Check(COSTLY, Kind(
        "The store uses at least 80 % of the memory at which it evicts spans.",
        "Say release() or checkpoint() of what is done with, raise eviction_memory_threshold=, or give it a journal.",
    )),
    "no_retry_condition": Check(COSTLY, Kind(
        "Rollouts have max_attempts above 1 and no retry_condition, so that nothing is tried again.",
        "Add retry_condition=['failed', 'timeout', 'unresponsive'], or those of them that you mean.",
    )),
    "never_polled": Check(COSTLY, Kind(
        "Runners send heartbeats, and have never asked for work.",
        "Look into their logs: the setup of their agent may hang.",
    )),
    "clock_skew": Check(ODD, Kind(
        "Spans lie outside of the time in which the store saw their attempt: clocks differ.",
        "Synchronise the clocks of the nodes (NTP, chrony); durations across nodes are wrong until then.",
    )),
}  # fmt: skip

#: Kinds of findings of `store.why` that are taken over.
TAKEN_OVER = ("unserved_queue", "pool_failed", "pool_fails", "resources_gone")


# -- one rollout -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Seen:
    """What counts of one rollout."""

    rollout_id: str
    environment: str
    group_id: str | None
    succeeded: bool
    reward: float | None
    calls: int = 0
    without_token_ids: int = 0
    without_logprobs: int = 0
    truncated: int = 0
    tool_calls: int = 0
    bad_tool_calls: int = 0
    evicted: bool = False
    skew_seconds: float = 0.0
    lacks_resources: bool = False
    retries_nothing: bool = False


def seen(rollout: AnyRollout, spans: Sequence[Span] | None) -> Seen:
    """What counts of a rollout with the spans of its latest attempt; None: they were evicted."""
    attempt = getattr(rollout, "attempt", None)
    found = Seen(
        rollout.rollout_id, str(rollout.tags.get("env", "")), rollout.group_id, rollout.status == "succeeded",
        rollout.reward, evicted=spans is None,
    )  # fmt: skip
    found.retries_nothing = rollout.config.max_attempts > 1 and not rollout.config.retry_condition
    found.lacks_resources = (
        rollout.resources_id is not None and attempt is not None and attempt.resources_version is None
    )
    if attempt is not None:
        found.skew_seconds = max((_outside(attempt, span) for span in spans or ()), default=0.0)
    for call in model_calls(spans or ()):
        _count(found, call)
    return found


def _outside(attempt: Attempt, span: Span) -> float:
    """For how many seconds a span begins before its attempt, or after it."""
    if span.start_time is None:
        return 0.0
    after = span.start_time - attempt.end_time if attempt.end_time is not None else 0.0
    return max(attempt.start_time - span.start_time, after, 0.0)


def _count(found: Seen, call: ModelCall) -> None:
    found.calls += 1
    has_no_ids = lacking([call], ["token_ids"]) is not None
    found.without_token_ids += has_no_ids
    found.without_logprobs += not has_no_ids and lacking([call], ["logprobs"]) is not None
    try:
        reason = (call.finish_reason or "").lower()
        tools = [tool for message in call.answer for tool in message.get("tool_calls") or ()]
    except PayloadNotReadableError:  # which `model_calls` has logged
        return
    found.truncated += reason in TRUNCATED
    if reason in TOOLS_ANNOUNCED and not tools:
        tools = [{}]
    found.tool_calls += len(tools)
    found.bad_tool_calls += sum(not _is_good(tool) for tool in tools)


def _is_good(tool: Any) -> bool:
    """Whether a call of a tool has a name, and arguments that are a JSON object."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not function.get("name"):
        return False
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        return True
    try:
        return isinstance(json.loads(arguments or ""), dict)
    except (TypeError, ValueError):
        return False


# -- all that was read -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Read:
    """What was read of a store."""

    rollouts: list[Seen] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)  #: of these rollouts
    workers: list[Worker] = field(default_factory=list)
    statistics: LightningStoreStatistics | None = None  #: None: only one rollout was asked for
    why: list[Finding] = field(default_factory=list)


def findings_of(read: Read) -> list[Finding]:
    """What is wrong, by severity and share."""
    rollouts = read.rollouts
    found = [
        *_of_rollouts(rollouts),
        *_of_clocks(rollouts),
        *_of_tools(rollouts),
        *_of_groups(read),
        *_of_the_store(read),
    ]
    taken = [one for one in read.why if one.kind in TAKEN_OVER]
    return [*taken, *sorted(found, key=lambda one: (CHECKS[one.kind].severity, -one.evidence["share"]))]


def _finding(kind: str, text: str, number: int, among: int, example: str | None, **more: Any) -> Finding:
    evidence = {"count": number, "of": among, "share": number / among, "example": example, **more}
    made = finding(CHECKS[kind].kind, kind, text, evidence)
    return Finding(kind=made.kind, text=made.text, remedy=made.remedy, evidence=made.evidence)


def _share(number: int, among: int) -> str:
    return f"{number:,} of {among:,} ({number / among:.0%})" if number / among >= 0.01 else f"{number:,} of {among:,}"


#: Of which rollouts, which of them, and what is said of these.
_OF_ROLLOUTS: list[tuple[str, Callable[[Seen], bool], Callable[[Seen], bool], str]] = [
    ("no_reward", lambda one: one.succeeded, lambda one: one.reward is None,
     "rollouts that succeeded have no reward"),
    ("no_model_call", lambda one: one.succeeded and not one.evicted, lambda one: one.calls == 0,
     "rollouts that succeeded have no recorded call of a model"),
    ("spans_evicted", lambda one: True, lambda one: one.evicted, "rollouts have lost spans, which were evicted"),
    ("resources_missing", lambda one: True, lambda one: one.lacks_resources,
     "rollouts ran without the resources that they name"),
    ("no_retry_condition", lambda one: True, lambda one: one.retries_nothing,
     "rollouts have max_attempts above 1 and no retry_condition"),
]  # fmt: skip

#: The counter of a rollout, and what is said of that many calls.
_OF_CALLS: dict[str, str] = {
    "without_token_ids": "recorded calls of a model have no token ids",
    "without_logprobs": "recorded calls of a model have no log-probabilities",
    "truncated": "recorded calls of a model ended at the limit of their length",
}


def _of_rollouts(rollouts: Sequence[Seen]) -> Iterable[Finding]:
    for kind, is_among, is_so, said in _OF_ROLLOUTS:
        among = [one for one in rollouts if is_among(one)]
        wrong = [one for one in among if is_so(one)]
        if wrong:
            example = wrong[0].rollout_id
            yield _finding(
                kind, f"{_share(len(wrong), len(among))} {said}, as {example}", len(wrong), len(among), example
            )
    calls = sum(one.calls for one in rollouts)
    for kind, said in _OF_CALLS.items():
        number = sum(getattr(one, kind) for one in rollouts)
        if number:
            example = max(rollouts, key=lambda one: getattr(one, kind)).rollout_id
            yield _finding(kind, f"{_share(number, calls)} {said}, as in {example}", number, calls, example)


def _of_clocks(rollouts: Sequence[Seen]) -> Iterable[Finding]:
    among = [one for one in rollouts if not one.evicted]
    wrong = sorted((one for one in among if one.skew_seconds > SKEW_SECONDS), key=lambda one: -one.skew_seconds)
    if wrong:
        worst = wrong[0]
        text = (
            f"{_share(len(wrong), len(among))} rollouts have spans outside of the time in which the store saw their "
            f"attempt, by up to {lasting(worst.skew_seconds)}, as {worst.rollout_id}"
        )
        yield _finding("clock_skew", text, len(wrong), len(among), worst.rollout_id, seconds=worst.skew_seconds)


def _of_tools(rollouts: Sequence[Seen]) -> Iterable[Finding]:
    """By environment, since each has tools of its own."""
    for environment in sorted({one.environment for one in rollouts}):
        here = [one for one in rollouts if one.environment == environment]
        number, among = sum(one.bad_tool_calls for one in here), sum(one.tool_calls for one in here)
        if number:
            example = max(here, key=lambda one: one.bad_tool_calls).rollout_id
            where = f" in environment {environment!r}" if environment else ""
            text = f"{_share(number, among)} calls of tools{where} are empty or malformed, as in {example}"
            yield _finding("bad_tool_calls", text, number, among, example, environment=environment)


def _of_groups(read: Read) -> Iterable[Finding]:
    """Groups of which all members were read."""
    rewards = {one.rollout_id: one.reward for one in read.rollouts if one.succeeded and one.reward is not None}
    known = {one.rollout_id for one in read.rollouts}
    judged = [
        (group, [rewards[i] for i in group.members if i in rewards])
        for group in read.groups
        if known.issuperset(group.members) and not is_sample(group)
    ]
    judged = [(group, given) for group, given in judged if len(given) > 1]
    equal = [(group, given) for group, given in judged if len(set(given)) == 1]
    if equal and len(equal) >= EQUAL_SHARE * len(judged):
        group, given = equal[0]
        example = next(i for i in group.members if i in rewards)
        text = (
            f"{_share(len(equal), len(judged))} groups have one reward for all their members, as {group.group_id}: "
            f"{len(given)} x {given[0]:g}"
        )
        yield _finding("equal_rewards", text, len(equal), len(judged), example, group_id=group.group_id)


def _of_the_store(read: Read) -> Iterable[Finding]:
    silent = [one for one in read.workers if one.last_heartbeat_time is not None and _has_never_polled(one)]
    if silent:
        text = f"{_share(len(silent), len(read.workers))} runners have never asked for work, as {silent[0].worker_id}"
        yield _finding("never_polled", text, len(silent), len(read.workers), None, worker_id=silent[0].worker_id)
    known = read.statistics
    if known is None or known["journal"] is not None or any(one.kind == "read_only" for one in read.why):
        return  # with a journal, spans that are evicted are still to be had
    used, threshold = known["accounted_bytes"], known["eviction_threshold_bytes"]
    if used >= MEMORY_SHARE * threshold:
        text = f"{used:,} bytes are in use, {used / threshold:.0%} of the {threshold:,} at which spans are evicted"
        yield _finding("memory_high", text, used, threshold, None)


def _has_never_polled(worker: Worker) -> bool:
    return worker.last_dequeue_time is None and worker.last_busy_time is None


# -- reading -----------------------------------------------------------------------------------------------------------


async def examine(store: LightningStore, rollout_id: str | None = None, *, limit: int = 1_000) -> list[Finding]:
    """What is wrong with the `limit` finished rollouts that were enqueued last, and with their store.

    With `rollout_id`: with this rollout alone. Raises `RolloutNotFoundError`, and `InvalidValueError` for a `limit`
    that is not 1 or more.
    """
    limit = checks.whole("limit", limit, at_least=1)
    read = Read()
    if rollout_id is not None:
        rollout = await store.get_rollout_by_id(rollout_id)
        if rollout is None:
            raise RolloutNotFoundError(rollout_id)
        read.rollouts = await _seen_with_spans(store, [rollout])
        return findings_of(read)
    read.statistics = await store.statistics()
    waiting, offset = read.statistics["queue_length"], 0
    known: dict[str, Seen] = {}
    while len(known) < limit:
        page = await store.query_rollouts(sort_by="start_time", sort_order="desc", limit=PAGE, offset=offset)
        if not page:
            break
        done = [one for one in page if is_finished(one) and one.rollout_id not in known][: limit - len(known)]
        known.update((one.rollout_id, one) for one in await _seen_with_spans(store, done))
        # What is enqueued last waits, and need not be read.
        offset = offset + PAGE if done else max(offset + PAGE, waiting)
    read.rollouts = list(known.values())
    ids = list(dict.fromkeys(one.group_id for one in read.rollouts if one.group_id is not None))
    for start in range(0, len(ids), PAGE):
        read.groups += await store.query_groups(group_id_in=ids[start : start + PAGE])
    read.workers = list(await store.query_workers(limit=WORKERS))
    read.why = await store.why()
    return findings_of(read)


async def _seen_with_spans(store: LightningStore, rollouts: Sequence[AnyRollout]) -> list[Seen]:
    """What counts of these rollouts. Their spans are read at once if none of them was evicted."""
    ids = [one.rollout_id for one in rollouts]
    try:
        spans: dict[str, Any] = dict(await store.query_many_spans(ids)) if ids else {}
    except SpansEvictedError:
        calls = (store.query_spans(one, "latest") for one in ids)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        spans = {}
        for one, answer in zip(ids, answers, strict=True):
            if isinstance(answer, BaseException) and not isinstance(answer, SpansEvictedError):
                raise answer from None
            spans[one] = None if isinstance(answer, SpansEvictedError) else answer
    return [seen(one, spans[one.rollout_id]) for one in rollouts]
