"""Which objects a question and its answer are about, by rules on parts of speech: the default describer.

The known forms of question ("Is there a X", "What colour is the X", "How many X", "What is the man holding?") decide whether
the answer names an object, and whether an object is said to be absent. What remains are noun phrases, less those that name no
thing one could point at: parts of the picture ("left side"), attributes ("colour"), times, moods and counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from vlm_calibration.records import Query
from vlm_calibration.regions.describer import Describer, Description
from vlm_calibration.regions.tagger import NounPhrase, Word, check_tagger, noun_phrases, tag
from vlm_calibration.regions.words import (
    ATTRIBUTES,
    BALLS,
    CONTAINERS,
    GENERIC,
    GROUPS,
    LOOKS,
    NO_THING,
    PICTURE,
    VAGUE,
)

_EXISTENCE = re.compile(
    r"(?:is|are|was|were)(?:n['’]t)? there\b|(?:is|are) (?:an?|any|some|the)\b.*\b(?:visible|present|shown|depicted)\b|any\b"
    r"|(?:can|could|do|did) (?:you|we|i) (?:see|spot|find|notice|observe|detect|identify)\b"
    r"|(?:does|do|did) (?:the|this|that) (?:image|picture|photo|photograph|scene)s? (?:show|contain|have|include|feature|depict)\b"
)
_COUNTED = re.compile(
    r"(?:only|exactly|more|fewer|less|at least|at most|\d+|one|two|three|four|five|six|seven|eight|nine|ten)\b"
)
_READS_TEXT = re.compile(
    r"\b(?:say|says|read|reads|written|spell|spells|spelled)\b|\b(?:brand|name|word|letter|number|text|logo|title)s?\b"
)
_MADE_OF = re.compile(r"\bmade (?:of|from|out of)\b")
_YES_NO = re.compile(r"\s*(yes|no|true|false)\b[\s.,;:!]*", re.IGNORECASE)
_ASIDES = re.compile(
    r"\b(?:true or false|yes or no|is (?:this|that|it) (?:correct|true|right)|(?:does )?the (?:sentence|caption|statement))\b\W*",
    re.IGNORECASE,
)
_OPTION = re.compile(r"\(([A-Z])\)|(?<!\w)([A-Z])[.):](?=\s)")
_OPTIONS = re.compile(r"\b(?:options|choices)\s*:", re.IGNORECASE)
_NEGATIONS = frozenset({"no", "not", "n't", "never", "without", "neither", "nor"})
LONGEST_VALUE = 4
"""An answer of more words says more than the value of an attribute."""
_CLAUSE_ENDS = frozenset({",", ".", ";", ":", "!", "?", "but", "only"})


class RuleDescriber(Describer):
    """Key objects by rules, in microseconds and without a model to load.

    Args:
        max_phrases: at most so many objects a query, the first ones mentioned.

    Raises:
        DataError: the tagger is not installed; said before a detector or a segmenter is loaded.
    """

    def __init__(self, max_phrases: int = 8) -> None:
        super().__init__(max_phrases)
        check_tagger()

    def describe(self, queries: Sequence[Query], images: Sequence[np.ndarray]) -> list[Description]:
        """By question and answer alone: the images are not looked at."""
        return [self.describe_pair(q.question, q.answer) for q in queries]

    def describe_pair(self, question: str, answer: str) -> Description:
        """The key objects of one question with its answer."""
        question, answer = _choose(question.strip(), answer.strip())
        question = _ASIDES.sub(" ", question)
        words = tag(question)
        verdict = _YES_NO.match(answer)
        statement = answer[verdict.end() :] if verdict else answer
        asked = list(_things(words))
        absent: list[str] = []
        existing = _existential(question, words, asked)
        # "Is there no dog?" is answered the other way round.
        if existing and verdict and (verdict[1].lower() in ("no", "false")) != (existing.before == "no"):
            absent.append(_phrase(existing, words))
            asked = [p for p in asked if p.first != existing.first]
        named = tag(statement) if verdict or _answer_names_things(question, statement) else ()
        told = list(_things(named))
        denied = [p for p in told if _is_negated(named, p)]
        absent += [_phrase(p, named) for p in denied]
        told = [p for p in told if p not in denied]
        asked = _settled(words, asked, bool(told), bool(verdict))
        objects = [*(_phrase(p, words) for p in asked), *(_phrase(p, named) for p in told)]
        return self.tidy(objects, absent)


def _choose(question: str, answer: str) -> tuple[str, str]:
    """A multiple-choice question without its options, and the option that was chosen."""
    if listed := _OPTIONS.search(question):
        question, listing = question[: listed.start()], question[listed.end() :]
    elif (first := _OPTION.search(question)) and len(_OPTION.findall(question)) > 1:
        question, listing = question[: first.start()], question[first.start() :]
    else:
        return question, answer
    parts = _OPTION.split(listing)
    options = {(parts[i] or parts[i + 1]): parts[i + 2].strip(" .;,\n") for i in range(1, len(parts) - 2, 3)}
    return question, options.get(answer.strip("(). "), answer)


def _things(words: Sequence[Word]) -> Iterator[NounPhrase]:
    """The noun phrases that name things, "herd of elephants" as the elephants."""
    phrases = noun_phrases(words)
    for i, phrase in enumerate(phrases):
        if i and phrases[i - 1].head in CONTAINERS and _of(words, phrases[i - 1], phrase):
            continue
        grouped = i + 1 < len(phrases) and phrase.head in GROUPS and _of(words, phrase, phrases[i + 1])
        if not grouped and phrase.head not in NO_THING and not _is_meant_otherwise(words, phrase):
            yield phrase


def _is_meant_otherwise(words: Sequence[Word], phrase: NounPhrase) -> bool:
    """Whether a noun is no thing in this place: "orange" of "not orange", football that is played, the camera looked at."""
    earlier = words[: phrase.first]
    if phrase.head in LOOKS and phrase.last - phrase.first == 1 and earlier:
        said_of_it = earlier[-1].tag.startswith(("VB", "XX", "AV")) and earlier[-1].text != "there"
        return said_of_it or _is_material(earlier)
    if phrase.head in BALLS:
        return not earlier or earlier[-1].text in ("play", "plays", "played", "playing", "watching")
    if phrase.head in ("camera", "cameras"):
        return any(w.text in ("at", "for", "toward", "towards", "facing") for w in earlier[-2:])
    return _is_material(earlier)


def _is_material(earlier: Sequence[Word]) -> bool:
    """Whether what follows these words is what something is made of."""
    made = next((i for i in reversed(range(len(earlier))) if earlier[i].text == "made"), None)
    return made is not None and all(
        w.text in ("of", "out", "from", ",") or w.tag.startswith(("CJC", "NN", "AJ"))
        for w in earlier[made + 1 :]
    )


def _of(words: Sequence[Word], left: NounPhrase, right: NounPhrase) -> bool:
    """Whether it says `left` of `right`, with at most an article between."""
    between = [w.text for w in words[left.last : right.first]]
    return bool(between) and between[0] == "of" and len(between) <= 2


def _phrase(phrase: NounPhrase, words: Sequence[Word]) -> str:
    text = phrase.text(VAGUE)
    if phrase.head in CONTAINERS:
        for content in noun_phrases(words):
            if content.first > phrase.first and _of(words, phrase, content):
                return f"{text} of {content.text(VAGUE)}"
    return text


def _existential(question: str, words: Sequence[Word], asked: Sequence[NounPhrase]) -> NounPhrase | None:
    """The first thing whose presence the question asks for; none where it asks for a number, or for "direct contact"."""
    found = _EXISTENCE.match(question.lower())
    if found is None or not asked or _COUNTED.match(question.lower()[found.end() :].strip()):
        return None
    first = next(p for p in noun_phrases(words) if p.head not in PICTURE)
    return None if first.head in NO_THING and not _of(words, first, asked[0]) else asked[0]


def _answer_names_things(question: str, answer: str) -> bool:
    """Whether nouns of the answer are things in the image, rather than text, an attribute or an activity."""
    words = tag(question)
    texts = [w.text for w in words]
    if len(tag(answer)) == 1 and "doing" in texts and answer.rstrip(".").endswith("ing"):
        return False
    if not texts or _MADE_OF.search(question.lower()):
        return not texts
    if texts[0] == "how":
        # "How many", "how old": a number or a degree.
        return not (len(words) > 1 and (texts[1] in ("many", "much") or words[1].tag.startswith("AJ")))
    if texts[0] in ("what", "which") and _READS_TEXT.search(question.lower()):
        return False
    subject = _asked_kind(words)
    return subject is None or subject.head not in ATTRIBUTES or len(tag(answer)) > LONGEST_VALUE


def _asked_kind(words: Sequence[Word]) -> NounPhrase | None:
    """The noun that "what" or "which" goes with: "kind of animal" of "What kind of animal ...", "colour" of "What is the colour ..."."""
    wh = next((i for i, w in enumerate(words) if w.text in ("what", "which")), None)
    if wh is None:
        return None
    phrases = [p for p in noun_phrases(words) if p.first > wh]
    if not phrases:
        return None
    first = phrases[0]
    between = [w.text for w in words[wh + 1 : first.first]]
    if between and between not in (["is", "the"], ["are", "the"], ["'s", "the"]):
        return None
    if between and first.head not in ATTRIBUTES | GENERIC:
        return None
    if first.head in GENERIC and len(phrases) > 1 and _of(words, first, phrases[1]):
        return phrases[1]
    return first


def _settled(
    words: Sequence[Word], asked: list[NounPhrase], answered: bool, yes_no: bool
) -> list[NounPhrase]:
    """What the question asks about, less what the answer puts a name to."""
    if not answered:
        return asked
    kind = _asked_kind(words)
    if kind is not None:
        asked = [p for p in asked if p.first != kind.first]
    if not yes_no and not any(w.tag == "AJC" for w in words):
        alternatives = {
            p.first
            for left, right in pairwise(asked)
            if "or" in [w.text for w in words[left.last : right.first]]
            for p in (left, right)
        }
        asked = [p for p in asked if p.first not in alternatives]
    return asked


def _is_negated(words: Sequence[Word], phrase: NounPhrase) -> bool:
    """Whether a negation in the same clause stands before the phrase, with no other phrase between."""
    earlier = [p.last for p in noun_phrases(words) if p.last <= phrase.first]
    for word in reversed(words[max(earlier, default=0) : phrase.first]):
        if word.text in _NEGATIONS:
            return True
        if word.text in _CLAUSE_ENDS:
            return False
    return False
