"""Sources: which files of a folder or list are images, their labels, and what every kind of file becomes."""

import hashlib
import os
import pickle
import random
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.data import Unreadable, open_source
from fastdino.data.images import decode_image, read_image
from fastdino.data.sources import Files, Source, epoch_order

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


def names(source: Source) -> list[str]:
    return [os.path.relpath(source.path(i), source.root) for i in range(len(source))]


# --- folders


def test_a_folder_is_searched_at_any_depth_sorted_and_without_hidden_files(tmp_path):
    listed = ["B.JPG", "a/b/c/d.Png", "a/x.webp", "a.jpeg", "z.bmp", "z.tif", "é/ü.TIFF"]
    for name in reversed(listed):
        save(tmp_path / name)
    for name in (".hidden.jpg", ".folder/x.jpg", "a/._x.jpg", "a/.thumbs/x.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder.jpg").mkdir()
    save(tmp_path / "folder.jpg" / "inside.png")
    source = open_source(str(tmp_path))
    assert names(source) == sorted([*listed, "folder.jpg/inside.png"], key=os.fsencode)
    assert all(source.load(i).size == (9, 6) for i in range(len(source)))
    assert source.labels is None
    assert source.classes == []


def test_the_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    for i in range(20):
        save(tmp_path / f"{i % 3}" / f"{i}.png")
    first = open_source(str(tmp_path))
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: reversed(list(scandir(place))))
    second = open_source(str(tmp_path))
    assert names(first) == names(second)
    assert first.fingerprint() == second.fingerprint()
    assert (first.labels == second.labels).all()


def test_links_are_followed_and_loops_end(tmp_path):
    save(tmp_path / "elsewhere" / "deep" / "x.png")
    data = tmp_path / "data"
    save(data / "a.png")
    (data / "link").symlink_to(tmp_path / "elsewhere")
    (data / "b.png").symlink_to(tmp_path / "elsewhere" / "deep" / "x.png")
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(tmp_path / "elsewhere")
    (data / "me").symlink_to(data)
    (data / "itself").symlink_to(data / "itself")
    assert names(open_source(str(data))) == ["a.png", "b.png", "link/deep/x.png"]


def test_a_broken_link_is_listed_and_named_when_it_is_loaded(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = open_source(str(tmp_path))
    with pytest.raises(Unreadable, match=r"gone\.png: no such file"):
        source.load(0)


def test_a_pipe_named_like_an_image_is_left_out(tmp_path):
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert names(open_source(str(tmp_path))) == ["a.png"]


def test_sub_folders_become_classes(tmp_path):
    for name in ("dog/1.png", "cat/deep/er/2.png", "cat/1.png", "ape/1.png"):
        save(tmp_path / name)
    (tmp_path / "zebra").mkdir()  # no image in it: no class
    source = open_source(str(tmp_path))
    assert source.classes == ["ape", "cat", "dog"]
    assert source.labels.dtype == np.int64
    assert [source.classes[label] for label in source.labels] == [
        name.split("/")[0] for name in names(source)
    ]


@pytest.mark.parametrize("held", [["cat/1.png", "dog/1.png", "loose.png"], ["cat/1.png", "cat/2.png"]])
def test_a_loose_image_or_a_single_sub_folder_means_no_classes(tmp_path, held):
    for name in held:
        save(tmp_path / name)
    source = open_source(str(tmp_path))
    assert source.labels is None
    assert source.classes == []


def test_names_that_are_not_utf8_can_be_loaded_and_printed(tmp_path):
    place = os.fsencode(tmp_path) + b"/caf\xe9.png"
    save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", place)
    source = open_source(str(tmp_path))
    assert source.load(0).size == (9, 6)
    os.truncate(place, 0)
    with pytest.raises(Unreadable) as caught:
        source.load(0)
    assert str(caught.value).encode("utf-8").endswith(b"caf\\udce9.png: empty file")


def test_the_fingerprint_follows_names_and_labels_not_the_place(tmp_path):
    def prints(*held: str) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in held:
            save(root / name)
        return open_source(str(root)).fingerprint()

    first = prints("a/1.png", "b/2.png")
    assert prints("a/1.png", "b/2.png") == first
    others = [
        prints("a/1.png", "b/3.png"),
        prints("a/1.png", "b/2.png", "b/3.png"),
        prints("a1.png", "b2.png"),
        prints("a/1.pngb/2.png"),
        prints("1.png", "2.png"),
        prints("1.png2.png"),
    ]
    (tmp_path / "l1.txt").write_text("a/1.png\tx\nb/2.png\ty\n")
    (tmp_path / "l2.txt").write_text("a/1.png\ty\nb/2.png\tx\n")
    (tmp_path / "l3.txt").write_text("b/2.png\ny\na/1.png\n")
    others += [open_source(str(tmp_path / f"l{i}.txt")).fingerprint() for i in (1, 2, 3)]
    assert len({first, *others}) == 10


def test_the_fingerprint_is_that_of_earlier_versions(tmp_path):
    """So that their runs resume."""
    for name in ("b/1.png", "a/2.png", "a/c/3.png"):
        save(tmp_path / name)
    listed = [b"a/2.png", b"a/c/3.png", b"b/1.png"]
    content = b"".join(listed) + np.cumsum([len(name) for name in listed]).astype("<i8").tobytes()
    labels = np.array([0, 0, 1]).astype("<i8").tobytes() + b"a\0b"
    assert open_source(str(tmp_path)).fingerprint() == hashlib.sha256(content + labels).hexdigest()


LISTED = [b"n%08d/n%08d_%05d.JPEG" % (i // 1000, i // 1000, i) for i in range(100_000)]


def test_the_index_is_compact_and_pickles(tmp_path):
    source = Files(str(tmp_path), ((name, None) for name in LISTED))
    size = len(pickle.dumps(source))
    assert size / len(LISTED) <= len(LISTED[0]) + 8 + 1
    copy = pickle.loads(pickle.dumps(source))
    for i in (0, 1, 54_321, 99_999):
        assert copy.path(i) == str(tmp_path / LISTED[i].decode())
    for i in (-1, 100_000):
        with pytest.raises(IndexError):
            source.path(i)


def taken(path: Path) -> tuple[Source, int, int]:
    """The source; bytes it takes, and took at most while it was opened."""
    tracemalloc.start()
    try:
        return open_source(str(path)), *tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


def test_opening_a_list_holds_no_object_for_each_image(tmp_path):
    with open(tmp_path / "list.txt", "wb") as file:
        file.writelines(name + b"\t" + name[:9] + b"\n" for name in LISTED)
    source, kept, most = taken(tmp_path / "list.txt")
    assert (len(source), len(source.classes)) == (len(LISTED), 100)
    assert kept / len(source) < len(LISTED[0]) * 9 / 8 + 8 + 8 + 1  # a buffer that grows has 1/8 to spare
    assert most / len(source) < len(LISTED[0]) * 9 / 8 + 8 + 4 + 8 + 2


@pytest.mark.parametrize("seed", [1, 40, 1 << 20])
def test_the_order_is_that_of_the_paths_bytes(tmp_path, seed):
    """Also of names that sort between a folder and what is in it, or are not UTF-8."""
    draw = random.Random(seed)
    expected = set()
    for _ in range(200):
        depth = draw.randint(1, 3)
        parts = [bytes(draw.choices(b"ab-0. \xff!A~", k=draw.randint(1, 4))) for _ in range(depth)]
        if any(part.startswith(b".") for part in parts):
            continue
        path = b"/".join(parts) + draw.choice([b".png", b".JPG", b".x"])
        place = os.path.join(os.fsencode(tmp_path), path)
        try:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            with open(place, "x"):
                pass
        except OSError:  # a file is where a folder should be, or the other way round
            continue
        expected |= {path} if not path.endswith(b".x") else set()
    source = open_source(str(tmp_path))
    assert [os.fsencode(source.name(i)) for i in range(len(source))] == sorted(expected)
    assert len(expected) > 50


def test_the_order_of_an_epoch_is_that_of_epoch_order_whatever_the_buffer(tmp_path):
    source = Files(str(tmp_path), ((b"%d.png" % i, None) for i in range(30)))
    for buffer in (0, 5, 30):
        assert source.order(3, 2, buffer).equal(epoch_order(30, 3, 2))
    assert epoch_order(30, 3, 2).tolist() != epoch_order(30, 3, 1).tolist() != epoch_order(30, 2, 1).tolist()
    assert sorted(epoch_order(30, 3, 2).tolist()) == list(range(30))


# --- lists


def test_a_list_gives_paths_relative_to_itself_in_its_order(tmp_path):
    save(tmp_path / "images" / "b c.png")
    save(tmp_path / "lists" / "a.png")
    absolute = save(tmp_path / "z.png")
    text = f"\ufeff# comment\n\n  ../images/b c.png \r\na.png\n{absolute}\na.png"
    (tmp_path / "lists" / "train.txt").write_bytes(text.encode())
    source = open_source(str(tmp_path / "lists" / "train.txt"))
    assert [os.path.normpath(source.path(i)) for i in range(len(source))] == [
        str(tmp_path / "images" / "b c.png"),
        str(tmp_path / "lists" / "a.png"),
        str(absolute),
        str(tmp_path / "lists" / "a.png"),
    ]
    assert all(source.load(i).size == (9, 6) for i in range(4))
    assert source.labels is None


def test_a_list_in_the_current_folder_is_relative_to_it(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\n")
    monkeypatch.chdir(tmp_path)
    assert open_source("list.txt").load(0).size == (9, 6)


def test_a_list_may_give_classes(tmp_path):
    (tmp_path / "list.txt").write_text("a.png\tdog\nb.png\t a cat\nc.png\tdog\n")
    source = open_source(str(tmp_path / "list.txt"))
    assert source.classes == ["a cat", "dog"]
    assert source.labels.tolist() == [1, 0, 1]


def test_numbers_as_classes_are_in_numerical_order(tmp_path):
    (tmp_path / "list.txt").write_text("a.png\t10\nb.png\t9\nc.png\t0\n")
    source = open_source(str(tmp_path / "list.txt"))
    assert source.classes == ["0", "9", "10"]
    assert source.labels.tolist() == [2, 1, 0]


def test_a_list_may_end_its_lines_as_windows_and_old_macs(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"a.png\tx\r\nb.png\ty\r\r\n# c\rc.png\tx")
    source = open_source(str(tmp_path / "list.txt"))
    assert [source.name(i) for i in range(len(source))] == ["a.png", "b.png", "c.png"]
    assert source.labels.tolist() == [0, 1, 0]


def test_listed_files_are_not_looked_at_before_they_are_loaded(tmp_path):
    (tmp_path / "list.txt").write_text("missing.png\n")
    source = open_source(str(tmp_path / "list.txt"))
    with pytest.raises(Unreadable, match=r"missing\.png: no such file"):
        source.load(0)


# --- what cannot be a source


def test_nothing_given_says_what_to_give():
    with pytest.raises(ValueError, match="no images given: give a folder of images or a text file"):
        open_source("")


def test_a_missing_path_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder or file; give a folder of images"):
        open_source(str(tmp_path / "nowhere"))


def test_an_empty_folder_says_so(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no files in it; give a folder that holds images \(\.jpg"):
        open_source(str(tmp_path))


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    for i in range(35):
        (tmp_path / f"{i}.NPY").touch()
    (tmp_path / "a.txt").touch()
    (tmp_path / "README").touch()
    with pytest.raises(ValueError, match=r"37 files, none an image: \.npy \.txt no extension; give a folder"):
        open_source(str(tmp_path))


def test_a_list_without_lines_says_so(tmp_path):
    (tmp_path / "list.txt").write_text("\n# nothing\n")
    with pytest.raises(ValueError, match=r"list\.txt: no paths in it; write one path of an image a line"):
        open_source(str(tmp_path / "list.txt"))


def test_a_list_with_some_classes_names_the_line(tmp_path):
    for text, line in (("a.png\tx\n# c\nb.png\n", 3), ("a.png\nb.png\tx\n", 2)):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(ValueError, match=f"line {line}: some lines have a class and some have none"):
            open_source(str(tmp_path / "list.txt"))


@pytest.mark.parametrize("kind", ["image", "archive", "large archive", "line", "pipe"])
def test_a_path_that_is_neither_says_so(tmp_path, kind):
    path = tmp_path / "images.zip"
    if kind == "line":
        path.write_bytes(b"a.jpg\n" + b"x" * 100_000)
    elif kind == "image":
        path = save(tmp_path / "cat.PNG")
    elif kind == "archive":
        path.write_bytes(b"a.jpg" + bytes(500))
    elif kind == "large archive":
        with open(path, "wb") as file:
            file.truncate(1 << 40)  # a terabyte, sparse: reading it whole would not end
    else:
        os.mkfifo(path)
    with pytest.raises(
        ValueError, match=r"neither a folder nor a text file nor tar shards; .*unpack an archive first"
    ):
        open_source(str(path))


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    save(tmp_path / "locked" / "a.png")
    scandir = os.scandir

    def locked(place):
        if place.endswith(b"locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(PermissionError, match="locked: no permission to read this folder"):
        open_source(str(tmp_path))


# --- bytes and pixels


def test_loading_is_decoding_what_is_read(tmp_path):
    path = save(tmp_path / "a.jpg")
    source = open_source(str(tmp_path))
    assert source.read(0) == path.read_bytes()
    np.testing.assert_array_equal(np.asarray(decode_image(source.read(0), "x")), np.asarray(source.load(0)))
    path.write_bytes(b"hello")
    assert source.read(0) == b"hello"
    with pytest.raises(Unreadable, match=r"^x: not a JPEG"):
        decode_image(b"hello", "x")
    with pytest.raises(Unreadable, match=r"^x: empty file"):
        decode_image(b"", "x")
    path.write_bytes(b"")
    with pytest.raises(Unreadable, match=r"a\.jpg: empty file"):
        source.read(0)
    path.unlink()
    with pytest.raises(Unreadable, match=r"a\.jpg: no such file"):
        source.read(0)
    path.mkdir()
    with pytest.raises(Unreadable, match=r"a\.jpg: is a directory"):
        source.read(0)


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


def test_size_is_read_from_the_header(tmp_path):
    path = save(tmp_path / "a.png")
    os.truncate(path, 60)
    assert open_source(str(tmp_path)).size(0) == (9, 6)


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
