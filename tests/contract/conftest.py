"""One suite for every kind of store; no test here names an implementation.

Stores run on a manual clock: time passes by `tick`, and no test sleeps for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

import raystore as rs

KINDS = ["memory", "ray"]
SPARES = 3


class Spares:
    """Stores on Ray with default options, started ahead of the tests that will use them, since a start takes longer
    than a test. Each is used once.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2)
        self._starting: deque[Future[Any]] = deque()

    def take(self) -> Any:
        """A store that nobody has used."""
        while len(self._starting) <= SPARES:
            self._starting.append(self._threads.submit(rs.start, clock="manual"))
        return self._starting.popleft().result()

    def close(self) -> None:
        """End those that are left."""
        for starting in self._starting:
            starting.result().close()


@pytest.fixture(scope="package")
def spares(cluster: None) -> Iterator[Spares]:
    """Spare stores for all tests here."""
    spares = Spares()
    yield spares
    spares.close()


@pytest.fixture(params=KINDS)
def make_store(request: pytest.FixtureRequest) -> Any:
    """Makes stores of one kind, with any options."""
    make = request.getfixturevalue(f"make_{request.param}_store")

    def make_manual(**options: Any) -> Any:
        if request.param == "ray" and not options:
            return make(start=request.getfixturevalue("spares").take)
        return make(**{"clock": "manual", **options})

    return make_manual


@pytest.fixture
def store(make_store: Any) -> Any:
    """A store with default options."""
    return make_store()
