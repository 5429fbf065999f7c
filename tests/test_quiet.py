"""What the commands print: no messages of other libraries, warnings, progress, and the result at the end.

`test_cli.py` has what a cold process prints when it imports the libraries."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities import rank_zero_info
from rich.cells import cell_len

from vlm_calibration import progress
from vlm_calibration.progress import LogLines, duration, stage_name, track, working
from vlm_calibration.quiet import quiet_libraries, quiet_lightning
from vlm_calibration.reporting.tables import print_results

from .callbacks.test_throughput import Clock
from .callbacks.test_throughput import clock as clock
from .command_line import Capture, Ended, Patch
from .trainers import plain_trainer
from .wandb_log import OfflineRun

NOISE = (
    *("Tip:", "GPU available", "TPU available", "Seed set to", "FLOPs", "Trainable params", "weights_only"),
    *("deprecated", "to estimate number of stepping batches", "`Trainer.fit` stopped", "Failed to load CPU"),
    *("Loading weights", "srun", "wandb: ", "wandb sync", "Test metric", "Validate metric"),
    *("\x1b", "Traceback"),
)
"""What no command prints."""


def quiet(ended: Ended) -> list[str]:
    """The lines on stdout of a run that succeeded without noise, each within 80 columns unless it holds a path."""
    assert ended.status == 0, ended.err
    printed = ended.out + ended.err
    assert [text for text in NOISE if text in printed] == [], printed
    lines = ended.out.rstrip("\n").splitlines()
    assert [line for line in lines if cell_len(line) > 80 and "/" not in line] == []
    return lines


@pytest.mark.slow
def test_a_training_ends_with_its_validation_and_the_adapter(offline_runs: dict[str, OfflineRun]) -> None:
    trained = offline_runs["sft"]
    title, base, *lines = quiet(trained.ended)
    assert title == "stage 1: supervised fine-tuning (SFT)"
    assert re.fullmatch(r"base model: \S+/demo/model \(float32\)", base)
    assert lines[0].rstrip() == f"All {len(trained.predictions())} answers to perturbed validation queries"
    assert [line.split("│")[1].strip() for line in lines if line.startswith("│")] == ["after"]
    assert lines[-1] == f"adapter: {trained.directory}/adapter"
    err = trained.ended.err
    assert re.search(r"^data.train: absent object in \d+ of 12 queries \(`absent: distractor`\)$", err, re.M)
    assert re.search(r"^sft: 6 of 6 steps \(100%\), .*took 0:", err, re.M)


@pytest.mark.slow
def test_an_evaluation_ends_with_its_table(offline_runs: dict[str, OfflineRun]) -> None:
    evaluated = offline_runs["eval"]
    base, *lines = quiet(evaluated.ended)
    assert base.startswith("base model: ")
    assert lines[0].rstrip() == f"All {len(evaluated.predictions('dpo'))} answers"
    heads = [cell.strip() for cell in lines[2].strip("┃").split("┃")]
    assert heads[:5] == ["system", "mean conf.", "accuracy", "ECE", "AUROC"]
    rows = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert rows == ["base", "sft", "dpo", "oracle"]
    assert lines[-1] == f"answers: {evaluated.directory}"


def test_other_warnings_of_the_same_places_are_not_hidden() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_libraries()
        names = ("is_gradient_checkpointing", "gradient_checkpointing_enable")
        for text in (*(f"`{name}` is deprecated and" for name in names), "`another` is deprecated"):
            warnings.warn(text, FutureWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["`another` is deprecated"]
    logger, stream = logging.getLogger("bitsandbytes.backends.cpu.ops"), io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.warning("Failed to load CPU gemm_4bit_forward: %s", "none")
    logger.warning("the weights do not fit")
    logger.removeHandler(handler)
    assert stream.getvalue() == "the weights do not fit\n"


def test_what_lightning_logs_is_hidden_and_its_warnings_are_not(tmp_path: Path, monkeypatch: Patch) -> None:
    printed = []
    for hides in (False, True):
        stream = io.StringIO()
        for name in ("lightning.pytorch", "lightning.fabric"):
            monkeypatch.setattr(logging.getLogger(name), "handlers", [logging.StreamHandler(stream)])
        if hides:
            quiet_lightning()
            quiet_lightning()
        plain_trainer(tmp_path)
        rank_zero_info("of our own")
        logging.getLogger("lightning.pytorch.trainer").warning("a warning")
        printed.append(stream.getvalue())
    assert "GPU available" in printed[0]
    assert printed[1] == "of our own\na warning\n"


def values(**given: float) -> dict[str, float]:
    names = ("accuracy", "ece", "auroc", "mean_confidence", "parse_failure_rate")
    return {"n": 40, **dict.fromkeys(names, 0.25), **given}


def test_unparsed_answers_are_shown_only_if_there_are_any(capsys: Capture) -> None:
    for share in (0.0, 0.125):
        print_results({"mine": values(parse_failure_rate=share)})
        assert ("unparsed" in capsys.readouterr().out) is (share > 0)


def test_files_are_links_on_a_terminal_and_paths_elsewhere(
    capsys: Capture, monkeypatch: Patch, tmp_path: Path
) -> None:
    path = tmp_path / ("long " * 20) / "report.html"
    shown: Any = {"files": {"report": path}}
    print_results({}, **shown)
    assert capsys.readouterr().out == f"report: {path}\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    print_results({}, **shown)
    assert f";{path.as_uri()}\x1b\\{path}" in capsys.readouterr().out


def test_a_command_is_named_as_the_shell_finds_it(
    capsys: Capture, monkeypatch: Patch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    program = tmp_path / ".venv/bin/vlm-calibration"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    named = {"/none": ".venv/bin/vlm-calibration", str(program.parent): "vlm-calibration"}
    for search, expected in named.items():
        monkeypatch.setenv("PATH", search)
        print_results({}, commands=["vlm-calibration runs"])
        assert capsys.readouterr().out == f"what to try next:\n  {expected} runs\n"


def test_a_log_has_a_line_after_some_seconds_then_seldom_and_at_the_end(
    clock: Clock, capsys: Capture
) -> None:
    lines = LogLines("sft", 900, "steps", done=100, every=30)
    for step in range(101, 901):
        clock.now += 0.125
        lines.update(step, lambda: "loss 0.412")
    lines.close("loss 0.412")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "sft: 140 of 900 steps (15%), 1:35 left, loss 0.412",
        "sft: 380 of 900 steps (42%), 1:05 left, loss 0.412",
        "sft: 620 of 900 steps (68%), 0:35 left, loss 0.412",
        "sft: 860 of 900 steps (95%), 0:05 left, loss 0.412",
        "sft: 900 of 900 steps (100%), took 1:40, loss 0.412",
    ]


def _slow(clock: Clock, items: range, seconds: float) -> Iterator[int]:
    for item in items:
        clock.now += seconds
        yield item


def test_short_work_prints_nothing_and_long_work_its_rest(clock: Clock, capsys: Capture) -> None:
    assert list(track(_slow(clock, range(4), 1.0), "checking a", 4, "images")) == [0, 1, 2, 3]
    assert capsys.readouterr().err == ""
    assert list(track(_slow(clock, range(4), 4.0), "checking b", 40, "MB", lambda _: 10.0)) == [0, 1, 2, 3]
    with pytest.raises(KeyError), working("c", 10, "rows") as update:
        clock.now += 60
        update(6)
        raise KeyError
    assert capsys.readouterr().err.splitlines() == [
        "checking b: 20 of 40 MB (50%), 0:08 left",
        "checking b: 40 of 40 MB (100%), took 0:16",
        "c: 6 of 10 rows (60%), 0:40 left",
        "c: stopped, 6 of 10 rows (60%), after 1:00",
    ]


def test_only_the_first_process_prints(clock: Clock, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    list(track(_slow(clock, range(9), 9.0), "checking", 9, "images"))
    assert capsys.readouterr().err == ""


def test_work_without_an_end_in_sight_says_that_it_goes_on(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.05)
    with working("loading a\x1b[2J model"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "loading a�[2J model: 0:00 so far\nloading a�[2J model: took 0:00\n"


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 61, 3600)] == ["0:00", "1:01", "1:00:00"]
    assert duration(90_000) == "1 d 1:00"


def test_stages_have_the_names_of_their_configurations() -> None:
    modules = ("SFTModule", "vlm_calibration.stages.level_fit.LevelFitModule", "my.Own")
    assert [stage_name(module) for module in modules] == ["sft", "levels", "Own"]


def test_a_terminal_has_a_bar_that_leaves_nothing() -> None:
    script = "import time; from vlm_calibration.progress import track; list(map(time.sleep, track([.2] * 3, 'a [b]', 3, 'items')))"
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONUTF8": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=slave, stdout=subprocess.PIPE, env=environment
    )
    os.close(slave)
    written = b""
    with suppress(OSError):  # the other end is closed
        while chunk := os.read(master, 4096):
            written += chunk
    os.close(master)
    text = written.decode()
    assert process.communicate()[0] == b""
    assert process.returncode == 0
    assert "a [b]" in text
    assert "3/3" in text
    assert text.rstrip("\r\n").endswith("\x1b[2K"), "the last line is erased"
