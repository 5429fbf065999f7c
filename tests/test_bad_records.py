"""Records that cannot be loaded: left out and counted in one and two processes and after restarts, or a one-line error."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from vlm_calibration.data.loading import EpochSampler
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.records import DataError

from .command_line import Arguments, Ended, Run, callback, instance, run_plainly, write_evaluation
from .trainers import Line, plain_trainer

pytestmark = pytest.mark.slow

FILES = ("adapter/adapter_model.safetensors", "metrics.json", "predictions.jsonl")
DAMAGED = ("3", "6", "9")
"""Those of 14 records whose image is truncated; the box of another one is partly outside its image."""
ASKED = [str(i) for i in range(14) if str(i) not in DAMAGED]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "1"]


@pytest.fixture
def records(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Write 14 records about images of 64 x 64 pixels, with the images of `damaged` damaged; return the configuration of the source."""
    folder = tmp_path / "data"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (14, 64, 64, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.jpg")
    (folder / "bad.jpg").write_bytes((folder / "3.jpg").read_bytes()[:600])

    def write(policy: str = "skip", damaged: Collection[str] = DAMAGED) -> dict[str, Any]:
        with (folder / "q.jsonl").open("w") as file:
            for name in map(str, range(14)):
                box = [-20, 10, 30, 40] if name == "8" else [10, 10, 40, 40]
                image = "bad.jpg" if name in damaged else f"{name}.jpg"
                query = {"id": name, "image": image, "question": "A dog?", "answer": "Yes"}
                query |= {"answer_type": "yes_no", "regions": [{"label": "dog", "box": box}]}
                file.write(json.dumps(query) + "\n")
        path = str(folder / "q.jsonl")
        return instance("data.sources.jsonl.JsonlSource", path=path, on_bad_record=policy)

    return write


def _on(source: dict[str, Any], *names: str) -> list[str]:
    return [argument for name in names for argument in (f"--data.{name}", json.dumps(source))]


def _ids(folder: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (folder / "predictions.jsonl").read_text().splitlines()]


def _check_reported(ended: Ended) -> None:
    assert (ended.status, ended.errors) == (0, []), ended.err
    for kind in ("data.train", "data.validation"):
        total = f"{kind}: 3 of 14 queries could not be loaded and were left out: '3', '6', '9'"
        assert ended.err.count(total) == 1, ended.err
        assert ended.err.count(f"{kind}: 1 of 14 queries have a region that leaves the image") == 1


def test_they_are_left_out_and_counted_also_in_a_run_that_was_killed(
    run: Run, start: Arguments, records: Callable[..., Any], tmp_path: Path
) -> None:
    more = _on(records(), "train", "validation")
    ended = run(*start("whole"), *more)
    _check_reported(ended)
    assert ended.err.count("data.train: left out: ") == ended.err.count("data.validation: left out: ") == 3
    assert _ids(tmp_path / "whole") == ASKED
    assert json.loads((tmp_path / "whole/metrics.json").read_text())["n"] == 11
    # Batches with some or all records left out come before and after this position.
    kill = callback("disasters.KillAt", epoch=1, batch=2, when="between")
    run(*start("cut", kill), *more).checked(-signal.SIGKILL)
    run(*start("cut"), *more, "--ckpt_path", "last").checked()
    for name in FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name


def test_where_no_record_can_be_loaded_the_run_fails(
    records: Callable[..., Any], model_folder: str, tmp_path: Path
) -> None:
    source = JsonlSource(**records(damaged=[str(i) for i in range(14)])["init_args"])
    data = PerturbedQueryDataModule(model_folder, train=source, batch_size=2, workers=0)
    message = "^data.train: none of its 14 records could be loaded; some of them are named above$"
    with pytest.warns(UserWarning, match="left out") as warned, pytest.raises(DataError, match=message):
        plain_trainer(tmp_path, max_epochs=1).fit(Line(), data)
    assert [str(w.message).startswith("data.train: left out: ") for w in warned].count(True) == 5


@pytest.mark.parametrize("stages", [["levels"], ["levels", "sft"]])
def test_an_error_in_a_worker_ends_the_command(
    records: Callable[..., Any], model_folder: str, root: Path, tmp_path: Path, stages: list[str]
) -> None:
    """The workers still wait for batches then, and the process ends nevertheless, be it a stage alone or one of several in a fork."""
    records()
    for name in ("train", "validation", "calibration", "test"):
        shutil.copy(tmp_path / "data/q.jsonl", tmp_path / f"data/{name}.jsonl")
    places = ["--data", "jsonl", "--data-root", str(tmp_path / "data"), "--runs", str(tmp_path / "runs")]
    model = ["--model.init_args.base.name_or_path", model_folder, "--trainer.accelerator", "cpu"]
    workers = ["--data.workers", "2", "--data.eval_batch_size", "2"]
    ended = run_plainly(["calibrate", *stages, *places, *model, *workers], root, tmp_path).checked(1)
    assert re.match(rf"{tmp_path}/data/calibration.jsonl: record '.*[369]@?\d*': .*damaged or", ended.error())


def test_two_processes_keep_in_step(
    run_two: Run, start: Arguments, records: Callable[..., Any], tmp_path: Path
) -> None:
    """With one query a batch, one process has no sample while the other has one."""
    watch = callback("disasters.WriteLosses")
    _check_reported(run_two(*start("two", watch, workers=1), *TWO, *_on(records(), "train", "validation")))
    files = [tmp_path / f"two/losses-{rank}.txt" for rank in (0, 1)]
    losses = [[float(line) for line in path.read_text().splitlines()] for path in files]
    left_out = [
        [str(place) in DAMAGED for epoch in (0, 1) for place in _sampler(rank, epoch).indices().tolist()]
        for rank in (0, 1)
    ]
    assert [[loss == 0.0 for loss in column] for column in losses] == left_out
    assert sum(map(sum, left_out)) == 6
    assert _ids(tmp_path / "two") == ASKED
    assert all(bool(w.isfinite().all()) for w in load_file(tmp_path / "two" / FILES[0]).values())


def _sampler(rank: int, epoch: int) -> EpochSampler:
    sampler = EpochSampler(14, rank=rank, num_replicas=2, training=True)
    sampler.set_epoch(epoch)
    return sampler


@pytest.mark.parametrize("both", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_an_error_in_one_or_both_of_two_processes_is_one_line(
    start: Arguments, records: Callable[..., Any], root: Path, tmp_path: Path, both: bool
) -> None:
    """The process that loads the record reports it; the other process, which fails as a consequence, is silent."""
    name = str(_sampler(1, 0).indices()[2])
    source = records("raise", [name])
    says = f"q.jsonl: record '{name}': {tmp_path}/data/bad.jpg: damaged or"
    if both:
        (tmp_path / "data/q.jsonl").unlink()
        says = "q.jsonl: no such file"
    ended = run_plainly([*start("run", workers=1), *TWO, *_on(source, "train")], root, tmp_path).checked(1)
    assert ended.error().startswith(f"{tmp_path}/data/{says}")
    assert both or ended.error().endswith("; `on_bad_record: skip` leaves such records out")


def test_an_evaluation_counts_no_answer_that_there_is_not(
    run: Run, records: Callable[..., Any], model_folder: str, tmp_path: Path
) -> None:
    """Also for a killed and resumed run; both splits have 14 records, three of which cannot be loaded."""
    source = records()

    test = json.dumps({"clean": {"source": source}, "noised": {"source": source, "noise": "drawn"}})

    def arguments(name: str, *disaster: dict[str, Any]) -> list[str]:
        base = {"name_or_path": model_folder}
        callbacks = [*disaster, "predictions.PredictionWriter"]
        path, folder = tmp_path / f"{name}.yaml", str(tmp_path / name)
        command = write_evaluation(path, folder, 1, callbacks, base=base, max_new_tokens=3)
        return [*command, "--data.test", test, "--data.eval_batch_size", "2"]

    complete = run(*arguments("whole")).checked()
    total = "data.test: 6 of 28 queries could not be loaded and were left out: "
    total += "'clean:3', 'clean:6', 'clean:9', 'noised:3', 'noised:6' and 1 more"
    assert complete.err.count(total) == 1
    assert _ids(tmp_path / "whole/base") == [f"{part}:{i}" for part in ("clean", "noised") for i in ASKED]
    metrics = json.loads((tmp_path / "whole/base/metrics.json").read_text())
    assert (metrics["n"], metrics["n/clean"], metrics["n/noised"]) == (22, 11, 11)
    kill = callback("disasters.KillTest", batch=4, when="asked")
    run(*arguments("cut", kill)).checked(-signal.SIGKILL)
    cut = run(*arguments("cut")).checked()
    assert "queries were answered before" in cut.err
    assert cut.err.count(total) == 1
    for name in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "whole/base" / name).read_bytes() == (tmp_path / "cut/base" / name).read_bytes()
