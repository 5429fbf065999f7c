"""The default describer: rules on parts of speech that find the objects of a question and its answer.

The form of the question ("Is there a X", "What colour is the X", "How many X", "What is the man holding?") decides whether
the answer names an object and whether an object is absent. The objects are the remaining noun phrases, except for those that
name nothing visible: parts of the picture ("left side"), attributes ("colour"), times, moods and counts.
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
    NO_OBJECT,
    PICTURE,
    VAGUE,
)
from vlm_calibration.text.labels import asked_existence

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
"""Maximum words of an attribute's value; a longer answer names objects as well."""
_CLAUSE_ENDS = frozenset({",", ".", ";", ":", "!", "?", "but", "only"})


class RuleDescriber(Describer):
    """Finds key objects by rules, in microseconds and without a model.

    Args:
        max_phrases: maximum number of objects per query; the first ones mentioned are taken.

    Raises:
        DataError: the tagger is not installed; raised before a detector or a segmenter is loaded.
    """

    def __init__(self, max_phrases: int = 8) -> None:
        super().__init__(max_phrases)
        check_tagger()

    def describe(self, queries: Sequence[Query], images: Sequence[np.ndarray]) -> list[Description]:
        """The key objects of each query from its question and answer; the images are not used."""
        return [self.describe_pair(q.question, q.answer) for q in queries]

    def describe_pair(self, question: str, answer: str) -> Description:
        """The key objects of one question with its answer."""
        question, answer = _resolve_choice(question.strip(), answer.strip())
        question = _ASIDES.sub(" ", question)
        words = tag(question)
        verdict = _YES_NO.match(answer)
        statement = answer[verdict.end() :] if verdict else answer
        in_question = list(_object_phrases(words))
        absent: list[str] = []
        subject = _existence_subject(question, words, in_question)
        # "Is there no dog?" reverses the answer.
        if subject and verdict and (verdict[1].lower() in ("no", "false")) != (subject.before == "no"):
            absent.append(_phrase_text(subject, words))
            in_question = [p for p in in_question if p.first != subject.first]
        answer_words = tag(statement) if verdict or _answer_names_objects(question, statement) else ()
        in_answer = list(_object_phrases(answer_words))
        negated = [p for p in in_answer if _is_negated(answer_words, p)]
        absent += [_phrase_text(p, answer_words) for p in negated]
        in_answer = [p for p in in_answer if p not in negated]
        if in_answer:
            in_question = _drop_answered(words, in_question, bool(verdict))
        objects = [
            *(_phrase_text(p, words) for p in in_question),
            *(_phrase_text(p, answer_words) for p in in_answer),
        ]
        return self.build_description(objects, absent)


def _resolve_choice(question: str, answer: str) -> tuple[str, str]:
    """Split a multiple-choice question from its options, and replace the answer's letter by the option."""
    if heading := _OPTIONS.search(question):
        question, listing = question[: heading.start()], question[heading.end() :]
    elif (first := _OPTION.search(question)) and len(_OPTION.findall(question)) > 1:
        question, listing = question[: first.start()], question[first.start() :]
    else:
        return question, answer
    parts = _OPTION.split(listing)
    options = {(parts[i] or parts[i + 1]): parts[i + 2].strip(" .;,\n") for i in range(1, len(parts) - 2, 3)}
    return question, options.get(answer.strip("(). "), answer)


def _object_phrases(words: Sequence[Word]) -> Iterator[NounPhrase]:
    """The noun phrases that name visible objects; "herd of elephants" yields "elephants"."""
    phrases = noun_phrases(words)
    for i, phrase in enumerate(phrases):
        if i and phrases[i - 1].head in CONTAINERS and _are_joined_by_of(words, phrases[i - 1], phrase):
            continue
        grouped = (
            i + 1 < len(phrases)
            and phrase.head in GROUPS
            and _are_joined_by_of(words, phrase, phrases[i + 1])
        )
        if not grouped and phrase.head not in NO_OBJECT and not _has_other_sense(words, phrase):
            yield phrase


def _has_other_sense(words: Sequence[Word], phrase: NounPhrase) -> bool:
    """Whether a noun names no object in this context: "not orange", "playing football", "looking at the camera"."""
    earlier = words[: phrase.first]
    if phrase.head in LOOKS and phrase.last - phrase.first == 1 and earlier:
        is_predicate = earlier[-1].tag.startswith(("VB", "XX", "AV")) and earlier[-1].text != "there"
        return is_predicate or _is_material(earlier)
    if phrase.head in BALLS:
        return not earlier or earlier[-1].text in ("play", "plays", "played", "playing", "watching")
    if phrase.head in ("camera", "cameras"):
        return any(w.text in ("at", "for", "toward", "towards", "facing") for w in earlier[-2:])
    return _is_material(earlier)


def _is_material(earlier: Sequence[Word]) -> bool:
    """Whether the words introduce a material: "made of ..."."""
    made = next((i for i in reversed(range(len(earlier))) if earlier[i].text == "made"), None)
    return made is not None and all(
        w.text in ("of", "out", "from", ",") or w.tag.startswith(("CJC", "NN", "AJ"))
        for w in earlier[made + 1 :]
    )


def _are_joined_by_of(words: Sequence[Word], first: NounPhrase, second: NounPhrase) -> bool:
    """Whether the text reads "first of second", with at most an article between."""
    between = [w.text for w in words[first.last : second.first]]
    return bool(between) and between[0] == "of" and len(between) <= 2


def _phrase_text(phrase: NounPhrase, words: Sequence[Word]) -> str:
    """The phrase as a detector prompt, a container with its content: "cup of coffee"."""
    text = phrase.text(VAGUE)
    if phrase.head in CONTAINERS:
        for content in noun_phrases(words):
            if content.first > phrase.first and _are_joined_by_of(words, phrase, content):
                return f"{text} of {content.text(VAGUE)}"
    return text


def _existence_subject(
    question: str, words: Sequence[Word], phrases: Sequence[NounPhrase]
) -> NounPhrase | None:
    """The object whose presence the question asks for; None for a question about a number or about "direct contact"."""
    if asked_existence(question) is None or not phrases:
        return None
    first = next(p for p in noun_phrases(words) if p.head not in PICTURE)
    return None if first.head in NO_OBJECT and not _are_joined_by_of(words, first, phrases[0]) else phrases[0]


def _answer_names_objects(question: str, answer: str) -> bool:
    """Whether nouns of the answer are objects in the image rather than text, an attribute or an activity."""
    words = tag(question)
    texts = [w.text for w in words]
    if len(tag(answer)) == 1 and "doing" in texts and answer.rstrip(".").endswith("ing"):
        return False
    if not texts or _MADE_OF.search(question.lower()):
        return not texts
    if texts[0] == "how":
        # "How many" and "how old" ask for a number or a degree.
        return not (len(words) > 1 and (texts[1] in ("many", "much") or words[1].tag.startswith("AJ")))
    if texts[0] in ("what", "which") and _READS_TEXT.search(question.lower()):
        return False
    subject = _asked_kind(words)
    return subject is None or subject.head not in ATTRIBUTES or len(tag(answer)) > LONGEST_VALUE


def _asked_kind(words: Sequence[Word]) -> NounPhrase | None:
    """The noun that "what" or "which" asks for: "animal" in "What kind of animal ...", "colour" in "What is the colour ..."."""
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
    if first.head in GENERIC and len(phrases) > 1 and _are_joined_by_of(words, first, phrases[1]):
        return phrases[1]
    return first


def _drop_answered(words: Sequence[Word], phrases: list[NounPhrase], yes_no: bool) -> list[NounPhrase]:
    """The question's phrases without those that the answer names: "animal" in "What animal ...", and alternatives."""
    kind = _asked_kind(words)
    if kind is not None:
        phrases = [p for p in phrases if p.first != kind.first]
    if not yes_no and not any(w.tag == "AJC" for w in words):
        alternatives = {
            p.first
            for first, second in pairwise(phrases)
            if "or" in [w.text for w in words[first.last : second.first]]
            for p in (first, second)
        }
        phrases = [p for p in phrases if p.first not in alternatives]
    return phrases


def _is_negated(words: Sequence[Word], phrase: NounPhrase) -> bool:
    """Whether a negation in the same clause precedes the phrase, with no other phrase between."""
    earlier = [p.last for p in noun_phrases(words) if p.last <= phrase.first]
    for word in reversed(words[max(earlier, default=0) : phrase.first]):
        if word.text in _NEGATIONS:
            return True
        if word.text in _CLAUSE_ENDS:
            return False
    return False
