"""What the tests of runners share."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(params=["memory", "ray"])
def store(request: pytest.FixtureRequest) -> Any:
    """A store of either kind, on the system clock."""
    return request.getfixturevalue(f"make_{request.param}_store")()
