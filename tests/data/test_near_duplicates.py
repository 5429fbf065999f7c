"""The search for nearly equal images, against made copies and all pairs; and images that splits share, and which may."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance
from sklearn.datasets import load_sample_images

from vlm_calibration.commands.data import inspect
from vlm_calibration.data import near_duplicates
from vlm_calibration.data.near_duplicates import ImageHash, Leak, find_leaks, group_images, hash_image
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.data.sources.parquet import ParquetSource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.errors import CommandError
from vlm_calibration.perturbation.images import load_image
from vlm_calibration.records import DataError

from ..command_line import Capture, instance
from .conftest import Write, encode, pattern, record

PHOTOS = [Image.fromarray(pixels) for pixels in load_sample_images().images]


def _crops(n: int) -> list[Image.Image]:
    """Parts of two photographs, between a third and two thirds of their sides, at least 40 pixels apart."""
    rng = np.random.default_rng(0)
    crops, corners = [], set()
    while len(crops) < n:
        photo = PHOTOS[len(crops) % 2]
        width, height = int(photo.width * rng.uniform(0.3, 0.6)), int(photo.height * rng.uniform(0.3, 0.6))
        x, y = int(rng.integers(photo.width - width)), int(rng.integers(photo.height - height))
        corner = (len(crops) % 2, x // 40, y // 40, width // 60, height // 60)
        if corner not in corners:
            corners.add(corner)
            crops.append(photo.crop((x, y, x + width, y + height)))
    return crops


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "quality 30": lambda image: encode(image, "JPEG", quality=30),
    "png": encode,
    "half": lambda image: encode(image.resize((image.width // 2, image.height // 2)), "JPEG", quality=85),
    "square": lambda image: encode(image.resize((336, 336)), "JPEG"),
    "brighter": lambda image: encode(ImageEnhance.Brightness(image).enhance(1.05), "JPEG"),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_of_a_photograph_are_found(copy: str) -> None:
    images = _crops(12)
    hashes = [hash_image(encode(image, "JPEG", quality=92)) for image in images]
    copies = [hash_image(COPIES[copy](image)) for image in images]
    labels = group_images(hashes + copies, near=True)
    assert labels[:12].tolist() == labels[12:].tolist()
    assert len(set(labels.tolist())) == 12


def _page(seed: int) -> Image.Image:
    """Paragraphs of grey words on white."""
    rng = random.Random(seed)
    image = Image.new("L", (300, 400), "white")
    draw, y = ImageDraw.Draw(image), 20
    for _ in range(rng.randint(2, 6)):
        for _ in range(rng.randint(2, 9)):
            x, end = 20, rng.randint(140, 280)
            while x < end:
                width = rng.randint(6, 40)
                draw.rectangle((x, y, min(x + width, end), y + 4), 90)
                x += width + 4
            y += 7
        y += 10
    return image.convert("RGB")


def _still_life(seed: int) -> Image.Image:
    """Discs of random colours before one background."""
    rng = np.random.default_rng(seed)
    shade = np.linspace(90, 170, 240).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(shade[:, None, None], (240, 320, 3)).copy())
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(3, 11)):
        radius, x, y = int(rng.integers(6, 23)), int(rng.integers(40, 280)), int(rng.integers(60, 210))
        colour = tuple(int(v) for v in rng.integers(20, 230, 3))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image


@pytest.mark.parametrize("make", [_page, _still_life])
def test_other_images_of_one_kind_are_told_apart(make: Callable[[int], Image.Image]) -> None:
    """Pages of text agree in their hashes; pictures with one background agree but for small objects."""
    labels = group_images([hash_image(np.asarray(make(i))) for i in range(150)], near=True)
    assert np.bincount(labels).max() <= 2
    assert len(set(labels.tolist())) >= 147
    if make is _still_life:
        for image in map(make, range(8)):
            more = image.copy()
            ImageDraw.Draw(more).ellipse((20, 20, 44, 44), fill=(230, 40, 30))
            hashes = [hash_image(np.asarray(i)) for i in (image, more)]
            assert len(set(group_images(hashes, near=True).tolist())) == 2, "one more small object"


def _by_all_pairs(bits: np.ndarray, copies: np.ndarray) -> set[frozenset[int]]:
    """Groups of more than one, by comparing every pair."""
    groups = {i: {i} for i in range(len(bits))}
    flat = copies.reshape(len(copies), -1).astype(float)
    for i, j in combinations(range(len(bits)), 2):
        difference = np.abs(flat[i] - flat[j])
        if (
            bin(int(bits[i] ^ bits[j])).count("1") <= near_duplicates.MAX_BITS
            and difference.mean() <= near_duplicates.MAX_MEAN
            and difference.max() <= near_duplicates.MAX_PIXEL
            and np.corrcoef(flat[i], flat[j])[0, 1] >= near_duplicates.MIN_CORRELATION
        ):
            merged = groups[i] | groups[j]
            groups |= dict.fromkeys(merged, merged)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
@settings(max_examples=40)
def test_the_search_finds_what_all_pairs_show(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    originals = rng.integers(0, 2**64, 4, dtype=np.uint64)
    bits = originals[rng.integers(0, 4, n)]
    for _ in range(7):
        flipped = np.uint64(1) << rng.integers(0, 64, n).astype(np.uint64)
        bits = bits ^ np.where(rng.random(n) < 0.6, flipped, np.uint64(0))
    looks = rng.integers(60, 200, (2, 24, 24, 3))
    copies = (looks[rng.integers(0, 2, n)] + rng.integers(-3, 4, (n, 24, 24, 3))).astype(np.uint8)
    labels = near_duplicates.near_groups(bits, copies)
    found = {frozenset(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())}
    assert {group for group in found if len(group) > 1} == _by_all_pairs(bits, copies)


def test_many_images_are_searched_in_seconds() -> None:
    """12,000 hashes with the correlations of photographs, and a film of nearly equal frames."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(12_000, 8)) @ rng.normal(size=(8, 64)) * 0.35 + rng.normal(size=(12_000, 64))
    bits = np.packbits(values > 0, axis=1).view(">u8")[:, 0].astype(np.uint64)
    copies = rng.integers(0, 256, (12_000, 24, 24, 3), dtype=np.uint8)
    film = rng.integers(60, 200, (24, 24, 3))
    copies[:2000] = film + rng.integers(-3, 4, (2000, 24, 24, 3))
    bits[:2000] = bits[0] ^ np.uint64(1) << rng.integers(0, 64, 2000).astype(np.uint64)
    labels = near_duplicates.near_groups(bits, copies)
    assert len(set(labels[:2000].tolist())) == 1
    assert len(set(labels.tolist())) == 10_001


def test_results_are_in_order_and_name_what_cannot_be_read(write_jsonl: Write) -> None:
    folder = write_jsonl().parent
    for i, image in enumerate(_crops(24)):
        image.save(folder / f"{i}.jpg")
    source = JsonlSource(str(write_jsonl(*(record(str(i), image=f"{i}.jpg") for i in range(24)))))
    queries = source.queries()
    (folder / "7.jpg").write_bytes((folder / "7.jpg").read_bytes()[:300])
    (folder / "9.jpg").unlink()
    results = near_duplicates.hash_images([(source, query) for query in queries])
    for i, result in enumerate(results):
        assert isinstance(result, str) is (i in (7, 9))
        if isinstance(result, ImageHash):
            assert result.digest == hash_image((folder / f"{i}.jpg").read_bytes()).digest
    assert "9.jpg" in str(results[9])
    groups = group_images(results, near=True)
    assert [i for i, group in enumerate(groups) if group < 0] == [7, 9]
    order = random.Random(0).sample(range(24), 24)
    again = group_images([results[i] for i in order], near=True)
    assert again.tolist() == groups[order].tolist(), "whatever the order of the images"


@pytest.mark.parametrize("kind", ["upright", "turned", "grey", "cmyk", "alpha", "small"])
def test_a_reduced_image_shows_the_whole_image(tmp_path: Path, kind: str) -> None:
    photo, exif = PHOTOS[0], Image.Exif()
    if kind == "turned":
        exif[0x0112] = 6
    if kind == "small":
        photo = photo.resize((50, 30))
    path = tmp_path / ("photo.png" if kind == "alpha" else "photo.jpg")
    photo.convert({"grey": "L", "cmyk": "CMYK", "alpha": "RGBA"}.get(kind, "RGB")).save(path, exif=exif)
    whole, reduced = load_image(path), load_image(path, least=100)
    assert reduced.dtype == np.uint8
    assert min(reduced.shape[:2]) >= min(100, *whole.shape[:2])
    if kind not in ("alpha", "small"):
        assert reduced.size < whole.size / 3
    a, b = (np.asarray(Image.fromarray(i).resize((8, 8), Image.Resampling.BOX)) for i in (whole, reduced))
    assert np.abs(a.astype(int) - b).mean() < 3


# --- Images that splits share -----------------------------------------------------------------------------------------


WriteSource = Callable[..., JsonlSource]


@pytest.fixture
def write(tmp_path: Path) -> WriteSource:
    """Write NAME.jsonl about images beside it; those that do not exist are made, image N.png from seed N."""

    def source(name: str, *images: str) -> JsonlSource:
        path = tmp_path / f"{name}.jsonl"
        for image in images:
            if not (path.parent / image).exists():
                pattern(int(image.removesuffix(".png"))).save(path.parent / image)
        rows = (record(str(i), image=image) for i, image in enumerate(images))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return JsonlSource(str(path))

    return source


def _leaks(**sources: QuerySource) -> near_duplicates.LeakReport:
    return find_leaks({f"data.{name.replace('__', '.')}": s for name, s in sources.items()})


def test_each_image_counts_for_its_closest_kind(write: WriteSource, tmp_path: Path) -> None:
    train = write("train", *(f"{i}.png" for i in range(10)))
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    pattern(2).resize((96, 72)).save(tmp_path / "again.jpg", quality=80)
    test = write("test", "20.png", "0.png", "copy.png", "again.jpg", "21.png", "1.png")
    report = _leaks(train=train, test__clean=test)
    assert report.images == {"train": 10, "test": 6}
    assert report.leaks == (
        Leak("same file", "train", "test", 2, ("0.png", "1.png")),
        Leak("same content", "train", "test", 1, ("1.png = copy.png",)),
        Leak("near-identical", "train", "test", 1, ("2.png = again.jpg",)),
    )


def test_splits_of_one_role_may_share(write: WriteSource) -> None:
    sources = {
        name: write(name.replace("__", "-"), "1.png", "2.png")
        for name in ("levels", "calibration__a", "calibration__b", "predict")
    }
    tests = {name: write(name, "3.png") for name in ("test__random", "test__popular")}
    report = _leaks(**sources, **tests)
    assert report.images == {"calibration": 2, "test": 1}
    assert report.leaks == ()
    roles = ("train", "validation", "teacher", "calibration", "test")
    report = _leaks(**{role: write(role, "1.png") for role in roles})
    assert [(leak.first, leak.second) for leak in report.leaks] == list(combinations(roles, 2))


def _parquet(path: Path, seeds: Iterable[int]) -> ParquetSource:
    """A file with embedded images."""
    contents = (encode(pattern(seed)) for seed in seeds)
    rows = [record(str(i), image={"bytes": content, "path": None}) for i, content in enumerate(contents)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return ParquetSource(str(path))


def test_embedded_images_are_compared_by_content_not_by_row(tmp_path: Path) -> None:
    train, test = _parquet(tmp_path / "train.parquet", [1, 2, 3]), _parquet(tmp_path / "t.parquet", [4, 5, 3])
    [leak] = _leaks(train=train, test=test).leaks
    assert leak == Leak("same content", "train", "test", 1, ("row-2 = row-2",))
    [leak] = _leaks(train=train, validation=ParquetSource(str(tmp_path / "train.parquet"))).leaks
    assert (leak.kind, leak.images) == ("same file", 3)


def test_regions_of_other_sources_and_drawn_images(write: WriteSource, tmp_path: Path) -> None:
    images = write("all", "1.png", "2.png", "3.png")
    rows = pa.Table.from_pylist([record(i, image=f"{i}.png") for i in "12"])
    pq.write_table(rows, tmp_path / "regions.parquet")
    train = ParquetSource(str(tmp_path / "regions.parquet"), images=images)
    report = _leaks(train=train, test=images)
    assert [(leak.kind, leak.images) for leak in report.leaks] == [("same file", 2)]
    demo = _leaks(train=DemoSource("train", scenes=40), test=DemoSource("test", scenes=40))
    assert demo == near_duplicates.LeakReport({"train": 40, "test": 40}, (), {})


def test_an_image_that_cannot_be_read_is_named(write: WriteSource, tmp_path: Path) -> None:
    train, test = write("train", "1.png", "2.png"), write("test", "3.png", "2.png")
    for source in (train, test):
        source.queries()
    (tmp_path / "2.png").write_bytes(b"")
    report = _leaks(train=train, test=test)
    assert list(report.unreadable) == [str(tmp_path / "2.png")]
    assert "not an image" in report.unreadable[str(tmp_path / "2.png")]
    assert [leak.kind for leak in report.leaks] == ["same file"]


@pytest.fixture
def config(tmp_path: Path, write: WriteSource) -> str:
    """train and test share image 1."""
    write("train", "1.png", "2.png")
    write("test", "1.png", "3.png")
    paths = (str(tmp_path / f"{name}.jsonl") for name in ("train", "test"))
    train, test = (instance("data.sources.jsonl.JsonlSource", path=path) for path in paths)
    data = {"train": train, "validation": test, "test": {"x": {"source": test}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return str(tmp_path / "config.yaml")


def test_the_command_reports_and_fails_only_if_strict(config: str, capsys: Capture) -> None:
    inspect("--config", config)
    assert "1 of 2" in capsys.readouterr().out
    with pytest.raises(CommandError) as caught:
        inspect("--config", config, strict=True)
    assert caught.value.status == 1
    capsys.readouterr()
    inspect("--config", config, strict=True, leaks=False)
    assert "share" not in capsys.readouterr().out


def test_missing_files_are_named_after_the_others(config: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "test.jsonl").rename(tmp_path / "test.parquet")
    with pytest.raises(DataError) as caught:
        inspect("--config", config)
    assert str(caught.value).count(f"{tmp_path}/test.jsonl") == 2
    out = capsys.readouterr().out
    assert "data.train" in out
    assert f"data.test.x: {tmp_path}/test.jsonl: no such file" in out
    assert "`--config data/parquet`" in out
