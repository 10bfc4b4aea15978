"""What a run shows while it runs: a live view on a terminal, plain lines elsewhere.

The only module that imports rich. A display observes; it decides nothing, and a run goes on without one whose stream
was closed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

if TYPE_CHECKING:
    from adasearch.search.snapshot import Snapshot

REDRAWS_PER_SECOND = 4
STAGE_SECONDS = 10.0
_MOST_TRIALS = 16

Update = Callable[[int, str], None]


class Display(Protocol):
    """Shows a search and what follows it. A context manager; outside of it, it must not be used."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def observe(self, snapshot: Snapshot) -> None:
        """Show where the search stands."""
        ...

    def note(self, text: str) -> None:
        """Show a line that stays."""
        ...

    def stage(self, title: str, total: int) -> contextlib.AbstractContextManager[Update]:
        """Return a context whose value is called with (steps done, remark) as a stage of `total` steps goes on."""
        ...


def open_display(total: int, title: str, stream: TextIO | None = None) -> Display:
    """Return the display that fits the stream, a live one on a terminal that can move its cursor.

    Args:
        total: trials of the search, 0 where there is none to show.
        title: name of the study.
        stream: standard output unless given.
    """
    stream = stream or sys.stdout
    if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return LiveDisplay(total, title, stream)
    return PlainDisplay(stream)


def escaped(text: str) -> str:
    """Return `text` on one line: what a terminal would act on, such as escape sequences, is spelled out instead."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def duration(seconds: float) -> str:
    """Return a duration as ``h:mm:ss``, or ``m:ss`` below an hour."""
    minutes, second = divmod(int(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def best_line(snapshot: Snapshot) -> str:
    """Return the best score against the dense model's, as far as they are known."""
    parts = []
    if snapshot.best is not None:
        parts.append(f"best {_score(snapshot.best, snapshot.best_stderr)} (trial {snapshot.best_trial})")
    if snapshot.dense is not None:
        parts.append(f"dense {_score(snapshot.dense, snapshot.dense_stderr)}")
    return ", ".join(parts) or "no score yet"


def counts_line(snapshot: Snapshot) -> str:
    """Return how many trials are running, stopped early and failed."""
    running = sum(number >= 0 for number, _, _ in snapshot.running)
    return f"{running} running, {snapshot.stopped} stopped early, {snapshot.failed} failed"


def running_lines(snapshot: Snapshot) -> list[str]:
    """Return a line with the phase of each trial in a worker, for no more trials than a screen has room for."""
    lines = []
    for number, phase, share in snapshot.running[:_MOST_TRIALS]:
        name = f"trial {number}" if number >= 0 else "dense model"
        lines.append(f"  {name}: {escaped(phase)}" + (f" {share:.0%}" if share is not None else ""))
    more = len(snapshot.running) - _MOST_TRIALS
    return [*lines, f"  and {more} more"] if more > 0 else lines


def event_line(snapshot: Snapshot) -> str:
    """Return what has just happened and where the search stands, in one line."""
    left = f", about {duration(snapshot.seconds_left)} left" if snapshot.seconds_left is not None else ""
    event = escaped(snapshot.last or "")
    return f"[{snapshot.done}/{snapshot.total}] {event}; {best_line(snapshot)}{left}"


def stage_line(title: str, done: int, total: int, remark: str) -> str:
    """Return ``title: step 40/200, remark``."""
    return f"{escaped(title)}: step {done}/{total}" + (f", {escaped(remark)}" if remark else "")


def _score(mean: float, stderr: float | None) -> str:
    return f"{mean:.4f}" if stderr is None else f"{mean:.4f} ± {stderr:.4f}"


def _divert(stream: TextIO) -> None:
    """Let a stream that nobody reads any more take what is still written to it, by others or when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class PlainDisplay:
    """Writes one line for each event, without any control character: for files, pipes and journals."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def observe(self, snapshot: Snapshot) -> None:
        """Write what has just happened, if anything has."""
        if snapshot.last is not None:
            self._write(event_line(snapshot))

    def note(self, text: str) -> None:
        """Write a line."""
        self._write(escaped(text))

    @contextlib.contextmanager
    def stage(self, title: str, total: int) -> Iterator[Update]:
        """Write a line at the first and the last step, and between them one every ten seconds."""
        written = float("-inf")

        def update(done: int, remark: str = "") -> None:
            nonlocal written
            now = time.monotonic()
            if done >= total or now - written >= STAGE_SECONDS:
                written = now
                self._write(stage_line(title, done, total, remark))

        yield update

    def _write(self, line: str) -> None:
        if self._stream is None:
            return
        encoding = self._stream.encoding or "utf-8"
        try:
            line.encode(encoding)
        except UnicodeEncodeError:
            line = line.replace("±", "+/-").encode(encoding, "backslashreplace").decode(encoding)
        try:
            self._stream.write(f"{line}\n")
            self._stream.flush()
        except (OSError, ValueError):  # the reader has gone, or the stream is closed: the run goes on unseen
            _divert(self._stream)
            self._stream = None


class LiveDisplay:
    """Keeps a few lines at the foot of a terminal up to date: progress, best score, time, and each running trial."""

    def __init__(self, total: int, title: str, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._total, self._title = total, escaped(title)
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._snapshot: Snapshot | None = None
        self._seen = self._begun = time.monotonic()
        self._stage: tuple[str, int, int, str] | None = None
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=REDRAWS_PER_SECOND,
            vertical_overflow="crop",
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._live.stop()

    def observe(self, snapshot: Snapshot) -> None:
        """Show where the search stands from the next redraw on, and what has just happened as a line that stays."""
        self._snapshot, self._seen = snapshot, time.monotonic()
        if snapshot.last is not None:
            self.note(f"[{snapshot.done}/{snapshot.total}] {snapshot.last}")

    def note(self, text: str) -> None:
        """Show a line above the live ones."""
        with contextlib.suppress(OSError, ValueError):
            self._console.print(escaped(text), soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, title: str, total: int) -> Iterator[Update]:
        """Show the progress of a stage below that of the search while it lasts."""

        def update(done: int, remark: str = "") -> None:
            self._stage = (title, done, total, remark)

        update(0)
        try:
            yield update
        finally:
            last, self._stage = self._stage, None
            if last is not None:
                self.note(stage_line(*last))

    def _render(self) -> Any:
        """Return what to draw; called from the thread that redraws, on values that are replaced and never changed."""
        from rich.console import Group
        from rich.text import Text

        rows: list[Any] = []
        snapshot, stage = self._snapshot, self._stage
        if self._total:
            done, total = (snapshot.done, snapshot.total) if snapshot else (0, self._total)
            rows.append(_bar(f"{self._title} {done}/{total} trials", done, total))
        rows += [Text(line, no_wrap=True, overflow="ellipsis") for line in self._lines(snapshot)]
        if stage is not None:
            rows.append(_bar(stage_line(*stage), stage[1], stage[2]))
        return Group(*rows)

    def _lines(self, snapshot: Snapshot | None) -> list[str]:
        now = time.monotonic()
        if snapshot is None:
            return [f"elapsed {duration(now - self._begun)}"] if self._total else []
        since = now - self._seen
        time_line = f"elapsed {duration(snapshot.seconds_elapsed + since)}"
        if snapshot.seconds_left is not None:
            time_line += f", about {duration(snapshot.seconds_left - since)} left"
        return [best_line(snapshot), f"{time_line}; {counts_line(snapshot)}", *running_lines(snapshot)]


def _bar(label: str, done: int, total: int) -> Any:
    """Return a row with a label and a progress bar."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, 1))
    row.add_row(
        Text(label, no_wrap=True, overflow="ellipsis"), ProgressBar(total=max(total, 1), completed=done, width=30)
    )
    return row
