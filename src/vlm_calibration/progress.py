"""Progress of long work on stderr: a bar of Rich on a terminal, and once in a while a plain line in a log file."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

FIRST = 5.0
"""Seconds until the first line in a log file. Work of `track` and `working` that takes less leaves none."""
EVERY = 30.0
"""Seconds between two lines in a log file."""
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


def is_terminal() -> bool:
    """Whether stderr is a terminal on which a line can be drawn again."""
    is_plain = os.environ.get("TERM") in ("dumb", "unknown")
    return sys.stderr is not None and sys.stderr.isatty() and not is_plain


class LogLines:
    """Plain lines about one piece of work: the first after `FIRST` seconds, the others at most every `every` seconds.

    The work is `total` units, None if unknown, of which an earlier run has `done` some; the time left is at the speed of this run.
    """

    def __init__(
        self, name: str, total: float | None = None, unit: str = "", *, done: float = 0, every: float = EVERY
    ) -> None:
        self.name, self.total, self.unit, self.every = name, total, unit, every
        self.has_printed = False
        self.done = self._before = done
        self._begun = time.monotonic()
        self._due = self._begun + min(FIRST, every)

    def update(self, done: float, note: Callable[[], str] = str) -> None:
        """Print a line if one is due, with what `note` returns behind it."""
        self.done = done
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + self.every
            self.show(note())

    def show(self, note: str = "") -> None:
        """Print how much is done, and how long the rest takes."""
        elapsed, work = time.monotonic() - self._begun, self.done - self._before
        when = f"{duration(elapsed)} so far"
        if self.total is not None and work > 0:
            when = f"{duration(max(0.0, self.total - self.done) * elapsed / work)} left"
        self._print("", when, note)

    def close(self, note: str = "", *, finished: bool = True) -> None:
        """Print the last line."""
        elapsed = duration(time.monotonic() - self._begun)
        self._print(*(("", f"took {elapsed}") if finished else ("stopped", f"after {elapsed}")), note)

    def _print(self, state: str, when: str, note: str) -> None:
        self.has_printed = True
        counts = f"{self.done:.0f} {self.unit}" if self.unit else ""
        if self.total:
            percent = int(100 * self.done / self.total)
            counts = f"{int(self.done)} of {int(self.total)} {self.unit} ({percent}%)"
        line = ", ".join(filter(None, (state, counts, when, note)))
        print(f"{self.name}: {line}", file=sys.stderr, flush=True)


@contextmanager
def working(
    name: str, total: float | None = None, unit: str = "", *, done: float = 0
) -> Iterator[Callable[[float], None]]:
    """Show work of more than a few seconds, as `LogLines` or as a passing bar; yields a function that is told how much is done."""
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    # Launchers set these to the number of a process.
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
    is_first = all(rank in (None, "0", "") for rank in ranks)
    if multiprocessing.parent_process() is not None or not is_first:
        yield lambda done: None
    elif is_terminal():
        import rich
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        rich.reconfigure(stderr=True)
        columns = [MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn()] if total else []
        label = TextColumn("{task.description}", markup=False)
        with Progress(label, BarColumn(), *columns, console=rich.get_console(), transient=True) as bar:
            task = bar.add_task(name, total=total, completed=done)  # type: ignore[arg-type]
            yield lambda done: bar.update(task, completed=done)
    else:
        lines = LogLines(name, total, unit, done=done)
        timer = threading.Timer(FIRST, lines.show)
        timer.daemon = True
        if total is None:
            timer.start()
        finished = False
        try:
            yield lines.update
            finished = True
        finally:
            timer.cancel()
            if lines.has_printed:
                lines.close(finished=finished)


def track(
    items: Iterable[T], name: str, total: float, unit: str, size: Callable[[T], float] | None = None
) -> Iterator[T]:
    """Iterate over items and show how much of them is done; `total` is their number, or the sum of their sizes."""
    done, due = 0.0, 0.0
    with working(name, total, unit) as update:
        for item in items:
            yield item
            done += 1 if size is None else size(item)
            if (now := time.monotonic()) >= due:
                update(done)
                due = now + 0.1  # items may take microseconds
        update(done)


def duration(seconds: float) -> str:
    """Seconds as m:ss, h:mm:ss, or days and h:mm."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
