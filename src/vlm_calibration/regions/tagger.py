"""From a text to its noun phrases: words, their parts of speech, and what belongs together.

The parts of speech come from HanTa (C. Wartena, "A Probabilistic Morphology Model for German Lemmatization", KONVENS 2019),
a tagger in plain Python whose English model is part of its package, so that nothing is downloaded. Its tags are the
C5 tags of the British National Corpus.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from vlm_calibration.records import DataError
from vlm_calibration.regions.words import DEGREES, LIGHTS, LOOKS, NO_THING, TAGS, VAGUE

_WORD = re.compile(
    r"n't\b|['’]s?\b|[^\W\d_]+(?:-[^\W\d_]+)*?(?=n't\b)|[^\W\d_]+(?:-[^\W\d_]+)*|\d+(?::\d+)?|[^\w\s]"
)
_NOUN, _ADJECTIVE, _PARTICIPLE = ("NN", "NP"), ("AJ", "ORD"), ("VVN", "VVD", "VVG")
_OPENS = ("AT", "DPS", "DT", "CRD", "AJ", "PRP", "PRF", "CJ", "POS", "PU")
"""Tags of the words behind which a participle describes the noun that follows: "the stuffed animals"."""
_BE, _DO = ("VBB", "VBZ", "VBD"), ("VDB", "VDZ", "VDD")
_PRESENT = ("VVI", "VVB", "VVZ")
_FINITE = (*_PRESENT, "VH", "VB", "VD", "VM")
_SPECIFIERS = ("AT", "CRD", "DPS", "DT", "PRF", "XX")
_CONTENT = (*_NOUN, *_ADJECTIVE, *_PARTICIPLE, *_PRESENT)
UNKNOWN = -25.0
"""Log-probabilities below this are those of words that the tagger guesses from their endings."""
MARGIN = 0.95
"""A tag is possible for a word if its log-probability is at most this below that of the likeliest: "dancing" as a verb."""


class Word(NamedTuple):
    """A word as it is written, in lower case, and its C5 tag."""

    text: str
    tag: str


class NounPhrase(NamedTuple):
    """Words `first` to `last` - 1 of a text: adjectives and nouns, of which the last noun is the head.

    Attributes:
        adjectives, nouns: in lower case. before: the word ahead of it with which it belongs together ("a", "no", "her"), or "".
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
        """The phrase, without adjectives that say nothing of how it looks."""
        return " ".join([*(a for a in self.adjectives if a not in without), *self.nouns])


def check_tagger() -> Any:
    """HanTa's class of taggers; its model is not loaded yet.

    Raises:
        DataError: HanTa is not installed.
    """
    try:
        from HanTa.HanoverTagger import HanoverTagger
    except ImportError as error:
        raise DataError(
            f"the describer of key objects needs the tagger HanTa, found no module of it ({error}): "
            "pip install 'vlm-calibration[regions]'"
        ) from error
    return HanoverTagger


@lru_cache(maxsize=1)
def _tagger() -> Any:
    return check_tagger()("morphmodel_en.pgz")


@lru_cache(maxsize=4096)
def tag(text: str) -> tuple[Word, ...]:
    """The words of a text with their tags.

    Raises:
        DataError: the tagger is not installed.
    """
    words = _WORD.findall(text)
    # Where a sentence begins, a capital would make a name of any noun.
    for i, word in enumerate(words):
        if (i == 0 or words[i - 1] in '.!?:"“(') and word[1:].islower():
            words[i] = word.lower()
    if not words:
        return ()
    return _repaired([Word(word.lower(), kind) for word, _, kind in _tagger().tag_sent(words)])


@lru_cache(maxsize=16384)
def readings(word: str) -> dict[str, float]:
    """The tags that a word may have by itself, with the log-probability of each; nothing for a word that is not in the lexicon."""
    found = {kind: float(score) for kind, score in _tagger().tag_word(word)}
    return found if max(found.values(), default=UNKNOWN) > UNKNOWN else {}


def _may_be(word: str, kinds: tuple[str, ...]) -> bool:
    """Whether one of these tags is about as likely as any other for a word by itself."""
    known = readings(word)
    return any(
        score > max(known.values()) - MARGIN for kind, score in known.items() if kind.startswith(kinds)
    )


def _verb_lead(word: str) -> float:
    """By how much a word is likelier a verb than a noun, in log-probability."""
    known = readings(word)
    verb, noun = (max(known.get(kind, UNKNOWN) for kind in kinds) for kinds in (_PRESENT, ("NN1", "NN2")))
    return verb - noun


def _repaired(words: list[Word]) -> tuple[Word, ...]:
    """Tags put right by what a clause must have, where the tagger, made for statements, takes it for part of a compound noun.

    Behind an article stands a noun ("one watch"), behind "do" and a subject a verb ("Does the dog sleep?"), behind "is" and a
    subject a predicate ("Is the car red?").
    """
    words = [Word(w.text, _tag_alone(w)) for w in words]
    _leave_one_verb(words)
    _give_nouns(words)
    _give_participles(words)
    for i, word in enumerate(words):
        if word.tag in _DO:
            _give_verb(words, i + 1)
        elif word.tag in _BE and (i == 0 or words[i - 1].text == "why" or words[i - 1].tag == "PUN"):
            _give_predicate(words, i + 1)
    return tuple(words)


def _tag_alone(word: Word) -> str:
    """The tag of a word that the tagger gives up on, or is wrong about whatever stands beside it."""
    if word.text in TAGS:
        return TAGS[word.text]
    if word.tag == "UNC":
        known = readings(word.text)
        return max(known, key=lambda kind: known[kind]) if known else "NN1"
    if "-" in word.text[:-1] and _may_be(word.text.rsplit("-", 1)[1], ("AJ", *_PARTICIPLE)):
        # "plain-looking", "long-haired"
        return "AJ0"
    return word.tag


def _leave_one_verb(words: list[Word]) -> None:
    """In a question whose verb is "be", what can be a noun behind a noun is no verb: "bear" of "Is the teddy bear wet?"."""
    verb = next((w for w in words if w.tag.startswith(_FINITE)), None)
    if verb is None or verb.tag not in _BE or words[-1].text != "?":
        return
    for i in range(1, len(words)):
        behind_noun = words[i].tag in _PRESENT and words[i - 1].tag.startswith((*_NOUN, *_ADJECTIVE))
        if behind_noun and _verb_lead(words[i].text) < MARGIN:
            words[i] = Word(words[i].text, "NN1")


def _give_nouns(words: list[Word]) -> None:
    """An article or number with adjectives or verbs alone behind it: the last of them is its noun."""
    for i, word in enumerate(words[:-1]):
        counted = word.text == "one" and i > 0 and words[i - 1].text == "there"
        if not counted and not word.tag.startswith(("AT", "CRD", "DPS")):
            continue
        stop = _run(words, i + 1)
        run = words[i + 1 : stop]
        if not run or any(w.tag.startswith(_NOUN) for w in run):
            continue
        if run[-1].tag not in ("AJC", "AJS") and run[-1].text not in VAGUE:
            words[stop - 1] = Word(run[-1].text, "NN1")


def _give_participles(words: list[Word]) -> None:
    """What the last noun of a compound does: "walking" of "a man walking", which is no kind of walking."""
    for phrase in noun_phrases(words):
        for i in range(phrase.last - len(phrase.nouns) + 1, phrase.last):
            text = words[i].text
            if text.endswith("ing") and (text in NO_THING or _may_be(text, ("VVG",))):
                words[i] = Word(text, "VVG")
                break


def _give_verb(words: list[Word], start: int) -> None:
    """The verb of a question with "do", where the tagger found none: a word behind the first of a compound."""
    if any(w.tag.startswith(_FINITE) for w in words[start:]):
        return
    places = [i for part in _parts(words, start) for i in range(part.begin + 1, part.stop)]
    if places:
        # The last one of equals: a word that is not in the lexicon rather names something.
        verb = max(reversed(places), key=lambda i: _verb_lead(words[i].text))
        words[verb] = Word(words[verb].text, "VVI")
        _name(words, verb - 1)


def _give_predicate(words: list[Word], start: int) -> None:
    """The predicate of a question with "be": the last word of a compound that can be one, or must since nothing else is."""
    parts = _parts(words, start)
    for part in parts:
        last = words[part.stop - 1].text
        likely = last in LOOKS or _may_be(last, ("AJ", *_PARTICIPLE)) or _verb_lead(last) > MARGIN
        if part.stop - part.begin > 1 and likely:
            _take_predicate(words, part.begin, part.stop)
            return
    subject = next((p for p in reversed(parts) if not p.prepositional), None)
    if subject and subject.stop - subject.begin > 1 and _ends(words, subject.stop):
        _take_predicate(words, subject.begin, subject.stop)


class _Part(NamedTuple):
    """Words `begin` to `stop` - 1, nouns with what stands before them, of a subject; `prepositional`: behind a preposition."""

    begin: int
    stop: int
    prepositional: bool


def _parts(words: Sequence[Word], start: int) -> list[_Part]:
    """What a subject consists of: "dog", "collar blue" of "Is the dog's collar blue?"."""
    parts: list[_Part] = []
    prepositional = False
    while True:
        begin = start
        while begin < len(words) and words[begin].tag.startswith(_SPECIFIERS):
            begin += 1
        stop = _run(words, begin)
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


def _ends(words: Sequence[Word], place: int) -> bool:
    """Whether nothing is said from here to the end of the clause, but for further words of the same kind."""
    while place < len(words) and words[place].tag != "PUN":
        if words[place].tag == "CJC":
            place = max(place + 1, _run(words, place + 1))
        else:
            return False
    return True


def _take_predicate(words: list[Word], begin: int, stop: int) -> None:
    """Make the end of words `begin` to `stop` - 1 their predicate, and what is joined to it by "or" as well."""
    first = stop - 1
    while first - 1 > begin and _grades(words, first - 1):
        first -= 1
    _name(words, first - 1)
    while True:
        for i in range(first, stop):
            words[i] = Word(words[i].text, "AJ0")
        joined = stop
        while joined < len(words) and words[joined].text in (",", "and", "or"):
            joined += 1
        first, stop = joined, _run(words, joined)
        if joined == stop or words[joined - 1].text not in (",", "and", "or"):
            return


def _grades(words: Sequence[Word], place: int) -> bool:
    """Whether a word belongs to the adjective behind it: "light blue", "pure white"; but "traffic light"."""
    if words[place].text == "light" and words[place - 1].text in LIGHTS:
        return False
    return words[place].text in DEGREES or _may_be(words[place].text, ("AJ0",))


def _name(words: list[Word], place: int) -> None:
    """The word at this place is a noun."""
    if not words[place].tag.startswith(_NOUN):
        words[place] = Word(words[place].text, "NN1")


def _run(words: Sequence[Word], start: int) -> int:
    """Where the nouns that begin at `start` end, with the adjectives about them and the verbs ahead of them."""
    stop, named = start, False
    while stop < len(words) and words[stop].tag.startswith((*_NOUN, *_ADJECTIVE) if named else _CONTENT):
        named |= words[stop].tag.startswith(_NOUN)
        stop += 1
    return stop


def noun_phrases(words: Sequence[Word]) -> list[NounPhrase]:
    """The noun phrases of a text from left to right; none overlaps another.

    >>> [p.text() for p in noun_phrases(tag("A red bicycle leans against the brick wall."))]
    ['red bicycle', 'brick wall']
    """
    found: list[NounPhrase] = []
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
            found.append(NounPhrase(start, stop, tuple(adjectives), nouns, before))
        start = max(stop, start + 1)
    return found


def _describes(words: Sequence[Word], index: int) -> bool:
    """Whether the word is an adjective, or a participle used as one."""
    word = words[index]
    if word.tag.startswith(_ADJECTIVE):
        return True
    if not word.tag.startswith(_PARTICIPLE) or index + 1 == len(words):
        return False
    opened = index == 0 or words[index - 1].tag.startswith(_OPENS)
    return opened and words[index + 1].tag.startswith((*_NOUN, *_ADJECTIVE))
