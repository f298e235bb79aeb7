"""The log: what reaches stderr, once a minute and not a thousand times, and without what a terminal would obey."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

import raystore as rs
from raystore.reports import log
from tests.conftest import MakeMemoryStore, MakeRayStore
from tests.helpers import make_span, until
from tests.terminals import Terminal

LOGGER = log.logger_of("raystore.tests")


@pytest.fixture
def unconfigured() -> Iterator[logging.Logger]:
    """The logger "raystore", which gets its old configuration back."""
    logger = logging.getLogger("raystore")
    before = logger.handlers[:], logger.level, logger.propagate
    yield logger
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the loggers below "raystore" have let through."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("raystore")]


async def until_told(caplog: pytest.LogCaptureFixture, line: str) -> None:
    """Wait for a line."""

    async def is_told() -> bool:
        return line in told(caplog)

    await until(is_told)


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run a program of its own."""
    code = textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)


# -- without a word of the program -------------------------------------------------------------------------------------

FAILING = """
    import logging, raystore as rs
    def agent(task, ctx):
        raise ValueError("bad \\x1b[31mred\\r\\nERROR fake line")
    store = rs.InMemoryLightningStore()
    with rs.RunnerPool(store, agent, size=2):
        made = store.sync.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=i) for i in range(50)])
        done = store.sync.wait_for_rollouts(rollout_ids=[r.rollout_id for r in made])
    assert len(done) == 50
    logging.getLogger("raystore").info("not to be seen")
"""

CONFIGURING = """
    import logging, sys
    logging.basicConfig(level="INFO", stream=sys.stdout, format="%(name)s|%(message)s")
"""


def test_a_program_that_configures_nothing_sees_warnings_and_nothing_below() -> None:
    """On stderr, as one line, with the id in full and without control characters."""
    done = python(FAILING)
    assert done.stdout == "" and "not to be seen" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert re.search(r"The agent failed on rollout ro-[0-9a-f]+: ", line) and "\\x1b[31m" not in line
    assert "\x1b" not in done.stderr and "\r" not in done.stderr


def test_a_program_that_configures_logging_has_the_lines_where_it_wants_them() -> None:
    """The root logger is the program's, and gets what it asks for."""
    done = python(CONFIGURING + FAILING)
    assert done.stderr == "" and "raystore|not to be seen" in done.stdout
    assert done.stdout.count("raystore.runner|The agent failed") == 1


async def test_runners_and_stores_on_ray_tell_their_trouble_on_stderr(
    make_ray_store: MakeRayStore, tmp_path: Any
) -> None:
    """A runner's warning is one plain line of its process, without a handler of Ray's around it."""

    def agent(task: Any, ctx: rs.Context) -> list[str]:
        logger = logging.getLogger("raystore.runner")
        captured = io.StringIO()
        stderr, sys.stderr = sys.stderr, captured
        try:
            logger.warning("told \x1b[31m of %s", ctx.rollout.rollout_id)
            logger.info("not told")
        finally:
            sys.stderr = stderr
        (tmp_path / "told").write_text(captured.getvalue())
        return []

    store = make_ray_store()
    async with rs.RunnerPool(store, agent, size=1):
        rollout = await store.enqueue_rollout("x")
        await store.wait_for_rollout(rollout.rollout_id, timeout=60)
    assert (tmp_path / "told").read_text() == f"told \\x1b[31m of {rollout.rollout_id}\n"


# -- kinds of trouble --------------------------------------------------------------------------------------------------


def test_a_kind_of_trouble_is_told_once_a_minute_with_a_count(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first line at once, the next after a minute, which says how many there were in between."""
    now = 100.0
    monkeypatch.setattr(log, "monotonic", lambda: now)
    for number in range(1000):
        LOGGER.warning("Lost %d", number, extra=log.a_minute("lost"))
        LOGGER.warning("Other %d", number, extra=log.a_minute("other", number % 2))
    assert told(caplog) == ["Lost 0", "Other 0", "Other 1"]
    now += 61
    LOGGER.warning("Lost again", extra=log.a_minute("lost"))
    assert told(caplog)[3:] == ["Lost again (and 999 more like this since)"]
    LOGGER.warning("And again", extra=log.a_minute("lost"))
    assert len(told(caplog)) == 4


async def test_the_rest_is_told_when_the_trouble_is_over(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of lines that were left out comes after the minute, though no other line of the kind does."""
    monkeypatch.setattr(log, "MINUTE_SECONDS", 0.2)
    for number in range(4):
        LOGGER.error("Lost %d", number, extra=log.a_minute("lost"))
    await until_told(caplog, "Lost 3 (3 more like this since)")
    assert told(caplog) == ["Lost 0", "Lost 3 (3 more like this since)"]
    assert caplog.records[-1].levelname == "ERROR"
    LOGGER.error("Lost alone", extra=log.a_minute("alone"))
    LOGGER.error("Lost again", extra=log.a_minute("alone"))
    await until_told(caplog, "Lost again (once more)")


def test_once_is_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the process lives."""
    now = 100.0
    monkeypatch.setattr(log, "monotonic", lambda: now)
    for _ in range(3):
        LOGGER.warning("Advice", extra=log.once("advice"))
        now += 1e6
    assert told(caplog) == ["Advice"]


def test_kinds_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """Of many kinds the oldest is forgotten, so that memory is bounded."""
    for number in range(log.KINDS_KNOWN + 1):
        LOGGER.warning("Kind %d", number, extra=log.once("kind", number))
    LOGGER.warning("Kind %d", 5, extra=log.once("kind", 5))
    LOGGER.warning("Kind %d", 0, extra=log.once("kind", 0))
    assert len(told(caplog)) == log.KINDS_KNOWN + 2


async def test_a_thousand_duplicates_are_one_line(
    make_memory_store: MakeMemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A runner that sends everything twice does not fill the disk with its log."""
    store = make_memory_store()
    rollout = await store.start_rollout("x")
    spans = [make_span(rollout, number) for number in range(1000)]
    assert len(await store.add_many_spans(spans)) == 1000 and await store.add_many_spans(spans) == []
    assert [line for line in told(caplog) if "Duplicated span" in line] == [
        f"Duplicated span added: span {spans[0].span_id} of attempt {rollout.attempt.attempt_id} of rollout "
        f"{rollout.rollout_id} is stored already"
    ]


# -- text that is safe to show -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain, with ümlaut, 汉字 and 👩‍🔬", "plain, with ümlaut, 汉字 and 👩‍🔬"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("a\r\nb", "a\\r\n    b"),
        ("tab\there\x00", "tab\there\\x00"),
        ("\u202egnp.exe\u2028x", "\\u202egnp.exe\\u2028x"),
        ("half \ud800", "half \\ud800"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(given: str, shown: str) -> None:
    """And nothing else; a text of several lines cannot pretend to be several entries."""
    assert log.escaped(given) == shown
    shown.encode()  # can be written


def test_tracebacks_are_escaped_too(unconfigured: logging.Logger) -> None:
    """The text of an error, and what `str` gives of any value."""
    stream = io.StringIO()
    rs.setup_logging(stream=stream)
    try:
        raise ValueError("\x1b[2J\nCRITICAL fake")
    except ValueError as error:
        LOGGER.exception("Failed: %s", error)
    text = stream.getvalue()
    assert "\x1b" not in text and "\\x1b[2J" in text and "Traceback" in text
    assert not any(line.startswith("CRITICAL") for line in text.splitlines())


def test_a_value_without_a_text_is_no_trouble(unconfigured: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    """Logging says where that was, as ever, and nothing is raised."""

    class Odd:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    rs.setup_logging()
    LOGGER.warning("Odd: %s", Odd())
    assert "no text" in capsys.readouterr().err


# -- setup_logging -----------------------------------------------------------------------------------------------------


def test_setup_logging_writes_one_line_for_each_record(unconfigured: logging.Logger) -> None:
    """With time, level and logger; plain, and only once however often it is called."""
    stream = io.StringIO()
    root = logging.getLogger().handlers[:]
    for level in ("DEBUG", "warning", logging.INFO):
        rs.setup_logging(level, stream=stream)
    LOGGER.info("ready")
    LOGGER.debug("not told")
    logging.getLogger("elsewhere").warning("not ours")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO raystore\.tests: ready\n", stream.getvalue())
    assert logging.getLogger().handlers == root and len(unconfigured.handlers) == 1


def test_setup_logging_follows_stderr(unconfigured: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever it is at that moment."""
    rs.setup_logging()
    LOGGER.info("to stderr")
    found = capsys.readouterr()
    assert found.out == "" and found.err.endswith("INFO raystore.tests: to stderr\n")


@pytest.mark.parametrize("no_color", [False, True])
def test_colours_are_for_terminals(
    unconfigured: logging.Logger, monkeypatch: pytest.MonkeyPatch, no_color: bool
) -> None:
    """And not with NO_COLOR."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
    with Terminal() as terminal:
        rs.setup_logging(stream=terminal.stream)
        LOGGER.error("red")
    text = terminal.text
    assert text.endswith("raystore.tests: red\n") and ("\x1b[31mERROR\x1b[0m" in text) is not no_color


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"level": "INFOO"}, "'INFOO'.*DEBUG, INFO, WARNING, ERROR or CRITICAL.*did you mean 'INFO'"),
        ({"level": None}, "level"),
        ({"level": True}, "level"),
        ({"level": -1}, "level"),
        ({"stream": "err.log"}, "stream='err.log'.*an open text file"),
    ],
)
def test_wrong_arguments_change_nothing(unconfigured: logging.Logger, given: dict[str, Any], said: str) -> None:
    """One clear error."""
    before = unconfigured.handlers[:]
    with pytest.raises(rs.InvalidValueError, match=said):
        rs.setup_logging(**given)
    assert unconfigured.handlers == before


def test_a_line_that_a_garbage_collection_logs_stops_nothing() -> None:
    """Also in the midst of another one, and in the thread that tells the rest."""
    code = """
        import gc, logging, sys
        from raystore.reports import log

        logger = log.logger_of("raystore.tried")
        logging.getLogger("raystore").setLevel("CRITICAL")

        class Loud:
            def __init__(self):
                self.me = self

            def __del__(self):
                logger.warning("gone", extra=log.a_minute("gone"))

        gc.set_threshold(5)
        for number in range(3000):
            Loud()
            logger.warning("line", extra=log.a_minute("line", number % 700))
        print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "done\n"
