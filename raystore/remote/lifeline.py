"""The lifeline of a process to a store that cannot look for it: on another machine, or in another container.

The process owns the result of a call that never ends, and lends it to the store, which waits for it as well. When the
process is gone, Ray tells the store that the owner of what it waits for has died. One that is frozen still owns it.
Not here: the store's side (`lifelines`).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raystore.remote.session import Session


class Lifeline:
    """The lifeline of one session at a time, to one process of the store at a time."""

    def __init__(self, session: Session, machine: str | None) -> None:
        """`machine` is that of the store's process, which looks for processes there; None if it does not look."""
        self._session = session
        self._machine = machine
        is_near = machine == session.process.machine != ""
        self._near = session.epoch if is_near else None  # the next process of the store may be elsewhere
        self._tied: tuple[str, int] | None = None  # session and epoch
        self._owned: Any = None  # as long as we live

    def tie(self, epoch: int) -> None:
        """See to it that the store's process of this epoch learns of our end."""
        session = self._session
        if epoch == self._near or self._machine is None or self._tied == (session.session_id, epoch):
            return
        self._tied = (session.session_id, epoch)
        self._owned = session.handle.linger.remote(session.session_id)
        for reference in (self._owned, session.handle.hold.remote(session.session_id, [self._owned])):
            reference.future().add_done_callback(self._on_end)

    def _on_end(self, future: Any) -> None:
        """A call came back: with the session, or since the store could not be reached, which is to be tried again."""
        with contextlib.suppress(Exception):
            if future.exception() is not None:
                self._tied = None
