"""`Plan`: the arguments of each step. tests/test_stages.py compares them with those of `make`, tests/test_acceptance.py runs the steps."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest

import vlm_calibration
from vlm_calibration import Plan
from vlm_calibration.records import DataError
from vlm_calibration.steps import BASE, train_sft


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configs(plan: Plan, stage: str) -> list[str]:
    arguments = plan.arguments(stage, {})
    return [value for option, value in pairwise(arguments) if option == "--config"]


def test_without_a_model_and_data_it_is_the_demo() -> None:
    assert Plan().arguments("sft", {}) == [
        "--config",
        "sft",
        "--data-root",
        "data",
        "--runs",
        "runs",
        "--resume",
    ]


def test_presets_follow_the_stage_in_the_order_of_the_command_line(folder: Path) -> None:
    (folder / "mine.yaml").touch()
    plan = Plan(model=["qwen2_5_vl_7b", "qlora"], data="mine.yaml", trainer="ddp")
    overlays = ["model/qwen2_5_vl_7b", "model/qlora", "mine.yaml", "experiment/anchored"]
    assert configs(plan, "sft") == ["sft", *overlays, "trainer/ddp"]
    assert configs(plan, "dpo") == ["dpo", *overlays, "experiment/anchored_dpo", "trainer/ddp"]


def test_a_preset_of_the_user_s_own_has_no_settings_of_stage_2(folder: Path) -> None:
    (folder / "mine.yaml").touch()
    assert configs(Plan("qlora", "jsonl", "mine.yaml"), "dpo") == [
        "dpo",
        "model/qlora",
        "data/jsonl",
        "mine.yaml",
    ]


@pytest.mark.parametrize("stage", ["levels", "sft", "dpo"])
def test_the_demo_s_model_is_not_used_on_other_data_unasked(stage: str) -> None:
    with pytest.raises(DataError, match="data 'jsonl' without a model"):
        Plan(data="jsonl").arguments(stage, {})
    assert f"--{BASE}=mine" in Plan(data="jsonl", settings={BASE: "mine"}).arguments(stage, {})


def test_extracted_regions_are_used(folder: Path) -> None:
    plan = Plan(model="qwen2_5_vl_7b", data="jsonl", runs="runs/mine")
    assert "--data.regions" not in plan.arguments("sft", {})
    (folder / "runs/mine/regions").mkdir(parents=True)
    arguments = plan.arguments("sft", {})
    assert arguments[arguments.index("--data.regions") + 1] == "runs/mine/regions"
    assert "--data.regions" not in plan.arguments("regions", {})


def test_settings_are_those_of_json_and_a_step_s_own_win() -> None:
    plan = Plan(settings={"data.workers": 0, "trainer.logger": False, "a": "text"}, overwrite=True)
    arguments = plan.arguments("sft", {"data.workers": 2, "model.init_args.adapters": {"sft": "x"}})
    assert arguments[-5:] == [
        "--data.workers=2",
        "--trainer.logger=false",
        "--a=text",
        '--model.init_args.adapters={"sft": "x"}',
        "--overwrite",
    ]


def test_a_step_that_fails_leaves_the_process_s_arguments_alone(
    model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["notebook"])
    with pytest.raises(DataError, match=r"data/train\.jsonl"):
        train_sft(Plan(data="jsonl", preset="paper", settings={"trainer.logger": False, BASE: model_folder}))
    assert sys.argv == ["notebook"]


def test_the_package_offers_the_steps() -> None:
    assert set(vlm_calibration.__all__) <= set(dir(vlm_calibration))
    assert all(getattr(vlm_calibration, name).__doc__ for name in vlm_calibration.__all__)
