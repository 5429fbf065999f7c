"""A training that is interrupted and resumed writes the same files as one that is not; `--resume` for each command.

With `--resume` a finished run is said to be done, an interrupted one resumes, another one is refused.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.perturbation.level_table import read_likelihoods
from vlm_calibration.perturbation.levels import AnchoredLevels
from vlm_calibration.records import DataError

from .command_line import ANSWERING, Arguments, Ended, Run, callback, instance
from .level_tables import measured, noise_counts
from .stages.test_progress import evaluation as evaluation
from .test_run_directory import files_of
from .wandb_log import demo

pytestmark = pytest.mark.slow

WEIGHTS = "adapter/adapter_model.safetensors"
THREE = instance("perturbation.levels.LinearLevels", n_levels=3)
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
KILL = callback("disasters.KillTest", batch=1, when="answered")


def _contents(folder: Path) -> dict[str, bytes]:
    """Path -> content of every file of a run; of checkpoints, which contain times, the path alone."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    assert {WEIGHTS, "adapter/README.md", "adapter/calibration.json", "config.yaml"} < set(files)
    return {name: b"" if name.endswith(".ckpt") else p.read_bytes() for name, p in sorted(files.items())}


def _same_directory(expected: dict[str, bytes], folder: Path) -> None:
    """Assert that the files of a run are those in `expected`."""
    files = _contents(folder)
    assert list(files) == list(expected)
    assert [name for name in files if files[name] != expected[name]] == []


def test_a_training_that_is_stopped_and_killed_resumes_and_writes_the_files_of_one_that_is_not(
    run: Run, start: Arguments, tmp_path: Path
) -> None:
    """Steps of two batches, and a checkpoint after every third one; a signal in the middle of a step takes effect after it."""

    def command(*disasters: dict[str, Any]) -> list[str]:
        kills = [callback("disasters.KillAt", **settings) for settings in disasters]
        return start("run", *kills, workers=2, every=3, accumulate_grad_batches=2)

    folder, last = tmp_path / "run", tmp_path / "run/checkpoints/last.ckpt"
    run(*command()).checked()
    expected = _contents(folder)
    shutil.rmtree(folder)
    between = {"epoch": 0, "batch": 2, "when": "between", "number": int(signal.SIGTERM), "group": False}
    validating = {"epoch": 0, "batch": 6, "when": "validating", "number": int(signal.SIGUSR1)}
    killed = {"epoch": 1, "batch": 5, "when": "between"}
    for disasters, resume, status, step in (
        ([between, validating], ["--resume"], 143, 2),
        ([between, validating], ["--resume"], 138, 4),
        ([killed], ["--ckpt_path", "last"], -signal.SIGKILL, 6),
    ):
        ended = run(*command(*disasters), *resume).checked(status)
        if status > 0:
            assert signal.Signals(status - 128).name in ended.error()
            assert str(last) in ended.error()
        if status == 138:
            assert f"{folder}: interrupted: resuming from {last}" in ended.out
        assert torch.load(last, weights_only=True)["global_step"] == step
        assert not (folder / "adapter").exists()
        record = json.loads((folder / "run.json").read_text())
        assert not record["finished"]
        assert record["versions"]["torch"] == version("torch")
    for _ in ("resumes", "has nothing to resume"):
        run(*command(), "--ckpt_path", "last").checked()
        _same_directory(expected, folder)
    # The weights and Adam's two moments take three times the adapter's size.
    for checkpoint in last.parent.iterdir():
        assert checkpoint.stat().st_size <= 4 * len(expected[WEIGHTS]), checkpoint


def test_stage_2_killed_in_training_and_at_its_end_ends_as_if_it_had_not_been(
    run: Run, start: Arguments, tmp_path: Path
) -> None:
    """The resumed run prints the comparison of before and after, and the warning, which the killed runs did not reach."""
    # The demo's model gives readable answers before training, and none after training at this learning rate.
    settings = [*ANSWERING, "--model.init_args.optimizer.lr", "0.1"]
    once = run(*start("run", stage="dpo"), *settings).checked()
    expected = _contents(tmp_path / "run")
    results = json.loads(expected["adapter/calibration.json"])["results"]
    assert results["before"] != results["after"]
    shutil.rmtree(tmp_path / "run")
    for when, more in (("after", []), ("ending", ["--ckpt_path", "last"])):
        kill = callback("disasters.KillAt", epoch=0, batch=4, when=when)
        run(*start("run", kill, stage="dpo"), *settings, *more).checked(-signal.SIGKILL)
        assert not (tmp_path / "run/adapter").exists()
    ended = run(*start("run", stage="dpo"), *settings, "--ckpt_path", "last").checked()
    _same_directory(expected, tmp_path / "run")
    assert _comparison(ended) == _comparison(once)


def _comparison(ended: Ended) -> list[str]:
    """The rows of the table that a run prints at its end."""
    rows = [line for line in ended.out.splitlines() if "before" in line or "after" in line]
    assert len(rows) == 2, ended.out
    return rows


def test_the_middle_of_an_epoch_needs_the_same_queries_and_batches(model_folder: str) -> None:
    data = PerturbedQueryDataModule(model_folder, train=DemoSource(scenes=5), batch_size=3)
    data.load_state_dict({"epoch": 0, "batch": 3, "queries": 15, "batch_size": 2})
    data.setup("fit")
    with pytest.raises(DataError, match="of 15 queries in batches of 2, found 15 queries in batches of 3: "):
        data.train_dataloader()


def test_a_loss_that_is_no_number_in_one_process_stops_all(run_two: Run, start: Arguments) -> None:
    command = start("run", callback("disasters.Spoil", batch=3, rank=1), strategy="ddp")
    ended = run_two(*command, "--data.batch_size", "1").checked(1)
    assert ended.errors
    for error in ended.errors:
        assert "loss is not finite at step 3" in error
        assert len(re.findall(r"\btrain-[\w-]+", error)) == 1


def _assert_done(ended: Ended, folder: Path) -> None:
    """The run named its stage, if it trains, and its base model, and printed one line more; no model was loaded."""
    assert ended.status == 0, ended.err
    *named, last = ended.out.splitlines()
    assert last == f"{folder}: finished with these settings: nothing to do"
    assert named[-1].startswith("base model: ")
    assert len(named) <= 2
    assert "Loading weights" not in ended.err


def _assert_refused(ended: Ended, folder: Path, *texts: str) -> None:
    assert all(text in ended.checked(1).error() for text in (str(folder), "--overwrite", "--runs", *texts)), (
        ended.err
    )


def test_training_on_other_inputs_is_refused(
    run: Run, fit: Arguments, model_folder: str, tmp_path: Path
) -> None:
    table, folder = tmp_path / "levels.json", tmp_path / "run"
    measured(model_folder).save(table)
    levels = instance("perturbation.levels.AnchoredLevels", path="levels.json", likelihoods=None)
    command = [*fit(data={"noise": {"levels": levels, "kinds": {"noise": 1}}}), "--resume"]
    run(*command).checked()
    before = files_of(folder)
    assert "leave out --overwrite" in run(*command, "--overwrite").error()
    assert "leave out --ckpt_path" in run(*command, "--ckpt_path", "last").error()
    counts = noise_counts((0, 100, 90), (1, 100, 50))
    measured(model_folder, {"yes_no": counts, "short": counts}).save(table)
    changed = "the content of data.noise.levels.init_args.path has changed (levels.json)"
    _assert_refused(run(*command), folder, changed)
    assert files_of(folder) == before
    measured(model_folder).save(tmp_path / "same.json")
    table.write_text(json.dumps(json.loads((tmp_path / "same.json").read_text())))
    # Another path of the same table and a default that is given explicitly are no other settings.
    same_settings = ["--data.noise.levels.init_args.path", str(table), "--data.noise.dilate", "0.0"]
    _assert_done(run(*command, *same_settings, *TWO, "--data.batch_size", "1"), folder)


def test_an_interrupted_training_of_other_settings_is_refused_once_it_has_a_checkpoint_until_it_is_overwritten(
    run: Run, start: Arguments, tmp_path: Path
) -> None:
    early, late = (callback("disasters.KillAt", epoch=0, batch=batch) for batch in (0, 3))
    run(*start("run", early), "--resume").checked(-signal.SIGKILL)
    run(*start("run", late), "--resume", "--model.init_args.optimizer.lr", "0.5").checked(-signal.SIGKILL)
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert written["model"]["init_args"]["optimizer"]["lr"] == 0.5
    more = ["--trainer.max_epochs", "1", "--model.init_args.optimizer.lr", "0.5"]
    refused = run(*start("run", late), "--resume", *more)
    _assert_refused(refused, tmp_path / "run", "max_epochs was 2 and is 1", "interrupted")
    run(*start("run"), "--overwrite", *more).checked()
    _assert_done(run(*start("run"), "--resume", *more), tmp_path / "run")


def test_an_evaluation_resumes_and_is_then_done(run: Run, evaluation: Arguments, tmp_path: Path) -> None:
    asked, folder = tmp_path / "eval.asked.0", tmp_path / "eval"
    command = partial(evaluation, estimators=None)
    run(*command("eval", KILL, behind=True), "--resume").checked(-signal.SIGKILL)
    resumed = [*command("eval"), "--resume"]
    _assert_refused(run(*resumed, "--model.init_args.max_new_tokens", "4"), folder, "was 3 and is 4")
    run(*resumed, "--data.eval_batch_size", "2").checked()
    queries = asked.read_text().splitlines()
    assert len(queries) == len(set(queries)) == 15, "each query is asked once"
    before = files_of(folder)
    # Nothing of training counts.
    training = ["--data.batch_size", "9", "--trainer.max_epochs", "7", "--data.train", "DemoSource"]
    _assert_done(run(*resumed, *training), folder)
    assert files_of(folder) == before


def test_an_overwritten_evaluation_asks_all_queries_again(
    run: Run, evaluation: Arguments, tmp_path: Path
) -> None:
    asked, folder = tmp_path / "eval.asked.0", tmp_path / "eval"
    command = partial(evaluation, estimators=None)
    run(*command("eval", KILL, behind=True)).checked(-signal.SIGKILL)
    asked.unlink()
    for name in ("old/metrics.json", "old/official/answers.json", "report.html", "report.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    run(*command("eval"), "--overwrite").checked()
    assert not list(folder.glob("report.*")) + list(folder.glob("old/*"))
    assert len(asked.read_text().splitlines()) == 15
    assert {p.parent.name for p in folder.glob("*/metrics.json")} == {"base", "one", "oracle"}


@pytest.fixture
def levels_fit(root: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """Function that returns the arguments of a measurement with the demo's model, which answers, in folder `name`."""

    def arguments(name: str) -> list[str]:
        source, train = demo("calibration", 8), demo("train", 2)
        return [
            *("levels", "fit", "--config", str(root / "configs/levels.yaml"), "--trainer.accelerator", "cpu"),
            *("--data.levels", json.dumps(source), "--data.workers", "0"),
            *("--trainer.default_root_dir", str(tmp_path / name)),
            *("--model.init_args.base.name_or_path", str(root / "src/vlm_calibration/demo/model")),
            *("--model.init_args.out", str(tmp_path / f"{name}.json")),
            *("--model.init_args.likelihoods", str(tmp_path / f"{name}.parquet")),
            *("--data.train", json.dumps(train)),
            *("--data.noise.kinds", '{"noise": 1}', "--data.noise.levels", json.dumps(THREE)),
        ]

    return arguments


def test_a_measurement_of_levels_is_done_until_its_table_is_another(
    run: Run, levels_fit: Callable[[str], list[str]], model_folder: str, tmp_path: Path
) -> None:
    command, folder = [*levels_fit("levels"), "--resume"], tmp_path / "levels"
    path, likelihoods_path = tmp_path / "levels.json", tmp_path / "levels.parquet"
    ended = run(*command).checked()
    assert ended.out.splitlines()[-2:] == [f"wrote {file}" for file in (path, likelihoods_path)]
    table, likelihoods = path.read_bytes(), likelihoods_path.read_bytes()
    _assert_done(run(*command, "--data.eval_batch_size", "7"), folder)
    measured(model_folder).save(path)
    likelihoods_path.write_bytes(likelihoods[:-1])
    run(*command).checked()
    assert (path.read_bytes(), likelihoods_path.read_bytes()) == (table, likelihoods)


@pytest.mark.nightly
def test_two_processes_measure_as_one(
    run: Run, run_two: Run, levels_fit: Callable[[str], list[str]], tmp_path: Path
) -> None:
    """The table is the same, and the likelihoods agree to float precision."""
    for name, start, more in (("one", run, ()), ("two", run_two, ("--trainer.strategy", "ddp"))):
        start(*levels_fit(name), *more).checked()
    one, two = (AnchoredLevels(tmp_path / f"{name}.json").table for name in ("one", "two"))
    assert {t: c.kinds for t, c in one.counts.items()} == {t: c.kinds for t, c in two.counts.items()}
    for answer_type, counts in one.counts.items():
        assert two.counts[answer_type].edges == pytest.approx(counts.edges, abs=1e-6)
    first, second = (
        read_likelihoods(tmp_path / f"{name}.parquet", one.provenance, "") for name in ("one", "two")
    )
    assert list(first) == list(second)
    assert len(first) == 6
    for query, (likelihood, content) in first.items():
        assert second[query] == (pytest.approx(likelihood, abs=1e-5), content)
