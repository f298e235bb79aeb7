"""A run as its journal has it, to look at: without Ray, and without disturbing whoever writes it.

Not here: going on with a run, for which a store is started on its journal.
"""

from __future__ import annotations

import os

from raystore._sync import SyncStore
from raystore.client import StoreClient
from raystore.client.transport import LocalTransport, origin_of
from raystore.errors.calls import explained
from raystore.journal.opening import open_for_reading
from raystore.options import StoreConfig, directory, memory_capacity
from raystore.service.clock import NoAlarm
from raystore.service.service import Service
from raystore.values.objects import Origin
from raystore.wire.convert import Encoder


class RecoveredRun(StoreClient):
    """The methods of a store, of which those that would change something raise `ReadOnlyError`.

    Time stands still where the journal ends: what ran then is shown as running.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = directory("path", path)
        config = StoreConfig(clock="manual", journal=path)
        opened = open_for_reading(path)
        self._service = Service(config, capacity_bytes=memory_capacity(), alarm=NoAlarm, opened=opened)
        self._transport = LocalTransport(self._service)
        self._encoder = Encoder(config.all_limits(), None)
        self.sync = SyncStore(self)

    def _origin_of_objects(self) -> Origin:
        return origin_of(self._service)


@explained
def recover(path: str | os.PathLike[str]) -> RecoveredRun:
    """Open a finished, crashed or running run for reading, by the directory of its journal.

    Raises `JournalMissingError`, `JournalDamagedError`, `JournalFormatError`.
    """
    return RecoveredRun(path)
