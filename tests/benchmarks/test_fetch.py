"""Fetching POPE and AMBER from a server on this machine: whole files, wrong files, missing files, no server, interruptions."""

from __future__ import annotations

import hashlib
import io
import json
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from vlm_calibration.benchmarks import download, published
from vlm_calibration.benchmarks.download import FetchReport, RemoteFile, fetch_files, read_digests
from vlm_calibration.benchmarks.published import Addresses, BenchmarkName, fetch_benchmark, how_to_place
from vlm_calibration.commands.data_fetch import fetch
from vlm_calibration.data.sources.benchmark import AmberSource, PopeSource
from vlm_calibration.errors import CommandError
from vlm_calibration.records import DataError

KINDS = ("random", "popular", "adversarial")


@dataclass
class Site:
    """A server of files, whose answers tests can spoil.

    Attributes:
        files: path -> content.
        fail: path -> number of answers with status 503 before the right one.
        cut: paths whose content ends early.
        headers: path -> further headers.
        asked: paths in the order of requests.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    fail: dict[str, int] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "AmazonS3", ""

        def version_string(self) -> str:
            return self.server_version

        def do_GET(self) -> None:
            site.asked.append(self.path)
            if site.fail.get(self.path, 0) > 0:
                site.fail[self.path] -= 1
                self.send_error(503)
            elif self.path not in site.files:
                self.send_error(404)
            else:
                content = site.files[self.path]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                for name, value in site.headers.get(self.path, {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if self.path in site.cut else content)

        def log_message(self, *args: Any) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.01)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield site
    server.shutdown()
    server.server_close()


def _jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (seed, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def _image(number: int) -> str:
    return f"COCO_val2014_{number:012d}.jpg"


@pytest.fixture
def benchmarks(site: Site, monkeypatch: pytest.MonkeyPatch) -> Addresses:
    """Small POPE and AMBER: image 3 is in both of POPE's question files."""

    def question(i: int, number: int) -> dict[str, Any]:
        return {
            "question_id": i,
            "image": _image(number),
            "text": "Is there a dog in the image?",
            "label": "no",
        }

    coco = "".join(json.dumps(question(i, n)) + "\n" for i, n in enumerate((1, 2, 3))).encode()
    aokvqa = json.dumps([question(i, n) for i, n in enumerate((3, 4))]).encode()
    queries = json.dumps([{"id": i, "image": f"AMBER_{i}.jpg", "query": "Is it?"} for i in (1, 2)]).encode()
    truths = json.dumps([{"id": i, "type": "relation", "truth": "no"} for i in (1, 2)]).encode()
    for kind in KINDS:
        site.files[f"/pope/output/coco/coco_pope_{kind}.json"] = coco
        site.files[f"/pope/output/seem/aokvqa/aokvqa_pope_seem_{kind}.json"] = aokvqa
        monkeypatch.setitem(published.COCO_QUESTIONS, kind, hashlib.sha256(coco).hexdigest())
        monkeypatch.setitem(published.AOKVQA_QUESTIONS, kind, hashlib.sha256(aokvqa).hexdigest())
    for path in published.AMBER_FILES:
        content = truths if path == "annotations.json" else queries
        site.files[f"/amber/data/{path}"] = content
        monkeypatch.setitem(published.AMBER_FILES, path, hashlib.sha256(content).hexdigest())
    for number in (1, 2, 3, 4):
        site.files[f"/coco/{_image(number)}"] = _jpeg(number)
    return Addresses(*(f"{site.address}/{name}" for name in ("pope", "amber", "coco")))


@pytest.fixture
def fetched(benchmarks: Addresses, tmp_path: Path) -> Callable[..., FetchReport]:
    def run(name: BenchmarkName = "pope", **settings: Any) -> FetchReport:
        return fetch_benchmark(name, tmp_path / "data", addresses=benchmarks, **settings)

    return run


def test_files_are_where_the_presets_read_them(
    fetched: Callable[..., FetchReport], tmp_path: Path, root: Path
) -> None:
    report = fetched()
    assert (report.missing, report.wrong, report.downloaded, len(report.digests)) == ({}, {}, 10, 10)
    data = tmp_path / "data"
    images = str(data / "coco/val2014")
    for kind in KINDS:
        assert len(PopeSource(str(data / f"pope/coco_pope_{kind}.json"), images).queries()) == 3
    settings = yaml.safe_load((root / "configs/eval/pope.yaml").read_text())["data"]
    for split in settings["test"].values():
        init = split["source"]["init_args"]
        path = init["path"].removeprefix("${data_root}/").removeprefix("data/")
        assert path in report.digests
        assert init["root"].endswith("/coco/val2014")


def test_the_list_of_digests_is_read_by_sha256sum(
    fetched: Callable[..., FetchReport], tmp_path: Path
) -> None:
    fetched()
    command = ["sha256sum", "--check", "--strict", "pope/SHA256SUMS"]
    ran = subprocess.run(command, cwd=tmp_path / "data", capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.count(": OK")) == (0, 10), ran.stderr


def test_calibration_questions_share_no_image_with_the_test(
    fetched: Callable[..., FetchReport], tmp_path: Path
) -> None:
    fetched()
    data = tmp_path / "data"
    coco = [str(data / f"pope/coco_pope_{kind}.json") for kind in KINDS]
    aokvqa, images = str(data / "pope/aokvqa_pope_random.json"), str(data / "coco/val2014")
    assert [q.image for q in PopeSource(aokvqa, images).queries()] == [_image(3), _image(4)]
    source = PopeSource(aokvqa, images, exclude=coco)
    assert [q.image for q in source.queries()] == [_image(4)]
    assert source.count(["no"]).tn == 1
    assert len(source.answer_files([("No", 0.5)])["labels.jsonl"]) == 1
    with pytest.raises(DataError, match="image of every question"):
        PopeSource(aokvqa, images, exclude=[aokvqa]).queries()
    with pytest.raises(DataError, match="nowhere"):
        PopeSource(aokvqa, images, exclude=["nowhere.json"]).queries()


def test_only_what_is_missing_is_downloaded_again(
    fetched: Callable[..., FetchReport], site: Site, tmp_path: Path
) -> None:
    fetched()
    (tmp_path / "data/coco/val2014" / _image(2)).unlink()
    site.asked.clear()
    report = fetched()
    assert site.asked == [f"/coco/{_image(2)}"]
    assert (report.downloaded, len(report.digests)) == (1, 10)


def test_an_interrupted_download_resumes(
    fetched: Callable[..., FetchReport], site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(items: Iterable[Any], name: str, *_: Any) -> Iterator[Any]:
        for item in items:
            yield item
            if "images" in name:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("vlm_calibration.benchmarks.download.track", interrupted)
        fetched(workers=1)
    data = tmp_path / "data"
    before = sorted((data / "coco/val2014").iterdir())
    assert 1 <= len(before) < 4
    assert all(path.suffix == ".jpg" for path in before)
    assert len(read_digests(data / "pope/SHA256SUMS")) >= 6
    (data / "coco/val2014/.half.jpg.1.tmp").write_bytes(b"of a process that was killed")
    report = fetched()
    assert (len(report.digests), report.missing) == (10, {})
    assert len(list((data / "coco/val2014").iterdir())) == 4


@pytest.mark.parametrize("spoil", ["another file", "html", "cut", "damaged", "gone"])
def test_a_wrong_answer_leaves_no_file(
    fetched: Callable[..., FetchReport], site: Site, tmp_path: Path, spoil: str
) -> None:
    question, image = "/pope/output/coco/coco_pope_popular.json", f"/coco/{_image(1)}"
    path = question if spoil == "another file" else image
    local = "pope/coco_pope_popular.json" if spoil == "another file" else f"coco/val2014/{_image(1)}"
    if spoil == "another file":
        site.files[path] += b" "
    elif spoil == "html":
        site.files[path] = b"<html>log in</html>"
    elif spoil == "cut":
        site.cut.add(path)
    elif spoil == "damaged":
        site.headers[path] = {"ETag": f'"{"0" * 32}"'}
    else:
        del site.files[path]
    report = fetched()
    assert list(report.missing) == [local]
    says = {"another file": "SHA-256", "html": "not an image", "cut": "ends after", "gone": "404"}
    assert says.get(spoil, "MD5") in report.missing[local]
    assert not (tmp_path / "data" / local).exists()
    assert len(report.digests) == 9
    assert site.asked.count(path) == (3 if spoil in ("cut", "damaged") else 1)


def test_tags_of_s3_are_checked_and_others_are_not(fetched: Callable[..., FetchReport], site: Site) -> None:
    path = f"/coco/{_image(1)}"
    site.headers[path] = {"ETag": f'"{hashlib.md5(site.files[path]).hexdigest()}"'}
    site.headers[f"/coco/{_image(2)}"] = {"ETag": f'"{"0" * 32}-2"'}
    assert fetched().missing == {}


def test_a_server_that_is_busy_is_asked_again(fetched: Callable[..., FetchReport], site: Site) -> None:
    site.fail[f"/coco/{_image(1)}"] = 2
    assert fetched().missing == {}
    assert site.asked.count(f"/coco/{_image(1)}") == 3


@pytest.mark.parametrize("published_digest", [True, False])
def test_a_file_of_ones_own_is_named_and_stays(
    fetched: Callable[..., FetchReport], tmp_path: Path, published_digest: bool
) -> None:
    fetched()
    local = "pope/coco_pope_random.json" if published_digest else f"coco/val2014/{_image(4)}"
    path = tmp_path / "data" / local
    path.write_bytes(_jpeg(99))
    for settings in ({}, {"download": False}):
        report = fetched(**settings)
        assert list(report.wrong) == [local]
        assert path.read_bytes() == _jpeg(99)


def test_without_a_network_the_places_are_named(
    tmp_path: Path, benchmarks: Addresses, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    addresses = Addresses(nowhere, nowhere, nowhere)
    report = fetch_benchmark("amber", tmp_path, addresses=addresses)
    assert len(report.missing) == 13
    places = "\n".join(how_to_place("amber", tmp_path, report))
    for place in ("amber/annotations.json", "pope/aokvqa_pope_random.json", "coco/val2014/", "amber/image/"):
        assert f"{tmp_path / place}" in places
    many = [RemoteFile(f"{i}.jpg", f"{nowhere}/{i}.jpg") for i in range(100)]
    attempts: list[str] = []
    monkeypatch.setattr(
        download, "urlopen", lambda url, timeout: (attempts.append(url), (_ for _ in ()).throw(OSError("no")))
    )
    report = FetchReport()
    fetch_files(many, tmp_path, {}, report, workers=1)
    assert len(report.missing) == 100
    assert len(attempts) == download.ATTEMPTS * download.GIVEN_UP, "the server is given up"


def test_amber_images_are_placed_by_hand_and_verified(
    fetched: Callable[..., FetchReport], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    report = fetched("amber")
    assert sorted(report.missing) == ["amber/image/AMBER_1.jpg", "amber/image/AMBER_2.jpg"]
    assert report.wrong == {}
    (data / "amber/image").mkdir()
    (data / "amber/image/AMBER_1.jpg").write_bytes(_jpeg(1))
    (data / "amber/image/AMBER_2.jpg").write_bytes(b"<html>sign in</html>")
    report = fetched("amber", download=False)
    assert list(report.wrong) == ["amber/image/AMBER_2.jpg"]
    (data / "amber/image/AMBER_2.jpg").write_bytes(_jpeg(2))
    report = fetched("amber", download=False)
    assert (report.missing, report.wrong) == ({}, {})
    source = AmberSource(
        str(data / "amber/query/query_discriminative.json"),
        str(data / "amber/annotations.json"),
        str(data / "amber/image"),
    )
    assert len(source.queries()) == 2


def test_the_command_verifies_and_fails_on_what_is_missing(
    fetched: Callable[..., FetchReport], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched()
    fetch("pope", data_root=tmp_path / "data", check=True)
    assert "10 files verified" in capsys.readouterr().out
    (tmp_path / "data/coco/val2014" / _image(1)).unlink()
    with pytest.raises(CommandError) as caught:
        fetch("pope", data_root=tmp_path / "data", check=True)
    assert caught.value.status == 1
    out = capsys.readouterr().out
    assert f"{tmp_path}/data/coco/val2014/{_image(1)}: not downloaded yet" in out
    assert f"{tmp_path}/data/coco/val2014/: images of COCO's val2014" in out


def test_a_broken_list_of_digests_is_named(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  a.jpg\nno\n")
    with pytest.raises(DataError, match=r"SHA256SUMS:2: expected"):
        read_digests(tmp_path / "SHA256SUMS")
