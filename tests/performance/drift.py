"""How often `vlm-calibration monitor` gives a false alarm, and how soon it notices a drift: `python -m tests.performance.drift`.

The first table is simulated: reference and new answers from one source, in which the confidences about an image are alike with a given
correlation; the bar is 5% at each number of questions an image. The second has the parts of a demo evaluation (`make demo`) against its calibration
set and against the easy scenes of that: the number of new images at which half and nine tenths of the calls raise the alarm. A call gets one
answer about each of these images, which are drawn from the part with replacement.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlm_calibration.demo.source import SHIFTS
from vlm_calibration.estimators.predictions import CALIBRATION, PREDICTIONS, read_predictions
from vlm_calibration.metrics.drift import drift_test
from vlm_calibration.reporting.report.thresholds import one_an_image

ERROR = 0.05
LEVELS = np.array([math.nan, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
SHARES = np.array([0.02, 0.05, 0.08, 0.10, 0.20, 0.25, 0.20, 0.10])
SIZES = (5, 7, 10, 13, 17, 22, 28, 36, 46, 60, 77, 100, 130, 170, 220)


class Asked(NamedTuple):
    id: str
    image: str
    confidence: float


def alarm(reference: Sequence[float], new: Sequence[float], permutations: int = 199) -> bool:
    return drift_test(np.array(reference), np.array(new), permutations).p_value <= ERROR


def drawn(rng: np.random.Generator, images: int, questions: int, correlation: float) -> list[float]:
    """The confidences that count among those about some images."""
    shared = np.repeat(rng.choice(LEVELS, (images, 1), p=SHARES), questions, 1)
    own = rng.choice(LEVELS, (images, questions), p=SHARES)
    stated = np.where(rng.random((images, questions)) < math.sqrt(correlation), shared, own)
    rows = [Asked(f"{i}-{j}", str(i), c) for i, of_image in enumerate(stated) for j, c in enumerate(of_image)]
    return [row.confidence for row in one_an_image(rows)]


def false_alarms(questions: int, correlation: float, draws: int) -> float:
    """The share of calls with 100 images on each side that give an alarm."""
    rng = np.random.default_rng([questions, int(100 * correlation)])
    calls = ([drawn(rng, 100, questions, correlation) for _ in range(2)] for _ in range(draws))
    return sum(alarm(*sides) for sides in calls) / draws


def images_needed(reference: Sequence[float], part: Sequence[float], draws: int) -> list[str]:
    """How many new images it takes that half, and nine tenths, of the calls raise the alarm; "-" if more than were tried."""
    needed: dict[float, int] = {}
    for n in SIZES:
        rngs = map(np.random.default_rng, range(draws))
        share = sum(alarm(reference, rng.choice(part, n).tolist()) for rng in rngs) / draws
        for part_of_calls in (0.5, 0.9):
            if share >= part_of_calls:
                needed.setdefault(part_of_calls, n)
        if 0.9 in needed:
            break
    return [str(needed.get(share, "-")) for share in (0.5, 0.9)]


def of_demo(folder: Path, draws: int) -> list[str]:
    """The second table."""

    def confidence(value: float | None) -> float:
        return math.nan if value is None else value

    parts: dict[str, list[float]] = defaultdict(list)
    for p in read_predictions(folder / PREDICTIONS):
        first, *others = (p.category or "").split("/")
        parts[next((o for o in others if o in SHIFTS), first)].append(confidence(p.confidence))
    counted = one_an_image(read_predictions(folder / CALIBRATION))
    mix = [confidence(p.confidence) for p in counted]
    easy = [confidence(p.confidence) for p in counted if (p.category or "").startswith("clean")]
    lines = ["| part | against the calibration set | against its easy scenes |", "|---|---|---|"]
    for name, part in parts.items():
        cells = [" / ".join(images_needed(reference, part, draws)) for reference in (mix, easy)]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--evaluation", type=Path, default=Path("runs/eval/dpo"))
    parser.add_argument("--draws", type=int, default=400)
    args = parser.parse_args()
    print("| questions an image | correlation | false alarms |\n|---:|---:|---:|")
    for questions in (1, 4, 18):
        for correlation in (0.0, 0.25):
            rate = false_alarms(questions, correlation, args.draws)
            print(f"| {questions} | {correlation} | {rate:.1%} |", flush=True)
    if (args.evaluation / CALIBRATION).is_file():
        print("\n" + "\n".join(of_demo(args.evaluation, args.draws)))
    else:
        print(f"\n{args.evaluation}: no demo evaluation; `make demo` makes one")


if __name__ == "__main__":
    main()
