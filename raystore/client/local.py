"""The store in this process: no Ray, for tests, notebooks, and debugging an agent with a debugger.

The same core, service and client as on Ray; usable from all threads and event loops of the process.
Not here: sharing with other processes, for which there is `raystore.start`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from raystore._sync import SyncStore
from raystore.client import StoreClient
from raystore.client.testing import Testing
from raystore.client.transport import LocalTransport, origin_of
from raystore.config import DEFAULT_JOURNAL_OBJECT_BYTES, memory_capacity, resolve
from raystore.errors.calls import explained
from raystore.journal.opening import open_journal
from raystore.options import make_config, make_encoder
from raystore.service.clock import ThreadAlarm
from raystore.service.service import Service
from raystore.types import RolloutConfig, Span, StoreInfo
from raystore.values.objects import Origin


class InMemoryLightningStore(StoreClient):
    """A LightningStore in this process.

    Takes the options of `raystore.start`. The reference's `thread_safe`, `tracker` and `scan_debounce_seconds` are
    accepted and have no effect: this store is always thread-safe, and time is watched by deadlines, not by scans.
    """

    @explained
    def __init__(
        self,
        *,
        eviction_memory_threshold: float | int | None = None,
        safe_memory_threshold: float | int | None = None,
        span_size_estimator: Callable[[Span], int] | None = None,
        default_config: RolloutConfig | None = None,
        duplicate_spans: str = "reject",
        on_memory_full: str = "evict",
        max_deliveries: int = 3,
        suspect_patience_seconds: float = 10.0,
        max_queued: int | None = None,
        retention: float | int | dict[str, Any] | None = None,
        keep_resources: int | None = None,
        limits: dict[str, int] | None = None,
        consumers: Sequence[str] | Mapping[str, Mapping[str, Any] | None] | None = None,
        clock: str = "system",
        journal: str | None = None,
        durability: str = "power",
        resume: str = "auto",
        journal_object_bytes: int = DEFAULT_JOURNAL_OBJECT_BYTES,
        thread_safe: bool = True,
        tracker: Any = None,
        scan_debounce_seconds: float = 10.0,
    ) -> None:
        config = make_config(
            eviction_memory_threshold=eviction_memory_threshold,
            safe_memory_threshold=safe_memory_threshold,
            span_size_estimator=span_size_estimator,
            default_config=default_config,
            duplicate_spans=duplicate_spans,
            on_memory_full=on_memory_full,
            max_deliveries=max_deliveries,
            suspect_patience_seconds=suspect_patience_seconds,
            max_queued=max_queued,
            retention=retention,
            keep_resources=keep_resources,
            limits=limits,
            consumers=consumers,
            clock=clock,
            journal=journal,
            durability=durability,
            resume=resume,
            journal_object_bytes=journal_object_bytes,
        )
        capacity = memory_capacity()
        settings = resolve(config, capacity)
        opened = open_journal(config, settings, name=None, resume=resume, now=time.time()) if config.journal else None
        self._service = Service(config, capacity_bytes=capacity, alarm=ThreadAlarm, opened=opened)
        self._transport = LocalTransport(self._service)
        self._encoder = make_encoder(config.all_limits(), config.span_size_estimator)
        self.sync: SyncStore = SyncStore(self)
        self.testing: Testing = Testing(self._transport)

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
