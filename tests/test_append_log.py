"""The append-only log: what readers see of a killed writer, of other settings, and of another process."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import Any

import pytest

from vlm_calibration.append_log import AppendLog, SettingsChangedError
from vlm_calibration.records import DataError

SETTINGS = {"rule": {"level": 0.5}, "model": "a", "below": None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def _log(path: Path, settings: Any = SETTINGS, pattern: str | None = None) -> AppendLog:
    return AppendLog(path, settings, "remove it", pattern)


def _numbers(log: AppendLog) -> list[int]:
    return [row["n"] for _, row in log.lines()]


def test_rows_of_all_processes_are_read_in_order_and_again(tmp_path: Path) -> None:
    first, second = (_log(tmp_path / "a" / f"{n}.jsonl", pattern="*.jsonl") for n in range(2))
    assert _numbers(first) == []
    second.append({"n": 5})
    first.append({"n": 1, "text": "Größe\u2028"}, {"n": 2})
    first.append({"n": 3}, sync=True)
    assert _numbers(first) == _numbers(second) == [1, 2, 3, 5]
    lines = [*first.lines()]
    places = ["0.jsonl:1", "0.jsonl:2", "0.jsonl:3", "1.jsonl:1"]
    assert [line.where for line, _ in lines] == [f"{tmp_path}/a/{place}" for place in places]
    assert [first.reread(line._replace(content=b"")) for line, _ in lines] == [row for _, row in lines]
    assert lines[0][1] == {"n": 1, "text": "Größe\u2028", **SETTINGS}
    assert "Größe" in (tmp_path / "a/0.jsonl").read_text(encoding="utf-8"), "UTF-8 as it is"
    first.clear()
    assert not list((tmp_path / "a").iterdir())


def test_a_line_that_is_cut_off_is_ignored_and_then_removed(path: Path) -> None:
    log = _log(path)
    log.append({"n": 1}, {"n": 2})
    log.close()
    content = path.read_bytes()
    for cut in (1, 5, len(content) // 2 - 1):
        path.write_bytes(content[:-cut])
        assert _numbers(_log(path)) == [1]
        log = _log(path)
        log.open()
        assert path.read_bytes() == content[:-cut], "reading and opening change nothing"
        log.append({"n": 2})
        log.close()
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({**SETTINGS, "model": "b"}, "written with model = 'a', found 'b'"),
        ({**SETTINGS, "rule": {"level": 0.1}}, "written with rule = {'level': 0.5}, found {'level': 0.1}"),
        ({**SETTINGS, "more": 1}, "more = None, found 1"),
    ],
)
def test_other_settings_are_refused(path: Path, settings: Any, says: str) -> None:
    _log(path).append({"n": 1})
    with pytest.raises(SettingsChangedError) as caught:
        _numbers(_log(path, settings))
    assert str(caught.value).startswith(f"{path}:1: ")
    assert says in str(caught.value)
    assert str(caught.value).endswith(": remove it")


@pytest.mark.parametrize("line", [b"\0" * 30, b"[]", b"{", b"\xff"])
def test_a_damaged_line_is_named(path: Path, line: bytes) -> None:
    _log(path).append({"n": 1})
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(DataError, match=f"^{path}:2: damaged: "):
        _numbers(_log(path))


def test_two_processes_do_not_append_to_one_file(path: Path) -> None:
    log, other = _log(path), _log(path)
    log.append({"n": 1})
    with pytest.raises(DataError, match=f"{path}: another process is writing to it"):
        other.append({"n": 2})
    log.close()
    other.append({"n": 2})
    assert _numbers(log) == [1, 2]


def test_a_file_system_without_locks_is_warned_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    log = _log(path)
    with pytest.warns(UserWarning, match="cannot be locked: No locks available"):
        log.append({"n": 1})
    assert _numbers(log) == [1]


def test_a_folder_that_cannot_be_made_is_named(path: Path) -> None:
    path.touch()
    with pytest.raises(DataError, match=f"cannot write {path}/log.jsonl: "):
        _log(path / "log.jsonl").append({"n": 1})
