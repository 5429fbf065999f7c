"""The command line: the files of a run, and every mistake in one line that names the culprit.

Mistakes that the parser finds are made in this process. Importing the package takes long, so runs are forks of a process that has
imported it (`cli_server.py`); one is started in full.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image

from vlm_calibration.models.loading import BaseModel, load_base

from .command_line import LIMIT, Ended, Server
from .test_configs import parse as parse
from .wandb_log import OfflineRun

pytestmark = pytest.mark.slow


def _record(identifier: str, image: str = "a.png", **changes: Any) -> dict[str, Any]:
    region = {"label": "dog", "box": [2, 2, 20, 20]}
    plain = {
        "question": "A dog?",
        "answer": "Yes",
        "answer_type": "yes_no",
        "objects": ["dog"],
        "regions": [region],
    }
    return {"id": identifier, "image": image, **plain, **changes}


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Writes records beside small images; returns the source for a configuration."""
    folder = tmp_path / "data"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for path in (folder / "a.png", folder / "b.jpg"):
        Image.fromarray(pixels).save(path)
    whole = (folder / "b.jpg").read_bytes()
    (folder / "b.jpg").write_bytes(whole[: len(whole) // 2])

    def write(*lines: Any) -> dict[str, Any]:
        path = folder / "queries.jsonl"
        path.write_text(
            "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8"
        )
        return {
            "class_path": "vlm_calibration.data.sources.jsonl.JsonlSource",
            "init_args": {"path": str(path)},
        }

    return write


MISTAKES: dict[str, tuple[Any, str]] = {
    "a truncated JPEG": (
        _record("two", "b.jpg"),
        "{data}/queries.jsonl: record 'two': {data}/b.jpg: ",
    ),
    "not JSON": ("{'id': 'two'}", "{data}/queries.jsonl:2: not JSON: "),
}
"""The second line of a file of queries -> how the error begins. One is found by a data worker, one before training."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_data(
    run: Callable[..., Ended],
    fit: Callable[..., list[str]],
    jsonl: Callable[..., Any],
    tmp_path: Path,
    mistake: str,
) -> None:
    bad, says = MISTAKES[mistake]
    ended = run(*fit(data={"train": jsonl(_record("one"), bad)}))
    assert ended.error().startswith(says.format(data=tmp_path / "data"))
    assert ended.status == 1
    assert ("truncated" in ended.error()) == ("truncated" in mistake)
    assert not (tmp_path / "run" / "adapter").exists()


def test_bad_records_may_be_skipped(
    run: Callable[..., Ended], fit: Callable[..., list[str]], jsonl: Callable[..., Any], tmp_path: Path
) -> None:
    source = jsonl(_record("one"), "{", _record("two"), _record("one"))
    source["init_args"]["on_bad_record"] = "skip"
    ended = run(*fit(data={"train": source}))
    assert (ended.status, ended.errors) == (0, []), ended.err
    assert ended.err.count("left out 2 of 4 records") == 1
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        *("adapter", "checkpoints", "config.yaml", "metrics.json", "predictions.jsonl", "run.json")
    }
    # The written configuration alone repeats the run.
    again = run(
        "fit",
        "--config",
        str(tmp_path / "run/config.yaml"),
        "--trainer.default_root_dir",
        str(tmp_path / "again"),
    )
    assert again.status == 0, again.err
    weights = [
        (tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("run", "again")
    ]
    assert weights[0] == weights[1]


def test_an_unknown_key_in_a_file_and_a_full_start(fit: Callable[..., list[str]], tmp_path: Path) -> None:
    arguments = fit(data={"bach_size": 3})
    command = [sys.executable, "-m", "vlm_calibration.cli", *arguments]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT, check=False)
    ended = Ended(ran.returncode, ran.stdout, ran.stderr)
    assert "bach_size" in ended.error()
    assert ended.status == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fiit"], "unknown command 'fiit' (did you mean fit?): expected one of fit, validate, test"),
        (["levels"], "missing: one of fit; see `vlm-calibration levels --help`"),
        (["levels", "fti"], "(did you mean fit?)"),
        (["data", "inspect"], "nothing to inspect: give --config FILE"),
        (["score", "amberr"], "(did you mean amber?)"),
        (
            ["ask", "a.png", "A dog?", "--adaptor", "runs/sft"],
            "unknown setting --adaptor (did you mean --adapter?)",
        ),
        (["export", "runs/sft", "--merg"], "unknown setting --merg (did you mean --merge?)"),
        (
            ["report", "runs/eval", "--replicate", "9"],
            "unknown setting --replicate (did you mean --replicates?)",
        ),
        (["dashboard", "--entty", "me"], "unknown setting --entty (did you mean --entity?)"),
        (["fit", "--config", "none.yaml"], "none.yaml"),
        (["fit", "--config", "broken.yaml"], "broken.yaml:2: not YAML"),
    ],
)
def test_a_mistake_in_the_call(
    call: Callable[..., Ended], tmp_path: Path, arguments: list[str], says: str
) -> None:
    (tmp_path / "broken.yaml").write_text("trainer: {max_steps: 3\n")
    ended = call(*arguments)
    assert ended.status == 2
    assert says in ended.error()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--trainer.max_step", "3"],
            "unknown setting --trainer.max_step (did you mean --trainer.max_steps?)",
        ),
        (
            ["--model.init_args.confidence_weigth", "3"],
            "unknown setting model.init_args.confidence_weigth (did you mean confidence_weight?)",
        ),
        (["--model.init_args.lora.rank", "3"], "unknown setting model.init_args.lora.rank"),
        (
            ["--data.train.init_args.scene", "3"],
            "unknown setting data.train.init_args.scene (did you mean scenes?)",
        ),
        (
            ["--config", "unknown.yaml"],
            "unknown setting data.bach_size (did you mean data.batch_size?)",
        ),
        (
            ["--data.noise.levels", "AnchoredLevel"],
            "there is no 'AnchoredLevel' (did you mean AnchoredLevels?)",
        ),
        (
            ["--model.init_args.optimizer.lr", "fast"],
            "model.init_args.optimizer.lr: expected a number, found 'fast'",
        ),
        (
            ["--model.init_args.lora.parts", "[langage]"],
            "model.init_args.lora.parts: expected one of language, tower, projector, found 'langage' (did you mean language?)",
        ),
        (
            ["--model", "DPOModule", "--model.pairs.n_rejected", "x"],
            "model.init_args.pairs.n_rejected: expected a whole number, found 'x'",
        ),
        (["--trainer.precision", "bf17"], "or one of 64, 32, 16, bf16, found 'bf17'"),
        (["--data.train.class_path", "no.Source"], "data.train: there is no 'no"),
        (["--data.batch_size=many"], "batch_size"),
    ],
)
def test_a_mistake_in_the_configuration(
    parse: Callable[[list[str]], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    says: str,
) -> None:
    (tmp_path / "unknown.yaml").write_text("data: {bach_size: 3}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=re.escape(says)):
        parse(["fit", "--config", "sft", *arguments])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["fit", "--config", "{root}/configs/trainer/ddp.yaml"],
            "trainer.accelerator: gpu, but this PyTorch",
        ),
        (
            ["fit", "--model.init_args.confidence_weight=-1"],
            "model.confidence_weight must be a finite number",
        ),
        (["fit", "--model.init_args.base.name_or_path", "no/model"], "'no/model'"),
        (
            ["fit", "--data.noise.levels", "AnchoredLevels", "--data.noise.levels.path=none.json"],
            "no level table at none.json; write one with `vlm-calibration levels fit`",
        ),
        (["validate", "--ckpt_path", "none.ckpt"], "none.ckpt"),
    ],
)
def test_settings_that_cannot_be_used(
    run: Callable[..., Ended], fit: Callable[..., list[str]], root: Path, arguments: list[str], says: str
) -> None:
    command, *settings = (word.replace("{root}", str(root)) for word in arguments)
    ended = run(command, *fit()[1:], *settings)
    assert says in ended.error()
    assert ended.status == 1


def test_what_lightning_refuses_is_a_mistake_in_the_call(
    run: Callable[..., Ended], fit: Callable[..., list[str]]
) -> None:
    """Without a logger there is nothing to log learning rates to."""
    ended = run(*fit(), "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor")
    assert "LearningRateMonitor" in ended.error()
    assert ended.status == 2


class Opens:
    """An object that calls `open` when it is unpickled."""

    def __reduce__(self) -> Any:
        return open, ("opened", "w")


def test_a_checkpoint_that_cannot_be_resumed(
    run: Callable[..., Ended], fit: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert run(*fit()).status == 0
    last = tmp_path / "run/checkpoints/last.ckpt"
    torch.save({**torch.load(last, weights_only=True), "more": Opens()}, tmp_path / "unsafe.ckpt")
    (tmp_path / "half.ckpt").write_bytes(last.read_bytes()[:5000])
    longer = ("--trainer.max_steps", "4", "--trainer.default_root_dir", "other")
    for checkpoint, settings, says in (
        (
            last,
            ("--model.init_args.lora.r", "8"),
            "--ckpt_path: the checkpoint belongs to another model or adapter: ",
        ),
        ("unsafe.ckpt", (), "--ckpt_path unsafe.ckpt: refused as unsafe: "),
        ("half.ckpt", (), "--ckpt_path half.ckpt: not a complete checkpoint ("),
    ):
        ended = run(*fit(), *longer, *settings, "--ckpt_path", str(checkpoint))
        assert says in ended.error()
        assert ended.status == 1
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


def _children(pid: int) -> list[int]:
    children = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                children.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return children


@pytest.mark.parametrize(
    ("signalled", "everyone", "status", "says"),
    [
        (signal.SIGINT, True, 130, "interrupted; the same command with --resume resumes it"),
        (signal.SIGTERM, False, 143, "stopped by SIGTERM; `--ckpt_path last` resumes from {last}"),
    ],
    ids=["Ctrl-C", "kill"],
)
def test_stopping_a_run(
    server: Server,
    fit: Callable[..., list[str]],
    tmp_path: Path,
    signalled: signal.Signals,
    everyone: bool,
    status: int,
    says: str,
) -> None:
    often = {
        "class_path": "vlm_calibration.callbacks.checkpoint.RunCheckpoint",
        "init_args": {"every_n_train_steps": 1},
    }
    others = [
        f"vlm_calibration.callbacks.{n}" for n in ("adapter.AdapterWriter", "predictions.PredictionWriter")
    ]
    callbacks = [often, *({"class_path": name} for name in others)]
    pid = server.start(fit(trainer={"callbacks": callbacks, "max_steps": 100_000}), tmp_path)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    end = time.monotonic() + LIMIT
    while not last.exists() and time.monotonic() < end and Path(f"/proc/{pid}").exists():
        time.sleep(0.1)
    workers = _children(pid)
    (os.killpg if everyone else os.kill)(pid, signalled)
    sent = time.monotonic()
    ended = server.wait(pid)
    assert time.monotonic() - sent < 60, "seconds on an idle machine"
    assert ended.error() == says.format(last=last)
    assert ended.status == status
    assert len(workers) == 1
    assert [w for w in workers if Path(f"/proc/{w}").exists()] == [], "no worker survives"
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"checkpoints", "config.yaml", "run.json"}
    for checkpoint in last.parent.iterdir():
        assert checkpoint.suffix == ".ckpt"
        assert torch.load(checkpoint, weights_only=True)["global_step"] > 0
