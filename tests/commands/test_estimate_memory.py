"""`vlm-calibration estimate-memory`: its reading of the settings of `fit`, and the estimates quoted in configurations."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml

from vlm_calibration.cli import main
from vlm_calibration.records import DataError
from vlm_calibration.reporting.memory import memory_line
from vlm_calibration.stages.memory import STATE_BYTES, Plan, training_memory, training_step, usual_choices
from vlm_calibration.stages.optimization import OptimizerSettings

from ..models.published import MODELS
from .conftest import CONFIGS

FILES = sorted(p.stem for p in (CONFIGS / "model").glob("*.yaml") if p.stem != "qlora")
BEHIND = re.compile(r"behind (\w+)\.yaml:$", re.MULTILINE)


def _quoted(name: str) -> str:
    """The estimate in the comment of a configuration."""
    text = (CONFIGS / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    (line,) = re.findall(r"^# (.* = [\d.]+ GiB)$", text, re.MULTILINE)
    return line


def test_every_file_is_of_a_published_model() -> None:
    assert set(MODELS) == set(FILES)
    for name, model in MODELS.items():
        settings = yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert settings["model"]["init_args"]["base"]["name_or_path"] == model.repository
        assert settings["data"]["batch_size"] * settings["trainer"]["accumulate_grad_batches"] == 32


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_files_quote_the_estimate(
    parse: Callable[..., Any], published: Callable[[str], str], name: str
) -> None:
    config = parse("sft.yaml", f"model/{name}.yaml", model__init_args__base__name_or_path=published(name))
    step = training_step(config)
    assert memory_line(training_memory(config, step), step) == _quoted(name)


@pytest.mark.slow
def test_a_choice_takes_what_the_same_settings_take(
    parse: Callable[..., Any], published: Callable[[str], str]
) -> None:
    folder = {"model__init_args__base__name_or_path": published("qwen2_5_vl_3b")}
    config = parse("sft.yaml", "model/qwen2_5_vl_3b.yaml", **folder)
    choices = usual_choices(config, Plan())
    assert [choice.split()[0] for choice in choices] == [
        *("--model.init_args.base.quantization", "--data.batch_size", "--data.max_pixels"),
        "--model.init_args.base.quantization",
    ]
    for choice, size in choices.items():
        words = choice.replace("--", "").replace(".", "__").split()
        changed = parse(
            "sft.yaml",
            "model/qwen2_5_vl_3b.yaml",
            **folder,
            **dict(zip(words[::2], words[1::2], strict=True)),
        )
        assert training_memory(changed, training_step(changed)).total == size
    assert size == min(choices.values())


def test_qlora_quotes_the_estimate(parse: Callable[..., Any], published: Callable[[str], str]) -> None:
    (name,) = BEHIND.findall((CONFIGS / "model" / "qlora.yaml").read_text(encoding="utf-8"))
    files = ("sft.yaml", f"model/{name}.yaml", "model/qlora.yaml")
    config = parse(*files, model__init_args__base__name_or_path=published(name))
    assert config.model.init_args.base.quantization == "nf4"
    step = training_step(config)
    estimate = training_memory(config, step)
    assert memory_line(estimate, step) == _quoted("qlora")
    # Embeddings, output head and tower in float32, the rest in a little more than four bits.
    assert estimate.weights["nf4"] == pytest.approx(6.53e9 * 0.516, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_preference_optimisation_takes_them_too(
    parse: Callable[..., Any], published: Callable[[str], str], name: str
) -> None:
    folder = {"model__init_args__base__name_or_path": published(name)}
    for overlays in ([], ["model/qlora.yaml"]):
        config = parse("dpo.yaml", f"model/{name}.yaml", *overlays, **folder)
        assert config.model.init_args.lora.r == 16
        assert training_step(config).responses == 11


@pytest.mark.slow
def test_the_command(
    published: Callable[[str], str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["vlm-calibration"])
    files = ["sft.yaml", "model/smolvlm2_256m.yaml"]
    arguments = ["estimate-memory", *(a for f in files for a in ("--config", str(CONFIGS / f)))]
    folder = ["--model.init_args.base.name_or_path", published("smolvlm2_256m")]
    assert main([*arguments, *folder]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"# {_quoted('smolvlm2_256m')}"
    for row in ("weights in bfloat16", "gradients", "optimizer states", "activations, at most", "total"):
        assert f"│ {row} " in out
    assert "16 rows of 2048 tokens, with checkpointing" in out
    assert "64 prompts of 1344 tokens, up to 64 new ones" in out
    assert "data.max_length" in out
    assert "--data.batch_size 8 --trainer.accumulate_grad_batches" in " ".join(out.split())
    assert main([*arguments, *folder, "--tokens", "700"]) == 0
    out = capsys.readouterr().out
    assert "16 x 700 tokens: " in out.splitlines()[-1]
    assert "as given by --tokens" in out
    assert main([*arguments, "--model.init_args.base.name_or_path", "no/model"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("vlm-calibration: error: cannot load a model from 'no/model': ")


def test_settings_of_a_step(parse: Callable[..., Any]) -> None:
    step = training_step(parse("sft.yaml"))
    assert (step.batch, step.tokens, step.responses, step.checkpointing) == (12, 256, 1, False)
    assert (step.autocast, step.cast) == (None, None)
    assert training_step(parse("sft.yaml"), 100).tokens == 100
    for precision, expected in (
        ("bf16-mixed", (torch.bfloat16, None)),
        ("bf16-true", (None, torch.bfloat16)),
    ):
        step = training_step(parse("sft.yaml", trainer__precision=precision))
        assert (step.autocast, step.cast) == expected
    with pytest.raises(DataError, match=r"trainer\.precision: no estimate for '64-true', expected 32, "):
        training_step(parse("sft.yaml", trainer__precision="64-true"))


def test_responses_of_preference_optimisation(parse: Callable[..., Any]) -> None:
    pairs = {"model__init_args__pairs__rejected": "far", "model__init_args__pairs__n_rejected": 3}
    assert training_step(parse("dpo.yaml")).responses == 11
    assert training_step(parse("dpo.yaml", **pairs)).responses == 4
    assert training_step(parse("dpo.yaml", **pairs, data__candidates__wrong_answer="true")).responses == 5
    plain = training_step(parse("dpo.yaml", **pairs, model__init_args__scoring="plain"))
    assert (plain.batch, plain.responses) == (16 * 4, 1)


def test_a_reference_and_trained_parts_count(parse: Callable[..., Any], model_folder: str) -> None:
    folder = {"model__init_args__base__name_or_path": model_folder}
    lora = {"model__init_args__lora__parts": "[language,projector]"}

    def estimate(**settings: Any) -> Any:
        config = parse("dpo.yaml", **folder, **lora, **settings)
        return training_memory(config, training_step(config, 90))

    with_, without = estimate(), estimate(model__init_args__reference="base")
    adapter = with_.parameters - without.parameters
    assert adapter > with_.trained, "parts: [language] in dpo.yaml"
    assert with_.weights["float32"] - without.weights["float32"] == 4 * adapter
    assert with_.optimizer == 8 * with_.trained


def test_every_optimizer_is_known() -> None:
    assert set(get_args(get_type_hints(OptimizerSettings)["name"])) == set(STATE_BYTES)


def test_a_module_that_trains_no_adapter(parse: Callable[..., Any]) -> None:
    config = parse("sft.yaml")
    del config.model.init_args["lora"]
    with pytest.raises(DataError, match="SFTModule trains no adapter"):
        training_memory(config, training_step(config))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("x", "--tokens: expected a whole number of at least 1, found 'x'"),
        ("0", "--tokens: expected a whole number of at least 1, found '0'"),
    ],
)
def test_tokens_are_a_positive_number(capsys: pytest.CaptureFixture[str], given: str, says: str) -> None:
    assert main(["estimate-memory", "--config", "none.yaml", "--tokens", given]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_settings_count_in_the_order_given(
    published: Callable[[str], str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["vlm-calibration"])
    config = ["--config", str(CONFIGS / "sft.yaml")]
    folder = ["--model.init_args.base.name_or_path", published("smolvlm2_256m")]
    for early, late, rows in ((["--data.batch_size", "3"], [], 12), ([], ["--data.batch_size", "3"], 3)):
        assert main(["estimate-memory", *early, *config, *folder, "--tokens=700", *late]) == 0
        assert f"{rows} x 700 tokens: " in capsys.readouterr().out.splitlines()[-1]
