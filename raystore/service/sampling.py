"""Who limited whom: once a second the service looks at what holds the run back, and counts the seconds of each cause.

Known to the process of the store only; a restart begins anew. Nothing is sampled while nobody waits and nothing runs.
Not here: what happened (`core.meters`), what holds the run back now, in words (`why`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from raystore.core.lifecycle import ACTIVE
from raystore.core.meters import BUCKET_SECONDS, BUCKETS
from raystore.core.state import State
from raystore.service.parking import Parking

SAMPLE_SECONDS = 1.0  #: between two looks
LONGEST_SECONDS = 5.0  #: that a sample counts for, at most: else the process stood still

#: What may hold a run back, and when it does.
CAUSES: dict[str, str] = {
    "trainer_waited": "a consumer waited for a batch",
    "admission_closed": "a feed had no place free, and its trainer waited for no batch",
    "runners_idle": "a caller waited for work, and there was none for it",
    "runners_busy": "work waited, and no caller waited for it",
    "paused": "a queue or a feed was paused",
    "memory_full": "memory was full, and the store handed out no work",
    "journal": "changes waited for the disk for a tenth of a second",
    "store": "the loop of the store's process was late by a tenth of a second",
}

LATE_SECONDS = 0.1  #: from which on the loop of the store is late


@dataclass(slots=True)
class Sample:
    """What was seen in ten seconds."""

    number: int
    seconds: float = 0.0  #: that were looked at
    causes: Counter[str] = field(default_factory=Counter)  #: seconds of each
    waited: Counter[str] = field(default_factory=Counter)  #: seconds in which a consumer waited, by consumer
    late: float = 0.0  #: by which the loop was late, at most


class Sampler:
    """The samples of one store, of the last hour."""

    def __init__(self) -> None:
        self.at: float | None = None  #: when to look next, on the clock by which sessions age
        self._last = 0.0
        self._samples: deque[Sample] = deque(maxlen=BUCKETS)

    def begin(self, age: float) -> None:
        """Somebody waits: look, from now on."""
        self.at, self._last = age + SAMPLE_SECONDS, age

    def look(self, now: float, age: float, state: State, parking: Parking, *, is_behind: bool) -> None:
        """Look, if it is time; `is_behind` says that the journal has more to write than it can."""
        if self.at is None or age < self.at:
            return
        late, seconds = age - self.at, min(age - self._last, LONGEST_SECONDS)
        self._last = age
        number = int(now / BUCKET_SECONDS)
        if not self._samples or self._samples[-1].number != number:
            self._samples.append(Sample(number))
        sample = self._samples[-1]
        sample.seconds += seconds
        sample.late = max(sample.late, late)
        for consumer in consumers_waiting(parking):
            sample.waited[consumer] += seconds  # type: ignore[assignment]  # a Counter adds floats too
        for cause in causes(state, parking, is_behind=is_behind, is_late=late > LATE_SECONDS):
            sample.causes[cause] += seconds  # type: ignore[assignment]
        is_active = bool(parking) or len(state.queues) > 0 or any(state.indexes.count(("status", s)) for s in ACTIVE)
        self.at = age + SAMPLE_SECONDS if is_active else None

    def since(self, time: float) -> list[Sample]:
        """The samples that end after an instant, the oldest first."""
        first = int(time / BUCKET_SECONDS)
        return [sample for sample in self._samples if sample.number >= first]


def consumers_waiting(parking: Parking) -> set[str]:
    """The consumers that wait for a batch."""
    return {call.arguments["consumer"] for call in parking.by_kind.get("batch", {}).values()}


def causes(state: State, parking: Parking, *, is_behind: bool, is_late: bool) -> Iterable[str]:
    """What holds the run back at this moment."""
    waiting = consumers_waiting(parking)
    if waiting:
        yield "trainer_waited"
    if any(len(feed.items) >= feed.places and feed.name not in waiting and not feed.is_over for feed in state.feeds):
        yield "admission_closed"
    if "work" in parking.by_kind:  # a call is parked only while there is nothing for it
        yield "runners_idle"
    elif state.queues.are_offering:
        yield "runners_busy"
    if state.gates.pauses or any(feed.spent is not None for feed in state.feeds):
        yield "paused"
    if state.memory_full:
        yield "memory_full"
    if is_behind:
        yield "journal"
    if is_late:
        yield "store"


def described(samples: list[Sample]) -> dict[str, Any]:
    """What samples come to, as plain values: seconds looked at, share of each cause, seconds waited by consumer."""
    seconds = sum(sample.seconds for sample in samples)
    found: Counter[str] = sum((sample.causes for sample in samples), Counter())
    waited: Counter[str] = sum((sample.waited for sample in samples), Counter())
    return {
        "sampled_seconds": seconds,
        "shares": {cause: found[cause] / seconds if seconds else 0.0 for cause in CAUSES},
        "waited_seconds": dict(waited),
        "loop_lag_seconds": max((sample.late for sample in samples), default=0.0),
    }
