"""Cases for the metric tests, and exact references in rational arithmetic that share no code with the package."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np

Case = tuple[np.ndarray, np.ndarray]


def cases(count: int, kind: str, seed: int = 0, largest: int = 60) -> list[Case]:
    """Cases of N answers, 1 <= N <= largest: `(N,)` int percents (or float64 for `continuous`) and `(N,)` bool."""
    rng = np.random.default_rng(seed)

    def case() -> Case:
        n = int(rng.integers(1, largest + 1))
        confidence = rng.beta(*rng.uniform(0.3, 4, size=2), size=n)
        truth = np.clip(confidence * rng.uniform(0, 1.3) + rng.normal(0, 0.3), 0, 1)
        correct = rng.random(n) < truth
        match kind:
            case "tens":
                confidence = np.rint(confidence * 10).astype(int) * 10
            case "percents":
                confidence = np.rint(confidence * 100).astype(int)
            case "few":
                confidence = rng.choice([0, 5, 50, 95, 99, 100], size=n)
        return confidence, correct

    return [case() for _ in range(count)]


EDGE_CASES: dict[str, tuple[list[int], list[int]]] = {
    "all right": ([10, 50, 90, 100], [1, 1, 1, 1]),
    "all wrong": ([0, 10, 50, 90], [0, 0, 0, 0]),
    "one right": ([70], [1]),
    "all at 0%, right": ([0, 0], [1, 1]),
    "all at 0%, mixed": ([0, 0, 0], [0, 1, 0]),
    "all at 100%, wrong": ([100, 100], [0, 0]),
    "all at 100%, mixed": ([100, 100, 100], [1, 0, 1]),
    "certain and right": ([0, 100, 0, 100], [0, 1, 0, 1]),
    "every edge wrong": (list(range(0, 101, 10)), [0] * 11),
    "every edge alternating": (list(range(0, 101, 10)), [0, 1] * 5 + [1]),
    "edges and their neighbours": (
        [29, 30, 31, 59, 60, 61, 69, 70, 71, 99, 100],
        [0, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1],
    ),
    "everything tied": ([60] * 7, [1, 0, 1, 1, 0, 0, 1]),
    "two ties": ([20] * 4 + [80] * 5, [0, 1, 0, 0, 1, 1, 0, 1, 1]),
    "every percent": (list(range(101)), [i % 3 % 2 for i in range(101)]),
}


class Exact:
    """The metrics of percents in rational arithmetic, written from their definitions; None where undefined."""

    def __init__(self, percent: np.ndarray, correct: np.ndarray) -> None:
        self.c = [Fraction(int(p), 100) for p in percent]
        self.y = [int(y) for y in correct]
        self.n = len(self.c)

    def bins(self, bin_of: Callable[[Fraction], object]) -> list[tuple[int, Fraction, Fraction]]:
        """Size, accuracy and mean confidence of every non-empty bin."""
        bins: dict[object, list[int]] = {}
        for i, c in enumerate(self.c):
            bins.setdefault(bin_of(c), []).append(i)
        return [
            (len(b), Fraction(sum(self.y[i] for i in b), len(b)), sum(self.c[i] for i in b) / len(b))
            for b in bins.values()
        ]

    def uniform(self) -> list[tuple[int, Fraction, Fraction]]:
        """Ten bins [b / 10, (b + 1) / 10), the last one closed."""
        return self.bins(lambda c: min(9, c.numerator * 10 // c.denominator))

    def quantile(self) -> list[tuple[int, Fraction, Fraction]]:
        """Bins at numpy.quantile's linear interpolation, exactly."""
        ordered = sorted(self.c)
        edges = []
        for k in range(1, 10):
            position = Fraction(k * (self.n - 1), 10)
            low = position.numerator // position.denominator
            high = min(low + 1, self.n - 1)
            edges.append(ordered[low] + (position - low) * (ordered[high] - ordered[low]))
        return self.bins(lambda c: sum(edge <= c for edge in edges))

    def auroc(self) -> Fraction | None:
        correct = [c for c, y in zip(self.c, self.y, strict=True) if y]
        wrong = [c for c, y in zip(self.c, self.y, strict=True) if not y]
        if not correct or not wrong:
            return None
        won = sum(Fraction(int(a > b) * 2 + int(a == b), 2) for a in correct for b in wrong)
        return won / (len(correct) * len(wrong))

    def aurc(self) -> Fraction:
        """The mean of the error rate of the k most confident, expected over random orders within ties."""
        errors = [Fraction(0)]
        for level in sorted(set(self.c), reverse=True):
            tied = [1 - y for c, y in zip(self.c, self.y, strict=True) if c == level]
            start = errors[-1]
            errors += [start + Fraction(sum(tied) * j, len(tied)) for j in range(1, len(tied) + 1)]
        return sum(errors[k] / k for k in range(1, self.n + 1)) / self.n

    def values(self) -> dict[str, Fraction | None]:
        """All metrics but the logarithmic loss and the smooth error, by name."""
        mean, accuracy = sum(self.c) / self.n, Fraction(sum(self.y), self.n)
        levels = self.bins(lambda c: c)
        gaps = [abs(acc - conf) for _, acc, conf in self.quantile()]
        return {
            "n": Fraction(self.n),
            "ece": sum(Fraction(n, self.n) * abs(acc - conf) for n, acc, conf in self.uniform()),
            "ace": sum(gaps) / len(gaps),
            "mce": max(abs(acc - conf) for _, acc, conf in self.uniform()),
            "brier": sum((c - y) ** 2 for c, y in zip(self.c, self.y, strict=True)) / self.n,
            "brier_reliability": sum(n * (conf - acc) ** 2 for n, acc, conf in levels) / self.n,
            "brier_resolution": sum(n * (acc - accuracy) ** 2 for n, acc, _ in levels) / self.n,
            "brier_uncertainty": accuracy * (1 - accuracy),
            "auroc": self.auroc(),
            "aurc": self.aurc(),
            "mean_confidence": mean,
            "overconfidence": mean - accuracy,
            "parse_failure_rate": Fraction(0),
            "parsed_accuracy": accuracy,
        }
