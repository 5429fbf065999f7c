"""Questions about scenes: whether an object is present (half yes, half no), and which object is in a corner (short answer)."""

import re
from collections.abc import Mapping

import numpy as np

from vlm_calibration.demo.scenes import CLASS_WEIGHTS, CLASSES, CORNERS, THEMES, scene_layout
from vlm_calibration.files import name_some
from vlm_calibration.records import AnswerType, Query

SPLITS = ("train", "calibration", "development", "test")
"""Everything is chosen on scenes of the first three; those of "test" are for what is reported at the end."""
NEGATIVES = ("random", "popular", "adversarial")
"""How absent objects are drawn: evenly, by frequency, or by the number of themes that they share with the scene's objects."""

EXISTENCE_FORMS = (
    "Is there {article} {name} in the image?",
    "Do you see {article} {name}?",
    "Can you see {article} {name} in this picture?",
)
POSITION_FORMS = (
    "What is at the {corner}?",
    "Which object is at the {corner} of the image?",
    "What do you see at the {corner}?",
)
FORMS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(EXISTENCE_FORMS, CLASSES),
    **dict.fromkeys(POSITION_FORMS, CORNERS),
}
"""Form of question -> the words that complete it: all that the demo model was trained on."""


def scene_seed(split: str, index: int) -> tuple[int, int]:
    """The seed of a scene in a split, which no other split has; a ValueError for an unknown one."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    return (SPLITS.index(split) + 1, index)


def question_about(form: str, word: str) -> str:
    """The question of one of `FORMS` about a class or a corner."""
    return form.format(article="an" if word[0] in "aeiou" else "a", name=word, corner=word)


def _normalized(question: str) -> str:
    return " ".join(question.lower().split()).rstrip("? ")


_ASKED = [(form, word) for form, words in FORMS.items() for word in words]
_KNOWN = {_normalized(question_about(*asked)): asked for asked in _ASKED}


def known_question(question: str) -> tuple[str, str] | None:
    """Form (one of `FORMS`) and word of a question; None if the demo model was not trained on it."""
    return _KNOWN.get(_normalized(question))


def unknown_part(question: str) -> str | None:
    """What the demo model does not know in a question, words or else its form; None if it knows the question.

    >>> unknown_part("Is there a dog in the image?")
    >>> unknown_part("Is there a zebra in the image?").partition(";")[0]
    "the demo model does not know the word 'zebra'"
    """
    if known_question(question):
        return None
    vocabulary = {word for text in _KNOWN for word in text.split()}
    words = dict.fromkeys(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", question.lower()))
    unknown = [word for word in words if word not in vocabulary]
    named = [word for word in (*CLASSES, *CORNERS) if re.search(rf"\b{word}\b", question.lower())]
    shown = [question_about(form, named[0]) for form, about in FORMS.items() if named and named[0] in about]
    if unknown or not shown:
        shown = [form.format(article="a", name="...", corner="...") for form in FORMS]
    known = ", ".join(f'"{form}"' for form in shown)
    if not unknown:
        return f"the demo model does not know this form of question; it knows {known}"
    missing = f"the word{'s' * (len(unknown) > 1)} {name_some(unknown, len(unknown))}"
    known = f"the positions {', '.join(CORNERS)}, and the questions {known}"
    return f"the demo model does not know {missing}; it knows the objects {', '.join(CLASSES)}, {known}"


def right_answer(question: str, objects: Mapping[str, str]) -> str | None:
    """The right answer to one of the demo's questions about a scene, class -> corner of each object; None if it has none."""
    form, word = known_question(question) or ("", "")
    if form in EXISTENCE_FORMS:
        return "Yes" if word in objects else "No"
    return next((name for name, corner in objects.items() if corner == word), None)


def absent_class(rng: np.random.Generator, present: tuple[str, ...], kind: str) -> str:
    """Sample a class that is not in the scene by one of `NEGATIVES`, as POPE does (arXiv 2305.10355)."""
    taken = np.isin(CLASSES, present)
    weights = np.ones(len(CLASSES)) if kind == "random" else CLASS_WEIGHTS.copy()
    if kind == "adversarial":
        members = np.array([[c in theme for c in CLASSES] for theme in THEMES.values()], dtype=np.float64)
        weights *= (members.T @ members + 1e-3)[taken].sum(axis=0)
    weights[taken] = 0.0
    return CLASSES[int(rng.choice(len(CLASSES), p=weights / weights.sum()))]


def scene_queries(split: str, index: int, kind: str = "") -> list[Query]:
    """Three queries about one scene: an existence question answered yes, one answered no, and a corner question.

    The scene's `kind` (`render_scene`) is the first part of the category. The absent object is what a look-alike resembles.
    """
    names, corners, _, look_alike = scene_layout(scene_seed(split, index), kind)
    rng = np.random.default_rng((*scene_seed(split, index), 1))
    image = f"{split}-{kind}-{index:06d}" if kind else f"{split}-{index:06d}"
    negative = NEGATIVES[int(rng.integers(len(NEGATIVES)))]
    present = names[int(rng.integers(len(names)))]
    absent = look_alike.resembles if look_alike else absent_class(rng, names, negative)
    asked = int(rng.integers(len(names)))

    def query(suffix: str, word: str, answer: str, key_object: str, category: str) -> Query:
        forms = POSITION_FORMS if suffix == "corner" else EXISTENCE_FORMS
        question = question_about(forms[int(rng.integers(len(forms)))], word)
        answer_type: AnswerType = "short" if suffix == "corner" else "yes_no"
        category = f"{kind}/{category}" if kind else category
        name, objects = f"{image}-{suffix}", (key_object,)
        return Query(name, image, question, answer, answer_type, objects, category=category)

    return [
        query("yes", present, "Yes", present, "existence"),
        query("no", absent, "No", absent, "existence"),
        query("corner", CORNERS[corners[asked]], names[asked], names[asked], "position"),
    ]
