"""`fit` and an existing run directory: refused, resumed or overwritten, and unchanged when `fit` fails."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from vlm_calibration.callbacks.run_directory import Prior, find_prior
from vlm_calibration.records import DataError
from vlm_calibration.reporting.runs import RunRecord

from .command_line import Arguments, Run, callback, instance

LOGGED = {"logger": callback("logger.RunLogger")}


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Path in the folder -> modification time and content of every file."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


@pytest.fixture
def finished(run: Run, fit: Arguments, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A copy of the run directory of a finished run; the first test trains for all."""
    trained = tmp_path_factory.getbasetemp() / "finished"
    if not trained.exists():
        run(*fit(trainer=LOGGED)).checked()
        assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 1
        (tmp_path / "run").rename(trained)
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_that_fails_leaves_the_directory_as_it_was(
    run: Run, fit: Arguments, finished: Path, tmp_path: Path
) -> None:
    before = files_of(finished)
    records = tmp_path / "queries.jsonl"
    query = {"id": "one", "image": "none.png", "question": "?", "answer": "Yes", "answer_type": "yes_no"}
    records.write_text(json.dumps(query))
    for setting, value in {
        "data.train": instance("data.sources.jsonl.JsonlSource", path=str(records)),  # an image is missing
        "data.noise.levels": instance("perturbation.levels.AnchoredLevels", path="none.json"),
    }.items():
        command = [*fit(trainer=LOGGED), f"--{setting}", json.dumps(value)]
        assert run(*command, "--overwrite").error(), setting
        assert files_of(finished) == before, setting
    nowhere = ["--model.init_args.adapter", str(tmp_path / "nowhere")]
    ended = run(*fit("dpo", trainer=LOGGED), *nowhere, "--overwrite")
    assert str(tmp_path / "nowhere") in ended.error()
    assert files_of(finished) == before
    assert run(*command, "--trainer.default_root_dir", str(tmp_path / "new")).error()
    assert not (tmp_path / "new").exists()


def test_an_overwritten_run_stands_until_the_new_one_trains_and_leaves_nothing_behind(
    run: Run, start: Arguments, finished: Path
) -> None:
    kill = callback("disasters.KillAt", epoch=0, batch=0)
    run(*start("run", kill), "--overwrite").checked(-signal.SIGKILL)
    assert {p.name for p in finished.iterdir()} == {"config.yaml", "run.json", "wandb"}, "logs stay"
    assert "overwrite" not in yaml.safe_load((finished / "config.yaml").read_text())


class Writer:
    """Writes one file."""

    def outputs(self, folder: Path, *_: Any) -> list[Path]:
        return [folder / "metrics.json"]


def _find_prior(folder: Path, command: str, **settings: Any) -> Prior:
    """What `folder` holds for a command with these settings."""
    config = Namespace(**{"overwrite": False, "resume": False, "model": Namespace(), **settings})
    trainer = SimpleNamespace(default_root_dir=str(folder), callbacks=[Writer()])
    cli: Any = SimpleNamespace(trainer=trainer, subcommand=command, config={command: config})
    cli.model = cli.datamodule = None
    return find_prior(cli)


def test_what_a_run_starts_from_is_not_replaced(tmp_path: Path) -> None:
    last, adapter = f"{tmp_path}/checkpoints/last.ckpt", f"{tmp_path}/adapter"
    with pytest.raises(DataError, match=f"--overwrite would remove {last}, from which --ckpt_path"):
        _find_prior(tmp_path, "fit", overwrite=True, ckpt_path=last)
    model = Namespace(init_args=Namespace(adapter=adapter))
    with pytest.raises(DataError, match=f"model.adapter: the run in {tmp_path} would replace {adapter}"):
        _find_prior(tmp_path, "fit", overwrite=True, model=model)


@pytest.mark.parametrize(
    ("command", "holds", "overwrite", "refused"),
    [
        ("test", "nothing", False, None),
        ("test", "test finished", False, "--resume .* --overwrite .* --trainer.default_root_dir"),
        ("fit", "fit finished", False, "--resume .* --overwrite .* --trainer.default_root_dir"),
        ("test", "test finished", True, None),
        ("test", "test begun", False, None),
        ("fit", "fit begun", False, None),
        ("fit", "fit interrupted", False, "interrupted: --resume"),
        ("fit", "fit interrupted", True, None),
        ("test", "levels fit finished", True, "`levels fit`"),
        ("test", "fit begun", True, "`fit`"),
        ("fit", "test finished", True, "`test`"),
        ("test", "adapter", False, "without the record"),
        ("test", "adapter", True, None),
    ],
)
def test_what_a_command_may_replace(
    tmp_path: Path, command: str, holds: str, overwrite: bool, refused: str | None
) -> None:
    earlier, _, state = holds.rpartition(" ")
    if earlier:
        RunRecord(earlier, "", state == "finished", {}, {}).write(tmp_path)
        file = {"finished": "metrics.json", "interrupted": "checkpoints/last.ckpt"}.get(state, "config.yaml")
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("x")
    elif holds == "adapter":
        (tmp_path / holds).mkdir()
    with pytest.raises(DataError, match=f"{tmp_path}.*{refused}") if refused else nullcontext():
        assert _find_prior(tmp_path, command, overwrite=overwrite) == Prior("none")
