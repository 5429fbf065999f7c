import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_calibration.perturbation.images import ImageError, load_image, resize_image
from vlm_calibration.perturbation.masks import resize_mask

from ..data.conftest import encode


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_rgb_files_come_back_as_they_are_from_paths_and_bytes(rgb, tmp_path):
    path = tmp_path / "ünï côdé.png"
    path.write_bytes(encode(Image.fromarray(rgb)))
    for source in (path, str(path), path.read_bytes()):
        loaded = load_image(source)
        np.testing.assert_array_equal(loaded, rgb)
        assert loaded.dtype == np.uint8
        assert loaded.flags.writeable
        assert loaded.flags.c_contiguous


def palette(colours, indices):
    image = Image.new("P", (len(indices), 1))
    image.putpalette([value for colour in colours for value in colour])
    image.putdata(indices)
    return image


GREY = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
SIXTEEN = Image.fromarray(np.array([[0, 65535, 257, 128, 129, 32768]], dtype=np.uint16))
FRAMES = [Image.new("L", (1, 1), value) for value in (10, 200)]
RED, GREEN, WHITE = [255, 0, 0], [0, 255, 0], [255, 255, 255]
CONVERTED = {
    "greyscale": (encode(Image.fromarray(GREY)), np.stack([GREY] * 3, -1).tolist()),
    "one bit": (encode(Image.fromarray(GREY > 127)), np.stack([255 * (GREY > 127)] * 3, -1).tolist()),
    "palette": (encode(palette([RED, GREEN], [0, 1, 1])), [[RED, GREEN, GREEN]]),
    "transparent palette": (encode(palette([RED, GREEN], [0, 1]), transparency=0), [[WHITE, GREEN]]),
    "grey and alpha": (
        encode(Image.fromarray(np.array([[[10, 0], [10, 255]]], dtype=np.uint8), "LA")),
        [[WHITE, [10] * 3]],
    ),
    "transparent colour": (
        encode(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)), transparency=(1, 2, 3)),
        [[WHITE, [4, 5, 6]]],
    ),
    "16 bits": (encode(SIXTEEN), [[[v] * 3 for v in (0, 255, 1, 0, 1, 128)]]),
    "16 bits, TIFF": (encode(SIXTEEN, "TIFF"), [[[v] * 3 for v in (0, 255, 1, 0, 1, 128)]]),
    "frames": (encode(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), [[[10] * 3]]),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_other_files_are_converted(kind):
    data, expected = CONVERTED[kind]
    assert load_image(data).tolist() == expected


def test_alpha_is_composited_on_white(rgb):
    alpha = np.random.default_rng(1).integers(0, 256, (20, 30, 1), dtype=np.uint8)
    alpha[:5], alpha[5:10] = 0, 255
    loaded = load_image(encode(Image.fromarray(np.concatenate([rgb, alpha], axis=-1))))
    share = alpha / 255
    assert np.abs(loaded - (rgb * share + 255 * (1 - share))).max() <= 1
    assert np.all(loaded[:5] == 255)
    np.testing.assert_array_equal(loaded[5:10], rgb[5:10])


def test_cmyk_is_converted_and_what_has_no_unique_conversion_is_refused(rgb):
    red = load_image(encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(red.astype(int) - [255, 0, 0]).max() <= 3
    fits, too_many_bits = (Image.fromarray(np.array([[0, n]], dtype=np.int32)) for n in (65535, 70000))
    assert load_image(encode(fits, "TIFF")).max() == 255
    for image, pixels in (
        (Image.fromarray(rgb[..., 0].astype(np.float32), "F"), "F pixels"),
        (Image.fromarray(rgb, "LAB"), "LAB pixels"),
        (too_many_bits, "32-bit pixels outside 0..65535"),
    ):
        with pytest.raises(ImageError, match=f"x.tif: {pixels} have no unique conversion"):
            load_image(encode(image, "TIFF"), name="x.tif")


# Orientation -> the pixels as stored by a camera.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_undone(rgb, orientation):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](rgb)))
    exif = stored.getexif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(load_image(encode(stored, exif=exif)), rgb)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif",
    [
        *(b"", b"Exif\x00\x00", b"Exif\x00\x00garbage!", b"Exif\x00\x00MM\x00*\x00\x00\xff\xff"),
        b"Exif\0\0MM\0*" + struct.pack(">IHHHI4sI", 8, 1, 0x0112, 2, 3, b"up\0", 0),
        b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 17, 0, 0),
    ],
    ids=["none", "empty", "garbage", "cut", "in words", "impossible"],
)
def test_an_orientation_that_cannot_be_read_counts_as_upright(rgb, exif):
    data = encode(Image.fromarray(rgb), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    np.testing.assert_array_equal(load_image(data[:2] + segment + data[2:]), load_image(data))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_truncated_file_is_named(rgb, tmp_path, image_format):
    data = encode(Image.fromarray(np.kron(rgb, np.ones((8, 8, 1), np.uint8))), image_format)
    path = tmp_path / f"cut.{image_format.lower()}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match="replace") as error:
        load_image(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_what_is_no_image_is_said_to_be_none(data, tmp_path):
    with pytest.raises(ImageError, match=f"image of {len(data)} bytes: not an image"):
        load_image(data)
    with pytest.raises(ImageError, match="cannot be opened: Is a directory"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match=f"^{tmp_path}/absent.png: no such file; check the path"):
        load_image(tmp_path / "absent.png")


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (12000, 10000), (50_000, 50_000)])
def test_an_oversized_image_is_refused_from_its_header(width, height):
    # Decoding would fail on the missing data; the size is refused before.
    with pytest.raises(ImageError, match=r"huge\.png: .*more than the 80000000 allowed; shrink it"):
        load_image(png_header(width, height), name="huge.png")
    data = encode(Image.fromarray(GREY))
    assert load_image(data, max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(ImageError, match="30 x 20 pixels, more than the 599 allowed"):
        load_image(data, max_pixels=599)


SMALL = Image.fromarray(np.arange(300, dtype=np.uint16).astype(np.uint8).reshape(10, 10, 3))
FILES = [
    encode(SMALL, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "ICNS", "TGA")
]


@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6),
    st.integers(0, 3000),
)
@settings(max_examples=150)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_an_image_or_an_image_error(data, changes, length):
    damaged = bytearray(data)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    try:
        image = load_image(bytes(damaged[:length]), max_pixels=10_000)
    except ImageError:
        return
    assert image.dtype == np.uint8
    assert image.ndim == 3


# --- resizing


def test_resizing_an_image_keeps_smooth_content_and_copies(rgb):
    ramp = np.tile(np.linspace(0, 255, 200)[None, :, None], (100, 1, 3)).astype(np.uint8)
    small = resize_image(ramp, (50, 80))
    assert small.shape == (50, 80, 3)
    assert np.abs(small[..., 0] - np.linspace(0, 255, 80)[None]).max() < 4
    for array, resize in ((rgb, resize_image), (rgb[..., 0] > 127, resize_mask)):
        np.testing.assert_array_equal(array, resize(array, (20, 30)))
        assert not np.shares_memory(array, resize(array, (20, 30)))


@pytest.mark.parametrize(("factor_y", "factor_x"), [(2, 2), (6, 23), (6, 31), (14, 31)])
def test_exactly_half_covered_counts_whatever_the_rounding(factor_y, factor_x):
    # For 6 x 23, half of the weights sum to slightly less than 0.5 in float32.
    rng = np.random.default_rng(0)
    half = np.arange(factor_y * factor_x) < factor_y * factor_x // 2
    blocks = [[rng.permutation(half).reshape(factor_y, factor_x) for _ in range(12)]]
    assert resize_mask(np.block(blocks), (1, 12)).all()


@given(*(st.integers(1, 40) for _ in range(4)), st.sampled_from(["one pixel", 0.05, 0.5]), st.integers(0, 99))
@settings(max_examples=100)
def test_coverage_is_the_exact_area_and_no_mask_vanishes(height, width, new_height, new_width, share, seed):
    scores = np.random.default_rng(seed).random((height, width))
    mask = scores == scores.min() if share == "one pixel" else scores < share
    # On a common grid every old and new pixel is a whole block, so areas are counts.
    fine = np.kron(mask, np.ones((new_height, new_width), bool))
    areas = fine.reshape(new_height, height, new_width, width).mean(axis=(1, 3))
    expected = areas >= min(0.5, areas.max()) * (1 - 1e-5) if mask.any() else np.zeros_like(areas, bool)
    resized = resize_mask(mask, (new_height, new_width))
    np.testing.assert_array_equal(resized, expected)
    assert resized.any() == mask.any()


def test_wrong_arrays_are_refused(rgb):
    with pytest.raises(TypeError, match="image must be a uint8 array"):
        resize_image(rgb.astype(float), (5, 5))
    with pytest.raises(TypeError, match="mask must be a bool array"):
        resize_mask(rgb[..., 0].astype(float), (5, 5))
    with pytest.raises(ValueError, match=r"mask has shape \(20, 30, 3\)"):
        resize_mask(rgb, (5, 5))
