"""The line of progress: its text, its width, how often it is printed, and the time left, on a fake clock."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.progress import ProgressLine, stage_name, track, working
from vlm_calibration.progress import line as progress
from vlm_calibration.progress.status import Status, duration, rate_text


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
    with ProgressLine("sft", 800, "steps", every=30) as line:
        for step in range(1, 801):
            clock.now += 0.125
            line.update(step, lambda: "loss 0.412")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "sft: 40 of 800 steps (5%), 8.0 steps/s, 1:35 left, loss 0.412",
        "sft: 280 of 800 steps (35%), 8.0 steps/s, 1:05 left, loss 0.412",
        "sft: 520 of 800 steps (65%), 8.0 steps/s, 0:35 left, loss 0.412",
        "sft: 760 of 800 steps (95%), 8.0 steps/s, 0:05 left, loss 0.412",
        "sft: 800 of 800 steps (100%), 8.0 steps/s, took 1:40, loss 0.412",
    ]


def test_the_note_is_asked_for_only_when_it_is_printed(clock: Clock) -> None:
    notes: list[float] = []
    line = ProgressLine("sft", 100, "steps", every=30)
    for step in range(1, 101):
        clock.now += 1
        line.update(step, lambda: str(notes.append(clock.now)))
    assert [now - 100 for now in notes] == [5, 35, 65, 95]


def test_work_that_stops_says_so(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), ProgressLine("dpo", 10, "steps", done=2) as line:
        clock.now += 60
        line.update(6)
        raise KeyError
    assert capsys.readouterr().err.splitlines()[-1] == "dpo: stopped, 6 of 10 steps (60%), after 1:00"


def test_the_rate_is_that_of_this_run_and_the_rest_that_of_the_total(clock: Clock) -> None:
    line = ProgressLine("evaluation", 1000, "answers", done=600)
    for done in (650, 700):
        clock.now += 10
        line.update(done)
    assert (line.rate, line.status().left) == (5, 60)
    clock.now += 7
    assert line.status().left == 53, "it runs on between updates"
    clock.now += 100
    assert line.status().left == 0


def test_pauses_do_not_slow_the_rate_and_their_rest_is_added(clock: Clock) -> None:
    line = ProgressLine("sft", 100, "steps")
    for step in (10, 20, 30):
        clock.now += 10
        line.update(step)
    line.pause()
    clock.now += 500
    line.update(30, extra=40)
    assert line.status().left == 70 + 40
    line.unpause()
    clock.now += 10
    line.update(40)
    assert (line.rate, line.status().left) == (1, 60)


def test_the_rate_follows_a_change_of_speed(clock: Clock) -> None:
    line = ProgressLine("sft", 10_000, "steps")
    for step, seconds in enumerate([0.1] * 2000 + [1.0] * 600, start=1):
        clock.now += seconds
        line.update(step)
    assert line.rate == pytest.approx(1.0, rel=0.01)


def test_a_slow_start_is_forgotten(clock: Clock) -> None:
    """The first step waits for data workers."""
    line = ProgressLine("sft", 100, "steps")
    clock.now += 60
    for step in range(1, 5):
        clock.now += 2
        line.update(step)
    assert line.rate == pytest.approx(0.5)


STATUSES = st.builds(
    Status,
    st.text(st.characters(categories=["L", "N", "P", "Zs"]), max_size=120),
    st.floats(0, 1e9),
    st.none() | st.floats(1, 1e9),
    st.sampled_from(["", "steps", "answers"]),
    st.none() | st.floats(1e-5, 1e5),
    st.floats(0, 1e7),
    st.none() | st.floats(0, 1e7),
    st.sampled_from(["", "validation"]),
    st.text(st.characters(categories=["L", "N"]), max_size=60),
)


@given(STATUSES, st.integers(1, 80))
def test_no_line_is_wider_than_the_terminal(status: Status, width: int) -> None:
    assert len(status.terminal_line(width)) <= width


@given(STATUSES, st.booleans())
def test_a_log_line_is_one_line_with_its_name(status: Status, finished: bool) -> None:
    for line in (status.log_line(), status.last_line(finished=finished)):
        assert line.startswith(f"{status.name}: ")
        assert ", ," not in line.removeprefix(status.name)


def test_a_usual_line_shows_everything_and_a_long_one_what_matters_most() -> None:
    usual = Status("sft", 120, 800, "steps", 2.1, 57, 323, "", "loss 0.412")
    assert (
        usual.terminal_line() == "sft   15%  ━━┄┄┄┄┄┄┄┄┄┄  120/800 steps  2.1/s  0:57  5:23 left  loss 0.412"
    )
    longer = usual._replace(name="evaluation", done=123456, total=987654, unit="answers", left=99999)
    assert (
        longer.terminal_line()
        == "evaluation   12%  123456/987654 answers  2.1/s  0:57  1 d 3:46 left  loss 0.412"
    )
    assert longer.terminal_line(40) == "evaluation   12%  1 d 3:46 left"


def test_100_percent_is_the_end() -> None:
    assert Status("", 999_999, 1_000_000, "steps", None, 0, None, "", "").percent == 99


@given(st.floats(0, 1e7))
def test_a_duration_is_read_back(seconds: float) -> None:
    text = duration(seconds)
    days, _, rest = text.rpartition(" d ")
    numbers = [int(n) for n in rest.split(":")]
    units = (3600, 60) if days else (3600, 60, 1)[-len(numbers) :]
    read = 86400 * int(days or 0) + sum(n * u for n, u in zip(numbers, units, strict=True))
    assert abs(read - seconds) <= (61 if days else 0.5)


@pytest.mark.parametrize(
    ("rate", "text"),
    [(250.0, "250 steps/s"), (2.13, "2.1 steps/s"), (0.2, "12.0 steps/min"), (0.001, "3.6 steps/h")],
)
def test_a_rate_is_a_number_of_at_least_one_where_it_can_be(rate: float, text: str) -> None:
    assert rate_text(rate, "steps") == text


@pytest.mark.parametrize(
    ("module", "name"),
    [("SFTModule", "sft"), ("vlm_calibration.stages.level_fit.LevelFitModule", "levels"), ("my.Own", "Own")],
)
def test_stages_have_the_names_of_their_configurations(module: str, name: str) -> None:
    assert stage_name(module) == name


# --- Other work -----------------------------------------------------------------------------------------------------


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
    assert capsys.readouterr().err.splitlines() == [
        "checking b: 20 of 40 MB (50%), 2.5 MB/s, 0:08 left",
        "checking b: 40 of 40 MB (100%), 2.5 MB/s, took 0:16",
    ]


@pytest.mark.parametrize("variable", progress.RANKS)
def test_only_the_first_process_prints(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    list(track(_slow(clock, range(9), 9.0), "checking", 9, "images"))
    monkeypatch.setenv(variable, "0")
    assert capsys.readouterr().err == ""
    list(track(_slow(clock, range(9), 9.0), "checking", 9, "images"))
    assert capsys.readouterr().err != ""


def test_work_without_an_end_in_sight_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.05)
    with working("loading a\x1b[2J model"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "loading a�[2J model: 0:00 so far\nloading a�[2J model: took 0:00\n"


# --- On a terminal --------------------------------------------------------------------------------------------------

SCRIPT = """
import logging, os, sys, time, warnings
logging.basicConfig(format="%(message)s")
from vlm_calibration.progress import ProgressLine, track
with ProgressLine("sft", 40, "steps") as line:
    for step in range(41):
        line.update(step, lambda: "loss 0.5")
        time.sleep(0.03)
        if step == 20:
            print("printed")
            logging.warning("logged")
            list(track(range(9), "inner", 9, "images"))
            if not os.fork():
                print("in a worker", file=sys.stderr, flush=True)
                os._exit(0)
            os.wait()
with ProgressLine("passing", 2, "steps", passing=True) as line:
    line.update(1)
"""


def in_terminal(command: list[str], **settings: object) -> tuple[int, str]:
    """Run a command whose stderr is a terminal of 100 columns; returns its status and what the terminal got."""
    import fcntl
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(command, stderr=slave, **settings)  # type: ignore[call-overload]
    os.close(slave)
    chunks = []
    try:
        while chunk := os.read(master, 4096):
            chunks.append(chunk)
    except OSError:
        pass  # the other end is closed
    os.close(master)
    return process.wait(), b"".join(chunks).decode()


def shown_lines(text: str) -> list[str]:
    """Everything that a terminal showed in one line at any time, without control sequences."""
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part) for part in re.split(r"[\r\n]+", text)]


@pytest.mark.slow
def test_a_terminal_has_one_live_line_and_others_print_above_it(tmp_path: Path) -> None:
    environment = {**os.environ, "TERM": "xterm", "PYTHONUTF8": "1"}
    with (tmp_path / "out").open("w") as out:
        status, text = in_terminal([sys.executable, "-c", SCRIPT], stdout=out, env=environment)
    lines = shown_lines(text)
    assert status == 0
    assert max(len(line.removesuffix("in a worker")) for line in lines) <= 80
    assert (tmp_path / "out").read_text() == "printed\n", "a file gets what belongs there"
    assert "logged" in lines
    assert "in a worker" in text, "it does not wait for a lock of the line"
    drawn = [line for line in lines if line.startswith("sft")]
    assert len(drawn) > 2
    assert "100%" in drawn[-1]
    assert "loss 0.5" in drawn[-1]
    assert "inner" not in text
    assert text.endswith("\x1b[1A\x1b[2K"), "the last line is erased"
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2, "the cursor is shown again"
