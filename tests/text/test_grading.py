import time
from itertools import chain, permutations
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.text.confidence import render_response
from vlm_calibration.text.grading import Grade, Grading, grade, parse_answer


def rows(text):
    return [line.split(" | ") for line in text.strip().splitlines()]


def texts(block):
    return tuple(chain(*rows(block)))


SAID = """
yes | Yes | **Yes** | Absolutely. | The answer is yes. | Yes, there is no dog | Yes, there is no doubt
yes | Yes, without a doubt. | There is no doubt that there is a dog | A dog? Yes. | There is a dog
yes | The image shows a dog | Certainly, there is a dog. | Yes. Confidence: 80% | I am 80% sure there is a dog | Yes 95%
yes | There appears to be a dog | There appear to be two dogs. | There seems to be a dog in the image
yes | There looks to be a dog | There would appear to be a dog | There does appear to be a dog
yes | Certainly, there appears to be a dog | Based on the image, there seems to be a dog | It appears that there is a dog
yes | It seems there's a dog | It looks like there is a dog | It looks as if there is a dog
yes | Looks like there are two dogs | There is clearly a dog | There probably is a dog | There is indeed a dog
yes | I can clearly see a dog | I do see a dog | We see a dog | A dog is clearly visible in the background
yes | In the image, a dog is visible | Two dogs are present | A dog can clearly be seen | The image appears to show a dog
yes | The scene seems to contain a dog | It seems so | So it seems | I think so | Looks like it | Indeed | Indeed it is
yes | Indeed, yes | Indeed, there is a dog | Apparently yes | I believe that there is a dog
yes | There is a dog, as far as I can see. | There seems to be a dog on the left. It is brown.
no | No | Nope | Definitely not | Answer: No | I think no | No, there is a cat | Is there a dog? No.
no | There is no dog | There isn't any | I don't see a dog | I cannot see a dog | It is not red | Confidence: 0.9. No
no | {"answer": "No", "confidence": 0.9} | There seems to be no dog | There appears not to be a dog
no | There does not appear to be a dog | There doesn't seem to be a dog | It appears that there is no dog
no | It looks like there isn't a dog | It doesn't look like there is a dog | It doesn't look like it
no | It does not seem so | It seems not | I don't think so | I think not | I'm afraid not | Apparently not
no | Unfortunately not | Indeed not | Indeed no | Indeed, there is no dog | Absolutely not | Certainly not
no | Of course not | Of course there isn't | Not really | Not at all | Not that I can see | Not visible
no | A dog is not visible | No dog can be seen | A dog can't be seen | The dog is nowhere to be seen
no | I believe that there is no dog | There is no dog, as far as I can see. | There seems to be no dog on the left.
no | Nowhere to be seen | There isn't | There aren't any dogs | I see none | The image doesn't appear to show a dog
no | The image lacks a dog | The scene is devoid of dogs | A dog is missing from the image | The dog is absent
none | Yes or no | Yes/no | Yes. No. | No, yes | Yes, no | I don't know | It cannot be determined | Maybe | No idea
none | It is hard to tell | A dog, a cat. Yes. No. | I see a dog, not a cat | It is white | A dog | Is there a dog | 80%
none | There may be a dog | There might be a dog | It might be | Perhaps so | It looks like a dog | It appears to be red
none | It seems to be a cat | Is a dog visible? | I'm not sure there appears to be a dog | Looks can deceive
"""
"""Each line: what replies say, and the replies, with hedges, statements, both words and confidences."""
YES_NO = {"Answer: No\nConfidence: 80%": "no", "": None} | {
    text: None if row[0] == "none" else row[0] for row in rows(SAID) for text in row[1:]
}


@pytest.mark.parametrize(("text", "answer"), YES_NO.items())
def test_yes_no_answers(text, answer):
    assert parse_answer(text, "yes_no") == answer
    assert grade(text, "Yes", "yes_no") == Grade(answer, answer == "yes")
    assert grade(text, "no.", "yes_no") == Grade(answer, answer == "no")


PLACES = ("", " in the image", " on the sofa")
AFFIRMED = texts(
    "there is a X | there are two Xs | I see a small X | the image shows the X | a X is visible | I can see Xs"
)
DENIED = texts("""
there is no X | there are no Xs | there are zero Xs | I see zero Xs | I see 0 Xs | there isn't a X
I don't see any Xs | I do not see a X | the image does not show a X | the scene lacks a X
there is not a single X | there is unlikely to be a X | it is unlikely that there is a X | a X is not visible
no X can be seen | there is no sign of a X | the image is devoid of Xs
""")
UNDECIDED = texts(
    "there may be a X | it is unclear whether there is a X | there could be a X | there is hardly a X"
)
# Two objects in one clause: of Y what the clause affirms, of X what it denies.
DENIED_BESIDE = texts("""
there is a Y without a X | there is a Y, not a X | there is an empty Y, no X | I see a Y with no X
the image shows a Y and no X | there is a Y instead of a X | there is a Y rather than a X
not a X, there is a Y | I see two Ys and zero Xs
""")
BOTH_AFFIRMED = texts("there is a X and a Y | I see a X, a Y | the image shows a X with a Y")
BOTH_DENIED = texts(
    "there is no X or Y | there are no Xs or Ys | neither a X nor a Y is visible | I see no X and no Y"
)
JOINED = (", but ", ". ", "; ", ", and ", ", while ", " and ", ", although ")
NOUNS = texts(
    "dog | cat | red bicycle | dining table | person | doghouse | teddy bear | bear | hot dog | elephant"
)
QUESTIONS = texts(
    "Is there a X in the image? | Do you see any X in this photo? | Does the image contain a X? | Is a X visible?"
)


class Said(NamedTuple):
    """A generated reply, and what it says of some objects; of any other it says nothing."""

    reply: str
    says: dict[str, str | None]


def _written(form: str, x: str, y: str = "") -> str:
    return form.replace("X", x).replace("Y", y).replace("persons", "people")


@st.composite
def replies(draw: st.DrawFn) -> Said:
    """One or two clauses about one or two objects, in either order."""
    x, y = draw(st.permutations(NOUNS))[:2]
    beside = [(f, "no", "yes") for f in DENIED_BESIDE] + [(f, "yes", "yes") for f in BOTH_AFFIRMED]
    beside += [(f, "no", "no") for f in BOTH_DENIED]
    alone = [(f, "yes") for f in AFFIRMED] + [(f, "no") for f in DENIED]
    if draw(st.booleans()):
        form, of_x, of_y = draw(st.sampled_from(beside))
        reply, says = _written(form, x, y), {x: of_x, y: of_y}
    elif draw(st.integers(0, 9)) == 0:
        reply, says = _written(draw(st.sampled_from(UNDECIDED)), x), {}
    else:
        (first, of_x), (second, of_y) = draw(st.sampled_from(alone)), draw(st.sampled_from(alone))
        reply, says = _written(first, x), {x: of_x}
        if draw(st.booleans()):
            reply += draw(st.sampled_from(PLACES)) + draw(st.sampled_from(JOINED)) + _written(second, y)
            says[y] = of_y
    opening = draw(st.sampled_from(["", "", "Well, ", "I think ", "In the image, "]))
    text = opening + reply + draw(st.sampled_from(PLACES)) + "."
    return Said(text[0].upper() + text[1:], says)


@given(replies(), st.sampled_from(NOUNS), st.sampled_from(QUESTIONS))
def test_a_reply_is_never_graded_as_what_it_does_not_say_of_the_object_asked_about(said, noun, question):
    for asked in {*said.says, noun}:
        answer = parse_answer(said.reply, "yes_no", question.replace("X", asked))
        assert answer in (said.says.get(asked), None), asked


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize(("x", "y"), list(permutations(NOUNS[:3], 2)))
def test_a_plain_statement_about_the_object_asked_about_is_graded(x, y, question):
    forms = [(f, "yes") for f in AFFIRMED] + [(f, "no") for f in (*DENIED, *DENIED_BESIDE, *BOTH_DENIED)]
    for form, answer in [*forms, *((f, "yes") for f in BOTH_AFFIRMED)]:
        for reply in (_written(form, x, y), f"There is a {y}. {_written(form, x, y)}"):
            assert parse_answer(reply, "yes_no", question.replace("X", x)) == answer, reply


ABOUT = """
Is there a dog? = There is a cat, and it is visible = none | Is there a dog? = There is a dog bowl = none
Is there a dog? = There is no other dog = none | Is there a dog? = There isn't a picture without a dog = none
Is there a dog? = There is a cat or a dog = none | Is there no dog? = There is no dog = none
Is there a dog on the left? = There is one on the right = none | Are there two dogs? = There are three dogs = none
Is there a dog on the sofa? = There is a dog under the sofa = none | Is the car red? = The car is not blue = none
Is the cat behind the dog? = The dog is not behind the cat = none
Is the umbrella open? = The umbrella is not closed = none
Is the car red? = The car is not red = no | Is the man wearing a hat? = He isn't wearing a hat; he wears a cap = no
Is there a dog on the sofa? = There is a cat on the sofa, but no dog = no | Is there a person? = There is nobody = no
Is there a dog? = There is a dog that is not brown. It has no collar = yes
Is there a dog? = A dog? I don't see one = no
"""
"""Questions, replies, and what they answer: nothing if they are about something else."""


@pytest.mark.parametrize(("question", "reply", "said"), [triple.split(" = ") for triple in texts(ABOUT)])
def test_a_statement_is_an_answer_if_it_is_about_what_is_asked(question, reply, said):
    answer = None if said == "none" else said
    assert parse_answer(reply, "yes_no", question) == answer
    assert grade(reply, "no", "yes_no", question=question) == Grade(answer, answer == "no")


RIGHT = """
a dog = dog | the DOG = A dog | It is a dog. = dog | The answer is: dog = dog | Answer: It is a dog = dog
I see a dog. = dog | The object at the top left is a dog. = dog | At the top left, there is a dog = dog
In the top left corner of the image is a dog = dog
There is a dog at the top left of the image. It is brown. = dog | A dog. Confidence: 80% = dog
{"answer": "dog", "confidence": 0.9} = dog | 2 = two | Twenty-one = 21 | 1,000 = 1000 | 50 % = 50% | 3.5 = 3.5
10:30 = 10:30 | A = a | t-shirt = T shirt | Dr. Pepper = dr pepper
There is a light. It never goes out = There is a light. It never goes out | on the left = on the left
It is on the left = on the left | Ｄｏｇ = dog | 犬 = 犬 | don't walk = Don’t walk | shoes = shoe | boxes = box
knives = knife | berries = berry | tomatoes = tomato | people = person | firemen = fireman
"""
WRONG = """
hot dog = dog | a dog or a cat = dog | dog, cat = dog | It's not a dog = dog | There is no dog = dog
I don't know = dog | doghouse = dog | 50 = 50% | -5 = 5 | 3.5 = 35 | bus = bush | ... = dog | Confidence: 80% = dog
"""


def _pairs(block):
    return [pair.split(" = ") for pair in texts(block)]


GRADED = [(text, gold, True) for text, gold in (*_pairs(RIGHT), ("dog\nI can see its tail", "dog"))]
GRADED += [(text, gold, False) for text, gold in (*_pairs(WRONG), ("", "dog"))]


@pytest.mark.parametrize("answer_type", ["short", "open"])
@pytest.mark.parametrize(("text", "gold", "correct"), GRADED)
def test_short_and_open_answers(text, gold, correct, answer_type):
    assert grade(text, gold, answer_type).correct is correct


def test_synonyms_of_the_record_count():
    assert grade("a puppy", "dog", "short", ["Puppies", "hound"]) == Grade("puppy", True)
    assert not grade("a kitten", "dog", "short", ["puppy"]).correct
    assert not grade("", "dog", "short", [""]).correct
    assert grade("a puppy on a mat", "dog", "short", ["Puppy"], Grading(short="contains")).correct
    assert grade("a small puppy", "dog", "open", ["small brown puppy"], Grading(open="token_f1")).correct


def test_the_predicted_short_answer_is_readable():
    readable = {"It is a Red  Bicycle!": "red bicycle", "two dogs": "2 dogs", "It is": "it is"}
    readable |= {"!": None, "": None}
    assert {text: parse_answer(text, "short") for text in readable} == readable


CONTAINS = Grading(short="contains", open="contains")
TOKEN_F1 = Grading(short="token_f1", open="token_f1")


@pytest.mark.parametrize("answer_type", ["short", "open"])
def test_an_answer_may_contain_the_gold_one(answer_type):
    for text, gold, correct in (
        ("A brown dog lies on the sofa. Confidence: 80%", "dog", True),
        ("I can see two dogs", "a dog", True),
        ("A red bicycle leans there", "red bicycle", True),
        ("A red old bicycle", "red bicycle", False),
        ("A doghouse", "dog", False),
        ("Confidence: 80%", "80", False),
    ):
        assert grade(text, gold, answer_type, grading=CONTAINS).correct is correct, text


def test_token_f1_is_that_of_squad():
    for text, gold, f1 in (
        ("The dog is on the sofa.", "A dog on a sofa", 6 / 7),
        ("dog dog", "dog", 2 / 3),
        ("cat", "dog", 0),
        ("Dog!", "the dog", 1),
        ("the", "a", 1),
        ("", "dog", 0),
        ("A dog on a sofa. Confidence: 90%", "A dog on a sofa", 1),
    ):
        for threshold in (0.01, 0.5, 0.67, 0.86, 1.0):
            graded = grade(text, gold, "open", grading=Grading(open="token_f1", min_f1=threshold))
            assert graded.correct is (f1 >= threshold), text


def test_a_rule_is_for_its_type_of_answer_alone():
    grading = Grading(short="contains", open="token_f1", min_f1=0.25)
    assert [grading.rule(k) for k in ("yes_no", "short", "open")] == ["exact", "contains", "token_f1 >= 0.25"]
    assert [Grading().rule(k) for k in ("yes_no", "short", "open")] == ["exact"] * 3
    assert grade("There is no dog in it", "no", "yes_no", grading=grading).correct
    assert not grade("a brown dog", "dog", "open", grading=Grading(short="contains")).correct


def test_a_ranking_measures_levels_and_grades_no_answer():
    ranking = Grading(open="contains", rank_levels=True)
    assert [ranking.level_rule(kind) for kind in ("yes_no", "short", "open")] == ["exact", "exact", "ranking"]
    assert not grade("a cat", "dog", "open", grading=ranking).correct


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *((lambda f=f: Grading(min_f1=f), r"min_f1 must be in \(0, 1\]") for f in (0.0, 1.5, float("nan"))),
        (lambda: Grading(short="ranking"), r"grading\.short must be one of .*'ranking'"),
        (lambda: Grading(open="ranking"), r"grading\.open must be one of .*'ranking'"),
        *((lambda g=g: grade("yes", g, "yes_no"), "must be yes or no") for g in ("dog", "", "yes and no")),
        (lambda: grade("dog", " . ", "short"), "gold answer of a short question is empty"),
        (lambda: parse_answer("yes", "number"), "known: yes_no, short, open"),
    ],
)
def test_impossible_rules_and_gold_answers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(st.text(), st.sampled_from(["yes_no", "short", "open"]))
def test_any_text_can_be_graded(text, answer_type):
    result = grade(text, "no", answer_type)
    assert result.predicted == parse_answer(text, answer_type)
    if answer_type == "yes_no":
        assert result.predicted in ("yes", "no", None)


WORD = st.sampled_from(["dog", "cat", "tall", "bear", "grass", "berry", "bus", "two", "zebra"])
WORDS = st.lists(WORD, min_size=1, max_size=3)


@given(WORDS.map(" ".join), st.floats(0, 1), st.sampled_from([Grading(), CONTAINS, TOKEN_F1]))
def test_a_rendered_gold_answer_is_right(gold, confidence, grading):
    assert grade(render_response(gold, confidence), gold, "short", grading=grading).correct


@pytest.mark.parametrize(
    "piece",
    [
        *("a", " ", ".", ",", "'", "-", "1", "1,", "1,111", "% ", "the ", "in the top left "),
        *("there is ", "not ", "?", "\n", "犬"),
    ],
)
def test_grading_time_is_linear_on_adversarial_text(piece):
    body = (piece * (20_000 // len(piece) + 1))[:20_000]
    start = time.process_time()
    for text in (f"It is {body}", f"Yes. {body} dog"):
        parse_answer(text, "short")
        parse_answer(text, "yes_no")
    # Linear time takes up to 0.2 s, quadratic time takes many seconds.
    assert time.process_time() - start < 2
