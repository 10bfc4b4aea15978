from __future__ import annotations

import io
import subprocess
import sys
import time

import pytest

from adasearch.display import (
    REDRAWS_PER_SECOND,
    LiveDisplay,
    PlainDisplay,
    duration,
    escaped,
    event_line,
    open_display,
    running_lines,
)
from adasearch.search.driver import Snapshot

FIELDS = {
    "total": 60,
    "done": 12,
    "running": ((12, "recover", 0.4), (13, "prune", None)),
    "stopped": 3,
    "failed": 1,
    "best": 0.4312,
    "best_stderr": 0.0102,
    "best_trial": 7,
    "dense": 0.45,
    "dense_stderr": 0.009,
    "seconds_elapsed": 723.0,
    "seconds_left": 2880.9,
    "last": None,
}
NOTHING_YET = {
    "done": 0, "running": ((-1, "starting", None),), "stopped": 0, "failed": 0, "best": None, "best_stderr": None,
    "best_trial": None, "dense": None, "dense_stderr": None, "seconds_elapsed": 1.0, "seconds_left": None,
}  # fmt: skip


def snapshot(**changes: object) -> Snapshot:
    return Snapshot(**(FIELDS | changes))  # type: ignore[arg-type]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3600, "1:00:00"), (90061, "25:01:01"), (-3, "0:00")],
)
def test_durations_read_as_on_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_control_characters_are_spelled_out_and_letters_are_not() -> None:
    assert escaped("a\x1b[2Jb\rc\nd\te\x00 ± é 漢 \u202e \udc80") == r"a\x1b[2Jb\rc\nd\te\x00 ± é 漢 \u202e \udc80"


def test_an_event_is_one_line_with_where_the_search_stands() -> None:
    line = event_line(snapshot(last="trial 11: 0.4000 ± 0.0100"))
    assert line == (
        "[12/60] trial 11: 0.4000 ± 0.0100; best 0.4312 ± 0.0102 (trial 7), dense 0.4500 ± 0.0090, about 48:00 left"
    )
    assert event_line(snapshot(last="dense", **NOTHING_YET)) == "[0/60] dense; no score yet"


def test_running_trials_have_a_line_each_up_to_a_bound() -> None:
    assert running_lines(snapshot()) == ["  trial 12: recover 40%", "  trial 13: prune"]
    assert running_lines(snapshot(running=((-1, "score", None),))) == ["  dense model: score"]
    many = running_lines(snapshot(running=tuple((n, "prune", None) for n in range(64))))
    assert len(many) == 17
    assert many[-1] == "  and 48 more"


def test_plain_lines_come_with_events_only_and_without_control_characters() -> None:
    stream = io.StringIO()
    with open_display(60, "study", stream) as display:
        assert isinstance(display, PlainDisplay)
        display.observe(snapshot())
        display.observe(snapshot(last="trial 3 failed: \x1b[31mred\x1b[0m\r\nnext"))
        display.note("a note\x07")
    text = stream.getvalue()
    assert text.count("\n") == 2
    assert all(c.isprintable() for c in text.replace("\n", ""))
    assert r"\x1b[31mred\x1b[0m\r\nnext" in text
    assert r"a note\x07" in text


def test_a_plain_stage_writes_its_first_and_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = io.StringIO(), iter([0.0, 1.0, 11.0, 12.0, 13.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with PlainDisplay(stream).stage("fine-tune 2/3", 200) as update:
        for step in (1, 20, 40, 60, 200):
            update(step, f"loss {3.0 + step / 100:.1f}")
    assert stream.getvalue().splitlines() == [
        "fine-tune 2/3: step 1/200, loss 3.0",
        "fine-tune 2/3: step 40/200, loss 3.4",
        "fine-tune 2/3: step 200/200, loss 5.0",
    ]


def test_a_stream_that_knows_few_letters_gets_what_it_can_show() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    PlainDisplay(stream).note("0.4 ± 0.1 漢")
    assert raw.getvalue() == b"0.4 +/- 0.1 \\u6f22\n"


def test_a_reader_that_goes_away_does_not_end_the_run() -> None:
    code = (
        "import sys\n"
        "from adasearch.display import open_display\n"
        "with open_display(0, 'a') as display:\n"
        "    for i in range(2000):\n"
        "        display.note('x' * 100)\n"
        "print('what the caller prints')\n"
        "sys.stderr.write('to the end')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "to the end"
        assert process.wait(30) == 0


@pytest.mark.parametrize("term", ["dumb", None])
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, term: str | None
) -> None:
    monkeypatch.delenv("TERM") if term is None else monkeypatch.setenv("TERM", term)
    assert isinstance(open_display(1, "study", terminal), PlainDisplay)


def test_the_live_view_shows_everything_that_a_search_has(terminal: Terminal) -> None:
    with open_display(60, "study", terminal) as display:
        assert isinstance(display, LiveDisplay)
        display.observe(snapshot(**NOTHING_YET))
        display._live.refresh()
        display.observe(snapshot(last="trial 11: 0.4 [bold]not markup[/bold] \x1b[2J"))
        display._live.refresh()
    text = terminal.getvalue()
    for part in (
        "study 0/60 trials",
        "no score yet",
        "dense model: starting",
        "study 12/60 trials",
        "best 0.4312 ± 0.0102 (trial 7), dense 0.4500 ± 0.0090",
        "elapsed 12:03, about 48:00 left; 2 running, 3 stopped early, 1 failed",
        "trial 12: recover 40%",
        "trial 13: prune",
        r"[12/60] trial 11: 0.4 [bold]not markup[/bold] \x1b[2J",
    ):
        assert part in text
    assert "\x1b[2J" not in text


def test_the_live_view_shows_a_stage_and_leaves_its_last_step(terminal: Terminal) -> None:
    with open_display(0, "study", terminal) as display, display.stage("fine-tune 2/3", 200) as update:
        update(40, "loss 3.1")
        display._live.refresh()  # type: ignore[attr-defined]
        update(200, "loss 2.9")
    assert "fine-tune 2/3: step 40/200, loss 3.1" in terminal.getvalue()
    assert "fine-tune 2/3: step 200/200, loss 2.9" in terminal.getvalue()
    assert "trials" not in terminal.getvalue()


def test_the_live_view_is_redrawn_a_few_times_a_second_however_often_it_is_told(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []
    render = LiveDisplay._render
    monkeypatch.setattr(LiveDisplay, "_render", lambda self: (drawn.append(time.monotonic()), render(self))[1])
    with open_display(60, "study", terminal) as display:
        begin, drawn[:] = time.monotonic(), []
        while time.monotonic() - begin < 1.0:
            display.observe(snapshot())
        count = len(drawn)
    assert 1 <= count <= REDRAWS_PER_SECOND + 1


def test_rich_is_not_imported_where_lines_are_plain() -> None:
    code = (
        "import io, sys\n"
        "from adasearch.display import open_display\n"
        "open_display(1, 'a', io.StringIO())\n"
        "print('rich' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
