"""Coverage of the 95% intervals: `python -m tests.performance.intervals` prints a Markdown table.

Answers are drawn many times from populations with known metrics, and intervals are computed as in the report. The true ECE is
that of the population in the same ten bins. For each metric the table has the share of intervals that contain the truth, the
shares with the truth below and above the interval, all in percent, and the mean width. The coverage should be 92 to 98%; other
cells are in bold.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from vlm_calibration.metrics.bootstrap import Interval, bootstrap_replicates, interval_of
from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.table import ConfidenceTable
from vlm_calibration.records import Prediction
from vlm_calibration.reporting.report.table import ImageBootstrap

GRID = 1000
"""Steps of confidence from 0 to 1, fine enough to represent continuous confidences."""
COVERED = (92.0, 98.0)
ELEVEN = np.arange(0, GRID + 1, GRID // 10)


@dataclass(frozen=True)
class Population:
    """A distribution of answers.

    Attributes:
        level: int [L], the confidences in steps of the grid.
        share: float [L], proportional to the share of answers at each level.
        accuracy: float [L], of the answers at each level.
        per_image: answers about one image, which are correct or wrong together half of the time.
    """

    level: np.ndarray
    share: np.ndarray
    accuracy: np.ndarray
    per_image: int = 1

    @property
    def cells(self) -> np.ndarray:
        """The share of wrong and correct answers at each level, float [L, 2]."""
        share = self.share / self.share.sum()
        return np.stack([share * (1 - self.accuracy), share * self.accuracy], axis=1)

    def table(self, counts: np.ndarray) -> ConfidenceTable:
        """Counts [..., L, 2] at the levels that hold an answer."""
        occupied = counts.reshape(-1, len(self.level), 2).sum((0, 2)) > 0
        return ConfidenceTable(
            torch.from_numpy(self.level[occupied] / GRID),
            torch.from_numpy(counts[..., occupied, :]),
            torch.zeros(counts.shape[:-2], dtype=torch.int64),
        )

    def truth(self, metric: str) -> float:
        """The metric of the population."""
        return float(METRICS[metric](self.table((self.cells * 1e12).round().astype(np.int64))))


def continuous(a: float, b: float, accuracy: Callable[[np.ndarray], np.ndarray]) -> Population:
    """Confidences of a beta distribution."""
    level = np.arange(1, GRID)
    value = level / GRID
    return Population(level, value ** (a - 1) * (1 - value) ** (b - 1), accuracy(value))


def stated(
    level: Sequence[int], share: Sequence[float], accuracy: Sequence[float], per_image: int = 1
) -> Population:
    """A few stated confidences, in percent."""
    return Population(
        np.array(level) * GRID // 100, np.array(share, float), np.array(accuracy, float), per_image
    )


TENS = [int(x) for x in ELEVEN * 100 // GRID]
RISING = list(range(1, 12))
POPULATIONS = {
    "calibrated, uniform": continuous(1, 1, lambda c: c),
    "calibrated, mostly sure": continuous(4, 1, lambda c: c),
    "calibrated, 3 levels": stated([50, 70, 90], [1, 1, 2], [0.5, 0.7, 0.9]),
    "calibrated, 11 levels": stated(TENS, [1] * 11, [t / 100 for t in TENS]),
    "calibrated, 90 to 100%": stated([90, 95, 100], [1, 2, 3], [0.9, 0.95, 1.0]),
    "slightly off, uniform": continuous(1, 1, lambda c: 0.05 + 0.9 * c),
    "slightly off, 11 levels": stated(TENS, RISING, [0.04 + 0.0092 * t for t in TENS]),
    "one level off": stated(TENS, [1] * 10 + [10], [t / 100 for t in TENS[:10]] + [0.85]),
    "overconfident, mostly sure": continuous(4, 1, lambda c: 0.3 + 0.5 * c),
    "overconfident, 3 levels": stated([50, 70, 90], [1, 1, 2], [0.45, 0.55, 0.7]),
    "overconfident, 11 levels": stated(TENS, RISING, [0.3 + 0.004 * t for t in TENS]),
    "always 95%": stated([95], [1], [0.7]),
    "calibrated, 4 an image": stated(TENS, [1] * 11, [t / 100 for t in TENS], per_image=4),
    "overconfident, 4 an image": stated(TENS, RISING, [0.3 + 0.004 * t for t in TENS], per_image=4),
}


def intervals(
    population: Population, n: int, metrics: Sequence[str], rng: np.random.Generator, replicates: int
) -> dict[str, Interval]:
    """The intervals of one sample of n answers."""
    if population.per_image > 1:
        return _intervals_of_images(population, n, rng, replicates)
    cells = population.cells.reshape(-1)
    counts = rng.multinomial(n, cells)
    occupied = np.flatnonzero(counts)
    draws = np.zeros((replicates, len(cells)), dtype=np.int64)
    draws[:, occupied] = rng.multinomial(n, counts[occupied] / n, size=replicates)
    # Together, so that answers and draws have the same levels.
    both = population.table(np.concatenate([counts[None], draws]).reshape(replicates + 1, -1, 2))
    answers = both._replace(counts=both.counts[0], unparsed=both.unparsed[0])
    resampled = both._replace(counts=both.counts[1:], unparsed=both.unparsed[1:])
    rarer = int(answers.counts.sum(0).amin())
    return {
        name: interval_of(
            METRICS[name], answers, resampled, bootstrap_replicates(resampled, METRICS[name]), rarer
        )
        for name in metrics
    }


def _intervals_of_images(
    population: Population, n: int, rng: np.random.Generator, replicates: int
) -> dict[str, Interval]:
    """`intervals` of a population with several answers an image."""
    drawn = rng.choice(len(population.level), n, p=population.share / population.share.sum())
    image = np.arange(n) // population.per_image
    luck = np.where(rng.random(n) < 0.5, rng.random(n)[image], rng.random(n))
    correct = luck < population.accuracy[drawn]
    confidence = (population.level[drawn] / GRID).tolist()
    predictions = [
        Prediction(str(i), "?", "Yes", "", "yes", c, bool(y), None, None, "yes_no", image=str(m))
        for i, (c, y, m) in enumerate(zip(confidence, correct, image, strict=True))
    ]
    bootstrap = ImageBootstrap(predictions, replicates, seed=int(rng.integers(2**31)))
    return dict(bootstrap.measure(confidence).intervals)


class Coverage(NamedTuple):
    """Number of intervals, how many have the truth below them and above them, and their mean width."""

    samples: int
    below: int
    above: int
    width: float

    def __str__(self) -> str:
        if not self.samples:
            return "-"
        below, above = 100 * self.below / self.samples, 100 * self.above / self.samples
        text = f"{100 - below - above:.1f}"
        if not COVERED[0] <= 100 - below - above <= COVERED[1]:
            text = f"**{text}**"
        return f"{text} ({below:.1f}, {above:.1f}; {self.width:.3f})"


def coverage(
    population: Population, n: int, metrics: Sequence[str], samples: int, replicates: int, seed: int = 0
) -> dict[str, Coverage]:
    """Coverage of the intervals from samples of n answers, by metric; undefined intervals are left out."""
    rng = np.random.default_rng(seed)
    of_samples = [intervals(population, n, metrics, rng, replicates) for _ in range(samples)]
    counted = {}
    for metric in metrics:
        truth = population.truth(metric)
        drawn = [of_sample[metric] for of_sample in of_samples]
        defined = [interval for interval in drawn if not math.isnan(interval.value)]
        below = sum(truth < interval.low - 1e-6 for interval in defined)
        above = sum(truth > interval.high + 1e-6 for interval in defined)
        width = sum(interval.high - interval.low for interval in defined) / max(1, len(defined))
        counted[metric] = Coverage(len(defined), below, above, width)
    return counted


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--replicates", type=int, default=500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    metrics = ("ece", "brier", "auroc")
    print(f"| population | answers | true ECE | {' | '.join(metrics)} |\n|---|---:|---:|---|---|---|")
    for n in (200, 2000):
        for name, population in POPULATIONS.items():
            cells = coverage(population, n, metrics, args.samples, args.replicates)
            row = " | ".join(str(cells[metric]) for metric in metrics)
            print(f"| {name} | {n:,} | {population.truth('ece'):.3f} | {row} |", flush=True)


if __name__ == "__main__":
    main()
