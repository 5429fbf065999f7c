"""Objects to ask for that are not there, as POPE draws them (Li et al., arXiv 2305.10355, its official `utils.py`).

Over a table of which objects are in which image: *random* takes any absent object, *popular* the most frequent one that is absent,
*adversarial* the one that most often keeps company with the object asked about before. Ties go to what comes first in the
table, and where a rule finds nothing, a random absent object is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

Negatives = Literal["random", "popular", "adversarial"]
Table = Mapping[str, Sequence[str]]
"""Image -> the objects in it, each once."""


class AbsentObjects:
    """Draws absent objects over a table.

    Args:
        table: the images to count in.
    """

    def __init__(self, table: Table) -> None:
        frequency: Counter[str] = Counter()
        company: dict[str, Counter[str]] = {}
        for objects in table.values():
            frequency.update(objects)
            for name in objects:
                company.setdefault(name, Counter()).update(o for o in objects if o != name)
        self.objects = list(frequency)
        self.popular = [name for name, _ in frequency.most_common()]
        self.company = {name: [o for o, _ in others.most_common()] for name, others in company.items()}

    def draw(
        self, kind: Negatives, present: str, taken: Sequence[str], rng: np.random.Generator
    ) -> str | None:
        """An object that is not there, or None if there is no other.

        Args:
            kind: the rule. present: the object that was asked about before it.
            taken: the objects in the image, and those already asked about.
            rng: source of a random choice.
        """
        excluded = set(taken)
        ranked = {"random": [], "popular": self.popular, "adversarial": self.company.get(present, [])}[kind]
        for name in ranked:
            if name not in excluded:
                return name
        free = [name for name in self.objects if name not in excluded]
        return free[int(rng.integers(len(free)))] if free else None
