"""How a client reaches its store: what a transport does, and what every transport needs.

A transport takes an operation when it is called, not when it is awaited: operations take effect in the order in which
they were issued. It gives back claims and batches whose caller was cancelled.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol

from raystore.api import NoticeHandler
from raystore.client.pending import PendingCall
from raystore.core.claims import is_batch
from raystore.core.state import HandedKey
from raystore.core.verbs import HANDING

logger = logging.getLogger("raystore")


class Transport(Protocol):
    """What a client needs to reach its store."""

    def call(self, verb: str, arguments: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        """Run an operation and return its answer; raises the answer if it is an error.

        Claims and batches in the answer are acknowledged, or given back if the caller is cancelled.
        """

    def post(self, verb: str, arguments: dict[str, Any]) -> PendingCall:
        """Issue an operation now; its answer may be awaited."""

    def tell(self, verb: str, arguments: dict[str, Any]) -> None:
        """Issue an operation whose answer nobody waits for."""

    def abandon(self, call: PendingCall) -> None:
        """Cancel an issued call: an operation that was not sent yet is dropped, claims in its answer are given back."""

    def listen_for_notices(self, handler: NoticeHandler) -> Callable[[], None]:
        """Call `handler` when an attempt of this process is cancelled or lost; returns a function that stops this."""

    @property
    def session_id(self) -> str:
        """The session of this process, to which its operations belong."""

    def close(self) -> None:
        """Take no more calls."""


# -- claims and batches, which are acknowledged or given back ---------------------------------------------------------


def handed_keys(verb: str, arguments: dict[str, Any] | None, answer: Any) -> list[HandedKey]:
    """The claims or the batch that an answer hands over, by key; the caller must acknowledge them."""
    hands = HANDING.get(verb)
    return hands(arguments or {}, answer) if hands is not None else []


def giving_back(key: HandedKey) -> tuple[str, dict[str, Any]]:
    """The operation, verb and arguments, that gives back a claim or a batch."""
    if is_batch(key):
        return "nack", {"consumer": key[0], "batch": key[1]}
    return "decline", {"rollout_id": key[0], "attempt_id": key[1]}


def without(verb: str, answer: Any, lost: Iterable[HandedKey]) -> list[Any]:
    """What remains of an answer when these claims, or its batch, are lost; keys may be lists, as they travel."""
    gone = {(key[0], key[1]) for key in lost}
    if any(isinstance(number, int) for _, number in gone):
        return []
    return [claim for claim, key in zip(answer, handed_keys(verb, None, answer), strict=True) if key not in gone]


def with_time_left(arguments: dict[str, Any], elapsed: float) -> dict[str, Any]:
    """The arguments for repeating a call after so many seconds: its timeout is shorter by as much."""
    timeout = arguments.get("timeout")
    return arguments if not timeout else arguments | {"timeout": max(timeout - elapsed, 0.0)}


# -- notices -----------------------------------------------------------------------------------------------------------


class NoticeHandlers:
    """Those who listen for notices in this process, and the notices that they have not been told yet.

    Handlers are called one at a time and in the order of the notices, by whichever thread comes first, without a lock
    of the store. A handler may use the store; notices that it causes follow once it has returned.
    """

    def __init__(self) -> None:
        self._handlers: list[NoticeHandler] = []
        self._waiting: deque[Sequence[str]] = deque()
        self._is_telling = threading.Lock()

    def listen(self, handler: NoticeHandler) -> Callable[[], None]:
        """Call a handler for each notice from now on; returns a function that stops this."""
        self._handlers.append(handler)
        return lambda: self._handlers.remove(handler)

    def add(self, notices: Iterable[Sequence[str]]) -> None:
        """Take notices, without calling anybody yet."""
        self._waiting.extend(notices)

    def hand_out(self) -> None:
        """Call every handler for every notice that waits, unless another thread is doing so."""
        # That thread looks once more after it has released the lock, so that nothing is left.
        while self._waiting and self._is_telling.acquire(blocking=False):
            try:
                while self._waiting:
                    self._tell(self._waiting.popleft())
            finally:
                self._is_telling.release()

    def hand_out_elsewhere(self) -> None:
        """Do the same on another thread: a handler may wait for an answer that this thread would deliver."""
        if self._waiting:
            threading.Thread(target=self.hand_out, name="raystore-notices", daemon=True).start()

    def _tell(self, notice: Sequence[str]) -> None:
        for handler in list(self._handlers):
            try:
                handler(*notice)
            except Exception:  # of somebody else's code, which must not stop the session
                logger.exception("A handler of notices failed")
