"""Evaluations between what a user says and what crosses to a store: their rules, requests for items, and results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, NamedTuple, get_args

from raystore.core.evaluation_table import key_of
from raystore.core.payload import size_of
from raystore.errors import InvalidValueError, StoreError
from raystore.types.contract import EnqueueRolloutRequest
from raystore.types.evaluations import EVALUATION, EvaluationResult, EvaluationScore
from raystore.wire import checks
from raystore.wire import groups as wire_groups
from raystore.wire.convert import Encoder
from raystore.wire.feeds import ENVIRONMENT, name_of, one_of, share_of_running

Overtaken = Literal["finish", "drop"]

ROLLOUTS = 1_000_000  #: of one evaluation
PART_ITEMS = 256  #: items that are enqueued in one step, at most ...
PART_BYTES = 1024 * 1024  #: ... or so many bytes of them,
PART_ROLLOUTS = 512  #: or so many rollouts


class EvalItem(NamedTuple):
    """One item of an evaluation."""

    environment: str
    number: int  #: within its environment, from 0
    item: Any


@dataclass(slots=True)
class EvalPlan:
    """What the user of an evaluation has said, checked."""

    name: str
    feed: str | None
    resources_id: str | None
    version: int | None
    rule: dict[str, Any]  # for the store; without what follows from the items
    overtaken: str
    member: dict[str, Any]  # what makes each rollout, but its input and its environment
    tags: dict[str, Any]


def eval_plan(
    name: Any,
    *,
    feed: str | None,
    resources_id: Any,
    version: Any,
    samples: Any,
    threshold: Any,
    failure_reward: Any,
    eval_share: Any,
    overtaken: Any,
    config: Any,
    queue: Any,
    priority: Any,
    tags: Any,
) -> EvalPlan:
    """Check the arguments of an evaluation, but its items."""
    evaluation = name_of("name", name, without="/~@")
    if config is not None:
        checks.rollout_config("config", config)
    given = checks.tag_dict("tags", tags) or {}
    for taken in (ENVIRONMENT, EVALUATION):
        if taken in given:
            expected = f"tags other than {ENVIRONMENT!r} and {EVALUATION!r}, which name environment and evaluation"
            raise InvalidValueError("tags", dict(given), expected)
    checks.tag_dict("tags", given | {ENVIRONMENT: "", EVALUATION: evaluation})  # the last of 16
    rule = {
        "samples": checks.whole("samples", samples, at_least=1),
        "threshold": _finite("threshold", threshold),
        "failure_reward": _finite("failure_reward", failure_reward),
        "share": share_of_running("eval_share", eval_share),
    }
    if rule["samples"] > ROLLOUTS:
        raise InvalidValueError("samples", samples, f"at most {ROLLOUTS:,} rollouts in one evaluation")
    member = {
        "resources_id": checks.optional_identifier("resources_id", resources_id),
        "config": config,
        "metadata": None,
        "rollout_id": None,
        "group_id": None,
        "mode": "val",
        "queue": checks.identifier("queue", queue),
        "priority": checks.whole("priority", priority, at_least=-(2**31)),
    }
    return EvalPlan(
        name=evaluation,
        feed=feed,
        resources_id=member["resources_id"],
        version=None if version is None else _version(version, feed),
        rule=rule,
        overtaken=one_of("overtaken", overtaken, get_args(Overtaken)),
        member=member,
        tags=given | {EVALUATION: evaluation},
    )


def _version(value: Any, feed: str | None) -> int:
    """A version of the policy; a feed counts its own from 0."""
    try:
        return checks.whole("version", value, at_least=-(2**63) if feed is None else 0)
    except InvalidValueError as error:
        expected = "the step that was published, a whole number, or None for whatever is newest at each claim"
        raise InvalidValueError("version", value, expected) from error


def _finite(name: str, value: Any) -> float:
    found = checks.number(name, value, "a finite number")
    if math.isinf(found):
        raise InvalidValueError(name, value, "a finite number")
    return found


# -- items -------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class EvalWork:
    """The items of an evaluation as they travel."""

    requests: list[dict[str, Any]]  # of a group each; without id and size, which the evaluation gives
    rows: list[list[Any]]  # environment and index of each
    digest: str  # of all of them


def eval_work(plan: EvalPlan, encoder: Encoder, items: Sequence[EvalItem], *, has_environments: bool) -> EvalWork:
    """Encode the items. Raises a `StoreError` that names the one that cannot be a task."""
    if len(items) * plan.rule["samples"] > ROLLOUTS:
        expected = f"at most {ROLLOUTS:,} rollouts in one evaluation, and these are {len(items):,} items"
        raise InvalidValueError("samples", plan.rule["samples"], expected)
    made = blake2b(digest_size=16)
    requests, rows = [], []
    for environment, index, item in items:
        fields = plan.member | {"input": item, "tags": plan.tags | {ENVIRONMENT: environment}}
        place = f"items[{environment!r}][{index}]" if has_environments else f"items[{index}]"
        try:
            # The id is only there to have digests of what is sent; the store is told another one.
            request = wire_groups.request(encoder, EnqueueRolloutRequest.model_construct(**fields), "item", {"n": 1})
        except StoreError as error:
            raise type(error)(*checks.within(place, *error.args)) from error.__cause__
        made.update(repr((environment, index)).encode() + request["member"]["digests"][0])
        requests.append(request)
        rows.append([environment, index])
    return EvalWork(requests, rows, made.hexdigest())


def parts(work: EvalWork, start: int, samples: int, most: int) -> Iterator[tuple[int, int]]:
    """The items from `start` on, cut into parts that are enqueued in one step each; `most` rollouts in a part."""
    first, rollouts, size = start, 0, 0
    for number in range(start, len(work.requests)):
        bytes_ = size_of(work.requests[number]["member"]["input"])
        is_full = number - first >= PART_ITEMS or size + bytes_ > PART_BYTES or rollouts + samples > most
        if number > first and is_full:
            yield first, number
            first, rollouts, size = number, 0, 0
        rollouts, size = rollouts + samples, size + bytes_
    if first < len(work.requests):
        yield first, len(work.requests)


def part(work: EvalWork, key: tuple[str, int | None, int], first: int, last: int, *, named: bool) -> dict[str, Any]:
    """The arguments with which a part is enqueued; ids of groups name the environment, if there are several."""
    requests = []
    for request, (environment, index) in zip(work.requests[first:last], work.rows[first:last], strict=True):
        within = f"{environment}/" if named else ""
        requests.append(request | {"group_id": f"{key_of(*key)}/{within}{index}"})
    name, version, branch = key
    return {
        "name": name, "version": version, "branch": branch, "at": first, "requests": requests,
        "items": work.rows[first:last],
    }  # fmt: skip


# -- results -----------------------------------------------------------------------------------------------------------


def to_result(row: Mapping[str, Any]) -> EvaluationResult:
    """A result, of what the store says."""
    values = dict(row) | {
        "overall": _to_score(row["overall"]),
        "environments": {environment: _to_score(one) for environment, one in row["environments"]},
    }
    return EvaluationResult.model_validate(values)


def _to_score(row: Sequence[Any]) -> EvaluationScore:
    items, samples, passed, failed, mean, chances = row
    return EvaluationScore(
        items=items,
        samples=samples,
        passed=passed,
        failed=failed,
        mean=None if mean is None else mean[0],
        confidence=None if mean is None or mean[1] is None else (mean[1], mean[2]),
        pass_at={k: value for k, (value, _, _) in chances},
        pass_confidence={k: (low, high) for k, (_, low, high) in chances if low is not None},
    )
