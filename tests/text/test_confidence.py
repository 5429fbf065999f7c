import math
import time
from decimal import Decimal
from itertools import chain

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlm_calibration.text.confidence import (
    end_of_confidence,
    parse_confidence,
    render_answer,
    render_response,
    strip_confidence,
)


def rows(text):
    return [line.split(" | ") for line in text.strip().splitlines()]


STATED_TEXTS = """
1.0 | Confidence: 1
0.95 | Confidence: >95% | No - 95%
0.9 | Confidence (0-1): 0.9 | Confidence: 9e-1 | Confidence: at least 90% | Confidence = 0.9
0.9 | {"answer": "yes", "confidence": 0.9} | {"answer": "yes", "confidence": "90%"} | Confidence: high (90%)
0.9 | I would say 90 percent confident. | With 90% confidence, yes. | I have 90% confidence: 2 dogs | certainty: 0.9
0.9 | No. 0.9 | 70% of it is sky. Confidence: 0.9 | The label says 30%. I am 90% sure. | Confidence: 0.9. No
0.875 | Confidence: 87.5% | Confidence: 87,5 %
0.85 | Confidence (on a scale from 0 to 100): 85 | Confidence on a scale of 0 to 100: 85 | Confidence (%): 85
0.85 | Confidence [0 to 100]: 85 | Confidence: 0,85 | Confidence: 85 | Confidence: 85 because I see it
0.85 | Confidence: **85%** | **Confidence:** 85% | Confidence (85%) | Yes (confidence: 85%) | confidence level: 0.85
0.8 | Confidence: 80% | Confidence: 80 % | Confidence: 80 per cent | Confidence : 80% | CONFIDENCE: 80%
0.8 | Confidence: +80% | Confidence: 8/10 | Confidence: 4/5 | Confidence: 8 out of 10 | Confidence: 80 out of a 100
0.8 | Confidence (1-10): 8 | Confidence (out of 10): 8 | Confidence: 0.8 | Confidence: .8 | Confidence: ~80%
0.8 | Confidence: about 80% | Confidence: 80% ± 5% | about 80% | Confidence - 80% | Confidence—80%
0.8 | <confidence>80%</confidence> | Confidence：８０％ | 置信度：８０％ | Confidence: ٨٠٪ | Ｃｏｎｆｉｄｅｎｃｅ： ０．８ | My confidence is 80%
0.8 | My confidence in this answer is 80%. | I have a confidence of 80% | My confidence that there are 3 dogs is 80%
0.8 | I'm about 80% confident that there is a dog | 8 out of 10 sure | Yes, I am quite sure (80%). | 80 % | 80 percent
0.8 | **80%** | Yes. 80% | Yes.80% | Yes, 80% | Yes 80% | Yes (80%) | There are 3 dogs. Confidence: 80%
0.8 | Confidence: 80%. There are 3 dogs | Confidence: 80%. I am 100% sure | Confidence: 100%. Confidence: 80%
0.7 | {"confidence_score": 0.7, "answer": "2"} | ConfidenceScore: 70 | I'm not 100% sure, but about 70% confident
0.6 | I am 30% sure. No: I am 60% sure.
0.01 | Confidence: 1% | Confidence (0-100): 1
0.0 | Confidence: 0% | Confidence: 0
"""
"""Each line: a confidence, and texts that state it, of the table in the module's docstring and from real models."""
STATED = {
    "Confidence:\n- 85%": 0.85,
    "Confidence\n80%": 0.8,
    "Confidence: 80\\%": 0.8,
    "Confidence: $80\\%$": 0.8,
    "Confidence:\n\n**80**": 0.8,
    "Confidence:\u200b80\xa0%": 0.8,
    "Yes\n80%": 0.8,
    "Answer: 25%\nConfidence: 80%": 0.8,
} | {text: float(row[0]) for row in rows(STATED_TEXTS) for text in row[1:]}

NOT_STATED = """
Confidence: 150% | Confidence: -5% | Confidence: −5% | Confidence: －５％ | Confidence: 12/10 | Confidence: 1/0
Confidence: 1000 | Confidence: 1,000% | Confidence: 1.5 | Confidence (1-10): 11 | Confidence: 1e999
Confidence: 1/1e999 | 150% | -5% | Confidence: 80-90% | Confidence: 80%-90% | Confidence: 80% to 90%
Confidence: between 80 and 90% | 80-90% sure | between 80 and 90% sure | Yes, 80-90% | Confidence: high
confidence | Confidence: | Confidence: N/A | Confidence: 80th | Confidence: 80‰
{"answer": "yes", "confidence": null} | I am not 100% sure | I can't be 100% certain | Yes. | 2 | Yes. 2
The battery shows 80%. | It is 0.80% of it | (0.1, 0.5) | [0.1, 0.2, 0.3] | 1/2 | Yes. 1990-1995
with high confidence because 80% of the image is a dog | I have high confidence: 2 dogs
Confidence: 80%. Confidence: 150% | Confidence: 150%. 80%
"""


@pytest.mark.parametrize(("text", "confidence"), STATED.items())
def test_a_stated_confidence_is_read(text, confidence):
    assert parse_confidence(text) == confidence


@pytest.mark.parametrize("text", ["", *chain(*rows(NOT_STATED))])
def test_nothing_is_made_up(text):
    assert parse_confidence(text) is None


@given(st.text())
@settings(max_examples=200)
def test_any_text_gives_none_or_a_confidence(text):
    for candidate in (text, f"Confidence: {text}", f"{text}% sure", f"Yes. {text}%"):
        confidence = parse_confidence(candidate)
        assert confidence is None or 0.0 <= confidence <= 1.0
        strip_confidence(candidate)


# Fragments of statements in random order, which build answers that resemble statements of confidence.
FRAGMENTS = st.lists(
    st.sampled_from(
        [
            *("confidence", "Confidence: ", "certainty", "sure", "not ", "I am ", "80%", "150", "0.8"),
            *("8 out of", "/", "10", "-", "–", "%", "(", ")", "[", "]", "**", '"', "'", ":", ",", "."),
            *("?", " ", "\n", "between ", "and ", "to ", "yes", "no", "is ", "of ", "about ", "８", "％"),
            *("置信度", "±", "percent", "(0-100)", "level", "{", "}", "<", ">", "\\", "answer"),
        ]
    ),
    max_size=12,
).map("".join)


@pytest.mark.slow
@given(st.one_of(st.text(), FRAGMENTS), st.floats(0, 1))
@settings(max_examples=400)
@example("Confidence", 0.8)
@example("Confidence: 50%", 0.8)
@example("I am 30% sure", 0.8)
@example("between 10 and", 0.8)
@example("80% confidence:", 0.2)
@example("not", 0.8)
def test_what_is_rendered_is_read_back_whatever_the_answer_holds(answer, confidence):
    response = render_response(answer, confidence)
    assert response.startswith(render_answer(answer))
    percent = int(response.removesuffix("%").rpartition(" ")[2])
    assert abs(percent - 100 * confidence) <= 0.5 + 1e-9
    assert parse_confidence(response) == percent / 100


@given(st.text(st.sampled_from("abcdef ghi XYZ äé 犬"), min_size=1).filter(str.strip), st.floats(0, 1))
def test_stripping_a_rendered_response_gives_the_rendered_answer(answer, confidence):
    assert strip_confidence(render_response(answer, confidence)) == render_answer(answer)


@pytest.mark.parametrize(
    ("answer", "confidence", "response"),
    [
        ("Yes", 0.8, "Yes. Confidence: 80%"),
        ("Yes.", 0.8, "Yes. Confidence: 80%"),
        ("Yes!", 1, "Yes! Confidence: 100%"),
        ("  a red bicycle\n", 0.0, "a red bicycle. Confidence: 0%"),
        ('It says "stop."', 0.5, 'It says "stop." Confidence: 50%'),
        ('It says "stop"', 0.5, 'It says "stop". Confidence: 50%'),
        ("是。", 0.5, "是。 Confidence: 50%"),
        ("", 0.5, "Confidence: 50%"),
    ],
)
def test_the_form_of_a_response(answer, confidence, response):
    assert render_response(answer, confidence) == response


@given(st.floats(0, 1))
@example(0.005)
@example(0.285)
def test_rounding_is_to_the_nearest_percent_with_ties_up(confidence):
    percent = math.floor(Decimal(repr(confidence)) * 100 + Decimal("0.5"))
    assert render_response("", confidence) == f"Confidence: {percent}%"


def test_a_confidence_outside_the_unit_interval_cannot_be_rendered():
    for confidence in (-0.01, 1.01, 80, float("nan")):
        with pytest.raises(ValueError, match=r"confidence must be in \[0, 1\]"):
            render_response("Yes", confidence)


STRIPPED_TEXTS = """
Yes. Confidence: 80% => Yes. | Confidence: 0.9. No => No | Confidence: 150%. No => No | Confidence: high. No => No
**Confidence: 85%** Yes => Yes | No (confidence: 90%). => No. | My confidence is 80%. Yes => Yes | Yes, 80% => Yes
No, with 90% confidence, there is no dog. => No, there is no dog. | With 90% confidence, yes. => yes. | No - 95% => No
I am 80% sure that there is a dog. Confidence: 80% => there is a dog. | Yes, I am 80% sure. => Yes
Dogs inspire confidence in people, my confidence is 80% => Dogs inspire confidence in people | 50 % => 50 %
I am quite sure (80%): no => no | <confidence>80%</confidence> No => No | The label says 80% => The label says 80%
{"answer": "No, it is \\"red\\"", "confidence": 0.9} => No, it is \\"red\\"
"""
STRIPPED = {
    "Yes.\n\nConfidence: **85%**": "Yes.",
    "Yes\n**Confidence:** 85%\nBecause": "Yes\nBecause",
    "Confidence (0-100): 85\nAnswer: no": "Answer: no",
    "  2 dogs ": "2 dogs",
    "": "",
} | dict(pair.split(" => ") for row in rows(STRIPPED_TEXTS) for pair in row)


@pytest.mark.parametrize(("text", "answer"), STRIPPED.items())
def test_the_statement_is_removed_wherever_it_stands(text, answer):
    assert strip_confidence(text) == answer


ADVERSARIAL = """1|1.|1,|9|confidence|confidence |confidence: |confidence is |confidence of about |is |sure |not |100% |
100% sure |-|–|(|[|*|"|1/|1 of |1 to |1-|1% - 1%|between 1 and |yes |no,|answer: |"answer": "|"answer":"\\|in the top left |
Confidence (|confidence on a scale of |certainty: (|８|％|置信度|±|1±|1e1|<confidence>|It is a |the a is |I am |with a |?|~|≈|0.""".replace(
    "\n", ""
).split("|")


@pytest.mark.parametrize("piece", [*ADVERSARIAL, " ", "\n", "\t", "\u200b", "confidence " + "x " * 39])
def test_time_is_linear_on_adversarial_text(piece):
    body = (piece * (10_000 // len(piece) + 1))[:10_000]
    text = f"{body} Confidence: {body} 80%"
    start = time.process_time()
    parse_confidence(text)
    strip_confidence(text)
    parse_confidence(f"Confidence: 80%{body}{body}")
    # Linear time takes up to 0.2 s, quadratic time takes many seconds.
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("text", "behind"),
    [
        *(
            ("Yes. Confidence: 80%", more)
            for more in (".", " I", ", or 90%", " to be", " to 90 dogs", " or more")
        ),
        ("Yes. Confidence: 80%", "\n\nIs"),
        ("Yes. Confidence: 80% ± 5%", "."),
        ("A red bicycle.\nConfidence: 7.5%", ")"),
        ("Yes. **Confidence:** 85\\%", "**"),
        ("是。置信度：８０％", "。"),
        ("50% of them are dogs. Confidence: 90%", "."),
        ("Yes. Confidence: 80 percent", "."),
    ],
)
def test_where_a_complete_answer_ends(text: str, behind: str) -> None:
    assert end_of_confidence(text) is None, "the continuation is open"
    assert end_of_confidence(text + behind) == len(text)


@pytest.mark.parametrize(
    "text",
    [
        *map(
            "Yes. Confidence: 80%{}".format,
            ("", " ", "\n", "-", "\ufffd", " t", " to", " to 9", " to 90 ", " or"),
        ),
        *("Yes. Confidence: 80% to 90%", "Yes. Confidence: 80%-90%.", "Yes. Confidence: 80% or 90%. It"),
        *("Confidence: 80%. ", "**Confidence:** 80%. ", "I am 80% "),  # the answer or the sentence continues
        *(
            "Yes. Confidence: 80.",
            "Yes. Confidence: 80-90%.",
            "Yes. Confidence: 150%.",
            "The label says 80%.",
        ),
        *("%", ""),
    ],
)
def test_what_is_not_complete(text: str) -> None:
    assert end_of_confidence(text) is None


@given(st.text(max_size=60), st.floats(0, 1))
def test_a_rendered_response_is_complete_and_no_beginning_of_it(answer: str, confidence: float) -> None:
    response = render_response(answer, confidence)
    stated = response.rindex("Confidence")
    if any(c.isalnum() for c in strip_confidence(response)):
        assert end_of_confidence(f"{response}.") == len(response)
    for end in range(stated, len(response)):
        assert end_of_confidence(response[:end]) == end_of_confidence(response[:stated])


PIECES = [
    *("t", "to", "or", "thro", "ugh", "through", "-", "–", " ", "\n", "9", "90", ".", ",", "%"),
    *("per", "cent", " dogs", "I", "e"),
]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
@example(" to 90%")
@example("-90 percent of")
@example(" through 9e1%")
def test_stopping_early_loses_no_confidence(behind: str) -> None:
    """Parsing each prefix and stopping at the first complete one gives the confidence of the full text."""
    text = f"Yes. Confidence: 80%{behind}"
    ends = (end_of_confidence(text[:length]) for length in range(len(text) + 1))
    end = next((e for e in ends if e is not None), len(text))
    assert parse_confidence(text[:end]) == parse_confidence(text)
