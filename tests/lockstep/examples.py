"""For each difference on the list, a program that shows it; none is left when there is none any more."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from tests.lockstep.operations import readable
from tests.lockstep.pair import Pair
from tests.lockstep.sides import Made

Program = Callable[[Pair], Awaitable[None]]

EXAMPLES: dict[str, Program] = {}
OPTIONS: dict[str, dict[str, Any]] = {}  #: of the stores, where a program needs some


def shows(name: str, **options: Any) -> Callable[[Program], Program]:
    """A program that meets the difference of this name."""

    def put(program: Program) -> Program:
        EXAMPLES[name] = program
        OPTIONS[name] = options
        return program

    return put


def span(rollout: Any, number: int = 1, *, attempt_id: str | None = None, **fields: Any) -> Made:
    """A span of an attempted rollout."""
    attempt_id = rollout.attempt.attempt_id if attempt_id is None else attempt_id
    given = {
        "rollout_id": rollout.rollout_id, "attempt_id": attempt_id, "sequence_id": number, "trace_id": "t",
        "span_id": f"s{number}", "parent_id": None, "name": "n", "attributes": {}, "events": [], "links": [],
        "start_time": None, "end_time": None, "context": None, "parent": None,
        "status": Made("TraceStatus", status_code="OK"), "resource": Made("OtelResource", attributes={}, schema_url=""),
    }  # fmt: skip
    return Made("Span", **(given | fields))


def retried(*conditions: str, **fields: Any) -> Made:
    return Made("RolloutConfig", max_attempts=3, retry_condition=list(conditions), **fields)


@shows("ids-are-checked")
async def _ids(pair: Pair) -> None:
    await pair.ask("start_rollout", input=1, worker_id="")


@shows("arguments-are-checked")
async def _arguments(pair: Pair) -> None:
    await pair.ask("query_rollouts", limit=-2)
    await pair.ask("query_rollouts", status_in=["asleep"])


@shows("configurations-are-checked")
async def _configurations(pair: Pair) -> None:
    await pair.ask("enqueue_rollout", input=1, config=Made("RolloutConfig", timeout=60))


@shows("resources-are-checked")
async def _resources(pair: Pair) -> None:
    await pair.ask("update_resources", resources_id="r", resources={})
    await pair.ask("update_resources", resources_id="r", resources={"p": "no resource"})


@shows("large-values-are-refused", limits={"value_bytes": 1000})
async def _large(pair: Pair) -> None:
    await pair.ask("enqueue_rollout", input="x" * 2000)


@shows("checked-before-anything-changes")
async def _checked(pair: Pair) -> None:
    made = await pair.ask("start_rollout", input=1)
    await pair.ask("update_attempt", rollout_id=made.rollout_id, attempt_id="latest", status="nonsense")


@shows("a-refused-span-counts-nothing")
async def _refused_span(pair: Pair) -> None:
    made = await pair.ask("start_rollout", input=1)
    await pair.ask("add_span", span=span(made, 7, attempt_id="another"))


@shows("every-rollout-with-its-attempt")
async def _with_attempt(pair: Pair) -> None:
    made = await pair.ask("start_rollout", input=1)
    await pair.ask("update_rollout", rollout_id=made.rollout_id, status="succeeded")
    await pair.ask("wait_for_rollouts", rollout_ids=[made.rollout_id], timeout=0)


@shows("more-statistics")
@shows("sizes-are-measured")
async def _statistics(pair: Pair) -> None:
    made = await pair.ask("start_rollout", input=1)
    await pair.ask("add_span", span=span(made))
    await pair.ask("statistics")


@shows("statistics-count-what-is-there", memory=True)
async def _total_spans(pair: Pair) -> None:
    for _ in range(2):
        made = await pair.ask("start_rollout", input=1)
        await pair.tick(1.0)
        for number in (1, 2, 3):
            await pair.ask("add_span", span=span(made, number))
    await pair.ask("statistics")


@shows("spans-in-the-order-of-arrival")
async def _order(pair: Pair) -> None:
    first = await pair.ask("start_rollout", input=1)
    await pair.ask("add_span", span=span(first, 1))
    second = await pair.ask("start_attempt", rollout_id=first.rollout_id)
    await pair.ask("add_span", span=span(second, 1))
    await pair.ask("query_spans", rollout_id=first.rollout_id)


@shows("or-without-filters-is-everything")
async def _or(pair: Pair) -> None:
    made = await pair.ask("start_rollout", input=1)
    await pair.ask("add_span", span=span(made))
    await pair.ask("query_spans", rollout_id=made.rollout_id, filter_logic="or")


@shows("duplicates-in-a-bulk")
async def _duplicates(pair: Pair) -> None:
    made = await pair.ask("start_rollout", input=1)
    await pair.ask("add_span", span=span(made, 1))
    await pair.ask("add_many_spans", spans=[span(made, 2), span(made, 1), span(made, 3)])


@shows("spans-are-added-by-attempt")
async def _by_attempt(pair: Pair) -> None:
    config = Made("RolloutConfig", timeout_seconds=1.0, max_attempts=2, retry_condition=["timeout"])
    made = await pair.ask("start_rollout", input=1, config=config)
    await pair.tick(3.0)
    await pair.ask("add_many_spans", spans=[span(made, 1), span(made, 2, attempt_id="latest")])


@shows("real-spans-keep-their-kind")
async def _kind(pair: Pair) -> None:
    made = await pair.ask("start_rollout", input=1)
    key = {"rollout_id": made.rollout_id, "attempt_id": made.attempt.attempt_id}
    await pair.ask("add_otel_span", **key, readable_span=readable(1))


@shows("end-times-are-cleared")
async def _end_time(pair: Pair) -> None:
    made = await pair.ask("enqueue_rollout", input=1)
    await pair.ask("update_rollout", rollout_id=made.rollout_id, status="failed")
    await pair.ask("update_rollout", rollout_id=made.rollout_id, status="queuing")


@shows("cancelled-stays-cancelled")
async def _cancelled(pair: Pair) -> None:
    made = await pair.ask("start_rollout", input=1)
    await pair.ask("update_rollout", rollout_id=made.rollout_id, status="cancelled")
    await pair.ask("update_attempt", rollout_id=made.rollout_id, attempt_id="latest", status="succeeded")


@shows("only-a-status-moves-a-rollout")
async def _only_a_status(pair: Pair) -> None:
    made = await pair.ask("start_rollout", input=1)
    await pair.ask("update_rollout", rollout_id=made.rollout_id, status="succeeded")
    await pair.ask("update_attempt", rollout_id=made.rollout_id, attempt_id="latest", metadata={"k": 1})


@shows("a-late-span-leaves-the-retry")
async def _late_span(pair: Pair) -> None:
    made = await pair.ask("start_rollout", input=1, config=retried("failed"))
    await pair.ask("update_attempt", rollout_id=made.rollout_id, attempt_id="latest", status="failed")
    await pair.ask("add_span", span=span(made))


@shows("a-span-takes-its-rollout-out-of-line")
async def _out_of_line(pair: Pair) -> None:
    made = await pair.ask("start_rollout", input=1)
    await pair.ask("update_rollout", rollout_id=made.rollout_id, status="queuing")
    await pair.ask("add_span", span=span(made))


@shows("who-leaves-the-queue-is-out-of-it")
async def _out_of_queue(pair: Pair) -> None:
    made = await pair.ask("enqueue_rollout", input=1)
    await pair.ask("update_rollout", rollout_id=made.rollout_id, status="cancelled")


@shows("time-outs-in-their-order")
async def _order_of_time_outs(pair: Pair) -> None:
    for _ in range(12):  # the reference's order is that of a set
        await pair.ask("start_rollout", input=1, config=retried("timeout", timeout_seconds=1.0))
    await pair.tick(2.0)


@shows("only-attempts-that-run-time-out")
async def _only_running(pair: Pair) -> None:
    made = await pair.ask("start_rollout", input=1, config=Made("RolloutConfig", timeout_seconds=1.0))
    await pair.ask("update_attempt", rollout_id=made.rollout_id, attempt_id="latest", status="succeeded")
    await pair.ask("update_rollout", rollout_id=made.rollout_id, status="running")
    await pair.tick(2.0)


@shows("a-heartbeat-is-no-later-than-now")
async def _beats(pair: Pair) -> None:
    made = await pair.ask("start_rollout", input=1, config=Made("RolloutConfig", unresponsive_seconds=1.0))
    beat = {"attempt_id": "latest", "last_heartbeat_time": pair.now + 100}
    await pair.ask("update_attempt", rollout_id=made.rollout_id, **beat)
    await pair.tick(2.0)


@shows("workers-that-moved-on-are-left-alone")
async def _moved_on(pair: Pair) -> None:
    first = await pair.ask("start_rollout", input=1, worker_id="w")
    await pair.ask("start_rollout", input=2, worker_id="w")
    await pair.ask("update_attempt", rollout_id=first.rollout_id, attempt_id="latest", status="succeeded")


@shows("who-finds-no-work-works-on-nothing")
async def _finds_nothing(pair: Pair) -> None:
    await pair.ask("start_rollout", input=1, worker_id="w")
    await pair.ask("dequeue_rollout", worker_id="w")


@shows("eviction-spares-who-is-needed", memory=True)
async def _eviction(pair: Pair) -> None:
    running = await pair.ask("start_rollout", input=1)
    await pair.tick(1.0)
    finished = await pair.ask("start_rollout", input=2)
    for number in (1, 2):
        await pair.ask("add_span", span=span(running, number))
        await pair.ask("add_span", span=span(finished, number))
    await pair.ask("update_attempt", rollout_id=finished.rollout_id, attempt_id="latest", status="succeeded")
    for number in (3, 4):
        await pair.ask("add_span", span=span(running, number))
    for number in (5, 6, 7):  # rollouts whose spans were evicted before are evicted again
        await pair.ask("add_span", span=span(finished, number))
        await pair.ask("add_span", span=span(running, number))
