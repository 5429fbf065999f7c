"""Constructor arguments read back from objects, and digests."""

from __future__ import annotations

import hashlib
import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.base import Estimator
from vlm_calibration.models.base import BaseModel
from vlm_calibration.perturbation.level_table import AnswerTypeCounts
from vlm_calibration.perturbation.levels import AnchoredLevels, ConfidenceLevels, LinearLevels
from vlm_calibration.regions.describer import Describer
from vlm_calibration.regions.detector import Detector
from vlm_calibration.regions.segmenter import Segmenter
from vlm_calibration.settings import digest, file_digest, init_args, settings_digest

PACKAGES = ("data.sources", "demo", "estimators", "perturbation", "regions")
"""Where configurations find the classes of their settings."""


def test_our_objects_keep_what_they_are_made_from() -> None:
    """A setting that an object does not keep under its name would not be seen to change."""
    modules = set()
    for package in (import_module(f"vlm_calibration.{name}") for name in PACKAGES):
        modules |= {f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)}
    for module in modules:
        import_module(module)
    bases = (QuerySource, Estimator, ConfidenceLevels, Describer, Detector, Segmenter)
    known = {k for base in bases for k in _subclasses(base)} - {AnchoredLevels}
    kinds: set[Any] = {k for k in known if k.__module__ in modules and not inspect.isabstract(k)} | {
        NoisePolicy
    }
    assert len(kinds) > 15
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


def test_equal_settings_have_equal_digests() -> None:
    own = settings_digest(NoisePolicy())
    assert settings_digest(NoisePolicy(levels=LinearLevels(11))) == own
    others = (NoisePolicy(seed=1), NoisePolicy(levels=LinearLevels(3)), LinearLevels(), DemoSource("test"))
    assert own not in map(settings_digest, others)


def test_digest_by_hand(tmp_path: Path) -> None:
    expected = hashlib.blake2b("Größe".encode(), digest_size=16).hexdigest()
    assert digest(["Gr", "ö".encode(), "ße"]) == expected
    (tmp_path / "file").write_text("Größe", encoding="utf-8")
    assert file_digest(tmp_path / "file") == expected
