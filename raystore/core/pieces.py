"""Long operations, cut so that others may come in between.

Each rollout is changed by one piece, whole. Answers of the pieces are to be joined (lists) or added up (numbers). What
the operation as a whole would be refused for is looked at before it is cut, and what could make a later piece fail is
kept from happening: the rollouts of a deletion are reserved, and consumers are not given them any more.
Not here: running them, and letting others in (`inbox`).
"""

from __future__ import annotations

from typing import Any

from raystore.core.retention import held_among
from raystore.core.state import Session, State
from raystore.core.verbs import VERBS, chosen_among

DIVISIBLE = frozenset({"cancel_rollouts", "release", "delete_rollouts"})
RESERVING = frozenset({"delete_rollouts"})  #: of these, what a consumer who takes a rollout would refuse
PIECE = 100  #: rollouts of a long operation that are worked off at once


def pieces(
    state: State, session: Session, verb: str, arguments: dict[str, Any], *, is_more: bool = False
) -> list[dict[str, Any]]:
    """The arguments of each piece of an operation that is divisible; `is_more`: of what is left of one.

    One that will be refused stays whole, so that it is refused as a whole.
    """
    if not VERBS[verb].fits(arguments) or session.ended_at is not None:
        return [arguments]
    if verb == "cancel_rollouts":
        ids, rest = chosen_among(state, **arguments), {"group_id": None, "tags": None}
    else:
        ids, rest = arguments["rollout_ids"], {}
    if verb in RESERVING and is_more and session.session_id in state.deleting:
        ids = [rollout_id for rollout_id in dict.fromkeys(ids) if rollout_id in session.deleting]
    elif verb in RESERVING and len(ids) > PIECE:
        if held_among(state, ids) is not None:
            return [arguments]
        ids = [rollout_id for rollout_id in dict.fromkeys(ids) if rollout_id in state.entries]
        state.reserve(session, ids)
    cuts = [ids[first : first + PIECE] for first in range(0, len(ids), PIECE)]
    return [rest | {"rollout_ids": part} for part in cuts or [[]]]
