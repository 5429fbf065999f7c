"""What a line of progress tells, as text for a log file and for a terminal; and the names of the stages."""

from __future__ import annotations

import math
from typing import NamedTuple

COLUMNS = 80
"""Maximum width of the line on a terminal, and aim in a log file."""
BAR = 12
"""Width of the bar in it."""
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
        """The line for a log file while the work goes on; without the rate if it does not fit into `COLUMNS` characters."""
        rate = rate_text(self.rate, self.unit) if self.rate else ""
        left = f"{duration(self.left)} left{self._beyond()}" if self.left is not None else ""
        elapsed = "" if left else f"{duration(self.elapsed)} so far"
        line = f"{self.name}: {_joined(self.counts(), rate, left or elapsed, self.note)}"
        if len(line) > COLUMNS:
            line = f"{self.name}: {_joined(self.counts(), left or elapsed, self.note)}"
        return line

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
