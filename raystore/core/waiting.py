"""Verbs whose callers may wait: for rollouts to finish, for completions, for changes.

A verb answers None if its caller has to wait.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from raystore.core import queries
from raystore.core.lifecycle import FINISHED
from raystore.core.records import Change
from raystore.core.schema import Filters, Id, Positive, Seconds, Whole
from raystore.core.state import Pair, State, Step


def finished_among(state: State, rollout_ids: Iterable[str]) -> list[Pair]:
    """The rollouts among these that are finished, in the order given; unknown ids are skipped."""
    found = (state.entries.get(rollout_id) for rollout_id in rollout_ids)
    return [entry.pair for entry in found if entry is not None and entry.rollout.status in FINISHED]


def unfinished_among(state: State, rollout_ids: Iterable[str]) -> list[str]:
    """The rollouts among these that exist and are not finished."""
    completions, entries = state.completions, state.entries
    return [i for i in rollout_ids if i not in completions and i in entries]


def finished_by_now(state: State, rollout_ids: Iterable[str]) -> tuple[list[Pair], int]:
    """The answer of `wait`: those that are finished, and the newest cursor of the completion log."""
    return finished_among(state, rollout_ids), state.completions.last


def wait(state: State, step: Step, *, rollout_ids: list[Id], timeout: float | None) -> tuple[list[Pair], int] | None:
    if (timeout is None or timeout > 0) and unfinished_among(state, rollout_ids):
        return None
    return finished_by_now(state, rollout_ids)


def sort_out(
    state: State, step: Step, *, rollout_ids: list[Id], instead_of: Whole | None = None
) -> tuple[list[Pair], tuple[int, list[str], int | None]]:
    """The finished rollouts among these in the order of completion; then a cursor, the unfinished ones, and a token.

    All of it is from one step. Pass the token to `completed` to learn which of the unfinished ones finish. It replaces
    an earlier token.
    """
    assert step.session is not None
    if instead_of is not None:
        state.watched.drop(instead_of)
    done = finished_among(state, rollout_ids)
    done.sort(key=lambda pair: state.completions.place(pair[0].rollout_id))
    rest = unfinished_among(state, rollout_ids)
    token = state.watched.keep(step.session.session_id, rest, step.seed) if rest else None
    return done, (state.completions.last, rest, token)


def completed(
    state: State,
    step: Step,
    *,
    cursor: Whole | None,
    limit: Positive,
    timeout: Seconds,
    filters: Filters,
    among: Whole | None = None,
) -> tuple[list[Pair], int | None] | None:
    found, cursor = completed_after(state, cursor, limit, filters, state.watched.find(among))
    return (found, cursor) if found or timeout <= 0 else None


def completed_after(
    state: State, cursor: int | None, limit: int, filters: Mapping[str, Any], among: Container[str] | None = None
) -> tuple[list[Pair], int | None]:
    """Finished rollouts that follow a cursor in completion order (only those `among` some), and the next cursor."""
    found: list[Pair] = []
    tags, others = queries.has_tags(filters.get("tags") or {}), {k: v for k, v in filters.items() if k != "tags"}
    for sequence, rollout_id in state.completions.after(cursor):
        if len(found) == limit:
            break
        cursor = sequence
        if among is not None and rollout_id not in among:
            continue
        entry = state.entries[rollout_id]
        if tags(entry.rollout) and all(getattr(entry.rollout, k) == v for k, v in others.items() if v is not None):
            found.append(entry.pair)
    return found, cursor


def changes(
    state: State, step: Step, *, cursor: Whole | None, kinds: list[str] | None, limit: Positive, timeout: Seconds
) -> tuple[list[Change], int | None] | None:
    found, cursor = changes_after(state, cursor, kinds, limit)
    return (found, cursor) if found or timeout <= 0 else None


def changes_after(
    state: State, cursor: int | None, kinds: list[str] | None, limit: int
) -> tuple[list[Change], int | None]:
    """Changes that follow a cursor, and the next cursor."""
    return state.changes.after(cursor, None if kinds is None else frozenset(kinds), limit)
