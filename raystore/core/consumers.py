"""Training on each finished rollout exactly once: who took what, and what a durable model has seen.

A consumer takes batches of finished rollouts in completion order, each rollout once. It says which step of its model
consumed a batch (`acknowledge`), and up to which step the model is durable (`checkpoint`); when the model falls back to
an earlier step (`rewind`), what was consumed after that comes again, in the order in which it was taken.
A rollout in a batch is sealed: what is still reported of it is kept on its attempts, and decides nothing any more.
Not here: waiting for enough to take (`shell`).
"""

from __future__ import annotations

from typing import Any

from raystore.core.lifecycle import FINISHED
from raystore.core.rollouts import enter_eviction, enter_retention, release
from raystore.core.state import NOBODY, Consumer, Session, State, Step, Taken
from raystore.errors import BatchConflictError


def missing(state: State, consumer: str, count: int) -> int:
    """How many rollouts are missing to give a consumer so many; none if it holds a batch, which it is given again."""
    known = state.consumers.get(consumer)
    if known is not None and known.open is not None:
        return 0
    return count - len(_available(state, known, count))


def take(state: State, step: Step, consumer: str, count: int) -> tuple[int, list[str]]:
    """Number and rollouts of the batch that a consumer holds from now on: an earlier one if it is not acknowledged.

    Number 0 with no rollouts if there is nothing to take.
    """
    known = state.consumers.get(consumer)
    if known is not None and known.open is not None:
        return known.open, [i for i in known.batches[known.open] if i in state.entries]
    chosen = _available(state, known, count)
    if not chosen:
        return 0, []
    if known is None:
        known = state.consumers[consumer] = Consumer()
    known.made += 1
    known.open = known.made
    known.batches[known.open] = chosen
    for rollout_id in chosen:
        entry = state.entries[rollout_id]
        entry.taken = {**entry.taken, consumer: Taken(known.made)}
        state.touch(rollout_id)
        enter_retention(state, entry)
        if state.spans.has(rollout_id):
            enter_eviction(state, entry)
        if rollout_id in known.returned:
            del known.returned[rollout_id]
        else:
            known.cursor = state.completions.place(rollout_id)
    state.changes.append(step.now, "taken", consumer=consumer, batch=known.made, rollouts=len(chosen))
    return known.made, chosen


def _available(state: State, known: Consumer | None, count: int) -> list[str]:
    """Up to `count` rollouts that a consumer is to see next: first what came back to it, then what finished since."""
    returned = known.returned if known is not None else {}
    chosen = [i for i in returned if i in state.entries and _is_for_training(state, i)][:count]
    if len(chosen) == count:
        return chosen
    for _, rollout_id in state.completions.after(known.cursor if known is not None else None):
        if rollout_id not in returned and _is_for_training(state, rollout_id):
            chosen.append(rollout_id)
            if len(chosen) == count:
                break
    return chosen


def _is_for_training(state: State, rollout_id: str) -> bool:
    entry = state.entries[rollout_id]
    if state.deleting and state.is_reserved(rollout_id):
        return False
    if entry.rollout.status not in FINISHED or entry.rollout.status == "cancelled":
        return False
    return entry.latest is None or entry.latest.outcome != "dropped"


def unreserve(state: State, session: Session) -> None:
    """A long deletion has ended. What it did not reach may be taken again, also by those who were past it."""
    if state.deleting.pop(session.session_id, None) is None:
        return
    left, session.deleting = session.deleting, {}
    for rollout_id in left:
        if rollout_id not in state.completions:
            continue
        place, taken = state.completions.place(rollout_id), state.entries[rollout_id].taken
        for name, known in state.consumers.items():
            if known.cursor is not None and place <= known.cursor and name not in taken:
                known.returned.setdefault(rollout_id)
        state.came_back = True


def acknowledge(state: State, step: Step, consumer: str, batch: int, at_step: int, note: str | None) -> None:
    """A step of the model has consumed a batch; it is kept until the model is durable."""
    known = _known(state, consumer, batch)
    if known.open != batch:
        if known.steps.get(batch) == at_step:
            return  # said before
        _refuse(known, consumer, batch)
    if known.checkpoint is not None and at_step <= known.checkpoint:
        raise BatchConflictError(
            consumer, f"step {at_step} cannot consume batch {batch}: the model is durable at step {known.checkpoint}"
        )
    latest = max(known.steps.values(), default=at_step)
    if at_step < latest:
        raise BatchConflictError(consumer, f"step {at_step} cannot consume batch {batch}: {latest} consumed one before")
    known.open = None
    known.steps[batch] = at_step
    for rollout_id in known.batches[batch]:
        if (entry := state.entries.get(rollout_id)) is not None:
            entry.taken = {**entry.taken, consumer: Taken(batch, at_step, note=note)}
            state.touch(rollout_id)
    state.changes.append(step.now, "consumed", consumer=consumer, batch=batch, step=at_step, note=note)


def give_back(state: State, step: Step, consumer: str, batch: int) -> None:
    """A batch is not consumed: its rollouts come again, before all others."""
    known = _known(state, consumer, batch)
    if known.open != batch:
        _refuse(known, consumer, batch)
    _return(state, known, consumer, [batch])
    state.changes.append(step.now, "returned", consumer=consumer, batch=batch)


def checkpoint(state: State, step: Step, consumer: str, at_step: int) -> int:
    """The model is durable at a step: what it consumed up to there is released; how many rollouts."""
    known = state.consumers.setdefault(consumer, Consumer())
    if known.checkpoint is not None and at_step < known.checkpoint:
        raise BatchConflictError(consumer, f"checkpoint {at_step} is before its last one, {known.checkpoint}")
    known.checkpoint = at_step
    released: list[str] = []
    count = 0
    for batch in [batch for batch, consumed_by in known.steps.items() if consumed_by <= at_step]:
        del known.steps[batch]
        for rollout_id in known.batches.pop(batch):
            entry = state.entries.get(rollout_id)
            if entry is None:
                continue
            count += 1
            entry.taken[consumer].is_durable = True
            state.touch(rollout_id)
            if not entry.is_held:
                enter_retention(state, entry)  # it may have been released before
                released.append(rollout_id)
    release(state, released)
    state.changes.append(step.now, "checkpoint", consumer=consumer, step=at_step, rollouts=count)
    return count


def rewind(state: State, step: Step, consumer: str, at_step: int) -> int:
    """The model is at an earlier step again: what was consumed later, or taken and not consumed, comes again."""
    known = state.consumers.setdefault(consumer, Consumer())
    if known.checkpoint is not None and at_step < known.checkpoint:
        why = f"it cannot go back to step {at_step}: what was consumed up to step {known.checkpoint} is released"
        raise BatchConflictError(consumer, why)
    batches = [batch for batch in known.batches if batch == known.open or known.steps.get(batch, at_step) > at_step]
    count = _return(state, known, consumer, batches)
    state.changes.append(step.now, "rewound", consumer=consumer, step=at_step, rollouts=count)
    return count


def _return(state: State, known: Consumer, consumer: str, batches: list[int]) -> int:
    back: dict[str, None] = {}
    for batch in sorted(batches):
        for rollout_id in known.batches.pop(batch):
            entry = state.entries.get(rollout_id)
            if entry is not None:
                entry.taken = {name: taken for name, taken in entry.taken.items() if name != consumer} or NOBODY
                back[rollout_id] = None
                state.touch(rollout_id)
                enter_retention(state, entry)
                if state.spans.has(rollout_id):
                    enter_eviction(state, entry)
        known.steps.pop(batch, None)
        if known.open == batch:
            known.open = None
    state.came_back = state.came_back or bool(back)
    known.returned = back | known.returned  # these were taken before what came back earlier and was not taken again
    return len(back)


def _known(state: State, consumer: str, batch: int) -> Consumer:
    known = state.consumers.get(consumer)
    if known is None:
        raise BatchConflictError(consumer, f"it has taken nothing, so that it does not hold batch {batch}")
    return known


def _refuse(known: Consumer, consumer: str, batch: int) -> None:
    if batch in known.steps:
        why = f"step {known.steps[batch]} has consumed batch {batch} already"
    elif batch > known.made or batch < 1:
        why = f"there never was a batch {batch}"
    else:
        why = f"it does not hold batch {batch} any more: it was given back, rewound, or released by a checkpoint"
    raise BatchConflictError(consumer, why)


def ledger(state: State, consumer: str) -> list[tuple[str, int, int | None, bool, str | None]]:
    """What a consumer took of what is still here: rollout, batch, step, whether the model is durable, note."""
    rows = []
    for rollout_id, entry in state.entries.items():
        taken = entry.taken.get(consumer)
        if taken is not None:
            rows.append((rollout_id, taken.batch, taken.step, taken.is_durable, taken.note))
    return sorted(rows, key=lambda row: row[1])


def describe(state: State) -> dict[str, dict[str, Any]]:
    """Where each consumer stands."""
    return {
        name: {
            "open_batch": known.open,
            "batches": known.made,
            "checkpoint": known.checkpoint,
            "unreleased": sum(len(known.batches[batch]) for batch in known.steps),
            "returned": len(known.returned),
        }
        for name, known in state.consumers.items()
    }
