"""Rollouts whose resources cannot be had: they keep their place, and are not handed out until there is a newer version.

An attempt that cannot read its resources can only fail, which is not its agent's fault. So once it is known that the
newest version of an id is *missing*, what waits for that id is held back: it counts as queued, and its deadlines rest
as those of everything that is queued do. A newer version releases it, or the process that had the objects coming back.
It is known if the process that held the objects is gone, if the store was started again without them, or if two
sessions could not read them; that one could not is no proof, since the fault may be its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raystore.core import attempts
from raystore.core.rollouts import enter_queue, unqueue
from raystore.core.state import Session, State, Step

PROOF_SESSIONS = 2  #: that could not read a version


def hold_back(state: State, step: Step, resources_id: str, version: int, why: str) -> bool:
    """Hold back what waits for a version that is missing; False if it is not the newest one, or is known to be."""
    table = state.resources
    newest = table.newest(resources_id)
    if newest is None or newest.version != version or resources_id in table.missing:
        return False
    table.missing[resources_id] = (version, why)
    waiting = [i for i in state.queues if state.entries[i].rollout.resources_id == resources_id]
    _put_anew(state, step, waiting)
    state.changes.append(
        step.now, "held_back", resources_id=resources_id, version=version, rollouts=len(waiting), why=why
    )
    return True


def release(state: State, step: Step, resources_id: str) -> None:
    """Offer again what was held back for an id."""
    state.resources.missing.pop(resources_id, None)
    waiting = state.queues.held(resources_id)
    _put_anew(state, step, waiting)
    if waiting:
        state.changes.append(step.now, "offered_again", resources_id=resources_id, rollouts=len(waiting))


def _put_anew(state: State, step: Step, rollout_ids: list[str]) -> None:
    for rollout_id in rollout_ids:
        entry = state.entries[rollout_id]
        assert entry.order is not None
        unqueue(state, entry)
        enter_queue(state, step, entry, entry.order)


def publisher_gone(state: State, step: Step, session: Session) -> None:
    """A process that held objects has died: what is in no journal is missing."""
    for resources_id, version in state.resources.published_by(session.session_id):
        if any(address is None for address, _ in state.resources.objects_of(resources_id, version)):
            hold_back(state, step, resources_id, version, "the process that published it has ended")


def unread(
    state: State, step: Step, rollout_id: str, attempt_id: str, resources_id: str, version: int, error: str
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


def hold_objects(
    state: State, step: Step, session: Session, versions: Sequence[tuple[str, int, tuple[Any, ...]]]
) -> list[tuple[str, int]]:
    """A process has the objects of versions; those of which it may let go, since nobody needs them any more."""
    unneeded = []
    for resources_id, version, references in versions:
        if not state.resources.hold(resources_id, version, references, session.session_id):
            unneeded.append((resources_id, version))
        elif state.resources.missing.get(resources_id, (0, ""))[0] == version:
            release(state, step, resources_id)
    return unneeded
