"""Which store a command means, and how it is reached: a running one on Ray, or a journal.

Ray's order: --address, RAY_ADDRESS, the cluster that runs on this machine. No command that reads ever starts one: a
cluster is looked for before Ray is imported, so that a mistake is told at once. RAY_ADDRESS=local, by which Ray would
start one, names none.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from raystore.cli.endings import GONE, NoStore, WrongUse
from raystore.errors import StoreError, StoreNotFoundError
from raystore.errors.text import meant, quoted

NAMESPACE = "raystore"
ANSWER_SECONDS = 3.0  #: for the port of a cluster to answer
CONNECT_SECONDS = 30.0  #: for Ray to connect; it takes one or two
TOKEN = Path.home() / ".ray" / "auth_token"  #: where Ray keeps the token of this user's clusters
_TO_START = "start a store with `raystore start`, or read a finished run with --journal DIR"


@dataclass(frozen=True)
class Where:
    """What a user says of the store; None where nothing is said."""

    name: str | None = None
    namespace: str = NAMESPACE
    address: str | None = None
    journal: Path | None = None


@contextmanager
def opened(where: Where) -> Iterator[Any]:
    """The store, closed afterwards. Raises `NoStore`, which says what there is."""
    store = _recovered(where.journal) if where.journal is not None else _connected(where)
    try:
        yield store
    finally:
        store.close()


def _recovered(path: Path) -> Any:
    from raystore.client.local import recover

    if not path.exists():
        raise NoStore(f"there is no directory {str(path)!r}; --journal takes what the run had as journal=")
    with _telling(f"Reading the journal {path} ..."):
        try:
            return recover(path)
        except (StoreError, OSError) as error:
            raise NoStore(f"{path} cannot be read as a journal: {error}") from None


def _connected(where: Where) -> Any:
    join(where.address)
    from raystore.remote.store import connect

    try:
        with _telling("Asking the store ..."):
            return connect(where.name, namespace=where.namespace)
    except StoreError as error:
        raise _missing(where, error) from None


def _missing(where: Where, why: StoreError) -> click.ClickException:
    """The error for a store that cannot be had, which says what there is."""
    if not isinstance(why, StoreNotFoundError):  # it is there, and does not answer, or is of another kind or version
        return NoStore(str(why))
    from raystore.remote.store import list_stores

    there = list_stores(namespace=None)
    here = [info.name for info in there if info.namespace == where.namespace and info.name]
    if where.name is None and len(here) > 1:
        return WrongUse(f"several stores run in namespace {where.namespace!r}: {quoted(here)}; say --name {here[0]}")
    wanted = f"store {where.name!r}" if where.name else "store"
    if not there:
        return NoStore(f"no {wanted} on this cluster, and no other; {_TO_START}")
    others = ", ".join(f"{info.name} in namespace {info.namespace}" for info in there)
    hint = meant(where.name, here)
    return NoStore(
        f"no {wanted} in namespace {where.namespace!r}{hint}; there are: {others}. Say --name and --namespace"
    )


def end(where: Where) -> None:
    """End a store on Ray. Raises `NoStore`."""
    join(where.address)
    from raystore.remote.store import stop

    assert where.name is not None
    try:
        stop(where.name, namespace=where.namespace)
    except StoreError as error:
        raise _missing(where, error) from None


def join(address: str | None, *, may_start: bool = False) -> None:
    """Connect this process to a cluster; `may_start`: where none is found, start one. Raises `NoStore`."""
    loaded: Any = sys.modules.get("ray")
    if loaded is not None and loaded.is_initialized():
        return
    found = cluster(address, may_start=may_start)
    if found is not None:
        _knock(found)
    if found is not None and "RAY_AUTH_MODE" not in os.environ and TOKEN.exists() and found in _running_here():
        os.environ["RAY_AUTH_MODE"] = "token"  # as Ray does for a cluster that it finds itself, and for no other
    with _telling("Starting Ray ..." if found is None else f"Connecting to Ray at {found} ..."), _bounded(found):
        import ray

        kept = os.environ.pop("RAY_ADDRESS", None)  # "local" would start one
        try:
            ray.init(address=found or "local", logging_level="error", log_to_driver=False, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            why = str(error).strip().splitlines()[0].rstrip(".")
            raise NoStore(f"Ray at {found} cannot be used: {why}. Newer Rays want RAY_AUTH_MODE=token") from None
        finally:
            if kept is not None:
                os.environ["RAY_ADDRESS"] = kept


@contextmanager
def _bounded(address: str | None) -> Iterator[None]:
    """End this process if it is not connected in time: Ray tries for ever if a cluster ends meanwhile."""

    def give_up() -> None:
        why = "it may be ending, or want a token, which Ray sends where RAY_AUTH_MODE=token is set"
        click.echo(f"error: Ray at {address} did not let us in within {CONNECT_SECONDS:g} s; {why}", err=True)
        os._exit(GONE)  # the main thread is within Ray, and no exception reaches it there

    if address is None:
        yield
        return
    timer = threading.Timer(CONNECT_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def cluster(address: str | None, *, may_start: bool = False) -> str | None:
    """The address of the cluster that is meant; None if there is none, and one may be started. Raises `NoStore`."""
    asked = address or os.environ.get("RAY_ADDRESS") or "auto"
    if asked.startswith("ray://"):
        raise WrongUse(f"address {asked!r} is that of Ray Client, which no store can be used through; say host:port")
    if asked not in ("auto", "local"):
        return asked
    if may_start and asked == "local":
        return None
    running = _running_here()
    if not running:
        if may_start:
            return None
        raise NoStore(f"no Ray cluster runs on this machine; say --address HOST:PORT (or RAY_ADDRESS), {_TO_START}")
    if len(running) > 1 and (last := _last_started()) in running:
        return last
    if len(running) > 1:
        raise WrongUse(f"several Ray clusters run on this machine: {', '.join(running)}; say --address {running[0]}")
    return running[0]


def _running_here() -> list[str]:
    """Addresses of the clusters of which a node runs on this machine, as the nodes' own command lines say."""
    import psutil

    found = set()
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] != "raylet":
            continue
        for argument in process.info["cmdline"] or ():
            if argument.startswith(("--gcs-address=", "--gcs_address=")):
                found.add(argument.partition("=")[2])
    return sorted(found)


def _last_started() -> str | None:
    """The address of the cluster that Ray has written down as the last one that was started here."""
    try:
        return (Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster").read_text().strip()
    except OSError:
        return None


def _knock(address: str) -> None:
    """Refuse an address at which nothing listens, which Ray would try for a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise WrongUse(f"address {address!r} is not of the form HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise NoStore(f"no Ray cluster answers at {address} ({error.strerror or error}); it may have ended") from None


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Say on a terminal what is waited for, and take it away afterwards."""
    if not sys.stderr.isatty():
        yield
        return
    click.echo(what, nl=False, err=True)
    try:
        yield
    finally:
        click.echo("\r" + " " * len(what) + "\r", nl=False, err=True)
