"""Tar shards: which members are images, their labels, their order, and shards that are damaged or change."""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdino.data import Unreadable, open_source, shards, tars
from fastdino.data.shards import Shards, expand
from fastdino.data.sources import Source, epoch_order
from fastdino.data.tars import RECORD, index_path, load_index, save_index, scan

Members = Iterable[tuple[str, bytes]]


@functools.cache
def png(i: int) -> bytes:
    """An image like no other i's, of its own length."""
    out = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (4 + i % 5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def write_tar(path: Path, members: Members, format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, counts: list[int]) -> Source:
    """Shards of so many images, and as many labels: image k of all is png(k), of class k % 3."""
    first = 0
    for number, count in enumerate(counts):
        members = []
        for k in range(first, first + count):
            members += [(f"{k:05d}.png", png(k)), (f"{k:05d}.cls", str(k % 3).encode())]
        write_tar(folder / f"{number:03d}.tar", members)
        first += count
    return open_source(str(folder))


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def classes(source: Source) -> list[str] | None:
    return None if source.labels is None else [source.classes[label] for label in source.labels]


# --- members and labels


def test_images_are_found_in_their_order_and_the_rest_is_ignored(tmp_path):
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("b/2.JPEG", png(0)),
            ("b/2.json", b"{}"),
            ("b/1.v2.png", png(1)),
            ("./a/3.Tif", png(2)),
            ("readme", b"x"),
            ("notes.txt", b"x"),
            ("a/._3.tif", b"x"),
            (".hidden/1.png", png(3)),
            ("png", png(3)),
            ("é ü.webp", png(4)),
        ],
    )
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    source = open_source(str(path))
    assert names(source) == ["b/2.JPEG", "b/1.v2.png", "./a/3.Tif", "é ü.webp"]
    assert source.path(1) == f"{path}/b/1.v2.png"
    assert [source.read(i) for i in range(4)] == [png(0), png(1), png(2), png(4)]
    for i, content in enumerate((png(0), png(1), png(2), png(4))):
        image = Image.open(io.BytesIO(content))
        np.testing.assert_array_equal(np.asarray(source.load(i)), np.asarray(image))
        assert source.size(i) == image.size
    assert source.labels is None
    note = (
        f"{path}: 10 files: 4 taken, 6 left out: 2 no extension, 1 ._* (of a Mac), 1 .hidden, 1 .json, 1 .txt"
    )
    assert (source.classes, source.notes, source.root) == ([], [note], str(path))
    for i in (-1, 4):
        for use in (source.name, source.path, source.read, source.load, source.size):
            with pytest.raises(IndexError):
                use(i)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (["1.png", "1.cls=b", "2.cls=a ", "2.png"], ["b", "a"]),
        (["1.png", "1.json", "1.cls=10", "2.cls=9", "2.txt", "2.png"], ["10", "9"]),
        (["x/1.png", "x/1.cls=b", "y/2.cls=a", "y/2.png"], ["b", "a"]),
        (["x/1.png", "x/1.cls=b", "y/2.png"], ["x", "y"]),  # not all have one: their folders
        (["x/1.png", "./y/2.png", "/x/deep/3.png"], ["x", "y", "x"]),
        (["x/1.png", "x/2.png"], None),
        (["x/1.png", "2.png"], None),
        (["1.png", "1.cls=a", "2.png", "2.cls=a"], None),
        (["1.png", "3.cls=c", "1.json", "2.cls=b", "2.png"], None),  # not an image's neighbour: no label
        (["1.png", "1.cls=a", "1.png", "1.cls=b"], ["a", "b"]),  # the same key twice
        (["1.a.png", "1.cls=a", "1.b.png", "2.png", "2.cls=b"], ["a", "a", "b"]),
    ],
)
def test_the_label_is_that_of_the_key_else_the_folder(tmp_path, members, expected):
    found = [name.partition("=") for name in members]
    parts = [(name, text.encode() or png(k)) for k, (name, _, text) in enumerate(found)]
    source = open_source(str(write_tar(tmp_path / "x.tar", parts)))
    assert classes(source) == expected
    if expected:
        assert source.labels.dtype == np.int64
        assert source.classes == sorted(set(expected), key=lambda name: int(name) if name.isdigit() else name)
        assert names(source) == [name for name, _, _ in found if name.endswith("png")]


def test_labels_of_several_shards_are_numbered_as_one(tmp_path):
    write_tar(tmp_path / "0.tar", [("z/1.png", png(0)), ("b/2.png", png(1))])
    write_tar(tmp_path / "1.tar", [("a/1.png", png(2)), ("z/2.png", png(3))])
    source = open_source(str(tmp_path))
    assert classes(source) == ["z", "b", "a", "z"]
    assert source.classes == ["a", "b", "z"]
    write_tar(tmp_path / "2.tar", [("1.png", png(2))])
    assert open_source(str(tmp_path)).labels is None


def test_classes_txt_names_the_classes_also_of_some_of_the_shards(tmp_path):
    write_shards(tmp_path, [3, 1])
    (tmp_path / "classes.txt").write_bytes(b"ape\ncaf\xe9\na dog\n")
    named = ["ape", "caf\udce9", "a dog"]
    source = open_source(str(tmp_path))
    assert classes(source) == [*named, "ape"]
    assert source.classes == named
    some = open_source(str(tmp_path / "001.tar"))
    assert (classes(some), some.classes) == (["ape"], named)
    (tmp_path / "classes.txt").write_text("ape\n")  # of other shards, it seems
    assert open_source(str(tmp_path)).classes == ["0", "1", "2"]
    (tmp_path / "classes.txt").write_text("")
    assert open_source(str(tmp_path)).labels is None
    write_shards(tmp_path / "more", [1])
    (tmp_path / "more" / "classes.txt").write_text("ape\n")
    with pytest.raises(ValueError, match=r"classes\.txt and .*classes\.txt differ: open shards of one set"):
        open_source(f"{tmp_path}/{{000,more/000}}.tar")


LONG = "folder" * 40 + "/" + "long" * 40


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_are_long_or_not_utf8(tmp_path, format):
    expected = [f"{LONG}.png", "caf\udce9.png", "x" * 95 + ".png", "x" * 96 + ".png", "x" * 97 + ".png"]
    path = write_tar(tmp_path / "x.tar", [(name, png(i)) for i, name in enumerate(expected)], format)
    source = open_source(str(path))
    assert names(source) == expected
    assert [source.read(i) for i in range(5)] == [png(i) for i in range(5)]
    with open(path, "r+b") as file:
        file.write(path.read_bytes().replace(png(1), bytes(len(png(1)))))
    with pytest.raises(Unreadable) as caught:
        source.load(1)
    assert str(caught.value) == f"{path}/caf\\udce9.png: not a JPEG, PNG, WebP, BMP, TIFF or GIF image"


def test_an_empty_member_is_unreadable(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", b""), ("b.png", png(0))])
    source = open_source(str(path))
    for use in (source.read, source.load, source.size):
        with pytest.raises(Unreadable, match=r"x\.tar/a\.png: empty file"):
            use(0)


def test_links_are_noted(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "b.png").symlink_to("a.png")
    os.link(tmp_path / "a.png", tmp_path / "c.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in "abc":
            tar.add(tmp_path / f"{name}.png", f"{name}.png")
    source = open_source(str(tmp_path / "x.tar"))
    assert names(source) == ["a.png"]
    assert source.notes == [
        f"{tmp_path}/x.tar: 3 files: 1 taken, 2 left out: 2 links, sparse, devices or larger than 4 GiB "
        "(store plain files: tar --dereference --hard-dereference)"
    ]


# --- which shards


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{000..1}x{a,b}", ["000xa", "000xb", "001xa", "001xb"]),
        ("{a,b{0..1},{c,d}e}.tar", ["a.tar", "b0.tar", "b1.tar", "ce.tar", "de.tar"]),
        ("{,x}y", ["y", "xy"]),
        ("d/{7..7}/}", ["d/7/}"]),
    ],
)
def test_braces_are_expanded_as_a_shell_does(pattern, expected):
    assert expand(pattern) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..2",
        "{a}",
        "{2..1}",
        "{a..c}",
        "{}",
        "{-1..2}",
        "{0..9999999999}",
        "{0..9999}{0..9999}",
        "{a," * 3000 + "}" * 3000,
    ],
)
def test_braces_that_make_no_sense_are_refused(pattern):
    with pytest.raises(ValueError, match=r"; write \{000\.\.127\} or \{a,b\}"):
        open_source(pattern)


def test_every_way_to_name_shards_opens_the_same(tmp_path):
    first = write_shards(tmp_path, [2, 3, 1])
    assert isinstance(first, Shards)
    assert [first.read(i) for i in range(6)] == [png(i) for i in range(6)]
    for pattern in ("/{000..002}.tar", "/{000,001,002}.tar", "/*.tar", "/00[0-2].tar", "/{000,00[12]}.tar"):
        source = open_source(f"{tmp_path}{pattern}")
        assert source.fingerprint() == first.fingerprint()
        assert source.path(5) == f"{tmp_path}/002.tar/00005.png"
    assert names(open_source(f"{tmp_path}/001.tar")) == ["00002.png", "00003.png", "00004.png"]
    shutil.copytree(tmp_path, tmp_path / "x{1}[y]")  # that exists as it is written
    assert open_source(f"{tmp_path}/x{{1}}[y]").fingerprint() == first.fingerprint()


def test_a_folder_with_images_below_is_a_folder_of_images(tmp_path):
    write_shards(tmp_path, [2])
    (tmp_path / "train" / "deep").mkdir(parents=True)
    assert len(open_source(str(tmp_path))) == 2
    (tmp_path / "train" / "deep" / "a.png").write_bytes(png(0))
    assert names(open_source(str(tmp_path))) == ["train/deep/a.png"]


def test_missing_shards_are_named_in_one_error(tmp_path):
    write_shards(tmp_path, [1, 1])
    with pytest.raises(FileNotFoundError, match=r"2 of 4 shards are missing: .*/002\.tar, .*/003\.tar$"):
        open_source(f"{tmp_path}/{{000..003}}.tar")
    with pytest.raises(FileNotFoundError, match=r"18 of 20 shards .*/011\.tar and 8 more$"):
        open_source(f"{tmp_path}/{{000..019}}.tar")
    with pytest.raises(FileNotFoundError, match=r"x\*\.tar: no file matches"):
        open_source(f"{tmp_path}/x*.tar")
    with pytest.raises(FileNotFoundError, match=r"x\.tar: no such folder or file; give .* tar shards"):
        open_source(f"{tmp_path}/x.tar")


@pytest.mark.parametrize("kind", ["named", "gz", "bz2", "xz", "folder"])
def test_a_compressed_tar_is_refused(tmp_path, kind):
    path = tmp_path / ("000.tar.gz" if kind in ("named", "folder") else "000.tar")
    with tarfile.open(path, "w:gz" if kind in ("named", "folder") else f"w:{kind}") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(ValueError, match=r"000\.tar.*: a compressed tar .*; unpack it to a plain \.tar"):
        open_source(str(tmp_path if kind == "folder" else path))


def test_what_is_no_tar_or_holds_no_image_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    for content in (b"", b"hello", b"a.jpg" + bytes(2000)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.tar: not a tar file, or damaged at its start"):
            open_source(str(path))
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a terabyte, sparse: an empty tar
    with pytest.raises(ValueError, match=r"x\.tar: no images in 1 tar file; give shards that hold images"):
        open_source(str(path))
    write_tar(path, [("a.txt", b"x")])
    with pytest.raises(ValueError, match=r"no images in 2 tar files"):
        open_source(f"{tmp_path}/{{x,x}}.tar")
    (tmp_path / "a.png").write_bytes(png(0))
    with pytest.raises(ValueError, match=r"a\.png: not a tar file; give shards named NAME\.tar"):
        open_source(f"{tmp_path}/*.png")
    (tmp_path / "a.png").unlink()
    (tmp_path / "deep").mkdir()
    path.rename(tmp_path / "deep" / "x.tar")
    with pytest.raises(
        ValueError, match=r"1 file: 0 taken, 1 left out: 1 \.tar .*; give .* or tar shards at its top"
    ):
        open_source(str(tmp_path))


# --- damage and change


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_of_a_tar_cut_short_everything_before_the_cut_is_used(tmp_path, format):
    parts: list[tuple[str, bytes]] = []
    for k, stem in enumerate(("a", LONG, "c")):
        parts += [(f"{stem}.png", png(k)), (f"{stem}.cls", str(k).encode())]
    path = write_tar(tmp_path / "whole.tar", parts, format)
    with tarfile.open(path) as tar:
        ends = [member.offset_data + member.size for member in tar]
    first, ends = ends[0], ends[1::2]  # of the first image, and of the labels, which follow their images
    content = path.read_bytes()
    seen = set()
    for cut in [*range(512, len(content), 97), *ends, *(end - 1 for end in ends)]:
        (tmp_path / "cut.tar").write_bytes(content[:cut])
        n = sum(end <= cut for end in ends)
        labels = None if n < 2 else list(range(n))
        n = max(n, int(first <= cut))  # as nothing has a label, it does not lack its own
        whole = cut >= -(-ends[-1] // 512) * 512 + 512  # with a block of zeros after the last
        if not n:
            with pytest.raises(ValueError, match=r"no images in 1 tar file.*\n.*cut\.tar is cut short"):
                open_source(str(tmp_path / "cut.tar"))
            continue
        source = open_source(str(tmp_path / "cut.tar"))
        assert [source.read(i) for i in range(len(source))] == [png(k) for k in range(n)], cut
        assert (source.labels if labels is None else source.labels.tolist()) == labels
        note = f"{tmp_path}/cut.tar is cut short or damaged: only its first {n} images are used; "
        assert source.notes == ([] if whole else [f"{note}fetch or make it again"]), cut
        seen.add((n, whole))
    assert seen == {(1, False), (2, False), (3, False), (3, True)}


def test_a_tar_with_a_broken_header_is_used_up_to_there(tmp_path):
    path = write_tar(tmp_path / "x.tar", [(f"{k}.png", png(k)) for k in range(4)])
    with tarfile.open(path) as tar:
        offset = tar.getmember("2.png").offset
    with open(path, "r+b") as file:
        file.seek(offset + 100)
        file.write(b"garbage")
    source = open_source(str(path))
    assert names(source) == ["0.png", "1.png"]
    assert len(source.notes) == 1


def test_whatever_a_header_says_what_is_found_is_read_or_unreadable(tmp_path):
    """Headers of random damage with a checksum that fits, among them sizes below 0 and of many terabytes."""
    draw, found = random.Random(0), 0
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        parts = [(f"é{'x' * 99 * (k % 2)}{k}.png", png(k)) for k in range(4)]
        whole = write_tar(tmp_path / "x.tar", parts, format).read_bytes()
        headers = [offset for offset in range(0, len(whole), 512) if whole[offset + 257 :][:5] == b"ustar"]
        for _ in range(100):
            content, offset = bytearray(whole), draw.choice(headers)
            first, n = draw.choice([(0, 100), (124, 12), (156, 1), (345, 155)])
            content[offset + first : offset + first + n] = bytes(
                draw.choices(b"01234567 \0\x80\xff5xLgS", k=n)
            )
            content[offset + 148 : offset + 156] = b" " * 8
            content[offset + 148 : offset + 156] = b"%06o\0 " % sum(content[offset : offset + 512])
            (tmp_path / "x.tar").write_bytes(content)
            with contextlib.suppress(ValueError):
                source = open_source(str(tmp_path / "x.tar"))
                for i in range(len(source)):
                    assert source.path(i)
                    with contextlib.suppress(Unreadable):
                        found += source.read(i) in [png(k) for k in range(4)]
    assert found > 300


def header(
    name: str,
    kind: bytes = b"0",
    size: int = 0,
    content: bytes = b"",
    link: str = "",
    pax: dict[str, str] | None = None,
) -> bytes:
    """A member, whatever makes sense."""
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, max(size, 0), link
    member.pax_headers = pax or {}
    block = bytearray(member.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT, "utf-8"))
    if size < 0:
        block[124:136] = b"\xff" * 4 + size.to_bytes(8, "big", signed=True)
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block) + content + bytes(-len(content) % 512)


FIRST = header("a.png", size=len(png(0)), content=png(0))
HOSTILE = {
    "link": header("b.png", tarfile.SYMTYPE, link="/etc/passwd"),
    "hard link": header("b.png", tarfile.LNKTYPE, link="../../etc/passwd"),
    "device": header("b.png", tarfile.CHRTYPE),
    "pipe": header("b.png", tarfile.FIFOTYPE),
    "parent": header("../../b.png", size=3, content=b"abc"),
    "negative": header("b.png", size=-1024),
    "2**62": header("b.png", size=1 << 62),
    "2**80": header("b.png", size=1 << 80),
    "2**62, no image": header("b.bin", size=1 << 62),
    "names of names": header("b", tarfile.GNUTYPE_LONGNAME, 1) * 3000,
    "a name of 8 GiB": header("b", tarfile.GNUTYPE_LONGNAME, (1 << 33) - 1),
    "8 GiB of pax": header("b", tarfile.XHDTYPE, (1 << 33) - 1),
    "pax of pax": header("b", tarfile.XHDTYPE, 512, b"8 a=bcd\n" * 64) * 2500,
    "pax size": header("b.png", size=512, content=bytes(512), pax={"size": "1"}),
    "sparse": header("b.png", tarfile.GNUTYPE_SPARSE, 3, b"abc"),
    "sparse map": header(
        "b.png", size=512, content=b"99999999\n", pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    ),
    "sparse text": header("b.png", size=3, content=b"abc", pax={"GNU.sparse.map": "a,b"}),
    "global": header("b", tarfile.XGLTYPE, 512, b"17 path=evil.png\n" + bytes(495)),
    "number": header("b.png", size=3, content=b"abc", pax={"mtime": "x" * 9999}),
}


@pytest.mark.parametrize("member", HOSTILE.values(), ids=HOSTILE)
def test_of_a_hostile_tar_nothing_but_its_images_is_read(tmp_path, member):
    path = tmp_path / "x.tar"
    path.write_bytes(FIRST + member + bytes(1024))
    os.truncate(path, 9 << 30)  # sparse: there is as much as any header claims
    tracemalloc.start()
    try:
        source = open_source(str(path))
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert source.read(0) == png(0)
    assert len(source.notes) <= 2
    for i in range(len(source)):
        assert "passwd" not in source.path(i)
        with contextlib.suppress(Unreadable):
            assert b"root:" not in source.read(i)


def test_names_in_a_tar_are_printed_in_one_line(tmp_path):
    path = write_tar(
        tmp_path / "x.tar",
        [("a\n\x1b[31m.png", b"x"), ("b.x\x1b\ny", b"x")],
        tarfile.PAX_FORMAT,
    )
    source = open_source(str(path))
    assert source.notes[0].endswith("1 left out: 1 .x\\x1b\\ny")
    with pytest.raises(Unreadable) as caught:
        source.load(0)
    assert "a\\n\\x1b[31m.png: not a" in str(caught.value)


def test_patterns_are_for_the_names_in_shards(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a/1.png", png(0)), ("a/1_mask.png", png(1)), ("b/2.png", png(2))])
    write_index(path)
    source = open_source(str(tmp_path), exclude=("*_mask.png",))
    assert names(source) == ["a/1.png", "b/2.png"]
    assert source.notes == [f"{tmp_path}: 3 files: 2 taken, 1 left out: 1 by --exclude *_mask.png"]
    with pytest.raises(ValueError, match=r"no images in 1 tar file, but 3 by no --include; give shards"):
        open_source(str(tmp_path), include=("c/*",))


def replaced(path: Path) -> None:
    """Another file of the same length, renamed into place."""
    beside = write_tar(path.with_name("beside"), [(f"{k}.png", png(k + 6)) for k in range(4)])
    os.truncate(beside, path.stat().st_size)
    beside.replace(path)


def overwritten(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))


def moved(path: Path) -> None:
    """The same images, each one place later, where others were."""
    write_tar(path, [(f"{(k - 1) % 4}.png", png((k - 1) % 4)) for k in range(4)])


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (os.unlink, "no such file"),
        (lambda path: os.truncate(path, 600), "has changed"),
        (lambda path: os.truncate(path, 0), "has changed"),
        (replaced, "has changed"),
        (overwritten, "has changed"),
        (moved, "has changed"),
    ],
    ids=["gone", "cut", "emptied", "replaced", "overwritten", "moved"],
)
def test_a_shard_that_changes_gives_unreadable_or_what_it_held(tmp_path, opened, change, reason):
    path = write_tar(tmp_path / "x.tar", [(f"{k}.png", png(k)) for k in range(4)])
    source = open_source(str(path))
    if opened:
        assert source.read(3) == png(3)
    change(path)
    if opened and change in (os.unlink, replaced):  # the file it has open is still the one that it was
        assert [source.read(k) for k in range(4)] == [png(k) for k in range(4)]
        return
    for use in (source.read, source.load, source.size):
        for i in range(4):
            with pytest.raises(Unreadable, match=reason) as caught:
                use(i)
            assert caught.value.path.startswith(f"{path}/")
    assert source.path(1).startswith(f"{path}/image at byte ")


def test_the_size_counts_where_the_checksum_of_the_header_is_the_same(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", b"x" * 0o12)])
    source = open_source(str(path))
    write_tar(path, [("a.png", b"x" * 0o21)])
    with pytest.raises(Unreadable, match="has changed"):
        source.read(0)


# --- processes


def check_read(source: Source, indices: list[int]) -> bool:
    return [source.read(i) for i in indices] == [png(i) for i in indices]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_forked_and_spawned_processes_read_for_themselves(tmp_path, start):
    source = write_shards(tmp_path, [3, 0, 4])
    assert source.read(6) == png(6)  # this process has a shard open
    with ProcessPoolExecutor(1, multiprocessing.get_context(start)) as pool:
        found = list(pool.map(source.read, range(7)))  # pickles the source
    assert found == [png(i) for i in range(7)]
    child = multiprocessing.get_context("fork").Process(target=lambda: os._exit(source.read(6) != png(6)))
    child.start()
    child.join()
    assert child.exitcode == 0


def opened(folder: Path) -> list[str]:
    """The files of a folder that this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(link))
    return [path for path in found if path.startswith(f"{folder}/")]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which files are open")
def test_few_files_are_open_and_threads_may_share_them(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN", 3)
    source = write_shards(tmp_path, [2] * 12)
    with ThreadPoolExecutor(8) as pool:
        indices = np.random.default_rng(0).integers(0, 24, 2000).tolist()
        assert list(pool.map(source.read, indices)) == [png(i) for i in indices]
    assert 0 < len(opened(tmp_path)) <= 3
    del source
    assert not opened(tmp_path)


def test_processes_help_to_index_if_it_takes_long(tmp_path, monkeypatch):
    alone = write_shards(tmp_path, [2, 0, 3, 1, 5])
    here = os.getpid()

    def elsewhere(path: str, patterns: Any) -> Any:
        assert os.getpid() != here
        return scan(path, patterns)

    monkeypatch.setattr(shards, "ALONE", -1.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(shards, "index", elsewhere)
    monkeypatch.setattr(elsewhere, "__qualname__", "index")
    monkeypatch.setattr(elsewhere, "__module__", shards.__name__)
    source = open_source(str(tmp_path))
    assert source.fingerprint() == alone.fingerprint()
    (tmp_path / "002.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match=r"002\.tar: not a tar"):
        open_source(str(tmp_path))


# --- the index


def test_an_image_takes_12_bytes_and_its_label_8(tmp_path):
    write_tar(tmp_path / "x.tar", [(f"{k}.png", b"x") for k in range(2000)])
    source = open_source(str(tmp_path / "x.tar"))
    assert len(pickle.dumps(source)) / len(source) < 12 + 0.5
    write_tar(tmp_path / "x.tar", [(f"{k % 2}/{k}.png", b"x") for k in range(2000)])
    source = open_source(str(tmp_path / "x.tar"))
    assert len(pickle.dumps(source)) / len(source) < 12 + 8 + 0.5


def test_indexing_holds_no_object_for_each_member(tmp_path):
    path = write_tar(tmp_path / "x.tar", [(f"{k}.{x}", b"1") for k in range(3000) for x in ("png", "cls")])
    scan(str(path))
    tracemalloc.start()
    try:
        assert len(scan(str(path)).records) == 3000
        assert tracemalloc.get_traced_memory()[1] < 3000 * 64 + 200_000
    finally:
        tracemalloc.stop()


def write_index(path: Path) -> None:
    save_index(path, path.stat().st_size, scan(str(path)), [("lost.png", "empty file")])


def test_the_index_beside_a_shard_is_used(tmp_path, monkeypatch):
    source = write_shards(tmp_path, [3, 2])
    for path in tmp_path.glob("*.tar"):
        write_index(path)
    monkeypatch.setattr(tars, "scan", None)
    fast = open_source(str(tmp_path))
    assert fast.fingerprint() == source.fingerprint()
    assert fast.labels.tolist() == source.labels.tolist()
    assert [fast.read(i) for i in range(5)] == [png(i) for i in range(5)]
    assert load_index(str(tmp_path / "000.tar"))[1] == [("lost.png", "empty file")]


def longer(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(bytes(512))


def other_names(path: Path) -> None:
    """As long, with images of the same lengths."""
    write_tar(path, [(f"{k + 7}.png", png(k)) for k in range(4)])


def cut_index(path: Path) -> None:
    os.truncate(index_path(path), index_path(path).stat().st_size // 2)


def damage_index(path: Path) -> None:
    content = index_path(path).read_bytes()
    index_path(path).write_bytes(content.replace(b"\0\0\0", b"\0\1\0", 40))


def no_index(path: Path) -> None:
    index_path(path).unlink()
    index_path(path).mkdir()


@pytest.mark.parametrize("change", [longer, other_names, moved, cut_index, damage_index, no_index])
def test_an_index_that_does_not_fit_is_not_used(tmp_path, change: Callable[[Path], None]):
    path = write_tar(tmp_path / "x.tar", [(f"{k}.png", png(k)) for k in range(4)])
    write_index(path)
    assert load_index(str(path))
    change(path)
    assert load_index(str(path)) is None
    source = open_source(str(path))
    assert sorted(source.read(i) for i in range(4)) == sorted(png(k) for k in range(4))


class Payload:
    """Unpickled, it leaves a trace."""

    def __init__(self, proof: Path) -> None:
        self.proof = str(proof)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.proof,)


def lie(path: Path, text: dict[str, Any] | None = None, **arrays: Any) -> None:
    """Put other values into the index of a shard."""
    with np.load(index_path(path)) as file:
        held = dict(file)
    if text is not None:
        changed = json.loads(held["about"].tobytes()) | text
        held["about"] = np.frombuffer(json.dumps(changed).encode(), np.uint8)
    np.savez(index_path(path), **(held | arrays))


def told(path: Path, name: str, place: int, value: int) -> None:
    """Put another number into a record of the index."""
    with np.load(index_path(path)) as file:
        records = file["records"].copy()
    records[name][place] = value
    lie(path, records=records)


def pipe(path: Path) -> None:
    index_path(path).unlink()
    os.mkfifo(index_path(path))


def inflating(path: Path) -> None:
    """200 kB that become 200 MB."""
    with np.load(index_path(path)) as file:
        np.savez_compressed(index_path(path), **(dict(file) | {"more": np.zeros(200 << 20, np.uint8)}))


LIES: dict[str, Callable[[Path], object]] = {
    "pickle": lambda path: index_path(path).write_bytes(pickle.dumps(Payload(path.parent / "proof"))),
    "pickle in an array": lambda path: lie(path, records=np.array([Payload(path.parent / "proof")], object)),
    "pipe": pipe,
    "inflating": inflating,
    "an array alone": lambda path: np.save(index_path(path).open("wb"), np.zeros(3)),
    "a claim of 2**60 records": lambda path: index_path(path).write_bytes(
        index_path(path).read_bytes().replace(b"(4,)", b"(2**60,)")
    ),
    **{
        f"about {about}": functools.partial(lie, text=about)
        for about in (
            {"version": 0},
            {"bytes": "10240"},
            {"kinds": []},
            {"kinds": None},
            {"kinds": {"0": "0", "1": "1", "2": "2", "3": "3"}},
            {"kinds": ["0", "1", 2]},
            {"kinds": "012"},
            {"folder_kinds": 5},
            {"left_out": 3},
            {"left_out": [["a"]]},
        )
    },
    **{
        f"arrays {k}": functools.partial(lie, **arrays)
        for k, arrays in enumerate(
            (
                {"records": np.zeros(4)},
                {"records": np.zeros((2, 2), RECORD)},
                {"records": np.array(0)},
                {"records": np.zeros(4, RECORD)},
                {"labels": np.zeros(3, np.int32)},
                {"labels": np.full(4, 3, np.int32)},
                {"labels": np.full(4, -2, np.int32)},
                {"labels": np.zeros(4)},
                {"labels": np.zeros((4, 1), np.int32)},
                {"folders": np.full(4, 0, np.int32)},
                {"folders": np.zeros(5, np.int32)},
                {"about": np.frombuffer(b"[1, 2]", np.uint8)},
                {"about": np.frombuffer(b"[" * 100_000, np.uint8)},
                {"about": np.zeros(4)},
            )
        )
    },
    "beyond the end": lambda path: told(path, "block", 3, 1 << 31),
    "before the start": lambda path: told(path, "block", 0, 0),
    "out of order": lambda path: told(path, "block", 1, 40),
    "too large": lambda path: told(path, "size", 1, 0xFFFFFFFF),
}


@pytest.mark.parametrize("change", LIES.values(), ids=LIES)
def test_an_index_that_lies_is_not_used_and_executes_nothing(tmp_path, change: Callable[[Path], object]):
    path = write_tar(
        tmp_path / "x.tar",
        [(f"{k}.{x}", png(k) if x == "png" else b"%d" % (k % 3)) for k in range(4) for x in ("cls", "png")],
    )
    write_index(path)
    assert load_index(str(path))
    change(path)
    source = open_source(str(path))
    assert [source.read(i) for i in range(4)] == [png(k) for k in range(4)]
    assert source.labels.tolist() == [0, 1, 2, 0]
    assert source.notes == [
        f"{path}: 1 of 1 shards have an index beside them that does not fit: they were indexed anew"
    ]
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("seed", range(3))
def test_an_index_of_random_damage_gives_no_other_images(tmp_path, seed):
    draw = random.Random(seed)
    path = write_tar(tmp_path / "x.tar", [(f"{k}.png", png(k)) for k in range(4)])
    write_index(path)
    whole = index_path(path).read_bytes()
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        index_path(path).write_bytes(content)
        source = open_source(str(path))
        for i in range(len(source)):
            assert source.path(i)
            with contextlib.suppress(Unreadable):
                assert source.read(i) in [png(k) for k in range(4)]


def test_a_folder_that_cannot_be_written_to_is_left_as_it_is(tmp_path):
    write_shards(tmp_path, [3])
    before = sorted(os.listdir(tmp_path))
    tmp_path.chmod(0o555)
    try:
        assert len(open_source(str(tmp_path))) == 3
    finally:
        tmp_path.chmod(0o755)
    assert sorted(os.listdir(tmp_path)) == before


def test_the_fingerprint_follows_what_is_in_the_shards_not_their_place(tmp_path):
    def fingerprint(folder: str, counts: list[int], **more: bytes) -> str:
        source = write_shards(tmp_path / folder, counts)
        if more:
            write_tar(tmp_path / folder / "000.tar", [(f"{k}.png", v) for k, v in more.items()])
            source = open_source(str(tmp_path / folder))
        return source.fingerprint()

    first = fingerprint("a", [2, 2])
    assert fingerprint("b", [2, 2]) == first
    others = [
        fingerprint("c", [2, 3]),
        fingerprint("d", [3, 1]),
        fingerprint("e", [2, 2], x=png(0), y=png(1)),
        fingerprint("f", [2, 2], x=png(0), z=png(1)),
        fingerprint("g", [2, 2], y=png(1), x=png(0)),
    ]
    (tmp_path / "b" / "000.tar").rename(tmp_path / "b" / "004.tar")
    (tmp_path / "b" / "001.tar").rename(tmp_path / "b" / "000.tar")
    others.append(open_source(str(tmp_path / "b")).fingerprint())
    (tmp_path / "a" / "classes.txt").write_text("x\ny\nz\n")
    others.append(open_source(str(tmp_path / "a")).fingerprint())
    assert len({first, *others}) == 8


# --- the order


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Source:
    """Shards of very different sizes, one of them empty."""
    folder = tmp_path_factory.mktemp("many")
    sizes, first = [300, 40, 0, 1, 250, 409], 0
    for number, size in enumerate(sizes):
        write_tar(folder / f"{number}.tar", [(f"{k}.png", b"x") for k in range(first, first + size)])
        first += size
    return open_source(str(folder))


SHARD = np.repeat(np.arange(6), [300, 40, 0, 1, 250, 409])


@pytest.mark.parametrize("buffer", [1, 2, 30, 500, 999])
def test_with_a_buffer_images_move_by_less_than_it_from_the_shards_in_random_order(many, buffer):
    shard_orders = set()
    for seed in range(3):
        for epoch in range(3):
            order = many.order(seed, epoch, buffer)
            assert order.equal(many.order(seed, epoch, buffer))
            order = order.numpy()
            assert order.dtype == np.int64
            assert sorted(order.tolist()) == list(range(1000))
            if buffer > 100:  # the order of the shards no longer shows
                continue
            where = np.argsort(order)
            by_shard = sorted(set(SHARD), key=lambda shard: np.median(where[shard == SHARD]))
            plain = np.concatenate([np.flatnonzero(shard == SHARD) for shard in by_shard])
            moved = np.abs(where[plain] - np.arange(1000))
            assert moved.max() < buffer
            if buffer > 10:
                assert moved.mean() > buffer / 10
            shard_orders.add(tuple(by_shard))
    if buffer < 100:
        assert len(shard_orders) > 5


def test_two_epochs_and_two_seeds_differ(many):
    for buffer in (0, 30):
        orders = {tuple(many.order(seed, epoch, buffer).tolist()) for seed in range(3) for epoch in range(3)}
        assert len(orders) == 9


@pytest.mark.parametrize("buffer", [0, 1000, 5000])
def test_no_buffer_or_one_for_all_is_a_plain_permutation(many, buffer):
    assert many.order(3, 2, buffer).equal(epoch_order(1000, 3, 2))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_that_take_slices_read_each_image_once(tmp_path, ranks):
    source = write_shards(tmp_path, [7, 9, 0, 8])
    for epoch in range(2):
        order = source.order(0, epoch, 5)
        read = [source.read(i) for rank in range(ranks) for i in order[rank::ranks].tolist()]
        assert sorted(read) == sorted(png(i) for i in range(24))
