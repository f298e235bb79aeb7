"""`python -m benchmarks [--only 1,7] [--quick] [--long] [--json FILE]`: one table, and the same as JSON."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import ray

from benchmarks import against, bulk, durability, feeds, groups, ingest, latency, lifecycles, memory, scale, selection
from benchmarks.parties import close_idle, has_peers
from benchmarks.scope import Scope
from benchmarks.table import HEADER, Line, as_json, markdown

ROWS = (
    lifecycles.ROWS
    | ingest.ROWS
    | bulk.ROWS
    | latency.ROWS
    | scale.ROWS
    | memory.ROWS
    | durability.ROWS
    | against.ROWS
    | groups.ROWS
    | feeds.ROWS
    | selection.ROWS
)


def _commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip()


async def run(numbers: list[int], scope: Scope) -> list[Line]:
    """The lines of these rows."""
    lines: list[Line] = []
    for number in numbers:
        started = time.perf_counter()
        made = await ROWS[number](scope)
        for line in made:
            print(" | ".join(line.cells()), flush=True)
        print(f"   row {number}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        lines += made
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--only", help="rows, as in 1,7,13-15")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and less work: a look, not a result")
    parser.add_argument("--long", action="store_true", help="rows 19 and 23 in full")
    parser.add_argument("--json", type=Path, help="also write the lines with their samples here")
    options = parser.parse_args()
    numbers = sorted(ROWS)
    if options.only:
        spans = [part.split("-") for part in options.only.split(",")]
        numbers = [number for span in spans for number in range(int(span[0]), int(span[-1]) + 1)]
        if unknown := [number for number in numbers if number not in ROWS]:
            parser.error(f"--only names rows {unknown}; there are {sorted(ROWS)}")
    started, commit = time.time(), _commit()
    logging.getLogger("raystore").setLevel(logging.WARNING)
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        print(" | ".join(HEADER))
        lines = asyncio.run(run(numbers, Scope(quick=options.quick, long=options.long)))
    finally:
        close_idle()
        ray.shutdown()
    about = {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(started)),
        "minutes": round((time.time() - started) / 60, 1),
        "python": platform.python_version(),
        "ray": ray.__version__,
        "cores": os.cpu_count(),
        "peers": has_peers(),
    }
    print("\n" + markdown(lines))
    print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
    if options.json:
        options.json.write_text(as_json(lines, about))
    missed = [line for line in lines if line.met is False]
    print(f"{sum(line.met is True for line in lines)} of {len(lines)} goals met, {len(missed)} missed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
