"""Evaluations by the command line: base models, and adapters that do not fit them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText

from .command_line import Ended, write_evaluation
from .demo.architecture import build_model


def _evaluation(folder: Path, adapters: dict[str, str], model_folder: str | None = None) -> list[str]:
    """Arguments of an evaluation of a base model, or the one that the adapters name, and adapters, which writes to `folder`/eval."""
    base = {"base": {"name_or_path": model_folder, "dtype": "float32"}} if model_folder else {}
    settings = {**base, "adapters": adapters, "max_new_tokens": 5}
    return write_evaluation(folder / "eval.yaml", str(folder / "eval"), 1, **settings)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> str:
    """The folder of a wider model of the demo's architecture, with its processor."""
    folder = tmp_path_factory.mktemp("other")
    config = build_model().config
    config.text_config.hidden_size *= 2
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("command", ["test", "ask", "dpo"])
def test_an_adapter_of_another_base_model(
    run: Callable[..., Ended],
    fit: Callable[..., list[str]],
    model_folder: str,
    other_model: str,
    new_adapter: Callable[..., str],
    tmp_path: Path,
    command: str,
) -> None:
    adapter = new_adapter(1)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    other = ["--model.init_args.base.name_or_path", other_model]
    settings = {
        "test": _evaluation(tmp_path, {"one": adapter}, other_model),
        "ask": ["ask", "a.png", "A dog?", "--base", other_model, "--adapter", adapter],
        "dpo": [*fit("dpo"), "--model.init_args.adapter", adapter, *other],
    }
    ended = run(*settings[command])
    assert ended.status == 1
    assert ended.error().startswith(f"the adapter at {adapter} does not fit the base model {other_model}: ")
    assert f"its base model is {model_folder}: " in ended.error()


def test_the_base_model_is_the_one_that_the_adapters_name(
    run: Callable[..., Ended],
    model_folder: str,
    other_model: str,
    new_adapter: Callable[..., str],
    tmp_path: Path,
) -> None:
    adapters = {"one": new_adapter(1)}
    named = run(*_evaluation(tmp_path, adapters, model_folder))
    assert named.status == 0, named.err
    (tmp_path / "eval").rename(tmp_path / "named")
    ended = run(*_evaluation(tmp_path, adapters))
    assert ended.status == 0, ended.err
    for name in ("base/predictions.jsonl", "one/predictions.jsonl", "one/metrics.json"):
        assert (tmp_path / "eval" / name).read_bytes() == (tmp_path / "named" / name).read_bytes()


def test_no_base_model_is_named_and_adapters_of_two(
    run: Callable[..., Ended],
    model_folder: str,
    other_model: str,
    new_adapter: Callable[..., str],
    tmp_path: Path,
) -> None:
    other = Path(new_adapter(2))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": other_model}))
    ended = run(*_evaluation(tmp_path, {}))
    assert ended.error().startswith("no base model: give model.init_args.base.name_or_path")
    ended = run(*_evaluation(tmp_path, {"one": new_adapter(1), "two": str(other)}))
    assert ended.error().startswith(
        f"the adapters 'one' and 'two' have different base models: {model_folder} (auto) and {other_model} (auto); "
    )
    assert not (tmp_path / "eval").exists(), "checked before anything is loaded or written"
