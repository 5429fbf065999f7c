"""`vlm-calibration ask`: one question on the command line, or many from a file, with the confidence in each answer."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jsonargparse.typing import PositiveInt

from vlm_calibration.commands.options import ModelOptions, load_model, refuse
from vlm_calibration.errors import CommandError
from vlm_calibration.files import AppendLog, json_lines
from vlm_calibration.progress import working
from vlm_calibration.records import AnswerType, DataError, Query, RecordError, query_from_dict

if TYPE_CHECKING:
    from vlm_calibration.estimators.decision import DecisionRule
    from vlm_calibration.inference.asking import Answer


@dataclass(frozen=True)
class ManyQuestions:
    """many questions

    Attributes:
        questions: JSON lines with "image" and "question", optionally "id", "answer_type" and "category"
        out: file to write the answers to, one a line; if it holds some already, the others are added
        root: folder of the images (default: that of the questions)
        batch_size: questions asked together (default: 8)
        on_bad_image: an image that cannot be read (default: raise)
    """

    questions: Path | None = None
    out: Path | None = None
    root: Path | None = None
    batch_size: PositiveInt | None = None
    on_bad_image: Literal["raise", "skip"] | None = None


def ask(
    image: str | None = None,
    question: str | None = None,
    *,
    json: bool = False,
    answer_type: AnswerType | None = None,
    category: str | None = None,
    abstain: bool = False,
    model: ModelOptions,
    many: ManyQuestions,
) -> None:
    """Ask a question about an image; print the answer and the confidence in it.

    With --abstain, exit status 4 if the question goes to a person.

    Args:
        image: an image file
        question: the question about it
        json: print one JSON object
        answer_type: kind of question (default: recognised from its words)
        category: category of the question, for thresholds by category
        abstain: print "review" below the threshold that `vlm-calibration threshold` wrote, and for questions unlike those that it was
            chosen on; JSON has both
    """
    if many.questions is not None:
        if image is not None:
            raise ArgumentError(None, "give either an image and a question, or --questions FILE")
        if many.out is None:
            raise ArgumentError(None, "give --out FILE for the answers")
        of_one = {"answer_type": answer_type, "category": category}
        refuse(of_one, "is for one question; a line of a file of questions has a key for it")
        _ask_many(many, many.questions, many.out, model, abstain, json)
        return
    if image is None or question is None:
        raise ArgumentError(None, "give an image and a question, or --questions FILE --out FILE")
    refuse(vars(many), "is for many questions: give --questions FILE")
    if not Path(image).exists():
        raise DataError(f"{image}: no such file; check the path")
    check = partial(_check_decides, asked={"--category": category}.items()) if abstain else None
    with closing(load_model(model, check)) as asked:
        answer = asked.ask(image, question, answer_type, category)
    if answer.warning is not None:
        print(f"warning: {answer.warning}", file=sys.stderr)
    review = abstain and answer.decision == "review"
    if json:
        row = {"image": image, "question": question, **answer.to_dict(), "model": asked.name}
        print(dumps(row, ensure_ascii=False))
    else:
        print("review" if review else _as_text(answer))
    if review:
        raise CommandError("", 4)


def _check_decides(rule: DecisionRule | None, asked: Iterable[tuple[str, str | None]]) -> None:
    """Refuse `--abstain` if a rule does not decide about a question that is asked (its place, and its category)."""
    if rule is None:
        advice = "choose thresholds with `vlm-calibration threshold RUN` on an evaluation of its adapter"
        raise DataError(f"--abstain: the model has no thresholds.json: {advice}")
    for where, category in asked:
        if rule.applied(None, category) is None:
            none = f"there is none for {category!r}: give one of {', '.join(map(repr, rule.groups))}"
            raise DataError(f"{where}: the thresholds are by category, and {none}")


def _as_text(answer: Answer) -> str:
    """An answer as lines for the terminal: text, confidences, and the confidences that it might have stated."""
    lines = [_printable(answer.answer) or "(no answer)"]
    for name, value in {"stated": answer.confidence, "expected": answer.expected}.items():
        lines.append(f"  {name + ' confidence':<21}{'none' if value is None else f'{value:.0%}':>5}")
    likely = [f"{level:.0%} (p = {p:.2f})" for level, p in answer.distribution.items() if p >= 0.05]
    if len(likely) > 1:
        lines.append(f"  might have stated    {', '.join(likely)}")
    if answer.rule is not None:
        lines.append(f"  decision             {answer.decision} ({answer.reason})")
    return "\n".join(lines)


def _printable(text: str) -> str:
    """The text with control characters replaced, which could move a terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


class _Question(NamedTuple):
    """A question from a file, with its place for messages, and its type if given; by default the line number is its id."""

    where: str
    query: Query
    answer_type: AnswerType | None


def _read_questions(path: Path) -> list[_Question]:
    """The questions of a file; raises a DataError that names the line if one is not a question, or an id comes twice."""

    def converted(data: Any) -> _Question:
        if not isinstance(data, Mapping):
            raise RecordError("expected an object with 'image' and 'question'")
        given = {key: value for key, value in data.items() if value is not None}
        query = query_from_dict({"id": line.number, "answer": "?", "answer_type": "open", **given})
        return _Question(line.where, query, given.get("answer_type"))

    questions: dict[str, _Question] = {}
    for line in json_lines(path):
        question = line.read(converted)
        if question.query.id in questions:
            raise line.error(f"the id {question.query.id!r} comes twice")
        questions[question.query.id] = question
    if not questions:
        raise DataError(f"{path}: no question in this file")
    return list(questions.values())


def _ask_many(
    many: ManyQuestions, path: Path, out: Path, options: ModelOptions, abstain: bool, json: bool
) -> None:
    # Check all questions before a model is loaded.
    questions = _read_questions(path)
    from vlm_calibration.data.sources.base import ImageFolder

    asked = [(question.where, question.query.category) for question in questions]
    model = load_model(options, partial(_check_decides, asked=asked) if abstain else None)
    folder = ImageFolder(many.root or path.parent)
    repeated = ("id", "image", "question", "category")
    skipped, warnings = list[str](), list[str]()
    settings = {"model": model.name, "rule": None if model.rule is None else model.rule.guarantee}
    log = AppendLog(out, settings, "choose another --out")
    with closing(model), closing(log):
        log.open()
        answered: dict[str, tuple[str, str]] = {}
        to_review = 0
        for line, row in log.lines():
            if not isinstance(row.get("id"), str) or not {"image", "question"} <= row.keys():
                raise log.damaged(line.where, "not an answer that `ask` wrote")
            answered[row["id"]] = (row["image"], row["question"])
            to_review += row.get("decision") == "review"
        for where, query, _ in questions:
            if answered.get(query.id, (query.image, query.question)) != (query.image, query.question):
                another = f"{out} holds an answer to another question under the id {query.id!r}"
                raise DataError(f"{where}: {another}: choose another --out")
        pending = [question for question in questions if question.query.id not in answered]
        total, before, now = len(questions), len(answered), 0
        size = many.batch_size or 8
        with working("ask", total, "questions", done=total - len(pending)) as update:
            for start in range(0, len(pending), size):
                samples = {}
                for question in pending[start : start + size]:
                    where, query, kind = question
                    try:
                        folder.check(query.image)
                        about = folder.path(query.image), query.question, kind, query.category
                        samples[question] = model.sample(*about, name=where)
                    except (DataError, RecordError) as error:
                        message = f"{where}: {error}" if isinstance(error, RecordError) else str(error)
                        if many.on_bad_image != "skip":
                            raise DataError(message) from error
                        skipped.append(message)
                answers = model.answers(list(samples.values()), [model.main])[model.main] if samples else []
                rows = []
                for question, answer in zip(samples, answers, strict=True):
                    rows.append({key: getattr(question.query, key) for key in repeated} | answer.to_dict())
                    to_review += answer.decision == "review"
                    warnings += [f"{question.where}: {answer.warning}"] if answer.warning else []
                log.append(*rows, sync=True)
                now += len(rows)
                update(total - len(pending) + now + len(skipped))
    for message in skipped[:5]:
        print(f"left out: {_printable(message)}", file=sys.stderr)
    if warnings:
        print(f"warning: {warnings[0]} (in all {len(warnings)} such answers)", file=sys.stderr)
    review = None if model.rule is None else to_review
    if json:
        counts = {"answered_now": now, "answered_before": before, "skipped": len(skipped), "review": review}
        print(dumps({"questions": total, **counts, "out": str(out)}, ensure_ascii=False))
        return
    parts = [f"{now} of {total} questions answered"]
    parts += [f"{before} answered before"] if before else []
    parts += [f"{len(skipped)} left out"] if skipped else []
    parts += [] if review is None else [f"{review} for review"]
    print(f"{', '.join(parts)}: {out}")
