"""`vlm-calibration score`: score a file of answers under a benchmark's own rules and ours; torch is imported once it is read."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Any, Literal

from vlm_calibration.arguments import Subcommands
from vlm_calibration.benchmarks import amber, pope
from vlm_calibration.benchmarks.files import OFFICIAL, Reply, in_order_of, read_records, reply
from vlm_calibration.files import json_number, write_rows
from vlm_calibration.records import DataError, Prediction, Query, RecordError, query_from_dict


def score_pope(
    answers: Path, *, labels: Path, json: bool = False, write_official: Path | None = None
) -> None:
    """Score answers to POPE's questions under its own rules and ours.

    Args:
        answers: the answers, in the benchmark's format
        labels: POPE's questions with labels: JSON lines, an array, or POPEv2's annotations
        json: print one flat JSON object
        write_official: write what the benchmark's own script scores to the same numbers: a file, or an existing folder
    """
    queries, replies = pope.read_answers(answers, labels)
    scores = pope.PopeCounts.of(queries, [r.text for r in replies]).scores()
    graded = _grade(queries, replies)
    if write_official:
        pairs = [(r.text, r.confidence) for r in replies]
        path = _write(write_official, "answers.jsonl", pope.official_answers(queries, pairs))
        beside = path.with_name(f"{path.stem}.labels.jsonl")
        _write(beside, beside.name, pope.official_labels(queries))
    _print_scores(answers, graded, scores, json)


def score_amber(
    answers: Path,
    *,
    annotations: Path,
    only: Literal["existence", "attribute", "relation"] | None = None,
    json: bool = False,
    write_official: Path | None = None,
) -> None:
    """Score answers to AMBER's discriminative questions under its own rules and ours.

    Args:
        answers: the answers, in the benchmark's format
        annotations: AMBER's annotations.json
        only: score one dimension alone
        json: print one flat JSON object
        write_official: write what the benchmark's own script scores to the same numbers: a file, or an existing folder
    """
    dimensions = [only] if only else amber.DIMENSIONS
    queries, replies, generative, others = amber.read_answers(answers, annotations, dimensions)
    if generative:
        _note(f"{answers}: {amber.GENERATIVE_NOTE.format(n=generative)}")
    if others:
        _note(f"{answers}: {others} answers are left out: they are not about {only}")
    counts = amber.AmberCounts.of(queries, [r.text for r in replies])
    graded = _grade(queries, replies)
    if write_official:
        pairs = [(r.text, r.confidence) for r in replies]
        _write(write_official, "answers.json", amber.official_answers(queries, pairs))
    _print_scores(answers, graded, counts.scores(dimensions), json)


def score_jsonl(answers: Path, *, labels: Path | None = None, json: bool = False) -> None:
    """Score the predictions of an evaluation, or answers to any queries.

    Args:
        answers: JSON lines: predictions, or with --labels any answers with "id" and "text"
        labels: the queries, to grade the answers by; without them `correct` of each prediction counts
        json: print one flat JSON object
    """
    if labels is None:
        from vlm_calibration.estimators.predictions import read_predictions

        _print_scores(answers, read_predictions(answers), {}, json)
        return
    queries: dict[str, Query] = {}
    for record in read_records(labels):
        try:
            query = query_from_dict(record.data)
        except RecordError as error:
            raise record.error(str(error)) from error
        if query.id in queries:
            raise record.error(f"duplicate id {query.id!r}")
        queries[query.id] = query
    replies = [reply(r, r.identifier("id"), r.text("text")) for r in read_records(answers)]
    ordered = in_order_of(replies, list(queries), answers, labels)
    _print_scores(answers, _grade(list(queries.values()), ordered), {}, json)


SUBCOMMANDS = Subcommands(
    "Score a file of answers under a benchmark's own rules and ours; no model is needed.",
    {"pope": score_pope, "amber": score_amber, "jsonl": score_jsonl},
)


def _print_scores(
    answers: Path, graded: Sequence[Prediction], official: Mapping[str, float], json: bool
) -> None:
    """Print the official scores of a file of answers, and this project's metrics of the graded answers."""
    from rich.console import Console

    from vlm_calibration.reporting.report.data import summarize_predictions
    from vlm_calibration.reporting.tables import official_table, print_results

    scores = {f"{OFFICIAL}/{name}": value for name, value in official.items()}
    values = {**scores, **summarize_predictions(graded)}
    if json:
        print(dumps({name: json_number(name, value) for name, value in values.items()}))
        return
    if official:
        Console().print(official_table({answers.stem: values}))
    print_results({answers.stem: values}, by_group=True)


def _grade(queries: Sequence[Query], answers: Sequence[Reply]) -> list[Prediction]:
    from vlm_calibration.estimators.predictions import graded_prediction

    graded = []
    for query, answer in zip(queries, answers, strict=True):
        try:
            prediction = graded_prediction(query, answer.text, None, None)
        except ValueError as error:
            raise DataError(f"record {query.id!r}: {error}") from error
        graded.append(replace(prediction, confidence=answer.confidence))
    return graded


def _write(path: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows to a path, or under a name into a folder; returns the path of the file."""
    path = path / name if path.is_dir() else path
    write_rows(path, rows, lines=name.endswith(".jsonl"))
    _note(f"wrote {path}")
    return path


def _note(message: str) -> None:
    print(f"vlm-calibration: {message}", file=sys.stderr)
