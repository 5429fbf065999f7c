"""How often a 95% interval holds the truth: `python -m tests.performance.intervals` prints a Markdown table.

Answers are drawn from populations whose metrics are known, many times, and each time intervals are made as the report makes them.
The true ECE is that of the population in the same ten bins. Of each metric the table says how often the interval held the
truth in percent, how often the truth was below and above it, and how wide it is on average. A nominal 95% should come to 92 to 98%;
cells that do not are in bold.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.metrics.bootstrap import Interval, interval_of
from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.groups import ConfidenceGroups
from vlm_calibration.reporting.report_bootstrap import ImageBootstrap

GRID = 1000
"""Steps of confidence from 0 to 1; a grid this fine stands for continuous confidences."""
COVERED = (92.0, 98.0)
ELEVEN = np.arange(0, GRID + 1, GRID // 10)


@dataclass(frozen=True)
class Population:
    """Answers without end.

    level: int [L], the confidences in steps of the grid. share: [L], of answers. accuracy: [L], of those at each level.
    together: answers about one image, which are right or wrong together half of the time.
    """

    level: np.ndarray
    share: np.ndarray
    accuracy: np.ndarray
    together: int = 1

    @property
    def cells(self) -> np.ndarray:
        """The share of wrong and right answers at each level, [L, 2]."""
        share = self.share / self.share.sum()
        return np.stack([share * (1 - self.accuracy), share * self.accuracy], axis=1)

    def levels(self, counts: np.ndarray) -> ConfidenceGroups:
        """These counts (..., L, 2) at the levels that hold an answer."""
        held = counts.reshape(-1, len(self.level), 2).sum((0, 2)) > 0
        return ConfidenceGroups(
            torch.from_numpy(self.level[held] / GRID),
            torch.from_numpy(counts[..., held, :]),
            torch.from_numpy(self.level[held]),
            GRID,
            torch.zeros(counts.shape[:-2], dtype=torch.int64),
        )

    def truth(self, metric: str) -> float:
        """The metric of the population."""
        return float(METRICS[metric](self.levels((self.cells * 1e12).round().astype(np.int64))))


def continuous(a: float, b: float, accuracy: Callable[[np.ndarray], np.ndarray]) -> Population:
    """Confidences of a beta distribution."""
    level = np.arange(1, GRID)
    value = level / GRID
    return Population(level, value ** (a - 1) * (1 - value) ** (b - 1), accuracy(value))


def stated(
    level: Sequence[int], share: Sequence[float], accuracy: Sequence[float], together: int = 1
) -> Population:
    """A few stated confidences, in percent."""
    return Population(
        np.array(level) * GRID // 100, np.array(share, float), np.array(accuracy, float), together
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
    "calibrated, 4 an image": stated(TENS, [1] * 11, [t / 100 for t in TENS], together=4),
    "overconfident, 4 an image": stated(TENS, RISING, [0.3 + 0.004 * t for t in TENS], together=4),
}


def intervals(
    population: Population, n: int, metrics: Sequence[str], rng: np.random.Generator, replicates: int
) -> dict[str, Interval]:
    """The intervals of one sample of n answers."""
    if population.together > 1:
        return _of_images(population, n, rng, replicates)
    cells = population.cells.reshape(-1)
    counts = rng.multinomial(n, cells)
    held = np.flatnonzero(counts)
    drawn = np.zeros((replicates, len(cells)), dtype=np.int64)
    drawn[:, held] = rng.multinomial(n, counts[held] / n, size=replicates)
    # With the answers as the first row, the same levels are held by all.
    both = population.levels(np.concatenate([counts[None], drawn]).reshape(replicates + 1, -1, 2))
    own = both._replace(counts=both.counts[0], unparsed=both.unparsed[0])
    resampled = both._replace(counts=both.counts[1:], unparsed=both.unparsed[1:])
    return {metric: interval_of(METRICS[metric], own, resampled) for metric in metrics}


def _of_images(
    population: Population, n: int, rng: np.random.Generator, replicates: int
) -> dict[str, Interval]:
    """The same where answers come in images."""
    at = rng.choice(len(population.level), n, p=population.share / population.share.sum())
    image = np.arange(n) // population.together
    luck = np.where(rng.random(n) < 0.5, rng.random(n)[image], rng.random(n))
    right = luck < population.accuracy[at]
    confidence = (population.level[at] / GRID).tolist()
    predictions = [
        EstimatedPrediction(str(i), "?", "Yes", "", "yes", c, bool(r), None, None, "yes_no", image=str(m))
        for i, (c, r, m) in enumerate(zip(confidence, right, image, strict=True))
    ]
    bootstrap = ImageBootstrap(predictions, replicates, seed=int(rng.integers(2**31)))
    return dict(bootstrap.measure(confidence).intervals)


@dataclass
class Coverage:
    """Of the samples: how many. below, above: in how many the truth was out of the interval. width: of all intervals together."""

    samples: int = 0
    below: int = 0
    above: int = 0
    width: float = 0.0

    def add(self, interval: Interval, truth: float) -> None:
        """Count one interval; one that is undefined is none."""
        if interval.value != interval.value:
            return
        self.samples += 1
        self.below += truth < interval.low - 1e-6
        self.above += truth > interval.high + 1e-6
        self.width += interval.high - interval.low

    @property
    def percent(self) -> float:
        """How often the truth was in the interval."""
        return 100 * (1 - (self.below + self.above) / self.samples)

    def __str__(self) -> str:
        if not self.samples:
            return "-"
        text = f"{self.percent:.1f}"
        if not COVERED[0] <= self.percent <= COVERED[1]:
            text = f"**{text}**"
        below, above = (100 * k / self.samples for k in (self.below, self.above))
        return f"{text} ({below:.1f}, {above:.1f}; {self.width / self.samples:.3f})"


def coverage(
    population: Population, n: int, metrics: Sequence[str], samples: int, replicates: int, seed: int = 0
) -> dict[str, Coverage]:
    """How often intervals from samples of n answers hold the truth."""
    truth = {metric: population.truth(metric) for metric in metrics}
    found = {metric: Coverage() for metric in metrics}
    rng = np.random.default_rng(seed)
    for _ in range(samples):
        made = intervals(population, n, metrics, rng, replicates)
        for metric in metrics:
            if truth[metric] == truth[metric]:
                found[metric].add(made[metric], truth[metric])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--metrics", nargs="+", default=["ece", "brier", "auroc"], choices=METRICS)
    parser.add_argument("--answers", nargs="+", type=int, default=[200, 2000])
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--replicates", type=int, default=500)
    parser.add_argument("--populations", nargs="+", default=list(POPULATIONS), choices=POPULATIONS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| population | answers | true ECE | {' | '.join(args.metrics)} |")
    print("|---|---:|---:|" + "---|" * len(args.metrics))
    for n in args.answers:
        for name in args.populations:
            population = POPULATIONS[name]
            cells = coverage(population, n, args.metrics, args.samples, args.replicates)
            row = " | ".join(str(cells[metric]) for metric in args.metrics)
            print(f"| {name} | {n:,} | {population.truth('ece'):.3f} | {row} |", flush=True)


if __name__ == "__main__":
    main()
