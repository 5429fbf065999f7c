"""What a confidence listens to: how it changes when the image, a part of it or the answer is changed.

A calibrated confidence may ignore the image (arXiv 2609.18453). The answer is held, and the confidence after it is read again:

- "image": the whole image is blank;
- "object": the key object is blank, and nothing else;
- "distractor": one object that the question is not about is blank, and nothing else;
- "answer": the opposite of a yes/no answer is given.

A confidence that listens falls without the image and without the key object, hardly moves without a distractor, and adds up to 1 with
that in the opposite answer. Nothing is generated: it is the likeliest of the confidences that can be stated after the answer, and so is
the original one. Each probe, and the original reading, which is that of `ExpectedConfidence`, is one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from vlm_calibration.data.noise import ImageCopy
from vlm_calibration.estimators.answer_scoring import ResponsePass, score_answers
from vlm_calibration.estimators.base import AnsweredBatch
from vlm_calibration.metrics.probes import Probed
from vlm_calibration.perturbation.levels import Perturbation
from vlm_calibration.records import ORIGINAL, DataError

Probe = Literal["image", "object", "distractor", "answer"]
PROBES: tuple[Probe, ...] = get_args(Probe)
BLANK = Perturbation("fade", 1.0)
"""A whole image is uniformly grey after it; a region is filled with its surroundings, so that its outline does not show the object."""
COPIES: dict[Probe, ImageCopy] = {
    "image": ImageCopy(BLANK, "image"),
    "object": ImageCopy(BLANK, "object"),
    "distractor": ImageCopy(BLANK, "distractor"),
}
"""The copy of the image that a probe reads the confidence with."""


def check_probes(probes: Sequence[str]) -> tuple[Probe, ...]:
    """The probes in the order of `PROBES`; DataError if there is no such probe, or one appears twice."""
    if unknown := [probe for probe in probes if probe not in PROBES]:
        raise DataError(f"model.probes: there is no probe {unknown[0]!r}: expected {', '.join(PROBES)}")
    if twice := [probe for probe in PROBES if list(probes).count(probe) > 1]:
        raise DataError(f"model.probes: {twice[0]!r} appears twice")
    return tuple(probe for probe in PROBES if probe in probes)


def copies_of(probes: Sequence[Probe]) -> list[ImageCopy]:
    """The copies of each image that probes need."""
    return [COPIES[probe] for probe in probes if probe in COPIES]


def read_probes(answered: AnsweredBatch, probes: Sequence[Probe]) -> tuple[list[Probed], list[int]]:
    """Read the confidence in each of B answers after every probe. Call it under `torch.no_grad` or in inference mode.

    Returns:
        For each answer the original confidence and that of every probe, None where it does not apply, and for a text without an
        answer; and B numbers of forward passes, as if the probes ran alone.

    Raises:
        ValueError: the copies of the images were not made, see `AnsweredBatch.score_copy`.
    """
    original = answered.scored
    passes = [scores.passes if scores else 1 for scores in original]
    probed: list[dict[str, float | None]] = [
        {ORIGINAL: _likeliest_level(scores) if scores else None, **dict.fromkeys(probes)}
        for scores in original
    ]
    for probe in probes:
        copy = COPIES.get(probe)
        changed = score_opposite(answered) if copy is None else answered.score_copy(copy, with_levels=True)
        for row, scores in changed.items():
            passes[row] += scores.passes
            if original[row] is not None:
                probed[row][probe] = _likeliest_level(scores)
    return list(probed), passes


def _likeliest_level(scores: ResponsePass) -> float:
    """The confidence that is likeliest to be stated after an answer, the highest of equally likely ones."""
    return scores.levels[int(scores.level_log_p.argmax())]


def score_opposite(answered: AnsweredBatch) -> dict[int, ResponsePass]:
    """Row -> the scores of the opposite word with the image as it is, for answers yes and no to yes/no questions."""
    words = {"yes": "No", "no": "Yes"}
    opposite = {
        row: words[p.predicted]
        for row, p in enumerate(answered.predictions)
        if p.answer_type == "yes_no" and p.predicted in words and answered.answers[row] is not None
    }
    if not opposite:
        return {}
    # The other queries keep their rows, which the cache has as well; their scores are dropped.
    tokenized = [
        answered.tokenizer.tokenize(query, opposite.get(row, query.answer))
        for row, query in enumerate(answered.batch.queries)
    ]
    by_answer = score_answers(answered.model, tokenized, answered.prompts, answered.cache).by_answer()
    return {row: by_answer[row] for row in opposite}
