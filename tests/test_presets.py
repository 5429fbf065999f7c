"""Names of presets, variables in configuration files, and overlays that all stages share."""

from __future__ import annotations

import json
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import get_loader

from vlm_calibration.commands.lightning_cli import shared_overlays
from vlm_calibration.presets import CONFIGS, find_preset, preset_names, resolve_configs


def contents(*arguments: str) -> list[dict[str, Any]]:
    """The content that each --config is replaced by."""
    resolved = resolve_configs(arguments)
    return [
        get_loader("yaml")(text)
        for option, text in zip(arguments, resolved[1:], strict=False)
        if option == "--config"
    ]


@pytest.fixture
def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(
        'data: {a: "${data_root}/x.jsonl", b: ["${runs}/sft", "${demo}"], c: "${home} 5 $", d: 1.0e-3}\n'
    )
    return path


def test_every_yaml_file_is_a_preset(root: Path) -> None:
    files = {path.relative_to(root / "configs") for path in (root / "configs").rglob("*.yaml")}
    assert {f"{name}.yaml" for name in preset_names()} == set(map(str, files))
    assert (CONFIGS / "sft.yaml").resolve() == root / "configs/sft.yaml"


def test_a_name_gives_the_content_of_its_file(root: Path) -> None:
    path = root / "configs/model/qwen2_5_vl_7b.yaml"
    for name in ("model/qwen2_5_vl_7b", "model/qwen2_5_vl_7b.yaml"):
        assert contents("fit", "--config", name) == [yaml.safe_load(path.read_text())]
        assert find_preset(name).samefile(path)


def test_a_file_takes_precedence_over_a_preset(overlay: Path) -> None:
    overlay.rename("sft")
    assert contents("--config", "sft")[0]["data"]["d"] == 1e-3


def test_a_misspelt_name_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"'model/qwen2_5_vl_7' .*did you mean model/qwen2_5_vl_7b"):
        resolve_configs(["--config", "model/qwen2_5_vl_7"])


def test_variables_have_defaults(
    overlay: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the demo is the same in every working folder."""
    for folder in (tmp_path, root):
        monkeypatch.chdir(folder)
        [content] = contents("--config", str(overlay))
        paths = {"a": "data/x.jsonl", "b": ["runs/sft", str(root / "src/vlm_calibration/demo")]}
        assert content["data"] == {**paths, "c": "${home} 5 $", "d": 1e-3}


@pytest.mark.parametrize(
    "options", [("--data-root", "my data", "--runs", "r: #1"), ("--data-root=my data", "--runs=r: #1")]
)
def test_options_set_variables_wherever_they_stand(overlay: Path, options: tuple[str, ...]) -> None:
    for arguments in ([*options, "--config", str(overlay)], ["--config", str(overlay), *options]):
        resolved = resolve_configs(arguments)
        content = yaml.safe_load(resolved[resolved.index("--config") + 1])
        assert (content["data"]["a"], content["data"]["b"][0]) == ("my data/x.jsonl", "r: #1/sft")


def test_the_configuration_of_a_run_sets_them_too(overlay: Path) -> None:
    Path("config.yaml").write_text("data_root: theirs\n")
    files = ("--config", "config.yaml", "--config", str(overlay))
    assert contents(*files)[1]["data"]["a"] == "theirs/x.jsonl"
    assert contents(*files, "--data-root", "mine")[1]["data"]["a"] == "mine/x.jsonl"


@pytest.mark.parametrize(
    ("content", "says"),
    [("data: {train\n", "not YAML"), ("- 3\n", "expected settings"), (b"\xff\xfe", "cannot be read")],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: str | bytes, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArgumentError, match=f"bad.yaml(:2)?: {says}"):
        resolve_configs(["--config", str(path)])


def test_the_parser_reads_what_the_file_says() -> None:
    """Texts that YAML would read as something else stay texts; the order of keys is that of systems in tables."""
    texts = ["yes", "null", "1e3", "1_000", "0x1f", "2026-01-01", "a: #b", "{c}", "", "Größe"]
    content = {"b": None, "a": texts, "c": [1e-3, True, 7]}
    [read] = contents("--config", json.dumps({"data": content}, ensure_ascii=False))
    assert list(read["data"].items()) == list(content.items())


STAGES = {
    "evaluation.EvaluationModule": ({"base", "max_new_tokens"}, True),
    "level_fit.LevelFitModule": ({"base", "max_new_tokens"}, False),
    "regions.RegionExtractor": (set(), False),
}
"""Stage -> settings of a training that it has as well, and whether it reads the level table, which is measured before it."""


@pytest.mark.parametrize("stage", STAGES)
def test_overlays_keep_what_a_stage_has(stage: str) -> None:
    kept, has_table = STAGES[stage]
    first = {"model": {"class_path": f"vlm_calibration.stages.{stage}"}}
    of_model = {"base": {"name_or_path": "m"}, "lora": {"r": 4}, "max_new_tokens": 8}
    misspelt = {"model": {"init_args": {"lorra": {"r": 4}}}}
    presets = contents("--config", "experiment/anchored", "--config", "experiment/paper")
    _, trained, anchored, paper, last = shared_overlays(
        [first, {"model": {"init_args": of_model}}, *presets, misspelt]
    )
    assert set(trained["model"]["init_args"]) == kept
    assert ("levels" in anchored["data"]["noise"]) == has_table
    assert anchored["data"]["noise"]["resolution"] == "model"
    assert "levels" in paper["data"]["noise"], "linear levels have no table"
    assert last == misspelt, "the parser refuses it"
