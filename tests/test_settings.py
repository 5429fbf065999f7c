"""Constructor arguments read back from objects, and digests."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlm_calibration.commands.memory_rows import LongestQueries
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.data.sources.benchmark import AmberSource, PopeSource
from vlm_calibration.data.sources.coco import CocoSource
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.data.sources.parquet import ParquetSource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.base import Estimator
from vlm_calibration.estimators.consistency import SelfConsistency
from vlm_calibration.estimators.p_true import PTrue
from vlm_calibration.estimators.stability import Stability
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.models.base import BaseModel
from vlm_calibration.perturbation.level_table import AnswerTypeCounts
from vlm_calibration.perturbation.levels import AnchoredLevels, ConfidenceLevels, LinearLevels
from vlm_calibration.regions.describer import Describer
from vlm_calibration.regions.detector import Detector, ZeroShotDetector
from vlm_calibration.regions.phrases import RuleDescriber
from vlm_calibration.regions.prompted import PromptedDescriber
from vlm_calibration.regions.segmenter import PromptedSegmenter, Segmenter
from vlm_calibration.settings import digest, file_digest, init_args, settings_digest


def test_our_objects_keep_what_they_are_made_from() -> None:
    """A setting that an object does not keep under its name would not be seen to change."""
    kinds: list[Any] = [
        *(DemoSource, JsonlSource, ParquetSource, CocoSource, PopeSource, AmberSource),
        *(ExpectedConfidence, SelfConsistency, PTrue, Stability, LinearLevels, NoisePolicy),
        *(RuleDescriber, PromptedDescriber, ZeroShotDetector, PromptedSegmenter),
    ]
    bases = (QuerySource, Estimator, ConfidenceLevels, Describer, Detector, Segmenter)
    known = {k for base in bases for k in _subclasses(base)} - {AnchoredLevels, LongestQueries}
    ours = {k for k in known if k.__module__.startswith("vlm_calibration") and not inspect.isabstract(k)}
    assert {k for k in ours if inspect.signature(k).parameters} <= set(kinds)
    needed = {**dict.fromkeys(("path", "root", "annotations"), "x"), "base": BaseModel("x")}
    for kind in kinds:
        names = inspect.signature(kind).parameters
        instance = kind(**{n: v for n, v in needed.items() if n in names})
        assert set(init_args(instance)) == set(names), kind
    counts = AnswerTypeCounts({"noise": [(0, 10, 9), (1, 10, 5)]})
    names = set(init_args(AnchoredLevels.fit({"yes_no": counts})))
    assert names == {"table", "grid", "groups", "likelihoods"}, "the content of the file at `path`"


def test_private_attributes_count_and_others_are_left_out() -> None:
    class Source:
        def __init__(self, path: str, shuffle: bool, cache: int = 0) -> None:
            self.path, self._shuffle, self.rows = path, shuffle, [cache]

    assert init_args(Source("a", True)) == {"path": "a", "shuffle": True}


def _subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        (NoisePolicy(seed=1), False),
        (NoisePolicy(levels=LinearLevels(3)), False),
        (NoisePolicy(levels=LinearLevels(11)), True),
        (LinearLevels(), False),
        (DemoSource("test"), False),
    ],
)
def test_equal_settings_have_equal_digests(settings: Any, same: bool) -> None:
    assert (settings_digest(settings) == settings_digest(NoisePolicy())) == same


def test_digest_by_hand(tmp_path: Path) -> None:
    expected = hashlib.blake2b("Größe".encode(), digest_size=16).hexdigest()
    assert digest(["Gr", "ö".encode(), "ße"]) == expected
    (tmp_path / "file").write_text("Größe", encoding="utf-8")
    assert file_digest(tmp_path / "file") == expected
