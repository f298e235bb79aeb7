"""Whether work is claimed, for whoever waits and shows progress: after a while without a claim, why there is none."""

from __future__ import annotations

from contextlib import suppress
from time import monotonic
from typing import Any

from raystore.errors import StoreError

LOOK_SECONDS = 5.0  #: after which the store is asked again
SILENT_SECONDS = 30.0  #: without a claim, after which it is told why


class Claims:
    """The claims of a store, looked at now and then."""

    def __init__(self, store: Any) -> None:
        self._store = store  # anything with `statistics`, and `why`
        self._known = -1
        self._since = monotonic()  # the last claim that was noticed
        self._looked = self._since
        self._why = ""

    async def why_none(self) -> str:
        """Why nothing was claimed for a while, in a sentence; empty if something was."""
        now = monotonic()
        if now - self._looked < LOOK_SECONDS:
            return self._why
        self._looked = now
        with suppress(StoreError):  # whoever waits is told by the call that waits
            self._why = await self._look(now)
        return self._why

    async def _look(self, now: float) -> str:
        counts = await self._store.statistics()
        made = counts["total_attempts"] + counts["withdrawals"]  # only a claim, or a start by hand, makes more of them
        if made != self._known:
            self._known, self._since = made, now
            return ""
        if now - self._since < SILENT_SECONDS:
            return ""
        return f"Nothing was claimed for {now - self._since:.0f} s{await self._first_finding()}"

    async def _first_finding(self) -> str:
        findings = await self._store.why() if hasattr(self._store, "why") else []
        return f": {findings[0].text.partition('. ')[0]}" if findings else ""
