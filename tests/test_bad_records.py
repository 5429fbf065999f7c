"""Records that cannot be loaded: left out and counted in one and two processes and after restarts, or a one-line error."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from vlm_calibration.data.loading import EpochSampler

from .command_line import Ended, callback, run_plainly

pytestmark = pytest.mark.slow

Start = Callable[..., list[str]]
FILES = ("adapter/adapter_model.safetensors", "metrics.json", "predictions.jsonl")
DAMAGED = {
    "3": "damaged or truncated",
    "6": "covers no pixel of the 64 x 64 image",
    "9": "has size [5, 5]",
}
"""Defects of three of 14 records; the box of a fourth is partly outside its image."""
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "1"]


@pytest.fixture
def records(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Write 14 records about images of 64 x 64 pixels, with `changes` by id; return the configuration of the source."""
    folder = tmp_path / "data"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (14, 64, 64, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.jpg")
    (folder / "3.jpg").write_bytes((folder / "3.jpg").read_bytes()[:600])
    regions = {
        "6": {"box": [70, 0, 90, 20]},
        "8": {"box": [-20, 10, 30, 40]},
        "9": {"box": [0, 0, 5, 5], "mask": {"size": [5, 5], "counts": [0, 25]}},
    }

    def write(name: str, policy: str = "skip", **changes: dict[str, Any]) -> dict[str, Any]:
        lines = []
        for i in range(14):
            region = {"label": "dog", "box": [10, 10, 40, 40], **regions.get(str(i), {})}
            plain = {"question": "A dog?", "answer": "Yes", "answer_type": "yes_no", "regions": [region]}
            lines.append({"id": str(i), "image": f"{i}.jpg", **plain, **changes.get(str(i), {})})
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        settings = {"path": str(path), "on_bad_record": policy}
        return {"class_path": "vlm_calibration.data.sources.jsonl.JsonlSource", "init_args": settings}

    return write


def _on(source: dict[str, Any], *names: str) -> list[str]:
    return [argument for name in names for argument in (f"--data.{name}", json.dumps(source))]


def _ids(folder: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (folder / "predictions.jsonl").read_text().splitlines()]


def _check_reported(ended: Ended) -> None:
    for kind in ("data.train", "data.validation"):
        total = f"{kind}: 3 of 14 queries could not be loaded and were left out: '3', '6', '9'"
        assert ended.err.count(total) == 1, ended.err
        clipped = f"{kind}: 1 of 14 queries have a region that leaves the image, of which only the part inside was used: '8'"
        assert ended.err.count(clipped) == 1, ended.err
        for name, says in DAMAGED.items():
            lines = [
                x for x in ended.err.splitlines() if f"{kind}: left out: " in x and f"record '{name}'" in x
            ]
            assert len(lines) == 1, ended.err
            assert says in lines[0]


def test_they_are_left_out_and_counted(
    run: Callable[..., Ended], start: Start, records: Callable[..., Any], tmp_path: Path
) -> None:
    ended = run(*start("run", workers=2), *_on(records("q"), "train", "validation"))
    assert (ended.status, ended.errors) == (0, []), ended.err
    _check_reported(ended)
    assert _ids(tmp_path / "run") == [str(i) for i in range(14) if str(i) not in DAMAGED]
    assert json.loads((tmp_path / "run/metrics.json").read_text())["n"] == 11


def test_where_no_record_can_be_loaded_the_run_fails(
    run: Callable[..., Ended], start: Start, records: Callable[..., Any]
) -> None:
    source = records("q", **{str(i): {"image": "3.jpg"} for i in range(14)})
    ended = run(*start("run"), *_on(source, "train"))
    assert ended.error() == "data.train: none of its 14 records could be loaded; some of them are named above"
    assert ended.status == 1
    assert ended.err.count("data.train: left out: ") == 5


def test_a_run_that_was_killed_ends_as_one_that_was_not(
    run: Callable[..., Ended], start: Start, records: Callable[..., Any], tmp_path: Path
) -> None:
    more = _on(records("q"), "train", "validation")
    assert run(*start("whole"), *more).status == 0
    # Batches with some or all records left out come before and after this position.
    kill = callback("disasters.KillAt", epoch=1, batch=2, when="between")
    ended = run(*start("cut", kill), *more)
    assert ended.status == -signal.SIGKILL, ended.err
    ended = run(*start("cut"), *more, "--ckpt_path", "last")
    assert ended.status == 0, ended.err
    for name in FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name


def test_two_processes_keep_in_step(
    start: Start, records: Callable[..., Any], root: Path, tmp_path: Path
) -> None:
    """With one query a batch, one process has no sample while the other has one."""
    watch = callback("disasters.WriteLosses")
    two = ["--trainer.devices", "2", "--data.batch_size", "1"]
    command = [
        *start("two", watch, workers=1, strategy="ddp"),
        *two,
        *_on(records("q"), "train", "validation"),
    ]
    ended = run_plainly(command, root, tmp_path)
    assert (ended.status, ended.errors) == (0, []), ended.err
    _check_reported_together(ended)
    losses = [
        [float(x) for x in (tmp_path / f"two/losses-{rank}.txt").read_text().splitlines()] for rank in (0, 1)
    ]
    left_out = [
        [str(place) in DAMAGED for epoch in (0, 1) for place in _sampler(rank, epoch).indices().tolist()]
        for rank in (0, 1)
    ]
    assert [[loss == 0.0 for loss in column] for column in losses] == left_out
    assert sum(map(sum, left_out)) == 6
    assert _ids(tmp_path / "two") == [str(i) for i in range(14) if str(i) not in DAMAGED]
    assert all(bool(w.isfinite().all()) for w in load_file(tmp_path / "two" / FILES[0]).values())


def _check_reported_together(ended: Ended) -> None:
    for kind in ("data.train", "data.validation"):
        assert (
            ended.err.count(f"{kind}: 3 of 14 queries could not be loaded and were left out: '3', '6', '9'")
            == 1
        )
        assert ended.err.count(f"{kind}: 1 of 14 queries have a region that leaves the image") == 1


def _sampler(rank: int, epoch: int) -> EpochSampler:
    sampler = EpochSampler(14, rank=rank, num_replicas=2, training=True)
    sampler.set_epoch(epoch)
    return sampler


def test_an_error_in_one_of_two_processes_is_one_line(
    start: Start, records: Callable[..., Any], root: Path, tmp_path: Path
) -> None:
    """The process that loads the record reports it; the other process, which fails as a consequence, is silent."""
    name = str(_sampler(1, 0).indices()[2])
    good = {str(i): {"image": "0.jpg", "regions": []} for i in range(14)}
    good = {k: {**v, "regions": [{"label": "dog", "box": [1, 1, 30, 30]}]} for k, v in good.items()}
    source = records("q", "raise", **{**good, name: {**good[name], "image": "3.jpg"}})
    ended = run_plainly([*start("run", workers=1), *TWO, *_on(source, "train")], root, tmp_path)
    assert ended.error().startswith(
        f"{tmp_path}/data/q.jsonl: record '{name}': {tmp_path}/data/3.jpg: damaged or"
    )
    assert ended.error().endswith("; `on_bad_record: skip` leaves such records out")
    assert ended.status == 1


@pytest.mark.nightly
def test_an_error_in_both_of_two_processes_is_one_line(
    start: Start, records: Callable[..., Any], root: Path, tmp_path: Path
) -> None:
    source = records("q", "raise", **{"4": {"answer": "banana"}})
    ended = run_plainly([*start("run"), *TWO, *_on(source, "train")], root, tmp_path)
    assert ended.error().startswith(
        f"{tmp_path}/data/q.jsonl:5: record '4': the gold answer of a yes/no question must"
    )
    assert ended.status == 1


def test_an_evaluation_counts_no_answer_that_there_is_not(
    run: Callable[..., Ended],
    records: Callable[..., Any],
    model_folder: str,
    root: Path,
    tmp_path: Path,
) -> None:
    """Also for a killed and resumed run; both splits have 14 records, three of which cannot be loaded."""
    source = records("q")

    def arguments(name: str, *disaster: dict[str, Any]) -> list[str]:
        overlay = {
            "trainer": {
                "accelerator": "cpu",
                "logger": False,
                "enable_progress_bar": False,
                "default_root_dir": str(tmp_path / name),
                "callbacks": [*disaster, callback("predictions.PredictionWriter")],
            },
            "model": {
                "init_args": {
                    "base": {"name_or_path": model_folder},
                    "adapters": {},
                    "oracle_levels": None,
                    "estimators": None,
                    "probes": None,
                    "max_new_tokens": 3,
                }
            },
            "data": {
                "test": {"clean": {"source": source}, "noised": {"source": source, "noise": "drawn"}},
                "eval_batch_size": 2,
                "workers": 0,
            },
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(overlay), encoding="utf-8")
        return ["test", "--config", str(root / "configs/eval/demo.yaml"), "--config", str(path)]

    complete = run(*arguments("whole"))
    assert complete.status == 0, complete.err
    total = "data.test: 6 of 28 queries could not be loaded and were left out: "
    assert (
        complete.err.count(total + "'clean:3', 'clean:6', 'clean:9', 'noised:3', 'noised:6' and 1 more") == 1
    )
    asked = [f"{part}:{i}" for part in ("clean", "noised") for i in range(14) if str(i) not in DAMAGED]
    assert _ids(tmp_path / "whole/base") == asked
    metrics = json.loads((tmp_path / "whole/base/metrics.json").read_text())
    assert (metrics["n"], metrics["n/clean"], metrics["n/noised"]) == (22, 11, 11)
    kill = callback("disasters.KillTest", batch=4, when="asked")
    assert run(*arguments("cut", kill)).status == -signal.SIGKILL
    cut = run(*arguments("cut"))
    assert cut.status == 0, cut.err
    assert "queries were answered before" in cut.err
    assert cut.err.count(total) == 1
    for name in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "whole/base" / name).read_bytes() == (tmp_path / "cut/base" / name).read_bytes()
