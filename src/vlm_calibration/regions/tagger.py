"""Noun phrases of a text: words, their parts of speech, and the phrases they form.

Parts of speech come from HanTa (C. Wartena, "A Probabilistic Morphology Model for German Lemmatization", KONVENS 2019), a
pure-Python tagger whose package contains its English model, so nothing is downloaded. Tags are the C5 tags of the British
National Corpus.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from vlm_calibration.records import DataError
from vlm_calibration.regions.words import DEGREES, LIGHTS, LOOKS, NO_OBJECT, TAGS, VAGUE

_WORD = re.compile(
    r"n't\b|['’]s?\b|[^\W\d_]+(?:-[^\W\d_]+)*?(?=n't\b)|[^\W\d_]+(?:-[^\W\d_]+)*|\d+(?::\d+)?|[^\w\s]"
)
_NOUN, _ADJECTIVE, _PARTICIPLE = ("NN", "NP"), ("AJ", "ORD"), ("VVN", "VVD", "VVG")
_OPENS = ("AT", "DPS", "DT", "CRD", "AJ", "PRP", "PRF", "CJ", "POS", "PU")
"""Tags of words after which a participle describes the following noun: "the stuffed animals"."""
_BE, _DO = ("VBB", "VBZ", "VBD"), ("VDB", "VDZ", "VDD")
_PRESENT = ("VVI", "VVB", "VVZ")
_FINITE = (*_PRESENT, "VH", "VB", "VD", "VM")
_SPECIFIERS = ("AT", "CRD", "DPS", "DT", "PRF", "XX")
_CONTENT = (*_NOUN, *_ADJECTIVE, *_PARTICIPLE, *_PRESENT)
UNKNOWN = -25.0
"""Log-probability at or below which the tagger guesses a word from its ending."""
MARGIN = 0.95
"""A tag is possible for a word if its log-probability is less than this below the maximum: "dancing" as a verb."""


class Word(NamedTuple):
    """A word of a text.

    Attributes:
        text: the word in lower case.
        tag: its C5 tag.
    """

    text: str
    tag: str


class NounPhrase(NamedTuple):
    """A noun phrase: adjectives followed by nouns, of which the last is the head.

    Attributes:
        first: index of its first word.
        last: index behind its last word.
        adjectives: in lower case.
        nouns: in lower case.
        before: the word in front ("a", "no", "her"), or "".
    """

    first: int
    last: int
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    before: str

    @property
    def head(self) -> str:
        return self.nouns[-1]

    def text(self, without: frozenset[str] = frozenset()) -> str:
        """The phrase as text; adjectives in `without` are left out."""
        return " ".join([*(a for a in self.adjectives if a not in without), *self.nouns])


def check_tagger() -> Any:
    """Import HanTa's tagger class, without loading its model.

    Raises:
        DataError: HanTa is not installed.
    """
    try:
        from HanTa.HanoverTagger import HanoverTagger
    except ImportError as error:
        raise DataError(
            f"the describer of key objects needs the tagger HanTa, which is not installed ({error}): "
            "pip install 'vlm-calibration[regions]'"
        ) from error
    return HanoverTagger


@lru_cache(maxsize=1)
def _tagger() -> Any:
    return check_tagger()("morphmodel_en.pgz")


@lru_cache(maxsize=4096)
def tag(text: str) -> tuple[Word, ...]:
    """Split a text into words and tag them.

    Raises:
        DataError: the tagger is not installed.
    """
    words = _WORD.findall(text)
    # A capital at the start of a sentence would tag any noun as a name.
    for i, word in enumerate(words):
        if (i == 0 or words[i - 1] in '.!?:"“(') and word[1:].islower():
            words[i] = word.lower()
    if not words:
        return ()
    return _repair_tags([Word(word.lower(), kind) for word, _, kind in _tagger().tag_sent(words)])


@lru_cache(maxsize=16384)
def _tag_scores(word: str) -> dict[str, float]:
    """The possible tags of a word in isolation with their log-probabilities; empty for a word outside the lexicon."""
    scores = {kind: float(score) for kind, score in _tagger().tag_word(word)}
    return scores if max(scores.values(), default=UNKNOWN) > UNKNOWN else {}


def _may_be(word: str, kinds: tuple[str, ...]) -> bool:
    """Whether one of these tags is possible for a word in isolation."""
    scores = _tag_scores(word)
    return any(
        score > max(scores.values()) - MARGIN for kind, score in scores.items() if kind.startswith(kinds)
    )


def _verb_lead(word: str) -> float:
    """Log-probability of a word as a verb minus that as a noun."""
    scores = _tag_scores(word)
    verb, noun = (max(scores.get(kind, UNKNOWN) for kind in kinds) for kinds in (_PRESENT, ("NN1", "NN2")))
    return verb - noun


def _repair_tags(words: list[Word]) -> tuple[Word, ...]:
    """Correct tags of questions, in which the tagger, trained on statements, sees too many compound nouns.

    An article needs a noun ("one watch"), "do" and a subject need a verb ("Does the dog sleep?"), "is" and a subject need
    a predicate ("Is the car red?").
    """
    words = [Word(w.text, _tag_alone(w)) for w in words]
    _retag_surplus_verbs(words)
    _retag_missing_nouns(words)
    _retag_participles(words)
    for i, word in enumerate(words):
        if word.tag in _DO:
            _retag_missing_verb(words, i + 1)
        elif word.tag in _BE and (i == 0 or words[i - 1].text == "why" or words[i - 1].tag == "PUN"):
            _retag_predicate(words, i + 1)
    return tuple(words)


def _tag_alone(word: Word) -> str:
    """The corrected tag of a word that the tagger leaves unclassified or gets wrong in any context."""
    if word.text in TAGS:
        return TAGS[word.text]
    if word.tag == "UNC":
        scores = _tag_scores(word.text)
        return max(scores, key=lambda kind: scores[kind]) if scores else "NN1"
    if "-" in word.text[:-1] and _may_be(word.text.rsplit("-", 1)[1], ("AJ", *_PARTICIPLE)):
        # "plain-looking", "long-haired"
        return "AJ0"
    return word.tag


def _retag_surplus_verbs(words: list[Word]) -> None:
    """In a question whose verb is "be", tag a possible noun behind a noun as noun: "bear" in "Is the teddy bear wet?"."""
    verb = next((w for w in words if w.tag.startswith(_FINITE)), None)
    if verb is None or verb.tag not in _BE or words[-1].text != "?":
        return
    for i in range(1, len(words)):
        behind_noun = words[i].tag in _PRESENT and words[i - 1].tag.startswith((*_NOUN, *_ADJECTIVE))
        if behind_noun and _verb_lead(words[i].text) < MARGIN:
            words[i] = Word(words[i].text, "NN1")


def _retag_missing_nouns(words: list[Word]) -> None:
    """Tag the last word behind an article or number as noun if only adjectives or verbs follow."""
    for i, word in enumerate(words[:-1]):
        counted = word.text == "one" and i > 0 and words[i - 1].text == "there"
        if not counted and not word.tag.startswith(("AT", "CRD", "DPS")):
            continue
        stop = _end_of_run(words, i + 1)
        run = words[i + 1 : stop]
        if not run or any(w.tag.startswith(_NOUN) for w in run):
            continue
        if run[-1].tag not in ("AJC", "AJS") and run[-1].text not in VAGUE:
            words[stop - 1] = Word(run[-1].text, "NN1")


def _retag_participles(words: list[Word]) -> None:
    """Tag an "-ing" word behind a noun as participle: "walking" in "a man walking"."""
    for phrase in noun_phrases(words):
        for i in range(phrase.last - len(phrase.nouns) + 1, phrase.last):
            text = words[i].text
            if text.endswith("ing") and (text in NO_OBJECT or _may_be(text, ("VVG",))):
                words[i] = Word(text, "VVG")
                break


def _retag_missing_verb(words: list[Word], start: int) -> None:
    """Tag a word behind the first noun of a compound as verb if a question with "do" has none."""
    if any(w.tag.startswith(_FINITE) for w in words[start:]):
        return
    candidates = [i for part in _subject_parts(words, start) for i in range(part.begin + 1, part.stop)]
    if candidates:
        # The last of equal candidates: a word outside the lexicon is rather a name.
        verb = max(reversed(candidates), key=lambda i: _verb_lead(words[i].text))
        words[verb] = Word(words[verb].text, "VVI")
        _tag_as_noun(words, verb - 1)


def _retag_predicate(words: list[Word], start: int) -> None:
    """Tag the predicate of a question with "be": the last word of a compound if it can be one, or if nothing else can."""
    parts = _subject_parts(words, start)
    for part in parts:
        last = words[part.stop - 1].text
        likely = last in LOOKS or _may_be(last, ("AJ", *_PARTICIPLE)) or _verb_lead(last) > MARGIN
        if part.stop - part.begin > 1 and likely:
            _tag_as_predicate(words, part.begin, part.stop)
            return
    subject = next((p for p in reversed(parts) if not p.prepositional), None)
    if subject and subject.stop - subject.begin > 1 and _ends_clause(words, subject.stop):
        _tag_as_predicate(words, subject.begin, subject.stop)


class _Part(NamedTuple):
    """A run of nouns with their modifiers in a subject.

    Attributes:
        begin: index of its first word.
        stop: index behind its last word.
        prepositional: whether it follows a preposition.
    """

    begin: int
    stop: int
    prepositional: bool


def _subject_parts(words: Sequence[Word], start: int) -> list[_Part]:
    """The parts of a subject: "dog" and "collar blue" in "Is the dog's collar blue?"."""
    parts: list[_Part] = []
    prepositional = False
    while True:
        begin = start
        while begin < len(words) and words[begin].tag.startswith(_SPECIFIERS):
            begin += 1
        stop = _end_of_run(words, begin)
        if stop == begin:
            return parts
        parts.append(_Part(begin, stop, prepositional))
        if stop == len(words):
            return parts
        link = words[stop]
        bare = stop + 1 < len(words) and not words[stop + 1].tag.startswith(_SPECIFIERS)
        if link.tag.startswith("PR"):
            prepositional = True
        elif link.tag != "POS" and not (link.tag == "CJC" and not (bare and _is_look(words[stop + 1]))):
            return parts
        start = stop + 1


def _is_look(word: Word) -> bool:
    return word.text in LOOKS or not _may_be(word.text, _NOUN)


def _ends_clause(words: Sequence[Word], index: int) -> bool:
    """Whether only words joined by conjunctions follow up to the end of the clause."""
    while index < len(words) and words[index].tag != "PUN":
        if words[index].tag == "CJC":
            index = max(index + 1, _end_of_run(words, index + 1))
        else:
            return False
    return True


def _tag_as_predicate(words: list[Word], begin: int, stop: int) -> None:
    """Tag the end of words `begin` to `stop` - 1 as predicate, and words joined to it by "or" as well."""
    first = stop - 1
    while first - 1 > begin and _modifies_adjective(words, first - 1):
        first -= 1
    _tag_as_noun(words, first - 1)
    while True:
        for i in range(first, stop):
            words[i] = Word(words[i].text, "AJ0")
        joined = stop
        while joined < len(words) and words[joined].text in (",", "and", "or"):
            joined += 1
        first, stop = joined, _end_of_run(words, joined)
        if joined == stop or words[joined - 1].text not in (",", "and", "or"):
            return


def _modifies_adjective(words: Sequence[Word], index: int) -> bool:
    """Whether a word modifies the adjective behind it: "light blue", "pure white"; but not "traffic light"."""
    if words[index].text == "light" and words[index - 1].text in LIGHTS:
        return False
    return words[index].text in DEGREES or _may_be(words[index].text, ("AJ0",))


def _tag_as_noun(words: list[Word], index: int) -> None:
    if not words[index].tag.startswith(_NOUN):
        words[index] = Word(words[index].text, "NN1")


def _end_of_run(words: Sequence[Word], start: int) -> int:
    """The index behind the nouns that begin at `start`, with adjectives among them and verbs in front of them."""
    stop, has_noun = start, False
    while stop < len(words) and words[stop].tag.startswith((*_NOUN, *_ADJECTIVE) if has_noun else _CONTENT):
        has_noun |= words[stop].tag.startswith(_NOUN)
        stop += 1
    return stop


def noun_phrases(words: Sequence[Word]) -> list[NounPhrase]:
    """The noun phrases of a text from left to right, without overlap.

    >>> [p.text() for p in noun_phrases(tag("A red bicycle leans against the brick wall."))]
    ['red bicycle', 'brick wall']
    """
    phrases: list[NounPhrase] = []
    start = 0
    while start < len(words):
        stop, adjectives = start, []
        while stop < len(words) and _describes(words, stop):
            adjectives.append(words[stop].text)
            stop += 1
        nouns_from = stop
        while stop < len(words) and words[stop].tag.startswith(_NOUN):
            stop += 1
        if stop > nouns_from:
            before = words[start - 1].text if start else ""
            nouns = tuple(w.text for w in words[nouns_from:stop])
            phrases.append(NounPhrase(start, stop, tuple(adjectives), nouns, before))
        start = max(stop, start + 1)
    return phrases


def _describes(words: Sequence[Word], index: int) -> bool:
    """Whether the word is an adjective, or a participle used as one."""
    word = words[index]
    if word.tag.startswith(_ADJECTIVE):
        return True
    if not word.tag.startswith(_PARTICIPLE) or index + 1 == len(words):
        return False
    opened = index == 0 or words[index - 1].tag.startswith(_OPENS)
    return opened and words[index + 1].tag.startswith((*_NOUN, *_ADJECTIVE))
