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

_WORD = re.compile(
    r"n't\b|['’]s?\b|[^\W\d_]+(?:-[^\W\d_]+)*?(?=n't\b)|[^\W\d_]+(?:-[^\W\d_]+)*|\d+(?::\d+)?|[^\w\s]"
)
_NOUN, _ADJECTIVE, _PARTICIPLE = ("NN", "NP"), ("AJ", "ORD"), ("VVN", "VVD", "VVG")
_OPENS = ("AT", "DPS", "DT", "CRD", "AJ", "PRP", "PRF", "CJ", "POS", "PU")
"""Tags of the words behind which a participle describes the noun that follows: "the stuffed animals"."""


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


@lru_cache(maxsize=1)
def _tagger() -> Any:
    try:
        from HanTa.HanoverTagger import HanoverTagger
    except ImportError as error:
        raise DataError(
            "the describer of key objects needs a tagger: pip install 'vlm-calibration[regions]'"
        ) from error
    return HanoverTagger("morphmodel_en.pgz")


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
    return _with_verb([Word(word.lower(), kind) for word, _, kind in _tagger().tag_sent(words)])


def _with_verb(words: list[Word]) -> tuple[Word, ...]:
    """Tags put right where a question with "do" lacks a verb: in "What time does the clock show?" the last noun is it."""
    words = [Word(w.text, "VDG") if w.text == "doing" else w for w in words]
    auxiliary = next((i for i, w in enumerate(words) if w.tag in ("VDB", "VDZ", "VDD")), None)
    if auxiliary is None or any(w.tag.startswith("V") for w in words[auxiliary + 1 :]):
        return tuple(words)
    compound = next((p for p in noun_phrases(words) if p.first > auxiliary and len(p.nouns) > 1), None)
    if compound is not None:
        words[compound.last - 1] = Word(compound.head, "VVI")
    return tuple(words)


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
