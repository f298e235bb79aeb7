"""The spans of one rollout that wait to be sent, gathered from whatever thread they end in.

With what the model calls among them lack, which is known when the rollout has ended.
Not here: sending them (`worker`).
"""

from __future__ import annotations

import logging
import threading
from array import array
from collections.abc import Callable

from raystore.client import forks
from raystore.spans import Span
from raystore.tracing.dialects import CallsSeen
from raystore.tracing.losses import Losses

logger: logging.Logger = logging.getLogger("raystore.runner")

FLUSH_BYTES = 64 * 1024  #: so much does not wait for the next flush by time
_SPAN_BYTES = 300  # of a span without attributes, about
_NUMBER_BYTES = 9


class Outbox:
    """Spans that have ended and are not sent yet. `wake` is called on the adding thread when some should be sent.

    A garbage collection may end a span anywhere, also in the middle of `add`: so the lock lets its own thread in again,
    and nothing here is half done where something is allocated.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._pid = forks.pid
        self._lock = threading.RLock()
        self._spans: list[Span] = []
        self._bytes = 0
        self._late: Callable[[Span], None] | None = None  # takes those that end after the rollout
        self._calls: CallsSeen | None = CallsSeen()  # until the rollout has ended

    def add(self, span: Span) -> None:
        """Take a span."""
        if self._pid != forks.pid:  # whose lock may be held for ever
            self._tell_of_fork(span)
            return
        weight = _weight(span)
        with self._lock:
            if (late := self._late) is None:
                if self._calls is not None:
                    self._calls.add(span)
                self._spans.append(span)
                self._bytes += weight
            is_enough = self._bytes >= FLUSH_BYTES
        if late is not None:
            late(span)
        elif is_enough:
            self._wake()

    def _tell_of_fork(self, span: Span) -> None:
        """This is a copy, from which nothing comes to the runner."""
        if self._pid:
            self._pid = 0
            logger.warning(
                "Span %r of rollout %s is lost, with all that this process records of it: it was forked by the "
                "agent. Let it return what is to be recorded, and the agent record that. (Told once.)",
                span.name, span.rollout_id,
            )  # fmt: skip

    def take(self) -> list[Span]:
        """What has ended since the last call."""
        with self._lock:
            spans, self._spans, self._bytes = self._spans, [], 0
            return spans

    def close(self, late: Callable[[Span], None]) -> list[Span]:
        """The same for the last time: the rollout has ended; `late` is called with each span that is added later."""
        with self._lock:
            self._late, self._wake = late, _nobody  # who was woken knows the rollout, of which nothing is to be kept
        return self.take()

    def tell(self, losses: Losses) -> None:
        """Count what the model calls lack that have ended until now; later ones are not looked at."""
        with self._lock:
            calls, self._calls = self._calls, None
        if calls is not None:
            calls.tell(losses)


def _nobody() -> None:
    """Wake nobody."""


def _weight(span: Span) -> int:
    """Bytes of a span, nearly; counted for each, so it must be cheap."""
    size = _SPAN_BYTES
    for value in span.attributes.values():
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, array):
            size += len(value) * value.itemsize
        elif isinstance(value, (list, tuple)):
            size += sum(len(item) if isinstance(item, str) else _NUMBER_BYTES for item in value)
    return size
