"""The W&B logs of the shipped configurations, read from the files of offline runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_calibration.estimators.probes import PROBES
from vlm_calibration.metrics.functional import REPORTED
from vlm_calibration.records import VERBALIZED
from vlm_calibration.stages.evaluation import ORACLE

from ..command_line import Run, run_python
from ..graphql_server import GraphQLServer, artifact_id
from ..wandb_log import OfflineRun, demo, read_run, short

pytestmark = pytest.mark.slow

Runs = dict[str, OfflineRun]
ALWAYS = {"loss", "learning_rate", "grad_norm", "skipped"}
ALWAYS |= {"samples_per_second", "tokens_per_second", "data_wait"}
PAIRS = {"reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected", "logp_answer"}
TRAINED = {"sft": ALWAYS | {"nll_answer", "nll_confidence"}, "dpo": ALWAYS | PAIRS | {"cut_off"}}
VALIDATED: dict[str, set[str]] = {"sft": set(), "dpo": PAIRS | {"kl"}}
TASK = {"accuracy", "precision", "recall", "f1", "yes_ratio"}
FIGURES = {"reliability", "response_curve", "risk_coverage"}
TABLES = {"confidence_table", "response_table"}
SYSTEMS = ("base", "sft", "dpo", ORACLE)
ESTIMATORS = ("expected", "likelihood")
STEPS = 3
"""Steps of an epoch of twelve queries in batches of four."""


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_stage_logs_all_of_this_and_nothing_else_at_every_step(offline_runs: Runs, stage: str) -> None:
    run = offline_runs[stage]
    validated = {*REPORTED, *TASK, *FIGURES, *TABLES, "samples", *VALIDATED[stage]}
    expected = {f"train/{name}" for name in TRAINED[stage]} | {f"val/{name}" for name in validated}
    assert run.keys == expected | {"memory/peak_gib", "epoch", "trainer/global_step"}
    epochs = 2 if stage == "sft" else 1
    for name in (*TRAINED[stage], "loss"):
        values = run.values(f"train/{name}")
        assert len(values) == STEPS * epochs, name
        assert np.isfinite(values).all(), name
    assert all(0 <= share <= 1 for share in run.values("train/data_wait"))
    assert all(norm > 0 for norm in run.values("train/grad_norm"))
    # A prompt of the demo has 64 tokens of its image alone.
    for samples, tokens in zip(
        run.values("train/samples_per_second"), run.values("train/tokens_per_second"), strict=True
    ):
        assert tokens > 64 * samples > 0
    assert run.values("memory/peak_gib") == sorted(run.values("memory/peak_gib")), "a peak never falls"
    steps = [row["trainer/global_step"] for row in run.history if "train/loss" in row]
    assert steps == list(range(STEPS * epochs))


def test_each_validation_is_logged_and_agrees_with_the_run_s_files(offline_runs: Runs) -> None:
    run = offline_runs["sft"]
    assert len(run.values("val/ece")) == len(run.values("val/reliability")) == 2
    metrics = json.loads((run.directory / "metrics.json").read_text(encoding="utf-8"))
    for name in (*REPORTED, *TASK):
        last = run.values(f"val/{name}")[-1]
        assert last == "NaN" if metrics[name] is None else last == pytest.approx(metrics[name], rel=1e-5)
    predictions = run.predictions()
    stated = [p["confidence"] for p in predictions if p["confidence"] is not None]
    table = run.table("val/confidence_table")
    assert sum(row["right"] + row["wrong"] for row in table) == len(stated)
    for row in table:
        same = [p["correct"] for p in predictions if p["confidence"] == row["confidence"]]
        assert (row["right"], row["wrong"]) == (sum(same), len(same) - sum(same))
    assert sum(row["answers"] for row in run.table("val/response_table")) == len(stated)


def test_samples_are_the_same_queries_each_time_with_the_image_as_the_model_saw_it(
    offline_runs: Runs,
) -> None:
    sft, dpo = offline_runs["sft"], offline_runs["dpo"]
    rows = sft.table("val/samples")
    assert [row["id"] for row in rows] == [row["id"] for row in dpo.table("val/samples")]
    assert len(rows) == 16
    said = {p["id"]: p for p in sft.predictions()}
    for row in rows:
        for name in ("question", "answer", "text", "confidence", "correct", "perturbation", "strength"):
            assert row[name] == said[row["id"]][name]
        assert 0 <= row["earned_confidence"] <= 1
    images = _images(sft, "samples")
    assert len(images) == len(rows)
    assert all(image.shape == (96, 96, 3) for image in images)
    noisy = [row["perturbation"] == "noise" and row["strength"] >= 0.7 for row in rows]
    assert any(noisy)
    # Noise makes neighbours differ, and is the same at every validation.
    rough = [float(np.abs(np.diff(image.astype(int), axis=0)).mean()) for image in images]
    assert max(rough) > 2 * min(rough)
    assert [i.tolist() for i in images] == [i.tolist() for i in _images(dpo, "samples")]


def _images(run: OfflineRun, name: str) -> list[np.ndarray]:
    """The images of the last table of this name, in the order of its rows."""
    artifact = [a for a in run.artifacts if name in a.name][-1]
    files = {c.path: c.local_path for c in artifact.manifest.contents}
    [table] = [path for path in files if path.endswith(".table.json")]
    read = json.loads(Path(files[table]).read_text(encoding="utf-8"))
    column = read["columns"].index("image")
    return [np.asarray(Image.open(files[row[column]["path"]])) for row in read["data"]]


def test_an_evaluation_compares_its_systems(offline_runs: Runs) -> None:
    run = offline_runs["eval"]
    names = {*REPORTED, *TASK, *FIGURES, *TABLES}
    rated = {f"{name}@{e}" for name in REPORTED[1:] for e in ESTIMATORS}
    rated |= {f"forward_passes@{e}" for e in (VERBALIZED, *ESTIMATORS, "probes")}
    rated |= {f"probe_{p}_{name}" for p in PROBES for name in ("n", "change", "fell", "stayed", "rose")}
    rated |= {"probe_answer_sum"}
    of_answers = {s: names | rated if s != ORACLE else names for s in SYSTEMS}
    expected = {f"test/{system}/{name}" for system, found in of_answers.items() for name in found}
    assert run.keys == expected | {"test/comparison", "test/samples", "epoch", "trainer/global_step"}
    comparison = run.table("test/comparison")
    assert {(row["kind"], row["group"]) for row in comparison} >= {("all", ""), ("group", "perturbed")}
    stated = [r for r in comparison if (r["kind"], r["estimator"]) == ("all", VERBALIZED)]
    rows = {row["system"]: row for row in stated}
    assert list(rows) == list(SYSTEMS)
    assert {r["estimator"] for r in comparison if r["system"] == "sft"} == {VERBALIZED, *ESTIMATORS}
    for system, row in rows.items():
        metrics = json.loads((run.directory / system / "metrics.json").read_text(encoding="utf-8"))
        assert row["n"] == metrics["n"] == 12
        # The oracle's confidences are no whole percents, to which the counts behind `metrics.json` are rounded.
        assert row["ece"] == pytest.approx(metrics["ece"], abs=0.005 if system == ORACLE else 1e-12)
    # The clean part has no noise for confidence to respond to.
    for system in SYSTEMS:
        assert sum(row["answers"] for row in run.table(f"test/{system}/response_table")) <= 6
    for row in run.table("test/samples"):
        said = {s: {p["id"]: p for p in run.predictions(s)}[row["id"]] for s in SYSTEMS}
        assert all(row[f"{s}_text"] == said[s]["text"] for s in SYSTEMS)
    assert "earned_confidence" not in run.table("test/samples")[0], "nothing is taught"


def test_the_configuration_says_what_ran_on_what(offline_runs: Runs, root: Path) -> None:
    for name, stage in (("sft", "sft"), ("dpo", "dpo"), ("eval", "evaluation")):
        run = offline_runs[name]
        assert (run.name, run.project, run.tags) == (name, "vlm-calibration", [stage])
        assert run.config["stage"] == stage
        assert run.config["base"]["name_or_path"] == str(root / "src/vlm_calibration/demo/model")
        record = json.loads((run.directory / "run.json").read_text(encoding="utf-8"))
        assert (run.config["versions"], run.config["inputs"]) == (record["versions"], record["inputs"])


def test_the_adapter_is_an_artifact_after_every_validation(offline_runs: Runs) -> None:
    run = offline_runs["sft"]
    first, last = run.logged("adapter")
    assert {first.name, last.name} == {"sft-adapter"}
    scores = [json.loads(a.metadata)["brier"] for a in (first, last)]
    assert scores == pytest.approx(run.values("val/brier"), rel=1e-5)
    assert sorted(first.aliases) == ["best", "latest"], "the first is the best so far"
    assert sorted(last.aliases) == (["best", "latest"] if scores[1] < scores[0] else ["latest"])
    written = {p.name: p for p in (run.directory / "adapter").iterdir()}
    assert {c.path for c in last.manifest.contents} == set(written)
    for entry in last.manifest.contents:
        assert Path(entry.local_path).read_bytes() == written[entry.path].read_bytes(), entry.path
        assert Path(entry.local_path).is_relative_to(run.directory), "the run directory holds all of the run"
    assert [json.loads(a.metadata)["step"] for a in (first, last)] == [STEPS, 2 * STEPS]


def test_lineage_leads_from_data_through_the_stages_to_the_evaluation(offline_runs: Runs) -> None:
    sft, dpo, evaluation = (offline_runs[name] for name in ("sft", "dpo", "eval"))
    assert list(sft.used("adapter")) == []
    assert list(dpo.used("adapter")) == ["sft-adapter"]
    assert sorted(evaluation.used("adapter")) == ["dpo-adapter", "sft-adapter"]
    assert dpo.used("adapter")["sft-adapter"].digest == sft.logged("adapter")[-1].digest
    assert evaluation.used("adapter")["sft-adapter"].digest == sft.logged("adapter")[-1].digest
    assert evaluation.used("adapter")["dpo-adapter"].digest == dpo.logged("adapter")[-1].digest
    assert list(evaluation.used("adapter")["sft-adapter"].aliases) == [], "using moves no alias"
    assert sorted(sft.used("dataset")) == ["train-data", "validation-data"]
    assert sorted(dpo.used("dataset")) == ["teacher-data", "train-data", "validation-data"]
    assert sft.used("dataset")["validation-data"].digest == dpo.used("dataset")["validation-data"].digest
    assert sft.used("dataset")["train-data"].digest != dpo.used("dataset")["train-data"].digest
    assert list(evaluation.used("dataset")) == ["test-data"]
    assert not evaluation.logged("adapter")


def test_an_offline_run_can_be_uploaded_with_its_lineage(offline_runs: Runs, tmp_path: Path) -> None:
    """`wandb sync` uploads to a server that has the content of all artifacts already."""
    run = offline_runs["dpo"]
    server = GraphQLServer()
    environment = {**server.environment, "HOME": str(tmp_path)}
    try:
        run_python("-m", "wandb", "sync", str(run.folder), cwd=tmp_path, **environment).checked()
    finally:
        server.close()
    used = {i["artifactID"] for i in server.inputs("useArtifact")}
    assert used == {artifact_id(a.digest) for kind in ("adapter", "dataset") for a in run.used(kind).values()}
    assert artifact_id(offline_runs["sft"].logged("adapter")[-1].digest) in used
    created = {i["artifactCollectionName"]: i["aliases"] or [] for i in server.inputs("createArtifact")}
    assert sorted(a["alias"] for a in created["dpo-adapter"]) == ["best", "latest"]
    assert created["sft-adapter"] == []
    for key in (*(f"val/{name}" for name in FIGURES | TABLES), "val/samples"):
        assert run.values(key)[-1]["path"] in server.uploaded


def test_two_processes_log_once_and_for_both(run_two: Run, root: Path, tmp_path: Path) -> None:
    sets = {"train": demo("train", 4), "validation": demo("calibration", 3), "batch_size": 2}
    config, overlay = root / "configs" / "sft.yaml", tmp_path / "two.yaml"
    settings = {"trainer": {"strategy": "ddp"}, "data": sets}
    run_two(*short("fit", config, overlay, tmp_path / "two", **settings)).checked()
    run = read_run(tmp_path / "two")
    norms = run.values("train/grad_norm")
    assert len(norms) == STEPS
    assert all(norm > 0 for norm in norms)
    assert [a.name for a in run.logged("adapter")] == ["two-adapter"]
    said = {p["id"]: p for p in run.predictions()}
    stated = [p["confidence"] for p in said.values() if p["confidence"] is not None]
    assert len(said) == 9
    assert sum(row["right"] + row["wrong"] for row in run.table("val/confidence_table")) == len(stated)
    assert sum(row["answers"] for row in run.table("val/response_table")) == len(stated)
    rows = run.table("val/samples")
    assert [row["id"] for row in rows] == list(said)
    assert all(row["text"] == said[row["id"]]["text"] for row in rows)
