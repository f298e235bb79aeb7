"""Verbs of resources: publish, read, delete; and holding back the rollouts whose resources cannot be read.

An attempt that cannot read its resources can only fail, which is not its agent's fault. So once the newest version of
an id is known to be *missing*, the rollouts that wait for that id keep their place in the queue, with their deadlines
at rest, and are not handed out. A newer version releases them, or the return of the process that had the objects.
A version is missing if the process that held its objects has ended, if the store was started again without them, or if
two sessions could not read them; one session that could not is no proof, since the fault may be its own.
"""

from __future__ import annotations

from typing import Annotated, Any

from raystore.core import attempts, evaluations, queries
from raystore.core.payload import Payload
from raystore.core.records import Many, Resources
from raystore.core.rollouts import put_anew
from raystore.core.schema import Encoded, Id, Positive, Rule, SortOrder, Text, Whole
from raystore.core.state import Session, State, Step

PROOF_SESSIONS = 2  #: that could not read a version

#: Of an object in the journal, where it is the name of a file.
Address = Annotated[str, Rule("len({v}) == 40 and {v}.isascii() and {v}.isalnum()", "the digest of an object")]


def put(
    state: State,
    step: Step,
    *,
    resources_id: Id | None,
    resources: Encoded,
    policy_version: int | None,
    holds_objects: bool,
    objects: list[tuple[Address | None, Whole]] | None = None,
) -> Resources:
    """Publish a new version; returns its record without the value. `objects`: address and size of each object."""
    before = state.resources.policy_version
    made = state.resources.publish(
        step.mint("rs-", 12, state.resources) if resources_id is None else resources_id,
        resources,
        now=step.now,
        policy_version=policy_version,
        holds_objects=holds_objects,
        objects=objects,
        publisher=step.session.session_id if step.session is not None else None,
    )
    release(state, step, made.resources_id)
    if state.evaluations.running:
        evaluations.found_version(state, step, made)
    detail: dict[str, Any] = {"resources_id": made.resources_id, "version": made.version}
    if policy_version is not None:
        detail["policy_version"] = policy_version
        if before is not None and policy_version < before:
            detail["lower_than"] = before  # a model may be rolled back; whoever debugs staleness wants to know
    state.changes.append(step.now, "resources", **detail)
    return made.evolve(resources=None)


def get(state: State, step: Step, *, resources_id: Id, version: int | None) -> Resources | None:
    """A version of an id, the newest by default."""
    return state.resources.get(resources_id, version)


def latest(state: State, step: Step) -> Resources | None:
    """What was published last."""
    return state.resources.latest()


def query(
    state: State,
    step: Step,
    *,
    resources_id: Id | None,
    resources_id_contains: str | None,
    sort_by: str | None,
    sort_order: SortOrder,
    limit: int,
    offset: int,
) -> Many:
    """One page of the newest versions of all ids."""
    conditions = [queries.equals("resources_id", resources_id)] if resources_id is not None else []
    if resources_id_contains is not None:
        conditions.append(queries.contains("resources_id", resources_id_contains))
    found = queries.select(state.resources.all_newest(), conditions, "and")
    found = queries.arrange(found, sort_by, sort_order, queries.RESOURCES_SORT)
    return Many(queries.page(found, limit, offset), len(found))


def delete(state: State, step: Step, *, resources_id: Id) -> None:
    """Delete all versions of an id; rollouts that name it are not held back any more."""
    versions = [held.version for held in state.resources.all_versions(resources_id)]
    state.resources.delete(resources_id)
    release(state, step, resources_id)
    for version in versions if state.evaluations.running else ():
        evaluations.lose_version(state, step, resources_id, version, "it was deleted")
    state.changes.append(step.now, "resources_deleted", resources_id=resources_id)


# -- rollouts whose resources cannot be had ----------------------------------------------------------------------------


def hold_back(state: State, step: Step, resources_id: str, version: int, why: str) -> bool:
    """Hold back what waits for a version that is missing; False if nothing may wait for it, or it is known to be."""
    table = state.resources
    is_pinned = state.evaluations.running and evaluations.lose_version(state, step, resources_id, version, why)
    newest = table.newest(resources_id)
    if newest is None or newest.version != version or resources_id in table.missing:
        return bool(is_pinned)
    table.missing[resources_id] = (version, why)
    waiting = [
        i
        for i in state.queues
        if state.entries[i].rollout.resources_id == resources_id and state.queues.backs_off_until(i) is None
    ]  # what backs off is held back afterwards, if these are still missing then
    put_anew(state, step, waiting)
    state.changes.append(
        step.now, "held_back", resources_id=resources_id, version=version, rollouts=len(waiting), why=why
    )
    return True


def release(state: State, step: Step, resources_id: str) -> None:
    """Offer again what was held back for an id."""
    state.resources.missing.pop(resources_id, None)
    waiting = state.queues.held(resources_id)
    put_anew(state, step, waiting)
    if waiting:
        state.changes.append(step.now, "offered_again", resources_id=resources_id, rollouts=len(waiting))


def publisher_gone(state: State, step: Step, session: Session) -> None:
    """A process that held objects has died: hold back the rollouts whose objects are in no journal."""
    for resources_id, version in state.resources.published_by(session.session_id):
        if any(address is None for address, _ in state.resources.objects_of(resources_id, version)):
            hold_back(state, step, resources_id, version, "the process that published it has ended")


def unread(
    state: State, step: Step, *, rollout_id: Id, attempt_id: Id, resources_id: Id, version: Positive, error: Text
) -> None:
    """An attempt could not read its resources: it ends without a charge, and its rollout gets its place back."""
    entry = state.entry(rollout_id)
    state.find_attempt(entry, attempt_id, step.session)
    attempts.withdraw(state, step, entry, attempt_id, error=error)
    session = step.session
    if session is None or not state.resources.is_there(resources_id, version):
        return
    publisher = state.resources.publisher(resources_id, version)
    holder = state.sessions.get(publisher or "")
    if holder is None or holder.ended_at is not None:
        hold_back(state, step, resources_id, version, "its objects cannot be read, and who published it has ended")
    elif holder is session:
        hold_back(state, step, resources_id, version, "its objects cannot be read by the process that published it")
    elif state.resources.unread(resources_id, version, session.session_id) >= PROOF_SESSIONS:
        hold_back(state, step, resources_id, version, f"{PROOF_SESSIONS} processes could not read its objects")


def hold_objects(state: State, step: Step, *, versions: list[tuple[Id, Positive, Encoded]]) -> list[tuple[str, int]]:
    """Note that a process holds the objects of these versions; returns the versions whose objects it may drop."""
    session = step.session
    assert session is not None
    unneeded = []
    for resources_id, version, given in versions:
        references = given.refs if isinstance(given, Payload) else ()
        if not state.resources.hold(resources_id, version, references, session.session_id):
            unneeded.append((resources_id, version))
            continue
        held = state.resources.record_of(resources_id, version)
        if held is not None and state.evaluations.running:
            evaluations.found_version(state, step, held)
        if state.resources.missing.get(resources_id, (0, ""))[0] == version:
            release(state, step, resources_id)
    return unneeded
