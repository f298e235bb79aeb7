"""Progress of what takes long, drawn for the person who waits: how far, how fast, for how long still, what failed.

Only a driver draws, and only if its stderr is a terminal, so neither in a notebook nor in a Ray worker nor into a file;
`RAYSTORE_PROGRESS=0` forbids it there, too. What is over within a second is not drawn, and nothing is left when it is
over. What is drawn at the same time shares the picture. Nobody waits for the drawing, which never raises.
Not here: what is counted, and why it stands still.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any, Self

from raystore.reports.log import escaped

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

DELAY_SECONDS = 1.0  #: what is over by then is not drawn
RATE_SECONDS = 60.0  #: of which the rate is taken
PICTURES_A_SECOND = 4
BAR_COLUMNS = 24


class Progress:
    """How far one thing has come; use it with `with`, again and again if it goes on later.

    Args:
        what: that is waited for, as "rollouts".
        total: how many there will be; None: not known.
        is_wanted: draw nothing at all if not.

    Attributes:
        can_draw: whether a picture may be drawn, so that it is worth while to count.
    """

    def __init__(self, what: str, total: int | None = None, *, is_wanted: bool = True) -> None:
        self.can_draw: bool = is_wanted and can_draw()
        self._what = what
        self._total = total
        self._done = self._failed = 0
        self._note = ""
        self._since = monotonic()
        self._samples: deque[tuple[float, int]] = deque()  # time, and how many were done

    def update(self, done: int, *, failed: int = 0, total: int | None = None, note: str = "") -> None:
        """So many are done, of which so many failed; `note` is a line below. Costs nothing if nothing is drawn."""
        if not self.can_draw:
            return
        now = monotonic()
        self._done, self._failed, self._note = done, failed, note
        if total is not None:
            self._total = total
        if not self._samples or now - self._samples[-1][0] >= 0.5:
            self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[0][0] > RATE_SECONDS:
            self._samples.popleft()
        if now - self._since >= DELAY_SECONDS:
            _PICTURE.add(self)

    def __enter__(self) -> Self:
        self._since = monotonic()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.can_draw:
            _PICTURE.remove(self)

    # -- in words --------------------------------------------------------------------------------------------------

    @property
    def share(self) -> float | None:
        """How much is done, 0 to 1; None if it is not known how much there is."""
        return min(self._done / self._total, 1.0) if self._total else None

    @property
    def rate(self) -> float:
        """How many a second, of late."""
        if not self._samples:
            return 0.0
        since, before = self._samples[0]
        return (self._done - before) / max(monotonic() - since, 1e-3)

    def words(self) -> str:
        """How far it is, without the bar."""
        of = f"/{self._total:,}" if self._total else ""
        said = [f"{self._done:,}{of}"]
        if (rate := self.rate) > 0:
            said.append(f"{rate:.1f}/s" if rate >= 1 else f"{rate * 60:.1f}/min")
            if self._total:
                said.append(f"ETA {_clock((self._total - self._done) / rate)}")
        if self._failed:
            said.append(f"{self._failed:,} failed")
        return f"{escaped(self._what)}  {'  '.join(said)}"

    def note(self) -> str:
        """The line below; empty if there is none."""
        return escaped(self._note).replace("\n", " ")


def _clock(seconds: float) -> str:
    """A duration as a clock shows it."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def can_draw() -> bool:
    """Whether this process may draw: a driver whose stderr is a terminal."""
    if os.environ.get("RAYSTORE_PROGRESS") == "0" or os.environ.get("TERM") == "dumb":
        return False
    try:
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # it is closed
        return False
    return is_terminal and not _is_ray_worker()


def _is_ray_worker() -> bool:
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    return bool(getattr(ray.get_runtime_context().worker, "mode", None) == ray.WORKER_MODE)


# -- drawing -----------------------------------------------------------------------------------------------------------


class _Picture:
    """Everything that is drawn now, on one display."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._drawn: list[Progress] = []
        self._live: Live | None = None

    def add(self, progress: Progress) -> None:
        """Draw this as well."""
        with self._lock:
            if progress in self._drawn:
                return
            self._drawn.append(progress)
            if self._live is None:
                self._live = _start(self)

    def remove(self, progress: Progress) -> None:
        """Draw this no longer; takes the picture away with the last."""
        with self._lock:
            if progress not in self._drawn:
                return
            self._drawn.remove(progress)
            if self._drawn or self._live is None:
                return
            live, self._live = self._live, None
        live.stop()

    def forget(self) -> None:
        """Draw nothing any longer: in a forked process, whose lock may be locked for ever."""
        self._lock, self._drawn, self._live = threading.Lock(), [], None

    def drawn(self) -> Group:
        """The picture of this moment."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        lines: list[Any] = []
        for progress in list(self._drawn):
            share = progress.share
            bar = ProgressBar(100.0, 100.0 * (share or 0.0), width=BAR_COLUMNS, pulse=share is None)
            row = Table.grid(padding=(0, 1))
            row.add_row(bar, Text(progress.words(), no_wrap=True, overflow="ellipsis"))
            lines.append(row)
            if note := progress.note():
                lines.append(Text(note, style="yellow", no_wrap=True, overflow="ellipsis"))
        return Group(*lines)


def _start(picture: _Picture) -> Live | None:
    """Begin to draw; None if that fails, since nobody may suffer from it."""
    try:
        from rich.console import Console
        from rich.live import Live

        live = Live(
            get_renderable=picture.drawn, console=Console(stderr=True), transient=True,
            refresh_per_second=PICTURES_A_SECOND,
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # what goes into a file goes on doing so
        )  # fmt: skip
        live.start()
    except Exception:  # whatever the terminal, or another live display of the program, makes of it
        return None
    return live


_PICTURE = _Picture()
os.register_at_fork(after_in_child=_PICTURE.forget)
