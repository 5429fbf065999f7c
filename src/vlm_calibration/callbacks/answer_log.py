"""The answers of an evaluation or a validation, on disk until all are given and written in the order of the data.

Memory does not grow with their number, and an interrupted evaluation resumes from them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from vlm_calibration.append_log import AppendLog, SettingsChangedError
from vlm_calibration.estimators.predictions import prediction_from_dict
from vlm_calibration.files import replacing
from vlm_calibration.records import DataError, Query
from vlm_calibration.stages.evaluation import BatchAnswers

EVALUATED, VALIDATED = ".answered.{}.jsonl", ".predictions.{}.jsonl"
"""Files of an evaluation and of a validation, by the process that answers."""


class ResumeState(NamedTuple):
    """What an interrupted evaluation leaves to the next run.

    Attributes:
        resumes: whether the next run goes on from its answers.
        answered: split -> indices of the queries that were answered.
        message: what to tell the user; empty for nothing.
    """

    resumes: bool
    answered: dict[str, list[int]]
    message: str


class AnswerLog:
    """The answers to the queries of one or several splits, a line a batch.

    Args:
        folder: the run directory.
        rank: of this process, which appends to its own file.
        queries: split -> its queries, in the order of the data.
        settings: what decides the answers, as digests by name; an evaluation resumes only where they are the same.
        name: of the files, with a placeholder for the rank.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        queries: Mapping[str, Sequence[Query]],
        settings: Mapping[str, str] | None = None,
        name: str = EVALUATED,
    ) -> None:
        self.folder = folder
        self.queries = queries
        pattern = name.format("*")
        remedy = f"remove {pattern} in this folder, and the evaluation starts over"
        self.log = AppendLog(folder / name.format(rank), settings or {}, remedy, pattern)
        self._ends: dict[Path, int] = {}

    @cached_property
    def _index(self) -> dict[str, dict[str, int]]:
        """Split -> query id -> index of the query."""
        return {
            split: {query.id: index for index, query in enumerate(queries)}
            for split, queries in self.queries.items()
        }

    def find(self, *, complete: bool = True) -> ResumeState:
        """Find the answers of an interrupted evaluation.

        Args:
            complete: whether this run asks all queries; a limited one does not resume.

        Raises:
            DataError: a file is damaged, or holds answers to other queries.
        """
        self._ends = self.log.ends()
        ids: dict[str, list[str]] = {split: [] for split in self.queries}
        try:
            for where, row in self._rows(self._ends):
                if row["split"] not in ids:
                    raise self.log.damaged(where, f"no split {row['split']!r}")
                ids[row["split"]] += [answer["id"] for answer in next(iter(row["answers"].values()))]
        except SettingsChangedError as error:
            return self._starts_over(f"changed: {', '.join(error.changed)}")
        count, total = sum(map(len, ids.values())), sum(map(len, self.queries.values()))
        if not count:
            return ResumeState(False, {}, "")
        if not complete:
            return self._starts_over("trainer.limit_test_batches is set")
        for split, answered in ids.items():
            if len(set(answered)) != len(answered) or not self._index[split].keys() >= set(answered):
                where = f"{self.folder / self.log.pattern}"
                queries = f"the {len(self.queries[split])} queries of data.{split}"
                raise self.log.damaged(where, f"these are not answers to {queries}, each once")
        indices = {split: [self._index[split][i] for i in answered] for split, answered in ids.items()}
        message = f"{self.folder}: resuming: {count} of {total} queries were answered before"
        return ResumeState(True, indices, message)

    def _starts_over(self, reason: str) -> ResumeState:
        self._ends = {}
        message = f"{self.folder}: starting over instead of resuming the interrupted evaluation: {reason}"
        return ResumeState(False, {}, message)

    def earlier(self, split: str) -> Iterator[BatchAnswers]:
        """The batches of a split that `find` found, in the process that called it; none in others."""
        for where, row in self._rows(self._ends):
            if row["split"] == split:
                try:
                    answers = {
                        system: [prediction_from_dict(answer) for answer in rows]
                        for system, rows in row["answers"].items()
                    }
                except ValueError as error:
                    raise self.log.damaged(where, error) from error
                yield BatchAnswers(answers=answers, passes=row["passes"])

    def append(self, split: str, batch: BatchAnswers) -> None:
        """Append a batch, so that it is not lost with this process.

        Raises:
            DataError: it cannot be written.
        """
        answers = {system: [p.to_dict() for p in rows] for system, rows in batch["answers"].items()}
        if any(answers.values()):
            self.log.append({"split": split, "answers": answers, "passes": batch["passes"]})

    def write_predictions(self, system: str, split: str, path: Path, total: int | None = None) -> None:
        """Write a system's answers to a split, one prediction a line, in the order of the data.

        Args:
            total: how many queries were asked; None: not known.

        Raises:
            DataError: there are not `total` answers, each to another query.
        """
        lines: dict[int, str] = {}
        count = 0
        for _, row in self._rows():
            if row["split"] == split:
                for answer in row["answers"][system]:
                    lines[self._index[split][answer["id"]]] = json.dumps(answer, ensure_ascii=False) + "\n"
                    count += 1
        expected = len(lines) if total is None else total
        if not count == len(lines) == expected:
            raise DataError(
                f"{self.folder / self.log.pattern}: {count} answers of {system!r} to {len(lines)} queries, "
                f"expected {expected}: does another evaluation write into this folder?"
            )
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines[index] for index in sorted(lines))

    def close(self) -> None:
        """Close this process's file."""
        self.log.close()

    def clear(self) -> None:
        """Remove the answers of all processes."""
        self._ends = {}
        self.log.clear()

    def _rows(self, ends: Mapping[Path, int] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """File and line number of each line, and its row."""
        for line in self.log.lines(ends):
            try:
                ids = [[answer["id"] for answer in rows] for rows in line.row["answers"].values()]
                if not isinstance(line.row["split"], str) or not isinstance(line.row["passes"], dict):
                    raise ValueError("not a batch of answers")
                if not ids or any(other != ids[0] for other in ids):
                    raise ValueError("the systems answered other queries")
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise self.log.damaged(line.where, error) from error
            yield line.where, line.row
