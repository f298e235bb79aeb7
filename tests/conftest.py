"""What all tests share: stores of either kind, closed after each test; and where rows of the fault suite report."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

os.environ["RAY_ADDRESS"] = "local"  # a cluster that someone else runs here is never joined
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"

import raystore as rs
from raystore.reports import log
from tests.helpers import AnyStore

# A shell that runs tests in the background has Ctrl+C ignored, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

MakeMemoryStore = Callable[..., rs.InMemoryLightningStore]
MakeRayStore = Callable[..., rs.RayLightningStore]

IS_LONG = os.environ.get("FAULTS") == "long"
SLACK = 1 if IS_LONG else 5  #: of bounds on time, in the form that runs beside anything
RESULTS = Path(__file__).parent.parent / "runs" / "faults.jsonl"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that in the end nobody waits for one file."""
    items.sort(key=lambda item: not {"faults", "runners"} & {*item.path.parts})


@pytest.fixture(autouse=True)
def nothing_told() -> None:
    """Every test begins in a process that has been told nothing yet."""
    log.forget_told()


@pytest.fixture
def make_memory_store() -> Iterator[MakeMemoryStore]:
    """Makes stores in this process; checks their invariants and closes them after the test."""
    made: list[rs.InMemoryLightningStore] = []

    def make(**options: Any) -> rs.InMemoryLightningStore:
        made.append(rs.InMemoryLightningStore(**options))
        return made[-1]

    yield make
    _check_and_close(made)


def _check_and_close(stores: Sequence[AnyStore]) -> None:
    for store in stores:
        with contextlib.suppress(rs.StoreClosedError):  # the test closed it
            store.sync.check()
        store.close()


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One local Ray for all tests that need it."""
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def make_ray_store(cluster: None) -> Iterator[MakeRayStore]:
    """Makes stores on Ray; checks their invariants and ends them after the test."""
    made: list[rs.RayLightningStore] = []

    def make(start: MakeRayStore = rs.start, **options: Any) -> rs.RayLightningStore:
        made.append(start(**options))
        return made[-1]

    yield make
    _check_and_close(made)


@pytest.fixture
def amount() -> Callable[[int, int], int]:
    """So much in the short form, so much in `make faults`."""
    return lambda short, long: long if IS_LONG else short


@pytest.fixture
def report() -> Callable[..., None]:
    """Takes the figure of a row: prints it, adds a line to runs/faults.jsonl, and fails if it misses the bar."""
    started = time.time()
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)

    def take(row: int, what: str, *, figure: Any, bar: str, met: bool, seed: Any = None, did: str = "") -> None:
        line = {
            "row": row, "what": what, "figure": figure, "bar": bar, "met": met, "seed": seed, "did": did,
            "form": "long" if IS_LONG else "short", "seconds": round(time.time() - started, 1),
            "commit": found.stdout.strip(),
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(started)),
        }  # fmt: skip
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"row {row}, {what}: {figure} (bar: {bar}; {did}; seed {seed})")
        assert met, f"row {row}, {what}: {figure}, and the bar is {bar} ({did}; seed {seed})"

    return take
