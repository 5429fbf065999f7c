"""Precision and recall of the key object phrases, on question-response pairs labelled by hand (`phrases.jsonl`).

Run with `python -m tests.performance.phrases`; it prints both parts of the file, and each form of `phrase_forms.py` by itself;
`--misses` lists what went wrong in the development part. The labels were written
before the rules, by these rules of their own: an object is what one can point at, with the adjectives and nouns that go with it
but without articles and numbers; so the image and its sides, colours, counts, times, activities and what is written
somewhere are none. "Cup of coffee" is one object, "herd of elephants" is "elephants". What the answer puts a name to ("What
animal ...?" - "cat") counts by that name. `absent` is what the answer says is not there. The rules were made to
fit the development part, three of whose labels were then corrected to follow the rules above; the held-out part was measured
only. Both parts are by one author, who wrote the rules as well: questions of real users will fare worse.
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


class Pair(NamedTuple):
    """One line of the file: a question with its response, and what is to be found."""

    part: str
    form: str
    question: str
    answer: str
    objects: tuple[str, ...]
    absent: tuple[str, ...]


class Agreement(NamedTuple):
    """Counts of phrases: found and labelled, found, labelled; and of pairs without any error, and of pairs."""

    both: int = 0
    found: int = 0
    labelled: int = 0
    whole: int = 0
    pairs: int = 0

    @property
    def precision(self) -> float:
        return self.both / max(1, self.found)

    @property
    def recall(self) -> float:
        return self.both / max(1, self.labelled)


def read_pairs(path: Path = PAIRS) -> list[Pair]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Pair(**{**row, "objects": tuple(row["objects"]), "absent": tuple(row["absent"])}) for row in rows]


def head(phrase: str) -> str:
    """The noun that the phrase is about: "bicycle" of "red bicycle", "cup" of "cup of coffee"."""
    return phrase.split(" of ")[0].split()[-1]


def agreement(found: Iterable[Sequence[str]], labelled: Iterable[Sequence[str]]) -> Agreement:
    rows = [
        (len(set(f) & set(t)), len(set(f)), len(set(t)), set(f) == set(t))
        for f, t in zip(found, labelled, strict=True)
    ]
    return Agreement(*(sum(column) for column in zip(*rows, strict=True)), len(rows))


def measure(part: str) -> dict[str, Agreement]:
    """Of the objects and of what is absent; phrases must agree word for word, or in their heads only."""
    pairs = [p for p in read_pairs() if p.part == part]
    describer = RuleDescriber()
    described = [describer.describe_pair(p.question, p.answer) for p in pairs]
    objects, wanted = [d.objects for d in described], [p.objects for p in pairs]
    heads = [[[head(p) for p in row] for row in rows] for rows in (objects, wanted)]
    return {
        "objects, whole phrase": agreement(objects, wanted),
        "objects, head noun": agreement(*heads),
        "absent, whole phrase": agreement([d.absent for d in described], [p.absent for p in pairs]),
    }


def form_pairs(form: Form, part: str) -> list[Pair]:
    """A form filled in with every object of a part."""
    return [Pair(part, *asked) for asked in fill(form, part)]


def misses(pairs: Iterable[Pair]) -> list[tuple[Pair, Description]]:
    """The pairs whose objects, or what is absent, are not those that are labelled, with what was found."""
    describer = RuleDescriber()
    described = [(pair, describer.describe_pair(pair.question, pair.answer)) for pair in pairs]
    return [
        (pair, found)
        for pair, found in described
        if set(found.objects) != set(pair.objects) or set(found.absent) != set(pair.absent)
    ]


def print_forms(part: str) -> None:
    print(f"\n| form, {part} | for example | without error |\n|---|---|---|")
    for form in FORMS[part]:
        pairs = form_pairs(form, part)
        right = len(pairs) - len(misses(pairs))
        print(f"| {form.name} | {pairs[0].question} | {right / len(pairs):.3f} ({right}/{len(pairs)}) |")


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
        "--misses", nargs="?", const=PARTS[0], choices=PARTS, help="list the pairs that went wrong"
    )
    args = parser.parse_args()
    print("| part | | precision | recall | pairs without error |\n|---|---|---|---|---|")
    for part in PARTS:
        for name, a in measure(part).items():
            shown = f"{a.precision:.3f} ({a.both}/{a.found}) | {a.recall:.3f} ({a.both}/{a.labelled})"
            print(f"| {part} | {name} | {shown} | {a.whole}/{a.pairs} |")
    for part in PARTS:
        print_forms(part)
    if args.misses:
        print_misses(args.misses)


if __name__ == "__main__":
    main()
