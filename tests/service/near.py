"""A store behind the session protocol in this process: real sessions and a real endpoint, and no Ray between them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

from raystore.remote.server_session import Endpoint
from raystore.remote.session import ClientSession
from raystore.service.clock import LoopAlarm
from raystore.service.service import Service
from raystore.types.options import StoreConfig
from raystore.wire import frames


class _Reference:
    """What Ray gives for a call, as far as a session uses it."""

    def __init__(self, future: concurrent.futures.Future[Any]) -> None:
        self._future = future

    def future(self) -> concurrent.futures.Future[Any]:
        return self._future


class _Method:
    def __init__(self, near: NearStore, call: Callable[..., Any]) -> None:
        self._near, self._call = near, call

    def remote(self, *arguments: Any, **more: Any) -> _Reference:
        return _Reference(asyncio.run_coroutine_threadsafe(self._call(*arguments, **more), self._near.loop))


class NearStore:
    """A service on a loop of its own, and a handle to it as sessions take it.

    `spoil(name, answer)` may give another answer in place of one, or raise.
    """

    def __init__(self, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.service = Service(
            StoreConfig(**options), capacity_bytes=2**33, alarm=lambda ring: LoopAlarm(self.loop, ring), name="near"
        )
        self.endpoint = Endpoint(self.service)
        self.spoil: Callable[[str, frames.Answer], frames.Answer] = lambda name, answer: answer
        self.calls = 0
        self.exchange, self.listen = _Method(self, self._exchange), _Method(self, self._listen)
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._sessions: list[ClientSession] = []

    async def _exchange(self, *parts: bytes, refs: Any = None) -> frames.Answer:
        self.calls += 1
        return self.spoil("exchange", await self.endpoint.exchange(parts, refs))

    async def _listen(self, frame: bytes) -> frames.Answer:
        self.calls += 1
        return self.spoil("listen", await self.endpoint.listen(frame))

    def connect(self) -> ClientSession:
        """A session, as a client process has one."""
        self._sessions.append(ClientSession(self, "near", self.service.epoch, 10**6))
        return self._sessions[-1]

    def close(self) -> None:
        for session in self._sessions:
            session.close()
        self.service.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
