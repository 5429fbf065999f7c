"""Noun phrases of a text, and whether the rules can tell them.

Parts of speech, as C5 tags of the British National Corpus, come from HanTa (C. Wartena, KONVENS 2019). It was trained on statements: in
questions the predicate ("Is the wine glass red?") and the verb ("Does the dog sleep?") have to be told from compounds.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

from vlm_calibration.records import DataError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _with_plurals(text: str) -> frozenset[str]:
    words = _words(text)
    return words | {w + "s" for w in words} | {w[:-1] + "ies" for w in words if w.endswith("y")}


ATTRIBUTES = _with_plurals("""
    color colour shape size height width length weight age gender sex material pattern texture style design brand name word letter number
    digit text title logo time hour date day month year season holiday occasion event weather temperature sport game activity action job
    occupation profession mood atmosphere emotion expression feeling condition state position direction angle distance speed side country
    nationality language flavor flavour price purpose reason relationship
""")
"""Questions about these ask for no object: "What colour is the bus?"."""

GENERIC = _with_plurals(
    "kind type sort object thing item piece subject something anything element feature part stuff"
)
"""Placeholders for the object that the answer names: "What object is on the desk?"."""

PICTURE = _with_plurals("""
    image picture photo photograph scene view frame background foreground left right top bottom middle center centre corner front back end
    edge rest area place location spot perspective shot caption description detail sentence statement question answer option example
""")
"""The picture itself and positions in it."""

COLOURS = _words("""
    black white red green blue yellow brown grey gray pink purple beige tan maroon turquoise silver gold
""")
"""The tagger reads these as nouns when they stand alone. "Orange" is missing because it is also a fruit."""

LOOKS = COLOURS | _words("""
    orange cream violet crimson emerald bronze square oval circle semicircle plastic metal wood steel iron leather stone brick concrete marble
    ceramic porcelain cotton linen wool silk denim
""")
"""Colours, shapes and materials: nouns that describe appearance, as in "Is the cup plastic?"."""

TAGS = {"doing": "VDG", "no": "AT0", "present": "AJ0", "bears": "NN2"}
TAGS |= dict.fromkeys(("remote", "drier", "bear"), "NN1")
"""C5 tags of words that the tagger usually gets wrong in questions; a drier is a hair drier."""

NO_OBJECT = (ATTRIBUTES | COLOURS | GENERIC | PICTURE) | _with_plurals("""
    morning noon afternoon evening night midnight dawn dusk sunset sunrise today winter spring summer autumn fall minute second moment week
    way lot amount percent pair half herd flock pack bunch dozen series collection total maximum minimum safety fun order fact case kind
    sense impression idea thought interest addition relation comparison contrast love joy happiness sadness anger fear peace silence beauty
    comfort work use help care attention focus variety balance bit contact interaction difference speech conversation discussion breakfast
    lunch dinner meal soccer tennis golf hockey surfing skiing snowboarding skateboarding swimming fishing racing tradition culture history
    north south east west one none both other presence absence
""")
"""Nouns that name nothing a detector can find."""

VAGUE = _words("""
    main only same different other another many few several various certain such more most less own whole entire visible present possible
    likely first second third next last left right top bottom front back upper lower middle central nearest closest farthest overall general
    specific particular apparent single
""")
"""Adjectives that do not describe appearance."""


_WORD = re.compile(
    r"n't\b|['’]s?\b|[^\W\d_]+(?:-[^\W\d_]+)*?(?=n't\b)|[^\W\d_]+(?:-[^\W\d_]+)*|\d+(?::\d+)?|[^\w\s]"
)
_NOUN, _ADJECTIVE = ("NN", "NP"), ("AJ", "ORD")
_PARTICIPLE, _PRESENT = ("VVN", "VVD", "VVG"), ("VVI", "VVB", "VVZ")
_CONTENT = (*_NOUN, *_ADJECTIVE, *_PARTICIPLE, *_PRESENT)
# Tags of words after which a participle describes the following noun: "the stuffed animals".
_OPENS = ("AT", "DPS", "DT", "CRD", "AJ", "PRP", "PRF", "CJ", "POS", "PU")
_SPECIFIERS = ("AT", "CRD", "DPS", "DT", "PRF", "XX")
UNKNOWN = -25.0  # log-probability at or below which the tagger guesses a word from its ending


class Word(NamedTuple):
    """A word in lower case with its C5 tag."""

    text: str
    tag: str


class NounPhrase(NamedTuple):
    """Words `first` to `last` - 1: adjectives followed by nouns, of which the last is the head."""

    first: int
    last: int
    texts: tuple[str, ...]

    @property
    def head(self) -> str:
        return self.texts[-1]


@lru_cache(maxsize=1)
def load_tagger() -> Any:
    """HanTa's tagger with its English model; DataError if HanTa is not installed."""
    try:
        from HanTa.HanoverTagger import HanoverTagger
    except ImportError as error:
        needed = f"the describer of key objects needs the tagger HanTa, which is not installed ({error})"
        raise DataError(f"{needed}: pip install 'vlm-calibration[regions]'") from error
    return HanoverTagger("morphmodel_en.pgz")


@lru_cache(maxsize=4096)
def tag(text: str) -> tuple[tuple[Word, ...], bool]:
    """Tag the words of a text; and whether the rules can tell its noun phrases, which is not so in another language."""
    texts = _WORD.findall(text)
    # A capital at the start of a sentence would tag any noun as a name.
    for i, word in enumerate(texts):
        if (i == 0 or texts[i - 1] in '.!?:"“(') and word[1:].islower():
            texts[i] = word.lower()
    if not texts:
        return (), True
    tagged = ((w.lower(), kind) for w, _, kind in load_tagger().tag_sent(texts))
    words = [Word(w, TAGS.get(w, "NN1" if kind == "UNC" else kind)) for w, kind in tagged]
    # Hardly any English sentence lacks words of this log-probability, such as "is", "the", "in".
    is_english = any(w.text.isalpha() and max(_scores(w.text).values(), default=UNKNOWN) > -8 for w in words)
    known = _repair_question(words) and (is_english or len(words) <= 3 or words[-1].text != "?")
    return tuple(words), known


@lru_cache(maxsize=16384)
def _scores(word: str) -> dict[str, float]:
    """The possible tags of a word in isolation with their log-probabilities; empty for a word outside the lexicon."""
    scores = dict(load_tagger().tag_word(word))
    return scores if max(scores.values(), default=UNKNOWN) > UNKNOWN else {}


def _may_be(word: str, kinds: tuple[str, ...], margin: float = 0.95) -> bool:
    """Whether a tag of these kinds is at most by `margin` less likely (in log-probability) than the likeliest one."""
    scores = _scores(word)
    return any(s > max(scores.values()) - margin for kind, s in scores.items() if kind.startswith(kinds))


def _repair_question(words: list[Word]) -> bool:
    """Tell participles, verb and predicate from nouns; whether that was possible."""
    for i, (text, kind) in enumerate(words):
        run = list(takewhile(lambda w: w.tag.startswith(_CONTENT) and w.text not in VAGUE, words[i + 1 :]))
        if text in ("a", "an", "no") and run and not any(word.tag.startswith(_NOUN) for word in run):
            words[i + len(run)] = Word(run[-1].text, "NN1")  # "a short"
        is_noun = i > 0 and kind.startswith(_NOUN) and words[i - 1].tag.startswith(_NOUN)
        if is_noun and text.endswith("ing") and (text in NO_OBJECT or _may_be(text, ("VVG",))):
            words[i] = Word(text, "VVG")  # "a man walking"
    for i, (_, kind) in enumerate(words):
        if kind in ("VDB", "VDZ", "VDD"):
            if any(word.tag.startswith((*_PRESENT, "VH", "VB", "VM")) for word in words[i + 1 :]):
                return True
            first = next((j for j in range(i + 1, len(words)) if words[j].tag.startswith(_CONTENT)), i)
            return first == i or _tell_last(words, i, first, "VVI")
        if kind in ("VBB", "VBZ", "VBD") and (i == 0 or words[i - 1].text in ("why", ",")):
            after = [word.text for word in words[i + 1 : i + 3]]
            if "there" in after or after[-1:] in (["a"], ["an"]):
                return True  # "Is there a stop sign?", "Is this a stop sign?"
            return _tell_last(words, i, len(words) - 1 - (words[-1].tag == "PUN"), "AJ0")
    return True


def _tell_last(words: list[Word], verb: int, index: int, kind: str) -> bool:
    """Give the last of the content words around `index` a tag if it may have it, and those before it that are joined by "or".

    False if it may not, and no other word lies behind the verb: then it may be the noun of a compound subject, or a predicate.
    """
    begin = stop = index
    while begin > verb + 1 and words[begin - 1].tag.startswith(_CONTENT):
        begin -= 1
    while stop < len(words) and words[stop].tag.startswith(_CONTENT):
        stop += 1
    if stop - begin == 1 and begin > verb + 1 and words[begin - 1].text in ("or", "and"):
        words[begin] = Word(words[begin].text, kind)
        return _tell_last(words, verb, begin - 2, kind)
    if stop - begin < 2:
        return True
    text, tagged = words[stop - 1]
    if kind == "VVI":
        fits = _may_be(text, _PRESENT, -UNKNOWN)
    else:
        fits = text in LOOKS or tagged.startswith(_PARTICIPLE) or _may_be(text, (*_ADJECTIVE, *_PARTICIPLE))
    if fits:
        words[stop - 1] = Word(text, kind)
    # "on the wooden table" may be the place of a subject.
    return fits or any(not word.tag.startswith(_SPECIFIERS) for word in words[verb + 1 : begin])


def noun_phrases(words: Sequence[Word]) -> list[NounPhrase]:
    """The noun phrases of a text from left to right, without overlap."""
    phrases: list[NounPhrase] = []
    start = 0
    while start < len(words):
        noun = start
        while noun < len(words) and _describes(words, noun):
            noun += 1
        stop = noun
        while stop < len(words) and words[stop].tag.startswith(_NOUN):
            stop += 1
        if stop > noun:
            phrases.append(NounPhrase(start, stop, tuple(word.text for word in words[start:stop])))
        start = max(stop, start + 1)
    return phrases


def _describes(words: Sequence[Word], index: int) -> bool:
    """Whether the word is an adjective, or a participle used as one."""
    is_participle = words[index].tag.startswith(_PARTICIPLE)
    opened = index == 0 or words[index - 1].tag.startswith(_OPENS)
    followed = index + 1 < len(words) and words[index + 1].tag.startswith((*_NOUN, *_ADJECTIVE))
    return words[index].tag.startswith(_ADJECTIVE) or (is_participle and opened and followed)
