"""A level table is used under the conditions of its measurement: one model, one kind of noise, one prompt, one grading rule."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from safetensors.torch import load_file, save_file

from vlm_calibration.callbacks.results_table import ResultsTable
from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.files import write_json
from vlm_calibration.models import loading
from vlm_calibration.models.loading import BaseModel, weights_digest
from vlm_calibration.perturbation.levels import AnchoredLevels, LinearLevels
from vlm_calibration.perturbation.schedules import CosineSchedule, LinearSchedule
from vlm_calibration.records import DataError
from vlm_calibration.reporting.card import Card, save_card
from vlm_calibration.reporting.report.data import origin_of
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.stages.provenance import check_levels, differences_from_training
from vlm_calibration.stages.scoring import Scorer
from vlm_calibration.stages.sft import SFTModule
from vlm_calibration.text.grading import Grading
from vlm_calibration.text.prompts import ElicitationPrompt

from ..command_line import Ended
from ..level_tables import FALLING, measured

Data = Callable[..., PerturbedQueryDataModule]


@pytest.mark.parametrize(
    ("measured_with", "used_with", "message"),
    [
        (
            {"noise": NoisePolicy(schedule=CosineSchedule())},
            {"noise": NoisePolicy(schedule=LinearSchedule())},
            "data.noise.schedule was 'CosineSchedule(steps=1000, offset=0.008)' and is "
            "'LinearSchedule(steps=1000, beta_start=0.0001, beta_end=0.02)'",
        ),
        ({"noise": NoisePolicy(shape="box")}, {}, "data.noise.shape was 'box' and is 'mask'"),
        ({"noise": NoisePolicy(dilate=0.2)}, {}, "data.noise.dilate was 0.2 and is 0.0"),
        (
            {"noise": NoisePolicy(resolution="native")},
            {},
            "data.noise.resolution was 'native' and is 'model'",
        ),
        ({}, {"noise": NoisePolicy(absent="clean")}, "data.noise.absent was 'distractor' and is 'clean'"),
        (
            {"prompt": ElicitationPrompt("{question}\nHow sure are you?")},
            {"prompt": ElicitationPrompt("{question}?")},
            r"data.prompt.template was '{question}\nHow sure are you?' and is '{question}?'",
        ),
        ({}, {"max_pixels": 5000}, "data.max_pixels was None and is 5000"),
        (
            {"grading": Grading(short="contains")},
            {"grading": Grading(short="token_f1")},
            "data.grading (short) was 'contains' and is 'token_f1 >= 0.5'",
        ),
    ],
)
def test_a_setting_that_differs_is_named_with_both_sides(
    model_folder: str, data: Data, measured_with: dict[str, Any], used_with: dict[str, Any], message: str
) -> None:
    base, levels = BaseModel(model_folder), measured(model_folder, **measured_with)
    check_levels(levels, base, data(**measured_with))
    with pytest.raises(DataError) as caught:
        check_levels(levels, base, data(**used_with))
    assert message in str(caught.value)
    assert str(caught.value).count(" and is ") == 1, "nothing else differs"
    assert "levels fit" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "used_with",
    [
        {"noise": NoisePolicy(seed=7, distractor_probability=0.3, clean_fraction=0.5, wrong_answer_rate=1.0)},
        {"grading": Grading(open="contains"), "batch_size": 1, "max_length": 9},
    ],
)
def test_settings_without_effect_on_the_measurement_may_differ(
    model_folder: str, data: Data, used_with: dict[str, Any]
) -> None:
    check_levels(measured(model_folder), BaseModel(model_folder), data(**used_with))


TEMPLATE = ElicitationPrompt().template


@pytest.mark.parametrize(
    ("trained", "used", "differs"),
    [
        ({"max_pixels": None}, {"max_pixels": 5000}, "data.max_pixels is 5000 and was None"),
        (
            {"template": "{question} Sure?", "max_pixels": 1},
            {"prompt": ElicitationPrompt("{question}"), "max_pixels": 2},
            "data.prompt.template is '{question}' and was '{question} Sure?' and data.max_pixels is 2 and was 1",
        ),
        ({"template": TEMPLATE, "max_pixels": 5000}, {"max_pixels": 5000}, None),
        ({"template": None}, {}, None),
    ],
)
def test_an_adapter_that_is_not_used_as_it_was_trained_is_named(
    tmp_path: Path, data: Data, trained: dict[str, Any], used: dict[str, Any], differs: str | None
) -> None:
    (tmp_path / "calibration.json").write_text(json.dumps(trained))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = differences_from_training({"sft": str(tmp_path), "uncarded": "no/such"}, data(**used))
    assert found == ({} if differs is None else {"sft": differs})
    says = [f"'sft' is used otherwise than in its training: {text}" for text in found.values()]
    assert [str(w.message) for w in caught] == says


def test_table_and_report_say_that_an_adapter_is_asked_with_another_prompt(
    tmp_path: Path, data: Data, model_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, template in (("same", TEMPLATE), ("other", "{question} Sure?")):
        save_card(tmp_path / name, Card(model_folder, template=template))
        (tmp_path / name / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": model_folder})
        )
    module = EvaluationModule(adapters={name: str(tmp_path / name) for name in ("same", "other")})
    with pytest.warns(UserWarning, match="'other' is used otherwise than in its training"):
        module.check_data(data())
    module.results = dict.fromkeys(module.systems, Scorer().compute())
    trainer: Any = SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path))
    ResultsTable().on_test_end(trainer, module)
    says = f"data.prompt.template is {TEMPLATE!r} and was '{{question}} Sure?'"
    assert f"other, not as trained: {says}" in " ".join(capsys.readouterr().out.split())
    assert module.notes == {"other": {"not as trained": says}}
    write_json(tmp_path / "eval/other/notes.json", module.notes["other"])
    config = {"model": {"init_args": {"adapters": {"other": str(tmp_path / "other")}}}}
    assert origin_of(tmp_path / "eval/other", tmp_path / "eval", config)[1]["not as trained"] == says


def test_linear_levels_are_not_compared(data: Data) -> None:
    check_levels(LinearLevels(), BaseModel("nowhere"), data())


def _change_weight(folder: Path) -> None:
    """Change one weight of the model in a folder a little."""
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[-1] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_a_model_is_the_same_in_any_folder(model_folder: str, data: Data, tmp_path: Path) -> None:
    levels, copy = measured(model_folder), tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps({**config, "_name_or_path": "x", "transformers_version": "0"})
    )
    check_levels(levels, BaseModel(str(copy)), data())
    _change_weight(copy)
    with pytest.raises(DataError) as caught:
        check_levels(levels, BaseModel(str(copy)), data())
    for folder in (model_folder, str(copy)):
        digest = weights_digest(BaseModel(folder))
        assert digest is not None
        assert f"{folder!r} (weights {digest[:8]})" in str(caught.value)


def test_every_part_of_a_large_file_counts(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "SPAN", 256)
    shutil.copytree(model_folder, tmp_path / "copy")
    base, file = BaseModel(str(tmp_path / "copy")), tmp_path / "copy/model.safetensors"
    content, size = file.read_bytes(), file.stat().st_size
    digests = {weights_digest(base)}
    for offset in (0, size // 15 - 1, size - 1):
        file.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
        digests.add(weights_digest(base))
    file.write_bytes(content[:1000] + content[1001:])
    assert len({*digests, weights_digest(base)}) == 5


def test_shards_are_one_model_if_none_is_missing(model_folder: str, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "copy")
    base, folder = BaseModel(str(tmp_path / "copy")), tmp_path / "copy"
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    assert weights_digest(base) is None
    shutil.copy(folder / "model-1.safetensors", folder / "model-2.safetensors")
    assert weights_digest(base) is not None


def test_a_model_that_is_not_here_is_compared_by_name_and_revision(data: Data) -> None:
    levels = measured("org/model")
    check_levels(levels, BaseModel("org/model"), data())
    for other in (BaseModel("org/model", revision="b"), BaseModel("org/other")):
        with pytest.raises(DataError, match=rf"model\.base was 'org/model' .*and is '{other.name_or_path}' "):
            check_levels(levels, other, data())


def test_another_quantisation_is_a_warning(model_folder: str, data: Data) -> None:
    with pytest.warns(UserWarning, match="model.base.quantization none, .* nf4"):
        check_levels(measured(model_folder), BaseModel(model_folder, quantization="nf4"), data())


def test_a_table_with_incomplete_provenance_is_refused(model_folder: str, data: Data) -> None:
    levels = measured(model_folder)
    provenance = {k: v for k, v in levels.table.provenance.items() if k not in ("grading", "weights")}
    incomplete = AnchoredLevels(table=replace(levels.table, provenance=provenance))
    with pytest.raises(DataError, match=r"has no weights, grading in its provenance.*`.*levels fit`"):
        check_levels(incomplete, BaseModel(model_folder), data())


def _modules(model: str, levels: Path) -> dict[str, Callable[[], L.LightningModule]]:
    base = BaseModel(model, dtype="float32")
    return {
        "fit": lambda: SFTModule(base),
        "fit stage 2": lambda: DPOModule(base, reference="base"),
        "test": lambda: EvaluationModule(base, oracle_levels=str(levels)),
    }


@pytest.mark.parametrize("use", ["fit", "fit stage 2", "test"])
def test_every_use_is_checked_before_a_model_is_loaded(
    model_folder: str,
    data: Data,
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    use: str,
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    for name in ("sft", "dpo"):
        monkeypatch.setattr(f"vlm_calibration.stages.{name}.load_for_training", loaded)
    monkeypatch.setattr("vlm_calibration.stages.evaluation.load_base", loaded)
    path = tmp_path / "levels.json"
    measured(model_folder, noise=NoisePolicy(schedule=LinearSchedule())).save(path)
    levels = LinearLevels() if use == "test" else AnchoredLevels(path)
    run = getattr(trainer(), use.split()[0])
    with pytest.raises(DataError, match=f"{re.escape(str(path))} was measured under other conditions"):
        candidates = CandidateSettings() if use == "fit stage 2" else None
        queries = data(noise=NoisePolicy(levels=levels), candidates=candidates)
        run(_modules(model_folder, path)[use](), datamodule=queries)


def test_levels_by_ranking_are_taught_as_what_they_are_and_are_no_oracle(
    model_folder: str, data: Data, tmp_path: Path
) -> None:
    ranking, base = Grading(open="contains", rank_levels=True), BaseModel(model_folder)
    levels = measured(model_folder, {"open": FALLING["short"]}, grading=ranking)
    with pytest.warns(UserWarning, match=r"not how often its answer is correct by data.grading \(contains\)"):
        check_levels(levels, base, data(grading=ranking))
    with pytest.raises(DataError, match=r"data.grading \(open\) was 'ranking' and is 'contains'"):
        check_levels(levels, base, data(grading=Grading(open="contains")))
    levels.save(str(tmp_path / "levels.json"))
    module = EvaluationModule(base, oracle_levels=str(tmp_path / "levels.json"))
    with pytest.raises(
        DataError, match="levels.json ranks given answers and does not say how often an answer is"
    ):
        module.check_data(data(grading=ranking))


def test_the_command_line_says_so_in_one_line_and_writes_nothing(
    run: Callable[..., Ended], fit: Callable[..., list[str]], model_folder: str, tmp_path: Path
) -> None:
    path, package = tmp_path / "levels.json", "vlm_calibration.perturbation"
    measured(model_folder).save(path)
    levels = {
        "class_path": f"{package}.levels.AnchoredLevels",
        "init_args": {"path": str(path), "likelihoods": None},
    }
    schedule = {"class_path": f"{package}.schedules.LinearSchedule"}
    ended = run(*fit(data={"noise": {"levels": levels, "kinds": {"noise": 1}, "schedule": schedule}}))
    assert ended.error().startswith(
        f"{path} was measured under other conditions: data.noise.schedule was 'Cosine"
    )
    assert (ended.status, (tmp_path / "run").exists()) == (1, False)
