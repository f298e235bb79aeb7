"""Counts of agents' spans that are lost, by reason; the first of each reason is logged with its remedy.

Model calls that lack what training needs are counted along with them. `store.statistics()` has the sums of all runners.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Literal

logger: logging.Logger = logging.getLogger("raystore.tracing")

Reason = Literal[
    "sampled_out",
    "sdk_disabled",
    "no_context",
    "not_convertible",
    "refused",
    "not_sent",
    "too_late",
    "too_many_open",
    "without_token_ids",
    "without_logprobs",
]

NAMES_LOGGED: int = 20  #: spans with a fault of their own, of different names, that a process logs for each reason

_REMEDIES: dict[Reason, str] = {
    "sampled_out": (
        "Unset OTEL_TRACES_SAMPLER, or give the TracerProvider sampler=ALWAYS_ON; one that is based on the parent also "
        "drops what has a parent that was not sampled, here or in the process that sent a request."
    ),
    "sdk_disabled": "Unset OTEL_SDK_DISABLED, and set no NoOpTracerProvider, where the agent runs.",
    "no_context": (
        "A thread does not know for which rollout it works: start it with "
        "Thread(target=contextvars.copy_context().run, args=[function]), give its work to a "
        "concurrent.futures.ThreadPoolExecutor, or give the span a parent that has not ended."
    ),
    "too_late": "Let the agent wait for what it has started.",
    "too_many_open": "Let the agent end its spans.",
}
_OF_ONE_SPAN: tuple[Reason, ...] = ("not_convertible", "refused")  #: other spans of the agent are kept

_logged: dict[Reason, set[str]] = {}  # names of spans that this process has logged


class Losses:
    """The counts of one runner; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a garbage collection may end a span while it is held
        self._counts: Counter[Reason] = Counter()

    def count(self, reason: Reason, number: int = 1) -> None:
        """Count losses without a log line."""
        with self._lock:
            self._counts[reason] += number

    def add(self, reason: Reason, name: str, story: str) -> None:
        """Count the loss of a span, and log it: once for each reason, or for each name if the span is at fault."""
        self.count(reason)
        logged = _logged.setdefault(reason, set())
        if name not in logged and len(logged) < (NAMES_LOGGED if reason in _OF_ONE_SPAN else 1):
            logged.add(name)
            remedy = _REMEDIES.get(reason, "The others are kept.")
            # A runner reports no more when such a span comes.
            counted = "" if reason == "too_late" else ", and counted"
            logger.warning("%s. %s (Told once%s.)", story.rstrip("."), remedy, counted)

    def take(self) -> dict[Reason, int]:
        """The counts since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)

    def give_back(self, counts: Mapping[Reason, int]) -> None:
        """Add counts that were taken and could not be reported."""
        with self._lock:
            self._counts.update(counts)
