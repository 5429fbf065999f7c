"""Normalisation and matching of short answers and object phrases: VQA normalisation, plural stems, and SQuAD's F1."""

import re
import string
import unicodedata
from collections import Counter
from functools import lru_cache

_SENTENCE_END = re.compile(r"(?:(?<=\w\w\w)|(?<=\d))[.!?]\s|\n")  # not after "Dr." and "St."
_PLACE_WORD = (
    r"(?:the|of|far|top|bottom|upper|lower|left|right|center|centre|middle|hand|corner|side|part|area"
    r"|image|picture|photo|photograph|scene|background|foreground)"
)
_PLACE = rf"(?:at|in|on|to) (?:{_PLACE_WORD}[ -]){{0,9}}{_PLACE_WORD}(?!\w)"
_IS = r"(?:'s| is| are| appears to be| seems to be| looks like| look like)"
_LEAD_INS = (
    r"(?:the |my |final |correct |short ){0,3}answer(?: is)?:?",
    rf"(?:it|this|that|there|these|those|they){_IS}",
    rf"the (?:\w+ ){{0,2}}\w+(?: {_PLACE})?{_IS}",
    r"i (?:can )?see",
    r"(?:the|this) (?:image|picture|photo|photograph|scene) (?:shows|contains|depicts)",
    rf"{_PLACE},?(?: there| it| i)?(?: is| are| see|'s)",
)
_LEAD_IN = re.compile(rf"(?:{'|'.join(_LEAD_INS)})(?!\w) ?")
_CLOSING = re.compile(rf"(?<=\S) {_PLACE}\Z")


def first_answer(answer: str) -> str:
    """The first sentence in lower case, without its lead-in and closing phrase of place."""
    first = _SENTENCE_END.split(answer.strip(), maxsplit=1)[0]
    text = re.sub(r"[\s*_`\"“”]+", " ", fold(first)).strip(" .!,;:")
    for _ in range(2):
        lead_in = _LEAD_IN.match(text)
        text = text[lead_in.end() :] if lead_in else text
    return _CLOSING.sub("", text)


_TO_19 = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen"""
_TENS_WORDS = "twenty thirty forty fifty sixty seventy eighty ninety"
_TENS = {word: 10 * value for value, word in enumerate(_TENS_WORDS.split(), start=2)}
_NUMBERS = {word: value for value, word in enumerate(_TO_19.split())} | _TENS
_ARTICLES = frozenset(("a", "an", "the"))
_NOT_A_WORD = re.compile(r"[^\w\s]|_")
# Punctuation that is part of a value: 3.5, 10:30, -5, 50%, $5.
_VALUE_MARK = re.compile(r"(?<=\d)[.:/](?=\d)|(?<!\S)-(?=\d)|[%$#&@]")


def normalise(text: str) -> str:
    """Lower-case the text, remove punctuation and articles (unless only articles remain), write number words as digits."""
    text = " ".join(fold(text).replace("'", "").split()).replace(" %", "%")
    text = re.sub(r"(?<=\d),(?=\d\d\d(?!\d))", "", text)
    words = _NOT_A_WORD.sub(_keep_or_space, text).split()
    words = [word for word in words if word not in _ARTICLES] or words
    result: list[str] = []
    for word in words:
        if result and result[-1] in _TENS and 0 < _NUMBERS.get(word, 0) < 10:
            result[-1] = str(_TENS[result[-1]] + _NUMBERS[word])
        else:
            result.append(word)
    return " ".join(str(_NUMBERS.get(word, word)) for word in result)


def _keep_or_space(mark: re.Match[str]) -> str:
    character = mark[0]
    if _VALUE_MARK.match(mark.string, mark.start()):
        return character
    return " " if character == "_" or unicodedata.category(character).startswith("P") else character


def same_phrase(a: str, b: str) -> bool:
    """Whether two phrases are equal up to case, articles, punctuation and number: "a Dog" and "dogs"."""
    return a == b or match_key(a) == match_key(b) != ""


@lru_cache(maxsize=8192)
def match_key(text: str) -> str:
    """The form in which two answers are compared: normalised, with a stem for each word and its plural ("sho" for "shoes")."""
    return " ".join(_stem(word) for word in normalise(text).split())


_PLURALS = "children people feet teeth geese mice oxen dice cacti lenses canvases quizzes skis taxis"
_SINGULARS = "child person foot tooth goose mouse ox die cactus lens canvas quiz ski taxi"
_IRREGULAR = dict(zip(_PLURALS.split(), _SINGULARS.split(), strict=True))


def _stem(word: str) -> str:
    if not word.isalpha() or not word.isascii():
        return word
    word = _IRREGULAR.get(word, word)
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for plural, form in (("men", "man"), ("ie", "y"), ("ve", "f"), ("fe", "f")):
        if word.endswith(plural) and len(word) >= 3:
            return word[: -len(plural)] + form
    return word[:-1] if word.endswith(("se", "xe", "ze", "che", "she", "oe")) and len(word) > 3 else word


def token_f1(text: str, gold: str) -> float:
    """SQuAD's F1 of shared words, in [0, 1]; case, punctuation and articles are ignored."""
    plain = [t.lower().translate(str.maketrans("", "", string.punctuation)).split() for t in (text, gold)]
    words, gold_words = ([word for word in split if word not in _ARTICLES] for split in plain)
    shared = (Counter(words) & Counter(gold_words)).total()
    return 2 * shared / (len(words) + len(gold_words)) if words and gold_words else float(words == gold_words)


def fold(text: str) -> str:
    """Normalise compatibility forms, case and apostrophes."""
    return unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
