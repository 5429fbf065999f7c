"""A run that is interrupted and resumed from its last checkpoint writes the same files as an uninterrupted one."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import re
import shutil
import signal
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_calibration.callbacks.checkpoint import AtomicCheckpointIO
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.files import clear_leftovers
from vlm_calibration.records import DataError

from .command_line import Arguments, Ended, Run, callback

pytestmark = pytest.mark.slow

WEIGHTS = "adapter/adapter_model.safetensors"


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
    run: Run, start: Arguments, root: Path, tmp_path: Path
) -> None:
    """The resumed run prints the comparison of before and after, and the warning, which the killed runs did not reach."""
    # The demo's model gives readable answers before training, and none after training at this learning rate.
    settings = [
        *("--model.init_args.base.name_or_path", str(root / "src/vlm_calibration/demo/model")),
        *("--model.init_args.adapter", "null", "--model.init_args.parts", "null"),
        *("--model.init_args.reference", "base", "--model.init_args.optimizer.lr", "0.1"),
        *("--model.init_args.max_new_tokens", "8"),
    ]
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
    assert "accuracy on the validation queries fell by" in ended.err


def _comparison(ended: Ended) -> list[str]:
    """The rows of the table that a run prints at its end."""
    rows = [line for line in ended.out.splitlines() if "before" in line or "after" in line]
    assert len(rows) == 2, ended.out
    return rows


def test_the_middle_of_an_epoch_needs_the_same_queries_and_batches(model_folder: str) -> None:
    data = PerturbedQueryDataModule(model_folder, train=DemoSource(scenes=5), batch_size=3)
    data.load_state_dict({"epoch": 0, "batch": 3, "queries": 15, "batch_size": 2})
    data.setup("fit")
    with pytest.raises(DataError, match="of 15 queries in batches of 2, found 15 and 3: "):
        data.train_dataloader()


def test_a_loss_that_is_no_number_in_one_process_stops_all(run_two: Run, start: Arguments) -> None:
    command = start("run", callback("disasters.Spoil", batch=3, rank=1), strategy="ddp")
    ended = run_two(*command, "--data.batch_size", "1").checked(1)
    assert ended.errors
    for error in ended.errors:
        assert "loss is not finite at step 3" in error
        assert len(re.findall(r"\btrain-[\w-]+", error)) == 1


def _write_forever(path: Path) -> None:
    io = AtomicCheckpointIO()
    weights = torch.zeros(500_000)
    for step in itertools.count():
        io.save_checkpoint({"step": step, "weights": weights + step}, path)


def test_the_last_checkpoint_loads_after_a_kill_at_any_moment_of_writing(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    moments = random.Random(0)
    AtomicCheckpointIO().save_checkpoint({"step": -1, "weights": torch.full((1,), -1.0)}, last)
    interrupted = 0
    for _ in range(20):
        writer = multiprocessing.get_context("fork").Process(target=_write_forever, args=(last,))
        writer.start()
        time.sleep(moments.uniform(0.005, 0.1))
        writer.kill()
        writer.join()
        interrupted += len(list(tmp_path.glob(".*.tmp")))
        checkpoint = torch.load(last, weights_only=True)
        assert bool((checkpoint["weights"] == checkpoint["step"]).all())
        clear_leftovers(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert interrupted, "at least one process was killed while writing"
