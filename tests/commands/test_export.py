"""`vlm-calibration export` written files, refusals, and uploads to the Hub."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file

from vlm_calibration import hub
from vlm_calibration.estimators.decision import read_rule
from vlm_calibration.inference.model import load_calibrated
from vlm_calibration.models.base import BaseModel, adapter_digest
from vlm_calibration.models.loading import weights_digest
from vlm_calibration.reporting.card import Card, load_card, save_card
from vlm_calibration.reporting.report.summary import read_evaluation

from ..command_line import Ended
from ..decision_rules import write_decision_rule
from ..reporting.test_card import write_run

Call = Callable[..., Ended]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def trained(new_adapter: Callable[..., str], model_folder: str, processor: Any, tmp_path: Path) -> Path:
    """A run directory as training leaves it."""
    folder = tmp_path / "run" / "adapter"
    shutil.copytree(new_adapter(1), folder)
    processor.save_pretrained(folder)
    save_card(folder, Card(model_folder, location="run/adapter", template="{question}?", max_new_tokens=5))
    (tmp_path / "run" / "config.yaml").touch()
    return tmp_path / "run"


@pytest.fixture
def call(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command in this process, in `tmp_path`, logged in to a Hub that has the card of every base."""
    monkeypatch.setattr(hub, "get_token", lambda: "hf_token")
    loading, card = hub.loading, "the model card"
    monkeypatch.setattr(
        hub, "loading", lambda what, name: nullcontext() if what == card else loading(what, name)
    )
    base_card = tmp_path.with_name(f"{tmp_path.name}-hub.md")
    base_card.write_text("---\nlicense: other\nlicense_name: theirs\n---\n")
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: str(base_card))
    return partial(call, "export")


def _files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_copy_of_the_adapter(call: Call, trained: Path, tmp_path: Path) -> None:
    before = _files(trained / "adapter")
    for run, to in (("run", "to/one"), ("run/adapter", "to/two")):
        ended = call(run, "--out", to)
        assert (ended.status, ended.out) == (0, f"wrote {to}\n")
        copy = _files(tmp_path / to)
        changed = {name for name in before if before[name] != copy.pop(name)}
        assert (changed, copy) == ({"README.md", "calibration.json"}, {})
        card = load_card(tmp_path / to)
        assert card is not None
        assert card.location == to
        assert f"path = '{to}'" in (tmp_path / to / "README.md").read_text()
    assert _files(trained / "adapter") == before


@pytest.mark.parametrize(
    ("evaluated", "merged_as"), [("auto", "auto"), ("float32", "auto"), ("auto", "float32")]
)
def test_thresholds_stay_with_the_adapter_and_go_into_the_merged_model(
    call: Call, trained: Path, tmp_path: Path, model_folder: str, evaluated: str, merged_as: str
) -> None:
    """The base's checkpoint is in float32, which "auto" therefore is."""
    rule = write_decision_rule(trained / "adapter", prompt="{question}?", dtype=evaluated)
    assert call("run", "--out", "copy").status == 0
    assert read_rule(tmp_path / "copy") == rule
    assert call("copy", "--out", "again").status == 0
    assert call("run", "--merge", "--out", "merged", "--dtype", merged_as).status == 0
    for name in ("copy", "again", "merged"):
        assert f"{rule.guarantee} Send all other" in (tmp_path / name / "README.md").read_text()
    merged = read_rule(tmp_path / "merged")
    weights = weights_digest(BaseModel(str(tmp_path / "merged")))
    assert merged == replace(rule, base=model_folder, weights=weights)
    assert load_calibrated(str(tmp_path / "merged"), device="cpu").rule == merged


@pytest.mark.parametrize(
    ("changed", "dtype", "says"),
    [
        ({}, "bfloat16", "they were chosen with quantization none, dtype float32, and here it is none, bf"),
        ({"dtype": "bfloat16"}, "auto", "they were chosen with quantization none, dtype bfloat16, and"),
        ({"quantization": "nf4"}, "auto", "they were chosen with quantization nf4"),
        ({"weights": "0"}, "auto", "they were chosen with other weights"),
    ],
)
def test_thresholds_that_do_not_hold_for_the_merged_model_are_left_out(
    call: Call, trained: Path, tmp_path: Path, changed: dict[str, Any], dtype: str, says: str
) -> None:
    write_decision_rule(trained / "adapter", **changed)
    ended = call("run", "--merge", "--out", "merged", "--dtype", dtype)
    assert ended.status == 0
    assert f"left out the thresholds of run/adapter: {says}" in ended.out
    assert not (tmp_path / "merged/thresholds.json").exists()
    assert "At most 5% ..." not in (tmp_path / "merged/README.md").read_text()


def test_the_merged_model(call: Call, trained: Path, tmp_path: Path, model_folder: str) -> None:
    ended = call("run", "--merge", "--out", "merged", "--dtype", "bfloat16")
    assert ended.status == 0
    assert ended.out.splitlines() == [
        f"merged 28 layers of run/adapter into a copy of {model_folder}",
        "wrote merged",
    ]
    assert set(_files(tmp_path / "merged")) == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md", "calibration.json"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    expected = Card(model_folder, location="merged", merged=True, template="{question}?", max_new_tokens=5)
    assert load_card(tmp_path / "merged") == expected
    text = (tmp_path / "merged/README.md").read_text()
    assert "peft" not in text
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "transformers"


def test_an_adapter_without_card_and_processor(
    call: Call, new_adapter: Callable[..., str], tmp_path: Path, model_folder: str
) -> None:
    adapter = Path(new_adapter(1))
    (adapter / "README.md").unlink(missing_ok=True)
    assert call(str(adapter), "--out", "copy").status == 0
    assert load_card(tmp_path / "copy") == Card(model_folder, location="copy")
    assert call("copy", "--out", "merged", "--merge").status == 0
    assert (tmp_path / "merged" / "tokenizer.json").is_file(), "the processor of the base"


def test_a_card_that_someone_edited_is_kept(call: Call, trained: Path, tmp_path: Path) -> None:
    (trained / "adapter" / "README.md").write_text("my own")
    assert call("run", "--out", "copy").status == 0
    assert (tmp_path / "copy" / "README.md").read_text() == "my own"
    ended = call("run", "--out", "merged", "--merge")
    assert ended.out.startswith("run/adapter/README.md has been edited since training")
    assert "merged into it" in (tmp_path / "merged" / "README.md").read_text()


def _results(readme: Path) -> dict[str, float]:
    """The metrics in the metadata of a card, as the Hub's own parser reads them."""
    return {r.metric_type: r.metric_value for r in ModelCard.load(readme).data.eval_results or []}


def test_the_results_of_an_evaluation_are_in_the_card_of_the_weights_that_it_evaluated(
    call: Call, trained: Path, tmp_path: Path
) -> None:
    digest = adapter_digest(trained / "adapter")
    evaluation = write_run(tmp_path / "eval", inputs={"model.init_args.adapters.dpo": digest})
    assert call("run", "--out", "copy", "--evaluation", "eval").status == 0
    results = _results(tmp_path / "copy" / "README.md")
    assert len(results) == 4
    assert results["accuracy"] == read_evaluation(evaluation, digest).results["dpo"]["accuracy"]

    # They stay with these weights when the copy is exported again under another name of its base, and with no others.
    assert call("copy", "--out", "again", "--base", "org/base").status == 0
    assert _results(tmp_path / "again" / "README.md") == results
    card = load_card(tmp_path / "again")
    assert card is not None
    assert [e.adapter for e in card.evaluations] == [adapter_digest(tmp_path / "again")]
    weights = load_file(tmp_path / "again" / WEIGHTS)
    save_file({name: 2 * weight for name, weight in weights.items()}, tmp_path / "again" / WEIGHTS)
    assert call("again", "--out", "other").status == 0
    assert _results(tmp_path / "other" / "README.md") == {}
    ended = call("again", "--out", "more", "--evaluation", "eval")
    assert (ended.status, not (tmp_path / "more").exists()) == (1, True)
    assert ended.error().startswith("eval: this adapter was not evaluated there, or has changed since")


def test_the_licence_is_that_of_the_base_unless_one_is_given(
    call: Call, api: type[FakeApi], trained: Path, tmp_path: Path, model_folder: str
) -> None:
    push = ("run", "--push-to-hub", "org/mine", "--base", "org/base")
    theirs = {"license": "other", "license_name": "theirs"}
    for given, expected in (((), theirs), (("mit",), {"license": "mit"})):
        assert call(*push, *("--license" for _ in given), *given).status == 0
        data = yaml.safe_load(api.uploaded["README.md"].decode().split("---\n")[1])
        assert {key: value for key, value in data.items() if key.startswith("license")} == expected
    assert call("run", "--out", "plain").status == 0
    assert "license" not in (tmp_path / "plain/README.md").read_text(), "that of the base is not known"
    shutil.copytree(model_folder, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert call("run", "--out", "known", "--base", "base").status == 0
    assert ModelCard.load(tmp_path / "known/README.md").data.license == "apache-2.0"


def test_another_base_is_loaded_and_named(
    call: Call, trained: Path, tmp_path: Path, model_folder: str
) -> None:
    path = trained / "adapter" / CONFIG
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "gone", "revision": "v1"})
    )
    ended = call("run", "--out", "merged", "--merge")
    assert ended.status == 1
    assert ended.error().startswith("cannot load a model from 'gone'")
    assert not (tmp_path / "merged").exists()
    shutil.copytree(model_folder, tmp_path / "moved")
    assert call("run", "--out", "merged", "--merge", "--base", "moved").status == 0
    assert call("run", "--out", "copy", "--base", "org/base", "--base-revision", "abc").status == 0
    config = json.loads((tmp_path / "copy" / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "abc")
    assert "'org/base', revision='abc'" in (tmp_path / "copy" / "README.md").read_text()
    assert call("run", "--out", "same").status == 0
    assert json.loads((tmp_path / "same" / CONFIG).read_text())["revision"] == "v1", "the adapter's own"


def test_a_folder_that_is_not_empty_is_replaced_only_with_overwrite(
    call: Call, trained: Path, tmp_path: Path
) -> None:
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    ended = call("run", "--out", "full")
    assert ended.error() == "--out full is not empty: choose another folder, or give --overwrite"
    assert call("run", "--out", "empty").status == 0
    assert call("run", "--out", "full", "--overwrite").status == 0
    assert not (tmp_path / "full" / "mine.txt").exists()
    assert (tmp_path / "full" / CONFIG).is_file()


def test_folders_that_are_needed_are_not_replaced(
    call: Call, trained: Path, tmp_path: Path, model_folder: str
) -> None:
    shutil.copytree(model_folder, tmp_path / "base")
    before = _files(trained / "adapter")
    for out in (".", "..", "run", "run/adapter", "run/adapter/inside", "run/../run", "base"):
        ended = call("run", "--out", out, "--merge", "--overwrite", "--base", "base")
        assert ended.error().startswith(f"--out {out} ")
        assert ended.error().endswith("choose another folder")
    assert _files(trained / "adapter") == before
    assert (tmp_path / "base" / "config.json").is_file()


def test_a_failed_export_leaves_the_old_one(
    call: Call, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("run", "--out", "merged", "--merge").status == 0
    before = _files(tmp_path / "merged")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    ended = call("run", "--out", "merged", "--merge", "--overwrite")
    assert ended.status == 1
    assert "No space left on device" in ended.error()
    assert _files(tmp_path / "merged") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "run"]


@pytest.mark.parametrize(
    ("arguments", "says", "status"),
    [
        (["run", "--out", "x", "--license", "Apache 2"], "--license Apache 2: not a name that the Hub", 1),
        (["run", "--out", "x", "--evaluation", "run"], "run/config.yaml: not the configuration of a run", 1),
        (["run"], "nowhere to export to: give --out FOLDER, --push-to-hub NAME, or both", 2),
        (["run", "--out", "x", "--dtype", "int4"], "dtype", 2),
        (["run", "--out", "run/config.yaml"], "--out run/config.yaml is a file", 1),
        (["run", "--push-to-hub", "a/b/c"], "--push-to-hub a/b/c: Repo id must be", 1),
        (["run", "--push-to-hub", "org/x"], "the base model {base} is a folder, which nobody else has", 1),
    ],
)
def test_a_mistake_in_the_call(
    call: Call, trained: Path, tmp_path: Path, model_folder: str, arguments: list[str], says: str, status: int
) -> None:
    ended = call(*arguments)
    assert says.format(base=model_folder) in ended.error()
    assert ended.status == status
    assert not (tmp_path / "x").exists()


class FakeApi:
    """Records the calls that the real client would take, and the uploaded files."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]]
    uploaded: dict[str, bytes]
    error: BaseException | None = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        def called(*arguments: Any, **settings: Any) -> None:
            inspect.signature(getattr(HfApi, name)).bind(self, *arguments, **settings)
            if name == "upload_folder":
                FakeApi.uploaded = _files(settings.pop("folder_path"))
                if FakeApi.error is not None:
                    raise FakeApi.error
            FakeApi.calls.append((name, arguments, settings))

        return called


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    FakeApi.calls, FakeApi.uploaded, FakeApi.error = [], {}, None
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    return FakeApi


def test_the_adapter_is_uploaded(call: Call, api: type[FakeApi], trained: Path, tmp_path: Path) -> None:
    push = ("run", "--push-to-hub", "org/mine", "--base", "org/base")
    ended = call(*push, "--private")
    assert (ended.status, ended.out) == (0, "pushed to org/mine\n")
    assert api.calls == [
        ("create_repo", ("org/mine",), {"repo_type": "model", "private": True, "exist_ok": True}),
        ("upload_folder", (), {"repo_id": "org/mine", "commit_message": "Upload the model and its card"}),
    ]
    assert set(api.uploaded) == set(_files(trained / "adapter"))
    assert json.loads(api.uploaded[CONFIG])["base_model_name_or_path"] == "org/base"
    text = api.uploaded["README.md"].decode()
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "org/base"
    assert "path = 'org/mine'" in text
    assert [p.name for p in tmp_path.iterdir()] == ["run"], "temporary files are deleted"
    ended = call(*push, "--out", "copy")
    assert (ended.status, ended.out) == (0, "wrote copy\npushed to org/mine\n")
    assert api.uploaded == _files(tmp_path / "copy")


def test_refusals_of_the_hub_are_reported(call: Call, api: type[FakeApi], trained: Path) -> None:
    for error in (ConnectionError("no route"), ValueError('Invalid metadata.\n- "license" is not allowed')):
        api.error = error
        ended = call("run", "--push-to-hub", "org/mine", "--base", "org/base")
        assert ended.error() == f"cannot push to org/mine: {' '.join(str(error).split())}"


def test_nobody_is_logged_in(
    call: Call, api: type[FakeApi], trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    ended = call("run", "--push-to-hub", "org/mine", "--base", "org/base", "--out", "copy")
    assert ended.error() == "not logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN"
    assert (api.calls, (tmp_path / "copy").exists()) == ([], False), "checked before any work is done"
