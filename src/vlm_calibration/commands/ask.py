"""`vlm-calibration ask`: one question on the command line, or many from a file, with the confidence in each answer."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_calibration.arguments import Parser, explained_errors, positive
from vlm_calibration.commands.options import add_model_options, load_model
from vlm_calibration.records import ANSWER_TYPES, DataError

if TYPE_CHECKING:
    from vlm_calibration.commands.questions import AnswerFile, Question
    from vlm_calibration.data.noise import Sample
    from vlm_calibration.inference.answers import Answer, Threshold
    from vlm_calibration.inference.model import CalibratedModel

LIKELY = 0.05
"""A confidence that is at least so probable is worth a line on the terminal."""


def ask_command(args: Sequence[str]) -> None:
    """Read the arguments behind `ask`, and answer.

    Raises:
        ArgumentError: they make no sense. DataError: a file, image, question or model that cannot be used.
    """
    with explained_errors(parser := ask_parser()):
        found = parser.parse_args(args)
    _check(found)
    threshold = _threshold(found)
    if found.questions is not None:
        _ask_many(found, threshold)
    else:
        _ask_one(found, threshold)


def ask_parser() -> Parser:
    """The parser of `ask`."""
    parser = Parser(
        "vlm-calibration ask",
        description="Ask a question about an image; print the answer and the confidence in it.",
    )
    parser.add_argument("image", nargs="?", help="an image file")
    parser.add_argument("question", nargs="?", help="what to ask about it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--answer-type", choices=ANSWER_TYPES, help="kind of the question (default: told from its words)"
    )
    many = parser.add_argument_group("many questions")
    many.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help='JSON lines with "image", "question" and, if wanted, "id"',
    )
    many.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where answers go, a line each; started again, it goes on there",
    )
    many.add_argument("--root", type=Path, metavar="DIR", help="folder of the images (default: that of FILE)")
    many.add_argument("--batch-size", type=positive, metavar="N", help="asked at a time (default: 8)")
    many.add_argument(
        "--skip-bad-images", action="store_true", help="leave out what cannot be read, and say how many"
    )
    review = parser.add_argument_group("review: mark answers that are not confident enough")
    review.add_argument("--review-below", type=float, metavar="C", help="a stated confidence in [0, 1]")
    review.add_argument(
        "--accuracy",
        type=float,
        metavar="A",
        help="the lowest confidence from which on a share A of the answers in --evaluated is right",
    )
    review.add_argument(
        "--evaluated", type=Path, metavar="PATH", help="a predictions.jsonl, or the folder that holds one"
    )
    review.add_argument(
        "--by",
        choices=["verbalized", "expected"],
        default=None,
        help="whose confidence (default: verbalized)",
    )
    add_model_options(parser)
    return parser


def _check(found: argparse.Namespace) -> None:
    """Refuse options that contradict each other, or would do nothing."""

    def refuse(why: str) -> None:
        raise argparse.ArgumentError(None, why)

    if found.questions is None:
        if found.image is None or found.question is None:
            refuse("give an image and a question, or --questions FILE --out FILE")
        for name in ("out", "root", "batch_size", "skip_bad_images"):
            if getattr(found, name):
                refuse(f"--{name.replace('_', '-')} is for many questions: give --questions FILE")
    elif found.image is not None:
        refuse("give either an image and a question, or --questions FILE")
    elif found.out is None:
        refuse("give --out FILE for the answers")
    elif found.answer_type is not None:
        refuse('--answer-type is for one question; a file of questions has the key "answer_type"')
    if (found.accuracy is None) != (found.evaluated is None):
        refuse("--accuracy and --evaluated belong together")
    if found.accuracy is not None and found.review_below is not None:
        refuse("give either --review-below or --accuracy")
    if found.by is not None and found.accuracy is None:
        refuse("--by is for --accuracy")
    if found.review_below is not None and not 0 <= found.review_below <= 1:
        refuse(f"--review-below must be in [0, 1], found {found.review_below}")


def _threshold(found: argparse.Namespace) -> float | Threshold | None:
    if found.accuracy is None:
        return found.review_below
    from vlm_calibration.estimators.predictions import VERBALIZED
    from vlm_calibration.inference.answers import choose_threshold

    threshold = choose_threshold(found.evaluated, found.accuracy, found.by or VERBALIZED)
    low, high = threshold.interval
    print(
        f"review below {threshold.value:.2f} ({threshold.estimator}): of the answers there {threshold.accuracy:.1%} were "
        f"right (95% interval {low:.1%} to {high:.1%}), which is {threshold.coverage:.1%} of all",
        file=sys.stderr,
    )
    return threshold


# --- One question ---------------------------------------------------------------------------------------------------


def _ask_one(found: argparse.Namespace, threshold: float | Threshold | None) -> None:
    model = load_model(found)
    answer = model.ask(found.image, found.question, found.answer_type)
    if found.json:
        asked = {"image": found.image, "question": found.question}
        print(json.dumps({**asked, **_row(answer, threshold), "model": model.name}, ensure_ascii=False))
    else:
        print(_shown(answer, threshold))


def _row(answer: Answer, threshold: float | Threshold | None) -> dict[str, Any]:
    review = {} if threshold is None else {"needs_review": answer.needs_review(threshold)}
    return {**answer.to_dict(), **review}


def _shown(answer: Answer, threshold: float | Threshold | None) -> str:
    """The answer for a person: itself, its confidences, and what else it might have stated."""

    def percent(value: float | None) -> str:
        return "none" if value is None else f"{value:.0%}"

    lines = [
        _printable(answer.answer) or "(no answer)",
        f"  stated confidence    {percent(answer.confidence):>5}",
        f"  expected confidence  {percent(answer.expected):>5}",
    ]
    likely = [f"{level:.0%} (p = {p:.2f})" for level, p in answer.distribution.items() if p >= LIKELY]
    if len(likely) > 1:
        lines.append(f"  might have stated    {', '.join(likely)}")
    if threshold is not None:
        lines.append("  needs review" if answer.needs_review(threshold) else "  confident enough")
    return "\n".join(lines)


def _printable(text: str) -> str:
    """The text without what would move a terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


# --- Many questions -------------------------------------------------------------------------------------------------


def _ask_many(found: argparse.Namespace, threshold: float | Threshold | None) -> None:
    from vlm_calibration.commands.questions import AnswerFile, read_questions

    # All of them are checked before a model is loaded.
    total = sum(1 for _ in read_questions(found.questions))
    model = load_model(found)
    below = threshold if threshold is None or isinstance(threshold, float) else threshold.value
    with closing(AnswerFile(found.out, {"model": model.name, "review_below": below})) as answers:
        before = len(answers.done)
        skipped = _answer_all(found, model, answers, total, threshold)
        counts = {
            "questions": total,
            "answered_now": len(answers.done) - before,
            "answered_before": before,
            "skipped": len(skipped),
            "needs_review": None if threshold is None else answers.to_review,
        }
    for why in skipped[:5]:
        print(f"left out: {_printable(why)}", file=sys.stderr)
    if found.json:
        print(json.dumps({**counts, "out": str(found.out)}, ensure_ascii=False))
    else:
        said = [f"{counts['answered_now']} of {total} questions answered"]
        said += [f"{before} had been before"] if before else []
        said += [f"{len(skipped)} left out"] if skipped else []
        said += [] if threshold is None else [f"{answers.to_review} need review"]
        print(f"{', '.join(said)}: {found.out}")


def _answer_all(
    found: argparse.Namespace,
    model: CalibratedModel,
    answers: AnswerFile,
    total: int,
    threshold: float | Threshold | None,
) -> list[str]:
    """Answer what is not answered yet; what was left out, and why."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from vlm_calibration.commands.questions import read_questions
    from vlm_calibration.data.sources.images import ImageFolder

    folder = ImageFolder(found.root or found.questions.parent)
    skipped: list[str] = []
    pending = answers.pending(read_questions(found.questions))
    columns = ("asking", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("asking", total=total, completed=min(total, len(answers.done)))
        while batch := list(islice(pending, found.batch_size or 8)):
            loaded = [(q, s) for q in batch if (s := _sample(model, q, folder, found, skipped)) is not None]
            if loaded:
                system = model.systems[-1]
                said = model.answers([s for _, s in loaded], [system])[system]
                answers.add([(q, _row(a, threshold)) for (q, _), a in zip(loaded, said, strict=True)])
            progress.advance(task, len(batch))
    return skipped


def _sample(
    model: CalibratedModel, question: Question, folder: Any, found: argparse.Namespace, skipped: list[str]
) -> Sample | None:
    """The question as the model meets it; None if its image is left out, which is noted in `skipped`."""
    from vlm_calibration.commands.questions import image_of

    try:
        path = image_of(question, folder)
        return model.sample(path, question.question, question.answer_type, name=question.where)
    except DataError as error:
        if not found.skip_bad_images:
            raise
        skipped.append(str(error))
        return None
