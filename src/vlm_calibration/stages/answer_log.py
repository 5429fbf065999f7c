"""The answers of an evaluation, a validation or `levels fit`, on disk until all are given: memory does not grow with their number."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from vlm_calibration.estimators.predictions import prediction_from_dict
from vlm_calibration.files import AppendLog, SettingsChangedError, replacing
from vlm_calibration.records import DataError, Query
from vlm_calibration.stages.evaluation import BatchAnswers

EVALUATED, VALIDATED = ".answered.{}.jsonl", ".predictions.{}.jsonl"
"""Files of an evaluation or `levels fit`, and of a validation, by the process that answers."""


class ResumeState(NamedTuple):
    """Split -> indices of the queries that an interrupted run answered, None if the next one starts over; and what to tell the user."""

    answered: dict[str, list[int]] | None = None
    message: str = ""


class AnswerLog(AppendLog):
    """The answers to the queries of one or several splits, in the order of the data, a line a batch.

    Each process appends to its own file, `name` with its `rank`, in the run directory `folder`. `run` is the digest of the record of
    the run, the only one to resume from; None: no run is resumed.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        queries: Mapping[str, Sequence[Query]],
        run: str | None = None,
        name: str = EVALUATED,
    ) -> None:
        pattern = name.format("*")
        remedy = f"remove {pattern} in this folder, and the run starts over"
        super().__init__(folder / name.format(rank), {"run": run}, remedy, pattern)
        self.folder = folder
        self.queries = queries

    @cached_property
    def _index(self) -> dict[str, dict[str, int]]:
        return {s: {q.id: index for index, q in enumerate(queries)} for s, queries in self.queries.items()}

    def find(self, limit: float = 1.0) -> ResumeState:
        """The answers of an interrupted run, unless `trainer.limit_test_batches` is set; raises a DataError if they are damaged."""
        if self.settings["run"] is None:
            return ResumeState()
        over = f"{self.folder}: starting over instead of resuming the interrupted run"
        ids: dict[str, list[str]] = {split: [] for split in self.queries}
        try:
            for _, row, answered in self._rows():
                ids[row["split"]] += answered
        except SettingsChangedError:
            return ResumeState(message=f"{over}: it had other settings or inputs")
        count, total = sum(map(len, ids.values())), sum(map(len, self.queries.values()))
        if not count:
            return ResumeState()
        if not (isinstance(limit, float) and limit == 1):
            return ResumeState(message=f"{over}: trainer.limit_test_batches is set")
        for split, answered in ids.items():
            if len(set(answered)) != len(answered) or not self._index[split].keys() >= set(answered):
                reason = f"not answers to the {len(self.queries[split])} queries of data.{split}, each once"
                raise self.damaged(str(self.folder / self.pattern), reason)
        message = f"{self.folder}: resuming: {count} of {total} queries were answered before"
        return ResumeState({split: [self._index[split][i] for i in ids[split]] for split in ids}, message)

    def batches(self, split: str) -> Iterator[BatchAnswers]:
        """The batches of a split that any process has answered so far."""
        for where, row, _ in self._rows():
            if row["split"] == split:
                try:
                    answers = {s: [*map(prediction_from_dict, rows)] for s, rows in row["answers"].items()}
                except ValueError as error:
                    raise self.damaged(where, error) from error
                yield BatchAnswers(answers=answers, passes=row["passes"])

    def add(self, split: str, batch: BatchAnswers) -> None:
        """Append a batch, unless it is empty; raises a DataError if it cannot be written."""
        answers = {system: [p.to_dict() for p in rows] for system, rows in batch["answers"].items()}
        if any(answers.values()):
            self.append({"split": split, "answers": answers, "passes": batch["passes"]})

    def write_predictions(self, system: str, split: str, path: Path, total: int | None = None) -> None:
        """Write a system's answers to a split; a DataError unless there are `total` (None: any number), each to another query."""
        lines: dict[int, str] = {}
        count = 0
        for _, row, _ in self._rows():
            for answer in row["answers"][system] if row["split"] == split else ():
                lines[self._index[split][answer["id"]]] = json.dumps(answer, ensure_ascii=False) + "\n"
                count += 1
        expected = len(lines) if total is None else total
        if not count == len(lines) == expected:
            raise DataError(
                f"{self.folder / self.pattern}: {count} answers of {system!r} to {len(lines)} queries, expected {expected}: "
                "does another evaluation write into this folder?"
            )
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines[index] for index in sorted(lines))

    def _rows(self) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
        """File and line number of each line, its row, and the ids of its queries."""
        for line, row in self.lines():
            try:
                first, *others = ([answer["id"] for answer in rows] for rows in row["answers"].values())
                if row["split"] not in self.queries or not isinstance(row["passes"], dict):
                    raise ValueError(f"not a batch of answers to {', '.join(self.queries)}")
                if any(ids != first for ids in others):
                    raise ValueError("the systems answered different queries")
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise self.damaged(line.where, error) from error
            yield line.where, row, first
