"""The default describer: rules on parts of speech that find the objects of a question and its answer, and say when they cannot.

The form of the question ("Is there a X", "What colour is the X", "How many X") decides whether the answer names an object and whether an
object is absent. The objects are the remaining noun phrases, except for those that name nothing visible ("left side", "colour").
"""

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from vlm_calibration.records import Query
from vlm_calibration.regions.describer import Describer, Description
from vlm_calibration.regions.tagger import (
    ATTRIBUTES,
    GENERIC,
    NO_OBJECT,
    PICTURE,
    VAGUE,
    NounPhrase,
    Word,
    load_tagger,
    noun_phrases,
    tag,
)
from vlm_calibration.text.labels import asked_existence

_ASKS_VALUE = re.compile(
    r"\Ahow (?:many|much)\b|\bmade\W*\Z|\bdoing\b|\A(?:what|which)\b.*\b(?:says?|reads?|written|spell|spells|spelled)\b"
    r"|\A(?:what|which)\b.*\b(?:brand|name|word|letter|number|text|logo|title)s?\b",
    re.IGNORECASE,
)
_MATERIAL = re.compile(r"\bmade (?:of|from|out of)\b[^?.;]*", re.IGNORECASE)
_YES_NO = re.compile(r"\s*(yes|no|true|false)\b[\s.,;:!]*", re.IGNORECASE)
# Not of "Is a traffic light in the image?", of which it is the predicate.
_IN_IMAGE = re.compile(r"(?<!there) in (?:the|this) (?:image|picture|photo)\b(?=\W*\Z)", re.IGNORECASE)
_INDEFINITE = re.compile(r"\W*(?:is|was) an?\b", re.IGNORECASE)
_CHOICE = re.compile(r"\([A-Z]\)|(?<!\w)[A-Z][.):]\s|\b(?:options|choices)\s*:", re.IGNORECASE)
_NEGATIONS = frozenset({"no", "not", "n't", "never", "without", "neither", "nor"})
_CLAUSE_ENDS = frozenset({",", ".", ";", ":", "!", "?", "but", "only"})


class RuleDescriber(Describer):
    """Finds key objects of English questions by rules, in microseconds.

    Args:
        max_phrases: maximum number of objects per query; the first ones mentioned are taken.
        fallback: names the objects that the rules do not know, such as `PromptedDescriber`; None: nothing does.

    Raises:
        DataError: the tagger is not installed; raised before a detector or a segmenter is loaded.
    """

    def __init__(self, max_phrases: int = 8, fallback: Describer | None = None) -> None:
        super().__init__(max_phrases)
        self.fallback = fallback
        load_tagger()

    def load(self, device: torch.device) -> None:
        if self.fallback is not None:
            self.fallback.load(device)

    def describe(self, queries: Sequence[Query], images: Sequence[np.ndarray]) -> list[Description]:
        """The key objects of each query from its question and answer; the images are for the fallback."""
        described = [self.describe_pair(q.question, q.answer) for q in queries]
        unknown = [i for i, description in enumerate(described) if description is None]
        if self.fallback is not None:
            named = self.fallback.describe([queries[i] for i in unknown], [images[i] for i in unknown])
            for i, description in zip(unknown, named, strict=True):
                described[i] = description
        return [description or Description(()) for description in described]

    def describe_pair(self, question: str, answer: str) -> Description | None:
        """The key objects of one question with its answer; None if the rules do not know them."""
        question, answer = _MATERIAL.sub("made", question.strip()), answer.strip()
        words, known = tag(question if _INDEFINITE.match(question) else _IN_IMAGE.sub("", question))
        if not known:
            words, known = tag(question)  # "Is the stop sign in this image?"
        verdict = _YES_NO.match(answer)
        statement = answer[verdict.end() :] if verdict else answer
        in_question = [p for p in noun_phrases(words) if p.head not in NO_OBJECT]
        absent: list[str] = []
        subject = None  # the object whose presence the question asks for, if it asks for one that can be seen
        if in_question and asked_existence(question) is not None:
            first = next(p for p in noun_phrases(words) if p.head not in PICTURE)
            if first.head not in NO_OBJECT or _of(words, first, in_question[0]):
                subject = in_question[0]
        # "Is there no dog?" reverses the answer.
        if subject and verdict:
            reverses = subject.first > 0 and words[subject.first - 1].text == "no"
            if (verdict[1].lower() in ("no", "false")) != reverses:
                absent.append(_text(subject))
                in_question = [p for p in in_question if p.first != subject.first]
        kind = _asked_kind(words)
        asks_value = _ASKS_VALUE.search(question) or (kind is not None and kind.head in ATTRIBUTES)
        # Nouns of an answer may be a value: text, a number, a material, an attribute or an activity. A longer answer is more.
        names = verdict or not asks_value or len(statement.split()) > 4
        answer_words, answer_known = tag(statement) if names else ((), True)
        if not (known and answer_known) or _CHOICE.search(question):
            return None
        named = [p for p in noun_phrases(answer_words) if p.head not in NO_OBJECT]
        negated = [p for p in named if _is_negated(answer_words, p)]
        absent += [_text(p) for p in negated]
        if in_answer := [p for p in named if p not in negated]:
            # The answer names what is asked for: "animal" in "What animal ...", and one of the alternatives: "a cat or a dog".
            answered = {kind}
            if not verdict and not any(w.tag == "AJC" for w in words):
                for left, right in pairwise(in_question):
                    if "or" in [w.text for w in words[left.last : right.first]]:
                        answered |= {left, right}
            in_question = [p for p in in_question if p not in answered]
        return self.build_description([_text(p) for p in (*in_question, *in_answer)], absent)


def _text(phrase: NounPhrase) -> str:
    """The phrase as a detector prompt."""
    return " ".join([*(text for text in phrase.texts[:-1] if text not in VAGUE), phrase.head])


def _of(words: Sequence[Word], first: NounPhrase, second: NounPhrase) -> bool:
    """Whether the text reads "first of second", with at most an article between."""
    between = [w.text for w in words[first.last : second.first]]
    return between[:1] == ["of"] and len(between) <= 2


def _asked_kind(words: Sequence[Word]) -> NounPhrase | None:
    """The noun that "what" or "which" asks for: "animal" in "What kind of animal ...", "colour" in "What is the colour ..."."""
    wh = next((i for i, w in enumerate(words) if w.text in ("what", "which")), len(words))
    if not (phrases := [p for p in noun_phrases(words) if p.first > wh]):
        return None
    first, between = phrases[0], [w.text for w in words[wh + 1 : phrases[0].first]]
    if between and not (between[1:] == ["the"] and first.head in ATTRIBUTES | GENERIC):
        return None
    is_generic = first.head in GENERIC and len(phrases) > 1 and _of(words, first, phrases[1])
    return phrases[1] if is_generic else first


def _is_negated(words: Sequence[Word], phrase: NounPhrase) -> bool:
    """Whether a negation in the same clause precedes the phrase, with no other phrase between."""
    earlier = max((p.last for p in noun_phrases(words) if p.last <= phrase.first), default=0)
    for word in reversed(words[earlier : phrase.first]):
        if word.text in _NEGATIONS or word.text in _CLAUSE_ENDS:
            return word.text in _NEGATIONS
    return False
