"""Which differences in settings and inputs make a run another run."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_calibration.callbacks.checkpoint import reading
from vlm_calibration.callbacks.regions import write_rows
from vlm_calibration.callbacks.run_directory import BATCH, deciding_settings, differences, run_inputs
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.regions import RegionPlan
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.models.loading import model_identity
from vlm_calibration.records import DataError, Query, Region
from vlm_calibration.reporting.runs import RunRecord, read_record

from ..command_line import instance

COMMANDS = ("fit", "test", "predict", "levels fit")


def _source(path: str) -> dict[str, Any]:
    return instance("data.sources.jsonl.JsonlSource", path=path, root=None)


SETTINGS: dict[str, Any] = {
    "seed_everything": 0, "ckpt_path": None,
    "trainer": {
        "max_epochs": 1, "limit_train_batches": 1.0, "gradient_clip_val": 1.0, "devices": 1, "log_every_n_steps": 10,
        "callbacks": [
            instance("callbacks.checkpoint.RunCheckpoint", every_n_train_steps=2),
            {"class_path": "lightning.pytorch.callbacks.RichProgressBar"},
        ],
        "plugins": None,
    },
    "model": instance(
        "stages.sft.SFTModule", base={"name_or_path": "a/model", "dtype": "float32"}, optimizer={"lr": 0.1},
        gradient_checkpointing=False,
    ),
    "data": {
        "train": _source("data/train.jsonl"), "predict": None, "noise": {"seed": 0, "kinds": {"noise": 1, "blur": 2}},
        "batch_size": 4, "workers": 1, "max_length": 10,
    },
}  # fmt: skip


def _run(
    command: str = "fit", *, inputs: dict[str, str] | None = None, finished: bool = True, **changes: Any
) -> RunRecord:
    """A run of `SETTINGS` with some changed: dotted name, with "__" for the dots -> value."""
    settings = copy.deepcopy(SETTINGS)
    for name, value in changes.items():
        *path, last = name.split("__")
        section = settings
        for key in path:
            section = section[key]
        section[last] = value
    deciding = deciding_settings(command, settings)
    return RunRecord(command, "SFTModule", finished, deciding, inputs or {}, versions={"torch": "2.9"})


def _names(before: RunRecord, now: RunRecord) -> list[str]:
    return [line.removeprefix("the content of ").split(" ")[0] for line in differences(before, now)]


STOP = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/ece"}}
SLURM = {"class_path": "lightning.pytorch.plugins.environments.SLURMEnvironment", "init_args": {}}


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"seed_everything": 1}, COMMANDS),
        ({"trainer__max_epochs": 2}, ["fit"]),
        ({"trainer__limit_train_batches": 1}, ["fit"]),
        ({"trainer__gradient_clip_val": 1}, []),
        ({"trainer__log_every_n_steps": 50, "trainer__devices": 8, "trainer__strategy": "ddp"}, []),
        ({"trainer__callbacks": None}, []),
        ({"trainer__callbacks": [*SETTINGS["trainer"]["callbacks"], STOP]}, ["fit"]),
        ({"trainer__plugins": [SLURM]}, []),
        ({"model__init_args__optimizer__lr": 0.2}, COMMANDS),
        ({"model__init_args__gradient_checkpointing": True}, []),
        ({"data__noise__seed": 1}, ["fit", "test", "levels fit"]),
        ({"data__noise__kinds": {"noise": 1, "blur": 3}}, ["fit", "test", "levels fit"]),
        ({"data__train__init_args__path": "./data/../data/train.jsonl"}, []),
        ({"data__train__init_args__path": "other.jsonl"}, ["fit", "predict"]),
        ({"data__test": {"clean": {"source": _source("test.jsonl")}}}, ["test", "predict"]),
        ({"data__max_length": 20}, ["fit"]),
        ({"data__augment": [{"class_path": "albumentations.HorizontalFlip", "init_args": {"p": 0.5}}]}, ["fit"]),
        ({"data__workers": 4, "data_root": "my", "runs": "r", "resume": True}, []),
        ({"data__eval_batch_size": 9}, ["predict"]),
    ],
)  # fmt: skip
def test_settings_that_change_the_result(change: dict[str, Any], differs: list[str]) -> None:
    found = [command for command in COMMANDS if _names(_run(command), _run(command, **change))]
    assert set(found) == set(differs)


def test_both_values_are_named() -> None:
    other = {"class_path": "vlm_calibration.demo.source.DemoSource", "init_args": {}}
    lines = differences(_run(), _run(data__train=other, model__init_args__optimizer__lr=0.2))
    assert lines == [
        "model.init_args.optimizer.lr was 0.1 and is 0.2",
        "data.train.class_path was 'vlm_calibration.data.sources.jsonl.JsonlSource' and is "
        "'vlm_calibration.demo.source.DemoSource'",
        "data.train.init_args.path was 'data/train.jsonl' and is None",
        "data.train.init_args was None and is {}",
    ]


BASE, LEVELS = "model.init_args.base.name_or_path", "data.noise.levels.init_args"


@pytest.mark.parametrize(
    ("name", "change", "contents", "differs"),
    [
        (BASE, {}, "aa", False),
        (BASE, {}, "ab", True),
        (BASE, {"model__init_args__base__name_or_path": "moved"}, "aa", False),
        (BASE, {"model__init_args__base__name_or_path": "moved"}, "a", True),
        ("data.train", {}, "ab", True),
        # The images of another folder may be others, which no digest covers.
        ("data.train", {"data__train__init_args__path": "moved.jsonl"}, "aa", True),
    ],
)
def test_content_decides_where_it_is_known(
    name: str, change: dict[str, Any], contents: str, differs: bool
) -> None:
    before, now = ({name: content} if content else {} for content in (contents[:1], contents[1:]))
    assert bool(_names(_run(inputs=before), _run(inputs=now, **change))) == differs


@pytest.mark.parametrize(
    ("batch", "finished", "interrupted"),
    [("4 x 1", False, False), ("2 x 2", False, False), ("4 x 2", True, False), ("2 x 4", True, True)],
)
def test_the_batch_over_all_processes_counts_in_training(
    batch: str, finished: bool, interrupted: bool
) -> None:
    now = _run()
    now.settings[BATCH] = batch
    for ended, differs in ((True, finished), (False, interrupted)):
        before = _run(finished=ended)
        before.settings[BATCH] = "4 x 1"
        assert bool(differences(before, now)) == differs


def test_versions_count_while_questions_are_answered() -> None:
    def differing(command: str, finished: bool) -> list[str]:
        now = replace(_run(command), versions={"torch": "2.10"})
        return differences(_run(command, finished=finished), now)

    assert differing("test", False) == ["the version of torch was 2.9 and is 2.10"]
    assert differing("test", True) == differing("fit", False) == []


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = _run(data__noise__kinds={"noise": 1, "blur": 0.5}, inputs={"data.train": "a"})
    record.write(tmp_path)
    assert read_record(tmp_path) == record
    assert replace(record, finished=False, results={"levels.json": "b"}).digest == record.digest
    assert record.digest != _run().digest


def test_inputs_count_by_content(
    model_folder: str, new_adapter: Callable[..., str], root: Path, tmp_path: Path
) -> None:
    (tmp_path / "image.png").write_bytes(b"")
    query = {"id": "1", "image": "image.png", "question": "?", "answer": "Yes", "answer_type": "yes_no"}
    files = {"path": "levels.json", "likelihoods": "likelihoods.parquet"}
    adapters = {"model.init_args.adapter", "model.init_args.adapters.one"}

    def inputs(question: str = "?", adapter: str = new_adapter(1), n: int = 0) -> dict[str, str]:
        (tmp_path / "train.jsonl").write_text(json.dumps({**query, "question": question}) + "\n\n" * n)
        table = json.loads((root / "src/vlm_calibration/demo/levels.json").read_text())
        table["provenance"]["seed"] += n
        (tmp_path / "levels.json").write_text(json.dumps(table))
        (tmp_path / "likelihoods.parquet").write_text(str(n))
        settings = {
            BASE: model_folder,
            BASE.replace("name_or_path", "revision"): None,
            **dict.fromkeys(adapters, adapter),
            "data.train": {},
            **{f"{LEVELS}.{name}": str(tmp_path / file) for name, file in files.items()},
        }
        data = PerturbedQueryDataModule(train=JsonlSource(str(tmp_path / "train.jsonl")))
        return run_inputs(settings, data, with_regions=True)

    before = inputs()
    of_levels = {f"{LEVELS}.{name}" for name in files}
    assert set(before) == {BASE, *adapters, "data.train", *of_levels}
    assert inputs() == before

    def changed(after: dict[str, str]) -> set[str]:
        return {name for name in before if before[name] != after[name]}

    assert changed(inputs(question="why")) == {"data.train"}
    assert changed(inputs(adapter=new_adapter(2))) == adapters
    assert changed(inputs(n=1)) == of_levels, "blank lines are no queries"


def test_a_model_counts_by_its_weights_and_its_processor(model_folder: str, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "moved")
    (folder / "README.md").write_text("notes")
    identity = model_identity(str(folder))
    assert identity == model_identity(model_folder)
    for name in ("tokenizer_config.json", "model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert model_identity(str(folder)) != identity, name
        (folder / name).write_bytes(content)
    assert model_identity("no/model") is None


def test_the_regions_of_a_source_are_its_content(tmp_path: Path) -> None:
    """Other regions are another input of training, and none of the extraction."""
    query = Query("1", "a.png", "Is there a dog?", "Yes", "yes_no")
    (tmp_path / "a.png").write_bytes(b"")
    plain = {name: getattr(query, name) for name in ("id", "image", "question", "answer", "answer_type")}
    (tmp_path / "train.jsonl").write_text(json.dumps(plain))

    def inputs(width: float, *, with_regions: bool) -> dict[str, str]:
        source = JsonlSource(str(tmp_path / "train.jsonl"))
        [extraction] = RegionPlan({"train": EvalSplit(source, "drawn")}, 8, keep_known=True).extractions
        found = replace(query, regions=(Region("dog", (0.0, 0.0, width, 4.0)),))
        write_rows(tmp_path / extraction.file, [[asdict(found)]], extraction.note)
        data = PerturbedQueryDataModule(train=source, regions=str(tmp_path))
        return run_inputs({"data.train": {}}, data, with_regions=with_regions)

    assert inputs(4.0, with_regions=True) == inputs(4.0, with_regions=True)
    assert inputs(4.0, with_regions=True) != inputs(5.0, with_regions=True)
    assert inputs(4.0, with_regions=False) == inputs(5.0, with_regions=False)


def test_levels_with_likelihoods_depend_on_the_training_queries() -> None:
    train = "data.train.init_args.path"
    assert train not in _run("levels fit").settings
    decided = _run("levels fit", model__init_args__likelihoods="likelihoods.parquet").settings
    assert train in decided
    assert "model.init_args.likelihoods" not in decided, "a result: it exists only after the run"


def test_an_endpoint_may_move() -> None:
    endpoint = {"url": "http://a", "model": "m", "timeout": 1.0, "parameters": {"temperature": 0}}
    before = _run("test", model__init_args__endpoints={"e": endpoint})
    moved = _run("test", model__init_args__endpoints={"e": {**endpoint, "url": "http://b", "timeout": 2.0}})
    assert differences(before, moved) == []
    other = _run("test", model__init_args__endpoints={"e": {**endpoint, "parameters": {"temperature": 1}}})
    assert _names(before, other) == ["model.init_args.endpoints.e.parameters.temperature"]


@pytest.mark.parametrize("size", [0, 2, 10, 2000, -1])
@pytest.mark.parametrize("others", [0, 2])
def test_a_truncated_checkpoint_names_what_to_resume_from(tmp_path: Path, size: int, others: int) -> None:
    last = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"w": torch.ones(1000)}}, last)
    for age in range(others):
        os.utime(shutil.copy(last, tmp_path / f"epoch={age}.ckpt"), (age, age))
    last.write_bytes(last.read_bytes()[:size])
    with pytest.raises(DataError) as caught, reading(last):
        torch.load(last, weights_only=True)
    message = str(caught.value)
    assert message.startswith(f"--ckpt_path {last}: not a complete checkpoint (")
    assert "--overwrite" in message
    assert (f"--ckpt_path {tmp_path / 'epoch=1.ckpt'}" in message) == (others == 2)
