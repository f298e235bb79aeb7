"""Feeds between what a user says and what crosses to a store: their rules, requests for groups of items, and groups."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, get_args

from raystore.core.pauses import MOST_RUNNING
from raystore.errors import InvalidValueError
from raystore.errors.text import either, meant
from raystore.tracing.evidence import EVIDENCE
from raystore.types.contract import AnyRollout, EnqueueRolloutRequest, Group, ObjectResource, Resource, RolloutMode
from raystore.types.feeds import FailureBudget, FailureReward, FeedGroup, Lag, Sampler
from raystore.values.plain import plain
from raystore.wire import checks
from raystore.wire import groups as wire_groups
from raystore.wire.codec import digest
from raystore.wire.convert import Encoder, build

Late = Literal["wait", "train", "drop", "requeue"]
Order = Literal["oldest", "ready_first", "in_order"]
Changed = Literal["refuse", "continue"]

NAME_LETTERS = 200  #: of a feed or a dataset, since both are in the ids of groups
ENVIRONMENT = "env"  #: the tag that names the dataset of a rollout
EVAL_SHARE = 0.25  #: of what runs that evaluations have while other work waits, unless the user says how much
REQUEUES = 3  #: how often an item that comes too late is queued again
LEAST_FILTERED = 100  #: groups that may be filtered in a row, at least, unless the user says how many
FILTERED_BATCHES = 10  #: and as many batches of them
HASHED_BYTES = 64 * 1024 * 1024  #: of weights that are compared by their content when a version is published twice
NESTED = 8  #: mappings and lists in each other in which weights are looked for

#: What takes groups and gives some of them, the best first.
Chooser = Callable[[list[FeedGroup]], Sequence[FeedGroup]]


# -- the arguments of `store.feed` -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Plan:
    """What the user of a feed has said, checked."""

    feed: str
    has_environments: bool  # whether ids of groups name their dataset
    rule: dict[str, Any]  # of the feed, for the store; without `judged`
    group: dict[str, Any]  # rule of each group
    member: dict[str, Any]  # what makes each rollout, but its input
    tags: dict[str, Any]
    require: tuple[str, ...]
    chooser: Chooser | None
    changed: str
    eval_share: float  # of its evaluations, unless they say another one

    def request(self, encoder: Encoder, environment: str, epoch: int, index: int, item: Any) -> dict[str, Any]:
        """What makes the group of an item. Raises a `StoreError` for an item that cannot be a task."""
        fields = self.member | {"input": item, "tags": self.tags | {ENVIRONMENT: environment}}
        member = EnqueueRolloutRequest.model_construct(**fields)
        return wire_groups.request(encoder, member, self.group_id(environment, epoch, index), self.group)

    def group_id(self, environment: str, epoch: int, index: int) -> str:
        """The id of the group of an item."""
        within = f"{environment}/" if self.has_environments else ""
        return f"{self.feed}/{within}{epoch}/{index}"


def plan(
    name: Any,
    data: Any,
    *,
    resources_id: Any,
    size: Any,
    batch: Any,
    max_lag: Any,
    max_running: Any,
    late: Any,
    order: Any,
    on_failure: Any,
    min_size: Any,
    spare: Any,
    race: Any,
    replace: Any,
    deadline_seconds: Any,
    require: Any,
    batch_tokens: Any,
    max_filtered: Any,
    budget: Any,
    config: Any,
    mode: Any,
    queue: Any,
    priority: Any,
    tags: Any,
    changed: Any,
    eval_share: Any,
) -> Plan:
    """Check the arguments of a feed, but those that say how its items are drawn."""
    feed = name_of("name", name, without="/~")
    for environment in data if isinstance(data, Mapping) else ():
        name_of("data key", environment, without="~")
    chooser = order if callable(order) else None
    count = checks.whole("batch", batch, at_least=1)
    is_raced = checks.flag("race", race)
    how, failure_reward = _on_failure(on_failure)
    members = checks.whole("size", size, at_least=1)
    if min_size is not None and (least := checks.whole("min_size", min_size, at_least=2)) > members:
        raise InvalidValueError("min_size", least, f"at most size, which is {members}")
    if min_size is None and how == "mask" and members > 1:
        min_size = 2  # or what is left out would leave all of the others out
    group = wire_groups.rule(
        n=members,
        min_size=min_size,
        spare=spare,
        replace=_replacements(how, replace, members),
        deadline_seconds=deadline_seconds,
    )
    if is_raced and not group.get("spare"):
        raise InvalidValueError("spare", spare, "1 or more with race=True, which takes the first `size` of them all")
    rule = {
        "resources_id": checks.identifier("resources_id", resources_id),
        "batch": count,
        "max_lag": checks.whole("max_lag", max_lag, at_least=0),
        "max_running": checks.queue_limit("max_running", max_running, at_most=MOST_RUNNING),
        "late": one_of("late", late, get_args(Late)),
        "order": "chosen" if chooser is not None else one_of("order", order, get_args(Order), TO_CHOOSE),
        "on_failure": how,
        "failure_reward": failure_reward,
        "race": is_raced,
        "batch_tokens": None if batch_tokens is None else checks.whole("batch_tokens", batch_tokens, at_least=1),
        "max_filtered": (
            max(LEAST_FILTERED, FILTERED_BATCHES * count)
            if max_filtered is None
            else checks.whole("max_filtered", max_filtered, at_least=1)
        ),
        "requeues": REQUEUES,
        **_budget(budget),
    }
    given = checks.tag_dict("tags", tags) or {}
    if ENVIRONMENT in given:
        raise InvalidValueError("tags", dict(given), f"tags other than {ENVIRONMENT!r}, which names the dataset")
    checks.tag_dict("tags", given | {ENVIRONMENT: feed})  # the last of 16
    member = {
        "resources_id": rule["resources_id"],
        "config": config,
        "metadata": None,
        "rollout_id": None,
        "group_id": None,
        "mode": checks.validated("mode", RolloutMode | None, mode),
        "queue": checks.identifier("queue", queue),
        "priority": checks.whole("priority", priority, at_least=-(2**31)),
    }
    if config is not None:
        checks.rollout_config("config", config)
    return Plan(
        feed=feed,
        has_environments=isinstance(data, Mapping),
        rule=rule,
        group=group,
        member=member,
        tags=given,
        require=_evidence(require),
        chooser=chooser,
        changed=one_of("changed", changed, get_args(Changed)),
        eval_share=share_of_running("eval_share", eval_share),
    )


TO_CHOOSE = "; or a function that takes complete groups and gives those of the next batch"


def name_of(argument: str, value: Any, *, without: str) -> str:
    """A name of which ids of groups are made."""
    name = checks.identifier(argument, value)
    if len(name) > NAME_LETTERS or any(letter in name for letter in without):
        expected = f"a name of at most {NAME_LETTERS} characters without {either([repr(one) for one in without])}"
        raise InvalidValueError(argument, value, f"{expected}, since ids of groups are made of it")
    return name


def one_of(name: str, value: Any, choices: Sequence[str], more: str = "") -> str:
    """One of some words."""
    if not isinstance(value, str) or value not in choices:
        expected = either([repr(one) for one in choices]) + more + meant(value, choices)
        raise InvalidValueError(name, value, expected)
    return value


def _on_failure(value: Any) -> tuple[str, float | None]:
    if isinstance(value, FailureReward):
        return "reward", value.value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise InvalidValueError("on_failure", value, f"'mask', 'replace' or rs.reward(x): write rs.reward({value:g})")
    return one_of("on_failure", value, ("mask", "replace"), ", or rs.reward(x)"), None


def _replacements(how: str, replace: Any, size: int) -> int:
    """How many members of a group may be replaced that fail by what their agents do."""
    if replace is None:
        return size if how == "replace" else 0
    number = checks.whole("replace", replace, at_least=0)
    if number and how != "replace":
        expected = "None, since rollouts whose agent failed are replaced only with on_failure='replace'"
        raise InvalidValueError("replace", replace, expected)
    return number


def _budget(value: Any) -> dict[str, Any]:
    if value is None:
        return {"in_a_row": None, "share": None, "window": FailureBudget.window}
    if not isinstance(value, FailureBudget):
        expected = "rs.FailureBudget(in_a_row=32, share=0.5, window=200), or None for no bound"
        raise InvalidValueError("budget", value, expected)
    return {"in_a_row": value.in_a_row, "share": value.share, "window": value.window}


def _evidence(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    names = checks.listed("require", value, "a list of what each recorded model call must have")
    return tuple(dict.fromkeys(one_of(f"require[{n}]", name, EVIDENCE) for n, name in enumerate(names)))


def share_of_running(name: str, value: Any) -> float:
    """A share of the rollouts that run."""
    expected = "a share of the rollouts that run, above 0 and at most 1: 0.25"
    found = checks.number(name, value, expected)
    if not 0 < found <= 1:
        percent = f"; write {found / 100:g} for {found:g} %" if 1 < found <= 100 else ""
        raise InvalidValueError(name, value, expected + percent)
    return found


def shares(mix: Any, data: Any) -> dict[str, float] | None:
    """The share of each dataset in a batch; None if none are given."""
    if mix is None:
        return None
    if not isinstance(data, Mapping):
        raise InvalidValueError("mix", mix, "data by name to mix: {'math': ..., 'code': ...}")
    if not isinstance(mix, Mapping):
        raise InvalidValueError("mix", mix, "the share of each dataset: {'math': 0.7, 'code': 0.3}")
    for name in mix:
        if name not in data:
            expected = f"a dataset of data: {either([repr(one) for one in data])}{meant(name, data)}"
            raise InvalidValueError("mix key", name, expected)
    if missing := [name for name in data if name not in mix]:
        raise InvalidValueError("mix", dict(mix), f"a share of each dataset; {missing[0]!r} has none")
    found = {}
    for name, share in mix.items():
        found[name] = checks.number(f"mix[{name!r}]", share, "a number above 0")
        if not 0 < found[name] < math.inf:
            raise InvalidValueError(f"mix[{name!r}]", share, "a number above 0")
    return found


def drawing(*, epochs: Any, seed: Any, mix: Any, sampler: Any, data: Any) -> dict[str, Any]:
    """How items are drawn, checked; a sampler of the user's decides it alone."""
    checked = {
        "epochs": None if epochs is None else checks.whole("epochs", epochs, at_least=1),
        "seed": None if seed is None else checks.whole("seed", seed, at_least=-(2**63)),
        "mix": shares(mix, data),
        "sampler": sampler,
    }
    if sampler is not None:
        if isinstance(sampler, type) or not isinstance(sampler, Sampler):
            raise InvalidValueError("sampler", sampler, "an object with the methods next() and observe(), or None")
        if mix is not None:
            raise InvalidValueError("mix", mix, "None, since the sampler says what comes next")
    return checked


def biases(plan: Plan) -> Iterator[str]:
    """What the user is warned of: choices after which rollouts are no fair sample of what the policy does."""
    if plan.rule["on_failure"] == "replace":
        yield (
            f"Feed {plan.feed!r} replaces rollouts whose agent failed (on_failure='replace'): what is trained on is "
            "what the policy does when it does not fail, so that it never learns not to. on_failure=rs.reward(0) tells "
            "it, 'mask' leaves them out"
        )
    if plan.rule["race"]:
        yield (
            f"Feed {plan.feed!r} trains on the first {plan.group['n']} rollouts of each group (race=True): short "
            "answers come first, so that the policy learns to be short whether or not that is better. Groups are "
            "marked with is_raced"
        )


# -- publishing --------------------------------------------------------------------------------------------------------


def content_of(resources: Mapping[str, Any]) -> str:
    """A digest by which a version that is published again is compared.

    Of objects that are very large, or may be (a module), it has only the size: to hash them would take as long as to
    publish them.
    """
    made = blake2b(digest_size=16)
    for name, resource in sorted(resources.items()):
        made.update(repr((name, type(resource).__name__)).encode())
        if not isinstance(resource, ObjectResource):
            made.update(digest(resource, None))
        elif resource.is_elsewhere:
            continue  # two references may refer to the same
        elif (size := _bytes_in(resource.value)) is not None and size <= HASHED_BYTES:
            made.update(digest(resource.value, None))
        else:
            made.update(str(size).encode())
    return made.hexdigest()


def _bytes_in(value: Any, depth: int = 0) -> int | None:
    """About how many bytes the arrays, texts and numbers in a value have; None for what may hold any number."""
    if isinstance(size := getattr(value, "nbytes", None), int):
        return size
    if isinstance(value, (bytes, bytearray, str)):
        return len(value)
    if value is None or isinstance(value, (int, float)):
        return 8
    if not isinstance(value, (Mapping, list, tuple)) or depth == NESTED:
        return None
    total = 0
    for item in value.values() if isinstance(value, Mapping) else value:
        if (size := _bytes_in(item, depth + 1)) is None:
            return None
        total += size
    return total


def is_named(weights: Any) -> bool:
    """Whether these are resources by name. Raises `InvalidValueError` for a mixture of resources and other values."""
    if not isinstance(weights, Mapping) or not any(isinstance(one, Resource) for one in weights.values()):
        return False
    for name, one in weights.items():
        if not isinstance(one, Resource):
            expected = "a resource, as the others are; wrap a plain value: rs.ObjectResource(value=...)"
            raise InvalidValueError(f"weights[{name!r}]", one, expected)
    return True


# -- notes of an ack ---------------------------------------------------------------------------------------------------


def note(name: str, metrics: Any) -> str:
    """Numbers and texts by name as JSON."""
    if not isinstance(metrics, Mapping):
        raise InvalidValueError(name, metrics, "a mapping: {'loss': 0.1}")
    try:
        return json.dumps(plain(name, metrics))
    except (TypeError, ValueError):  # bytes, packed arrays
        raise InvalidValueError(
            name, metrics, "what JSON can hold: texts, numbers, lists and mappings of them"
        ) from None


def notes(per_rollout: Any, rollout_ids: Iterable[str]) -> dict[str, str]:
    """The same for each rollout of a batch."""
    if not isinstance(per_rollout, Mapping):
        raise InvalidValueError("per_rollout", per_rollout, "a mapping of rollout ids to mappings: {id: {'loss': 0.1}}")
    known = set(rollout_ids)
    for rollout_id in per_rollout:
        if rollout_id not in known:
            raise InvalidValueError("per_rollout key", rollout_id, "the id of a rollout of this batch")
    return {str(one): note(f"per_rollout[{one!r}]", metrics) for one, metrics in per_rollout.items()}


# -- groups ------------------------------------------------------------------------------------------------------------


def to_feed_group(
    group: Group, row: Sequence[Any], rollouts: Mapping[str, AnyRollout], failure_reward: float | None
) -> FeedGroup:
    """A group of a feed, from the group, the row that the store has of its item, and its rollouts."""
    _, environment, epoch, index, in_flight, in_queue, is_raced, requeued_from, tokens, failed, versions = row
    train = [rollouts[rollout_id] for rollout_id, *_ in versions if rollout_id in rollouts]
    rewards = {
        one.rollout_id: failure_reward if one.rollout_id in failed and failure_reward is not None else one.reward
        for one in train
    }
    for rollout_id in group.members:  # spares that were not needed
        one = rollouts.get(rollout_id)
        if one is not None and one.status == "succeeded":
            rewards.setdefault(rollout_id, one.reward)
    values = {name: value for name, value in vars(group).items() if name in Group.model_fields} | {
        "rollouts": train,
        "environment": environment,
        "epoch": epoch,
        "index": index,
        "lag": build(Lag, {"total": in_flight + in_queue, "in_flight": in_flight, "in_queue": in_queue}),
        "versions": [(branch, step) for _, branch, step in versions],
        "is_raced": is_raced,
        "requeued_from": requeued_from,
        "tokens": tokens,
        "failed": list(failed),
        "valid_rewards": rewards,
        "named_rewards": None,
    }
    return build(FeedGroup, values, None, group.__pydantic_private__)
