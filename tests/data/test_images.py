"""Decoding: what every kind of file becomes, and what is said of those that cannot be read."""

import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.data import open_source
from fastdino.data.images import Unreadable, read_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def save(path: Path, image: Image.Image | np.ndarray | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(RGB) if image is None else image
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    image = read_image(str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


def gray(x: np.ndarray) -> np.ndarray:
    return np.stack([x] * 3, -1)


# --- pixels


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp", "a.gif.png"])
def test_rgb_files_keep_every_pixel(tmp_path, name):
    options = {"lossless": True} if name.endswith("webp") else {}
    np.testing.assert_array_equal(pixels(save(tmp_path / name, **options)), RGB)


def test_a_jpeg_is_what_pillow_decodes(tmp_path):
    path = save(tmp_path / "a.jpg")
    np.testing.assert_array_equal(pixels(path), np.asarray(Image.open(path)))


def test_a_file_with_another_format_s_name_is_read(tmp_path):
    save(tmp_path / "a.png").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(pixels(tmp_path / "a.jpg"), RGB)
    save(tmp_path / "b.gif", Image.fromarray(GRAY)).rename(tmp_path / "b.jpg")
    np.testing.assert_array_equal(pixels(tmp_path / "b.jpg"), gray(GRAY))


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif"])
def test_gray_is_repeated(tmp_path, name):
    np.testing.assert_array_equal(pixels(save(tmp_path / name, GRAY)), gray(GRAY))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_alpha_is_dropped_and_the_colours_under_it_show(tmp_path, name):
    options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    path = save(tmp_path / name, np.dstack([RGB, GRAY]), **options)
    np.testing.assert_array_equal(pixels(path), RGB)


def test_alpha_of_gray_and_a_transparent_colour_are_dropped(tmp_path):
    la = Image.merge("LA", (Image.fromarray(GRAY), Image.fromarray(GRAY.T.copy()).resize((9, 6))))
    np.testing.assert_array_equal(pixels(save(tmp_path / "la.png", la)), gray(GRAY))
    path = save(tmp_path / "trns.png", transparency=tuple(int(c) for c in RGB[0, 0]))
    np.testing.assert_array_equal(pixels(path), RGB)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(0, 240, 24))], ids=["none", "one", "each"])
@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_a_palette_is_looked_up_with_and_without_transparency(tmp_path, name, transparency):
    if name == "a.gif" and isinstance(transparency, bytes):
        transparency = None
    colours = RNG.integers(0, 256, (10, 3), dtype=np.uint8)
    index = RNG.integers(0, 10, (6, 9), dtype=np.uint8)
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(pixels(save(tmp_path / name, image, **options)), colours[index])


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif"])
def test_one_bit_is_black_and_white(tmp_path, name):
    path = save(tmp_path / name, Image.fromarray(GRAY > 99))
    np.testing.assert_array_equal(pixels(path), gray(np.where(GRAY > 99, 255, 0)))


def test_cmyk_becomes_rgb(tmp_path):
    cmyk = RNG.integers(0, 256, (6, 9, 4), dtype=np.uint8)
    expected = (255 - cmyk[..., :3].astype(float)) * (255 - cmyk[..., 3:].astype(float)) / 255
    path = save(tmp_path / "a.tif", Image.frombytes("CMYK", (9, 6), cmyk.tobytes()))
    np.testing.assert_allclose(pixels(path), expected, atol=1)
    flat = Image.new("CMYK", (16, 16), (20, 200, 90, 40))
    path = save(tmp_path / "a.jpg", flat, quality=100)
    np.testing.assert_allclose(pixels(path)[8, 8], [198, 46, 139], atol=3)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, name):
    x = (
        np.concatenate([RNG.integers(0, 65536, 50), [0, 128, 129, 257, 65535]])
        .astype(np.uint16)
        .reshape(5, 11)
    )
    expected = np.floor(x / 257 + 0.5)
    np.testing.assert_array_equal(pixels(save(tmp_path / name, x)), gray(expected))


def test_big_endian_16_bit_tiff_is_scaled(tmp_path):
    x = RNG.integers(0, 65536, (6, 9)).astype(">u2")
    image = Image.frombytes("I;16B", (9, 6), x.tobytes())
    np.testing.assert_array_equal(pixels(save(tmp_path / "a.tif", image)), gray(np.floor(x / 257 + 0.5)))


def test_wider_integers_are_scaled_as_16_bit_or_stretched(tmp_path):
    x = RNG.integers(0, 65536, (6, 9)).astype(np.int32)
    np.testing.assert_array_equal(pixels(save(tmp_path / "a.tif", x)), gray(np.floor(x / 257 + 0.5)))
    x = RNG.integers(-(10**6), 10**6, (6, 9)).astype(np.int32)
    expected = np.rint((x - x.min()) / (x.max() - x.min()) * 255)
    np.testing.assert_array_equal(pixels(save(tmp_path / "b.tif", x)), gray(expected))


def test_floats_within_0_and_1_are_scaled_and_others_stretched(tmp_path):
    x = RNG.uniform(0.2, 0.7, (6, 9)).astype(np.float32)
    np.testing.assert_array_equal(pixels(save(tmp_path / "a.tif", x)), gray(np.rint(x.astype(float) * 255)))
    x = RNG.uniform(-300, 4000, (6, 9)).astype(np.float32)
    x[0, 0], x[0, 1], x[0, 2] = np.nan, np.inf, -np.inf
    y = np.where(np.isfinite(x), x, np.nan).astype(float)
    low, high = np.nanmin(y), np.nanmax(y)
    y[0, :3] = low, high, low
    expected = np.rint((y - low) * (255 / (high - low)))
    np.testing.assert_array_equal(pixels(save(tmp_path / "b.tif", x)), gray(expected))


@pytest.mark.parametrize("value", [7.0, np.nan], ids=str)
def test_a_float_image_of_one_value_or_none_is_black(tmp_path, value):
    path = save(tmp_path / "a.tif", np.full((6, 9), value, np.float32))
    np.testing.assert_array_equal(pixels(path), np.zeros((6, 9, 3)))


def stored(x: np.ndarray, orientation: int) -> np.ndarray:
    """How an upright image lies in a file of that orientation (TIFF 6.0, tag 274)."""
    return {
        1: x,
        2: x[:, ::-1],
        3: x[::-1, ::-1],
        4: x[::-1],
        5: x.swapaxes(0, 1),
        6: x.swapaxes(0, 1)[::-1],
        7: x.swapaxes(0, 1)[::-1, ::-1],
        8: x.swapaxes(0, 1)[:, ::-1],
    }[orientation]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    coarse = np.kron(RGB[:2, :3] // 2 * 2, np.ones((16, 16, 1), np.uint8))
    options = {"quality": 100, "subsampling": 0} if name == "a.jpg" else {}
    options |= {"lossless": True} if name == "a.webp" else {}
    x = np.ascontiguousarray(stored(coarse, orientation))
    got = pixels(save(tmp_path / name, x, exif=exif, **options))
    np.testing.assert_allclose(got.astype(int), coarse, atol=4 if name == "a.jpg" else 0)


def test_broken_exif_does_not_make_an_image_unreadable(tmp_path):
    path = save(tmp_path / "a.png", exif=b"Exif\0\0no TIFF header")
    with pytest.raises(SyntaxError), Image.open(path) as image:
        image.getexif()
    np.testing.assert_array_equal(pixels(path), RGB)


def test_the_first_frame_of_an_animation_or_pages_is_taken(tmp_path):
    frames = [Image.fromarray(255 - RGB)]
    for name in ("a.png", "a.tif", "a.webp"):
        options = {"lossless": True} if name == "a.webp" else {}
        path = save(tmp_path / name, save_all=True, append_images=frames, **options)
        np.testing.assert_array_equal(pixels(path), RGB)


# --- what cannot be read


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.tif", "lzw.tif", "jpeg.tif"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_truncated_file_is_unreadable_and_quiet(tmp_path, name, share, capfd):
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    options = {"lzw.tif": {"compression": "tiff_lzw"}, "jpeg.tif": {"compression": "jpeg"}}.get(name, {})
    path = save(tmp_path / name, noise, **options)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(Unreadable) as caught:
        read_image(str(path))
    assert caught.value.path == str(path)
    assert caught.value.reason
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert capfd.readouterr() == ("", "")


def test_an_empty_file_is_unreadable(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(Unreadable, match=r"a\.jpg: empty file"):
        read_image(str(tmp_path / "a.jpg"))


@pytest.mark.parametrize(
    "content", [b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\xff\xd8\xff"]
)
def test_a_file_that_is_no_image_is_unreadable(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(Unreadable, match=r"a\.jpg: not a JPEG, PNG, WebP, BMP, TIFF or GIF image"):
        read_image(str(tmp_path / "a.jpg"))


def test_a_decompression_bomb_is_unreadable(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    with pytest.raises(Unreadable, match=r"a\.png: more than 178,956,970 pixels"):
        read_image(str(tmp_path / "a.png"))


def test_an_image_that_pillow_only_warns_about_is_read_quietly(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # 54 pixels: over it, under twice
    np.testing.assert_array_equal(pixels(save(tmp_path / "a.png")), RGB)


def test_a_folder_in_an_image_s_place_is_unreadable(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(Unreadable, match=r"a\.png: is a directory"):
        read_image(str(tmp_path / "a.png"))


def test_unreadable_pickles():
    error = pickle.loads(pickle.dumps(Unreadable("a.png", "truncated")))
    assert (error.path, error.reason, str(error)) == ("a.png", "truncated", "a.png: truncated")


def test_heic_is_read_where_its_library_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (40, 30), (200, 60, 20))
    image.save(tmp_path / "a.heic", quality=100)
    source = open_source(str(tmp_path))
    assert source.load(0).size == source.size(0) == (40, 30)
    assert np.abs(np.asarray(source.load(0)).astype(int) - np.asarray(image)).max() <= 4
