"""From the listed tokens of a response to probabilities: of one of two words, of the answer's tokens, of the stated percentage.

A server lists the likeliest tokens at each position (mostly 20), not the likelihood of a text that we choose. So these probabilities
are approximations of what `estimators.answer_scoring` computes: what is not listed counts as impossible.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from vlm_calibration.endpoint.responses import Response, Token, joined
from vlm_calibration.text.confidence import end_of_confidence, parse_confidence, render_answer

PERCENTS = range(101)
_PERCENT = re.compile(r"(\d{1,3})\s{0,3}\\?%\Z")


def complete_statement(text: str) -> str:
    """A generated text up to the end of the first complete statement of a confidence, where local generation stops."""
    for match in re.finditer(r"[%％﹪٪]", text):
        # Local generation sees the character that the token of the percent sign ends with, or the next token.
        for seen in (match.end(), match.end() + 1):
            end = end_of_confidence(text[:seen])
            if end is not None:
                return text[:end].strip()
    end = end_of_confidence(text)
    return text[:end].strip()


def p_of_first(response: Response, words: Sequence[str]) -> float | None:
    r"""The probability of the first of two words at the first token of a response, against the other one.

    :math:`P(w_1) / (P(w_1) + P(w_2))`. A listed token counts for the word that it is, or that it begins; case and surrounding space
    do not matter. Local scoring compares the likelihoods of both words as written.

    Returns:
        In [0, 1]; None if the response does not begin with one of the words, or has no tokens.
    """
    if not response.tokens:
        return None
    # Some tokenizers have white space as a token of its own.
    first = next((t for t in response.tokens if t.text.strip()), None)
    if first is None or _word(first.text, words) is None:
        return None
    mass = [0.0, 0.0]
    for text, log_p in first.alternatives.items():
        word = _word(text, words)
        if word is not None:
            mass[word] += math.exp(log_p)
    return min(1.0, mass[0] / sum(mass)) if sum(mass) > 0 else None


def _word(token: bytes, words: Sequence[str]) -> int | None:
    """The index of the word that a token is, begins, or begins with; None for none or both."""
    text = token.decode("utf-8", "replace").strip().casefold().lstrip("*\"'`")
    if not text:
        return None
    found = [
        index
        for index, word in enumerate(w.casefold() for w in words)
        if word.startswith(text) or re.match(rf"{re.escape(word)}(?!\w)", text)
    ]
    return found[0] if len(found) == 1 else None


def answer_likelihood(response: Response, answer: str) -> float | None:
    r"""The likelihood of an answer, normalised by its length: :math:`\exp(\frac{1}{T} \sum_t \log p(a_t))` over its T generated tokens.

    Local scoring takes the tokens of the answer as training would write it; here they are those that were generated.

    Args:
        response: the response.
        answer: its text without the stated confidence.

    Returns:
        In [0, 1]; None if the response does not begin with the answer, or has no tokens.
    """
    if not response.tokens:
        return None
    content = joined(response.tokens).decode("utf-8", "replace")
    start = len(content) - len(content.lstrip())
    if not answer or not content[start:].startswith(answer):
        return None
    sentence = render_answer(answer)
    end = start + len(sentence if content[start:].startswith(sentence) else answer)
    log_p, position = [], 0
    for token in response.tokens:
        if position >= len(content[:end].encode()):
            break
        log_p.append(token.log_p)
        position += len(token.text)
    return min(1.0, math.exp(sum(log_p) / len(log_p)))


class StatedPercent:
    """The stated percentage in a response, and the tokens that it is made of.

    Attributes:
        before: the response up to the percentage.
        pieces: listed continuations of `before` -> log-probability, at the first token of the percentage. The token may begin with
            the end of `before`, such as a space; continuations are without it.
        tokens: the tokens of the percentage, from its first one.
        generated: the first continuation that was generated.
        is_one_token: whether it has all digits of a number of several: the tokenizer does not split numbers.
    """

    def __init__(self, before: str, number: str, tokens: Sequence[Token], overlap: bytes) -> None:
        self.before = before
        self.tokens = tokens
        self.pieces = _continuations(tokens[0].alternatives, overlap)
        self.generated = tokens[0].text[len(overlap) :].decode("utf-8", "replace")
        self.is_one_token = len(number) > 1 and self.generated.startswith(number)

    @classmethod
    def find(cls, response: Response) -> StatedPercent | None:
        """The percentage that a response states and that its text is cut at; None if it states none, or has no tokens."""
        if not response.tokens:
            return None
        content = joined(response.tokens).decode("utf-8", "replace")
        statement = complete_statement(content)
        statement = content[: content.find(statement) + len(statement)]
        number = _PERCENT.search(statement)
        if number is None or parse_confidence(statement) is None:
            return None
        start, position = len(content[: number.start()].encode()), 0
        for index, token in enumerate(response.tokens):
            if position + len(token.text) > start:
                overlap = token.text[: max(0, start - position)]
                return cls(content[: number.start()], number[1], response.tokens[index:], overlap)
            position += len(token.text)
        return None


def _continuations(alternatives: Mapping[bytes, float], overlap: bytes = b"") -> dict[str, float]:
    """The listed tokens that begin with `overlap`, without it -> log-probability."""
    pieces: dict[str, float] = {}
    for text, log_p in alternatives.items():
        if text.startswith(overlap):
            pieces[text[len(overlap) :].decode("utf-8", "replace")] = log_p
    return pieces


def continuations(response: Response) -> dict[str, float]:
    """The listed first tokens of a response -> log-probability; empty without tokens."""
    return _continuations(response.tokens[0].alternatives) if response.tokens else {}


def possible(piece: str) -> list[int]:
    """The percentages that begin with a piece of text such as "8", "80" or "80%"."""
    return [n for n in PERCENTS if f"{n}%".startswith(piece) or piece.startswith(f"{n}%")]


def is_whole(piece: str, is_one_token: bool) -> int | None:
    """The percentage that a piece of text is: its number, if no digit can follow, or its number with the percent sign; else None.

    Args:
        piece: the text.
        is_one_token: whether a token has all digits of a number, so that no digit can follow any.
    """
    for n in PERCENTS:
        if piece.startswith(f"{n}%") or (piece == str(n) and (is_one_token or n == 0 or n > 10)):
            return n
    return None
