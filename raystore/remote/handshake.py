"""Connects this process to Ray, finds the actor of a store, and asks it for its description."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import ray

from raystore import __version__
from raystore.client import forks
from raystore.errors import (
    ForkedError,
    NotAStoreError,
    ProtocolMismatchError,
    RayClientError,
    StoreUnavailableError,
    from_record,
)
from raystore.service.service import PROTOCOL

CLIENT = (PROTOCOL, f"raystore {__version__}")  #: protocol and version of this side of a session

logger: logging.Logger = logging.getLogger("raystore")

HANDSHAKE_SECONDS = 60.0  #: to wait for the first answer of a store
STANDSTILL_SECONDS = 60.0  #: to wait for a store that makes no progress with reading its journal
HANDSHAKE_RETRY_SECONDS = 0.2
LOG_SECONDS = 10.0  #: between two log lines about a store that reads its journal


def describe(handle: Any, *, waits: bool = True) -> dict[str, Any]:
    """Ask an actor for its description. If `waits`, wait for a store that makes progress with reading its journal.

    Raises `NotAStoreError`, `ProtocolMismatchError`, `StoreUnavailableError` if it does not answer, and the error with
    which it could not start.
    """
    check_connection()
    if not isinstance(handle, ray.actor.ActorHandle):
        raise NotAStoreError(f"{handle!r} (a {type(handle).__name__})")
    if not is_store(handle):
        raise NotAStoreError(f"The actor {handle!r}")
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    steps, progressed_at, logged_at = -1, 0.0, time.monotonic()
    try:
        while True:
            try:
                known = handle.describe.remote().future().result(timeout=max(deadline - time.monotonic(), 0))
            except ray.exceptions.ActorUnavailableError:  # it may be back in a moment, and asking again is harmless
                time.sleep(HANDSHAKE_RETRY_SECONDS)
                continue
            if not isinstance(known, dict) or known.get("reading") is None:
                break
            now, (count, where) = time.monotonic(), known["reading"]
            deadline = now + HANDSHAKE_SECONDS
            if count != steps:
                steps, progressed_at = count, now
            elif now - progressed_at > STANDSTILL_SECONDS:
                why = f"it has not come on in its journal for {STANDSTILL_SECONDS:g} s, {where}. Its log says more"
                raise StoreUnavailableError(known["name"], why)
            if not waits:
                raise StoreUnavailableError(known["name"], f"it reads its journal, {where}")
            if now > logged_at + LOG_SECONDS:
                logged_at = now
                logger.info("Waiting for store %r, which reads its journal: %s", known["name"], where)
            time.sleep(HANDSHAKE_RETRY_SECONDS)
    except ray.exceptions.ActorDiedError as error:
        raise StoreUnavailableError(repr(handle), f"its actor has died. {_cause(error)}") from None
    except TimeoutError:
        raise StoreUnavailableError(repr(handle), f"no answer within {HANDSHAKE_SECONDS:g} s") from None
    if not isinstance(known, dict) or known.get("kind") != "raystore":
        raise NotAStoreError(f"The actor {handle!r}")
    if known.get("refusal") is not None:
        raise from_record(*known["refusal"])
    if known["protocol"] != PROTOCOL:
        theirs = f"raystore {known['version']}, protocol {known['protocol']}"
        raise ProtocolMismatchError(f"{CLIENT[1]}, protocol {PROTOCOL}", theirs)
    return known


def is_store(handle: Any) -> bool:
    """Whether an actor has the methods of a store."""
    return all(hasattr(handle, method) for method in ("describe", "exchange", "listen"))


def _cause(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def join_cluster(address: str | None) -> None:
    """Connect this process to Ray if it is not. Raises `RayClientError` and `ForkedError`: no store can be used."""
    if not ray.is_initialized():
        asked = address or os.environ.get("RAY_ADDRESS", "")
        if asked.startswith("ray://"):
            raise RayClientError(asked)
        ray.init(address=address)
    check_connection()


def check_connection() -> None:
    """Raise if no store can use this process's connection to Ray: it was inherited by a fork, or is Ray Client."""
    if forks.ray_is_inherited():
        raise ForkedError("Ray")
    if ray.util.client.ray.is_connected():
        raise RayClientError("ray://")


def join_cluster_of(store: str, address: str | None) -> None:
    """Connect to the cluster of a store, unless this process is connected or RAY_ADDRESS names a cluster."""
    if ray.is_initialized() or address is None or os.environ.get("RAY_ADDRESS", "local") != "local":
        join_cluster(None)
        return
    try:
        join_cluster(address)
    except ConnectionError as error:
        raise StoreUnavailableError(store, f"its cluster at {address} cannot be reached from here: {error}") from None


def find_actor(name: str, namespace: str) -> Any:
    """The handle of a named actor, None if there is none."""
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:  # Ray's way to say that there is no such actor
        return None
