"""Finding a store and asking it who it is.

Not here: starting and ending stores (`cluster`).
"""

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
from raystore.types import StoreInfo

CLIENT = (PROTOCOL, f"raystore {__version__}")  #: what this side of a session is

logger: logging.Logger = logging.getLogger("raystore")

HANDSHAKE_SECONDS = 60.0  #: for a store to answer for the first time
STANDSTILL_SECONDS = 60.0  #: for one that reads its journal to come on in it
HANDSHAKE_RETRY_SECONDS = 0.2
TOLD_SECONDS = 10.0  #: between two lines of the log on a store that reads its journal


def describe(handle: Any, *, waits: bool = True) -> dict[str, Any]:
    """Ask an actor who it is; raises if it is no store, does not answer, or speaks another protocol.

    One that reads its journal is waited for as long as it comes on, unless `waits` is False.
    """
    check_connection()
    if not isinstance(handle, ray.actor.ActorHandle):
        raise NotAStoreError(f"{handle!r} (a {type(handle).__name__})")
    if not is_store(handle):
        raise NotAStoreError(f"The actor {handle!r}")
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    steps, came_on, told_at = -1, 0.0, time.monotonic()
    try:
        while True:
            try:
                known = handle.describe.remote().future().result(timeout=max(deadline - time.monotonic(), 0))
            except ray.exceptions.ActorUnavailableError:  # it may be there in a moment, and asking again is harmless
                time.sleep(HANDSHAKE_RETRY_SECONDS)
                continue
            if not isinstance(known, dict) or known.get("reading") is None:
                break
            now, (count, where) = time.monotonic(), known["reading"]
            deadline = now + HANDSHAKE_SECONDS
            if count != steps:
                steps, came_on = count, now
            elif now - came_on > STANDSTILL_SECONDS:
                why = f"it has not come on in its journal for {STANDSTILL_SECONDS:g} s, {where}. Its log says more"
                raise StoreUnavailableError(known["name"], why)
            if not waits:
                raise StoreUnavailableError(known["name"], f"it reads its journal, {where}")
            if now > told_at + TOLD_SECONDS:
                told_at = now
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


def store_info(known: dict[str, Any]) -> StoreInfo:
    names = ("store_id", "name", "namespace", "epoch", "protocol", "node", "limits", "endpoints")
    capabilities = {"thread_safe": True, "async_safe": True, "zero_copy": False, "otlp_traces": False}
    return StoreInfo(**{name: known[name] for name in names}, capabilities=capabilities)


def join_cluster(address: str | None) -> None:
    """Connect this process to Ray, if it is not; raises where a store could not be used then."""
    if not ray.is_initialized():
        asked = address or os.environ.get("RAY_ADDRESS", "")
        if asked.startswith("ray://"):
            raise RayClientError(asked)
        ray.init(address=address)
    check_connection()


def check_connection() -> None:
    """Raise if this process's connection to Ray is one that no store can use: inherited by a fork, or Ray Client."""
    if forks.ray_is_inherited():
        raise ForkedError("Ray")
    if ray.util.client.ray.is_connected():
        raise RayClientError("ray://")


def join_cluster_of(store: str, address: str | None) -> None:
    """Connect to the cluster in which a store was, unless this process is connected, or RAY_ADDRESS names another."""
    if ray.is_initialized() or address is None or os.environ.get("RAY_ADDRESS", "local") != "local":
        join_cluster(None)
        return
    try:
        join_cluster(address)
    except ConnectionError as error:
        raise StoreUnavailableError(store, f"its cluster at {address} cannot be reached from here: {error}") from None


def find_actor(name: str, namespace: str) -> Any:
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:  # Ray's way to say that there is no such actor
        return None


def ray_connection() -> tuple[str, str] | None:
    """What Ray is in this process: its cluster and our id there; None when it is not initialized."""
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return context.gcs_address, context.get_worker_id()
