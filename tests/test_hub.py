"""Adapters and their base models: on a Hub, unreachable or reachable, in folders, and those that do not fit."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from PIL import Image
from transformers import AutoModelForImageTextToText

from vlm_calibration import hub
from vlm_calibration.models.adapters import load_adapters
from vlm_calibration.models.base import (
    CONFIG,
    FACTS,
    BaseModel,
    base_of_adapter,
    base_of_adapters,
    find_adapter,
)
from vlm_calibration.records import DataError

from .command_line import ERROR, Arguments, Patch, Run
from .demo.architecture import build_model

pytestmark = pytest.mark.slow

NOWHERE = "http://127.0.0.1:9"
"""An address without a server, which refuses connections at once."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ADDRESS = rf"(?:/api/models)?/([\w-]+/[\w-]+)(?:/(revision|tree|resolve)/(?:main|v2|{COMMIT}))?(?:/(.+))?"
"""Of a repository on the Hub, of the list of its files, or of a file."""
Visit = Callable[[str], None]
Serve = Callable[[str, Path], str]
NewAdapter = Callable[..., str]


@pytest.fixture
def visit(monkeypatch: Patch, tmp_path: Path) -> Iterator[Visit]:
    """Function that makes an address the Hub of this process; the cache is empty at first."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache/hub"))

    def at(address: str) -> None:
        hub._why_offline.cache_clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        files = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)

    yield at
    hub._why_offline.cache_clear()


def test_out_of_reach_is_one_line_at_once(call: Run, visit: Visit, fit: Arguments, tmp_path: Path) -> None:
    visit(NOWHERE)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    began = time.monotonic()
    base = "--model.init_args.base.name_or_path"
    for name, *command in (
        ("org/model", "ask", "a.png", "A dog?", "--base"),
        ("org/adapter", "ask", "a.png", "A dog?", "--adapter"),
        ("org/model", *fit(), "--data.workers", "0", base),
    ):
        ended = call(*command, name)
        assert name in ended.error()
        assert f"there is no such folder, {NOWHERE} cannot be reached (Connection refused)" in ended.error()
        assert f"it is not in the cache {tmp_path}/cache/hub" in ended.error()
        assert ended.err == f"{ERROR}{ended.error()}\n", "no retries"
    assert time.monotonic() - began < 60, "five retries per file take longer even on an idle machine"


def test_what_is_no_name_on_the_hub_is_a_folder_that_is_missing() -> None:
    message = "there is no such folder, and a name on the Hub has the form owner/model"
    for name in ("a/b/c", "/no/such/folder", "./none", "a b"):
        with pytest.raises(DataError, match=message), hub.loading("a model", name):
            raise OSError("not found")


def test_a_proxy_is_left_to_reach_the_hub(visit: Visit, monkeypatch: Patch) -> None:
    visit(NOWHERE)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert hub._why_offline() is None
    assert not constants.HF_HUB_OFFLINE


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves folders as repositories of the Hub, each at one commit; returns the address."""
    repositories: dict[str, Path] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def do_GET(self, body: bool = True) -> None:
            match = re.fullmatch(ADDRESS, self.path.split("?")[0])
            folder = repositories.get(match[1]) if match else None
            if match is None or folder is None:
                self._answer(b"{}", body, "RepoNotFound")
            elif match[2] == "resolve":
                is_there = (folder / match[3]).is_file()
                content = (folder / match[3]).read_bytes() if is_there else b"{}"
                self._answer(content, body, "" if is_there else "EntryNotFound")
            else:
                files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
                names = [{"rfilename": name} for name in files]
                info = {"id": match[1], "modelId": match[1], "sha": COMMIT, "siblings": names}
                sizes = {name: {"size": len(c), "oid": _digest(c)} for name, c in files.items()}
                tree = [{"type": "file", "path": name, **size} for name, size in sizes.items()]
                self._answer(json.dumps(tree if match[2] == "tree" else info).encode(), body)

        def _answer(self, content: bytes, body: bool, error: str = "") -> None:
            self.send_response(404 if error else 200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{_digest(content)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def serving(name: str, folder: Path) -> str:
            repositories[name] = folder
            return f"http://127.0.0.1:{server.server_port}"

        yield serving
        server.shutdown()
        thread.join()


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def test_an_adapter_by_its_name_on_the_hub(
    call: Run, visit: Visit, serve: Serve, new_adapter: NewAdapter, tmp_path: Path
) -> None:
    """Answers equal those of the adapter's folder, also with only the cache."""
    adapter = new_adapter(5)
    address = serve("org/mine", Path(adapter))
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    command = ("ask", "a.png", "A dog?", "--json", "--max-new-tokens", "5", "--adapter")
    answers = []
    names = {adapter: NOWHERE, "org/mine": address, "org/mine@v2": address}
    for name, endpoint in (*names.items(), ("org/mine", NOWHERE)):
        visit(endpoint)
        ended = call(*command, name).checked()
        answers.append({**json.loads(ended.out), "model": None})
    assert answers == 4 * [answers[0]]
    visit(address)
    assert call(*command, "org/none").error().startswith("no adapter at org/none ")


def test_a_repository_without_an_adapter(visit: Visit, serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    visit(serve("org/bare", tmp_path))
    with pytest.raises(DataError, match=f"^no adapter at org/bare: the repository .* has no {CONFIG}$"):
        find_adapter("org/bare")


def test_a_folder_goes_before_the_hub(new_adapter: NewAdapter, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(new_adapter(1), "runs/sft/adapter")
    for name in ("runs/sft", "runs/sft/adapter"):
        assert find_adapter(name) == Path("runs/sft/adapter")
    Path("runs/empty").mkdir()
    with pytest.raises(DataError, match="no adapter at runs/empty .*: train one first$"):
        find_adapter("runs/empty")


def test_the_base_is_loaded_as_in_training(new_adapter: NewAdapter, model_folder: str) -> None:
    folder = Path(new_adapter(1))
    assert base_of_adapter(folder) == BaseModel(model_folder)
    for card in ({}, {"quantization": "nf4"}, {"dtype": "bfloat16", "quantization": "none"}):
        (folder / FACTS).write_text(json.dumps(card))
        assert base_of_adapter(folder) == BaseModel(model_folder, **card)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (CONFIG, "{", ":1: not JSON: "),
        (CONFIG, "[]", ": expected a JSON object"),
        (CONFIG, "{}", ": the configuration names no base model"),
        (FACTS, '{"dtype": "bf16"}', ": dtype must be one of auto, float32, bfloat16"),
    ],
)
def test_an_invalid_file_of_an_adapter_is_named(
    new_adapter: NewAdapter, file: str, content: str, message: str
) -> None:
    path = Path(new_adapter(1)) / file
    path.write_text(content)
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}{message}')}"):
        base_of_adapter(path.parent)


def test_adapters_agree_on_one_base(new_adapter: NewAdapter) -> None:
    """An adapter without a card matches any dtype; adapters with different cards do not match."""
    one, two, three = (Path(new_adapter(seed)) for seed in (1, 2, 3))
    (two / FACTS).write_text('{"dtype": "bfloat16"}')
    assert base_of_adapters({"one": str(one), "two": str(two)}).dtype == "bfloat16"
    with pytest.raises(DataError, match=r"^no base model: give model.init_args.base.name_or_path"):
        base_of_adapters({})
    for card, message in (
        ('{"dtype": "float32"}', r"'two' and 'three' .* \(bfloat16\) and .* \(float32\)"),
        ('{"dtype": "bfloat16", "quantization": "nf4"}', r"\(bfloat16\) and .* \(bfloat16, nf4\)"),
    ):
        (three / FACTS).write_text(card)
        with pytest.raises(DataError, match=message):
            base_of_adapters({"one": str(one), "two": str(two), "three": str(three)})
    (three / FACTS).unlink()
    config = json.loads((three / CONFIG).read_text())
    (three / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "another"}))
    with pytest.raises(DataError, match=r"^the adapters 'one' and 'three' .* \(auto\) and another \(auto\)"):
        base_of_adapters({"one": str(one), "three": str(three)})


def test_an_adapter_of_another_base_model(new_adapter: NewAdapter, model_folder: str) -> None:
    adapter, config = new_adapter(1), build_model().config
    config.text_config.hidden_size *= 2
    wider = AutoModelForImageTextToText.from_config(config)
    wider.name_or_path = "wider"
    message = (
        f"the adapter at {adapter} does not fit the base model wider: .*; its base model is {model_folder}: "
    )
    with pytest.raises(DataError, match=f"^{message}"):
        load_adapters(wider, {"one": adapter})
