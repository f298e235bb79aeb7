"""`raystore demo`: the first example, as `make demo` runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from raystore.cli.endings import WrongUse
from raystore.cli.reading import COUNT, command_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "01_prompt_bandit.py"


def _demo(runners: int, steps: int, seed: int) -> None:
    """Learn which prompt works best, on a Ray of its own on this machine; draws the reward curve.

    The example is part of the repository, not of the installed package.
    """
    if not EXAMPLE.exists():
        raise WrongUse(
            "the demo is an example of the repository, and this raystore is installed without it: clone the "
            "repository and run `make demo` there"
        )
    command = [sys.executable, str(EXAMPLE), "--runners", str(runners), "--steps", str(steps), "--seed", str(seed)]
    # A cluster that someone else runs on this machine is never joined by accident.
    environment = os.environ | {"RAY_ADDRESS": os.environ.get("RAY_ADDRESS", "local")}
    raise click.exceptions.Exit(subprocess.run(command, env=environment).returncode)


demo: click.Command = command_of(
    _demo,
    "raystore demo --steps 40 --seed 1",
    [
        click.Option(["--runners"], **COUNT, default=4, help="Runners of agents."),
        click.Option(["--steps"], **COUNT, default=20, help="Training steps."),
        click.Option(["--seed"], type=int, default=0, show_default=True, help="The same seed gives the same run."),
    ],
)
