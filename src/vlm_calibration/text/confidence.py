"""Render a stated confidence into a response, and parse it from one.

Parsing never guesses. Every pattern has bounded or possessive repetition, so time is linear in the length of the text.
What `parse_confidence` reads:

| text | value | rule |
|---|---|---|
| `Confidence: 80%`, `80 percent`, `８０％`, `80\\%` | 0.8 | a unit of percent |
| `Confidence: 80/100`, `8 out of 10`, `4/5` | 0.8 | a ratio |
| `Confidence (1-10): 8`, `Confidence (%): 80` | 0.8 | without a unit, the stated scale applies |
| `Confidence: 0.8`, `1`, `0` | 0.8, 1.0, 0.0 | without unit and scale, up to 1: a fraction |
| `Confidence: 85`, `87,5` | 0.85, 0.875 | without unit and scale, from 2: percent |
| `Confidence: 1%` | 0.01 | the unit takes precedence |
| `Confidence: 1.5` | None | a number between 1 and 2 fits neither scale |
| `Confidence: ~80%`, `about 80%`, `at least 80%`, `80% ± 5%` | 0.8 | approximations and bounds are read as their number |
| `Confidence: 80-90%`, `between 80 and 90%`, `80% to 90%` | None | a range is not one number |
| `Confidence: 150%`, `-5%`, `12/10`, `high`, no statement | None | out of range, not a number, missing |
| `{"answer": "yes", "confidence": 0.9}`, `**Confidence:** 85%` | 0.9, 0.85 | JSON and Markdown |
| `I am 80% sure`, `90% confident`, `with 90% confidence`, `certainty: 0.9`, `quite sure (80%)` | | other wordings |
| `I am not 100% sure` | None | a negated number is not a statement |
| `80 %`, `0.8`, `8 out of 10`, `Yes, 80%`, `No. 0.9`, `Yes 80%` | | a bare number with a unit or decimal point, alone, or alone in the last clause |
| `The label says 80%`, `2`, `Yes. 2` | None | any other number belongs to the answer |

Precedence: a label (`Confidence: ...`), then other wordings, then a bare number. Of several statements of the same
kind the last is read, even if its value is None.
"""

import math
import re
import string
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from itertools import zip_longest
from typing import NamedTuple

from vlm_calibration.records import DataError


def parse_confidence(text: str) -> float | None:
    """Parse the confidence in [0, 1] that a text states, or None, by the table above. Never raises on a string."""
    plain = _replace_variants(text)
    stated = _labelled(plain) or _worded(plain) or _bare(plain)
    return stated[-1].value if stated else None


def end_of_confidence(text: str) -> int | None:
    """Position at which generation may stop: the end of a complete statement in percent behind an answer; else None.

    Complete means that no continuation can change the number: "Yes. Confidence: 80%" may continue as "to 90%", a range, while
    "Yes. Confidence: 80%." ends at the percent sign.
    """
    plain = _replace_variants(text)
    stated = _labelled(plain)
    if not stated or stated[-1].value is None:
        return None
    end = stated[-1].end
    if not _ENDS_IN_PERCENT.search(plain[max(0, end - 20) : end]) or _MAY_BECOME_RANGE.match(plain, end):
        return None
    return end if any(c.isalnum() for c in strip_confidence(plain[:end])) else None


def render_answer(answer: str) -> str:
    """The answer as a sentence, the beginning of `render_response`: "Yes" becomes "Yes."; ending punctuation is kept."""
    answer = answer.strip()
    return answer if not answer or _ENDS_IN_PUNCTUATION.search(answer[-20:]) else f"{answer}."


def render_response(answer: str, confidence: float) -> str:
    """Render any answer with its confidence in [0, 1]: `("Yes", 0.8)` becomes `"Yes. Confidence: 80%"`.

    The confidence's shortest decimal form is rounded to the nearest whole percent, ties up (0.125 is 13%). A ValueError if it is NaN or
    outside [0, 1].
    """
    value = float(confidence)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"confidence must be in [0, 1], got {confidence!r}")
    percent = int((Decimal(repr(value)) * 100).quantize(Decimal(1), ROUND_HALF_UP))
    return f"{render_answer(answer)} Confidence: {percent}%".lstrip()


def strip_confidence(text: str) -> str:
    """Remove all statements of confidence from a text, which leaves the answer: "Confidence: 0.9. No" becomes "No".

    For a JSON reply the value of "answer" is returned. A text that is only a number may be the answer, and stays.
    """
    plain = _replace_variants(text)
    verbal = [_Statement(match.start(), match.end(), None) for match in _VERBAL.finditer(plain)]
    statements = [*_labelled(plain), *_worded(plain), *verbal]
    if not statements:
        statements = _bare(plain)
        if not statements or not text[: statements[0].start].strip(" \n*_`\"'(["):
            return text.strip()
    json_answer = _JSON_ANSWER.search(text)
    if json_answer is not None:
        return (json_answer["quoted"] or json_answer["word"] or "").strip()
    pieces: list[str] = []
    position = 0
    for statement in sorted(statements, key=lambda statement: statement.start):
        start, end = _widen(plain, statement)
        pieces.append(text[position : max(position, start)])
        position = max(position, end)
    return _join([*pieces, text[position:]])


class _Statement(NamedTuple):
    start: int
    end: int
    value: float | None


_ENDS_IN_PUNCTUATION = re.compile(r"""[.!?…。！？,;:][)\]}"'”’»*_`]*\Z""")

_CHARACTERS = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width forms of ASCII
_CHARACTERS |= {ord(a): b for a, b in zip("﹪٪−﹣‐‑⁄∕∶﹕٫’", "%%----//::.'", strict=True)}
_CHARACTERS |= dict.fromkeys([0x3000, 0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0x2060, 0xFEFF], " ")


def _replace_variants(text: str) -> str:
    """Replace variants of digits and signs by ASCII, character by character, so that positions stay the same."""
    if text.isascii():
        return text
    text = text.translate(_CHARACTERS)
    return "".join(str(int(c)) if c.isdecimal() else c for c in text)


_NUMBER = r"(?:\d++(?:[.,]\d++)*+|(?<!\w)\.\d++)(?:e[+-]?\d{1,3}(?!\w))?+"
_PERCENT = r"(?:\\?%|per\s?cent\b|pct\b)"
_RATIO = r"(?:/|out\s{1,3}of\b(?:\s{1,3}a\b)?|of\b)"
_RANGE = r"\s{0,3}(?:-|–|—|~|to\b|or\b|through\b)\s{0,3}"
_AMOUNT = rf"""
    (?P<sign>[-+–])?
    (?P<number>{_NUMBER})
    (?:
        \s{{0,3}}(?P<percent>{_PERCENT})(?P<percents>{_RANGE}{_NUMBER}\s{{0,3}}{_PERCENT})?+
      | (?P<range>{_RANGE}{_NUMBER}(?:\s{{0,3}}{_PERCENT})?+)
      | \s{{0,3}}{_RATIO}\s{{0,3}}(?P<denominator>{_NUMBER})(?:\s{{0,3}}%)?+(?!\w)
      | (?![\w‰])
    )
    (?:\s{{0,3}}(?:±|\+/-)\s{{0,3}}{_NUMBER}\s{{0,3}}%?+)?+
"""


def _amount(match: re.Match[str], scale: float | None = None) -> float | None:
    """The confidence of a match of `_AMOUNT`, or None; `scale` is the number that means 100% if there is no unit."""
    value, is_between = _number(match["number"]), match.groupdict().get("between") is not None
    if value is None or is_between or match["sign"] in ("-", "–") or match["range"] or match["percents"]:
        return None
    if match["percent"]:
        scale = 100.0
    elif match["denominator"]:
        scale = _number(match["denominator"])
    elif scale is None:
        scale = 1.0 if value <= 1 else 100.0 if value >= 2 else None
    if scale is None or not 0 < scale < math.inf:
        return None
    return value / scale if value <= scale else None


def _number(digits: str) -> float | None:
    """Parse a number with a decimal point or a decimal comma (one or two places, or after 0); None for anything else."""
    if "," in digits:
        whole, places = digits.split(",", 1)
        if len(places) > 2 and whole.strip("0"):
            return None  # thousands
        digits = f"{whole}.{places}" if places.isdecimal() else "?"
    try:
        return float(digits)
    except ValueError:
        return None


def _has_unit(match: re.Match[str]) -> bool:
    """Whether the number alone reads as a confidence: percent, a ratio, or a fraction such as 0.8."""
    if match["percent"] or match["denominator"] or match["range"]:
        return True
    value = _number(match["number"])
    return "." in match["number"] and value is not None and value <= 1


_FLAGS = re.IGNORECASE | re.VERBOSE
_LABEL = re.compile(
    r"""(?<![^\W_])confidence(?:[\s_-]?(?:level|score|rating|value|percentage|estimate|probability))?(?![^\W_])
        |置信度|信心度?|可信度|確信度""",
    _FLAGS,
)
_OTHER_LABEL = re.compile(r"(?<![^\W_])(?:certainty|certain|confident|sure|probability|likelihood)\b", _FLAGS)

_SEPARATOR = r"""(?:[\s:=*_"'`~≈<>|$(\[{—]|[-–](?![\d.])){0,12}+"""
_FILLER = r"""(?:is|was|are|be|would|of|at|in|on|my|the|this|that|your|an?|answer|response|prediction|assessment
    |about|approximately|approx\.?|around|roughly|nearly|almost|circa|ca\.|only|just|over|under|above|below
    |at\sleast|at\smost|more\sthan|less\sthan|up\sto
    |very|quite|fairly|pretty|extremely|high|low|medium|moderate|level)(?!\w)"""
_SCALE = rf"""(?:
    [(\[{{](?P<scale>[a-z\s,:]{{0,30}}{_NUMBER}\s?%?\s?(?:-|–|to)\s?{_NUMBER}\s?%?
        |\s?(?:/|out\sof\s){_NUMBER}\s?|[^()\[\]{{}}\d\n]{{0,30}})[)\]}}]
    |(?:on|from)\s(?:a\s)?scale\s(?:of|from)\s(?P<scale_words>{_NUMBER}\s?(?:-|–|to)\s?{_NUMBER})
)"""
_BETWEEN = rf"(?P<between>between\s{{1,3}}{_NUMBER}(?:\s{{0,3}}{_PERCENT})?+\s{{1,3}}and\s{{1,3}})?+"
_AFTER_LABEL = re.compile(
    rf"""(?P<gap>[*_"'`]{{0,3}}\s{{0,3}}{_SCALE}?{_SEPARATOR}(?:{_FILLER}{_SEPARATOR}){{0,8}}){_BETWEEN}{_AMOUNT}""",
    _FLAGS,
)
_AFTER_PROSE = re.compile(
    rf"""(?P<gap>(?P<scale>)(?P<scale_words>)[^.!?\n:;]{{0,80}}?(?<!\w)(?:is|was|be|of|at|=)\s{{1,3}}
        (?:{_FILLER}\s{{1,3}}){{0,3}}){_BETWEEN}{_AMOUNT}""",
    _FLAGS,
)
_NUMBER_FIRST = re.compile(
    rf"""(?<![\w.,%]){_BETWEEN}{_AMOUNT}\s{{0,3}}(?:(?:absolutely|very|quite|fairly|pretty|completely)\s)?+
         (?:sure|certain|confident|confidence|certainty)\b""",
    _FLAGS,
)
_BARE = re.compile(
    rf"""(?P<before>\A|(?<=[^\W\d])[.!?]|[.!?](?=[\s*_(])|\n|[,;(\[—]|\s[-–]\s|\A\W{{0,3}}(?:yes|no)(?=\W))
         [\s*_"'`(\[]{{0,6}}(?:~|≈|about\s|around\s|approximately\s)?+{_AMOUNT}[\s*_"'`)\].!]*\Z""",
    _FLAGS,
)
_WEAK_GAP = re.compile(r"[\s*_]*")
_FIRM_GAP = re.compile(r"[:=(]|\b(?:is|of|at)\b", re.IGNORECASE)
_NEGATED = re.compile(r"(?:\bnot|n't|\bcannot|\bnever)\s+(?:\w+\s+){0,2}\Z", re.IGNORECASE)
_COUNTS_SOMETHING = re.compile(
    r"[ \t]{1,3}(?!(?:because|since|as|and|but|based|due|for)\b)[^\W\d_]", re.IGNORECASE
)
_ENDS_IN_PERCENT = re.compile(rf"{_PERCENT}\s{{0,3}}\Z", _FLAGS)


def _beginnings(*words: str) -> str:
    """A pattern of every prefix of the words, longest first, including the empty one."""
    return "|".join(sorted({word[:end] for word in words for end in range(len(word) + 1)}, reverse=True))


_UNIT = rf"(?:\\?|{_beginnings('percent', 'pct')}|per\s(?:{_beginnings('cent')}))"
# What may follow "80%" in a text that can continue as `_RANGE`. U+FFFD is a dash of which only the first byte was generated.
_MAY_BECOME_RANGE = re.compile(
    rf"""\s{{0,3}}(?:{_beginnings("to", "or", "through")}|(?:[-–—~\ufffd]|to|or|through)\s{{0,3}}(?:[\d.,]++(?:e[+-]?\d*)?)?+\s{{0,3}}{_UNIT})\Z""",
    _FLAGS,
)


def _labelled(text: str) -> list[_Statement]:
    """Statements after the word "confidence": `Confidence: 80%`, `my confidence in this is 80%`."""
    labels = list(_LABEL.finditer(text))
    statements = []
    for label, following in zip_longest(labels, labels[1:]):
        match = _AFTER_LABEL.match(text, label.end())
        if match is None or (_WEAK_GAP.fullmatch(match["gap"]) and not _has_unit(match)):
            match = _AFTER_PROSE.match(text, label.end())
            if match is None or not _has_unit(match):
                continue
        if following is not None and match.end("gap") > following.start():
            continue  # the number belongs to the next label
        before = text[max(0, label.start() - 12) : label.start()]
        if not _has_unit(match) and (
            _COUNTS_SOMETHING.match(text, match.end()) or _ENDS_IN_PERCENT.search(before)
        ):
            continue  # "confidence: 2 dogs", "90% confidence: 2"
        statements.append(_statement(match, label.start(), _scale(match)))
    return statements


def _worded(text: str) -> list[_Statement]:
    """Statements in other words: `I am 80% sure`, `with 90% confidence`, `certainty: 0.9`, `quite sure (80%)`."""
    statements = [
        _statement(match, match.start()) for match in _NUMBER_FIRST.finditer(text) if _has_unit(match)
    ]
    for label in _OTHER_LABEL.finditer(text):
        match = _AFTER_LABEL.match(text, label.end())
        if match is not None and _FIRM_GAP.search(match["gap"]) and _has_unit(match):
            statements.append(_statement(match, label.start(), _scale(match)))
    # "not 100% sure" and "can't be 100% certain" state nothing.
    stated = (s for s in statements if not _NEGATED.search(text[max(0, s.start - 40) : s.start]))
    return sorted(stated, key=lambda statement: statement.start)


def _bare(text: str) -> list[_Statement]:
    """At most one statement: a number with a unit, alone in the text or in its last clause."""
    text = text.rstrip()
    match = _BARE.search(text, max(0, len(text) - 120))
    if match is None or not _has_unit(match):
        return []
    if not match["percent"]:
        if match["before"].strip() in (",", ";", "(", "[", "—", "-", "–"):
            return []  # "(0.1, 0.5)" are coordinates
        if (match["range"] and "%" not in match["range"]) or match["denominator"] not in (None, "10", "100"):
            return []  # "1990-1995" are years, "1/2" is an answer
    return [_statement(match, match.start("sign" if match["sign"] else "number"))]


def _statement(match: re.Match[str], start: int, scale: float | None = None) -> _Statement:
    return _Statement(start, match.end(), _amount(match, scale))


def _scale(match: re.Match[str]) -> float | None:
    """The number that means 100% on the scale between label and number: 100 for "(0-100)" and "(%)"; None without a scale."""
    scale = match["scale"] or match["scale_words"] or ""
    if numbers := re.findall(_NUMBER, scale, re.IGNORECASE):
        return _number(numbers[-1])
    return 100.0 if "%" in scale or "percent" in scale.lower() else None


_LEAD_IN = re.compile(
    r"""(?:(?<!\w)(?:and\s|but\s)?(?:I\s(?:am|have|would\ssay)(?:\san?)?|I'm|with(?:\san?)?|at(?:\san?)?|my|the)\s{1,3})?
        (?:(?<!\w)(?:overall|about|only|roughly|approximately|around|almost|nearly|very|quite|fairly|pretty|high)\s{1,3})?
        [~≈]?[*_`"'(\[{<]{0,3}\Z""",
    _FLAGS,
)
_TAIL = re.compile(
    r"\s{1,3}(?:that\b|(?:of|in|about)\s(?:my|this|the)\s(?:answer|response)\b)|\s?</\s?confidence\s?>",
    _FLAGS,
)
_JSON_ANSWER = re.compile(
    r'"answer"\s{0,3}:\s{0,3}(?:"(?P<quoted>(?:[^"\\]|\\.)*+)"|(?P<word>\w++))', re.IGNORECASE
)
_VERBAL = re.compile(
    r"(?<![^\W_])confidence(?:\slevel)?\s?(?:[:=]|\bis\b)[\s*]{0,4}(?:(?:very|quite|fairly|moderately)\s)?"
    r"(?:high|low|medium|moderate)\b",
    re.IGNORECASE,
)
_PAIRS = {")": "(", "]": "[", "}": "{", '"': '"', "'": "'", ">": "<"}


def _widen(text: str, statement: _Statement) -> tuple[int, int]:
    """The statement's span extended by its lead-in ("I am", "with a"), brackets and markup."""
    before = text[max(0, statement.start - 60) : statement.start]
    lead_in = _LEAD_IN.search(before)
    start, end = statement.start - (len(before) - lead_in.start() if lead_in else 0), statement.end
    for closer in text[end : end + 6]:
        inside, opener = text[start:end], _PAIRS.get(closer, "")
        opened = inside.count(closer) % 2 if opener == closer else inside.count(opener) > inside.count(closer)
        if closer not in "*_`" and not (opener and opened):
            break
        end += 1
    tail = _TAIL.match(text, end)
    return start, tail.end() if tail else end


def _join(pieces: list[str]) -> str:
    """Join the pieces around removed statements without dangling punctuation."""
    joined = pieces[0].rstrip()
    for piece in pieces[1:]:
        rest = piece.lstrip()
        if not joined or joined[-1] in ".,;:!?-–—":
            rest = rest.lstrip(" \t.,;:!-–—")
        if not rest or not joined or rest[0] in ".,;:!?)":
            joined += rest.rstrip()
        else:
            joined += ("\n" if "\n" in piece[: len(piece) - len(rest)] else " ") + rest.rstrip()
    return joined if pieces[-1].strip(" .!\n") else joined.rstrip(" \t\n,;:-–—")


DEFAULT_TEMPLATE = (
    '{question}\nAnswer briefly, then state your confidence that it is correct as "Confidence: <number>%".'
)
"""It names the form of the reply, which fine-tuning teaches, and contains no number that a model could repeat."""


def check_template(template: str, name: str, *placeholders: str) -> None:
    """DataError unless the template, called `name`, has the placeholders and no other; literal braces are doubled."""
    try:
        parsed = string.Formatter().parse(template)
        fields = {tuple(field) for _, *field in parsed if field[0] is not None}
    except ValueError as error:
        raise DataError(f"{name} {template!r}: {error}; double literal braces") from error
    if fields != {(placeholder, "", None) for placeholder in placeholders}:
        expected = " and ".join(f"{{{placeholder}}}" for placeholder in placeholders)
        raise DataError(
            f"{name} {template!r}: needs {expected}, without a format, and no other placeholder; double literal braces"
        )


@dataclass(frozen=True)
class ElicitationPrompt:
    """A prompt template.

    Args:
        template: text with at least one `{question}` and no other placeholder; see `check_template`, which raises a DataError.
    """

    template: str = DEFAULT_TEMPLATE

    def __post_init__(self) -> None:
        check_template(self.template, "prompt template", "question")

    def render(self, question: str) -> str:
        """The prompt for one question; the question is inserted unchanged, braces included."""
        return self.template.format(question=question)
