"""The list of differences from the reference, by name, as the comparison uses it.

`docs/conformance.md` says of each name what differs and why; a test holds the two lists equal and shows each difference
by a program of its own, so that none stays that is none any more. An entry looks at one place where the two stores
differ after one operation, and says whether it allows that: by what the operation was and what both held before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.lockstep.pair import NOTHING, Case, Place
from tests.lockstep.sides import Made

Allows = Callable[[Case, Place, Any, Any], bool]

DIFFERENCES: dict[str, Allows] = {}

QUEUED = ("queuing", "requeuing")
ACTIVE = ("preparing", "running")
FINISHED = ("failed", "succeeded", "cancelled")
SETTLED = ("failed", "succeeded", "timeout", "unresponsive")

#: Where the consequences of another status show.
FOLLOWS_STATUS = {"status", "end_time", "is a"}


def listed(name: str) -> Callable[[Allows], Allows]:
    """Put a difference on the list."""

    def put(allows: Allows) -> Allows:
        DIFFERENCES[name] = allows
        return allows

    return put


# -- what is refused ---------------------------------------------------------------------------------------------------


def _refused(case: Case, place: Place) -> bool:
    """Ours refused, the reference did not, and the place is the error, or what the reference then did.

    Of several spans the reference stores those before the one that it refuses; ours stores none.
    """
    is_taken = not case.is_error(case.theirs) or case.name == "add_many_spans"
    return case.is_error(case.ours) and is_taken and place[0] != "answer"


@listed("ids-are-checked")
def _ids_are_checked(case: Case, place: Place, one: Any, other: Any) -> bool:
    names = {"worker_id", "resources_id", "rollout_id", "attempt_id", "span_id", "trace_id", "parent_id"}
    names |= {"rollout_ids", "rollout_id_in", "rollout_attempt_ids"}
    given = [case.arguments, *_models(case.arguments)]
    ids = [found for arguments in given for name in names & arguments.keys() for found in _texts(arguments[name])]
    return any(map(_is_odd_id, ids)) and _refused(case, place)


def _texts(value: Any) -> list[str]:
    """The texts in a value, and in lists of them."""
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def _models(value: Any) -> list[dict[str, Any]]:
    """The fields of all models among arguments."""
    if isinstance(value, Made):
        return [value.fields, *_models(value.fields)]
    if isinstance(value, dict):
        return [found for item in value.values() for found in _models(item)]
    return [found for item in value for found in _models(item)] if isinstance(value, list) else []


def _is_odd_id(value: str) -> bool:
    return not (0 < len(value) <= 512 and value.isprintable())


@listed("arguments-are-checked")
def _arguments_are_checked(case: Case, place: Place, one: Any, other: Any) -> bool:
    asked = case.arguments
    odd = (
        asked.get("limit", 0) < -1
        or asked.get("offset", 0) < 0
        or asked.get("sort_by") in ("no_such", "input")
        or asked.get("sort_order") == "sideways"
        or asked.get("filter_logic") == "xor"
        or any(s in ("nonsense", "timeout", "asleep") for s in asked.get("status_in") or asked.get("status") or ())
    )  # fmt: skip
    return odd and case.name.startswith("query") and (_refused(case, place) or place == ("error",))


@listed("configurations-are-checked")
def _configurations_are_checked(case: Case, place: Place, one: Any, other: Any) -> bool:
    configs = [case.arguments.get("config"), *[m.get("config") for m in _models(case.arguments)]]
    odd = [c for c in configs if c and ("timeout" in c.fields or (c.fields.get("timeout_seconds") or 0) < 0)]
    return bool(odd) and _refused(case, place)


@listed("resources-are-checked")
def _resources_are_checked(case: Case, place: Place, one: Any, other: Any) -> bool:
    is_odd = case.arguments.get("resources") == {"p": "no resource"}
    return case.name == "update_resources" and is_odd and _refused(case, place)


@listed("large-values-are-refused")
def _large_values_are_refused(case: Case, place: Place, one: Any, other: Any) -> bool:
    return _refused(case, place) and "PayloadTooLargeError" in type(case.ours).__name__


@listed("checked-before-anything-changes")
def _checked_first(case: Case, place: Place, one: Any, other: Any) -> bool:
    is_refused = case.is_error(case.ours) and case.is_error(case.theirs)
    return is_refused and case.name == "update_attempt" and place[0] == "attempt" and one == case.before.get(place)


@listed("a-refused-span-counts-nothing")
def _refused_span(case: Case, place: Place, one: Any, other: Any) -> bool:
    is_refused = case.is_error(case.ours) or case.ours is None or case.name == "add_many_spans"  # a duplicate is, too
    return is_refused and "span" in case.name and place[0] == "counter" and (one == NOTHING or one < other)


# -- what answers look like --------------------------------------------------------------------------------------------


@listed("every-rollout-with-its-attempt")
def _with_attempts(case: Case, place: Place, one: Any, other: Any) -> bool:
    if case.name not in ("wait_for_rollouts", "wait_for_rollout", "update_rollout") or place[0] != "answer":
        return False
    return (place[-1] == "attempt" and other == NOTHING) or (one, other) == ("AttemptedRollout", "Rollout")


@listed("more-statistics")
def _more_statistics(case: Case, place: Place, one: Any, other: Any) -> bool:
    return case.name == "statistics" and (other == NOTHING or place[-1] == "uptime")


@listed("sizes-are-measured")
def _sizes(case: Case, place: Place, one: Any, other: Any) -> bool:
    # Without an estimator of the caller's; and a container's limit counts as the memory that there is.
    return case.name == "statistics" and place[-1].endswith("_bytes") and not case.memory


@listed("statistics-count-what-is-there")
def _statistics_count(case: Case, place: Place, one: Any, other: Any) -> bool:
    evicted = any(p[0] == "evicted" for p in case.before)
    return case.name == "statistics" and place == ("answer", "total_spans") and evicted and one < other


@listed("spans-in-the-order-of-arrival")
def _order_of_spans(case: Case, place: Place, one: Any, other: Any) -> bool:
    if case.name != "query_spans" or place[:2] != ("answer", "items") or case.arguments.get("attempt_id") is not None:
        return False
    # The reference goes through a rollout's attempts from the last to the first, and so among equals of a sort.
    key = case.arguments.get("sort_by", "sequence_id")
    ours, theirs = (
        [None if key is None else item[key] for item in case.answers[side]["items"]] for side in ("ours", "theirs")
    )
    return ours == theirs and len(case.attempts(case.arguments["rollout_id"])) > 1


@listed("or-without-filters-is-everything")
def _or_without_filters(case: Case, place: Place, one: Any, other: Any) -> bool:
    filters = {"trace_id", "span_id", "parent_id", "name"}
    given = any(name.removesuffix("_contains") in filters for name in case.arguments)
    is_or = case.name == "query_spans" and case.arguments.get("filter_logic") == "or"
    return is_or and not given and place[0] == "answer" and case.answers["theirs"]["total"] == 0


@listed("duplicates-in-a-bulk")
def _duplicates_in_a_bulk(case: Case, place: Place, one: Any, other: Any) -> bool:
    # The reference counts what it stored before it met a duplicate as a duplicate of itself.
    if case.name != "add_many_spans":
        return False
    keys = [(s.fields["rollout_id"], s.fields["attempt_id"], s.fields["span_id"]) for s in case.arguments["spans"]]
    repeated = any(("span", *key) in case.before for key in keys)
    return repeated and place[0] in ("answer", "rollout", "attempt", "queue", "evicted", "span", "left in queue")


@listed("real-spans-keep-their-kind")
def _kind(case: Case, place: Place, one: Any, other: Any) -> bool:
    return (
        place[0] == "answer"
        and other == NOTHING
        and place[-1] in ("kind", "instrumentation_info", "instrumentation_scope")
    )


# -- what becomes of rollouts ------------------------------------------------------------------------------------------


def _after(case: Case, rollout_id: Any, name: str) -> Any:
    return case.after.get(("rollout", rollout_id, name), NOTHING)


def _rollout_of(case: Case, place: Place) -> Any:
    """The rollout that a place belongs to, in what is held or in the answer."""
    if place[0] == "rollout":
        return place[1]
    if place[0] == "answer":
        answer = case.answers["ours"]
        for step in place[1:]:
            if isinstance(answer, dict) and "rollout_id" in answer:
                return answer["rollout_id"]
            answer = answer[step]
        return answer.get("rollout_id") if isinstance(answer, dict) else None
    return None


@listed("end-times-are-cleared")
def _end_times(case: Case, place: Place, one: Any, other: Any) -> bool:
    if place[-1] != "end_time" or one is not None or (rollout_id := _rollout_of(case, place)) is None:
        return False
    was_finished = case.rollout(rollout_id, "end_time") == other
    return was_finished and _after(case, rollout_id, "status") not in FINISHED


def _moved_by_report(case: Case, place: Place) -> bool:
    """A place that shows what a report on an attempt did to its rollout."""
    rollout_id = case.arguments.get("rollout_id")
    is_its_own = place[0] == "rollout" and place[1] == rollout_id and place[2] in FOLLOWS_STATUS
    return case.name == "update_attempt" and (is_its_own or place in (("queue",), ("left in queue",)))


@listed("spans-are-added-by-attempt")
def _by_attempt(case: Case, place: Place, one: Any, other: Any) -> bool:
    if case.name != "add_many_spans" or place[0] not in ("rollout", "attempt", "worker", "queue", "left in queue"):
        return False
    keys = {(s.fields["rollout_id"], s.fields["attempt_id"]) for s in case.arguments["spans"]}
    over = {p[1] for p, value in case.after.items() if p[0] == "attempt" and value in ("timeout", "unresponsive")}
    return len(keys) > 1 and any(rollout_id in over for rollout_id, _ in keys)


@listed("cancelled-stays-cancelled")
def _cancelled(case: Case, place: Place, one: Any, other: Any) -> bool:
    return _moved_by_report(case, place) and case.rollout(case.arguments["rollout_id"], "status") == "cancelled"


@listed("only-a-status-moves-a-rollout")
def _only_a_status(case: Case, place: Place, one: Any, other: Any) -> bool:
    return _moved_by_report(case, place) and "status" not in case.arguments


def _moved_by_span(case: Case, place: Place, attempt_status: tuple[str, ...], status: tuple[str, ...]) -> bool:
    if "span" not in case.name:
        return False
    if place[0] == "rollout" and place[2] in FOLLOWS_STATUS:
        rollouts = [place[1]]
    elif place in (("queue",), ("left in queue",)):
        rollouts = [p[1] for p in case.before if p[0] == "rollout" and p[2] == "status"]
    else:
        return False
    for rollout_id in rollouts:
        attempts = case.attempts(rollout_id)
        if attempts and case.attempt(rollout_id, attempts[-1], "status") in attempt_status:
            if case.rollout(rollout_id, "status") in status:
                return True
    return False


@listed("a-late-span-leaves-the-retry")
def _late_span(case: Case, place: Place, one: Any, other: Any) -> bool:
    return _moved_by_span(case, place, ("failed", "timeout", "succeeded"), ("requeuing", "preparing"))


@listed("a-span-takes-its-rollout-out-of-line")
def _span_takes_out(case: Case, place: Place, one: Any, other: Any) -> bool:
    return _moved_by_span(case, place, ("preparing", "running", "unresponsive"), ("queuing",))


@listed("who-leaves-the-queue-is-out-of-it")
def _out_of_queue(case: Case, place: Place, one: Any, other: Any) -> bool:
    return place == ("left in queue",)


@listed("time-outs-in-their-order")
def _order_of_time_outs(case: Case, place: Place, one: Any, other: Any) -> bool:
    waited = case.before["queue",]
    same = place == ("queue",) and case.name == "tick" and sorted(one) == sorted(other)
    return same and one[: len(waited)] == other[: len(waited)] == waited


@listed("only-attempts-that-run-time-out")
def _only_running(case: Case, place: Place, one: Any, other: Any) -> bool:
    if case.name != "tick":
        return False
    settled = [
        rollout_id
        for rollout_id in {p[1] for p in case.before if p[0] == "rollout"}
        if (attempts := case.attempts(rollout_id))
        and case.rollout(rollout_id, "status") in ACTIVE
        and case.attempt(rollout_id, attempts[-1], "status") in SETTLED
    ]
    if place[0] in ("rollout", "attempt"):
        return place[1] in settled and one == case.before.get(place)
    return place[0] in ("worker", "queue") and bool(settled)


@listed("a-heartbeat-is-no-later-than-now")
def _beats(case: Case, place: Place, one: Any, other: Any) -> bool:
    # A time in the future counts as now, and 0 as long ago; the reference waits for the one, and ignores the other.
    if case.name != "tick":
        return False
    if place[0] in ("rollout", "attempt"):
        return any(rollout_id == place[1] for rollout_id, _ in case.future_beats)
    return place[0] in ("worker", "queue") and bool(case.future_beats)


# -- workers -----------------------------------------------------------------------------------------------------------


@listed("workers-that-moved-on-are-left-alone")
def _moved_on(case: Case, place: Place, one: Any, other: Any) -> bool:
    if place[0] != "worker" or case.name not in ("update_attempt", "tick"):
        return False
    worker_id = place[1]
    ended = [p for p in case.after if p[0] == "attempt" and p[3] == "worker_id" and case.after[p] == worker_id]
    current = case.before.get(("worker", worker_id, "current_attempt_id"))
    return current is not None and one == case.before.get(place) and any(p[2] != current for p in ended)


@listed("who-finds-no-work-works-on-nothing")
def _finds_nothing(case: Case, place: Place, one: Any, other: Any) -> bool:
    is_current = place[0] == "worker" and place[2] in ("current_rollout_id", "current_attempt_id")
    return is_current and case.name.startswith("dequeue") and one is None and not case.ours


# -- memory ------------------------------------------------------------------------------------------------------------


@listed("eviction-spares-who-is-needed")
def _eviction(case: Case, place: Place, one: Any, other: Any) -> bool:
    if "span" not in case.name or place[0] not in ("evicted", "span"):
        return False
    held = {p for p in case.before if p[0] == "span"}
    for after in (case.after, case.theirs_after):
        if any(p[0] == "evicted" for p in after.keys() - case.before.keys()):
            return True
        if any(("evicted", p[1]) in after for p in held - after.keys()):  # evicted before, and written to since
            return True
    return False
