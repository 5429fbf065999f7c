"""Source for RLAIF-V (Yu et al., arXiv 2405.17220; CC BY-NC 4.0): open questions with a preferred and a rejected response.

The preferred response is the gold answer, the rejected response a wrong answer. Images are embedded in the Parquet files. The
data set has no regions: extract them with `vlm-calibration predict --config regions --config data/rlaif_v`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm_calibration.data.sources.base import BadRecords, OnBadRecord
from vlm_calibration.data.sources.checks import may_state_confidence
from vlm_calibration.data.sources.tables import (
    EmbeddedImages,
    TableSource,
    is_embedded,
    parquet_files,
    read_columns,
    schema_of,
)
from vlm_calibration.records import DataError, Query, RecordError, query_from_dict
from vlm_calibration.settings import digest
from vlm_calibration.text.labels import check_answer

TEXTS = ("question", "chosen", "rejected", "origin_dataset")
HUB_DATASET = "openbmb/RLAIF-V-Dataset"
IMAGE_PATH = "image_path"
"""The column that is the same for all rows about one image."""


class RlaifVSource(TableSource):
    """One query a pair of responses; its id is the number of the row, "rlaif-v-17".

    Args:
        path: a Parquet file of the data set, or the folder of all of them.
        unpacked: folder that images are unpacked into; None: each read of an image reads a whole row group.
        begin: use the images from this share on, in [0, 1]. The images, by the column `image_path`, are in the order of a hash,
            so two sources with other shares have no image in common.
        end: use the images up to this share, in [0, 1].
        on_bad_record: "raise" stops at the first invalid record; "skip" leaves such records out, with a warning.
    """

    def __init__(
        self,
        path: str,
        unpacked: str | None = None,
        begin: float = 0.0,
        end: float = 1.0,
        on_bad_record: OnBadRecord = "raise",
    ) -> None:
        if not 0 <= begin < end <= 1:
            raise DataError(f"RlaifVSource: needs 0 <= begin < end <= 1, found {begin} and {end}")
        super().__init__(path, unpacked, on_bad_record)
        self.begin, self.end = begin, end

    @property
    def hub_dataset(self) -> str:
        return HUB_DATASET

    def _open(self) -> np.ndarray:
        files = parquet_files(self.path)
        schema = schema_of(files)
        for name in (*TEXTS, "image"):
            if name not in schema.names:
                raise DataError(f"{self.path}: no column {name!r}: these are not the files of RLAIF-V")
        if not is_embedded(schema.field("image").type):
            actual = schema.field("image").type
            raise DataError(f"{self.path}: the column 'image' must hold {{bytes, path}}, found {actual}")
        self._table = read_columns(files, TEXTS, ["origin_dataset"])
        share = self._image_shares(files, schema)
        self._embedded = EmbeddedImages(files, "image", self.unpacked)
        rows = self._valid_rows(share)
        self.bad.report(len(rows))
        if not len(rows):
            raise DataError(
                f"{self.path}: no usable query in these files about the images from share {self.begin:g} to {self.end:g}"
            )
        return rows

    def _image_shares(self, files: Sequence[Path], schema: pa.Schema) -> np.ndarray:
        """Where the image of each row is in the order of all images, float64 [rows] in [0, 1); NaN without a name."""
        if (self.begin, self.end) == (0.0, 1.0):
            return np.zeros(self._table.num_rows)
        if IMAGE_PATH not in schema.names:
            raise DataError(
                f"{self.path}: no column {IMAGE_PATH!r}, by which `begin` and `end` tell images apart"
            )
        column = read_columns(files, [IMAGE_PATH], [IMAGE_PATH]).column(IMAGE_PATH).combine_chunks()
        shares = [int(digest([name]), 16) / 16**32 for name in column.dictionary.to_pylist()]
        return np.array([*shares, np.nan])[
            column.indices.fill_null(len(shares)).to_numpy(zero_copy_only=False)
        ]

    def _valid_rows(self, share: np.ndarray) -> np.ndarray:
        """Indices of the rows about this source's images with a question, and a preferred response that can be taught.

        Args:
            share: as `_image_shares` returns.
        """
        self.bad = BadRecords(self.on_bad_record)
        for row in map(int, np.flatnonzero(np.isnan(share))):
            self.bad.add(
                f"{self.path}: row {row}: no {IMAGE_PATH!r}, by which `begin` and `end` tell images apart"
            )
        part = (share >= self.begin) & (share < self.end)
        valid = np.ones(self._table.num_rows, dtype=bool)
        for name in ("question", "chosen"):
            has_word = pc.match_substring_regex(self._table.column(name), r"[\pL\pN]")
            valid &= pc.fill_null(has_word, False).to_numpy().astype(bool)
        valid &= ~may_state_confidence(self._table.column("chosen")).to_numpy().astype(bool)
        for row in map(int, np.flatnonzero(part & ~valid)):
            try:
                check_answer(self._read(row))
                valid[row] = True
            except RecordError as error:
                self.bad.add(f"{self.path}: row {row}: {error}", error)
        return np.flatnonzero(part & valid)

    def _read(self, row: int) -> Query:
        [record] = self._table.slice(row, 1).to_pylist()
        return query_from_dict(
            {
                "id": f"rlaif-v-{row}",
                "image": EmbeddedImages.name(row),
                "question": record["question"],
                "answer": record["chosen"],
                "answer_type": "open",
                "category": record["origin_dataset"] or None,
            }
        )

    def _image(self, query: Query) -> np.ndarray:
        assert self._embedded is not None
        return self._embedded.load(query.image)

    def wrong_answers(self, query: Query) -> Sequence[str]:
        self._opened_rows()
        rejected = self._table.column("rejected")[EmbeddedImages.row(query.image)].as_py()
        return [rejected] if rejected and rejected.strip() and rejected != query.answer else []
