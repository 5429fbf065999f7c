"""What stages ask of a GPU, by their configurations: phases, rows, adapters, estimators, detectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_calibration.models.base import BaseModel
from vlm_calibration.records import DataError
from vlm_calibration.stages.memory import (
    TEXT_TOKENS,
    Plan,
    base_model,
    longest_row,
    stage_of,
    stage_phases,
    training_phase,
)

from ..regions.tiny import build

pytestmark = pytest.mark.slow

Parse = Callable[..., Any]
Folder = Callable[[str], str]
ESTIMATORS = "vlm_calibration.estimators."
EXPECTED = {"class_path": f"{ESTIMATORS}verbal.ExpectedConfidence"}
NO_ADAPTERS = {"model__init_args__adapters": "{}"}
STABLE = {"class_path": f"{ESTIMATORS}stability.Stability"}
SAMPLED = {"class_path": f"{ESTIMATORS}consistency.SelfConsistency"}


def _base(folder: str) -> dict[str, Any]:
    return {"model__init_args__base__name_or_path": folder}


def _names(config: Any) -> list[str]:
    return [phase.name for phase in stage_phases(config)]


def test_a_module_names_its_stage(parse: Parse, tiny: Folder) -> None:
    files = ("sft", "dpo", "levels", "eval/jsonl", "regions")
    stages = [stage_of(parse(f"{name}.yaml")) for name in files]
    assert stages == ["sft", "dpo", "levels", "evaluation", "regions"]
    config = parse("sft.yaml")
    config.model.class_path = "my.Module"
    with pytest.raises(DataError, match=r"model\.class_path: no estimate for Module"):
        stage_of(config)


def test_training_validates_unless_it_is_off(parse: Parse, tiny: Folder) -> None:
    base = _base(tiny("llava_clip"))
    assert _names(parse("sft.yaml", **base)) == ["training", "validation"]
    assert _names(parse("sft.yaml", **base, trainer__limit_val_batches=0)) == ["training"]
    training, own, validation = stage_phases(parse("dpo.yaml", **base))
    assert own.name == "own answers"
    assert validation.estimate.optimizer == training.estimate.optimizer > 0
    assert validation.estimate.weights == training.estimate.weights
    assert "ranked answers" in validation.work


def test_own_answers_are_a_phase_beside_the_states_of_training(parse: Parse, tiny: Folder) -> None:
    settings = {
        **_base(tiny("llava_clip")),
        "data__candidates__answers": "own",
        "trainer__limit_val_batches": 0,
    }
    training, own = stage_phases(parse("dpo.yaml", **settings))
    assert own.name == "own answers"
    assert own.estimate.optimizer == training.estimate.optimizer > 0
    assert own.work.startswith("16 prompts")
    assert "scored responses" in own.work
    assert "sampled" not in own.work
    settings["model__init_args__pairs__target"] = "self_consistency"
    assert "sampled answers" in stage_phases(parse("dpo.yaml", **settings))[1].work
    gold = {"data__candidates__answers": "gold", "model__init_args__pairs__target": "level"}
    assert _names(parse("dpo.yaml", **{**settings, **gold})) == ["training"]


def test_ddp_has_a_second_copy_of_the_gradients(parse: Parse, tiny: Folder) -> None:
    base = _base(tiny("llava_clip"))
    alone = training_phase(parse("sft.yaml", **base), Plan()).estimate
    ddp = training_phase(parse("sft.yaml", "trainer/ddp.yaml", **base), Plan()).estimate
    assert ddp.buckets == alone.gradients
    assert ddp.total == alone.total + alone.gradients
    fsdp = training_phase(parse("sft.yaml", "trainer/fsdp2.yaml", **base), Plan()).estimate
    assert fsdp.optimizer == alone.optimizer // 8
    assert sum(fsdp.weights.values()) + fsdp.gathered <= sum(alone.weights.values()) * 9 / 8


@pytest.mark.parametrize(
    ("family", "max_pixels", "training", "answers"),
    [
        ("qwen2_5_vl", None, 2000, 2000),
        ("qwen2_5_vl", 64 * 500, 500 + TEXT_TOKENS, 500 + TEXT_TOKENS),
        ("llava_clip", None, 2000, 16 + TEXT_TOKENS),
        ("llava_onevision", None, 2000, 2000),
    ],
)
def test_the_longest_row(
    parse: Parse, tiny: Folder, family: str, max_pixels: int | None, training: int, answers: int
) -> None:
    limit = {} if max_pixels is None else {"data__max_pixels": max_pixels}
    config = parse("sft.yaml", **_base(tiny(family)), data__max_length=2000, **limit)
    rows = [
        longest_row(base_model(config), config.data, None, training=is_training).tokens
        for is_training in (True, False)
    ]
    assert rows == [training, answers]
    assert longest_row(base_model(config), config.data, 77, training=False).tokens == 77


def test_estimators_and_adapters_of_an_evaluation(parse: Parse, tiny: Folder) -> None:
    def answers(plan: Plan = Plan(), *estimators: Any, probes: str = "[]") -> Any:  # noqa: B008
        given = {"model__init_args__estimators": json.dumps(estimators)} if estimators else {}
        given["model__init_args__probes"] = probes
        config = parse("eval/jsonl.yaml", **_base(tiny("qwen2_5_vl")), **NO_ADAPTERS, **given)
        [phase] = stage_phases(config, plan)
        return phase

    alone, planned = answers(), answers(Plan(adapters=2))
    assert planned.estimate.parameters > alone.estimate.parameters
    assert "3 systems" in planned.work
    scored, sampled = answers(Plan(), EXPECTED), answers(Plan(), EXPECTED, SAMPLED)
    assert "scored responses" in scored.work
    assert "sampled answers" in sampled.work
    assert sampled.estimate.phase == "sampling"
    assert sampled.estimate.total > scored.estimate.total >= alone.estimate.total
    copied = answers(Plan(), EXPECTED, STABLE)
    assert "perturbed copies" in copied.work
    assert copied.estimate.total > scored.estimate.total
    assert copied.estimate.pixels == 2 * scored.estimate.pixels
    swapped, blanked = (answers(Plan(), EXPECTED, probes=names) for names in ("[answer]", "[image, answer]"))
    assert swapped == scored
    assert "perturbed copies" in blanked.work
    assert blanked.estimate.total > scored.estimate.total


def test_ranked_answers_are_those_of_levels(parse: Parse, tiny: Folder) -> None:
    given = {**_base(tiny("qwen2_5_vl")), "data__grading__rank_levels": "true"}
    assert "ranked answers" in stage_phases(parse("levels.yaml", **given))[0].work
    assert "ranked answers" not in stage_phases(parse("eval/jsonl.yaml", **given, **NO_ADAPTERS))[0].work


def test_a_base_model_that_only_the_plan_knows(parse: Parse, tiny: Folder) -> None:
    config = parse("eval/jsonl.yaml", **NO_ADAPTERS)
    assert base_model(config, Plan(base=BaseModel("plan"))).name_or_path == "plan"
    with pytest.raises(DataError, match="no base model"):
        stage_phases(config)


def test_regions_hold_all_models_at_once(parse: Parse, tiny: Folder, tmp_path: Path) -> None:
    parts = {
        f"model__init_args__{part}__init_args__name_or_path": build(name, tmp_path / name)
        for part, name in (("detector", "owlv2"), ("segmenter", "sam2"))
    }
    detector, segmenter = stage_phases(parse("regions.yaml", **parts))
    assert (detector.name, segmenter.name) == ("detector", "segmenter")
    assert detector.estimate.weights == segmenter.estimate.weights
    prompted = {
        "class_path": "vlm_calibration.regions.prompted.PromptedDescriber",
        "init_args": {"base": {"name_or_path": tiny("llava_clip")}},
    }
    phases = stage_phases(parse("regions.yaml", **parts, model__init_args__describer=json.dumps(prompted)))
    assert [phase.name for phase in phases] == ["describer", "detector", "segmenter"]
    assert phases[1].estimate.parameters > detector.estimate.parameters
