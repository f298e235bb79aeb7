"""A screen: tables that fit it, headings, bars of time. All of it also without colours, and without a terminal.

On a terminal a table leaves out columns until it fits, those first that matter least; written to a file or a pipe it
has all of them. Texts are cleaned on their way in, so that nothing of a user's reaches the terminal as it is.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raystore.cli.text import clean

PIPED_WIDTH = 4000  #: of tables that no terminal shows
PIPED_PICTURE = 100  #: of pictures likewise
NARROWEST = 40

#: Styles of words that say how something stands.
_STYLES = {
    "succeeded": "green", "ok": "green", "complete": "green", "trained": "green",
    "failed": "red", "cancelled": "yellow", "timeout": "red", "unresponsive": "red", "agent_error": "red",
    "infra": "magenta", "runner_lost": "magenta", "running": "cyan", "preparing": "cyan", "busy": "cyan",
    "requeuing": "yellow", "stale": "yellow", "filtered": "yellow",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        rank: 0 for what a table never leaves out; the highest goes first.
        right: whether it holds figures.
        least: the width to which it may shrink, going on in the next row, before another column is left out; 0: none.
    """

    title: str
    rank: int = 0
    right: bool = False
    least: int = 0


class Screen:
    """Where a command writes."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file: TextIO = file or sys.stdout
        if hasattr(self.file, "reconfigure"):
            self.file.reconfigure(errors="replace")  # a terminal without Unicode shows what it can
        self.is_terminal: bool = self.file.isatty()
        self.is_plain: bool = not self.is_terminal or bool(os.environ.get("NO_COLOR")) or _is_dumb()
        self._console = Console(
            file=self.file, force_terminal=self.is_terminal, color_system=None if self.is_plain else "auto",
            no_color=self.is_plain, markup=False, highlight=False, emoji=False, soft_wrap=False,
            width=self.width if self.is_terminal else PIPED_WIDTH,
        )  # fmt: skip

    @property
    def width(self) -> int:
        """Columns of the terminal; of a picture where there is none."""
        if not self.is_terminal:
            return PIPED_PICTURE
        try:
            width = os.get_terminal_size(self.file.fileno()).columns
        except (OSError, ValueError, AttributeError):
            width = shutil.get_terminal_size().columns
        return max(width or 80, NARROWEST)

    def print(self, *lines: Text | str) -> None:
        """Write lines; a text that is too long for the screen goes on in the next row."""
        for line in lines:
            text = line if isinstance(line, Text) else Text(clean(line))
            if self.is_plain and not self.is_terminal:
                self.file.write(f"{text.plain.rstrip()}\n")
            else:
                self._console.print(text, overflow="fold")
        self.file.flush()

    @property
    def height(self) -> int:
        """Rows of the terminal."""
        return self._console.size.height

    def draw(self, picture: Any) -> None:
        """Write something that rich can draw, as wide as the screen."""
        if self.is_terminal:
            self._console.print(picture)
            return
        with self._console.capture() as captured:
            self._console.print(picture, width=self.width)
        self.file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())

    def live(self, picture: Any) -> Live:
        """A picture that takes the whole terminal, and is updated, while a block runs."""
        return Live(picture, console=self._console, screen=True, auto_refresh=False, transient=True)

    def heading(self, title: str, beside: str = "") -> None:
        """An empty line, and a title with what belongs to it."""
        self.print("", Text.assemble((clean(title), "bold"), ("  " + clean(beside) if beside else "", "dim")))

    def facts(self, pairs: Iterable[tuple[str, Any]]) -> None:
        """Names and what they stand for, one line each; without those that have nothing to say."""
        kept = [(name, text_of(value)) for name, value in pairs if value not in (None, "")]
        if not kept:
            return
        wide = max(cell_len(name) for name, _ in kept)
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=min(wide, self.width // 3), overflow="fold", style="dim")
        grid.add_column(overflow="fold")
        for name, value in kept:
            grid.add_row(name, value)
        self._write(grid)

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> None:
        """A table as wide as the screen at most; columns in which nothing stands are left out."""
        cells = [[text_of(value) for value in row] for row in rows]
        kept = [index for index, column in enumerate(columns) if not column.rank or any(row[index] for row in cells)]
        widths = {
            index: max(cell_len(columns[index].title), *(cell_len(row[index].plain) for row in cells), 0)
            for index in kept
        }

        def least(index: int) -> int:
            return min(widths[index], columns[index].least or widths[index])

        while self.is_terminal and sum(least(i) + 2 for i in kept) - 2 > self.width:
            index = max(kept, key=lambda i: (columns[i].rank, i))
            if not columns[index].rank:
                break
            kept.remove(index)
        fits = sum(least(i) + 2 for i in kept) - 2 <= self.width
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
        for index in kept:
            side = "right" if columns[index].right else "left"
            is_whole = fits and not columns[index].least
            table.add_column(columns[index].title, justify=side, overflow="fold", no_wrap=is_whole)  # type: ignore[arg-type]
        for row in cells:
            table.add_row(*(row[index] for index in kept))
        self._write(table)

    def _write(self, table: Table) -> None:
        if self.is_terminal:
            self._console.print(table)
        else:
            with self._console.capture() as captured:
                self._console.print(table)
            self.file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())
        self.file.flush()


def text_of(value: Any) -> Text:
    """A cell; words that say how something stands have a colour."""
    if isinstance(value, Text):
        return value
    if value is None:
        return Text()
    cleaned = clean(value, 400)
    return Text(cleaned, style=_STYLES.get(cleaned, ""))


def bar(start: float, end: float, width: int) -> str:
    """A bar within `width` cells, from one share of them to another, never without a mark."""
    first = min(max(int(start * width), 0), width - 1)
    last = min(max(round(end * width), first + 1), width)
    return " " * first + "█" * (last - first)


def _is_dumb() -> bool:
    return os.environ.get("TERM", "") == "dumb"
