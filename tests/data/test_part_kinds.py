"""Kinds of perturbation that a part of a test has of its own: refused before a model is loaded, with the name of the part."""

from __future__ import annotations

import pytest

from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.perturbation.levels import AnchoredLevels
from vlm_calibration.records import DataError

from ..level_tables import noise_counts

SOURCE = DemoSource("test", scenes=2)
MEASURED = AnchoredLevels.fit(dict.fromkeys(("yes_no", "short"), noise_counts((0, 10, 9), (1, 10, 5))))
"""Levels of noise alone."""


def _module(folder: str, policy: NoisePolicy, **parts: EvalSplit) -> PerturbedQueryDataModule:
    return PerturbedQueryDataModule(folder, test=parts, noise=policy, workers=0)


def test_each_part_draws_its_own_kinds(model_folder: str) -> None:
    parts = {
        "noised": EvalSplit(SOURCE, "drawn"),
        "blurred": EvalSplit(SOURCE, "drawn", {"blur": 1.0, "jpeg": 0.0}),
    }
    module = _module(model_folder, NoisePolicy(), **parts)
    module.setup("test")
    drawn: dict[str, set[str]] = {}
    for index, query in enumerate(module.sets["test"].queries):
        drawn.setdefault(query.id.split(":")[0], set()).add(module.sets["test"][0, index].perturbation.kind)
    assert {name: kinds - {""} for name, kinds in drawn.items()} == {"noised": {"noise"}, "blurred": {"blur"}}


@pytest.mark.parametrize("noise", ["drawn", "every_level"])
@pytest.mark.parametrize(
    ("policy", "kind"),
    [(NoisePolicy(), "rain"), (NoisePolicy(levels=MEASURED), "blur")],
    ids=["unknown", "not measured"],
)
def test_kinds_without_levels_are_refused(
    model_folder: str, policy: NoisePolicy, kind: str, noise: str
) -> None:
    bad = EvalSplit(SOURCE, noise, {"noise": 1.0, kind: 1.0})  # type: ignore[arg-type]
    module = _module(model_folder, policy, fine=EvalSplit(SOURCE, "drawn"), bad=bad)
    with pytest.raises(DataError, match=rf"data\.test\.bad: noise\.kinds: .*{kind}"):
        module.setup("test")
