"""What an evaluation has answered so far, in files of its run directory that outlive the run, for the next one to go on from.

Each process appends to a file of its own, a line a batch. A line that was cut off in the middle does not count, so whole
batches are answered or not. A header says what decides the answers; those of other settings are never mixed with these.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from vlm_calibration.estimators.predictions import prediction_from_dict
from vlm_calibration.files import append, clear_leftovers, replacing, write_json, writing
from vlm_calibration.records import DataError
from vlm_calibration.stages.evaluation import Answers, Passes

HEADER, LINES = ".answered.json", ".answered.{}.jsonl"


class Answered(NamedTuple):
    """A batch that was answered.

    places: of its queries, as `PerturbedQueryDataModule.asked` counts. answers: of each system. passes: what they took, by
    system and estimator.
    """

    places: list[int]
    answers: Answers
    passes: Passes


class ResumeState(NamedTuple):
    """What an earlier run leaves to this one.

    goes_on: whether its answers count. places: of the queries that it answered. message: what to tell the user, if anything.
    """

    goes_on: bool
    places: list[int]
    message: str


class Progress:
    """The progress of an evaluation in one run directory.

    Args:
        folder: the run directory. rank: of this process, which appends to its own file alone.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.path = folder / LINES.format(rank)
        self._file: FileIO | None = None
        self._ends: dict[Path, int] = {}

    def find(self, decisive: dict[str, str], total: int, *, whole: bool = True) -> ResumeState:
        """Find out what was answered before.

        Args:
            decisive: what decides the answers. total: how many queries there are.
            whole: whether all of them are to be answered; a part of them does not go on from another part.

        Raises:
            DataError: a file of an earlier run is damaged.
        """
        self._ends = {}
        header = self._header()
        if header is None:
            return ResumeState(False, [], "")
        changed = [name for name in {**decisive, **header} if decisive.get(name) != header.get(name)]
        if changed or not whole:
            reason = f"changed: {', '.join(changed)}" if changed else "trainer.limit_test_batches is set"
            return ResumeState(
                False, [], f"{self.folder}: the evaluation that ended early here starts anew; {reason}"
            )
        self._ends = {path: _end(path) for path in self._files()}
        places = [place for _, line in self._lines(self._ends) for place in line["places"]]
        if len(set(places)) != len(places) or not all(0 <= place < total for place in places):
            raise DataError(
                f"{self.folder / LINES.format('*')}: these are not answers to {total} queries, each once: remove "
                f"{HEADER}, and the evaluation starts anew"
            )
        message = f"{self.folder}: goes on: {len(places)} of {total} queries were answered before"
        return ResumeState(True, places, message if places else "")

    def begin(self, decisive: dict[str, str], *, anew: bool) -> None:
        """Be ready for answers; for the first process, and before any of them answers."""
        if anew:
            self.clear()
            write_json(self.folder / HEADER, decisive)

    def before(self) -> Iterator[Answered]:
        """What was answered before this run; nothing but where it was found."""
        for where, line in self._lines(self._ends):
            try:
                answers = {
                    s: [prediction_from_dict(p) for p in found] for s, found in line["answers"].items()
                }
            except ValueError as error:
                raise _damaged(where, error) from error
            yield Answered(line["places"], answers, line["passes"])

    def append(self, answered: Answered) -> None:
        """Write a batch down, so that it is not lost with this process.

        Raises:
            DataError: it cannot be written.
        """
        found = {system: [p.to_dict() for p in answers] for system, answers in answered.answers.items()}
        line = json.dumps(answered._replace(answers=found)._asdict(), ensure_ascii=False)  # type: ignore[arg-type]
        with writing(self.path):
            if self._file is None:
                self._file = _open(self.path)
            append(self._file, line.encode() + b"\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def write_predictions(self, system: str, path: Path, places: range, total: int | None) -> None:
        """Write what a system answered to the queries at these places, one prediction a line, in the order of the data.

        Args:
            total: how many of the queries were asked; None: that is not known.

        Raises:
            DataError: the files do not hold `total` answers, each to another query.
        """
        found: dict[int, str] = {}
        count = 0
        for _, line in self._lines({file: _end(file) for file in self._files()}):
            for place, prediction in zip(line["places"], line["answers"][system], strict=True):
                if place in places:
                    found[place] = json.dumps(prediction, ensure_ascii=False) + "\n"
                    count += 1
        total = len(found) if total is None else total
        if not count == len(found) == total:
            raise DataError(
                f"{self.folder / LINES.format('*')}: {count} answers of {system!r} to {len(found)} queries, expected {total}: "
                "does another evaluation write into this folder?"
            )
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(found[place] for place in sorted(found))

    def clear(self) -> None:
        """Remove what was answered; for the first process."""
        self._ends = {}
        # Lines without a header count for nothing, so it goes first.
        (self.folder / HEADER).unlink(missing_ok=True)
        for path in self._files():
            path.unlink(missing_ok=True)

    def clear_leftovers(self, systems: list[str]) -> None:
        """Remove what a process that was killed while it wrote has left in the folder, and in those of systems."""
        for folder in (self.folder, *(self.folder / system for system in systems)):
            clear_leftovers(folder)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(LINES.format("*")))

    def _header(self) -> dict[str, str] | None:
        path = self.folder / HEADER
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise _damaged(str(path), error) from error
        if not isinstance(header, dict):
            raise _damaged(str(path), ValueError("expected an object"))
        return header

    def _lines(self, ends: dict[Path, int]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Where each line is, and what it says; of each file up to its end."""
        for path, end in ends.items():
            with path.open("rb") as file:
                number = 0
                while file.tell() < end:
                    number += 1
                    where = f"{path}:{number}"
                    try:
                        line = json.loads(file.readline())
                        lengths = {len(line["places"]), *map(len, line["answers"].values())}
                        if not isinstance(line["passes"], dict) or len(lengths) != 1:
                            raise ValueError("not the answers of systems to one batch")
                    except (ValueError, TypeError, LookupError, AttributeError) as error:
                        raise _damaged(where, error) from error
                    yield where, line


def _damaged(where: str, error: Exception) -> DataError:
    return DataError(
        f"{where}: cannot go on from what was answered before: {error}: remove {HEADER}, and the evaluation starts anew"
    )


def _end(path: Path) -> int:
    """Where the last whole line of a file ends."""
    with path.open("rb") as file:
        return sum(len(line) for line in file if line.endswith(b"\n"))


def _open(path: Path) -> FileIO:
    """Open a file to append to, without a line that is cut off at its end."""
    path.touch()
    # What is written is not kept back in this process.
    file = path.open("r+b", buffering=0)
    file.truncate(_end(path))
    file.seek(0, 2)
    return file
