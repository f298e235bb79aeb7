"""Verbs of evaluations: begin, enqueue items, drop, tell results; and what follows from each step.

An evaluation measures the policy beside its training and changes nothing of that: its rollouts are no items of a feed,
so that places, slots and the failure budget do not know them, and no consumer is given one. It goes on while a feed is
closed. A claim takes of them as their share allows (`claims`).
It is *pinned* to a version if that was asked for: all its attempts run with one version of the resources, which is kept
until it has ended. Else they run with what is newest at their claim, and the result tells the versions that they had.
A version belongs to the branch of its feed in which it was made, so that an evaluation of a step that stands is found
again after a rewind. One of a step that was undone is another evaluation; if it still runs it is dropped.
Whoever enqueues the items sends them in parts: position and groups advance in one step (`add`), so that after a crash
another process goes on at the position.
Not here: the records (`evaluation_table`), statistics (`scores`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

from raystore.core import attempts, groups
from raystore.core.evaluation_table import DROPPED, ENDED, RUNNING, EvaluatedItem, Evaluation, key_of
from raystore.core.feed_table import FeedEntry
from raystore.core.records import Many, Resources
from raystore.core.rollouts import put_anew
from raystore.core.schema import ID_LENGTH, GroupRequest, Id, Positive, Rule, Seconds, Text, Whole
from raystore.core.state import State, Step, require_room
from raystore.errors import (
    EvaluationConflictError,
    EvaluationNotFoundError,
    FeedNotFoundError,
    InvalidValueError,
    VersionNotFoundError,
)

AT_ONCE = 1_000  #: evaluations that run

Share = Annotated[float, Rule("0 < {v} <= 1", "a share above 0, up to 1")]
Finite = Annotated[float, Rule("abs({v}) < 1e300", "a finite number")]
Environment = Annotated[str, Rule(f"0 < len({{v}}) <= {ID_LENGTH}", f"text of 1 to {ID_LENGTH} characters")]
ItemRow = tuple[Environment, Whole]  #: environment, and index within it


class EvaluationRule(TypedDict):
    """What the user of an evaluation has said."""

    total: Positive  # items
    items: Text  # a digest of them
    samples: Positive  # of each
    threshold: Finite  # a sample with a greater reward has passed
    failure_reward: Finite  # of one that failed
    share: Share  # of what runs


#: What must be the same if an evaluation is asked for again, and what it is called there.
SAME = ("total", "items", "samples", "threshold", "failure_reward")


# -- beginning ---------------------------------------------------------------------------------------------------------


def begin(
    state: State,
    step: Step,
    *,
    name: Id,
    feed: Id | None,
    resources_id: Id | None,
    version: int | None,
    rule: EvaluationRule,
    overtaken: Literal["finish", "drop"],
) -> dict[str, Any]:
    """Begin an evaluation, or find it as it is: where it stands.

    `version` pins it; else it is known by the newest version that there is.
    """
    owner, said = _owner(state, feed), resources_id
    if owner is not None:
        resources_id = said = owner.rule["resources_id"]
    elif resources_id is None:
        resources_id = state.resources.latest_id
    is_pinned = version is not None
    if version is None:
        version = _newest(state, owner, resources_id)
    branch = 0 if owner is None or version is None else owner.branch_of_step(version)
    known = state.evaluations.by_key.get(key_of(name, version, branch))
    if known is not None:
        _refuse_other(known, rule, is_pinned=is_pinned, resources_id=said)
        known.rule["share"] = rule["share"]
        return told(state, known)
    require_room("evaluations that run", len(state.evaluations.running), AT_ONCE)
    held = _pinned(state, owner, resources_id, version) if is_pinned and version is not None else None
    for other in state.evaluations.of(name):
        if overtaken == "drop" and other.status == RUNNING:
            _drop(state, step, other, f"{key_of(name, version, branch)} has overtaken it")
    state.evaluations.made += 1
    made = Evaluation(
        name, version, branch, {**rule, "pinned": is_pinned}, step.now, state.evaluations.made, feed, resources_id
    )
    if held is not None:
        made.pin = held.version
        state.resources.refer(resources_id, made.pin, 1)
    state.evaluations.add(made)
    state.changes.append(step.now, "evaluation_began", evaluation=made.key)
    return told(state, made)


def _owner(state: State, feed: str | None) -> FeedEntry | None:
    if feed is None:
        return None
    owner = state.feeds.get(feed)
    if owner is None:
        raise FeedNotFoundError(feed)
    return owner


def _newest(state: State, owner: FeedEntry | None, resources_id: str | None) -> int | None:
    """The newest version of the policy that there is."""
    if owner is None:
        held = state.resources.newest(resources_id)
        return None if held is None else held.policy_version
    if owner.version is None:
        expected = "a version that was published, or None after `await feed.publish(weights, version=step)`"
        raise InvalidValueError("version", None, f"{expected}: feed {owner.name!r} has published none since its start")
    return owner.version


def _pinned(state: State, owner: FeedEntry | None, resources_id: str | None, version: int) -> Resources:
    """The newest of the resources that stand for a version of the policy. Raises `VersionNotFoundError`."""
    named = resources_id or ""
    missing, _ = state.resources.missing.get(named, (0, ""))
    there: set[int] = set()
    for held in reversed(state.resources.all_versions(named)):
        step = held.policy_version
        if step is None or held.resources is None or held.version == missing:
            continue
        if owner is not None and owner.branch_of_version(held.version) < owner.branch_of_step(step):
            continue  # it was undone
        if step == version:
            return held
        there.add(step)
    raise VersionNotFoundError(named, version, sorted(there))


def _refuse_other(known: Evaluation, rule: EvaluationRule, *, is_pinned: bool, resources_id: str | None) -> None:
    """Refuse what is not the evaluation that is known by this name and version."""
    asked: dict[str, Any] = dict(rule)
    differing = [name for name in SAME if known.rule[name] != asked[name]]
    if known.rule["pinned"] != is_pinned:
        differing.append("version")
    if resources_id is not None and known.resources_id != resources_id:  # None: what it was
        differing.append("resources_id")
    if differing:
        raise EvaluationConflictError(known.name, known.version, list(dict.fromkeys(map(_said, differing))))


def _said(name: str) -> str:
    """What is said of something that differs."""
    return {"total": "items"}.get(name, name)


def _known(state: State, name: str, version: int | None, branch: int) -> Evaluation:
    found = state.evaluations.by_key.get(key_of(name, version, branch))
    if found is None:
        raise EvaluationNotFoundError(name, version, sorted({one.name for one in state.evaluations})[:20])
    return found


def add(
    state: State,
    step: Step,
    *,
    name: Id,
    version: int | None,
    branch: Whole,
    at: Whole,
    requests: list[GroupRequest],
    items: list[ItemRow],
) -> int:
    """Enqueue the groups of items and move the position, or neither; the position now.

    Nothing is done if the position is not `at`: somebody has enqueued them. Nor if the evaluation has ended.
    """
    known = _known(state, name, version, branch)
    total, samples = int(known.rule["total"]), int(known.rule["samples"])
    if known.status != RUNNING:
        return total
    if known.position != at:
        return known.position
    if len(items) != len(requests) or at + len(items) > total:
        raise InvalidValueError("items", len(items), f"a row for each request, and at most {total - at} of them")
    # Groups of an evaluation that is not kept any more may be there still.
    ids = [groups.free_id(state, request.get("group_id") or known.key) for request in requests]
    made: list[Any] = [
        {"member": request["member"], "n": samples, "group_id": group_id}
        for request, group_id in zip(requests, ids, strict=True)
    ]
    groups.check_all(state, made)
    known.position += len(items)
    for request, (environment, index) in zip(made, items, strict=True):
        group_id = request["group_id"]
        known.items[group_id] = EvaluatedItem(group_id, environment, index)
        state.evaluations.by_group[group_id] = known.key
        groups.make(state, step, request, known.resources_id)
    return known.position


# -- ending ------------------------------------------------------------------------------------------------------------


def settle(state: State, step: Step) -> None:
    """End the evaluations of which the last sample has finished in this step."""
    moved = list(state.evaluations.moved)
    state.evaluations.moved.clear()
    for key in moved:
        known = state.evaluations.running.get(key)
        if known is not None and known.is_whole:
            _end(state, step, known, ENDED, None)


def _end(state: State, step: Step, known: Evaluation, status: str, why: str | None) -> None:
    """Keep the scores of an evaluation, and nothing else of it."""
    known.scores = known.scored()
    known.status, known.why, known.end_time = status, why, step.now
    known.items = {}
    known.lost = None
    if known.pin is not None:
        state.resources.refer(known.resources_id, known.pin, -1)
        known.pin = None
    state.evaluations.moved.pop(known.key, None)
    state.evaluations.end(known)
    state.effects.has_batches = True  # somebody may wait for the result
    state.changes.append(step.now, f"evaluation_{status}", evaluation=known.key, why=why)


def _drop(state: State, step: Step, known: Evaluation, why: str) -> None:
    """End an evaluation with what it has, and cancel what waits and runs of it."""
    group_ids = list(known.items)
    _end(state, step, known, DROPPED, why)
    members = [i for group_id in group_ids if (group := state.groups.get(group_id)) for i in group.members]
    unfinished = [rollout_id for rollout_id in members if rollout_id in state.evaluations.unfinished]
    attempts.cancel(state, step, rollout_ids=unfinished, group_id=None, tags=None)


def drop(state: State, step: Step, *, name: Id, version: int | None, branch: Whole | None = None) -> int:
    """Drop what runs of a name: of one version and branch, or (None) of all; how many.

    Those that have ended stay as they are.
    """
    named = [one for one in state.evaluations.of(name) if version in (None, one.version)]
    if not named:
        raise EvaluationNotFoundError(name, version, sorted({one.name for one in state.evaluations})[:20])
    if branch is not None:
        named = [one for one in named if one.branch == branch]
    running = [one for one in named if one.status == RUNNING]
    for one in running:
        _drop(state, step, one, "it was dropped by hand")
    return len(running)


def is_undone(state: State, known: Evaluation) -> bool:
    """Whether a rewind of its feed has undone the version of an evaluation."""
    feed = state.feeds.get(known.feed or "")
    return feed is not None and known.version is not None and feed.branch_of_step(known.version) != known.branch


def drop_undone(state: State, step: Step, feed: FeedEntry) -> None:
    """A feed was rewound: what measures a step that was undone is not needed any more."""
    for one in list(state.evaluations.running.values()):
        if one.feed == feed.name and is_undone(state, one):
            _drop(state, step, one, f"step {one.version} was undone by a restore")


# -- versions that cannot be had ---------------------------------------------------------------------------------------


def lose_version(state: State, step: Step, resources_id: str, version: int, why: str) -> bool:
    """A version cannot be had: hold back what is pinned to it, until it is published again or its holder is back.

    Whether there is such an evaluation, and that was not known.
    """
    is_found = False
    for one in state.evaluations.running.values():
        if one.pin == version and one.resources_id == resources_id and one.lost is None:
            one.lost, is_found = why, True
            _offer(state, step, one)
            state.effects.said.append(
                f"Evaluation {one.key} waits: version {one.version} of {resources_id!r} cannot be had ({why})"
            )
    return is_found


def found_version(state: State, step: Step, held: Resources) -> None:
    """A version was published, or can be had again: let what is pinned to the same version of the policy go on."""
    for one in state.evaluations.running.values():
        if one.lost is None or one.resources_id != held.resources_id or one.version != held.policy_version:
            continue
        state.resources.refer(one.resources_id, held.version, 1)
        before, one.pin, one.lost = one.pin, held.version, None
        state.resources.refer(one.resources_id, before, -1)
        _offer(state, step, one)


def _offer(state: State, step: Step, known: Evaluation) -> None:
    """Hand out the rollouts of an evaluation that wait, or hold them back, as things are now."""
    queues = state.queues
    members = (i for group_id in known.items for i in state.groups.by_id[group_id].members)
    put_anew(state, step, [i for i in members if i in queues and queues.backs_off_until(i) is None])


# -- asking ------------------------------------------------------------------------------------------------------------


def result(
    state: State, step: Step, *, name: Id, version: int | None, branch: Whole, timeout: Seconds = 0.0
) -> dict[str, Any] | None:
    """An evaluation as it stands; None if it still runs, and the caller waits for its end."""
    known = _known(state, name, version, branch)
    return None if known.status == RUNNING and timeout > 0 else told(state, known)


def unfinished(state: State, name: str, version: int | None, branch: int) -> list[str]:
    """The rollouts of an evaluation that wait or run."""
    key = key_of(name, version, branch)
    return [i for i in state.evaluations.unfinished if state.evaluations.by_rollout[i] == key]


def query(state: State, step: Step, *, name: Id | None, feed: Id | None = None) -> Many:
    """All evaluations, or those of a name or a feed, by version and branch."""
    found = [told(state, one) for one in state.evaluations.of(name, feed)]
    return Many(found, len(found))


def told(state: State, known: Evaluation) -> dict[str, Any]:
    """An evaluation, for people."""
    rule = known.rule
    overall, environments = known.scored()
    return {
        "name": known.name,
        "version": known.version,
        "branch": known.branch,
        "feed": known.feed,
        "pinned": rule["pinned"],
        "versions": None if known.versions is None else list(known.versions),
        "status": known.status,
        "why": known.why if known.lost is None else f"its version cannot be had: {known.lost}",
        "undone": is_undone(state, known),
        "items": rule["total"],
        "enqueued": known.position,
        "samples": rule["samples"],
        "threshold": rule["threshold"],
        "failure_reward": rule["failure_reward"],
        "start_time": known.start_time,
        "end_time": known.end_time,
        "overall": overall,
        "environments": environments,
    }
