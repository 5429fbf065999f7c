"""`vlm-calibration runs`: what a list of run directories says about each, for every stage and state, damage included."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from vlm_calibration.append_log import AppendLog
from vlm_calibration.callbacks.regions import BEGUN, SHARDS
from vlm_calibration.cli import main
from vlm_calibration.commands.lightning_cli import parsed
from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.files import hold, release, write_json
from vlm_calibration.perturbation.level_table import AnswerTypeCounts, LevelCount, LevelTable
from vlm_calibration.records import DataError
from vlm_calibration.reporting.runs import Run, find_runs, read_run
from vlm_calibration.reporting.training_state import read_training_state
from vlm_calibration.stages.answer_log import AnswerLog

from ..command_line import Ended, Server, callback

METRICS = {"n": 300, "accuracy": 0.8, "ece": 0.05, "brier": 0.12, "auroc": None, "ece/other": 1.0}
HEADLINE = {"n": 300, "accuracy": 0.8, "ece": 0.05, "brier": 0.12, "auroc": None}
STAGES = {
    "sft": "SFTModule",
    "dpo": "DPOModule",
    "levels": "LevelFitModule",
    "evaluation": "EvaluationModule",
    "regions": "RegionExtractor",
}


def _run(folder: Path, stage: str, data: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A run directory with a configuration."""
    folder.mkdir(parents=True)
    base = {"base": {"name_or_path": "owner/model-7b"}}
    config = {
        "trainer": {
            "default_root_dir": str(folder),
            "max_epochs": 2,
            "max_steps": -1,
            "accumulate_grad_batches": 2,
        },
        "model": {
            "class_path": f"vlm_calibration.stages.{stage}.{STAGES[stage]}",
            "init_args": {**base, **settings},
        },
        "data": data or {"train": {"class_path": "vlm_calibration.data.sources.jsonl.JsonlSource"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return folder


def _checkpoint(folder: Path, step: int = 7) -> Path:
    """A checkpoint as Lightning writes it, of an epoch of 22 queries in batches of 4."""
    path = folder / "checkpoints/last.ckpt"
    path.parent.mkdir()
    position = {"epoch": 0, "batch": 3, "queries": 22, "batch_size": 4}
    torch.save(
        {"global_step": step, "state_dict": {"w": torch.ones(3)}, "PerturbedQueryDataModule": position}, path
    )
    return path


def _adapter(folder: Path) -> None:
    write_json(folder / "adapter/adapter_config.json", {"base_model_name_or_path": "owner/model-7b"})


def _one(folder: Path) -> Run:
    [run] = find_runs(folder)
    return run


# --- States ---------------------------------------------------------------------------------------------------------


def test_a_finished_training(tmp_path: Path) -> None:
    folder = _run(tmp_path / "sft", "sft")
    _checkpoint(folder)
    _adapter(folder)
    write_json(folder / "metrics.json", METRICS)
    run = _one(tmp_path)
    assert (run.stage, run.state, run.model) == ("sft", "finished", "owner/model-7b")
    assert run.figures == {"": HEADLINE}
    assert run.command == f"vlm-calibration fit --config dpo ... --runs {tmp_path}"


def test_an_interrupted_training_has_a_step_a_total_and_a_command(tmp_path: Path) -> None:
    """22 queries in batches of 4 are 5 batches, and with two a step 3 steps; two epochs."""
    folder = _run(tmp_path / "a b" / "dpo", "dpo")
    _checkpoint(folder, step=4)
    run = _one(tmp_path)
    assert (run.state, run.detail) == ("interrupted", "at step 4 of 6")
    assert run.command == f"vlm-calibration fit --config '{folder}/config.yaml' --ckpt_path last"


def test_a_training_without_a_checkpoint_starts_again(tmp_path: Path) -> None:
    folder = _run(tmp_path / "sft", "sft")
    run = _one(tmp_path)
    assert (run.state, run.detail) == ("interrupted", "before its first checkpoint")
    assert run.command == f"vlm-calibration fit --config {folder}/config.yaml"


def test_a_run_that_is_held_is_running(tmp_path: Path) -> None:
    folder = _run(tmp_path / "sft", "sft")
    _checkpoint(folder)
    lock = hold(folder / "config.yaml")
    run = _one(tmp_path)
    assert (run.state, run.detail, run.command) == ("running", "at step 7 of 6", "")
    release(lock)
    assert _one(tmp_path).state == "interrupted"


def test_a_finished_evaluation_has_a_row_a_system(tmp_path: Path) -> None:
    adapters = {"sft": "runs/sft", "dpo": "runs/dpo"}
    endpoints = {"served": {"url": "http://127.0.0.1/v1"}}
    folder = _run(
        tmp_path / "eval", "evaluation", adapters=adapters, endpoints=endpoints, oracle_levels="levels.json"
    )
    for system in ("oracle", "dpo", "sft", "base", "served"):
        write_json(folder / system / "metrics.json", METRICS)
    run = _one(tmp_path)
    assert (run.state, list(run.figures)) == ("finished", ["base", "sft", "dpo", "served", "oracle"])
    assert run.command == f"vlm-calibration report {folder}"


def test_the_model_of_an_evaluation_is_that_of_its_adapters(tmp_path: Path) -> None:
    _adapter(tmp_path / "one")
    folder = _run(tmp_path / "eval", "evaluation", base=None, adapters={"one": str(tmp_path / "one")})
    assert read_run(folder).model == "owner/model-7b"


def test_an_interrupted_evaluation_has_its_number_of_questions(tmp_path: Path) -> None:
    """Also where an earlier evaluation has left its metrics."""
    folder = _run(tmp_path / "eval", "evaluation", adapters={"sft": "runs/sft"})
    for system in ("base", "sft"):
        write_json(folder / system / "metrics.json", METRICS)
    facts = ('Is {"id": 3}?', "Yes", "Yes", "yes", 0.9, True, None, 0, "yes_no", None, {})
    queries: Any = {"test": [SimpleNamespace(id=f"q{n}") for n in range(9)]}
    for rank, numbers in enumerate(((0, 1, 2), (3, 4))):
        answers = [EstimatedPrediction(f"q{n}", *facts) for n in numbers]  # type: ignore[arg-type]
        log = AnswerLog(folder, rank, queries, "digest")
        log.add("test", {"answers": {"base": answers, "sft": answers}, "passes": {}})
        log.close()
    run = _one(tmp_path)
    assert (run.state, run.detail) == ("interrupted", "after 5 questions")
    assert run.command == f"vlm-calibration test --config {folder}/config.yaml"


def _level_table(correct: dict[str, tuple[tuple[int, int], int]]) -> LevelTable:
    """Counts of five answers in each of two bins: answer type -> correct ones on untouched images by bin, and at full strength."""
    kinds = ("noise", "blur")
    return LevelTable(
        {
            answer_type: AnswerTypeCounts(
                tuple(dict.fromkeys(kinds, (LevelCount(0, 5, n), LevelCount(1, 5, lost))) for n in untouched),
                (0.5,),
            )
            for answer_type, (untouched, lost) in correct.items()
        }
    )


def test_levels_have_their_accuracy_on_clean_images_and_at_full_strength(tmp_path: Path) -> None:
    folder = _run(tmp_path / "levels", "levels", out=str(tmp_path / "levels.json"))
    assert _one(tmp_path).command == f"vlm-calibration levels fit --config {folder}/config.yaml"
    _level_table({"yes_no": ((4, 5), 2), "short": ((3, 5), 1)}).save(tmp_path / "levels.json")
    run = _one(tmp_path)
    assert run.state == "finished"
    assert run.figures[""] == {"accuracy clean": 0.85, "accuracy at full strength": 0.3}
    assert run.command == f"vlm-calibration fit --config sft ... --runs {tmp_path}"
    write_json(tmp_path / "levels.json", {"answer_types": {"short": [{"step": 0, "n": 4, "n_correct": 3}]}})
    assert (_one(tmp_path).state, "levels.json" in _one(tmp_path).detail) == ("damaged", True)


def test_paths_begin_at_the_folder_that_a_run_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _run(Path("runs/levels"), "levels", out="runs/levels.json")
    _level_table({"yes_no": ((3, 4), 2)}).save(tmp_path / "runs/levels.json")
    monkeypatch.chdir("/")
    assert _one(tmp_path / "runs").state == "finished"


def test_regions_have_their_share_and_shards(tmp_path: Path) -> None:
    folder = _run(tmp_path / "regions", "regions")
    settings = {"data": {"queries": 1100, "shard_size": 512}}
    for name, row in ((f"{BEGUN}0.0.jsonl", {"shard": None}), ("0.0.jsonl", {"shard": 1, "rows": []})):
        log = AppendLog(folder / SHARDS / name, settings, "")
        log.append(row)
        log.close()
    run = _one(tmp_path)
    assert (run.state, run.detail) == ("interrupted", "after 1 of 3 shards")
    assert run.command == f"vlm-calibration predict --config {folder}/config.yaml"
    (folder / "queries.parquet").touch()
    outcomes = {"found": 70, "known": 5, "rejected": 25}
    write_json(folder / "summary.json", {"queries": 100, "outcomes": outcomes})
    run = _one(tmp_path)
    assert (run.state, run.figures[""]) == ("finished", {"n": 100, "with regions": 0.75})


def test_results_of_an_earlier_run_do_not_finish_the_last(tmp_path: Path) -> None:
    folder = _run(tmp_path / "eval", "evaluation", adapters={})
    write_json(folder / "base/metrics.json", METRICS)
    write_json(folder / "run.json", {"command": "test", "finished": False})
    assert _one(tmp_path).state == "interrupted"
    write_json(folder / "run.json", {"command": "test", "finished": True})
    assert _one(tmp_path).state == "finished"


def _finish(folder: Path, stage: str) -> Path:
    """Finish a run of this stage in `folder / stage`."""
    run = folder / stage
    if stage == "levels":
        _run(run, stage, out=str(run / "levels.json"))
        _level_table({"yes_no": ((3, 4), 2)}).save(run / "levels.json")
    elif stage == "evaluation":
        _run(run, stage, adapters={"mine": str(folder / "dpo")})
        for system in ("base", "mine"):
            write_json(run / system / "metrics.json", METRICS)
    else:
        _run(run, stage)
        write_json(run / "summary.json", {"queries": 4, "outcomes": {"found": 3, "known": 1}})
        if stage != "regions":
            _adapter(run)
    return run


def test_only_what_is_not_done_is_offered(tmp_path: Path) -> None:
    """After each stage, that it is followed by the next one; begun stages have commands of their own."""
    stages = ("regions", "levels", "sft", "dpo", "evaluation")
    for stage in stages:
        last = _finish(tmp_path, stage)
        offered = [run.folder for run in find_runs(tmp_path) if run.command]
        assert offered == [last]
    (last / "report.html").touch()
    assert [run.command for run in find_runs(tmp_path) if run.command] == []
    (tmp_path / "dpo/adapter/adapter_config.json").unlink()
    assert [run.folder for run in find_runs(tmp_path) if run.command] == [tmp_path / "dpo"], "interrupted"
    shutil.rmtree(tmp_path / "dpo")
    assert [run.folder for run in find_runs(tmp_path) if run.command] == [tmp_path / "sft"]


def test_an_adapter_that_was_not_evaluated_is_to_be(tmp_path: Path) -> None:
    _finish(tmp_path, "dpo")
    _finish(tmp_path / "other", "evaluation")
    assert read_run(tmp_path / "dpo").command in {run.command for run in find_runs(tmp_path)}


# --- Damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "culprit"),
    [
        ("config.yaml", b"a: [", "config.yaml"),
        ("config.yaml", b"\xff\xfe", "config.yaml"),
        ("config.yaml", b"- 1", "config.yaml"),
        ("config.yaml", None, "config.yaml"),
        ("metrics.json", b"{", "metrics.json:1"),
        ("metrics.json", b"[1]", "metrics.json"),
        ("checkpoints/last.ckpt", b"PK", "checkpoint"),
    ],
)
def test_a_damaged_folder_is_named_and_the_others_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, culprit: str
) -> None:
    damaged, good = (_run(tmp_path / folder, "sft") for folder in ("damaged", "good"))
    for folder in (damaged, good):
        _checkpoint(folder)
        write_json(folder / "metrics.json", METRICS)
    (damaged / name).unlink() if content is None else (damaged / name).write_bytes(content)
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if line.startswith(str(damaged))]
    assert "damaged" in line
    assert culprit in line
    assert f"{good}:  sft  interrupted (at step 7 of 6)" in out


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "evil"),)

    path = tmp_path / "last.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("last/data.pkl", pickle.dumps({"global_step": 3, "evil": Evil()}))
    assert read_training_state(path, {}).step == 3
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("trainer", "total"),
    [
        ({"max_epochs": 3}, 15),
        ({"max_epochs": 3, "max_steps": 4}, 4),
        ({"max_epochs": -1, "max_steps": 9}, 9),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 6),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 6),
        ({}, None),
    ],
)
def test_the_total_of_a_training(tmp_path: Path, trainer: dict[str, Any], total: int | None) -> None:
    assert read_training_state(_checkpoint(tmp_path), trainer).total == total


def test_a_folder_with_a_log_alone_is_empty_and_other_folders_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "sft/logs").mkdir(parents=True)
    (tmp_path / "sft/logs/7-task0.log").touch()
    (tmp_path / "notes").mkdir()
    run = _one(tmp_path)
    assert (run.folder.name, run.state) == ("sft", "empty")
    assert "7-task0.log" in run.detail


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing-here"):
        find_runs(tmp_path / "nothing-here")


def test_json_has_all_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b", "a/c"):
        _run(tmp_path / name, "sft")
    assert main(["runs", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["folder"] for row in rows] == [str(tmp_path / "a/c"), str(tmp_path / "b")]
    assert {row["stage"] for row in rows} == {"sft"}


# --- A real run -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_training_goes_on_by_the_command_of_the_list_and_its_progress_too(
    server: Server, start: Callable[..., list[str]], tmp_path: Path
) -> None:
    callbacks = [
        callback("checkpoint.RunCheckpoint", every_n_train_steps=2),
        *map(callback, ("adapter.AdapterWriter", "predictions.PredictionWriter")),
        callback("progress.Progress", every=0.01),
    ]
    settings = {"callbacks": callbacks, "enable_progress_bar": True, "max_epochs": 8}
    pid = server.start(start("run", **settings), tmp_path)
    while not (tmp_path / "run/checkpoints/last.ckpt").exists():
        time.sleep(0.02)
    assert _one(tmp_path).state == "running"
    os.killpg(pid, signal.SIGKILL)
    assert server.wait(pid).status == -signal.SIGKILL
    run = _one(tmp_path)
    assert run.state == "interrupted"
    step, total = (int(n) for n in run.detail.removeprefix("at step ").split(" of "))
    assert 0 < step < total == 8 * 7
    ended: Ended = server.wait(server.start(run.command.split()[1:], tmp_path))
    assert ended.status == 0, ended.err
    lines = [line for line in ended.err.splitlines() if line.startswith("sft: ")]
    assert lines[0].startswith(f"sft: {step + 1} of {total} steps")
    assert lines[-1].startswith(f"sft: {total} of {total} steps (100%), ")
    assert "took" in lines[-1]
    assert "\r" not in ended.err
    assert "\x1b" not in ended.err
    done = _one(tmp_path)
    assert done.state == "finished"
    following = parsed("fit", shlex.split(done.command)[2:])
    assert following.model.init_args.adapter == str(tmp_path / "run")
    assert following.trainer.default_root_dir == str(tmp_path / "dpo")
