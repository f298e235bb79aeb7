"""What may be asked, drawn by hypothesis: every method, both generations of keywords, now and then odd arguments.

Rollouts, attempts and resources are named by numbers, which mean one that there is when the operation runs; so a
failing program stays meaningful while hypothesis makes it smaller.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from tests.lockstep.pair import Pair
from tests.lockstep.sides import Made

LONG = "x" * 600


def mostly(usual: list[Any], odd: list[Any]) -> st.SearchStrategy[Any]:
    """One of the usual values, and of the odd ones so rarely that a program still gets somewhere."""
    return st.sampled_from(usual * (1 + 40 * len(odd) // len(usual)) + odd)


modes = mostly(["train", "val", "test", None], ["holiday"])
statuses = mostly(
    ["queuing", "preparing", "running", "failed", "succeeded", "cancelled", "requeuing"], ["timeout", "nonsense", None]
)
attempt_statuses = mostly(
    ["preparing", "running", "failed", "succeeded", "timeout", "unresponsive"], ["cancelled", "", None]
)
workers = mostly(["w0", "w1", "w2", None], ["w ü", "", "w\n"])
named_workers = mostly(["w0", "w1", "w2"], ["w ü", "", LONG])
inputs = st.sampled_from([None, "task", 1, 1.5, True, ["a", 1], {"k": {"l": [1]}}, b"bytes", ""])
mappings = st.sampled_from([{}, {"k": 1}, {"k": {"l": None}}, {"other": "x"}])
metadata = st.one_of(st.none(), mappings)
resources_ids = mostly([None, None, "res-a", "res-b"], ["nobody's", ""])
seconds = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0])
durations = st.sampled_from([None, None, 0.0, 0.7, 1.5, 2.5])
conditions = st.lists(st.sampled_from(["failed", "timeout", "unresponsive"]), unique=True)


def seldom(usual: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The same for values that are made."""
    return st.sampled_from(range(50)).flatmap(lambda number: odd if number == 49 else usual)


configs = seldom(
    st.one_of(st.none(), st.builds(
        lambda timeout, silence, attempts, retry: Made(
            "RolloutConfig",
            timeout_seconds=timeout, unresponsive_seconds=silence, max_attempts=attempts, retry_condition=retry,
        ),
        durations, durations, mostly([1, 2, 3], [0]), conditions,
    )),
    st.sampled_from([
        Made("RolloutConfig", timeout=60), Made("RolloutConfig", timeout_seconds=-1.0),
        Made("RolloutConfig", retry_condition=["sometimes"]),
    ]),
)  # fmt: skip
numbers = st.integers(0, 9)
rollouts = mostly(list(range(10)), ["ro-unknown", ""])
attempts = mostly(["latest", "latest", 0, 1, 2], ["at-unknown", "", "of another"])
limits = mostly([-1, -1, 0, 1, 2, 5], [-2])
offsets = mostly([0, 0, 0, 1, 3, 50], [-1])
orders = mostly(["asc", "desc"], ["sideways"])
logics = mostly(["and", "or"], ["xor"])
parts = st.sampled_from([None, None, "", "a", "ro", "0", "nothing has this"])
prompts = st.builds(
    lambda text: {"p": Made("PromptTemplate", template=text, engine="f-string")}, st.sampled_from(["t", "u"])
)
llms = st.just({"m": Made("LLM", endpoint="http://h/v1", model="m", sampling_parameters={"t": 0.5})})
all_resources = seldom(st.one_of(prompts, llms, st.just({})), st.just({"p": "no resource"}))

ROLLOUT_SORT = [
    None,
    None,
    "rollout_id",
    "start_time",
    "end_time",
    "mode",
    "resources_id",
    "status",
    "no_such",
    "input",
]
ATTEMPT_SORT = [None, "sequence_id", "attempt_id", "start_time", "end_time", "status", "worker_id",
                "last_heartbeat_time"]  # fmt: skip
WORKER_SORT = [None, None, "worker_id", "status", "last_heartbeat_time", "last_dequeue_time", "last_busy_time",
               "last_idle_time", "current_rollout_id", "current_attempt_id"]  # fmt: skip
RESOURCES_SORT = [None, None, "resources_id", "version", "create_time", "update_time"]
SPAN_SORT = ["sequence_id", "sequence_id", None, "start_time", "end_time", "name", "span_id", "trace_id", "parent_id",
             "attempt_id"]  # fmt: skip


def paged(sort: list[str | None]) -> dict[str, st.SearchStrategy[Any]]:
    return {"sort_by": mostly(sort, ["no_such"]), "sort_order": orders, "limit": limits, "offset": offsets}


def some(needed: dict[str, Any] | None = None, /, **optional: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Those that are needed, and a few of the others: with many filters nothing would be found."""
    names = st.lists(st.sampled_from(sorted(optional)), max_size=3, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({**(needed or {}), **{n: optional[n] for n in chosen}}))


new = {"mode": modes, "resources_id": resources_ids, "config": configs, "metadata": metadata}
span_fields = st.fixed_dictionaries(
    {
        "sequence_id": st.integers(0, 6), "span_id": st.sampled_from(["s0", "s1", "s2", "s3", "s4", "s5", "s6"]),
        "trace_id": st.sampled_from(["t0", "t1"]), "parent_id": st.sampled_from([None, "s0", "s1"]),
        "name": st.sampled_from(["call", "tool", "agentlightning.annotation"]),
        "start_time": st.sampled_from([None, 1.0, 2.0]), "end_time": st.sampled_from([None, 3.0]),
        "attributes": st.sampled_from([{}, {"a": 1}, {"a": [1, 2], "b": "x"}, {"agentlightning.reward.0.value": 0.5}]),
    },
    optional={"extra": st.just("kept")},
)  # fmt: skip
places = st.tuples(rollouts, attempts)
spans = st.tuples(rollouts, attempts, span_fields)
many_spans = st.one_of(st.lists(spans, max_size=4), st.tuples(places, st.lists(span_fields, max_size=5)))
otel = st.fixed_dictionaries(
    {"span": st.integers(1, 6), "kind": st.sampled_from(list(SpanKind)), "parent": st.booleans()}
)

OPERATIONS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "start_rollout": st.fixed_dictionaries({"input": inputs}, optional={**new, "worker_id": workers}),
    "enqueue_rollout": st.fixed_dictionaries({"input": inputs}, optional=new),
    "enqueue_many_rollouts": st.fixed_dictionaries(
        {"requests": st.lists(st.fixed_dictionaries({"input": inputs}, optional=new), max_size=3)}
    ),
    "dequeue_rollout": some(worker_id=workers),
    "dequeue_many_rollouts": some(limit=st.integers(-1, 3), worker_id=workers),
    "start_attempt": st.fixed_dictionaries({"rollout": rollouts}, optional={"worker_id": workers}),
    "query_rollouts": some(
        status_in=st.lists(statuses.filter(bool), max_size=3), status=st.lists(statuses.filter(bool), max_size=3),
        rollout_id_in=st.lists(rollouts, max_size=3), rollout_ids=st.lists(rollouts, max_size=3),
        rollout_id_contains=parts, filter_logic=logics, **paged(ROLLOUT_SORT),
    ),
    "get_rollout_by_id": st.fixed_dictionaries({"rollout": rollouts}),
    "query_attempts": st.fixed_dictionaries({"rollout": rollouts}, optional=paged(ATTEMPT_SORT)),
    "get_latest_attempt": st.fixed_dictionaries({"rollout": rollouts}),
    "update_rollout": st.fixed_dictionaries(
        {"rollout": rollouts}, optional={"input": inputs, **new, "status": statuses}
    ),
    "update_attempt": st.fixed_dictionaries(
        {"rollout": rollouts, "attempt": attempts},
        optional={
            "status": attempt_statuses, "worker_id": workers, "metadata": metadata,
            "last_heartbeat_time": mostly([-4.0, -1.0, 0.0, 2.0], ["never", "zero"]),
        },
    ),
    "add_span": st.fixed_dictionaries({"span": spans}),
    "add_many_spans": st.fixed_dictionaries({"spans": many_spans}),
    "add_otel_span": st.fixed_dictionaries(
        {"rollout": rollouts, "attempt": attempts, "otel": otel}, optional={"sequence_id": st.integers(0, 9)}
    ),
    "get_next_span_sequence_id": st.fixed_dictionaries({"rollout": rollouts, "attempt": attempts}),
    "get_many_span_sequence_ids": st.fixed_dictionaries({"pairs": st.lists(places, max_size=4)}),
    "query_spans": some(
        {"rollout": rollouts},
        attempt=attempts, trace_id=st.sampled_from(["t0", "t9"]), trace_id_contains=st.sampled_from(["t", "1"]),
        span_id=st.sampled_from(["s0", "s1"]), span_id_contains=st.sampled_from(["s", "1"]),
        parent_id=st.sampled_from(["s0", "s9"]), parent_id_contains=st.sampled_from(["s", "1"]),
        name=st.sampled_from(["call", "tool"]), name_contains=st.sampled_from(["l", "oo"]),
        filter_logic=logics, **paged(SPAN_SORT),
    ),
    "wait_for_rollouts": st.fixed_dictionaries(
        {"rollout_ids": st.lists(rollouts, max_size=4), "timeout": st.sampled_from([0, 0.0, -1.0])}
    ),
    "wait_for_rollout": st.fixed_dictionaries({"rollout": rollouts, "timeout": st.sampled_from([0, -1.0])}),
    "add_resources": st.fixed_dictionaries({"resources": all_resources}),
    "update_resources": st.fixed_dictionaries(
        {"resources_id": mostly(["res-a", "res-b", 0, 1], ["res ü", ""]), "resources": all_resources}
    ),
    "get_resources_by_id": st.fixed_dictionaries({"resources_id": mostly(["res-a", "res-b", 0], ["nobody's", ""])}),
    "get_latest_resources": st.just({}),
    "query_resources": some(
        resources_id=st.sampled_from(["res-a", "res-b", 0]), resources_id_contains=parts, **paged(RESOURCES_SORT)
    ),
    "update_worker": st.fixed_dictionaries({"worker_id": named_workers}, optional={"heartbeat_stats": metadata}),
    "get_worker_by_id": st.fixed_dictionaries({"worker_id": named_workers}),
    "query_workers": some(
        status_in=st.lists(st.sampled_from(["idle", "busy", "unknown", "asleep"]), max_size=2),
        worker_id_contains=st.sampled_from([None, "w", "1", ""]), filter_logic=logics, **paged(WORKER_SORT),
    ),
    "statistics": st.just({}),
    "tick": st.fixed_dictionaries({"seconds": seconds}),
}  # fmt: skip

_OFTEN = {"start_rollout": 2, "enqueue_rollout": 2, "dequeue_rollout": 4, "update_attempt": 5, "update_rollout": 4,
          "add_span": 5, "add_many_spans": 3, "tick": 4, "start_attempt": 2, "query_spans": 4, "query_rollouts": 3,
          "add_otel_span": 2}  # fmt: skip


def _named(name: str) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    return st.tuples(st.just(name), OPERATIONS[name])


#: One operation: its name and its arguments.
operations = st.sampled_from([name for name in OPERATIONS for _ in range(_OFTEN.get(name, 1))]).flatmap(_named)


async def run(pair: Pair, name: str, drawn: dict[str, Any]) -> Any:
    """Run a drawn operation on both stores."""
    if name == "tick":
        return await pair.tick(drawn["seconds"])
    return await pair.ask(name, **_meant(pair, name, dict(drawn)))


def _meant(pair: Pair, name: str, drawn: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with what numbers stand for."""
    if name == "enqueue_many_rollouts":
        return {"rollouts": [Made("EnqueueRolloutRequest", **request) for request in drawn["requests"]]}
    if name == "add_span":
        return {"span": _span(pair, *drawn["span"])}
    if name == "add_many_spans":
        given = drawn["spans"]
        if isinstance(given, tuple):
            (rollout, attempt), fields = given
            given = [(rollout, attempt, each) for each in fields]
        return {"spans": [_span(pair, *each) for each in given]}
    if name == "get_many_span_sequence_ids":
        return {"rollout_attempt_ids": [_ids(pair, *each) for each in drawn["pairs"]]}
    if "attempt" in drawn:
        drawn["rollout_id"], drawn["attempt_id"] = _ids(pair, drawn.pop("rollout"), drawn.pop("attempt"))
    elif "rollout" in drawn:
        drawn["rollout_id"] = _rollout(pair, drawn.pop("rollout"))
    for key in ("rollout_id_in", "rollout_ids"):
        if key in drawn:
            drawn[key] = [_rollout(pair, each) for each in drawn[key]]
    if isinstance(drawn.get("resources_id"), int):
        drawn["resources_id"] = _one(pair.resources(), drawn["resources_id"], "res-a")
    if "last_heartbeat_time" in drawn:
        beat = drawn["last_heartbeat_time"]
        drawn["last_heartbeat_time"] = {"zero": 0.0}.get(beat, beat) if isinstance(beat, str) else pair.now + beat
    if name == "add_otel_span":
        drawn["readable_span"] = readable(**drawn.pop("otel"))
    return drawn


def _one(known: list[str], number: int, otherwise: str) -> str:
    return known[-1 - number % len(known)] if known else otherwise


def _rollout(pair: Pair, named: int | str) -> str:
    return named if isinstance(named, str) else _one(pair.rollouts(), named, "ro-unknown")


def _ids(pair: Pair, rollout: int | str, attempt: int | str) -> tuple[str, str]:
    rollout_id = _rollout(pair, rollout)
    if attempt == "of another":
        others = [a for other in pair.rollouts() if other != rollout_id for a in pair.attempts(other)]
        return rollout_id, others[0] if others else "at-unknown"
    if isinstance(attempt, str):
        return rollout_id, attempt
    return rollout_id, _one(pair.attempts(rollout_id), attempt, "at-unknown")


def _span(pair: Pair, rollout: int | str, attempt: int | str, fields: dict[str, Any]) -> Made:
    rollout_id, attempt_id = _ids(pair, rollout, attempt)
    if attempt_id == "latest" and (known := pair.attempts(rollout_id)) and fields["sequence_id"] % 3:
        attempt_id = known[-1]  # the word itself is refused, which is not to be all that happens
    context = {"trace_id": fields["trace_id"], "span_id": fields["span_id"], "is_remote": False, "trace_state": {}}
    return Made(
        "Span", rollout_id=rollout_id, attempt_id=attempt_id, events=[], links=[], parent=None,
        context=Made("SpanContext", **context), status=Made("TraceStatus", status_code="OK"),
        resource=Made("OtelResource", attributes={}, schema_url=""), **fields,
    )  # fmt: skip


def readable(span: int, kind: SpanKind = SpanKind.CLIENT, parent: bool = False) -> ReadableSpan:
    """A span as the OpenTelemetry SDK hands it to exporters."""
    context = SpanContext(7, span, is_remote=False, trace_flags=TraceFlags(1))
    above = SpanContext(7, 99, is_remote=True) if parent else None
    return ReadableSpan(
        "otel", context, above, Resource({"service.name": "s"}), {"a": 1, "b": "x"}, kind=kind,
        status=Status(StatusCode.ERROR, "bad"), start_time=10**18, end_time=10**18 + 10**9,
    )  # fmt: skip
