"""What the tests of runners share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.helpers import AnyStore


@pytest.fixture(params=["memory", "ray"])
def store(request: pytest.FixtureRequest) -> AnyStore:
    """A store of either kind, on the system clock."""
    make: Callable[[], AnyStore] = request.getfixturevalue(f"make_{request.param}_store")
    return make()
