"""Training in several processes equals training in one with the same global batch; also sharding, low precision and 8-bit states."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .command_line import ANSWERING, SHARDED, Arguments, Run, callback

NO_DROPOUT = ["--model.init_args.lora.dropout", "0.0"]
"""Dropout differs between processes."""
ONE_EACH = ["--data.batch_size", "1"]
"""With this, two processes see the queries of one step of a single process."""


def _losses(folder: Path) -> list[float]:
    """The loss of each step: the mean over processes, whose batches have equal sizes."""
    paths = sorted(folder.glob("losses-*.txt"))
    columns = [[float(line) for line in path.read_text().splitlines()] for path in paths]
    return [sum(row) / len(row) for row in zip(*columns, strict=True)]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter/adapter_model.safetensors")


def _files(folder: Path) -> set[str]:
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    return {name for name in files if not name.startswith("losses")}


@pytest.fixture
def one(run: Run, start: Arguments, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """The run directory of a training in one process, with its losses; the first test trains for all."""
    kept = tmp_path_factory.getbasetemp() / "trained-in-one"
    if not kept.exists():
        run(*start("one", callback("disasters.WriteLosses")), *NO_DROPOUT).checked()
        (tmp_path / "one").rename(kept)
    return kept


def _assert_same_weights(folder: Path, one: Path) -> None:
    weights = _weights(folder)
    for name, weight in _weights(one).items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=1e-3, msg=name)


def test_two_processes_train_as_one(run_two: Run, start: Arguments, one: Path, tmp_path: Path) -> None:
    """The loss curves and weights agree to 1e-4, validation is identical, and each file is written once; float32, no dropout.

    FSDP2 does not validate.
    """
    watch = callback("disasters.WriteLosses")
    ended = run_two(*start("ddp", watch, strategy="ddp"), *ONE_EACH, *NO_DROPOUT).checked()
    assert "sync_dist" not in ended.err, "Lightning's advice for metrics that are not reduced"
    logs = {"save_dir": str(tmp_path), "name": "log", "version": ""}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logs}
    settings = {"strategy": SHARDED, "limit_val_batches": 0, "logger": logger, "log_every_n_steps": 1}
    sharded = start("fsdp2", watch, callback("throughput.Throughput"), **settings)
    ended = run_two(*sharded, *ONE_EACH, *NO_DROPOUT).checked()
    assert (ended.out + ended.err).count("FSDP2 does not validate") == 1
    losses = _losses(one)
    assert len(losses) == 14
    assert losses != pytest.approx([losses[0]] * 14, abs=1e-2)
    for name in ("ddp", "fsdp2"):
        assert _losses(tmp_path / name) == pytest.approx(losses, abs=1e-4)
        _assert_same_weights(tmp_path / name, one)
    validated = {"metrics.json", "predictions.jsonl"}
    assert _files(one) == _files(tmp_path / "ddp") == _files(tmp_path / "fsdp2") | validated
    for name in validated:
        assert (one / name).read_bytes() == (tmp_path / "ddp" / name).read_bytes()
    with (tmp_path / "log/metrics.csv").open(encoding="utf-8") as file:
        norms = [float(row["train/grad_norm"]) for row in csv.DictReader(file) if row["train/grad_norm"]]
    assert len(norms) == 14
    assert min(norms) > 0


def test_stopped_in_two_processes_and_resumed_in_one_or_two(
    run: Run, run_two: Run, start: Arguments, one: Path, tmp_path: Path
) -> None:
    """A signal to one process stops both at the same step."""
    stop = callback("disasters.KillAt", epoch=1, batch=4, number=int(signal.SIGTERM), group=False, rank=1)
    ended = run_two(*start("run", stop, every=1000, workers=1, strategy="ddp"), *ONE_EACH, *NO_DROPOUT)
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert ended.status == 143, ended.err
    assert "SIGTERM" in ended.error()
    assert str(last) in ended.error()
    assert torch.load(last, weights_only=True)["global_step"] == 12
    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    run(*start("run"), *NO_DROPOUT, "--ckpt_path", "last").checked()
    _assert_same_weights(tmp_path / "run", one)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "stopped").rename(tmp_path / "run")
    run_two(*start("run", strategy="ddp"), *ONE_EACH, *NO_DROPOUT, "--ckpt_path", "last").checked()
    _assert_same_weights(tmp_path / "run", one)


def test_a_teacher_is_fitted_on_the_answers_of_all_processes(
    run: Run, run_two: Run, start: Arguments, tmp_path: Path
) -> None:
    """The demo's model answers some queries correctly; each process sees half of the answers, and trains on its own."""
    answering = [
        *(*ANSWERING, "--model.init_args.pairs.target", "fitted", "--model.init_args.lora.dropout", "0.0"),
        # Of 21 queries one process answers one more.
        *("--data.candidates.answers", "own", "--data.validation.init_args.scenes", "7"),
        *("--trainer.max_steps", "2", "--trainer.val_check_interval", "2"),
    ]
    watch = [callback("disasters.WriteTeacher"), callback("disasters.WriteLosses")]
    run(*start("one", *watch, stage="dpo"), *answering).checked()
    run_two(*start("two", *watch, stage="dpo", strategy="ddp"), *answering, *ONE_EACH).checked()
    one, *two = (json.loads(p.read_text()) for p in sorted(tmp_path.glob("*/teacher-*.json")))
    assert len(two) == 2
    assert one["scores"]["n"] == 21
    assert 0 < one["scores"]["accuracy"] < 1
    assert set(one["maps"]) == {"yes_no", "short"}
    assert two[0] == two[1], "both processes fit the same teacher"
    assert two[0]["scores"] == pytest.approx(one["scores"], abs=1e-3)
    for kind, (weights, intercept) in one["maps"].items():
        assert two[0]["maps"][kind] == [pytest.approx(weights, abs=1e-3), pytest.approx(intercept, abs=1e-3)]
    losses = _losses(tmp_path / "one")
    assert len(losses) == 2
    assert _losses(tmp_path / "two") == pytest.approx(losses, abs=1e-3)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[0]["n"] == 21
    assert metrics[1] == pytest.approx(metrics[0], abs=1e-6)


def test_low_precision_and_8_bit_states_resumed(run: Run, start: Arguments, tmp_path: Path) -> None:
    low = ["--trainer.precision", "bf16-mixed", "--model.init_args.optimizer.name", "paged_adamw_8bit"]
    short = {"max_epochs": 1, "limit_val_batches": 0}
    run(*start("whole", **short), *low).checked()
    run(*start("cut", callback("disasters.KillAt", epoch=0, batch=5), **short), *low).checked(-9)
    run(*start("cut", **short), *low, "--ckpt_path", "last").checked()
    whole, cut = _weights(tmp_path / "whole"), _weights(tmp_path / "cut")
    assert all(torch.equal(whole[n], cut[n]) for n in whole)
    states = torch.load(tmp_path / "whole/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]
    kinds = {t.dtype for t in _tensors(states["state"])}
    assert torch.uint8 in kinds, "8-bit states"


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value.values() for t in _tensors(v)] if isinstance(value, dict) else []
