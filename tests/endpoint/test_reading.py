"""Probabilities from listed tokens, for tokenizers with whole numbers, with digits, and with spaces of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest

from vlm_calibration.endpoint.client import Token
from vlm_calibration.endpoint.system import answer_likelihood, complete_statement, p_yes, percent_distribution

Piece = tuple[str, float] | tuple[str, float, Mapping[str, float]]


def tokens(*pieces: Piece) -> tuple[Token, ...]:
    """Tokens: text, probability, and the other tokens that are listed."""
    found = []
    for text, p, *others in pieces:
        listed = {text: p, **(others[0] if others else {})}
        found.append(Token(text.encode(), math.log(p), {t.encode(): math.log(q) for t, q in listed.items()}))
    return tuple(found)


class Server:
    """Continues the beginning of an answer by a table; None where it has no entry."""

    def __init__(self, table: Mapping[str, Mapping[str, float]]) -> None:
        self.table = table
        self.asked: list[str] = []

    def ask_after(self, beginning: str) -> Mapping[bytes, float] | None:
        self.asked.append(beginning)
        following = self.table.get(beginning)
        return None if following is None else {t.encode(): math.log(p) for t, p in following.items()}


def distribution(answer: Sequence[Token], server: Server | None = None) -> dict[float, float]:
    return percent_distribution(answer, (server or Server({})).ask_after)


def test_whole_numbers_need_no_request() -> None:
    others = {" 90": 0.2, " 10": 0.1, " 55": 0.1, " many": 0.05}
    begin = (("Yes", 0.9), (".", 1.0), (" Confidence", 1.0), (":", 1.0))
    answer, server = tokens(*begin, (" 80", 0.5, others), ("%", 1.0)), Server({})
    found = distribution(answer, server)
    assert server.asked == []
    assert list(found) == [n / 100 for n in range(100, -1, -1)]
    mass = {0.9: 0.2, 0.8: 0.5, 0.55: 0.1, 0.1: 0.1}
    assert {c: p for c, p in found.items() if p} == pytest.approx({c: p / 0.9 for c, p in mass.items()})


@pytest.mark.parametrize("space", [True, False], ids=["a space of its own", "a space before the digit"])
def test_digits_are_followed(space: bool) -> None:
    before: list[Piece] = [("Yes.", 0.9), (" Confidence:", 1.0), *([(" ", 1.0)] if space else [])]
    gap = "" if space else " "
    first = {f"{gap}9": 0.3, f"{gap}1": 0.15, f"{gap}2": 0.001}
    answer = tokens(*before, (f"{gap}8", 0.5, first), ("0", 0.8, {"5": 0.2}), ("%", 1.0))
    following = {"9": {"0": 0.5, "5": 0.5}, "1": {"0": 1.0}, "10": {"0": 0.9, "%": 0.1}}
    server = Server({f"Yes. Confidence: {digits}": listed for digits, listed in following.items()})
    found = distribution(answer, server)
    assert sorted(server.asked) == sorted(server.table), "not the generated digit, nor the unlikely one"
    mass = {
        1.0: 0.15 * 0.9,
        0.95: 0.3 * 0.5,
        0.9: 0.3 * 0.5,
        0.85: 0.5 * 0.2,
        0.8: 0.5 * 0.8,
        0.1: 0.15 * 0.1,
    }
    expected = {c: p / sum(mass.values()) for c, p in mass.items()}
    assert {c: p for c, p in found.items() if p} == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["", "Yes.", "Yes. Confidence: high", "Yes. Confidence: 0.8", "Yes. Confidence: 80-90%"]
)
def test_without_a_percentage_there_is_no_value(text: str) -> None:
    assert distribution(tokens((text, 1.0)) if text else ()) == {}


def test_digits_that_are_not_continued_have_no_value() -> None:
    def answer(p: float, others: dict[str, float]) -> tuple[Token, ...]:
        return tokens(("Yes. Confidence: ", 1.0), ("8", p, others), ("0", 1.0), ("%", 1.0))

    assert distribution(answer(0.5, {"9": 0.3})) == {}
    new_answer = Server({"Yes. Confidence: 9": {"Yes": 0.8, "9": 0.1}})
    assert distribution(answer(0.5, {"9": 0.3}), new_answer) == {}
    assert distribution(answer(0.999, {}))[0.8] == 1


@pytest.mark.parametrize(
    ("first", "others", "expected"),
    [
        ("Yes", {"No": 0.2}, 0.75),
        ("No", {"Yes": 0.2}, 0.25),
        (" yes", {"Yes": 0.1, "YES.": 0.1, "no": 0.2}, 0.8),
        ("Yes", {}, 1.0),
        ("Y", {"N": 0.2, "Maybe": 0.1}, 0.75),
        ("Yes", {"Nothing": 0.2, "Yesterday": 0.1}, 1.0),
        ("There", {"Yes": 0.2}, None),
    ],
)
def test_the_first_of_two_words(first: str, others: dict[str, float], expected: float | None) -> None:
    found = p_yes(tokens((first, 0.6, others), (".", 1.0)))
    assert found == (None if expected is None else pytest.approx(expected))
    after_space = p_yes(tokens((" ", 1.0), (first, 0.6, others)))
    assert after_space == found
    assert p_yes(()) is None


def test_the_likelihood_of_an_answer_is_that_of_its_own_tokens() -> None:
    answer = tokens(("A", 0.5), (" dog", 0.8), (".", 0.25), (" Confidence", 0.1), (": 80%", 1.0))
    assert answer_likelihood(answer, "A dog") == pytest.approx((0.5 * 0.8 * 0.25) ** (1 / 3))
    without = tokens(("A", 0.5), (" dog", 0.8), (" Confidence: 80%", 1.0))
    assert answer_likelihood(without, "A dog") == pytest.approx(math.sqrt(0.4))
    umlaut = tokens(("B", 0.5), ("\u00e4r", 0.5), (".", 1.0), (" Confidence: 80%", 0.1))
    assert answer_likelihood(umlaut, "B\u00e4r") == pytest.approx(0.25 ** (1 / 3))
    assert answer_likelihood(answer, "A cat") is None
    assert answer_likelihood(answer, "") is None
    assert answer_likelihood((), "Yes") is None


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("Yes. Confidence: 80%. Because I see it. Confidence: 10%.", "Yes. Confidence: 80%"),
        ("Yes. Confidence: 80%", "Yes. Confidence: 80%"),
        (" Yes. Confidence: 80% to 90%", "Yes. Confidence: 80% to 90%"),
        ("100% of them. Confidence: 70%\n", "100% of them. Confidence: 70%"),
        ("Yes", "Yes"),
    ],
)
def test_texts_end_where_local_generation_stops(text: str, cut: str) -> None:
    assert complete_statement(text) == cut


def test_half_a_character_before_the_percentage_moves_nothing() -> None:
    half = Token(b"\xc3", -1.0, {b"\xc3": -1.0})
    stated = tokens((" Confidence: ", 1.0), ("80", 0.5, {"90": 0.5}), ("%", 1.0))
    answer = (*tokens(("Yes. ", 1.0)), half, *stated)
    found = {c: p for c, p in distribution(answer).items() if p}
    assert found == pytest.approx({0.9: 0.5, 0.8: 0.5})
