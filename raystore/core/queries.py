"""How a query chooses: one set of rules for filters, sorting and pages.

A condition is a predicate over a record; `and`/`or` joins the conditions of a caller. A condition that always applies
(the rollout of a span query) is applied first, so that `or` never leaks other rollouts.
Not here: how records are found without a scan (`indexes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from raystore.errors import InvalidValueError

R = TypeVar("R")
Condition = Callable[[Any], bool]


def is_in(field: str, values: Iterable[Any]) -> Condition:
    """The field is one of the values."""
    wanted = frozenset(values)
    return lambda record: getattr(record, field) in wanted


def equals(field: str, value: Any) -> Condition:
    """The field equals the value."""
    return lambda record: getattr(record, field) == value


def contains(field: str, part: str) -> Condition:
    """The field is text that contains the part; None contains nothing."""
    return lambda record: (value := getattr(record, field)) is not None and part in value


def check(logic: str = "and", sort_order: str = "asc") -> None:
    """Refuse what is no way to join conditions, or to sort."""
    if logic not in ("and", "or"):
        raise InvalidValueError("filter_logic", logic, "'and' or 'or'")
    if sort_order not in ("asc", "desc"):
        raise InvalidValueError("sort_order", sort_order, "'asc' or 'desc'")


def select(records: Iterable[R], conditions: list[Condition], logic: str) -> list[R]:
    """The records that meet all conditions ("and"), or any ("or"); no condition selects everything."""
    check(logic)
    if not conditions:
        return list(records)
    joined = all if logic == "and" else any
    return [record for record in records if joined(condition(record) for condition in conditions)]


def arrange(records: list[R], sort_by: str | None, sort_order: str, sortable: dict[str, Any]) -> list[R]:
    """Sort by a field; a missing time sorts as the far future, other missing values as the smallest of their kind.

    `sortable` maps each field that may be sorted by to the value that stands in for None. The sort is stable.
    """
    check(sort_order=sort_order)
    if sort_by is None:
        return records
    if sort_by not in sortable:
        raise InvalidValueError("sort_by", sort_by, f"one of {', '.join(sorted(sortable))}")
    absent = sortable[sort_by]

    def key(record: R) -> Any:
        value = getattr(record, sort_by)
        return absent if value is None else value

    return sorted(records, key=key, reverse=sort_order == "desc")


def page(records: list[R], limit: int, offset: int) -> list[R]:
    """One page: `limit` -1 means all, 0 none; an offset past the end gives an empty page."""
    if limit < -1:
        raise InvalidValueError("limit", limit, "-1 for all, or a number of items")
    if offset < 0:
        raise InvalidValueError("offset", offset, "0 or more")
    return records[offset:] if limit == -1 else records[offset : offset + limit]


FAR_FUTURE = float("inf")

ROLLOUT_SORT: dict[str, Any] = {
    "rollout_id": "", "start_time": FAR_FUTURE, "end_time": FAR_FUTURE, "mode": "", "resources_id": "", "status": "",
    "group_id": "", "queue": "", "priority": 0, "reward": float("-inf"),
}  # fmt: skip
ATTEMPT_SORT: dict[str, Any] = {
    "attempt_id": "", "sequence_id": 0, "start_time": FAR_FUTURE, "end_time": FAR_FUTURE, "status": "",
    "worker_id": "", "last_heartbeat_time": FAR_FUTURE, "outcome": "", "policy_version": 0, "reward": float("-inf"),
}  # fmt: skip
WORKER_SORT: dict[str, Any] = {
    "worker_id": "", "status": "", "last_heartbeat_time": FAR_FUTURE, "last_dequeue_time": FAR_FUTURE,
    "last_busy_time": FAR_FUTURE, "last_idle_time": FAR_FUTURE, "current_rollout_id": "", "current_attempt_id": "",
}  # fmt: skip
RESOURCES_SORT: dict[str, Any] = {
    "resources_id": "", "version": 0, "create_time": FAR_FUTURE, "update_time": FAR_FUTURE, "policy_version": 0,
}  # fmt: skip
SPAN_SORT: dict[str, Any] = {
    "sequence_id": 0, "start_time": FAR_FUTURE, "end_time": FAR_FUTURE, "name": "", "span_id": "", "trace_id": "",
    "parent_id": "", "attempt_id": "", "rollout_id": "",
}  # fmt: skip
