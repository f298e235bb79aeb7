"""The state that an agent saves with its attempt, and what a later attempt takes over with it.

A rollout keeps one saved state, the newest: an opaque value, the attempt that saved it, and its *mark*, the highest
number that a span of the rollout had then. An attempt that begins while there is one goes on from it: the spans of the
saving attempt up to the mark are its *prefix*, and so are those that the saving attempt had gone on from itself. Spans
behind the mark tell of work that was not saved; they are in no prefix.
The state is dropped when its rollout succeeds, is cancelled or released, and when an attempt says that the next one is
to begin anew. It stays while the rollout waits, runs or has failed.
Not here: the verbs (`attempts.save`, `attempts.get_saved`), when an attempt begins (`rollouts.begin`).
"""

from __future__ import annotations

from collections.abc import Iterator

from raystore.core.payload import Opaque, size_of
from raystore.core.records import Attempt, Span
from raystore.core.state import Entry, Saved, State, Step


def keep(state: State, entry: Entry, attempt: Attempt, payload: Opaque) -> None:
    """Keep a state of the latest attempt in place of the one before."""
    mark = state.spans.newest_number(attempt.rollout_id)
    _replace(state, entry, Saved(attempt.attempt_id, mark, attempt.reward, payload))


def drop(state: State, entry: Entry) -> None:
    """Forget the saved state of a rollout."""
    _replace(state, entry, None)


def begin_anew(state: State, step: Step, entry: Entry) -> None:
    """Forget the saved state, and let the latest attempt have no prefix: what came before is of no use to it."""
    latest = entry.attempts[-1]
    if entry.saved is None and latest.resumed_from is None:
        return
    drop(state, entry)
    if entry.marks is not None:
        entry.marks.pop(latest.attempt_id, None)
    changes = {"resumed_from": None, "reward": latest.reward}
    if latest.resumed_from is not None:  # its reward may be that of the prefix
        own = state.spans.of(latest.rollout_id, latest.attempt_id)
        changes["reward"] = next((span.reward for span in reversed(own) if span.reward is not None), None)
    state.put_attempt(entry, len(entry.attempts) - 1, latest.evolve(**changes))
    state.changes.append(step.now, "begins_anew", latest.rollout_id, latest.attempt_id)


def resume(entry: Entry, attempt: Attempt) -> None:
    """Let an attempt that begins go on from the saved state; it has the reward of its prefix as long as it has none."""
    saved = entry.saved
    assert saved is not None
    attempt.resumed_from = saved.attempt_id
    attempt.reward = saved.reward
    there = {one.attempt_id for one in entry.attempts}  # a claim that was taken back left its mark
    marks = {attempt_id: mark for attempt_id, mark in (entry.marks or {}).items() if attempt_id in there}
    entry.marks = marks | {attempt.attempt_id: saved.mark}


def _replace(state: State, entry: Entry, saved: Saved | None) -> None:
    more = bytes_of(saved) - bytes_of(entry.saved)
    entry.saved = saved
    entry.bytes += more
    state.payload_bytes += more
    state.touch(entry.rollout.rollout_id)


def bytes_of(saved: Saved | None) -> int:
    """Bytes that a saved state counts for."""
    return size_of(saved.payload) if saved is not None else 0


# -- the spans of an attempt that went on ------------------------------------------------------------------------------


def spans_of(state: State, entry: Entry, attempt_id: str) -> list[Span]:
    """The spans of an attempt in the order of their arrival, those of its prefix first, which count as its own."""
    rollout_id = entry.rollout.rollout_id
    up_to = dict(_prefix(state, entry, attempt_id))
    if not up_to:
        return state.spans.of(rollout_id, attempt_id)
    prefix: dict[str, list[Span]] = {earlier: [] for earlier in up_to}
    own = []
    for span in state.spans.of(rollout_id):
        if span.attempt_id == attempt_id:
            own.append(span)
        elif span.sequence_id <= up_to.get(span.attempt_id, -1):
            prefix[span.attempt_id].append(span.evolve(attempt_id=attempt_id))
    return [span for spans in reversed(prefix.values()) for span in spans] + own


def _prefix(state: State, entry: Entry, attempt_id: str) -> Iterator[tuple[str, int]]:
    """The attempts whose spans belong to an attempt, with their marks, the newest first."""
    marks = entry.marks or {}
    while (mark := marks.get(attempt_id)) is not None:
        index = state.index_of(entry, attempt_id)
        earlier = entry.attempts[index].resumed_from if index is not None else None
        if earlier is None:
            return
        yield earlier, mark
        attempt_id = earlier


def check_entry(entry: Entry) -> None:
    """Verify what is kept of saved states of a rollout; raises AssertionError."""
    rollout_id, marks, seen = entry.rollout.rollout_id, entry.marks or {}, set[str]()
    for attempt in entry.attempts:
        if attempt.resumed_from is not None:
            assert attempt.resumed_from in seen, f"{attempt.attempt_id} of {rollout_id} goes on from a later attempt"
            assert attempt.attempt_id in marks, f"{attempt.attempt_id} of {rollout_id} has no mark"
        seen.add(attempt.attempt_id)
    if entry.saved is not None:
        assert entry.saved.attempt_id in seen, f"the state of {rollout_id} was saved by no attempt of it"
        assert entry.rollout.status not in ("succeeded", "cancelled"), f"{rollout_id} keeps a state for nobody"
