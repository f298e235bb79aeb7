"""Every test here is a row of the fault suite, or shows that a row would find what it is there to find."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import IS_LONG

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make faults` chooses by this mark; its long forms take their time."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.fault)
            if IS_LONG:
                item.add_marker(pytest.mark.timeout(2400), append=False)
