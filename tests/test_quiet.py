"""What the commands print: no messages of other libraries, warnings, and the result at the end.

`test_cli.py` has what a cold process prints when it imports the libraries."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities import rank_zero_info
from rich.cells import cell_len

from vlm_calibration.quiet import quiet_libraries, quiet_lightning
from vlm_calibration.reporting.tables import print_results

from .command_line import Ended
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
    assert lines[0].rstrip() == f"All {len(trained.predictions())} answers"
    assert [line.split("│")[1].strip() for line in lines if line.startswith("│")] == ["after"]
    assert lines[-1] == f"adapter: {trained.directory}/adapter"
    messages = trained.ended.err
    assert re.search(
        r"^data.train: absent object in \d+ of 12 queries \(`absent: distractor`\)$", messages, re.M
    )
    assert re.search(r"^sft: 6 of 6 steps \(100%\), .*took 0:", messages, re.M)


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
        for text in ("`is_gradient_checkpointing` is deprecated and", "`another` is deprecated"):
            warnings.warn(text, FutureWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["`another` is deprecated"]
    logger, stream = logging.getLogger("bitsandbytes.backends.cpu.ops"), io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.warning("Failed to load CPU gemm_4bit_forward: %s", "none")
    logger.warning("the weights do not fit")
    logger.removeHandler(handler)
    assert stream.getvalue() == "the weights do not fit\n"


def test_what_lightning_logs_is_hidden_and_its_warnings_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_unparsed_answers_are_shown_only_if_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    for share in (0.0, 0.125):
        print_results({"mine": values(parse_failure_rate=share)})
        assert ("unparsed" in capsys.readouterr().out) is (share > 0)


def test_files_are_links_on_a_terminal_and_paths_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
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
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    program = tmp_path / ".venv/bin/vlm-calibration"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    for search, expected in (
        ("/none", ".venv/bin/vlm-calibration"),
        (str(program.parent), "vlm-calibration"),
    ):
        monkeypatch.setenv("PATH", search)
        print_results({}, commands=["vlm-calibration runs"])
        assert capsys.readouterr().out == f"what to try next:\n  {expected} runs\n"
