"""Long operations, cut so that others may come in between.

Each rollout is changed by one piece, whole. Answers of the pieces are to be joined (lists) or added up (numbers).
Not here: running them, and letting others in (`inbox`).
"""

from __future__ import annotations

from typing import Any

from raystore.core.state import State
from raystore.core.verbs import VERBS, chosen_among

DIVISIBLE = frozenset({"cancel_rollouts", "release", "delete_rollouts"})
PIECE = 100  #: rollouts of a long operation that are worked off at once


def pieces(state: State, verb: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each piece of an operation that is divisible."""
    if not VERBS[verb].fits(arguments):
        return [arguments]  # to be refused when it runs
    if verb == "cancel_rollouts":
        ids, rest = chosen_among(state, **arguments), {"group_id": None, "tags": None}
    else:
        ids, rest = arguments["rollout_ids"], {}
    cuts = [ids[first : first + PIECE] for first in range(0, len(ids), PIECE)]
    return [rest | {"rollout_ids": part} for part in cuts or [[]]]
