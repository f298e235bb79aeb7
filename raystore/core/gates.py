"""The gates of queues: who has paused which queue, and how much of a queue may run at once and start in a minute.

A queue without a pause and a limit has no entry here, and costs nothing. With a limit a claim costs the same however
much waits or runs: what runs is counted as it changes, and the times of the last minute's claims are kept in order.
Not here: what a person asks for (`pauses`), the claims (`claims`), when a status changes (`rollouts`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from raystore.core.queues import Deadlines
from raystore.core.records import declare, packed, shown, unpacked

EVERY = ""  #: stands for all queues, also those that come later; no queue has this name
KEPT = ""  #: stands for a session: the pause belongs to nobody, and only `resume` ends it
RATE_SECONDS = 60.0  #: in any so many seconds a queue has at most `per_minute` claims

Hindrance = Literal["paused", "max_running", "per_minute"]  #: why a queue hands out nothing


class Pause(NamedTuple):
    """That somebody has paused a queue."""

    session_id: str  #: who did
    since: float


@dataclass(slots=True, eq=False)
class Limit:
    """How much of a queue may run at once, and start in a minute."""

    #: Rollouts that run at once; None: any number.
    max_running: int | None = declare(None)
    #: Claims in any minute; None: any number.
    per_minute: int | None = declare(None)
    #: Rollouts of the queue that are preparing or running now.
    running: int = declare(0)
    #: With `per_minute`: when the claims of the last minute were made, oldest first, and perhaps some before.
    claims: deque[float] = declare(make=deque, pack=list, unpack=deque, shows=list)

    def opens_at(self) -> float | None:
        """The instant after which the rate allows another claim; None if it does anyway."""
        if self.per_minute is None or len(self.claims) < self.per_minute:
            return None
        return self.claims[-self.per_minute] + RATE_SECONDS

    def forget_claims(self, now: float) -> None:
        """Forget the claims that are more than a minute old."""
        claims = self.claims
        while claims and now > claims[0] + RATE_SECONDS:
            claims.popleft()

    def hindrance(self, now: float) -> Hindrance | None:
        """Why there is no further claim now, if so."""
        if self.max_running is not None and self.running >= self.max_running:
            return "max_running"
        opens_at = self.opens_at()
        return "per_minute" if opens_at is not None and not now > opens_at else None


class Gates:
    """The pauses and limits of one store."""

    def __init__(self) -> None:
        self.pauses: dict[str, dict[str, Pause]] = {}  #: by queue or `EVERY`, then by session or `KEPT`
        self.limits: dict[str, Limit] = {}  #: by queue
        self.deadlines: Deadlines[str] = Deadlines(self._opens_at)  #: of queues whose rate allows no claim before

    def _opens_at(self, queue: str) -> float | None:
        limit = self.limits.get(queue)
        return None if limit is None else limit.opens_at()

    # -- whether a queue hands out -----------------------------------------------------------------------------------

    def hindrance(self, queue: str, now: float) -> Hindrance | None:
        """Why a queue hands out nothing now, if so."""
        if self.pauses and (queue in self.pauses or EVERY in self.pauses):
            return "paused"
        limit = self.limits.get(queue)
        return None if limit is None else limit.hindrance(now)

    def open_among(self, queues: Iterable[str], now: float) -> list[str]:
        """The queues among these that hand out now."""
        return [queue for queue in queues if self.hindrance(queue, now) is None]

    # -- pauses ------------------------------------------------------------------------------------------------------

    def all_pauses(self) -> Iterator[tuple[str, str, Pause]]:
        """Each pause with its queue (or `EVERY`) and whose it is (or `KEPT`)."""
        for queue, made in self.pauses.items():
            for whose, pause in made.items():
                yield queue, whose, pause

    def pause(self, queue: str, whose: str, pause: Pause) -> bool:
        """Add a pause; False if there is one of the same queue and session, which stays."""
        return self.pauses.setdefault(queue, {}).setdefault(whose, pause) is pause

    def resume(self, queue: str, whose: str) -> bool:
        """End a pause; whether there was one."""
        made = self.pauses.get(queue, {})
        if made.pop(whose, None) is None:
            return False
        if not made:
            del self.pauses[queue]
        return True

    # -- limits ------------------------------------------------------------------------------------------------------

    def limit(self, queue: str, max_running: int | None, per_minute: int | None, running: int) -> None:
        """Set the limits of a queue, of which so many rollouts run now; two times None lift them."""
        if max_running is None and per_minute is None:
            self.limits.pop(queue, None)
            return
        limit = self.limits.setdefault(queue, Limit(running=running))
        limit.max_running, limit.per_minute = max_running, per_minute
        if per_minute is None:
            limit.claims.clear()
        self.deadlines.guard(queue)

    def claimed(self, queue: str, now: float) -> None:
        """Note a claim, which `hindrance` allowed."""
        limit = self.limits.get(queue)
        if limit is not None and limit.per_minute is not None:
            limit.forget_claims(now)
            limit.claims.append(now)
            self.deadlines.guard(queue)

    def minute_passed(self, queue: str, now: float) -> None:
        """The deadline of a queue has passed: its rate allows a claim again."""
        if (limit := self.limits.get(queue)) is not None:
            limit.forget_claims(now)
            self.deadlines.guard(queue)

    # -- as a whole --------------------------------------------------------------------------------------------------

    def image(self) -> tuple[list[Any], dict[str, Any]]:
        """All of it, as plain data."""
        pauses = [(queue, whose, *pause) for queue, whose, pause in self.all_pauses()]
        return pauses, {queue: packed(limit) for queue, limit in self.limits.items()}

    def restore(self, image: tuple[list[Any], dict[str, Any]]) -> None:
        """Fill empty gates from an image; whoever goes on guards the deadlines."""
        pauses, limits = image
        for queue, whose, *pause in pauses:
            self.pause(queue, whose, Pause(*pause))
        self.limits.update((queue, unpacked(Limit, limit)) for queue, limit in limits.items())

    @property
    def are_used(self) -> bool:
        """Whether anything is paused or limited."""
        return bool(self.pauses or self.limits)

    def sums(self) -> list[Any]:
        """How much there is of each kind, for a quick comparison."""
        limits = self.limits.values()
        return [list(map(len, self.pauses.values())), [(limit.running, len(limit.claims)) for limit in limits]]

    def shown(self) -> list[Any]:
        """What a replay must reproduce."""
        pauses = [[queue, whose, *pause] for queue, whose, pause in sorted(self.all_pauses())]
        limits = [[queue, shown(limit)] for queue, limit in sorted(self.limits.items(), key=lambda item: item[0])]
        return [pauses, limits]
