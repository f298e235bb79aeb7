"""Values as text, tables that fit, and pictures."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

import raystore as rs
from raystore.cli.drawing import Column, Screen, bar
from raystore.cli.plainly import as_json
from raystore.cli.reading import Tag
from raystore.cli.show import tree, walk
from raystore.cli.text import clean, clean_lines, counted, duration, last_line, place_of, share, size, sparkline
from raystore.reports import svg
from tests.cli.commands import COLOURS, here, piped
from tests.cli.small_run import TRACEBACK
from tests.helpers import make_span, present
from tests.terminals import Terminal


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain äöü 汉字 🙂", "plain äöü 汉字 🙂"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x9b31m C1", r"\x9b31m C1"),
        ("a\nb\r\tc\x00\x7f", r"a\nb\r\tc\x00\x7f"),
        ("\u202eturned\u2066", r"\u202eturned\u2066"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("half \ud83d", r"half \ud83d"),
        ("\u2028line", r"\u2028line"),
        ("\U000e0041tag", r"\ue0041tag"),
        (b"bytes", "b'bytes'"),
    ],
)
def test_what_a_terminal_may_act_upon_becomes_visible(text: Any, shown: str) -> None:
    """And all else stays as it is."""
    assert clean(text) == shown


def test_a_long_text_is_cut_before_it_is_cleaned() -> None:
    """Ten megabytes of escapes cost nothing."""
    begun = time.perf_counter()
    assert clean("\x1b" * 10_000_000, 3) == r"\x1b\x1b\x1b… (10000000 characters)"
    assert clean_lines("a\r\n\tb\x07\n" + "x" * 10_000_000, 10) == ["a", r"    b\x07", "xxx… (10000007 characters)"]
    assert time.perf_counter() - begun < 0.5


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0123, "12 ms"), (0.9999, "1.0 s"), (9.96, "10 s"), (3.44, "3.4 s"), (59.4, "59 s"), (59.6, "1 min 00 s"),
        (320, "5 min 20 s"), (7500, "2 h 05 min"), (273_600, "3 d 4 h"), (-2, "-2.0 s"), (None, ""),
    ],
)  # fmt: skip
def test_durations(seconds: float | None, shown: str) -> None:
    """In the unit that suits them."""
    assert duration(seconds) == shown


def test_figures() -> None:
    """Sizes, shares, counts, the end of a traceback."""
    assert [size(n) for n in (0, 999, 1500, 123_456, 2_500_000_000)] == ["0 B", "999 B", "1.5 kB", "123 kB", "2.5 GB"]
    assert [share(1, 4), share(0, 4), share(1, 1000), share(1, 0)] == ["25%", "0%", "below 1%", ""]
    assert [counted(1, "process", "processes"), counted(2000, "span")] == ["1 process", "2,000 spans"]
    assert last_line(TRACEBACK).startswith("ValueError: invalid literal")
    assert place_of(TRACEBACK) == "agents/parsing.py:12 in parse"
    assert last_line(None) == place_of("no traceback") == ""


def test_sparklines_and_bars() -> None:
    """Of few and of many values; a bar is never without a mark."""
    assert sparkline([0, 1]) == "▁█" and sparkline([]) == "" and sparkline([2, 2]) == "▁▁"
    assert len(sparkline(list(range(1000)), 40)) == 40
    assert bar(0, 1, 10) == "█" * 10 and bar(0.5, 0.5, 10) == "     █" and bar(1, 1, 10) == " " * 9 + "█"


def test_json_has_no_control_characters() -> None:
    """What JSON has not is text; a secret is hidden."""
    llm = rs.ProxyLLM(endpoint="http://e", model="m", api_key="sk-1")
    written = as_json({"x": float("nan"), "b": b"123", "s": "\x1b\u202e", "llm": llm, "o": object})
    assert written.isascii() and "\x1b" not in written and "sk-1" not in written
    assert '"x": "nan"' in written and '"b": {"bytes": 3}' in written and '"endpoint": "http://e"' in written


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_table_fits_its_terminal(width: int) -> None:
    """Columns go by their rank; those of rank 0 stay, and go on in the next row if they must."""
    terminal = Terminal(width)
    columns = [Column("id"), Column("much", 1, least=10), Column("more", 2), Column("count", 3, right=True)]
    rows: list[list[Any]] = [["rollout-0123456789", "word " * 10, "汉字" * 10, 7], ["rollout-1", None, None, 8]]
    Screen(terminal.stream).table(columns, rows)
    terminal.close()
    lines = COLOURS.sub("", terminal.text).splitlines()
    assert max(cell_len(line.rstrip()) for line in lines) <= width
    assert "rollout-0123456789" in terminal.text
    assert ("count" in terminal.text) == (width >= 80)


def test_a_column_in_which_nothing_stands_is_left_out() -> None:
    """Also in a pipe, where all others are."""
    file = io.StringIO()
    rows: list[list[Any]] = [["1", "", "x" * 300], ["2", None, ""]]
    Screen(file).table([Column("a"), Column("b", 1), Column("c", 9)], rows)
    assert file.getvalue().split() == ["a", "c", "1", "x" * 300, "2"]


def test_a_circle_of_spans_is_shown_once() -> None:
    """Parents that enclose each other, and one that does not exist, are roots."""
    with rs.InMemoryLightningStore() as store:
        claimed = store.sync.start_rollout("x")
    ids = {"a": "b", "b": "a", "c": "a", "d": "gone", "e": "e"}
    spans = [
        make_span(claimed, number, span_id=own, parent_id=above) for number, (own, above) in enumerate(ids.items())
    ]
    found = [(node.span.span_id, depth) for node, depth in walk(tree(spans))]
    assert sorted(name for name, _ in found) == list("abcde")


def test_time_of_a_span_without_those_in_it() -> None:
    """However these overlap, or reach out of it."""
    with rs.InMemoryLightningStore() as store:
        claimed = store.sync.start_rollout("x")
    times = [(0.0, 10.0, None), (1.0, 4.0, "s0"), (3.0, 5.0, "s0"), (9.0, 12.0, "s0")]
    spans = [
        make_span(claimed, number, span_id=f"s{number}", parent_id=above, start_time=start + 1e9, end_time=end + 1e9)
        for number, (start, end, above) in enumerate(times)
    ]
    assert tree(spans)[0].own_seconds() == pytest.approx(5.0)


def test_large_attributes_are_shown_briefly(tmp_path: Path) -> None:
    """Ten megabytes in a span, and in a message; JSON has all of them."""
    journal = tmp_path / "journal"
    with rs.InMemoryLightningStore(journal=str(journal)) as store:
        claimed = present(store.sync.start_rollout("x" * 1_000_000))
        attributes = {
            "gen_ai.operation.name": "chat", "blob": "y" * 10_000_000,
            "gen_ai.input.messages": [{"role": "user", "parts": [{"type": "text", "content": "z" * 1_000_000}]}],
        }  # fmt: skip
        store.sync.add_span(make_span(claimed, attributes=attributes))
    shown = here("show", claimed.rollout_id, "--journal", journal)
    assert shown.code == 0 and len(shown.out) < 20_000 and "(1000000 characters)" in shown.text
    assert len(piped("show", claimed.rollout_id, "--json", "--journal", journal).out) > 12_000_000


def test_a_span_that_cannot_be_read_is_a_warning_and_cleaned(tmp_path: Path) -> None:
    """One line beside what can be shown; what a user wrote comes through there no more than elsewhere."""
    journal = tmp_path / "journal"
    with rs.InMemoryLightningStore(journal=str(journal)) as store:
        claimed = present(store.sync.start_rollout("x"))
        attributes = {"gen_ai.operation.name": "chat", "prompt_token_ids": "\x1b[31mno numbers"}
        store.sync.add_span(make_span(claimed, attributes=attributes, name="\x1b]0;title\x07"))
    shown = here("show", claimed.rollout_id, "--journal", journal)
    assert shown.code == 0 and "\x1b" not in shown.err
    assert shown.err.startswith("warning: Passed over while model calls were read") and shown.err.count("\n") == 1


def test_the_picture_of_curves() -> None:
    """Round numbers at the axes, names escaped, also of one point and of none."""
    drawn = svg.draw({"a<b": [(0, 0.13), (7, 0.87)], "flat": [(3, 0.5)]}, title="t & u", below="step")
    assert "a&lt;b" in drawn and "t &amp; u" in drawn and drawn.count("<polyline") == 2
    for points in re.findall(r'points="([^"]*)"', drawn):
        for pair in points.split():
            x, y = map(float, pair.split(","))
            assert svg.LEFT <= x <= svg.RIGHT and svg.TOP <= y <= svg.BOTTOM
    assert svg.ticks(0.13, 0.87) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert svg.ticks(5, 5)[0] < 5 < svg.ticks(5, 5)[-1]
    assert "<svg" in svg.draw({}, title="", below="")


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("3", 3), ("-2.5", -2.5), ("1e3", 1000.0), ("true", True), ("007", "007"), ("1_000", "1_000"), ("nan", "nan"),
        ("NaN", "NaN"), ("-Infinity", "-Infinity"), ("1e999", "1e999"), ("null", "null"), ("[1]", "[1]"),
        ("True", "True"), ("", ""), ("a=b", "a=b"), ("9" * 400, int("9" * 400)),
    ],
)  # fmt: skip
def test_a_tag_is_a_number_only_if_it_is_written_as_one(given: str, value: object) -> None:
    found = Tag().convert(f"name={given}", None, None)
    assert found == ("name", value) and type(found[1]) is type(value)
