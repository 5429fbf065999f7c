"""Question forms, each filled in with many objects, so that a form that fails for every object is visible.

A form is a template: `{x}` is an object, `{xs}` its plural, `{a}` its article, `{y}` the next object of the list, `{ys}` the plural
of that, `{w}` each of the form's words in turn, and `{h}` the word without its article. The rules were developed on the forms and
words of the "development" part. Those of the "held out" part were written before the first measurement, with other objects and
words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple


class Form(NamedTuple):
    """A question form with its answer.

    Attributes:
        name: title of the form.
        question: template.
        answer: template.
        objects: templates of the expected objects.
        absent: templates of the expected absent objects.
        words: values of `{w}`.
        beings: whether objects are people and animals.
    """

    name: str
    question: str
    answer: str
    objects: tuple[str, ...] = ("{x}",)
    absent: tuple[str, ...] = ()
    words: tuple[str, ...] = ("",)
    beings: bool = False


def _objects(text: str) -> tuple[tuple[str, str], ...]:
    """(singular, plural) of each object of a list; "/" separates them if the plural is not the singular with "s"."""
    pairs = [item.strip().split("/") for item in text.split(",")]
    return tuple((pair[0], pair[-1] if len(pair) > 1 else pair[0] + "s") for pair in pairs)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


THINGS = {
    "development": _objects(
        "car, dog, cup, table, door, bus/buses, lake, umbrella, fire hydrant, traffic light, teddy bear, bench/benches"
    ),
    "held out": _objects(
        "knife/knives, horse, boat, shirt, bridge, wine glass/wine glasses, parking meter, tennis racket, suitcase, sheep/sheep, potted plant, box/boxes"
    ),
}
BEINGS = {
    "development": _objects(
        "man/men, woman/women, child/children, person/people, dog, cat, bird, horse, cow, bear, giraffe, lion"
    ),
    "held out": _objects(
        "boy, girl, elephant, zebra, sheep/sheep, player, surfer, duck, tiger, lady/ladies, rider, police officer"
    ),
}
COLOURS = _words("red, green, blue, yellow, black, white, brown, grey, orange")
STATES = _words("dirty, clean, broken, wet, open, empty, old, calm, damaged")
MATERIALS = _words("wood, metal, plastic, glass, leather")
LOOKS = _words("wooden, metal, plastic")
ACTIONS = _words("stand, sit, walk, run, jump, sleep, swim, lie down")
DOING = _words("walking, sleeping, sitting, eating, running, jumping, swimming")
COMPARED = _words("bigger, smaller, taller, older, darker")

DEVELOPMENT = (
    Form("colour", "Is the {x} {w}?", "Yes", words=COLOURS),
    Form("colour, plural", "Are the {xs} {w}?", "No", ("{xs}",), words=COLOURS),
    Form("colour, this", "Is this {x} {w}?", "Yes", words=COLOURS),
    Form("colour, in this image", "Is the {x} {w} in this image?", "No", words=COLOURS),
    Form(
        "colour, either",
        "Is the {x} {w} or white?",
        "white",
        words=_words("red, brown, orange, black, silver"),
    ),
    Form("what colour", "What colour is the {x}?", "{w}", words=COLOURS),
    Form("what color, plural", "What color are the {xs}?", "{w}", ("{xs}",), words=COLOURS),
    Form("material, made of", "Is the {x} made of {w}?", "Yes", words=MATERIALS),
    Form("material", "Is the {x} {w}?", "Yes", words=LOOKS),
    Form("what it is made of", "What is the {x} made of?", "{w}", words=MATERIALS),
    Form("state", "Is the {x} {w}?", "Yes", words=STATES),
    Form("state, plural", "Are the {xs} {w}?", "Yes", ("{xs}",), words=STATES),
    Form("state, AMBER", "Is the {x} {w} in this image?", "No", words=STATES),
    Form("state, very", "Is the {x} very {w}?", "No", words=STATES),
    Form("action", "Is the {x} {w}?", "Yes", words=DOING, beings=True),
    Form("action, plural", "Are the {xs} {w}?", "Yes", ("{xs}",), words=DOING, beings=True),
    Form("action, AMBER", "Does the {x} {w} in this image?", "No", words=ACTIONS, beings=True),
    Form("action, plural do", "Do the {xs} {w}?", "No", ("{xs}",), words=ACTIONS, beings=True),
    Form(
        "action, somewhere", "Is the {x} {w} on the grass?", "Yes", ("{x}", "grass"), words=DOING, beings=True
    ),
    Form("action, what", "What is the {x} doing?", "{w}", words=DOING, beings=True),
    Form("number, how many", "How many {xs} are there?", "3", ("{xs}",)),
    Form("number, how many in the image", "How many {xs} are in the image?", "two", ("{xs}",)),
    Form(
        "number, AMBER",
        "Are there {w} {xs} in this image?",
        "No",
        ("{xs}",),
        words=_words("two, three, four, five"),
    ),
    Form("number, AMBER, one", "Is there one {x} in this image?", "No"),
    Form("existence, POPE", "Is there {a} {x} in the image?", "Yes"),
    Form("existence, POPE, no", "Is there {a} {x} in the image?", "No", (), ("{x}",)),
    Form("existence, AMBER", "Is there {a} {x} in this image?", "No", (), ("{x}",)),
    Form("existence, of a colour", "Is there a {w} {x}?", "Yes", ("{w} {x}",), words=COLOURS),
    Form("existence, doing", "Is there {a} {x} {w}?", "Yes", words=DOING, beings=True),
    Form(
        "relation, beside",
        "Is the {x} to the {w} of the {y}?",
        "Yes",
        ("{x}", "{y}"),
        words=("left", "right"),
    ),
    Form(
        "relation, preposition",
        "Is the {x} {w} the {y}?",
        "No",
        ("{x}", "{y}"),
        words=_words("on, under, behind, above, in"),
    ),
    Form("relation, AMBER", "Is there direct contact between the {x} and {y}?", "No", ("{x}", "{y}")),
    Form("relation, contact", "Is there direct contact between the {x} and the {y}?", "Yes", ("{x}", "{y}")),
    Form("comparison", "Is the {x} {w} than the {y}?", "Yes", ("{x}", "{y}"), words=COMPARED),
    Form("comparison, which", "Which is {w}, the {x} or the {y}?", "the {x}", ("{x}", "{y}"), words=COMPARED),
    Form("negation, n't", "Isn't the {x} {w}?", "Yes", words=(*COLOURS, *STATES)),
    Form("negation, not", "Is the {x} not {w}?", "Yes", words=(*COLOURS, *STATES)),
    Form("negation, no", "Is there no {x} in the image?", "Yes", (), ("{x}",)),
    Form("negation, isn't there", "Isn't there {a} {x} in the image?", "No", (), ("{x}",)),
    Form(
        "possession",
        "Does the {x} have {w}?",
        "Yes",
        ("{x}", "{h}"),
        words=_words("an umbrella, a tail, a hat, wings"),
        beings=True,
    ),
    Form(
        "possession, whose part",
        "Is the {x}'s {h} blue?",
        "Yes",
        ("{x}", "{h}"),
        words=_words("collar, hat, head"),
        beings=True,
    ),
    Form("where", "Where is the {x}?", "on the {y}", ("{x}", "{y}")),
    Form("why", "Why is the {x} {w}?", "because it rained", words=_words("wet, dirty, red, open")),
    Form(
        "what is on it", "What is on the {x}?", "{w}", ("{x}", "{h}"), words=_words("a cat, a plate, a hat")
    ),
)
HELD_OUT = (
    Form(
        "both of",
        "Are both of the {xs} {w}?",
        "Yes",
        ("{xs}",),
        words=_words("purple, pink, dry, closed, rusty, round"),
    ),
    Form(
        "past", "Was the {x} {w}?", "Yes", words=_words("purple, pink, dry, full, rusty, striped, metallic")
    ),
    Form("that", "Is that {x} {w}?", "No", words=_words("purple, beige, tall, closed, shiny, silver")),
    Form(
        "these, material",
        "Are these {xs} {w}?",
        "Yes",
        ("{xs}",),
        words=_words("steel, ceramic, wooden, stone"),
    ),
    Form("any behind", "Are there any {xs} behind the {y}?", "Yes", ("{xs}", "{y}")),
    Form(
        "place and colour",
        "Is the {x} in front of the {y} {w}?",
        "Yes",
        ("{x}", "{y}"),
        words=_words("purple, pink, tan, dry"),
    ),
    Form("look", "Does the {x} look {w}?", "No", words=_words("shiny, new, heavy, fresh, rusty")),
    Form("more than", "Are there more {xs} than {ys}?", "Yes", ("{xs}", "{ys}")),
    Form(
        "as tall as",
        "Is the {x} as {w} as the {y}?",
        "No",
        ("{x}", "{y}"),
        words=_words("tall, big, wide, clean"),
    ),
    Form("can you see", "Can you see {a} {x} near the {y}?", "Yes", ("{x}", "{y}")),
    Form("true that", "Is it true that the {x} is {w}?", "Yes", words=_words("purple, pink, dry, square")),
    Form("whose", "Whose {x} is {w}?", "the woman's", ("{x}", "woman"), words=_words("purple, dry, blue")),
    Form(
        "part looks",
        "Does the {x}'s {h} look wet?",
        "Yes",
        ("{x}", "{h}"),
        words=_words("tail, face, ear"),
        beings=True,
    ),
    Form(
        "adjective and state",
        "Is the {w} {x} closed?",
        "No",
        ("{w} {x}",),
        words=_words("purple, small, striped, wooden"),
    ),
    Form(
        "two subjects",
        "Are the {x} and the {y} {w}?",
        "Yes",
        ("{x}", "{y}"),
        words=_words("purple, pink, dry, plastic"),
    ),
    Form(
        "touching",
        "Is the {x} {w} the {y}?",
        "Yes",
        ("{x}", "{y}"),
        words=_words("touching, facing, blocking, covering"),
    ),
    Form("how tall", "How {w} is the {x}?", "very", words=_words("tall, old, long, heavy")),
    Form(
        "what it holds",
        "What is the {x} holding?",
        "{w}",
        ("{x}", "{h}"),
        words=_words("a kite, a spoon, an apple"),
        beings=True,
    ),
    Form(
        "in this picture",
        "In this picture, is the {x} {w}?",
        "No",
        words=_words("purple, pink, dry, plastic, silver"),
    ),
    Form(
        "smiling",
        "Is the {x} {w}?",
        "Yes",
        words=_words("smiling, dancing, surfing, drinking, asleep, barefoot, fishing"),
        beings=True,
    ),
    Form(
        "do something",
        "Does the {x} {w}?",
        "Yes",
        words=_words("smile, surf, fly, dance, drink, fight"),
        beings=True,
    ),
    Form(
        "do it to",
        "Does the {x} {w} the ball?",
        "No",
        ("{x}", "ball"),
        words=_words("kick, hold, throw, catch"),
        beings=True,
    ),
    Form(
        "state",
        "Is the {x} {w} in this image?",
        "Yes",
        words=_words("purple, dry, rusty, closed, fresh, square, shiny, pink, bright, dark"),
    ),
    Form("not there", "Are there no {xs} here?", "Yes", (), ("{xs}",)),
    Form("number at least", "Are there at least three {xs} in the photo?", "No", ("{xs}",)),
)
FORMS = {"development": DEVELOPMENT, "held out": HELD_OUT}


def fill(form: Form, part: str) -> Iterator[tuple[str, str, str, tuple[str, ...], tuple[str, ...]]]:
    """(form, question, answer, objects, absent) for each object of a part and each of the form's words."""
    objects = (BEINGS if form.beings else THINGS)[part]
    for (index, (singular, plural)), word in product(enumerate(objects), form.words):
        next_singular, next_plural = objects[(index + 1) % len(objects)]
        values = {
            "x": singular,
            "xs": plural,
            "a": "an" if singular[0] in "aeiou" else "a",
            "y": next_singular,
            "ys": next_plural,
            "w": word,
            "h": word.removeprefix("an ").removeprefix("a "),
        }
        yield (
            form.name,
            form.question.format(**values),
            form.answer.format(**values),
            _fill_all(form.objects, values),
            _fill_all(form.absent, values),
        )


def _fill_all(templates: Sequence[str], values: dict[str, str]) -> tuple[str, ...]:
    return tuple(template.format(**values) for template in templates)
