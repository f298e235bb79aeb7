"""The store in this process: no Ray, for tests, notebooks, and debugging an agent with a debugger.

The same core, service and client as on Ray; usable from all threads and event loops of the process.
Not here: sharing with other processes, for which there is `raystore.start`.
"""

from __future__ import annotations

import time
from typing import Any, NoReturn, Unpack

from raystore._sync import SyncStore
from raystore.client import StoreClient
from raystore.client.testing import Testing
from raystore.client.transport import LocalTransport, origin_of
from raystore.errors.calls import explained_with
from raystore.journal.opening import open_journal
from raystore.options import OPTIONS, StoreOptions, make_config, memory_capacity, resolve
from raystore.service.clock import ThreadAlarm
from raystore.service.service import Service
from raystore.types import StoreInfo
from raystore.values.objects import Origin
from raystore.wire.convert import Encoder


class InMemoryLightningStore(StoreClient):
    """A LightningStore in this process.

    Takes the options of `StoreOptions`. The reference's `thread_safe`, `tracker` and `scan_debounce_seconds` are
    accepted and have no effect: this store is always thread-safe, and time is watched by deadlines, not by scans.
    """

    @explained_with(OPTIONS)
    def __init__(
        self,
        *,
        thread_safe: bool = True,
        tracker: Any = None,
        scan_debounce_seconds: float = 10.0,
        **options: Unpack[StoreOptions],
    ) -> None:
        config, resume = make_config(**options), options.get("resume", "auto")
        capacity = memory_capacity()
        settings = resolve(config, capacity)
        opened = open_journal(config, settings, name=None, resume=resume, now=time.time()) if config.journal else None
        self._service = Service(config, capacity_bytes=capacity, alarm=ThreadAlarm, opened=opened)
        self._transport = LocalTransport(self._service)
        self._encoder = Encoder(config.all_limits(), config.estimator())
        self.sync = SyncStore(self)
        self.testing = Testing(self._transport)

    @property
    def info(self) -> StoreInfo:
        """Who this store is."""
        known = self._service.info()
        return StoreInfo(
            store_id=known["store_id"],
            name=None,
            namespace=None,
            epoch=known["epoch"],
            protocol=known["protocol"],
            node=None,
            limits=known["limits"],
            capabilities=dict(self.capabilities),  # type: ignore[arg-type]
            endpoints={},
        )

    def _origin_of_objects(self) -> Origin:
        return origin_of(self._service)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "An InMemoryLightningStore lives in its process and cannot be pickled. To share a store with other "
            "processes, start it on Ray: store = raystore.start(), and pass store or store.actor."
        )
