"""How often a threshold breaks its promise, and how often one is found: `python -m tests.performance.thresholds` prints two Markdown tables.

In the first, answers are drawn from populations in which the error rate of each threshold is known, several about each image, which are wrong together
with a given correlation; the bar is 5% of the draws, the promise having 95% certainty. In the second, the share of draws in which a threshold is found and the mean share
of answers that it gives, beside MAPIE's fixed sequence on the same draws. MAPIE tests every confidence from the highest down, or from the lowest up if
the measured error rates rise with the confidence.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator

import numpy as np

from vlm_calibration.metrics.risk_control import GradedAnswers, lowest_controlled

LIMIT, LEVEL = 0.05, 0.05
ASKED = [(questions, correlation) for questions in (1, 4, 18) for correlation in (0.0, 0.25)]


class Population:
    """Answers at L confidences, ascending: their shares, and the error rate at each.

    Attributes:
        risk: error rate of the answers that each threshold gives, float64 [L].
        coverage: their share, float64 [L].
        sent_away: share of the correct answers that it does not give, float64 [L].
    """

    def __init__(self, value: np.ndarray, share: np.ndarray, error: np.ndarray) -> None:
        self.value, self.share, self.error = value, share / share.sum(), np.clip(error, 0, 1)
        self.coverage = np.flip(np.flip(self.share).cumsum())
        self.risk = np.flip(np.flip(self.share * self.error).cumsum()) / self.coverage
        right = self.share * (1 - self.error)
        self.sent_away = (right.cumsum() - right) / right.sum()

    def draw(
        self, n: int, rng: np.random.Generator, draws: int, correlation: float = 0.0, questions: int = 1
    ) -> Iterator[GradedAnswers]:
        """The answers that count, one about each of n images; that several questions are asked shows in which of them is drawn."""
        for _ in range(draws):
            level = rng.choice(len(self.value), (n, questions), p=self.share)
            alike = rng.random((n, questions)) < np.sqrt(correlation)
            luck = np.where(alike, rng.random((n, 1)), rng.random((n, questions)))
            one = (np.arange(n), rng.integers(0, questions, n))
            yield GradedAnswers(self.value[level[one]], luck[one] >= self.error[level[one]])

    def index(self, threshold: float) -> int:
        """The place of a threshold among the confidences."""
        return int(np.searchsorted(self.value, threshold))


def _few(error: Callable[[np.ndarray], np.ndarray]) -> Population:
    value = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    return Population(value, np.array([1, 1, 2, 3, 4, 2.0]), error(value))


def _many(error: Callable[[np.ndarray], np.ndarray]) -> Population:
    value = np.arange(101) / 100
    return Population(value, value**3 + 0.01, error(value))


POPULATIONS = {
    # The hardest case: every threshold is just over the limit.
    "constant, few levels": _few(lambda c: np.full_like(c, 0.0501)),
    "constant, many levels": _many(lambda c: np.full_like(c, 0.0501)),
    "falling, few levels": _few(lambda c: 0.4 * (1 - c) + 0.01),
    "falling, many levels": _many(lambda c: 0.3 * (1 - c)),
    "calibrated": _many(lambda c: 1 - c),
    # Assumption broken: the most confident answers are the worst.
    "most confident are wrong": _few(lambda c: np.where(c == 1, 0.25, 0.02 + 0.1 * (c < 0.8))),
    "waves": _many(lambda c: 0.05 + 0.045 * np.sin(25 * c)),
}
FEW_GOOD = {
    # A few answers that are right, beside many poor ones.
    f"{share:.0%} right at 99%, others half right": Population(
        np.array([0.3, 0.99]), np.array([1 - share, share]), np.array([0.5, 0.01])
    )
    for share in (0.08, 0.3)
}


def broken(
    population: Population, n: int, draws: int, correlation: float = 0.0, questions: int = 1, seed: int = 0
) -> float:
    """The share of draws whose threshold has a higher error rate than promised."""
    rng = np.random.default_rng([seed, n, questions])
    count = 0
    for answers in population.draw(n, rng, draws, correlation, questions):
        threshold = lowest_controlled(answers, LIMIT, LEVEL)
        count += threshold is not None and population.risk[population.index(threshold)] > LIMIT
    return count / draws


def of_mapie(answers: GradedAnswers) -> float | None:
    """The lowest threshold of MAPIE's fixed sequence over all confidences."""
    from mapie.risk_control import BinaryClassificationController, precision

    controller = BinaryClassificationController(
        lambda x: np.stack([1 - x, x], -1),
        precision,
        1 - LIMIT,
        1 - LEVEL,
        list_predict_params=np.unique(answers.confidence)[::-1],
        fwer_method="fixed_sequence",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no threshold
        controller.calibrate(answers.confidence, answers.correct.astype(int))
    return min(map(float, controller.valid_predict_params), default=None)


def power(population: Population, n: int, draws: int) -> str:
    """For both: the share of draws with a threshold, and the mean share of answers given, 0 without one."""
    rng = np.random.default_rng([1, n])
    given = []
    for answers in population.draw(n, rng, draws):
        found = (lowest_controlled(answers, LIMIT, LEVEL), of_mapie(answers))
        given.append([0.0 if t is None else population.coverage[population.index(t)] for t in found])
    shares = np.array(given)
    cells = (
        f"{found:.0%} | {mean:.1%}" for found, mean in zip((shares > 0).mean(0), shares.mean(0), strict=True)
    )
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--power-draws", type=int, default=60)
    args = parser.parse_args()
    heads = [f"{q} questions, correlation {c}" for q, c in ASKED]
    print(f"| population | images | {' | '.join(heads)} |\n|---|---:|{'---:|' * len(heads)}")
    for name, population in POPULATIONS.items():
        for n in (100, 1000, 10_000):
            draws = args.draws if n < 10_000 else args.draws // 3
            rates = [broken(population, n, draws, c, q) for q, c in ASKED]
            print(f"| {name} | {n:,} | {' | '.join(f'{rate:.1%}' for rate in rates)} |", flush=True)
    print(
        "\n| population | images | found | given | found, MAPIE | given, MAPIE |\n|---|---:|---:|---:|---:|---:|"
    )
    for name, population in (FEW_GOOD | POPULATIONS).items():
        for n in (300, 1000, 3000):
            print(f"| {name} | {n:,} | {power(population, n, args.power_draws)} |", flush=True)


if __name__ == "__main__":
    main()
