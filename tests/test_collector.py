"""The garbage collector waits while many values are made, and is afterwards as the user had it."""

from __future__ import annotations

import gc

import pytest

from raystore.wire import convert


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_collector_is_left_as_it_was(is_enabled: bool) -> None:
    """Also if a value cannot be made."""

    def make(number: int) -> float:
        assert not gc.isenabled()
        return 1 / number

    try:
        (gc.enable if is_enabled else gc.disable)()
        assert convert.all_of(make, [1, 2]) == [1.0, 0.5]
        assert gc.isenabled() == is_enabled
        with pytest.raises(ZeroDivisionError):
            convert.all_of(make, [1, 0])
        assert gc.isenabled() == is_enabled
    finally:
        gc.enable()
