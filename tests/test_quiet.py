"""What the commands print, one in a cold process: no messages of other libraries, warnings, and the result at the end."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from vlm_calibration.quiet import quiet_libraries
from vlm_calibration.reporting.tables import print_results

from .command_line import LIMIT, Ended, Server, run_plainly

NOISE = (
    *("Tip:", "GPU available", "TPU available", "Seed set to", "FLOPs", "Trainable params", "weights_only"),
    *("deprecated", "to estimate number of stepping batches", "`Trainer.fit` stopped", "Failed to load CPU"),
    *(
        "Loading weights",
        "srun",
        "wandb: ",
        "wandb sync",
        "Test metric",
        "Validate metric",
        "\x1b",
        "Traceback",
    ),
)
"""What no command prints."""
DEMO = "vlm_calibration.demo.source.DemoSource"
FIT = (
    *("fit", "--config", "sft", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2"),
    *("--data.train.init_args.scenes=10", "--data.validation.init_args.scenes=2", "--data.workers=0"),
    *("--model.init_args.max_new_tokens=3", "--trainer.num_sanity_val_steps=-1"),
)
EVALUATE = (
    *("test", "--config", "eval/demo"),
    *("--data.calibration=null", "--data.workers=0"),
    f"--data.test={{clean: {{source: {{class_path: {DEMO}, init_args: {{split: test, scenes: 12}}}}}}}}",
)


def quiet(ended: Ended) -> list[str]:
    """The lines on stdout of a run that succeeded without noise, each within 80 columns unless it holds a path."""
    assert ended.status == 0, ended.err
    printed = ended.out + ended.err
    assert [text for text in NOISE if text in printed] == [], printed
    lines = ended.out.rstrip("\n").splitlines()
    assert [line for line in lines if cell_len(line) > 80 and "/" not in line] == []
    return lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quiet")


@pytest.fixture(scope="module")
def trained(root: Path, folder: Path) -> Ended:
    return run_plainly(list(FIT), root, folder)


@pytest.fixture(scope="module")
def evaluated(server: Server, folder: Path, trained: Ended) -> Ended:
    assert trained.status == 0, trained.err
    return server.wait(server.start(list(EVALUATE), folder))


@pytest.mark.slow
def test_a_training_ends_with_its_validations_and_the_adapter(trained: Ended, folder: Path) -> None:
    title, base, *lines = quiet(trained)
    assert title == "stage 1: supervised fine-tuning (SFT)"
    assert re.fullmatch(r"base model: \S+/demo/model \(float32\)", base)
    assert lines[0].rstrip() == "All 6 answers"
    assert [line.split("│")[1].strip() for line in lines if line.startswith("│")] == ["before", "after"]
    assert lines[-1] == "adapter: runs/sft/adapter"
    assert (folder / "runs/sft/adapter/adapter_config.json").is_file()


@pytest.mark.slow
def test_messages_of_this_package_are_printed(trained: Ended) -> None:
    assert "data.train: absent object in 10 of 30 queries (`absent: distractor`)\n" in trained.err
    assert re.search(r"^sft: 2 of 2 steps \(100%\), .*took 0:", trained.err, re.MULTILINE)


@pytest.mark.slow
def test_an_evaluation_ends_with_its_table(evaluated: Ended) -> None:
    base, *lines = quiet(evaluated)
    assert base.startswith("base model: ")
    assert lines[0].rstrip() == "All 36 answers"
    heads = [cell.strip() for cell in lines[2].strip("┃").split("┃")]
    assert heads[:5] == ["system", "mean conf.", "accuracy", "ECE", "AUROC"]
    assert [line.split("│")[1].strip() for line in lines if line.startswith("│")] == ["base", "sft"]
    assert lines[-1] == "answers: runs/eval"


@pytest.mark.slow
def test_a_report_ends_with_the_weakest_group_the_page_and_what_to_try(
    server: Server, evaluated: Ended, folder: Path
) -> None:
    assert evaluated.status == 0
    lines = quiet(server.wait(server.start(["report", "runs/eval", "--replicates", "20"], folder)))
    assert lines[0].rstrip() == "All 36 answers"
    text = " ".join(line.strip() for line in lines)
    assert re.search(
        r"sft: its largest error is on “.+”: it says \d+% and is right \d+% of the time \(36", text
    )
    at = lines.index("report: runs/eval/report.html")
    assert (folder / "runs/eval/report.html").is_file()
    assert lines[at + 1] == "what to try next:"
    program = re.escape(str(Path(sys.executable).with_name("vlm-calibration")))
    for line, command in zip(lines[at + 2 :], ("app", "ask", "export"), strict=True):
        assert re.match(rf"  (vlm-calibration|{program}) {command} .*runs/sft", line), line


@pytest.mark.slow
def test_a_validation_prints_its_result(run: Callable[..., Ended]) -> None:
    settings = ["--trainer.logger=false", "--trainer.default_root_dir=runs/validated"]
    lines = quiet(run("validate", *FIT[1:], *settings))
    assert [line.split("│")[1].strip() for line in lines if line.startswith("│")] == ["validation"]


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


LIGHTNING = """
import logging, sys
import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from vlm_calibration.quiet import quiet_lightning
quiet_lightning()
quiet_lightning()
L.seed_everything(3)
rank_zero_info("of our own")
logging.getLogger("lightning.pytorch.trainer").warning("a warning")
rank_zero_warn("warned")
"""


@pytest.mark.slow
def test_what_lightning_logs_is_hidden_and_its_warnings_are_not() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LIGHTNING], capture_output=True, text=True, timeout=LIMIT, check=True
    )
    assert "Seed" not in ran.stderr
    assert ran.stderr.count("of our own") == ran.stderr.count("a warning") == 1
    assert "warned" in ran.stderr


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
