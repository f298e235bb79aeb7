"""Handing on what the store says of attempts that this process holds: cancelled, superseded, timed out.

Not here: what a notice means for an agent (`raystore.runner`).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

logger: logging.Logger = logging.getLogger("raystore")

Handler = Callable[[str, str, str], None]  #: kind, rollout id, attempt id


class Notices:
    """The handlers of one process, and what they have not been told yet.

    Handlers are called in the order of the notices, one at a time, by whichever thread comes first, without a lock
    of a store held. One that uses the store may so bring about more notices: they follow once it has returned.
    """

    def __init__(self) -> None:
        self._handlers: list[Handler] = []
        self._waiting: deque[Sequence[str]] = deque()
        self._turn = threading.Lock()

    def listen(self, handler: Handler) -> Callable[[], None]:
        """Call a handler for each notice from now on; how to stop that."""
        self._handlers.append(handler)
        return lambda: self._handlers.remove(handler)

    def add(self, notices: Iterable[Sequence[str]]) -> None:
        """Take notices, to be handed out; calls nobody."""
        self._waiting.extend(notices)

    def hand_out(self) -> None:
        """Call every handler for every notice that waits, unless somebody is doing so."""
        # Who finds the turn taken leaves his to whoever has it, who looks once more after letting go of it.
        while self._waiting and self._turn.acquire(blocking=False):
            try:
                while self._waiting:
                    self._tell(self._waiting.popleft())
            finally:
                self._turn.release()

    def hand_out_elsewhere(self) -> None:
        """The same on a thread of its own, for one that answers come on: a handler may wait for an answer."""
        if self._waiting:
            threading.Thread(target=self.hand_out, name="raystore-notices", daemon=True).start()

    def _tell(self, notice: Sequence[str]) -> None:
        for handler in list(self._handlers):
            try:
                handler(*notice)
            except Exception:  # somebody else's code, which must not hold up the session
                logger.exception("A handler of notices failed")
