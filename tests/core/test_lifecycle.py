"""The tables: every status known, every edge as documented."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest

from raystore.core import lifecycle, schema
from raystore.core.records import Config
from raystore.types import contract as types


def test_statuses_are_those_of_the_public_types() -> None:
    """Users and tables say the same words."""
    for name in ("RolloutStatus", "AttemptStatus", "WorkerStatus", "Outcome"):
        assert getattr(types, name) is getattr(lifecycle, name)
    assert get_args(types.RolloutMode) == get_args(schema.Mode)


def test_events_lead_to_known_statuses_and_never_leave_a_settled_one() -> None:
    """Only a span may bring an unresponsive attempt back; a heartbeat does no more than a span would."""
    for (status, event), after in lifecycle.ATTEMPT.items():
        assert status in lifecycle.ATTEMPT_STATUSES and after in lifecycle.ATTEMPT_STATUSES
        assert status not in lifecycle.SETTLED or (status, event) == ("unresponsive", lifecycle.SPAN)
        assert event != lifecycle.HEARTBEAT or lifecycle.ATTEMPT[status, lifecycle.SPAN] == after
    assert lifecycle.ROLLOUT_ON_HEARTBEAT.items() <= lifecycle.ROLLOUT_ON_SPAN.items()


@pytest.mark.parametrize(
    ("status", "outcome", "charged", "left", "expected"),
    [
        ("preparing", None, 1, True, "preparing"),
        ("running", None, 1, True, "running"),
        ("succeeded", "ok", 9, False, "succeeded"),
        ("failed", "agent_error", 1, True, "requeuing"),
        ("failed", "agent_error", 2, True, "failed"),
        ("timeout", "timeout", 1, True, "failed"),
        ("unresponsive", "unresponsive", 1, True, "failed"),
        ("unresponsive", "runner_lost", 5, True, "requeuing"),
        ("unresponsive", "runner_lost", 1, False, "failed"),
        ("failed", "infra", 5, True, "requeuing"),
        ("failed", "infra", 1, False, "failed"),
        ("failed", "dropped", 1, True, "failed"),
        ("failed", "cancelled", 1, True, "cancelled"),
    ],
)
def test_rollout_after(status: str, outcome: str | None, charged: int, left: bool, expected: str) -> None:
    """Which status follows from the latest attempt, with two attempts and a retry of failures."""
    config = Config(max_attempts=2, retry_condition=("failed",))
    assert lifecycle.rollout_after(status, outcome, config, charged=charged, deliveries_left=left) == expected


def test_rollout_after_an_unknown_status() -> None:
    """An attempt status that does not exist is an error, not a guess."""
    with pytest.raises(ValueError, match="Invalid attempt status: queuing"):
        lifecycle.rollout_after("queuing", None, Config(), charged=1, deliveries_left=True)


def test_every_event_has_an_answer_for_every_status() -> None:
    """What is not listed stays as it is."""
    events = {event for _, event in lifecycle.ATTEMPT}
    for status, event in product(lifecycle.ATTEMPT_STATUSES, events):
        assert lifecycle.attempt_after(status, event) in lifecycle.ATTEMPT_STATUSES
