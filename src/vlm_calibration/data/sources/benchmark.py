"""Sources for POPE and AMBER: official question files, a folder of images, and scoring by the official rules."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn

from vlm_calibration.benchmarks import amber, pope
from vlm_calibration.benchmarks.files import OfficialCounts
from vlm_calibration.data.sources.base import ImageFolder, QuerySource, excluded_images
from vlm_calibration.files import name_some
from vlm_calibration.perturbation.images import ImageError
from vlm_calibration.records import DataError, LoadedImage, Query, RecordError


class BenchmarkSource(QuerySource):
    """The questions of a benchmark in the order of its file `path`, without regions; image names are relative to `root`."""

    counts: ClassVar[type[OfficialCounts]]
    """Scores answers by the benchmark's own rule."""

    def __init__(self, path: str, root: str) -> None:
        self.path, self.root = path, root
        self.images = ImageFolder(Path(root))

    @abstractmethod
    def read(self) -> list[Query]:
        """Read the queries; images are not checked."""

    @abstractmethod
    def answer_files(self, replies: Sequence[tuple[str, float | None]]) -> dict[str, list[dict[str, Any]]]:
        """Files for the benchmark's own script, from text and confidence of all answers, in order: suffix of the name -> rows."""

    def queries(self) -> Sequence[Query]:
        return self._queries

    @cached_property
    def _queries(self) -> list[Query]:
        queries = self.read()
        names = dict.fromkeys(query.image for query in queries)
        missing: list[str] = []
        for name in names:
            try:
                self.images.check(name)
            except RecordError:
                missing.append(name or "(no name)")
        if missing:
            number, first = f"{len(missing)} of {len(names)}", name_some(missing, len(missing))
            raise DataError(f"{self.path}: {number} images are not in {self.root}: {first}")
        return queries

    def image_file(self, query: Query) -> Path:
        return self.images.path(query.image)

    def load(self, query: Query) -> LoadedImage:
        try:
            return LoadedImage(self.images.load(query.image), (), ())
        except (RecordError, ImageError) as error:
            raise DataError(f"{self.path}: record {query.id}: {error}") from error


class PopeSource(BenchmarkSource):
    """The questions of a POPE file: JSON lines (COCO), arrays (A-OKVQA, GQA), or POPEv2's annotations.

    Args:
        path: e.g. `coco_pope_random.json`, `gqa_pope_seem_popular.json`, `annotations.json` of POPEv2.
        root: image folder: `val2014` of COCO, GQA's `images`; for POPEv2 the folder that contains `images` and `coco`.
        exclude: text files, such as other question files of POPE; questions about an image of COCO whose twelve-digit number
            occurs in one are left out. The files of COCO and of A-OKVQA share 11 images.
    """

    counts = pope.PopeCounts

    def __init__(self, path: str, root: str, exclude: list[str] | None = None) -> None:
        super().__init__(path, root)
        self.exclude = exclude

    def read(self) -> list[Query]:
        is_excluded = excluded_images([Path(path) for path in self.exclude or ()])
        if not (queries := [q for q in pope.read_questions(self.path)[0] if not is_excluded(q.image)]):
            raise DataError(f"{self.path}: the files of `exclude` name the image of every question")
        for query in queries:
            if not query.image or not query.question:
                raise DataError(f"{self.path}: question {query.id} needs an image and a text")
        return queries

    def answer_files(self, replies: Sequence[tuple[str, float | None]]) -> dict[str, list[dict[str, Any]]]:
        answers, labels = pope.official_answers(self._queries, replies), pope.official_labels(self._queries)
        return {"answers.jsonl": answers, "labels.jsonl": labels}


class AmberSource(BenchmarkSource):
    """AMBER's discriminative questions; generative questions are skipped with a warning.

    Args:
        path: one of `query_*.json`.
        annotations: `annotations.json`.
        root: image folder.
    """

    counts = amber.AmberCounts

    def __init__(self, path: str, annotations: str, root: str) -> None:
        super().__init__(path, root)
        self.annotations = annotations

    def read(self) -> list[Query]:
        queries, generative = amber.read_queries(self.path, self.annotations)
        note = f"{self.path}: {amber.GENERATIVE_NOTE.format(n=generative)}"
        if not queries:
            raise DataError(f"{note}, and there are no others")
        if generative:
            rank_zero_warn(note)
        return queries

    def answer_files(self, replies: Sequence[tuple[str, float | None]]) -> dict[str, list[dict[str, Any]]]:
        return {"answers.json": amber.official_answers(self._queries, replies)}
