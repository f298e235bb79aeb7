"""One suite for every kind of store; no test here names an implementation.

Stores run on a manual clock: time passes by `tick`, and no test sleeps for it.
"""

from __future__ import annotations

from typing import Any

import pytest

KINDS = ["memory", "ray"]


@pytest.fixture(params=KINDS)
def make_store(request: pytest.FixtureRequest) -> Any:
    """Makes stores of one kind, with any options."""
    make = request.getfixturevalue(f"make_{request.param}_store")

    def make_manual(**options: Any) -> Any:
        return make(**{"clock": "manual", **options})

    return make_manual


@pytest.fixture
def store(make_store: Any) -> Any:
    """A store with default options."""
    return make_store()
