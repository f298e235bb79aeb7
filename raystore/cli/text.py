"""Values as text for a terminal: without control characters, short, with units.

Whatever a user stored may hold escape sequences that move a cursor, or letters that turn a line around: all of them
become visible (`\\x1b`). Nothing here needs rich, so that errors can be told without it.
Not here: tables and pictures (`drawing`), JSON (`plainly`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from raystore.reports.words import counted as counted
from raystore.reports.words import figure as figure
from raystore.reports.words import share as share

#: What a terminal may act upon: control characters, marks of direction, what has no width, halves of characters.
_UNSHOWN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
MOST = 4000  #: characters of one value that are shown


def _visible(found: re.Match[str]) -> str:
    letter = found.group()
    code = ord(letter)
    return _SHORT.get(letter) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def clean(text: object, most: int = MOST) -> str:
    """A text as one line that is safe to show, cut behind `most` characters."""
    whole = str(text)
    cut = f"… ({len(whole)} characters)" if len(whole) > most else ""
    return _UNSHOWN.sub(_visible, whole[:most]) + cut


def clean_lines(text: object, most: int = MOST) -> list[str]:
    """The same for a text of several lines; tabs become spaces."""
    whole = str(text)
    lines = whole[:most].replace("\r\n", "\n").expandtabs(4).split("\n")
    lines = [_UNSHOWN.sub(_visible, line) for line in lines]
    if len(whole) > most:
        lines[-1] += f"… ({len(whole)} characters)"
    return lines


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them: 12 ms, 3.4 s, 5 min 20 s, 2 h 05 min, 3 d 4 h."""
    if seconds is None:
        return ""
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def size(count: float | None) -> str:
    """Bytes in the unit that suits them, by thousands."""
    if count is None:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def last_line(text: str | None) -> str:
    """What an error says in the end: the exception of a traceback."""
    lines = [line for line in (text or "").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


_PLACE = re.compile(r'^\s*File "(.+?)", line (\d+), in (.+)$')


def place_of(text: str | None) -> str:
    """The line of code in which an error was raised, `file.py:12 in name`, of its traceback; empty if it has none."""
    found = [match for line in (text or "").splitlines() if (match := _PLACE.match(line))]
    if not found:
        return ""
    path, number, name = found[-1].groups()
    return f"{'/'.join(path.split('/')[-2:])}:{number} in {name}"


def means(values: Sequence[float], count: int) -> list[float]:
    """So many means of values that follow each other, of which there are more."""
    edges = [round(number * len(values) / count) for number in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


_LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Values as a line of blocks, from their least to their largest; means of several if there is not enough room."""
    if not values:
        return ""
    if len(values) > width:
        values = means(values, width)
    least, most = min(values), max(values)
    span = (most - least) or 1.0
    return "".join(_LEVELS[min(int((value - least) / span * len(_LEVELS)), len(_LEVELS) - 1)] for value in values)
