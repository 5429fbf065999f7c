"""Settings that fit: their order of preference, that estimates agree with them, and how they are given to the stages."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.cli import main
from vlm_calibration.commands.estimate_memory import command_line, overlay_of, parse_gpus
from vlm_calibration.commands.memory_plan import parse_stages, plan_of
from vlm_calibration.records import DataError
from vlm_calibration.stages.memory import Plan, stage_phases
from vlm_calibration.stages.memory_search import (
    CONTEXT,
    FRAGMENTATION,
    PlanFit,
    Shared,
    StageFit,
    fit_plan,
    largest_that_fits,
    shared_settings,
    usable_bytes,
    with_shared,
)

from .conftest import CONFIGS

Parse = Callable[..., Any]
Folder = Callable[[str], str]
SMALL = {"data__batch_size": 4, "trainer__accumulate_grad_batches": 2, "data__eval_batch_size": 4}


def _gpu(usable: float) -> float:
    """The memory of a GPU of which tensors can take so many bytes."""
    return usable / (1 - FRAGMENTATION) + CONTEXT


def _sft(parse: Parse, folder: str, **settings: Any) -> Any:
    base = {"model__init_args__base__name_or_path": folder, "data__max_length": 2304}
    return parse("sft.yaml", **{**base, **SMALL, **settings})


def _bytes(config: Any, shared: Shared, fit: StageFit, plan: Plan = Plan()) -> int:  # noqa: B008
    """What a stage takes with the settings that were found."""
    config, plan = with_shared(config, shared, plan)
    config.data.eval_batch_size = fit.eval_batch_size
    if fit.batch_size:
        config.data.batch_size = fit.batch_size
        config.model.init_args.gradient_checkpointing = fit.checkpointing
    return max(phase.estimate.total for phase in stage_phases(config, plan))


@pytest.mark.slow
def test_quality_comes_first(parse: Parse, tiny: Folder) -> None:
    """From a large GPU to a small one: checkpointing, smaller batches, nf4, smaller images, nothing."""
    config = _sft(parse, tiny("qwen2_5_vl"), data__max_length=768, trainer__limit_val_batches=0)
    rank = {kind: n for n, kind in enumerate(shared_settings([config], Plan()))}
    before: tuple[Any, ...] = ()
    kinds = set()
    size = 1.5 * _bytes(config, next(iter(rank)), StageFit(0, True, 4, 8, 1, False))
    while True:
        found = fit_plan({"sft": config}, Plan(), _gpu(size))
        fit, shared = found.stages["sft"], found.shared
        assert shared is not None
        assert fit.bytes == _bytes(config, shared, fit)
        assert found.fits == (fit.bytes <= size)
        if not found.fits:
            break
        assert fit.batch_size is not None
        assert fit.accumulate is not None
        assert fit.batch_size * fit.accumulate == 8, "the effective batch stays"
        assert fit.checkpointing or fit.batch_size >= 4, "checkpointing before a smaller batch"
        worse = (rank[shared], bool(fit.checkpointing), -fit.batch_size)
        assert worse >= before
        before, size = worse, size / 1.5
        kinds.add((shared.quantization, bool(fit.checkpointing)))
    assert kinds >= {("none", False), ("none", True)}
    assert shared == list(rank)[-1], "the settings that take the least"
    assert shared.quantization == "nf4"
    assert shared.max_pixels == 256 * 64


def test_images_of_any_size_get_a_limit_from_the_start(parse: Parse, tiny: Folder) -> None:
    first, *_ = shared_settings([_sft(parse, tiny("qwen2_5_vl"))], Plan())
    assert first == Shared("none", (2304 - 256) * 64, 2304)
    first, *_ = shared_settings([_sft(parse, tiny("qwen2_5_vl"), data__max_pixels=32000)], Plan())
    assert first == Shared("none", 32000, 2304)


def test_images_in_tiles_lose_tiles(parse: Parse, tiny: Folder) -> None:
    sizes = list(
        dict.fromkeys(s.max_pixels for s in shared_settings([_sft(parse, tiny("internvl"))], Plan()))
    )
    assert sizes == [None], "12 tiles of a tiny model are below the fewest tokens"


def test_images_of_one_size_only_shorten_the_text(parse: Parse, tiny: Folder) -> None:
    found = list(shared_settings([_sft(parse, tiny("llava_clip"))], Plan()))
    assert [(s.max_pixels, s.max_length) for s in found[::2]] == [(None, 2304), (None, 16 + 256)]
    assert [s.quantization for s in found] == ["none", "nf4"] * 2


def test_no_quantisation_is_proposed_for_sharded_weights(parse: Parse, tiny: Folder) -> None:
    config = parse("sft.yaml", "trainer/fsdp2.yaml", model__init_args__base__name_or_path=tiny("llava_clip"))
    assert {s.quantization for s in shared_settings([config], Plan())} == {"none"}


@pytest.mark.slow
def test_stages_agree_on_the_model_and_the_images(parse: Parse, tiny: Folder) -> None:
    base = {"model__init_args__base__name_or_path": tiny("qwen2_5_vl"), "data__max_length": 2304}
    stages = {
        "levels": parse("levels.yaml", **base, data__eval_batch_size=4),
        "sft": parse("sft.yaml", **base, **SMALL),
        "dpo": parse("dpo.yaml", **base, **SMALL),
        "eval/jsonl": parse("eval/jsonl.yaml", **base, data__eval_batch_size=4),
    }
    plan = plan_of(stages)
    assert plan.adapters == 2
    largest = max(phase.estimate.total for name in stages for phase in stage_phases(stages[name], plan))
    found = fit_plan(stages, plan, _gpu(largest / 2))
    assert found.fits
    assert found.shared is not None
    for name, config in stages.items():
        fit = found.stages[name]
        assert fit.bytes == _bytes(config, found.shared, fit, plan) <= largest / 2
    overlay = overlay_of(found, stages)
    assert overlay["data"]["batch_size"] * overlay["trainer"]["accumulate_grad_batches"] == 8


@given(
    sizes=st.sets(st.integers(1, 128), min_size=1),
    slope=st.integers(1, 50),
    start=st.integers(0, 500),
    usable=st.integers(1, 5000),
)
def test_the_largest_size_that_fits(sizes: set[int], slope: int, start: int, usable: int) -> None:
    ordered = sorted(sizes, reverse=True)
    found = largest_that_fits(lambda n: start + slope * n, ordered, usable)
    best = next((n for n in ordered if start + slope * n <= usable), ordered[-1])
    assert found == (best, start + slope * best)


def test_a_margin_is_left() -> None:
    assert usable_bytes(24 * 2**30) == pytest.approx(22.09 * 2**30, rel=0.001)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("24GB", {"24GB": 24}), ("24 GiB", {"24 GiB": 24}), ("80gb,16.5G", {"80gb": 80, "16.5G": 16.5})],
)
def test_sizes_of_gpus(text: str, sizes: Mapping[str, float]) -> None:
    assert parse_gpus(text) == {name: size * 2**30 for name, size in sizes.items()}


@pytest.mark.parametrize("text", ["", "24", "0GB", "GB", "24GB,", "24MB", "24GB 80GB"])
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(ArgumentError, match="--gpu: "):
        parse_gpus(text)


def _fit(**stages: StageFit) -> PlanFit:
    return PlanFit(Shared("nf4", 5000, 300), stages)


def test_an_overlay_has_what_differs(parse: Parse, tiny: Folder) -> None:
    stages = {"sft": _sft(parse, tiny("llava_clip")), "dpo": _sft(parse, tiny("llava_clip"))}
    found = _fit(sft=StageFit(1, True, 8, 4, 2, True), dpo=StageFit(1, True, 16, 2, 4, False))
    overlay = overlay_of(found, stages)
    assert overlay == {
        "trainer": {"accumulate_grad_batches": 4},
        "data": {"batch_size": 2, "eval_batch_size": 8, "max_pixels": 5000, "max_length": 300},
        "model": {"init_args": {"gradient_checkpointing": True, "base": {"quantization": "nf4"}}},
    }
    assert command_line(overlay) == (
        "--trainer.accumulate_grad_batches 4 --data.batch_size 2 --data.eval_batch_size 8 --data.max_pixels 5000 "
        "--data.max_length 300 --model.init_args.base.quantization nf4; in training also "
        "--model.init_args.gradient_checkpointing true"
    )


def test_different_effective_batches_have_no_common_overlay(parse: Parse, tiny: Folder) -> None:
    stages = {"sft": _sft(parse, tiny("llava_clip")), "dpo": _sft(parse, tiny("llava_clip"))}
    found = _fit(sft=StageFit(1, True, 8, 4, 2, True), dpo=StageFit(1, True, 8, 4, 4, True))
    with pytest.raises(DataError, match="sft 8, dpo 16"):
        overlay_of(found, stages)


@pytest.mark.slow
def test_the_command_writes_an_overlay_with_which_all_stages_fit(
    tiny: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["vlm-calibration"])
    folder = ["--model.init_args.base.name_or_path", tiny("qwen2_5_vl")]
    call = ["estimate-memory", "--config", "model/qwen2_5_vl_7b", "--data.max_pixels=null", *folder]
    out = tmp_path / "fits.yaml"
    assert main([*call, "--gpu", "1.2GB", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for stage in ("levels", "sft", "dpo", "eval/jsonl"):
        assert f"│ {stage} " in printed
    assert yaml.safe_load(out.read_text())["data"]["max_pixels"] == (4096 - 256) * 64
    stages = parse_stages(["--config", "model/qwen2_5_vl_7b", "--config", str(out), *folder])
    for config in stages.values():
        for phase in stage_phases(config, plan_of(stages)):
            assert phase.estimate.total <= usable_bytes(1.2 * 2**30)
    assert main([*call, "--gpu", "1.2GB", "--out", str(out)]) == 1
    assert f"{out} exists" in capsys.readouterr().err
    out.write_text("mine: 1\n")
    assert main([*call, "--gpu", "1.2GB", "--out", str(out), "--overwrite"]) == 0
    assert "max_pixels" in out.read_text()
    capsys.readouterr()
    assert main([*call, "--gpu", "0.751GB,1.2GB"]) == 1
    assert "0.751GB: nothing fits" in capsys.readouterr().err
    assert main([*call, "--gpu", "24GB,80GB", "--out", str(out)]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_plan_without_a_stage_has_all(tiny: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vlm-calibration"])
    folder = ["--model.init_args.base.name_or_path", tiny("qwen2_5_vl")]
    stages = parse_stages(
        [
            "--config",
            "model/qwen2_5_vl_7b",
            *folder,
            "--config=experiment/anchored",
            "--model.init_args.lora.r",
            "8",
        ]
    )
    assert list(stages) == ["levels", "sft", "dpo", "eval/jsonl"]
    assert all(c.model.init_args.base.name_or_path == folder[1] for c in stages.values())
    assert stages["sft"].model.init_args.lora.r == 8, "levels and eval have no adapter to train"
    assert stages["dpo"].model.init_args.optimizer.lr == 2e-5, "experiment/anchored_dpo"
    assert plan_of(stages).lora.r == 8


def test_a_plan_with_stages_has_those(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vlm-calibration"])
    stages = parse_stages(["--config", "sft", "--config=regions", "--data.eval_batch_size", "3"])
    assert list(stages) == ["sft", "regions"]
    assert [c.data.eval_batch_size for c in stages.values()] == [3, 3]
    assert plan_of(stages).adapters == 1


def test_stages_have_short_names(parse: Parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vlm-calibration"])
    own = tmp_path / "mine.yaml"
    own.write_text((CONFIGS / "sft.yaml").read_text())
    files = [str(CONFIGS / "eval/jsonl.yaml"), str(own), "levels.yaml"]
    assert list(parse_stages([f"--config={name}" for name in files])) == ["eval/jsonl", "mine", "levels"]


def test_a_key_that_no_stage_has_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vlm-calibration"])
    with pytest.raises(ArgumentError, match="batchsize"):
        parse_stages(["--config", "levels", "--data.batchsize", "3"])
    with pytest.raises(ArgumentError, match="neither a file nor a preset"):
        parse_stages(["--config", "no/such"])
    with pytest.raises(ArgumentError, match="expected a preset"):
        parse_stages(["--config"])
