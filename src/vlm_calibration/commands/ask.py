"""`vlm-calibration ask`: one question on the command line, or many from a file, with the confidence in each answer."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import ClosedUnitInterval, PositiveInt

from vlm_calibration.commands.options import ModelOptions, load_model
from vlm_calibration.progress import ProgressLine
from vlm_calibration.records import AnswerType, DataError

if TYPE_CHECKING:
    from vlm_calibration.commands.questions import AnswerFile, Question
    from vlm_calibration.data.noise import Sample
    from vlm_calibration.inference.answers import Answer, Threshold
    from vlm_calibration.inference.model import CalibratedModel

MIN_PRINTED = 0.05
"""Probability from which on a confidence is printed among those that the model might have stated."""
BATCH_SIZE = 8


@dataclass(frozen=True)
class ManyQuestions:
    """many questions

    Attributes:
        questions: JSON lines with "image" and "question", optionally "id" and "answer_type"
        out: file to write the answers to, one a line; if it holds some already, the others are added
        root: folder of the images (default: that of the questions)
        batch_size: questions asked together (default: 8)
        on_bad_image: stop at an image that cannot be read, or leave it out and name it (default: raise)
    """

    questions: Path | None = None
    out: Path | None = None
    root: Path | None = None
    batch_size: PositiveInt | None = None
    on_bad_image: Literal["raise", "skip"] | None = None


@dataclass(frozen=True)
class ReviewOptions:
    """review of answers that are not confident enough

    Attributes:
        review_below: a stated confidence in [0, 1]
        accuracy: choose the lowest confidence from which on this share of the answers in --evaluated is right
        evaluated: a predictions.jsonl, or its folder
        by: estimator of the confidence for --accuracy (default: verbalized)
    """

    review_below: ClosedUnitInterval | None = None
    accuracy: float | None = None
    evaluated: Path | None = None
    by: Literal["verbalized", "expected"] | None = None


def ask(
    image: str | None = None,
    question: str | None = None,
    *,
    json: bool = False,
    answer_type: AnswerType | None = None,
    model: ModelOptions,
    many: ManyQuestions,
    review: ReviewOptions,
) -> None:
    """Ask a question about an image; print the answer and the confidence in it.

    Args:
        image: an image file
        question: the question about it
        json: print one JSON object
        answer_type: kind of question (default: recognised from its words)

    Raises:
        ArgumentError: options are missing or contradict each other.
        DataError: a file, image, question or model cannot be used.
    """
    _check_options(image, question, answer_type, many)
    threshold = _review_threshold(review)
    if many.questions is not None and many.out is not None:
        _ask_many(many, many.questions, many.out, model, threshold, json)
    else:
        assert image is not None
        assert question is not None
        _ask_one(image, question, answer_type, model, threshold, json)


def _check_options(
    image: str | None, question: str | None, answer_type: AnswerType | None, many: ManyQuestions
) -> None:
    """Refuse options that contradict each other or would have no effect."""
    if many.questions is None:
        if image is None or question is None:
            raise ArgumentError(None, "give an image and a question, or --questions FILE --out FILE")
        for name in ("out", "root", "batch_size", "on_bad_image"):
            if getattr(many, name):
                option = f"--{name.replace('_', '-')}"
                raise ArgumentError(None, f"{option} is for many questions: give --questions FILE")
    elif image is not None:
        raise ArgumentError(None, "give either an image and a question, or --questions FILE")
    elif many.out is None:
        raise ArgumentError(None, "give --out FILE for the answers")
    elif answer_type is not None:
        raise ArgumentError(
            None, '--answer-type is for one question; a file of questions has the key "answer_type"'
        )


def _review_threshold(review: ReviewOptions) -> float | Threshold | None:
    """The confidence below which answers need review; None if they are not to be marked."""
    if (review.accuracy is None) != (review.evaluated is None):
        raise ArgumentError(None, "--accuracy and --evaluated belong together")
    if review.accuracy is not None and review.review_below is not None:
        raise ArgumentError(None, "give either --review-below or --accuracy")
    if review.by is not None and review.accuracy is None:
        raise ArgumentError(None, "--by is for --accuracy")
    if review.accuracy is None or review.evaluated is None:
        return review.review_below
    from vlm_calibration.estimators.predictions import VERBALIZED
    from vlm_calibration.inference.answers import choose_threshold

    threshold = choose_threshold(review.evaluated, review.accuracy, review.by or VERBALIZED)
    low, high = threshold.interval
    print(
        f"review below {threshold.value:.2f} ({threshold.estimator}): of the answers at or above it, {threshold.accuracy:.1%} "
        f"were right (95% interval {low:.1%} to {high:.1%}); they are {threshold.coverage:.1%} of all answers",
        file=sys.stderr,
    )
    return threshold


# --- One question ---------------------------------------------------------------------------------------------------


def _ask_one(
    image: str,
    question: str,
    answer_type: AnswerType | None,
    options: ModelOptions,
    threshold: float | Threshold | None,
    json: bool,
) -> None:
    model = load_model(options)
    answer = model.ask(image, question, answer_type)
    if json:
        row = {"image": image, "question": question, **_row(answer, threshold), "model": model.name}
        print(dumps(row, ensure_ascii=False))
    else:
        print(_as_text(answer, threshold))


def _row(answer: Answer, threshold: float | Threshold | None) -> dict[str, Any]:
    review = {} if threshold is None else {"needs_review": answer.needs_review(threshold)}
    return {**answer.to_dict(), **review}


def _as_text(answer: Answer, threshold: float | Threshold | None) -> str:
    """An answer as lines for the terminal: text, confidences, and the confidences that it might have stated."""

    def percent(value: float | None) -> str:
        return "none" if value is None else f"{value:.0%}"

    lines = [
        _printable(answer.answer) or "(no answer)",
        f"  stated confidence    {percent(answer.confidence):>5}",
        f"  expected confidence  {percent(answer.expected):>5}",
    ]
    likely = [f"{level:.0%} (p = {p:.2f})" for level, p in answer.distribution.items() if p >= MIN_PRINTED]
    if len(likely) > 1:
        lines.append(f"  might have stated    {', '.join(likely)}")
    if threshold is not None:
        lines.append("  needs review" if answer.needs_review(threshold) else "  confident enough")
    return "\n".join(lines)


def _printable(text: str) -> str:
    """The text with control characters replaced, which could move a terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


# --- Many questions -------------------------------------------------------------------------------------------------


def _ask_many(
    many: ManyQuestions,
    questions: Path,
    out: Path,
    options: ModelOptions,
    threshold: float | Threshold | None,
    json: bool,
) -> None:
    from vlm_calibration.commands.questions import AnswerFile, read_questions

    # Check all questions before a model is loaded.
    total = sum(1 for _ in read_questions(questions))
    model = load_model(options)
    below = threshold if threshold is None or isinstance(threshold, float) else threshold.value
    with closing(AnswerFile(out, {"model": model.name, "review_below": below})) as answers:
        before = len(answers.done)
        skipped = _answer_all(many, questions, model, answers, total, threshold)
        counts = {
            "questions": total,
            "answered_now": len(answers.done) - before,
            "answered_before": before,
            "skipped": len(skipped),
            "needs_review": None if threshold is None else answers.to_review,
        }
    for message in skipped[:5]:
        print(f"left out: {_printable(message)}", file=sys.stderr)
    if json:
        print(dumps({**counts, "out": str(out)}, ensure_ascii=False))
    else:
        parts = [f"{counts['answered_now']} of {total} questions answered"]
        parts += [f"{before} answered before"] if before else []
        parts += [f"{len(skipped)} left out"] if skipped else []
        parts += [] if threshold is None else [f"{answers.to_review} need review"]
        print(f"{', '.join(parts)}: {out}")


def _answer_all(
    many: ManyQuestions,
    questions: Path,
    model: CalibratedModel,
    answers: AnswerFile,
    total: int,
    threshold: float | Threshold | None,
) -> list[str]:
    """Answer all questions without an answer in the file; returns a message for each question that is left out."""
    from vlm_calibration.commands.questions import read_questions
    from vlm_calibration.data.sources.images import ImageFolder

    folder = ImageFolder(many.root or questions.parent)
    skipped: list[str] = []
    pending = answers.pending(read_questions(questions))
    done = min(total, len(answers.done))
    with ProgressLine("ask", total, "questions", done=done) as line:
        while batch := list(islice(pending, many.batch_size or BATCH_SIZE)):
            loaded = [(q, _sample(model, q, folder, many.on_bad_image == "skip", skipped)) for q in batch]
            samples = [(question, sample) for question, sample in loaded if sample is not None]
            if samples:
                system = model.systems[-1]
                batch_answers = model.answers([sample for _, sample in samples], [system])[system]
                answers.add(
                    [(q, _row(a, threshold)) for (q, _), a in zip(samples, batch_answers, strict=True)]
                )
            done += len(batch)
            line.update(done)
    return skipped


def _sample(
    model: CalibratedModel, question: Question, folder: Any, skip_bad_images: bool, skipped: list[str]
) -> Sample | None:
    """The question as a sample for the model; None, with a message in `skipped`, if its image is left out."""
    from vlm_calibration.commands.questions import image_of

    try:
        path = image_of(question, folder)
        return model.sample(path, question.question, question.answer_type, name=question.where)
    except DataError as error:
        if not skip_bad_images:
            raise
        skipped.append(str(error))
        return None
