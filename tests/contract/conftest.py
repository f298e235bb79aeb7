"""One suite for every kind of store; no test here names an implementation.

Stores run on a manual clock: time passes by `tick`, and no test sleeps for it. Those on Ray share a few actors, which
become a new store for each test, since the start of a process takes ten times as long as a test.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

import raystore as rs
from raystore.remote.actor import StoreActor
from raystore.types.options import make_config
from tests.helpers import AnyStore

KINDS = ["memory", "ray"]


class Shared(StoreActor):
    """An actor that is one store after the other."""

    async def become(self, config: Any) -> None:
        """Forget the store that this was, and be another one."""
        if self._service is not None:
            self._lifelines.close()
            self._service.close()
        self._config, self._service, self._endpoint = config, None, None


class Actors:
    """Actors that are no test's at the moment."""

    def __init__(self) -> None:
        self._idle: list[Any] = []

    def store(self, **options: Any) -> rs.RayLightningStore:
        """A store that nobody has used."""
        config = make_config(**options)
        if not self._idle:
            name = f"shared-{secrets.token_hex(4)}"  # tests of another folder may use such actors of their own
            actor = ray.remote(Shared).options(name=name, namespace="shared", num_cpus=0, max_concurrency=1_000)
            self._idle.append(actor.remote(config, name, "shared"))
        actor = self._idle.pop()
        ray.get(actor.become.remote(config))
        return rs.RayLightningStore(actor)

    def check_and_take_back(self, stores: list[rs.RayLightningStore]) -> None:
        """The tests of these stores have ended."""
        for store in stores:
            with contextlib.suppress(rs.StoreClosedError):  # the test closed it
                store.sync.check()
            store.close()
            self._idle.append(store.actor)


@pytest.fixture(scope="package")
def actors(cluster: None) -> Actors:
    """Actors for all tests here; they end with the cluster."""
    return Actors()


@pytest.fixture
def make_shared_store(actors: Actors) -> Iterator[Callable[..., rs.RayLightningStore]]:
    """Makes stores on Ray; checks their invariants after the test."""
    made: list[rs.RayLightningStore] = []

    def make(**options: Any) -> rs.RayLightningStore:
        made.append(actors.store(**options))
        return made[-1]

    yield make
    actors.check_and_take_back(made)


@pytest.fixture(params=KINDS)
def make_store(request: pytest.FixtureRequest) -> Callable[..., AnyStore]:
    """Makes stores of one kind, with any options."""
    make = request.getfixturevalue("make_shared_store" if request.param == "ray" else "make_memory_store")
    return lambda **options: make(**{"clock": "manual", **options})


@pytest.fixture
def store(make_store: Callable[..., AnyStore]) -> AnyStore:
    """A store with default options."""
    return make_store()
