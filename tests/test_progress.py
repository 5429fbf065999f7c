"""Progress of long work: the lines of a log file on a fake clock, and a terminal that is left clean."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from vlm_calibration import progress
from vlm_calibration.progress import LogLines, duration, stage_name, track, working


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_has_a_line_after_some_seconds_then_seldom_and_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
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


def test_short_work_prints_nothing_and_long_work_its_rest(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_only_the_first_process_prints(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    list(track(_slow(clock, range(9), 9.0), "checking", 9, "images"))
    assert capsys.readouterr().err == ""


def test_work_without_an_end_in_sight_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    chunks = []
    try:
        while chunk := os.read(master, 4096):
            chunks.append(chunk)
    except OSError:
        pass  # the other end is closed
    os.close(master)
    text = b"".join(chunks).decode()
    assert process.communicate()[0] == b""
    assert process.returncode == 0
    assert "a [b]" in text
    assert "3/3" in text
    assert text.rstrip("\r\n").endswith("\x1b[2K"), "the last line is erased"
