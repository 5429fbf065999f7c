"""Precision and recall of the key object phrases on hand-labelled question-response pairs (`phrases.jsonl`).

`python -m tests.performance.phrases` prints both parts of the file and each form of `phrase_forms.py`; `--misses` lists the errors
in the development part. The labels were written before the rules, with these guidelines: an object is anything that one can point
at, with its adjectives and nouns and without articles and numbers. The image and its sides, colours, counts, times, activities and
written text are not objects. "Cup of coffee" is one object, "herd of elephants" is "elephants". An object that the answer names
("What animal ...?" - "cat") has that name. `absent` lists objects that are not in the image according to the answer. The rules were
developed on the development part, of which three labels were corrected later to follow the guidelines; the held-out part was only
measured. One author wrote both parts and the rules, so accuracy on questions of real users will be lower.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from vlm_calibration.regions.describer import Description
from vlm_calibration.regions.phrases import RuleDescriber

from .phrase_forms import FORMS, Form, fill

PAIRS = Path(__file__).with_name("phrases.jsonl")
PARTS = ("development", "held out")
UNKNOWN = Description(())


class Pair(NamedTuple):
    """One line of the file: a question with its answer and the expected phrases.

    Attributes:
        part: "development" or "held out".
        form: the question's form.
        question: the question.
        answer: the answer.
        objects: expected objects.
        absent: expected absent objects.
    """

    part: str
    form: str
    question: str
    answer: str
    objects: tuple[str, ...]
    absent: tuple[str, ...]


class Agreement(NamedTuple):
    """Counts of phrases and pairs.

    Attributes:
        correct: phrases that are found and labelled.
        found: phrases found.
        labelled: phrases labelled.
        exact: pairs without an error.
        pairs: all pairs.
    """

    correct: int = 0
    found: int = 0
    labelled: int = 0
    exact: int = 0
    pairs: int = 0

    @property
    def precision(self) -> float:
        return self.correct / max(1, self.found)

    @property
    def recall(self) -> float:
        return self.correct / max(1, self.labelled)


def read_pairs(path: Path = PAIRS) -> list[Pair]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Pair(**{**row, "objects": tuple(row["objects"]), "absent": tuple(row["absent"])}) for row in rows]


def head(phrase: str) -> str:
    """The head noun of a phrase: "bicycle" in "red bicycle", "cup" in "cup of coffee"."""
    return phrase.split(" of ")[0].split()[-1]


def agreement(found: Iterable[Sequence[str]], labelled: Iterable[Sequence[str]]) -> Agreement:
    rows = [
        (len(set(f) & set(t)), len(set(f)), len(set(t)), set(f) == set(t))
        for f, t in zip(found, labelled, strict=True)
    ]
    return Agreement(*(sum(column) for column in zip(*rows, strict=True)), len(rows))


def measure(part: str) -> dict[str, Agreement]:
    """Agreement of objects and of absent objects; phrases must match exactly, or in their head nouns."""
    pairs = [p for p in read_pairs() if p.part == part]
    describer = RuleDescriber()
    described = [describer.describe_pair(p.question, p.answer) or UNKNOWN for p in pairs]
    objects, expected = [d.objects for d in described], [p.objects for p in pairs]
    heads = [[[head(p) for p in row] for row in rows] for rows in (objects, expected)]
    return {
        "objects, whole phrase": agreement(objects, expected),
        "objects, head noun": agreement(*heads),
        "absent, whole phrase": agreement([d.absent for d in described], [p.absent for p in pairs]),
    }


def form_pairs(form: Form, part: str) -> list[Pair]:
    """A form filled in with each object of a part."""
    return [Pair(part, *asked) for asked in fill(form, part)]


def unknown(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that the rules leave to another describer."""
    describer = RuleDescriber()
    return [pair for pair in pairs if describer.describe_pair(pair.question, pair.answer) is None]


def misses(pairs: Iterable[Pair]) -> list[tuple[Pair, Description]]:
    """The pairs with an error, and their descriptions; those that the rules do not know are no errors."""
    describer = RuleDescriber()
    described = [(pair, describer.describe_pair(pair.question, pair.answer)) for pair in pairs]
    return [
        (pair, description)
        for pair, description in described
        if description is not None
        and (set(description.objects) != set(pair.objects) or set(description.absent) != set(pair.absent))
    ]


def print_forms(part: str) -> None:
    print(f"\n| form, {part} | for example | without error | not known |\n|---|---|---|---|")
    for form in FORMS[part]:
        pairs = form_pairs(form, part)
        exact, other = len(pairs) - len(misses(pairs)), len(unknown(pairs))
        print(
            f"| {form.name} | {pairs[0].question} | {exact / len(pairs):.3f} ({exact}/{len(pairs)}) | {other} |"
        )


def print_misses(part: str) -> None:
    pairs = [pair for pair in read_pairs() if pair.part == part]
    for form in FORMS[part]:
        pairs += form_pairs(form, part)
    for pair, described in misses(pairs):
        print(
            f"{pair.question} | {pair.answer}\n  found    {described}\n  labelled {pair.objects} {pair.absent}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--misses", nargs="?", const=PARTS[0], choices=PARTS, help="list the pairs with an error"
    )
    args = parser.parse_args()
    print("| part | | precision | recall | pairs without error |\n|---|---|---|---|---|")
    for part in PARTS:
        for name, a in measure(part).items():
            cells = f"{a.precision:.3f} ({a.correct}/{a.found}) | {a.recall:.3f} ({a.correct}/{a.labelled})"
            print(f"| {part} | {name} | {cells} | {a.exact}/{a.pairs} |")
    for part in PARTS:
        print_forms(part)
    if args.misses:
        print_misses(args.misses)


if __name__ == "__main__":
    main()
