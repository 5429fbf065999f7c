"""A level table is used under the conditions of its measurement: one model, one kind of noise, one prompt, one grading rule."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlm_calibration.callbacks.results_table import ResultsTable
from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.files import write_json
from vlm_calibration.models import loading
from vlm_calibration.models.loading import BaseModel, weights_digest
from vlm_calibration.perturbation.levels import AnchoredLevels, LinearLevels
from vlm_calibration.perturbation.noise import CosineSchedule, LinearSchedule
from vlm_calibration.records import DataError
from vlm_calibration.reporting.card import Card, save_card
from vlm_calibration.reporting.report.data import origin_of
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.stages.provenance import check_levels, differences_from_training
from vlm_calibration.stages.scoring import Scorer
from vlm_calibration.stages.sft import SFTModule
from vlm_calibration.text.confidence import ElicitationPrompt
from vlm_calibration.text.grading import Grading

from ..level_tables import FALLING, measured
from .conftest import Data, MakeTrainer


@pytest.mark.parametrize(
    ("measured_with", "used_with", "differences"),
    [
        (
            {"noise": NoisePolicy(schedule=CosineSchedule())},
            {"noise": NoisePolicy(schedule=LinearSchedule(), seed=7)},
            [
                "data.noise.schedule was 'CosineSchedule(steps=1000, offset=0.008)' and is "
                "'LinearSchedule(steps=1000, beta_start=0.0001, beta_end=0.02)'"
            ],
        ),
        (
            {"noise": NoisePolicy(shape="box", dilate=0.2, resolution="native")},
            {"noise": NoisePolicy(absent="clean")},
            [
                "data.noise.resolution was 'native' and is 'model'",
                "data.noise.shape was 'box' and is 'mask'",
                "data.noise.dilate was 0.2 and is 0.0",
                "data.noise.absent was 'distractor' and is 'clean'",
            ],
        ),
        (
            {"prompt": ElicitationPrompt("{question}\nHow sure are you?")},
            {"prompt": ElicitationPrompt("{question}?")},
            [r"data.prompt.template was '{question}\nHow sure are you?' and is '{question}?'"],
        ),
        ({}, {"max_pixels": 5000}, ["data.max_pixels was None and is 5000"]),
        (
            {"grading": Grading(short="contains")},
            {"grading": Grading(short="token_f1")},
            ["data.grading (short) was 'contains' and is 'token_f1 >= 0.5'"],
        ),
    ],
)
def test_settings_that_differ_are_named_with_both_sides(
    model_folder: str,
    data: Data,
    measured_with: dict[str, Any],
    used_with: dict[str, Any],
    differences: list[str],
) -> None:
    base, levels = BaseModel(model_folder), measured(model_folder, **measured_with)
    check_levels(levels, base, data(**measured_with))
    with pytest.raises(DataError) as caught:
        check_levels(levels, base, data(**used_with))
    assert f"other conditions: {'; '.join(differences)}: " in str(caught.value), "nothing else differs"
    assert "levels fit" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_without_effect_on_the_measurement_may_differ(model_folder: str, data: Data) -> None:
    noise = NoisePolicy(seed=7, distractor_probability=0.3, clean_fraction=0.5, wrong_answer_rate=1.0)
    used_with = {"noise": noise, "grading": Grading(open="contains"), "batch_size": 1, "max_length": 9}
    check_levels(measured(model_folder), BaseModel(model_folder), data(**used_with))
    check_levels(LinearLevels(), BaseModel("nowhere"), data())


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


def test_a_model_is_the_same_in_any_folder(model_folder: str, data: Data, tmp_path: Path) -> None:
    levels, copy = measured(model_folder), tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps({**config, "_name_or_path": "x", "transformers_version": "0"})
    )
    check_levels(levels, BaseModel(str(copy)), data())
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(DataError) as caught:
        check_levels(levels, BaseModel(str(copy)), data())
    for folder in (model_folder, str(copy)):
        digest = weights_digest(BaseModel(folder))
        assert digest is not None
        assert f"{folder!r} (weights {digest[:8]})" in str(caught.value)


def test_every_part_of_a_large_file_counts_and_every_shard(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "SPAN", 256)
    folder = tmp_path / "copy"
    shutil.copytree(model_folder, folder)
    base, file = BaseModel(str(folder)), folder / "model.safetensors"
    content, size = file.read_bytes(), file.stat().st_size
    digests = {weights_digest(base)}
    for offset in (0, size // 15 - 1, size - 1):
        file.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
        digests.add(weights_digest(base))
    file.write_bytes(content[:1000] + content[1001:])
    assert len({*digests, weights_digest(base)}) == 5

    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    file.rename(folder / "model-1.safetensors")
    assert weights_digest(base) is None, "a shard is missing"
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


@pytest.mark.parametrize("use", ["fit", "fit stage 2", "test"])
def test_every_use_is_checked_before_a_model_is_loaded(
    data: Data, trainer: MakeTrainer, tmp_path: Path, use: str
) -> None:
    path, base = tmp_path / "levels.json", BaseModel("no/such-model")
    measured("no/such-model", noise=NoisePolicy(schedule=LinearSchedule())).save(path)
    candidates = CandidateSettings() if use == "fit stage 2" else None
    queries = data(noise=NoisePolicy(levels=AnchoredLevels(path)), candidates=candidates)
    module = {
        "fit": lambda: SFTModule(base),
        "fit stage 2": lambda: DPOModule(base, reference="base"),
        "test": lambda: EvaluationModule(base, oracle_levels=str(path)),
    }[use]()
    with pytest.raises(DataError, match=f"{re.escape(str(path))} was measured under other conditions"):
        getattr(trainer(), use.split()[0])(module, datamodule=queries)


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
