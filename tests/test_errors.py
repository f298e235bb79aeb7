"""Errors: their facts are attributes, whatever way an error takes, and they behave like any other exception."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest

import raystore as rs
from raystore import errors

FACTS: list[tuple[rs.StoreError, dict[str, Any]]] = [
    (rs.AttemptNotFoundError("ro"), {"rollout_id": "ro", "attempt_id": None}),
    (rs.RolloutNotFoundError("a", "b", "c"), {"rollout_id": "a", "others": ("b", "c")}),
    (rs.InvalidValueError("n", "v", "e"), {"name": "n", "value": "v", "expected": "e"}),
    (rs.ConflictError("ro", ["input"]), {"rollout_id": "ro", "differing": ["input"]}),
    (rs.SealedError("ro", ["t"]), {"rollout_id": "ro", "consumers": ["t"], "differing": ()}),
    (rs.RolloutSucceededError("ro"), {"rollout_id": "ro", "differing": ()}),
    (rs.BatchConflictError("t", "w"), {"consumer": "t", "why": "w", "rollout_id": None}),
    (rs.BatchHeldError("t", [[1, 2, "s"]], 1), {"held": [[1, 2, "s"]], "max_open": 1, "rollout_id": None}),
    (rs.OverloadedError(3, 2, 0.5), {"number": 3, "bound": 2, "retry_after_seconds": 0.5, "asked": 1}),
    (rs.StoreOverloadedError("x", 3, 2, 0.5), {"what": "x", "number": 3, "bound": 2, "asked": 1}),
    (rs.OutcomeUnknownError("s", "w"), {"store": "s", "why": "w"}),
    (rs.JournalFullError("p", 0.5), {"path": "p", "retry_after_seconds": 0.5}),
    (rs.JournalHeldError("p", 7, 2), {"path": "p", "record": 7, "deaths": 2}),
    (rs.VersionConflictError("f", 3, "w"), {"feed": "f", "version": 3, "why": "w", "rollout_id": None}),
    (rs.FailureBudgetError("f", "w", [["e", 2, "ro"]]), {"why": "w", "errors": [["e", 2, "ro"]]}),
    (rs.FilteredTooManyError("f", 3, 2, "w"), {"number": 3, "bound": 2, "why": "w"}),
    (rs.DatasetChangedError("f", "s", 3, None), {"stream": "s", "before": 3, "now": None}),
    (rs.PoolStartError("a", "b", setting_up=2), {"asked": "a", "why": None, "setting_up": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "facts"), FACTS, ids=lambda one: type(one).__name__)
def test_facts_are_attributes(error: Exception, facts: dict[str, Any]) -> None:
    """Of the error itself, of its copies, and of what comes out of a record."""
    ways = [error, copy.copy(error), pickle.loads(pickle.dumps(error)), errors.copy_of(error)]
    ways.append(errors.from_record(*errors.to_record(error)))
    for one in ways:
        assert {name: getattr(one, name) for name in facts} == facts
        assert (type(one), str(one), one.args) == (type(error), str(error), error.args)
    assert len({*ways}) == len(ways)  # each is itself only


def test_an_error_is_constructed_like_a_dataclass() -> None:
    """By position or by name, with all facts; the signature shows them."""
    assert rs.ClaimLostError(attempt_id="at", rollout_id="ro").args == ("ro", "at")
    assert list(inspect.signature(rs.JournalHeldError).parameters) == ["path", "record", "deaths"]
    assert list(inspect.signature(rs.SealedError).parameters) == ["rollout_id", "consumers"]
    wrong: list[tuple[Any, ...]] = [("ro",), ("ro", "at", 1)]
    for arguments in wrong:
        with pytest.raises(TypeError, match="argument"):
            rs.ClaimLostError(*arguments)


def test_errors_of_users_own() -> None:
    """Derived from raystore's, they are constructed as they say."""

    class Mine(rs.StoreError):
        pass

    class Gone(rs.RolloutNotFoundError):
        def __init__(self, number: int) -> None:
            super().__init__(f"ro-{number}")
            self.number = number

    assert str(Mine("text")) == "text"
    assert (Gone(1).rollout_id, Gone(1).number) == ("ro-1", 1)


def test_the_package_shows_the_errors_and_nothing_else_of_theirs() -> None:
    """So does it to a type checker, which reads the same list."""
    assert {*errors.__all__} <= {*rs.__all__}
    assert not {"to_record", "from_record", "copy_of", "BY_NAME", "shown"} & {*dir(rs)}
