"""What all tests share: stores of either kind, started once for each test and closed after it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

os.environ["RAY_ADDRESS"] = "local"  # a cluster that someone else runs here is never joined
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"

import raystore as rs

MakeStore = Callable[..., Any]


@pytest.fixture
def make_memory_store() -> Iterator[MakeStore]:
    """Makes stores in this process; checks their invariants and closes them after the test."""
    made: list[Any] = []

    def make(**options: Any) -> Any:
        made.append(rs.InMemoryLightningStore(**options))
        return made[-1]

    yield make
    _check_and_close(made)


def _check_and_close(stores: list[Any]) -> None:
    for store in stores:
        with contextlib.suppress(rs.StoreClosedError):  # the test closed it
            store.sync.check()
        store.close()


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One local Ray for all tests that need it."""
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def make_ray_store(cluster: None) -> Iterator[MakeStore]:
    """Makes stores on Ray; checks their invariants and ends them after the test."""
    made: list[Any] = []

    def make(start: MakeStore = rs.start, **options: Any) -> Any:
        made.append(start(**options))
        return made[-1]

    yield make
    _check_and_close(made)
