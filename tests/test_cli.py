"""The command line: the files of a run, and every mistake in one line that names the culprit.

All runs are processes of their own. Importing the package takes long, so most of them are forks of one that has imported
it (`cli_server.py`); one, and those that run in several processes, are started in full.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from vlm_calibration.perturbation.levels import AnchoredLevels

from .command_line import LIMIT, Ended, Server

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
    for path in (folder / "a.png", folder / "b.jpg", tmp_path / "secret.png"):
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
    "a missing image": (
        _record("two", "none.png"),
        "{data}/queries.jsonl:2: record 'two': no such image: {data}/none.png",
    ),
    "a truncated JPEG": (
        _record("two", "b.jpg"),
        "{data}/queries.jsonl: record 'two': {data}/b.jpg: ",
    ),
    "not JSON": ("{'id': 'two'}", "{data}/queries.jsonl:2: not JSON: "),
    "a duplicate id": (_record("one"), "{data}/queries.jsonl:2: duplicate id 'one', first seen on line 1"),
    "a path that climbs out": (
        _record("two", "../secret.png"),
        "{data}/queries.jsonl:2: record 'two': the image path '../secret.png' leaves the data root",
    ),
    "a mask of another size": (
        _record(
            "two",
            regions=[{"label": "dog", "box": [0, 0, 1, 1], "mask": {"size": [5, 5], "counts": [0, 25]}}],
        ),
        "{data}/queries.jsonl: record 'two': the mask of region 'dog' has size [5, 5]",
    ),
}


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


@pytest.mark.parametrize("key", ["data.nois.seed", "model.init_args.lora.rank", "trainer.max_step"])
def test_an_unknown_key(run: Callable[..., Ended], fit: Callable[..., list[str]], key: str) -> None:
    ended = run(*fit(), f"--{key}", "3")
    assert key.rsplit(".", 1)[-1] in ended.error() or key in ended.error()
    assert ended.status == 2


def test_an_unknown_key_in_a_file_and_a_full_start(fit: Callable[..., list[str]], tmp_path: Path) -> None:
    arguments = fit(data={"bach_size": 3})
    command = [sys.executable, "-m", "vlm_calibration.cli", *arguments]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT, check=False)
    ended = Ended(ran.returncode, ran.stdout, ran.stderr)
    assert "bach_size" in ended.error()
    assert ended.status == 2


@pytest.mark.parametrize(
    ("arguments", "says", "status"),
    [
        (["fiit"], "unknown command 'fiit' (did you mean fit?): expected one of fit, validate, test", 2),
        (["levels"], "missing: one of fit; see `vlm-calibration levels --help`", 2),
        (["levels", "fti"], "(did you mean fit?)", 2),
        (["data", "inspct"], "(did you mean inspect?)", 2),
        (["data", "inspect"], "nothing to inspect: give --config FILE", 2),
        (["score", "amberr"], "(did you mean amber?)", 2),
        (
            ["ask", "a.png", "A dog?", "--adaptor", "runs/sft"],
            "unknown setting --adaptor (did you mean --adapter?)",
            2,
        ),
        (["export", "runs/sft", "--merg"], "unknown setting --merg (did you mean --merge?)", 2),
        (
            ["report", "runs/eval", "--replicate", "9"],
            "unknown setting --replicate (did you mean --replicates?)",
            2,
        ),
        (["dashboard", "--entty", "me"], "unknown setting --entty (did you mean --entity?)", 2),
        (["estimate-memory", "--token", "7"], "unknown setting --token", 2),
        (
            ["fit", "--trainer.max_step", "3"],
            "unknown setting --trainer.max_step (did you mean --trainer.max_steps?)",
            2,
        ),
        (
            ["fit", "--model.init_args.confidence_weigth", "3"],
            "unknown setting model.init_args.confidence_weigth (did you mean confidence_weight?)",
            2,
        ),
        (
            ["fit", "--config", "unknown.yaml"],
            "unknown setting data.bach_size (did you mean data.batch_size?)",
            2,
        ),
        (
            ["fit", "--data.noise.levels", "AnchoredLevel"],
            "there is no 'AnchoredLevel' (did you mean AnchoredLevels?)",
            2,
        ),
        (
            ["fit", "--model.init_args.optimizer.lr", "fast"],
            "model.init_args.optimizer.lr: expected a number, found 'fast'",
            2,
        ),
        (
            ["fit", "--model.init_args.lora.parts", "[langage]"],
            "model.init_args.lora.parts: expected one of language, tower, projector, found 'langage' (did you mean language?)",
            2,
        ),
        (
            ["fit", "--model", "DPOModule", "--model.pairs.n_rejected", "x"],
            "model.init_args.pairs.n_rejected: expected a whole number, found 'x'",
            2,
        ),
        (
            ["test", "--model", "EvaluationModule", "--model.base.dtype", "float32"],
            "model.init_args.base: needs name_or_path",
            2,
        ),
        (["fit", "--trainer.precision", "bf17"], "or one of 64, 32, 16, bf16, found 'bf17'", 2),
        (
            ["fit", "--config", "{root}/configs/trainer/ddp.yaml"],
            "trainer.accelerator: gpu, but this PyTorch",
            1,
        ),
        (["fit", "--config", "none.yaml"], "none.yaml", 2),
        (["fit", "--config", "broken.yaml"], "broken.yaml:2: not YAML", 2),
        (
            ["fit", "--model.init_args.confidence_weight=-1"],
            "model.confidence_weight must be a finite number",
            1,
        ),
        (["fit", "--model.init_args.base.name_or_path", "no/model"], "'no/model'", 1),
        (
            ["fit", "--data.noise.levels", "AnchoredLevels", "--data.noise.levels.path=none.json"],
            "none.json",
            1,
        ),
        (["fit", "--data.train.class_path", "no.Source"], "data.train: there is no 'no", 2),
        (
            ["fit", "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor"],
            "LearningRateMonitor",
            2,
        ),
        (["fit", "--data.noise.clean_fraction=1.5"], "noise.clean_fraction must be in [0, 1], found 1.5", 1),
        (["fit", "--data.batch_size=many"], "batch_size", 2),
        (["validate", "--ckpt_path", "none.ckpt"], "none.ckpt", 1),
    ],
)
def test_a_mistake_in_the_call(
    run: Callable[..., Ended],
    fit: Callable[..., list[str]],
    root: Path,
    tmp_path: Path,
    arguments: list[str],
    says: str,
    status: int,
) -> None:
    (tmp_path / "broken.yaml").write_text("trainer: {max_steps: 3\n")
    (tmp_path / "unknown.yaml").write_text("data: {bach_size: 3}\n")
    base = fit()[1:] if arguments[0] in ("fit", "validate") else []
    ended = run(arguments[0], *base, *(word.replace("{root}", str(root)) for word in arguments[1:]))
    assert says in ended.error()
    assert ended.status == status


def test_without_a_level_table_the_shipped_configuration_says_how_to_get_one(
    run: Callable[..., Ended], root: Path
) -> None:
    table = "no/levels.json"
    ended = run(
        *("fit", "--config", str(root / "configs/sft.yaml")),
        *("--data.noise.levels.init_args.path", table),
    )
    assert f"no level table at {table}; write one with `vlm-calibration levels fit`" in ended.error()
    assert ended.status == 1


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
        (
            last,
            ("--model.init_args.lora.parts", "[projector]"),
            "--ckpt_path: the checkpoint belongs to another model or adapter: ",
        ),
        ("unsafe.ckpt", (), "--ckpt_path unsafe.ckpt: refused as unsafe: "),
        ("half.ckpt", (), "--ckpt_path half.ckpt: not a complete checkpoint ("),
    ):
        ended = run(*fit(), *longer, *settings, "--ckpt_path", str(checkpoint))
        assert says in ended.error()
        assert ended.status == 1
    assert not (tmp_path / "opened").exists()


def test_stage_2_without_stage_1(run: Callable[..., Ended], fit: Callable[..., list[str]]) -> None:
    ended = run(*fit("dpo"))
    assert ended.error().startswith("no adapter at runs/sft/adapter")
    assert ended.status == 1


def test_both_stages(
    run: Callable[..., Ended],
    fit: Callable[..., list[str]],
    load_model: Callable[..., Any],
    tmp_path: Path,
) -> None:
    validated = {"val_check_interval": 2}
    first = run(*fit(trainer=validated))
    assert first.status == 0, first.err
    second = run(
        *fit("dpo", trainer=validated),
        *("--model.init_args.adapter", str(tmp_path / "run/adapter")),
        *("--trainer.default_root_dir", str(tmp_path / "dpo")),
        *("--trainer.callbacks+", "vlm_calibration.callbacks.before_after.BeforeAfterCheck"),
        *("--trainer.callbacks+", "vlm_calibration.callbacks.results_table.ResultsTable"),
    )
    assert second.status == 0, second.err
    for row in ("before", "after"):
        assert f"│ {row}" in second.out, second.out
    weights = []
    for folder in ("run", "dpo"):
        adapter = tmp_path / folder / "adapter"
        assert [p.name for p in adapter.rglob("*.safetensors")] == ["adapter_model.safetensors"]
        assert {"metrics.json", "predictions.jsonl", "config.yaml"} <= {
            p.name for p in (tmp_path / folder).iterdir()
        }
        model = PeftModel.from_pretrained(load_model(), str(adapter))
        weights.append({n: p for n, p in model.named_parameters() if "lora_" in n})
    moved = {n for n, p in weights[0].items() if not torch.equal(p, weights[1][n])}
    assert moved
    assert all("language_model" in n for n in moved), "the demo trains the language model's layers only"


def test_stage_2_in_two_processes_is_that_of_one(
    fit: Callable[..., list[str]], new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    """The same queries in each step give the same weights, also if the target is fitted on the queries of all processes."""
    started = []
    for name, size, extra in (
        ("one", 4, []),
        ("two", 2, ["--trainer.devices", "2", "--trainer.strategy", "ddp"]),
    ):
        command = [
            *(sys.executable, "-m", "vlm_calibration.cli"),
            *fit("dpo", trainer={"val_check_interval": 2}),
            *extra,
            *("--data.batch_size", str(size), "--model.init_args.adapter", new_adapter(1)),
            *("--trainer.default_root_dir", str(tmp_path / name)),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        )
    for process in started:
        _, errors = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, errors
    one, two = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("one", "two"))
    before = load_file(Path(new_adapter(1)) / "adapter_model.safetensors")
    assert any(not torch.equal(one[n], before[n]) for n in one)
    for name, weight in one.items():
        assert torch.allclose(weight, two[name], atol=1e-5), name
    predictions = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("one", "two")]
    assert predictions[0] == predictions[1]


def test_levels_fit_writes_a_table(run: Callable[..., Ended], root: Path, tmp_path: Path) -> None:
    settings = {
        "model.init_args.base.name_or_path": str(root / "src/vlm_calibration/demo/model"),
        "model.init_args.out": "levels.json",
        "model.init_args.likelihoods": "likelihoods.parquet",
        "model.init_args.max_new_tokens": "3",
        "data.levels.init_args.scenes": "5",
        "data.train.init_args.scenes": "2",
        "data.workers": "0",
        "trainer.default_root_dir": str(tmp_path / "levels"),
    }
    ended = run(
        "levels",
        "fit",
        "--config",
        str(root / "configs/levels.yaml"),
        *(f"--{k}={v}" for k, v in settings.items()),
    )
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[-2:] == ["wrote levels.json", "wrote likelihoods.parquet"]
    table = AnchoredLevels(tmp_path / "levels.json", likelihoods=tmp_path / "likelihoods.parquet").table
    assert table.kinds == ("noise", "blur", "occlusion")
    counts = {t: {row.n for rows in c.pooled.values() for row in rows} for t, c in table.counts.items()}
    assert counts == {"yes_no": {10}, "short": {5}}


def test_runs_react_to_ctrl_c_even_if_the_suite_ignores_it(root: Path, tmp_path: Path) -> None:
    """As in a suite that a script has started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        server = Server(root, tmp_path)
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        server.close()
    finally:
        signal.signal(signal.SIGINT, before)
    [ignored] = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn:")]
    assert not ignored >> (signal.SIGINT - 1) & 1


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
        (signal.SIGTERM, True, 143, "stopped by SIGTERM; `--ckpt_path last` resumes from {last}"),
    ],
    ids=["Ctrl-C", "kill", "kill all"],
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
