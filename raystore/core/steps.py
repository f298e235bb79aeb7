"""Changes of the state that are no operation of a caller: what time, waiting, and the life of sessions bring.

Each is a function of the state, a step and plain arguments, entered in `STEPS` under the name by which a journal knows
it. Whoever has a clock decides that one is needed and with what; doing it is the same at a replay.
Not here: operations (`verbs`), deciding (`service`), writing down (`journal`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raystore.core import claims, expiry, held_back, verbs, workers
from raystore.core.state import Entry, HandedKey, State, Step


def _pause(state: State, step: Step, seconds: float) -> None:
    expiry.pause(state, step, seconds)


def _advance(state: State, step: Step, *due: list[Any]) -> None:
    expiry.advance(state, step, expiry.Due(*due))


def _hand_over(
    state: State, step: Step, session_id: str, ticket: int, queues: list[str], limit: int, worker_id: str | None
) -> list[Entry]:
    """Give work to a call that waits for it; it was told that it waits, so that it came away empty is no news."""
    session = state.sessions[session_id]
    step.session = session
    claimed = claims.claim(state, step, queues=queues, limit=limit, worker_id=worker_id, note_empty=False)
    if claimed:
        keys = [(entry.rollout.rollout_id, entry.attempts[-1].attempt_id) for entry in claimed]
        session.line.hand(ticket, keys, session.claims, session.batches)
    return claimed


def _hand_batch(state: State, step: Step, session_id: str, ticket: int, consumer: str, count: int) -> verbs.Batch:
    """Give a call that waits for a batch what there is."""
    session = step.session = state.sessions[session_id]
    batch = verbs.take(state, step, consumer, count)
    if batch[1]:
        session.line.hand(ticket, [(consumer, batch[1])], session.claims, session.batches)
    return batch


def _take_back(state: State, step: Step, session_id: str, keys: list[HandedKey]) -> None:
    """The caller of a parked call had gone when its answer came."""
    for key in keys:
        claims.take_back(state, step, state.sessions[session_id], key, why="declined")


def _acknowledge(state: State, step: Step, session_id: str, keys: list[HandedKey]) -> list[HandedKey]:
    return claims.acknowledge(state, step, state.sessions[session_id], keys)


def _open_session(state: State, step: Step, session_id: str, eternal: bool, process: list[Any] | None = None) -> None:
    claims.open_session(state, step, session_id, eternal=eternal, process=process)


def _end_session(state: State, step: Step, session_id: str, why: str) -> None:
    claims.end_session(state, step, state.sessions[session_id], why=why)


def _hold_back(state: State, step: Step, resources_id: str, version: int, why: str) -> bool:
    return held_back.hold_back(state, step, resources_id, version, why)


def _forget_workers(state: State, step: Step, worker_ids: list[str]) -> None:
    workers.forget(state, worker_ids)


STEPS: dict[str, Callable[..., Any]] = {
    "pause": _pause,
    "advance": _advance,
    "hand_over": _hand_over,
    "hand_batch": _hand_batch,
    "take_back": _take_back,
    "acknowledge": _acknowledge,
    "open_session": _open_session,
    "end_session": _end_session,
    "hold_back": _hold_back,
    "forget_workers": _forget_workers,
}
