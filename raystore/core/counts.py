"""How much a store holds and has done: the numbers of the core that `statistics()` shows.

Not here: numbers of the process and of its calls (`shell`).
"""

from __future__ import annotations

from typing import Any

from raystore.core import claims, training
from raystore.core.changes import FEED_LENGTH
from raystore.core.lifecycle import ROLLOUT_STATUSES
from raystore.core.state import State


def _of_status(state: State, status: str) -> int:
    return state.indexes.count(("status", status))


def counts(state: State) -> dict[str, Any]:
    """Counts of the core; the shell adds its own."""
    return {
        "total_rollouts": len(state.entries),
        "total_attempts": state.attempt_count,
        "total_spans": state.spans.count,
        "total_resources": len(state.resources),
        "total_workers": len(state.workers),
        "total_span_bytes": state.spans.bytes,
        "eviction_threshold_bytes": state.settings.eviction_bytes,
        "safe_threshold_bytes": state.settings.safe_bytes,
        "payload_bytes": state.payload_bytes + state.resources.bytes,
        "accounted_bytes": state.total_bytes,
        "evicted_spans": state.spans.evicted_spans,
        "evicted_rollouts": state.evicted_rollouts,
        "eviction_passes": state.eviction_passes,
        "deadline_fires": state.deadlines.fires,
        "sessions": claims.live_sessions(state),
        "queue_length": len(state.queues),
        "queue_lengths": state.queues.lengths(),
        "held_back": sum(state.queues.held_counts().values()),
        "held_back_by_resources": state.queues.held_counts(),
        "rollouts_by_status": {status: n for status in ROLLOUT_STATUSES if (n := _of_status(state, status))},
        "suspects": len(state.suspects),
        "withdrawals": state.withdrawals,
        "changes": state.changes.last,
        "change_feed_length": FEED_LENGTH,
        "memory_full": state.memory_full,
        "waits_for_consumer": state.waits_for,
        "consumers": training.describe(state),
    }
