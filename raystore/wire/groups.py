"""Groups between the public models and what crosses to a store: requests for some, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raystore.core.groups import check_rule
from raystore.core.records import Record
from raystore.errors import InvalidValueError
from raystore.types.contract import EnqueueGroupRequest, EnqueueRolloutRequest, TakenGroup
from raystore.wire import checks
from raystore.wire.codec import digest
from raystore.wire.convert import Encoder, Row, build, group_values, to_any_rollout

_OF_MEMBERS = tuple(name for name in EnqueueRolloutRequest.model_fields if name not in ("rollout_id", "group_id"))


def rule(*, n: Any, min_size: Any, spare: Any, replace: Any, deadline_seconds: Any) -> dict[str, Any]:
    """How large a group is to be, and what becomes of members that fail or are late; what is usual is left out."""
    checked: dict[str, Any] = {
        "n": checks.whole("n", n, at_least=1),
        "min_size": None if min_size is None else checks.whole("min_size", min_size, at_least=2),
        "spare": checks.whole("spare", spare, at_least=0),
        "replace": checks.whole("replace", replace, at_least=0),
        "deadline_seconds": None if deadline_seconds is None else _seconds("deadline_seconds", deadline_seconds),
    }
    check_rule(**checked)
    return {name: value for name, value in checked.items() if value}


def _seconds(name: str, value: Any) -> float:
    seconds = checks.duration(name, value)
    if not seconds:
        raise InvalidValueError(name, value, "a number of seconds above 0, or None")
    return seconds


def request(
    encoder: Encoder, member: EnqueueRolloutRequest, group_id: str | None, of_group: dict[str, Any]
) -> dict[str, Any]:
    """What makes a group: the request of each member, and the rule of the group."""
    encoded = encoder.request(member)
    encoded.pop("group_id", None)  # from the metadata
    if group_id is None:
        return {"member": encoded, **of_group}
    encoded["digests"] = [
        digest(member.input, encoded["input"]), digest(member.metadata or {}, encoded["metadata"])
    ]  # fmt: skip
    return {"member": encoded, "group_id": checks.identifier("group_id", group_id), **of_group}


def request_of(encoder: Encoder, group: EnqueueGroupRequest) -> dict[str, Any]:
    """The same, from a model; checked, since assignment is not validated."""
    if len(group.__dict__) < len(EnqueueGroupRequest.model_fields):  # made without validation
        group = checks.model_of(EnqueueGroupRequest, "", group.__dict__)
    of_group = rule(
        n=group.n, min_size=group.min_size, spare=group.spare, replace=group.replace,
        deadline_seconds=group.deadline_seconds,
    )  # fmt: skip
    fields = {name: getattr(group, name) for name in _OF_MEMBERS}
    return request(encoder, checks.model_of(EnqueueRolloutRequest, "", fields), group.group_id, of_group)


def to_taken_groups(items: Sequence[Any]) -> list[TakenGroup]:
    """The groups of a batch; in an answer each stands before its rollouts."""
    groups: list[TakenGroup] = []
    for item in items:
        if _is_group(item):
            values, undecoded = group_values(item)
            groups.append(build(TakenGroup, values | {"rollouts": []}, None, undecoded))
        else:
            groups[-1].rollouts.append(to_any_rollout(item))
    return groups


def _is_group(item: Row) -> bool:
    """Whether this is a group, and no pair of a rollout and an attempt."""
    return isinstance(item, Record) or isinstance(item[0], str)
