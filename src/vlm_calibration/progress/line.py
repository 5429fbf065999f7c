"""Progress of long work as one line: live on a terminal, and once in a while as plain text in a log file.

A log line has no control characters, so that a SLURM log can be read and searched. All lines are on stderr.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from vlm_calibration.progress.status import COLUMNS, Status
from vlm_calibration.progress.terminal import LiveText, is_terminal

T = TypeVar("T")

FIRST = 5.0
"""Seconds until the first line in a log file. Work of `track` and `working` that takes less leaves no line."""
EVERY = 30.0
"""Default of the seconds between two lines in a log file."""
WINDOW = 300.0
"""Seconds that the rate is measured over, if at least `FEWEST` updates are within them."""
FEWEST = 10
SPACING = 0.5
"""Minimum seconds between two measurements of the rate, and between two notes on a terminal."""
BETWEEN = 0.1
"""Minimum seconds between two updates of `track`, whose items may take microseconds."""
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
"""Variables that launchers set to the number of a process."""


class ProgressLine:
    """The progress of one piece of work.

    On a terminal the line is redrawn until `close`; a line within another line's work is not drawn. In a log file, the first
    line comes after `FIRST` seconds, the others at most every `every` seconds, and the last from `close`.

    Args:
        name: of the work.
        total: how much there is; None: unknown.
        unit: of `total`, in the plural.
        done: how much an earlier run has done; the rate is that of this run.
        every: seconds between two lines in a log file.
        passing: leave no line behind on a terminal, and none in a log file if the work takes less than `FIRST` seconds.
        shown: False draws and prints nothing.
    """

    def __init__(
        self,
        name: str,
        total: float | None = None,
        unit: str = "",
        *,
        done: float = 0,
        every: float = EVERY,
        passing: bool = False,
        shown: bool = True,
    ) -> None:
        self.name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
        self.total = total
        self.unit = unit
        self.every = every
        self.passing = passing
        self.shown = shown
        self._begun = self._updated = time.monotonic()
        self._done = done
        self._paused = 0.0
        self._pause: float | None = None
        self._samples = deque([(0.0, done)])
        self._left: float | None = None
        self._beyond = self._note = ""
        self._due = self._begun + min(FIRST, every)
        self._live: LiveText | None = None
        if shown and is_terminal():
            self._due = self._begun
            self.shown = LiveText.active is None
            self._live = LiveText(self._drawn, keep=not passing) if self.shown else None

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._begun

    @property
    def rate(self) -> float | None:
        """Units a second in the last minutes of this run, without pauses; None: not known yet."""
        (begun, before), active = self._samples[0], self._active(self._updated)
        work, seconds = self._done - before, active - begun
        return work / seconds if work > 0 and seconds > 0 else None

    def update(
        self, done: float, note: Callable[[], str] | None = None, *, extra: float = 0.0, beyond: str = ""
    ) -> None:
        """Report progress.

        Args:
            done: how much is done.
            note: returns what else to show. It is called only when the line is drawn, so it may be slow.
            extra: seconds of other work that the remaining time includes.
            beyond: other work that it does not include.
        """
        now = self._updated = time.monotonic()
        self._done = done
        self._measure(self._active(now))
        self._beyond = beyond
        rate = self.rate
        if self.total is None or rate is None:
            self._left = None
        else:
            self._left = max(0.0, self.total - done) / rate + extra
        if self.shown and now >= self._due:
            self._note = note() if note is not None else ""
            self.show()
            self._due = now + (SPACING if self._live else self.every)

    def pause(self) -> None:
        """Begin other work, which does not count in the rate."""
        self._pause = self._pause or time.monotonic()

    def unpause(self) -> None:
        """End the other work."""
        if self._pause is not None:
            self._paused += time.monotonic() - self._pause
            self._pause = None

    def status(self) -> Status:
        """What the line tells now."""
        left = self._left
        if left is not None:
            left = max(0.0, left - (time.monotonic() - self._updated))
        return Status(
            self.name,
            self._done,
            self.total,
            self.unit,
            self.rate,
            self.elapsed,
            left,
            self._beyond,
            self._note,
        )

    def show(self) -> None:
        """Print the line in a log file."""
        if self.shown and self._live is None:
            self._print(self.status().log_line())

    def close(self, *, finished: bool = True, note: Callable[[], str] | None = None) -> None:
        """Draw or print the last line.

        Args:
            finished: whether the work is complete.
            note: returns what else to show.
        """
        if not self.shown:
            return
        self.shown = False
        if note is not None and not self.passing:
            self._note = note()
        last = self.status()._replace(left=None)
        if self._live is not None:
            self._live.stop(lambda width, bar: last.terminal_line(min(COLUMNS, width), bar))
        elif not self.passing or last.elapsed >= FIRST:
            self._print(last.last_line(finished=finished))

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.close(finished=kind is None)

    def _active(self, now: float) -> float:
        """Seconds of work until `now`, without pauses."""
        return (self._pause or now) - self._begun - self._paused

    def _measure(self, active: float) -> None:
        samples = self._samples
        if active - samples[-1][0] < SPACING:
            return
        samples.append((active, self._done))
        # The first unit of work waits for data workers and for the device to warm up.
        if len(samples) == 3 and samples[0][0] == 0:
            samples.popleft()
        while len(samples) > FEWEST and samples[1][0] < active - WINDOW:
            samples.popleft()

    def _drawn(self, width: int, bar: str) -> str:
        return self.status().terminal_line(min(COLUMNS, width), bar)

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def track(
    items: Iterable[T], name: str, total: float, unit: str, size: Callable[[T], float] | None = None
) -> Iterator[T]:
    """Iterate over items and show how much of them is done, if it takes more than a few seconds.

    Args:
        items: what to iterate over.
        name: of the work.
        total: number of items, or the sum of their sizes.
        unit: of `total`, in the plural.
        size: size of an item; None: 1.
    """
    done, due = 0.0, 0.0
    with ProgressLine(name, total, unit, passing=True, shown=_is_first()) as line:
        for item in items:
            yield item
            done += 1 if size is None else size(item)
            if (now := time.monotonic()) >= due:
                line.update(done)
                due = now + BETWEEN
        line.update(done)


@contextmanager
def working(name: str) -> Iterator[None]:
    """Context of work whose end cannot be foreseen; shows how long it has taken, if that is more than a few seconds."""
    with ProgressLine(name, passing=True, shown=_is_first()) as line:
        timer = threading.Timer(FIRST, line.show)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _is_first() -> bool:
    """Whether this is the first process of a run, and no worker."""
    if multiprocessing.parent_process() is not None:
        return False
    return all(os.environ.get(name, "0") in ("0", "") for name in RANKS)
