"""Spans of agents that are lost: counted by reason, and told once in a process, with the remedy.

Model calls that cannot be trained on are counted along with them. Odd spans are named, each name once.
Not here: finding them (`raystore.otel`, `raystore.runner`, `raystore.tracing`), the sum of all runners (`statistics`).
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

NAMES_TOLD = 20  #: odd spans of different names that a process tells of, for each reason

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
_ODD: tuple[Reason, ...] = ("not_convertible", "refused")  #: the fault of single spans; the others are kept

_told: dict[Reason, set[str]] = {}  # names of spans that this process was told of


class Losses:
    """The counts of one runner; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a garbage collection may end a span while it is held
        self._counts: Counter[Reason] = Counter()

    def count(self, reason: Reason, number: int = 1) -> None:
        """Count losses of which people know otherwise."""
        with self._lock:
            self._counts[reason] += number

    def add(self, reason: Reason, name: str, story: str) -> None:
        """Count a loss, and tell of it: of each reason once, of an odd span once for each `name` of such spans."""
        self.count(reason)
        told = _told.setdefault(reason, set())
        if name not in told and len(told) < (NAMES_TOLD if reason in _ODD else 1):
            told.add(name)
            remedy = _REMEDIES.get(reason, "The others are kept.")
            # What comes after the last report is counted by nobody.
            counted = "" if reason == "too_late" else ", and counted"
            logger.warning("%s. %s (Told once%s.)", story.rstrip("."), remedy, counted)

    def take(self) -> dict[Reason, int]:
        """What was counted since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)

    def give_back(self, counts: Mapping[Reason, int]) -> None:
        """What was taken and could not be reported."""
        with self._lock:
            self._counts.update(counts)
