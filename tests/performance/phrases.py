"""Precision and recall of the key object phrases on hand-labelled question-response pairs (`phrases.jsonl`).

`python -m tests.performance.phrases` prints both parts of the file and each form of `phrase_forms.jsonl`. The labels were written before
the rules, with these guidelines: an object is anything that one can point at, with its adjectives and nouns and without articles and
numbers. The image and its sides, colours, counts, times, activities and written text are not objects. "Cup of coffee" is one object,
"herd of elephants" is "elephants". An object that the answer names ("What animal ...?" - "cat") has that name. `absent` lists objects
that are not in the image according to the answer. The rules were developed on the development part, of which three labels were
corrected later to follow the guidelines; the held-out part was only measured. One author wrote both parts and the rules, so accuracy on
questions of real users will be lower.

A form is a template that is filled in with many objects, so that one that fails for every object is visible: `{x}` is an object, `{xs}` its
plural, `{a}` its article, `{y}` the next object of the list, `{ys}` the plural of that, `{w}` each of the form's words in turn, and `{h}`
the word without its article. The held-out forms were written before the first measurement, with other objects and words.
"""

import json
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from vlm_calibration.regions.describer import Description
from vlm_calibration.regions.phrases import RuleDescriber

PARTS = ("development", "held out")
THINGS = {
    "development": "car, dog, cup, table, door, bus/buses, lake, umbrella, fire hydrant, traffic light, teddy bear, bench/benches",
    "held out": "knife/knives, horse, boat, shirt, bridge, wine glass/wine glasses, parking meter, tennis racket, suitcase, sheep/sheep, "
    "potted plant, box/boxes",
}
"""Objects of each part; "/" separates the plural if it is not the singular with "s"."""
BEINGS = {
    "development": "man/men, woman/women, child/children, person/people, dog, cat, bird, horse, cow, bear, giraffe, lion",
    "held out": "boy, girl, elephant, zebra, sheep/sheep, player, surfer, duck, tiger, lady/ladies, rider, police officer",
}
"""People and animals, for forms with `beings`."""


class Pair(NamedTuple):
    """A question of a form and part with its answer, and the expected phrases."""

    part: str
    form: str
    question: str
    answer: str
    objects: tuple[str, ...]
    absent: tuple[str, ...]


class Agreement(NamedTuple):
    """Numbers of phrases that are found and labelled, found, and labelled."""

    correct: int
    found: int
    labelled: int

    @property
    def precision(self) -> float:
        return self.correct / max(1, self.found)

    @property
    def recall(self) -> float:
        return self.correct / max(1, self.labelled)


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(x) for x in Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()]


def read_pairs() -> list[Pair]:
    rows = _lines("phrases.jsonl")
    return [Pair(**{**row, "objects": tuple(row["objects"]), "absent": tuple(row["absent"])}) for row in rows]


FORMS = _lines("phrase_forms.jsonl")


def filled(form: dict[str, Any], part: str) -> list[Pair]:
    """A form filled in with each object of a part and each of its own words."""
    things = (BEINGS if form.get("beings") else THINGS)[part].split(", ")
    objects = [(name, plural or f"{name}s") for name, _, plural in (thing.partition("/") for thing in things)]
    pairs = []
    for (i, (x, xs)), word in product(enumerate(objects), form.get("words", "").split(", ")):
        y, ys = objects[(i + 1) % len(objects)]
        a, h = "an" if x[0] in "aeiou" else "a", word.removeprefix("an ").removeprefix("a ")
        texts = [[form["question"]], [form["answer"]], form.get("objects", ["{x}"]), form.get("absent", [])]
        [question], [answer], named, absent = (
            tuple(text.format(x=x, xs=xs, a=a, y=y, ys=ys, w=word, h=h) for text in row) for row in texts
        )
        pairs.append(Pair(part, form["name"], question, answer, named, absent))
    return pairs


def measure(part: str) -> dict[str, Agreement]:
    """Agreement of objects and of absent objects; phrases must match exactly."""
    describer = RuleDescriber()
    pairs = [p for p in read_pairs() if p.part == part]
    described = [describer.describe_pair(p.question, p.answer) or Description(()) for p in pairs]

    def agreement(name: str) -> Agreement:
        rows = [(set(getattr(d, name)), set(getattr(p, name))) for d, p in zip(described, pairs, strict=True)]
        counts = ((len(found & labelled), len(found), len(labelled)) for found, labelled in rows)
        return Agreement(*map(sum, zip(*counts, strict=True)))

    return {name: agreement(name) for name in ("objects", "absent")}


def misses(pairs: Iterable[Pair]) -> tuple[list[Pair], list[Pair]]:
    """The pairs with an error, and those that the rules leave to another describer, which are no errors."""
    describer = RuleDescriber()
    wrong, unknown = [], []
    for pair in pairs:
        described = describer.describe_pair(pair.question, pair.answer)
        if described is None:
            unknown.append(pair)
        elif (set(described.objects), set(described.absent)) != (set(pair.objects), set(pair.absent)):
            wrong.append(pair)
    return wrong, unknown


def main() -> None:
    print("| part | | precision | recall |\n|---|---|---|---|")
    for part in PARTS:
        for name, a in measure(part).items():
            cells = f"{a.precision:.3f} ({a.correct}/{a.found}) | {a.recall:.3f} ({a.correct}/{a.labelled})"
            print(f"| {part} | {name} | {cells} |")
    print("\n| part | form | for example | without error | not known |\n|---|---|---|---|---|")
    for form in FORMS:
        pairs = filled(form, form["part"])
        wrong, unknown = misses(pairs)
        about = f"{form['part']} | {form['name']} | {pairs[0].question}"
        print(f"| {about} | {len(pairs) - len(wrong)}/{len(pairs)} | {len(unknown)} |")


if __name__ == "__main__":
    main()
