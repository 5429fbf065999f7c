"""The results of an evaluation in a model card: read only for the adapter that was evaluated, and valid for the Hub."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import ModelCardData, model_index_to_eval_results

from vlm_calibration.commands.report import report
from vlm_calibration.records import DataError
from vlm_calibration.reporting.card import Card, Evaluation, card_text, load_card, results_text, save_card
from vlm_calibration.reporting.evaluation import read_evaluation
from vlm_calibration.reporting.runs import RunRecord
from vlm_calibration.reporting.tables import COLUMNS

from .test_report import answers, configure, write

SFT, DPO = "0" * 32, "1" * 32
DEMO = "vlm_calibration.demo.source.DemoSource"
BASE = {"n": 8, **dict.fromkeys(COLUMNS, 0.5)}
TUNED = {"n": 8, "accuracy": 0.75, "ece": 0.0625, "brier": 0.125, "auroc": None, "mean_confidence": 0.5}
FOUND = Evaluation(
    adapter=DPO,
    system="dpo",
    dataset="demo",
    split="development",
    revision="2" * 32,
    parts=["clean", "hard (key object perturbed)"],
    results={"base": BASE, "sft": {**BASE, "ece": 0.25}, "dpo": TUNED},
)


def write_run(
    folder: Path,
    record: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
    trainer: Any = None,
    left_out: int = 0,
    with_oracle: bool = False,
) -> Path:
    """A run directory as `test` leaves it; the system "sft" has left out some questions."""
    source = {"class_path": DEMO, "init_args": {"split": "development"}}
    test = {"clean": {"source": source, "noise": "none"}, "hard": {"source": source, "noise": "drawn"}}
    settings = {"adapters": {"sft": "a", "dpo": "b"}, "oracle_levels": "levels.json" if with_oracle else None}
    model = {"class_path": "x.EvaluationModule", "init_args": settings}
    digests = {"model.init_args.adapters.sft": SFT, "model.init_args.adapters.dpo": DPO}
    digests |= {"data.test.clean": "a", "data.test.hard": "b", "data.calibration.clean": "c"}
    for system in ("base", "sft", "dpo", *(["oracle"] if with_oracle else []), "left_by_an_earlier_one"):
        given = answers(0, n=60 - (left_out if system == "sft" else 0), honest=system == "dpo")
        if given:
            write(folder / system, given)
    written = {"command": "test", "stage": "EvaluationModule", "finished": True, **(record or {})}
    RunRecord(**written, inputs=digests | (inputs or {})).write(folder)
    configure(folder, model, trainer=trainer or {"limit_test_batches": None}, data={"test": test})
    return folder


def test_the_rows_are_the_base_model_and_the_adapters_of_one_evaluation_as_in_the_report(
    tmp_path: Path,
) -> None:
    folder = write_run(tmp_path / "eval", with_oracle=True)
    found = read_evaluation(folder, DPO)
    assert (found.system, found.dataset, found.split) == ("dpo", "demo", "development")
    assert found.parts == ["clean", "hard (key object perturbed)"]
    assert list(found.results) == ["base", "sft", "dpo"]
    assert read_evaluation(folder, SFT).system == "sft"
    report([str(folder)], replicates=2, images=False)
    rows = [r for r in csv.DictReader((folder / "report.csv").open()) if r["estimator"] == "verbalized"]
    reported = {r["system"]: {name: r[name] for name in ("n", *COLUMNS)} for r in rows if r["kind"] == "all"}
    del reported["oracle"]
    assert {s: {k: str(v) for k, v in row.items()} for s, row in found.results.items()} == reported
    assert found.results["base"]["auroc"] == 0.5
    for system in ("base", "sft", "dpo", "oracle"):
        write(folder / system, [replace(answers(0)[0], correct=True)])
    assert read_evaluation(folder, DPO).results["dpo"]["auroc"] is None, "undefined"


def test_other_queries_are_other_data_and_other_settings_are_not(tmp_path: Path) -> None:
    first = read_evaluation(write_run(tmp_path / "1"), DPO)
    calibration = read_evaluation(write_run(tmp_path / "2", inputs={"data.calibration.clean": "z"}), DPO)
    queries = read_evaluation(write_run(tmp_path / "3", inputs={"data.test.hard": "z"}), DPO)
    assert first.revision == calibration.revision != queries.revision


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"inputs": {"model.init_args.adapters.dpo": "changed"}}, r"not evaluated there.* sft, dpo\)"),
        (None, "no run.json: give the run directory"),
        ({"record": {"finished": False}}, "not a finished"),
        ({"record": {"command": "fit"}}, "not a finished"),
        ({"trainer": {"limit_test_batches": 2}}, "a part of the test set"),
        ({"left_out": 3}, "did not answer the same questions: 'q57'"),
        ({"left_out": 60}, "sft: no predictions.jsonl"),
    ],
)
def test_results_of_something_else_are_refused(
    tmp_path: Path, settings: dict[str, Any] | None, says: str
) -> None:
    folder = tmp_path / "eval"
    if settings is not None:
        write_run(folder, **settings)
    with pytest.raises(DataError, match=f"{folder}.*{says}"):
        read_evaluation(folder, DPO)


# --- In the card ----------------------------------------------------------------------------------------------------

CARD = Card("org/Model-7B", base_on_hub=True, evaluations=[FOUND], license={"license": "apache-2.0"})


def test_the_hubs_parser_reads_the_results(tmp_path: Path) -> None:
    save_card(tmp_path, CARD)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.base_model, data.library_name) == ("apache-2.0", "org/Model-7B", "peft")
    front = yaml.safe_load((tmp_path / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    name, results = model_index_to_eval_results(front["model-index"])
    assert name == "Model-7B, calibrated"
    assert {r.metric_type: r.metric_value for r in results} == {
        "accuracy": 0.75,
        "expected_calibration_error": 0.0625,
        "brier_score": 0.125,
    }, "an undefined metric has no value"
    assert {(r.task_type, r.dataset_type, r.dataset_split, r.dataset_revision) for r in results} == {
        ("image-text-to-text", "demo", "development", "2" * 32)
    }
    assert results[0].dataset_name == "demo: clean, hard (key object perturbed)"
    assert ModelCardData(**front).to_dict() == front, "nothing is lost"
    assert load_card(tmp_path) == CARD
    other = replace(FOUND, revision="3" * 32, results={"dpo": {**TUNED, "accuracy": 1.0}})
    data = ModelCard(card_text(replace(CARD, evaluations=[FOUND, other]))).data
    by_data = {r.dataset_revision: r.metric_value for r in data.eval_results if r.metric_type == "accuracy"}
    assert by_data == {"2" * 32: 0.75, "3" * 32: 1.0}


def test_the_base_model_stands_beside_the_stages() -> None:
    section = results_text(CARD)
    assert section in card_text(CARD)
    assert "The same 8 queries of `demo`, split `development`" in section
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("| base model", "0.500", "0.500"),
        ("| sft", "0.500", "0.250"),
        ("| **dpo (this one)**", "0.750", "0.062"),
    ]
    assert rows[2][4] == "-", "undefined"
    merged = card_text(replace(CARD, merged=True))
    assert "model-index" not in merged, "it claims no results of its own"
    assert "Measured with the adapter beside the base model, before it was merged." in merged


def test_a_folder_is_no_base_model_of_the_hub() -> None:
    text = card_text(Card("runs/base", revision="x"))
    assert not {"base_model", "base_model_relation", "base_model_revision"} & set(
        yaml.safe_load(text.split("---\n")[1])
    )
    assert "The base model is a folder, not a repository on the Hub" in text
    assert "The base model is a folder" not in card_text(CARD)
