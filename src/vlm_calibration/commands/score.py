"""`vlm-calibration score`: scores a file of answers, under a benchmark's own rules and ours, without a model.

Only the metrics need torch, which is imported when there are answers to score; no trainer, no transformers.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from vlm_calibration.arguments import Parser, explained_errors
from vlm_calibration.benchmarks import amber, pope
from vlm_calibration.benchmarks.files import Reply, in_order_of, read_records, reply
from vlm_calibration.benchmarks.official import OFFICIAL
from vlm_calibration.estimators.predictions import EstimatedPrediction, graded_prediction, read_predictions
from vlm_calibration.files import json_number, write_rows
from vlm_calibration.records import DataError, Query, RecordError, query_from_dict
from vlm_calibration.reporting.tables import official_table, print_results


class Scored(NamedTuple):
    """official: scores under the benchmark's rules, by their own names. predictions: the answers as we grade them.

    files: what the benchmark's own script is to be given, end of a file name -> rows; the first are the answers.
    """

    official: dict[str, float]
    predictions: Sequence[EstimatedPrediction]
    files: Mapping[str, list[dict[str, Any]]]


def score_command(args: Sequence[str]) -> None:
    """`score pope`, `score amber` and `score jsonl`.

    Raises:
        ArgumentError: a setting is missing, unknown or wrong.
        DataError: a file or a record of it cannot be used; the message names it.
    """
    with explained_errors(parser := score_parser()):
        settings = parser.parse_args(args)
    from vlm_calibration.reporting.summary import summarize_predictions

    scored: Scored = settings.score(settings)
    official = {f"{OFFICIAL}/{name}": value for name, value in scored.official.items()}
    values = {**official, **summarize_predictions(scored.predictions)}
    if getattr(settings, "write_official", None):
        _write(Path(settings.write_official), scored.files)
    if settings.json:
        print(json.dumps({name: json_number(name, value) for name, value in values.items()}))
        return
    console, results = Console(), {Path(settings.answers).stem: values}
    if official:
        console.print(official_table(results))
    print_results(results, console)


def score_parser() -> Parser:
    """The parser of `score`."""
    parser = Parser(
        "vlm-calibration score",
        description="Score a file of answers under a benchmark's own rules and ours; no model is needed.",
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    out = (
        "write what the benchmark's own script scores to the same numbers: a file, or a folder to write it to"
    )
    for name, score, truth, what in (
        (
            "pope",
            _pope,
            "--labels",
            "POPE's questions with labels: JSON lines, an array, or POPEv2's annotations",
        ),
        ("amber", _amber, "--annotations", "AMBER's annotations.json"),
        (
            "jsonl",
            _jsonl,
            "--labels",
            "the queries, to grade the answers anew; without them `correct` counts",
        ),
    ):
        command = commands.add_parser(name)
        command.add_argument("--answers", required=True, help="the answers, in the benchmark's format")
        command.add_argument(truth, required=name != "jsonl", help=what)
        command.add_argument("--json", action="store_true", help="print one flat JSON object")
        if name != "jsonl":
            command.add_argument("--write-official", metavar="PATH", help=out)
        command.set_defaults(score=score)
        if name == "amber":
            command.add_argument("--only", choices=list(amber.DIMENSIONS), help="score one dimension alone")
    return parser


def _pope(settings: Namespace) -> Scored:
    labels = pope.read_questions(settings.labels)
    replies = pope.read_answers(settings.answers, labels)
    counts = pope.count_answers(labels.questions, [given.text for given in replies])
    pairs = [(given.text, given.confidence) for given in replies]
    files = {
        "answers.jsonl": pope.official_answers(labels.questions, pairs),
        "labels.jsonl": pope.official_labels(labels.questions),
    }
    graded = [_graded(q.query(), given) for q, given in zip(labels.questions, replies, strict=True)]
    return Scored(counts.scores(), graded, files)


def _amber(settings: Namespace) -> Scored:
    dimensions = [settings.only] if settings.only else list(amber.DIMENSIONS)
    annotations = amber.read_annotations(settings.annotations)
    truths, replies, generative, others = amber.read_answers(settings.answers, annotations, dimensions)
    if generative:
        _note(f"{settings.answers}: {amber.GENERATIVE_NOTE.format(n=generative)}")
    if others:
        _note(f"{settings.answers}: {others} answers are left out: they are not about {settings.only}")
    counts = amber.count_answers(truths, [given.text for given in replies])
    pairs = [(given.text, given.confidence) for given in replies]
    graded = [_graded(truth.query(), given) for truth, given in zip(truths, replies, strict=True)]
    return Scored(counts.scores(dimensions), graded, {"answers.json": amber.official_answers(truths, pairs)})


def _jsonl(settings: Namespace) -> Scored:
    if settings.labels is None:
        return Scored({}, read_predictions(Path(settings.answers)), {})
    queries: dict[str, Query] = {}
    for record in read_records(settings.labels):
        try:
            query = query_from_dict(record.data)
        except RecordError as error:
            raise record.error(str(error)) from error
        if query.id in queries:
            raise record.error(f"duplicate id {query.id!r}")
        queries[query.id] = query
    given = [reply(r, r.text("id"), r.text("text")) for r in read_records(settings.answers)]
    replies = in_order_of(given, list(queries), settings.answers, settings.labels)
    return Scored({}, [_graded(q, r) for q, r in zip(queries.values(), replies, strict=True)], {})


def _graded(query: Query, given: Reply) -> EstimatedPrediction:
    try:
        return replace(graded_prediction(query, given.text, None), confidence=given.confidence)
    except ValueError as error:
        raise DataError(f"record {query.id!r}: {error}") from error


def _write(path: Path, files: Mapping[str, list[dict[str, Any]]]) -> None:
    """Write the answers to the path, or into it if it is a folder, and what else the script needs beside them."""
    (first, answers), *others = files.items()
    path = path / first if path.is_dir() else path
    write_rows(path, answers, lines=first.endswith(".jsonl"))
    _note(f"wrote {path}")
    for end, rows in others:
        beside = path.with_name(f"{path.stem}.{end}")
        write_rows(beside, rows, lines=end.endswith(".jsonl"))
        _note(f"wrote {beside}")


def _note(message: str) -> None:
    print(f"vlm-calibration: {message}", file=sys.stderr)
