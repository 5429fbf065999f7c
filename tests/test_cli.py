"""The command line: the files of a run, and every mistake in one line that names the culprit.

Mistakes that the parser finds are made in this process, and runs are forks of one that has imported the package (`cli_server.py`);
`test_help.py` has the mistakes that are found without it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from vlm_calibration.models.loading import BaseModel, load_base

from .command_line import LIMIT, Arguments, Run, Server, callback, run_plainly
from .test_configs import Parse
from .test_configs import parse as parse
from .wandb_log import OfflineRun

pytestmark = pytest.mark.slow


def test_the_written_configuration_alone_repeats_a_run(
    run: Run, offline_runs: dict[str, OfflineRun], tmp_path: Path
) -> None:
    folder = offline_runs["sft"].directory
    places = ("--trainer.default_root_dir=again", "--trainer.logger.init_args.save_dir=again")
    ended = run("fit", "--config", str(folder / "config.yaml"), *places)
    assert (ended.status, ended.errors) == (0, []), ended.err
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (folder / weights).read_bytes()


TAKES_MEMORY_AGAIN = """
import resource
import numpy
from vlm_calibration.cli import main
main(["config", "list"])
faults = []
for _ in range(4):
    numpy.ones(12_500_000)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[0])
"""


def test_the_memory_of_a_step_is_kept_for_the_next() -> None:
    """100 MB that are freed and allocated again cause no page faults: without `mallopt` 25,000 each time, or hundreds if pages are huge."""
    ran = subprocess.run(
        [sys.executable, "-c", TAKES_MEMORY_AGAIN], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout.splitlines()[-1]) < 500


def test_a_wrong_value_and_a_cold_start(fit: Arguments, root: Path, tmp_path: Path) -> None:
    """In a fresh process a class is known by its name alone."""
    arguments = [*fit(data={"batch_size": "three"}), "--model", "SFTModule"]
    ended = run_plainly(arguments, root, tmp_path).checked(2)
    assert ended.error() == "data.batch_size: expected a whole number of at least 1, found 'three'"
    assert ended.err.count("\n") == 1, "nothing that the libraries say when they are imported"


WHOLE = "expected a whole number"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--model.lora.rank 3", "unknown setting model.init_args.lora.rank (did you mean lora.r?)"),
        ("--data.train.scene 3", "unknown setting data.train.init_args.scene (did you mean scenes?)"),
        ('--config {"data":{"bach_size":3}}', "unknown setting data.bach_size (did you mean data.batch"),
        ("--data.noise.levels AnchoredLevel", "there is no 'AnchoredLevel' (did you mean AnchoredLevels?)"),
        ("--model.optimizer.lr fast", "model.init_args.optimizer.lr: expected a number, found 'fast'"),
        ("--model.lora.parts [langage]", "projector, found 'langage' (did you mean language?)"),
        ("--model DPOModule --model.pairs.n_rejected x", f"init_args.pairs.n_rejected: {WHOLE}, found 'x'"),
        ("--trainer.precision bf17", "or one of 64, 32, 16, bf16, found 'bf17'"),
        ("--data.train.class_path no.Source", "data.train: there is no 'no"),
        ("--data.train JsonlSource", "data.train.init_args: needs path"),
        ("--data.workers=-1", f"data.workers: {WHOLE} of at least 0, found '-1'"),
    ],
)
def test_a_mistake_in_the_configuration(parse: Parse, arguments: str, says: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(says)):
        parse(["fit", "--config", "sft", *arguments.split()])


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ("--config trainer/ddp", 1, "trainer.accelerator: gpu, but this PyTorch"),
        (
            "--data.noise.levels AnchoredLevels --data.noise.levels.path=none.json",
            1,
            "no level table at none.json; write one with `vlm-calibration levels fit`",
        ),
        ("--ckpt_path last", 1, "no checkpoint at {}/checkpoints/last.ckpt"),
        # Without a logger there is nothing to log learning rates to.
        ("--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor", 2, "LearningRateMonitor"),
    ],
)
def test_settings_that_cannot_be_used(
    run: Run, fit: Arguments, tmp_path: Path, arguments: str, status: int, says: str
) -> None:
    ended = run(*fit(), *arguments.split()).checked(status)
    assert says.format(tmp_path / "run") in ended.error()


class Opens:
    """An object that calls `open` when it is unpickled."""

    def __reduce__(self) -> Any:
        return open, ("opened", "w")


def test_a_checkpoint_that_cannot_be_resumed(
    run: Run, fit: Arguments, offline_runs: dict[str, OfflineRun], tmp_path: Path
) -> None:
    last = offline_runs["sft"].directory / "checkpoints/last.ckpt"
    torch.save({**torch.load(last, weights_only=True), "more": Opens()}, tmp_path / "unsafe.ckpt")
    for checkpoint, says in (
        (last, "--ckpt_path: the checkpoint belongs to another model or adapter: "),
        ("unsafe.ckpt", "--ckpt_path unsafe.ckpt: refused as unsafe: "),
    ):
        settings = ("--trainer.max_steps", "100", "--model.init_args.lora.r", "3")
        assert says in run(*fit(), *settings, "--ckpt_path", str(checkpoint)).checked(1).error()
    assert not (tmp_path / "opened").exists()


def test_both_stages(offline_runs: dict[str, OfflineRun], root: Path) -> None:
    weights = []
    for stage in ("sft", "dpo"):
        folder = offline_runs[stage].directory
        assert [p.name for p in (folder / "adapter").rglob("*.safetensors")] == ["adapter_model.safetensors"]
        assert {"metrics.json", "predictions.jsonl", "config.yaml"} <= {p.name for p in folder.iterdir()}
        base = load_base(BaseModel(str(root / "src/vlm_calibration/demo/model")))
        model = PeftModel.from_pretrained(base, str(folder / "adapter"))
        weights.append({n: p for n, p in model.named_parameters() if "lora_" in n})
    moved = {n for n, p in weights[0].items() if not torch.equal(p, weights[1][n])}
    assert moved
    assert all("language_model" in n for n in moved), "the demo trains the language model's layers only"


def test_ctrl_c_saves_a_checkpoint_and_leaves_no_worker(
    server: Server, fit: Arguments, tmp_path: Path
) -> None:
    often = callback("checkpoint.RunCheckpoint", every_n_train_steps=1)
    others = [callback("adapter.AdapterWriter"), callback("predictions.PredictionWriter")]
    pid = server.start(fit(trainer={"callbacks": [often, *others], "max_steps": 100_000}), tmp_path)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    end = time.monotonic() + LIMIT
    while not last.exists() and time.monotonic() < end and Path(f"/proc/{pid}").exists():
        time.sleep(0.1)
    workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.killpg(pid, signal.SIGINT)
    ended = server.wait(pid).checked(130)
    assert ended.error() == "interrupted; the same command with --resume resumes it"
    assert len(workers) == 1
    assert [w for w in workers if Path(f"/proc/{w}").exists()] == []
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"checkpoints", "config.yaml", "run.json"}
    for checkpoint in last.parent.iterdir():
        assert torch.load(checkpoint, weights_only=True)["global_step"] > 0
