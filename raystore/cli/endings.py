"""How a command ends: exit codes, and the mistakes that are told in one line."""

from __future__ import annotations

import click

BAD_NEWS = 1  #: what was asked for is there, and it is bad
WRONG_USE = 2
GONE = 3  #: there is no store, or it cannot be read
INTERRUPTED = 130  #: Ctrl+C, as shells count it


class WrongUse(click.ClickException):
    """What the user wrote cannot be done; nothing was changed."""

    exit_code = WRONG_USE


class NoStore(click.ClickException):
    """There is no store to read; the message says what there is."""

    exit_code = GONE
