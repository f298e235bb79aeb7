"""How records are found: the indexes of rollouts, and one set of rules for filters, sorting and pages.

An index maps a value (a status, group, tag, queue or worker) to the ids of rollouts. It is kept with every change, so
that a query need not scan. A condition is a predicate over a record; `and`/`or` joins the conditions of a caller. A
condition that always applies (the rollout of a span query) is applied first, so that `or` never leaks other rollouts.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from raystore.core.records import Attempt, Rollout
from raystore.errors import InvalidValueError

R = TypeVar("R")
Condition = Callable[[Any], bool]
Key = tuple[str, Any]

PACKED = 20_000  #: an index that is longer is made at the start, since that would hold up whoever asks


def keys_of(rollout: Rollout, attempt: Attempt | None) -> Iterator[Key]:
    """The index keys under which a rollout can be found."""
    yield "status", rollout.status
    yield "queue", rollout.queue
    if rollout.group_id is not None:
        yield "group", rollout.group_id
    for name, value in rollout.tags.items():
        yield "tag", (name, value)
    if attempt is not None and attempt.worker_id is not None:
        yield "worker", attempt.worker_id


class Indexes:
    """Rollout ids by index key."""

    def __init__(self) -> None:
        self._ids: dict[Key, dict[str, None]] = {}
        self._packed: dict[Key, tuple[array[int], list[str]]] = {}  # as they stood in an image, until somebody asks

    def find(self, key: Key) -> dict[str, None]:
        """The rollouts under one key."""
        if key in self._packed:
            self._unpack(key)
        return self._ids.get(key, {})

    def _unpack(self, key: Key) -> None:
        numbers, ids = self._packed.pop(key)
        self._ids[key] = dict.fromkeys(map(ids.__getitem__, numbers))

    def add(self, rollout_id: str, key: Key) -> None:
        """Enter a rollout under a key."""
        if key in self._packed:
            self._unpack(key)
        self._ids.setdefault(key, {})[rollout_id] = None

    def image(self, numbers: dict[str, int]) -> list[Any]:
        """The keys, and the numbers of the rollouts under each."""
        self._unpack_all()
        return [(key, array("I", map(numbers.__getitem__, ids)).tobytes()) for key, ids in self._ids.items()]

    def _unpack_all(self) -> None:
        for key in list(self._packed):
            self._unpack(key)

    def restore(self, image: list[Any], ids: list[str]) -> None:
        """Fill empty indexes from an image."""
        for (name, value), numbers in image:
            key = (name, tuple(value) if isinstance(value, list) else value)
            self._packed[key] = (array("I", numbers), ids)
            if len(self._packed[key][0]) > PACKED:
                self._unpack(key)

    def remove(self, rollout_id: str, key: Key) -> None:
        """Take a rollout out from under a key."""
        if key in self._packed:
            self._unpack(key)
        ids = self._ids[key]
        del ids[rollout_id]
        if not ids:
            del self._ids[key]

    def count(self, key: Key) -> int:
        """How many rollouts there are under one key."""
        packed = self._packed.get(key)
        return len(self._ids.get(key, ())) if packed is None else len(packed[0])

    def check(self, expected: dict[str, set[Key]]) -> None:
        """Verify that exactly these keys are entered for exactly these rollouts."""
        self._unpack_all()
        actual: dict[str, set[Key]] = {}
        for key, ids in self._ids.items():
            for rollout_id in ids:
                actual.setdefault(rollout_id, set()).add(key)
        assert actual == expected, "the indexes differ from the rollouts"


# -- filters, sorting, pages -------------------------------------------------------------------------------------------


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
