"""Questions about scenes: whether an object is present (half yes, half no), and which object is in a corner (short answer).

The absent object of a "no" question is sampled as in POPE (arXiv 2305.10355): uniformly, by class frequency, or by
co-occurrence with the objects in the scene; where the scene has a look-alike, it is what that resembles. Queries are a pure
function of (split, scene index, kind of scene).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from vlm_calibration.demo.scenes import CLASSES, CORNERS, THEMES, class_weights, scene_layout
from vlm_calibration.records import Query

SPLITS = ("train", "calibration", "development", "test")
"""Everything is chosen on scenes of the first three; those of "test" are for what is reported at the end."""
NEGATIVES = ("random", "popular", "adversarial")

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


def scene_seed(split: str, index: int) -> tuple[int, int]:
    """The seed of a scene in a split. Splits never share a seed.

    Raises:
        ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    return (SPLITS.index(split) + 1, index)


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@lru_cache(maxsize=1)
def _cooccurrence() -> np.ndarray:
    """Number of themes that each pair of classes shares, float64 [len(CLASSES), len(CLASSES)]."""
    members = np.array([[c in theme for c in CLASSES] for theme in THEMES.values()], dtype=np.float64)
    return members.T @ members + 1e-3


def absent_class(rng: np.random.Generator, present: tuple[str, ...], kind: str) -> str:
    """Sample a class that is not in the scene: "random", "popular" (by frequency) or "adversarial" (by co-occurrence)."""
    taken = np.isin(CLASSES, present)
    if kind == "random":
        weights = np.ones(len(CLASSES))
    elif kind == "popular":
        weights = class_weights().copy()
    else:
        weights = class_weights() * _cooccurrence()[taken].sum(axis=0)
    weights[taken] = 0.0
    return CLASSES[int(rng.choice(len(CLASSES), p=weights / weights.sum()))]


def scene_queries(split: str, index: int, kind: str = "") -> list[Query]:
    """Three queries about one scene: an existence question answered yes, one answered no, and a corner question.

    Args:
        split: one of `SPLITS`.
        index: of the scene.
        kind: one of `HARD_KINDS`, or "" for an easy scene; the first part of the category.
    """
    names, corners, _, look_alike = scene_layout(scene_seed(split, index), kind)
    rng = np.random.default_rng((*scene_seed(split, index), 1))
    image = f"{split}-{kind}-{index:06d}" if kind else f"{split}-{index:06d}"
    negative = NEGATIVES[int(rng.integers(len(NEGATIVES)))]
    present = names[int(rng.integers(len(names)))]
    absent = look_alike.resembles if look_alike else absent_class(rng, names, negative)
    asked = int(rng.integers(len(names)))
    rows = (
        ("yes", EXISTENCE_FORMS, {"name": present}, "Yes", present, "existence"),
        ("no", EXISTENCE_FORMS, {"name": absent}, "No", absent, "existence"),
        (
            "corner",
            POSITION_FORMS,
            {"corner": CORNERS[corners[asked]]},
            names[asked],
            names[asked],
            "position",
        ),
    )
    queries = []
    for suffix, forms, values, answer, key_object, category in rows:
        form = forms[int(rng.integers(len(forms)))]
        if "name" in values:
            values["article"] = with_article(values["name"]).split()[0]
        queries.append(
            Query(
                id=f"{image}-{suffix}",
                image=image,
                question=form.format(**values),
                answer=answer,
                answer_type="short" if category == "position" else "yes_no",
                objects=(key_object,),
                category=f"{kind}/{category}" if kind else category,
            )
        )
    return queries
