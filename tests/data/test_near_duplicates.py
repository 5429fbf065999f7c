"""The search for nearly equal images, against made copies and all pairs."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance
from sklearn.datasets import load_sample_images

from vlm_calibration.data import near_duplicates
from vlm_calibration.data.near_duplicates import ImageHash, group_images, hash_image, hash_images, near_groups
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.demo.questions import scene_seed
from vlm_calibration.demo.scenes import render_scene
from vlm_calibration.perturbation.images import load_image

PHOTOS = [Image.fromarray(pixels) for pixels in load_sample_images().images]


def _encode(image: Image.Image, kind: str = "JPEG", **settings: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


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


def _scene(index: int) -> Image.Image:
    return Image.fromarray(render_scene(scene_seed("test", index)).image)


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "quality 30": lambda image: _encode(image, quality=30),
    "png": lambda image: _encode(image, "PNG"),
    "half": lambda image: _encode(image.resize((image.width // 2, image.height // 2)), quality=85),
    "square": lambda image: _encode(image.resize((336, 336))),
    "brighter": lambda image: _encode(ImageEnhance.Brightness(image).enhance(1.05)),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_of_a_photograph_are_found(copy: str) -> None:
    images = _crops(12)
    hashes = [hash_image(_encode(image, quality=92)) for image in images]
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


@pytest.mark.parametrize("make", [_page, _still_life, _scene])
def test_other_images_of_one_kind_are_told_apart(make: Callable[[int], Image.Image]) -> None:
    """Pages of text agree in their hashes; scenes with one background agree but for small objects."""
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
    labels = near_groups(bits, copies)
    found = {frozenset(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())}
    assert {group for group in found if len(group) > 1} == _by_all_pairs(bits, copies)


def test_many_images_are_searched_in_seconds() -> None:
    """30,000 hashes with the correlations of photographs, and a film of nearly equal frames."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(30_000, 8)) @ rng.normal(size=(8, 64)) * 0.35 + rng.normal(size=(30_000, 64))
    bits = np.packbits(values > 0, axis=1).view(">u8")[:, 0].astype(np.uint64)
    copies = rng.integers(0, 256, (30_000, 24, 24, 3), dtype=np.uint8)
    film = rng.integers(60, 200, (24, 24, 3))
    copies[:2000] = film + rng.integers(-3, 4, (2000, 24, 24, 3))
    bits[:2000] = bits[0] ^ np.uint64(1) << rng.integers(0, 64, 2000).astype(np.uint64)
    labels = near_groups(bits, copies)
    assert len(set(labels[:2000].tolist())) == 1
    assert len(set(labels.tolist())) == 28_001


def test_results_are_in_order_and_name_what_cannot_be_read(write_jsonl: Callable[..., Path]) -> None:
    folder = write_jsonl().parent
    for i, image in enumerate(_crops(24)):
        image.save(folder / f"{i}.jpg")
    rows = [
        {"question": "A dog?", "answer": "Yes", "answer_type": "yes_no", "id": i, "image": f"{i}.jpg"}
        for i in range(24)
    ]
    source = JsonlSource(str(write_jsonl(*rows)))
    queries = source.queries()
    (folder / "7.jpg").write_bytes((folder / "7.jpg").read_bytes()[:300])
    (folder / "9.jpg").unlink()
    results = hash_images([(source, query) for query in queries])
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
