"""Progress of long work as one line: live on a terminal, and once in a while as plain text in a log file.

Stages report through `callbacks.progress.Progress`, all other work through `track` and `working` here. All of them draw with
`ProgressLine`, on stderr. A log line has no control characters, so that a SLURM log can be read and searched.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from vlm_calibration.terminal import LiveText, is_terminal

T = TypeVar("T")

COLUMNS = 80
"""Maximum width of the line on a terminal."""
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
BAR = 12
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
"""Variables that launchers set to the number of a process."""
STAGES = {
    "SFTModule": "sft",
    "DPOModule": "dpo",
    "LevelFitModule": "levels",
    "EvaluationModule": "evaluation",
    "RegionExtractor": "regions",
}


def stage_name(module_class: str) -> str:
    """The name of a stage as users know it, by the name or path of its LightningModule."""
    name = module_class.rpartition(".")[2]
    return STAGES.get(name, name)


class Status(NamedTuple):
    """What a line tells.

    Attributes:
        name: of the work.
        done: how much is done; may be a fraction.
        total: how much there is; None: unknown.
        unit: of both, in the plural.
        rate: units a second; None: not known yet.
        elapsed: seconds.
        left: seconds; None: not known.
        beyond: what `left` does not include; empty for nothing.
        note: e.g. the loss.
    """

    name: str
    done: float
    total: float | None
    unit: str
    rate: float | None
    elapsed: float
    left: float | None
    beyond: str
    note: str

    @property
    def percent(self) -> int | None:
        return math.floor(100 * self.done / self.total) if self.total else None

    def counts(self) -> str:
        """The progress in words: "120 of 800 steps (15%)"."""
        if not self.unit:
            return ""
        of = f" of {math.floor(self.total)}" if self.total is not None else ""
        percent = f" ({self.percent}%)" if self.percent is not None else ""
        return f"{math.floor(self.done)}{of} {self.unit}{percent}"

    def log_line(self) -> str:
        """The line for a log file while the work goes on."""
        rate = rate_text(self.rate, self.unit) if self.rate else ""
        left = f"{duration(self.left)} left{self._beyond()}" if self.left is not None else ""
        elapsed = "" if left else f"{duration(self.elapsed)} so far"
        return f"{self.name}: {_joined(self.counts(), rate, left or elapsed, self.note)}"

    def last_line(self, *, finished: bool) -> str:
        """The last line for a log file."""
        if finished:
            rate = rate_text(self.rate, self.unit) if self.rate else ""
            return f"{self.name}: {_joined(self.counts(), rate, f'took {duration(self.elapsed)}', self.note)}"
        return (
            f"{self.name}: {_joined('stopped', self.counts(), f'after {duration(self.elapsed)}', self.note)}"
        )

    def terminal_line(self, width: int = COLUMNS, bar: str = "━") -> str:
        """The line for a terminal; leaves out what does not fit into `width` characters, least important first."""
        total = f"/{math.floor(self.total)}" if self.total is not None else ""
        full = round(BAR * min(1.0, self.done / self.total)) if self.total else 0
        left = f"{duration(self.left)} left{self._beyond()}" if self.left is not None else ""
        parts = {
            "name": self.name,
            "percent": f"{self.percent:>3}%" if self.percent is not None else "",
            "bar": (bar * full).ljust(BAR, "." if bar == "-" else "┄") if self.total else "",
            "counts": f"{math.floor(self.done)}{total} {self.unit}" if self.unit else "",
            "rate": rate_text(self.rate, self.unit).replace(f" {self.unit}", "") if self.rate else "",
            "elapsed": duration(self.elapsed),
            "left": left,
            "note": self.note,
        }
        for name in ("", "bar", "elapsed", "rate", "counts", "note"):
            parts.pop(name, None)
            line = "  ".join(filter(None, parts.values()))
            if len(line) <= width:
                return line
        return line[:width]

    def _beyond(self) -> str:
        return f" + {self.beyond}" if self.beyond else ""


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


def duration(seconds: float) -> str:
    """Seconds as m:ss, h:mm:ss, or days and h:mm."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour}:{minute:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def rate_text(rate: float, unit: str) -> str:
    """A rate a second, as a number of at least 1 a second, a minute or an hour: "2.1 steps/s"."""
    for seconds, name in ((1, "s"), (60, "min"), (3600, "h")):
        value = rate * seconds
        if value >= 1 or name == "h":
            break
    return f"{value:.{0 if value >= 100 else 1}f} {unit}/{name}"


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))
