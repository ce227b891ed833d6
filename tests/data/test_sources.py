"""Sources: which files of a folder or list are images, their labels, their order."""

import contextlib
import errno
import hashlib
import os
import pickle
import random
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.data import Unreadable, open_source
from fastdino.data.images import decode_image
from fastdino.data.sources import Files, Source, epoch_order


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def save(path: Path) -> Path:
    """An image of 9 by 6 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


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


# --- what is left out


def test_nothing_is_left_out_in_silence(tmp_path):
    for name in ("a.jpg", "b/c.png", "b/@eaDir/c.png", "@eaDir/a.jpg", "__MACOSX/x.png", ".git/x.png"):
        save(tmp_path / name)
    for name in (
        "1.heic",
        "2.HEIC",
        "c.mp4",
        ".DS_Store",
        "._a.jpg",
        "b/._c.png",
        "Thumbs.db",
        "e\x1b[1m\n.x\ty",
    ):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    source = open_source(str(tmp_path))
    assert names(source) == ["a.jpg", "b/c.png"]
    assert source.notes == [
        f"{tmp_path}: 12 files: 2 taken, 10 left out: 2 ._* (of a Mac), 2 .heic (install pillow-heif: pip "
        "install 'fastdino[heic]'), 2 pipes, sockets or devices, 1 .DS_Store, 1 .mp4, 1 .x\\ty, 1 Thumbs.db; "
        "folders left out: 2 @eaDir, 1 .git, 1 __MACOSX"
    ]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOENT])
@pytest.mark.parametrize("call", ["scandir", "stat"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, code, call):
    save(tmp_path / "a" / "a.png")
    save(tmp_path / "lost+found" / "a.png")
    save(tmp_path / "z" / "a.png")
    works = getattr(os, call)

    def fails(place, **options):
        if os.fsencode(place).endswith(b"lost+found"):
            raise OSError(code, os.strerror(code))
        return works(place, **options)

    monkeypatch.setattr(os, call, fails)
    source = open_source(str(tmp_path))
    assert names(source) == ["a/a.png", "z/a.png"]
    assert source.classes == ["a", "z"]
    reason = os.strerror(code).lower() if code != errno.ENOENT else "no such file"
    assert source.notes == [f"{tmp_path}: 2 files: 2 taken; folders left out: 1 lost+found ({reason})"]


def test_a_folder_that_fails_while_it_is_listed_counts_for_nothing(tmp_path, monkeypatch):
    save(tmp_path / "bad" / "a.png")
    (tmp_path / "bad" / "x.txt").touch()
    save(tmp_path / "b.png")
    scandir = os.scandir

    def fails(place):
        yield from scandir(place)
        if place.endswith(b"bad"):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "scandir", fails)
    source = open_source(str(tmp_path))
    assert source.notes == [f"{tmp_path}: 1 file: 1 taken; folders left out: 1 bad (input/output error)"]


def test_folders_deeper_than_calls_can_be_nested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    depth = 1200
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    Path("a.png").touch()
    try:
        assert len(open_source(str(tmp_path))) == 1
    finally:  # pytest cannot delete it
        os.remove("a.png")
        for _ in range(depth):
            os.chdir("..")
            os.rmdir("d")


def test_patterns_say_which_images_are_taken(tmp_path):
    for name in (
        "cat/1.png",
        "cat/1_mask.png",
        "dog/2.png",
        "dog/2_mask.png",
        "masks/1.png",
        "x/masks/1.png",
    ):
        save(tmp_path / name)
    (tmp_path / "list.txt").write_text("cat/1.png\ncat/1_mask.png\n# x\n")
    exclude = ("*_mask.png", "*masks/*", "none*")
    source = open_source(str(tmp_path), exclude=exclude)
    assert (names(source), source.classes) == (["cat/1.png", "dog/2.png"], ["cat", "dog"])
    assert source.notes == [
        f"{tmp_path}: 7 files: 2 taken, 5 left out: 2 by --exclude *_mask.png, 2 by --exclude *masks/*, "
        "1 .txt",
        f"--exclude none* fits no image of {tmp_path}: a pattern is for the path below it, as 'masks/*' or "
        "'*_mask.png'",
    ]
    source = open_source(str(tmp_path), include=("cat/*", "x/*"), exclude=("*_mask.png",))
    assert names(source) == ["cat/1.png", "x/masks/1.png"]
    listed = open_source(str(tmp_path / "list.txt"), exclude=exclude)
    assert (names(listed), len(listed.notes)) == (["cat/1.png"], 3)
    assert "1 by --exclude *_mask.png, 1 in lines that begin with #" in listed.notes[0]
    with pytest.raises(ValueError, match=r"0 taken, 7 left out: 6 by no --include, 1 \.txt; give a folder"):
        open_source(str(tmp_path), include=("*.jpg",))
    with pytest.raises(ValueError, match=r"no paths in it, but 2 by --exclude \*, 1 in lines"):
        open_source(str(tmp_path / "list.txt"), exclude=("*",))


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


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
def test_a_list_may_be_as_windows_writes_it(tmp_path, encoding):
    (tmp_path / "list.txt").write_bytes("é/日.png\tx\r\nb.png\ty\r\n".encode(encoding))
    source = open_source(str(tmp_path / "list.txt"))
    assert [source.name(i) for i in range(2)] == ["é/日.png", "b.png"]
    assert source.classes == ["x", "y"]


def test_a_list_executes_nothing(tmp_path):
    proof = tmp_path / "proof"
    lines = [f"pipe:touch {proof}", f"| touch {proof}", f"$(touch {proof}).png", "http://localhost/x.png"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    source = open_source(str(tmp_path / "list.txt"))
    for i in range(len(lines)):
        with pytest.raises(Unreadable, match="no such file"):
            source.load(i)
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        open_source(lines[0])
    assert not proof.exists()


@pytest.mark.parametrize("seed", range(3))
def test_any_bytes_are_a_list_or_refused_in_a_sentence(tmp_path, seed):
    draw, path = random.Random(seed), tmp_path / "list.txt"
    parts = [
        b"a.png",
        b"\t",
        b"\n",
        b"\r\n",
        b"#",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\0",
        b"\xe9",
        b"9" * 5000,
        b" ",
    ]
    for _ in range(300):
        path.write_bytes(
            b"".join(draw.choices(parts, (20, 9, 20, 5, 2, 1, 1, 0.2, 5, 0.2, 5), k=draw.randint(0, 40)))
        )
        with contextlib.suppress(ValueError):
            source = open_source(str(path))
            assert all(source.path(i) for i in range(len(source)))


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
    with pytest.raises(
        ValueError, match=r"37 files: 0 taken, 37 left out: 35 \.npy, 1 \.txt, 1 no extension; give a folder"
    ):
        open_source(str(tmp_path))


def test_a_list_without_lines_says_so(tmp_path):
    (tmp_path / "list.txt").write_text("\n# nothing\n")
    with pytest.raises(
        ValueError, match=r"list\.txt: no paths in it, but 1 in lines .* #; write one path of an image a line"
    ):
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
    with pytest.raises(
        ValueError, match=r"0 files: 0 taken; folders left out: 1 locked \(permission denied\)"
    ):
        open_source(str(tmp_path))
    with pytest.raises(OSError, match=r"locked cannot be read: permission denied"):
        open_source(str(tmp_path / "locked"))
    save(tmp_path / "a.png")
    source = open_source(str(tmp_path))
    assert names(source) == ["a.png"]
    note = f"{tmp_path}: 1 file: 1 taken; folders left out: 1 locked (permission denied)"
    assert source.notes == [note]


# --- loading


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


def test_size_is_read_from_the_header(tmp_path):
    path = save(tmp_path / "a.png")
    os.truncate(path, 60)
    assert open_source(str(tmp_path)).size(0) == (9, 6)
