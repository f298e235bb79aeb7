"""The program: which commands there are, in which file each is, and how it ends.

A command's file is imported when the command runs: `raystore --help` needs neither Ray nor rich nor pydantic. Whatever
goes wrong by a user's mistake, or since a store is gone, is one line on stderr.
Not here: what a command does (its file), what all reading commands share (`reading`).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

import click

from raystore import __version__
from raystore.cli.endings import GONE, INTERRUPTED, WRONG_USE, NoStore, WrongUse
from raystore.errors import InvalidValueError, RolloutNotFoundError, StoreError
from raystore.errors.text import meant

#: Of each family of commands: name, the module that has a function or command of that name, purpose.
FAMILIES: dict[str, list[tuple[str, str, str]]] = {
    "Stores": [
        ("status", "stores", "One page on a store: rollouts, queues, consumers, memory, journal."),
        ("list", "stores", "The stores that run on a cluster."),
        ("start", "stores", "Start a store; without a cluster also Ray, until Ctrl+C."),
        ("stop", "stores", "End a store, whoever started it."),
        ("demo", "demo", "Learn a prompt on a local Ray, as an example of a whole run."),
    ],
    "What a store holds": [
        ("rollouts", "rollouts", "The rollouts that match, one line each."),
        ("groups", "groups", "The groups that match, one line each."),
        ("consumers", "consumers", "The consumers, and what a rewind would undo."),
        ("workers", "workers", "The runners, what each works on, and since when."),
        ("resources", "resources", "Resources, their versions, and what changed between two."),
    ],
    "Why it is so": [
        ("top", "top", "A live page on a store: rates, rewards, consumers, and what each runner does."),
        ("why", "why", "What holds a run up, or one rollout, group or consumer."),
        ("doctor", "why", "What looks wrong, each with its remedy."),
        ("show", "show", "All of one rollout: attempts, story, spans, conversation, reward."),
        ("errors", "errors", "What failed: the policy's doing and the infrastructure's apart."),
        ("limits", "limits", "Who limited whom in the last hour: trainer, runners, journal, store."),
        ("slow", "slow", "What takes longest, and in which span the time goes."),
        ("tail", "tail", "Changes, as they happen."),
    ],
    "How training goes": [
        ("curve", "curve", "The mean reward of finished rollouts, by policy version or over time."),
        ("report", "report", "What a consumer trained on, what was thrown away, and whether that is biased."),
        ("evaluations", "evaluations", "What was measured beside training: means and pass@k, step by step."),
        ("diff", "diff", "What changed between two steps of a consumer, or between two runs."),
        ("watch", "watch", "Wait until a run goes wrong, and say so by the exit code."),
    ],
    "Out of the store": [
        ("export", "exports.command", "Rollouts and spans for other programs."),
    ],
}  # fmt: skip
_MODULES = {name: module for family in FAMILIES.values() for name, module, _ in family}

EPILOG = """\b
A store is found as Ray finds its cluster: --address, RAY_ADDRESS, the one that runs on this machine; then --name or
RAYSTORE_NAME, --namespace or RAYSTORE_NAMESPACE. With --journal DIR a run is read from its journal, without Ray.
\b
Exit codes: 0 fine; 1 bad news (a failed check); 2 wrong use; 3 no store, or one that cannot be read; 130 Ctrl+C.
"""


class Program(click.Group):
    """The group of all commands; each is imported when it is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_MODULES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _MODULES:
            return None
        module = import_module(f"raystore.cli.{_MODULES[name]}")
        found = getattr(module, f"{name}_", None) or getattr(module, name)
        assert isinstance(found, click.Command)
        return found

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        name = args[0]
        if name not in _MODULES and not name.startswith("-"):
            raise WrongUse(f"no command {name!r}{meant(name, _MODULES)}; raystore --help lists them")
        return super().resolve_command(context, args)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        for family, commands in FAMILIES.items():
            with formatter.section(family):
                formatter.write_dl([(name, purpose) for name, _, purpose in commands])

    def invoke(self, context: click.Context) -> Any:
        try:
            with _remarks():
                super().invoke(context)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read the output has enough
            _forget_output()

    def main(  # type: ignore[override]  # it always ends the process
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run, and exit with the code that says how it went."""
        extra["standalone_mode"] = False
        try:
            code = super().main(args, prog_name, **extra)
        except (KeyboardInterrupt, click.Abort):
            code = INTERRUPTED
        except click.ClickException as error:
            _say(_one_line(error))
            code = error.exit_code
        except ModuleNotFoundError as error:  # of an extra, as `export` needs for Parquet
            if (error.name or "").startswith("raystore"):
                raise
            _say(f"this needs the package {error.name!r}, which is not installed here: pip install {error.name}")
            code = WRONG_USE
        except (InvalidValueError, RolloutNotFoundError) as error:
            _say(str(error))
            code = WRONG_USE
        except StoreError as error:
            _say(str(error))
            code = GONE
        sys.exit(code if isinstance(code, int) else 0)


class _Remarks(logging.Handler):
    """Says what raystore logs as errors are said: one line on stderr, cleaned."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(record.getMessage(), record.levelname.lower())


@contextmanager
def _remarks() -> Iterator[None]:
    """Show warnings of raystore within the block."""
    logger, handler = logging.getLogger("raystore"), _Remarks(logging.WARNING)
    logger.addHandler(handler)
    logger.propagate, propagated = False, logger.propagate
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


def _one_line(error: click.ClickException) -> str:
    if isinstance(error, (WrongUse, NoStore)):
        return error.message
    said = " ".join(error.format_message().split())
    if not isinstance(error, click.UsageError):
        return said
    path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx is not None else "raystore"
    return f"{said.rstrip('.')}. {path} --help shows how it is used"


def _say(text: str, kind: str = "error") -> None:
    """One line on stderr."""
    from raystore.cli.text import clean

    try:
        click.echo(f"{kind}: {clean(text)}", err=True)
    except BrokenPipeError:
        _forget_output()


def _forget_output() -> None:
    """Have the interpreter's last flush go nowhere, where it cannot fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())


@click.group(
    name="raystore",
    cls=Program, epilog=EPILOG, no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)  # fmt: skip
@click.version_option(__version__, message="%(prog)s %(version)s")
def program() -> None:
    """See a raystore: what a run does, why it does not go on, and what becomes of the reward.

    Each command has --help with an example; those that read have --json.
    """
