"""fastdino-data: packing loses and changes nothing, whatever stops it, and checking finds what is there."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino import files
from fastdino.data import open_source, tool
from fastdino.data.sources import Files, Source
from fastdino.data.tars import load_index


def encoded(seed: int, size: tuple[int, int] = (120, 100), mode: str = "RGB", form: str = "png") -> bytes:
    width, height = size
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, width * height * bands // 8, dtype=np.uint8)
    out = io.BytesIO()
    Image.frombytes(mode, size, np.repeat(pixels, 8).tobytes()).save(out, form)
    return out.getvalue()


def fill(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        place = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "wb") as file:
            file.write(content)
    return folder


def some(n: int) -> dict[str, bytes]:
    """n images of three classes."""
    return {f"{('ape', 'a cat', 'dog')[i % 3]}/{i}.png": encoded(i, (40, 16)) for i in range(n)}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The command sets one, as if it were a process of its own."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(*arguments: object) -> int | str:
    """Exit status of the command, or the message that it ends with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fastdino-data", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            tool.main()
    assert caught.value.code is not None
    return caught.value.code


def held(source: Source) -> list[tuple[bytes, str | None]]:
    """Bytes and class of each image."""
    named = None if source.labels is None else [source.classes[label] for label in source.labels]
    return [(source.read(i), named and named[i]) for i in range(len(source))]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- pack


def test_packing_keeps_every_byte_and_label_and_mixes_the_images(tmp_path, capsys):
    fill(tmp_path / "in", some(50))
    source = open_source(str(tmp_path / "in"))
    assert run("pack", tmp_path / "in", tmp_path / "out", "--images-per-shard", 12) == 0
    assert f"{tmp_path}/out: 50 images in 5 shards, " in capsys.readouterr().out
    tars = [f"{number:06d}.tar" for number in range(5)]
    indexes = [f"{name}.index.npz" for name in tars]
    assert names(tmp_path / "out") == sorted([*tars, *indexes, "classes.txt", "pack.json"])
    packed = open_source(str(tmp_path / "out"))
    assert sorted(held(packed)) == sorted(held(source))
    assert packed.classes == source.classes
    assert packed.notes == []
    assert all(load_index(str(tmp_path / "out" / name)) for name in tars)
    first = open_source(str(tmp_path / "out" / "000000.tar"))
    assert set(first.labels.tolist()) == {0, 1, 2}
    assert first.classes == source.classes
    order = source.order(0, 0).tolist()
    assert held(packed) == [held(source)[i] for i in order]
    with tarfile.open(tmp_path / "out" / "000004.tar") as tar:
        i = order[48]
        stem = source.name(i).removesuffix(".png").replace("/", f"/{i:08d}-")
        assert tar.getnames()[:2] == [f"{stem}.cls", f"{stem}.png"]


def test_the_same_images_give_the_same_bytes_with_any_number_of_processes(tmp_path):
    fill(tmp_path / "in", some(20))
    for out, workers in (("a", 1), ("b", 3)):
        run("pack", tmp_path / "in", tmp_path / out, "--images-per-shard", 6, "--workers", workers)
    for number in range(4):
        a, b = ((tmp_path / out / f"{number:06d}.tar").read_bytes() for out in "ab")
        assert a == b


def test_the_order_is_kept_or_mixed_by_another_seed(tmp_path):
    fill(tmp_path / "in", some(20))
    source = open_source(str(tmp_path / "in"))
    assert run("pack", tmp_path / "in", tmp_path / "a", "--no-shuffle") == 0
    assert held(open_source(str(tmp_path / "a"))) == held(source)
    assert run("pack", tmp_path / "in", tmp_path / "b", "--seed", "7") == 0
    expected = [held(source)[i] for i in source.order(7, 0).tolist()]
    assert held(open_source(str(tmp_path / "b"))) == expected


def test_names_stay_readable_and_become_unique_keys(tmp_path):
    listed = {
        "a/x.y.JPEG": "a/00000000-x_y.JPEG",
        "a/x_y.jpeg": "a/00000001-x_y.jpeg",
        "a/x_y.png": "a/00000002-x_y.png",
        ".hid/.den.png": "_hid/00000003-_den.png",
        "v1.0/b": "v1.0/00000004-b.jpg",
        "v1.0/c.gif": "v1.0/00000005-c_gif.jpg",
        "caf\udce9/é.png": "caf\udce9/00000006-é.png",
        f"{'long' * 40}/{'er' * 80}.png": f"{'long' * 40}/00000007-{'er' * 80}.png",
        "../in/a/x_y.png": "in/a/00000008-x_y.png",
    }
    fill(tmp_path / "in", {name: encoded(i, (9, 8)) for i, name in enumerate(listed)})
    lines = [os.fsencode(name) + b"\t%d\n" % (i % 2) for i, name in enumerate(listed)]
    (tmp_path / "in" / "list.txt").write_bytes(b"".join(lines))
    assert run("pack", tmp_path / "in" / "list.txt", tmp_path / "out", "--no-shuffle") == 0
    source, packed = open_source(str(tmp_path / "in" / "list.txt")), open_source(str(tmp_path / "out"))
    assert [packed.name(i) for i in range(len(packed))] == list(listed.values())
    assert held(packed) == held(source)
    assert run("pack", tmp_path / "out", tmp_path / "again", "--no-shuffle") == 0  # shards as well
    assert held(open_source(str(tmp_path / "again"))) == held(source)


def test_images_without_labels_get_none_from_their_folders(tmp_path):
    fill(tmp_path, {"a/1.png": encoded(1), "b/2.png": encoded(2)})
    (tmp_path / "list.txt").write_text("a/1.png\nb/2.png\n")
    assert run("pack", tmp_path / "list.txt", tmp_path / "out") == 0
    assert open_source(str(tmp_path / "out")).labels is None


def test_files_that_cannot_be_read_are_left_out_and_named(tmp_path, capsys):
    fill(tmp_path / "in", some(8))
    (tmp_path / "in" / "dog" / "5.png").write_bytes(b"")
    (tmp_path / "in" / "ape" / "[b]x.png").symlink_to("nowhere")
    (tmp_path / "in" / "dog" / "bad.png").write_bytes(b"hello")  # packed as it is: nothing is decoded
    for again in ("", ", 3 of which were there already"):
        assert run("pack", tmp_path / "in", tmp_path / "out", "--images-per-shard", 4) == 0
        out = capsys.readouterr().out
        assert f"left out, 2 of 10 files (all in {tmp_path}/out/left_out.txt):" in out
        assert f"{tmp_path}/in/ape/[b]x.png: no such file\n" in out
        assert f"{tmp_path}/in/dog/5.png: empty file\n" in out
        assert f"out: 8 images in 3 shards{again}, " in out
        lines = (tmp_path / "out" / "left_out.txt").read_text().splitlines()
        assert [line.rpartition("/")[2] for line in lines] == ["[b]x.png: no such file", "5.png: empty file"]
    assert (b"hello", "dog") in held(open_source(str(tmp_path / "out")))


def test_what_a_pack_leaves_out_is_said(tmp_path, capsys):
    fill(tmp_path / "in", some(6) | {"a.heic": b"", "ape/0_mask.png": encoded(0), ".git/x.png": b""})
    assert run("pack", tmp_path / "in", tmp_path / "out", "--exclude", "*_mask.png") == 0
    left_out = f"{tmp_path}/in: 8 files: 6 taken, 2 left out: 1 .heic (install pillow-heif: pip install "
    assert capsys.readouterr().out.startswith(left_out)
    assert len(open_source(str(tmp_path / "out"))) == 6
    assert run("check", tmp_path / "in", "--json", tmp_path / "x.json", "--include", "*_mask.png") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "1 taken, 7 left out: 6 by no --include" in out
    assert "left out │ 7 files" in out
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["left_out"] == {"files": {"by no --include": 6, ".heic": 1}, "folders": {".git": 1}}


@pytest.mark.parametrize(
    "name", ["@eaDir/x\0.png", "../../a\nb.png", "..a.png", "/x/./y.png", f"{'x/' * 9000}y.png"]
)
def test_any_name_in_a_tar_can_be_packed(tmp_path, monkeypatch, name):
    source = Named(str(tmp_path), [(b"x.png", None)])
    (tmp_path / "x.png").write_bytes(encoded(0))
    source.called = name
    monkeypatch.setattr(tool, "raise_if_stopped", lambda: None)
    written = tool._pack_shard(source, multiprocessing.Value("q", 0), (tmp_path / "000000.tar", np.arange(1)))
    assert written == (1, [])
    assert held(open_source(str(tmp_path / "000000.tar"))) == [(encoded(0), None)]


class Named(Files):
    """One file, by the name that a tar may give it."""

    called = ""

    def name(self, i: int) -> str:
        return self.called

    def path(self, i: int) -> str:
        return os.path.join(self.root, "x.png")


def test_what_killed_packs_left_is_deleted_and_nothing_else(tmp_path):
    fill(tmp_path / "in", some(4))
    command = ("pack", tmp_path / "in", tmp_path / "out")
    assert run(*command) == 0
    before = names(tmp_path / "out")
    left = ["000001.tar", "000001.tar.index.npz", "classes.txt", "left_out.txt", "pack.json"]
    fill(tmp_path / "out", {f".{name}.17.tmp": b"" for name in left} | {".mine.tmp": b""})
    assert run(*command) == 0
    assert names(tmp_path / "out") == sorted([*before, ".mine.tmp"])


def child(work: Callable[[], object]) -> multiprocessing.Process:
    """A process of its own group that does `work`."""

    def alone() -> None:
        os.setsid()
        work()

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    return process


def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Files.read

    def late(self: Files, i: int) -> bytes:
        time.sleep(0.02)
        return read(self, i)

    monkeypatch.setattr(Files, "read", late)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def processes(group: int) -> bool:
    """Whether a process of the group is left; one that has ended but nobody has asked after is not."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of, *_ = status.read_text().rpartition(")")[2].split()
            if int(of) == group and state != "Z":
                return True
    return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_pack_that_is_stopped_leaves_whole_shards_and_goes_on(tmp_path, monkeypatch, how, capfd):
    fill(tmp_path / "in", some(60))
    out = tmp_path / "out"
    command = ("pack", tmp_path / "in", out, "--images-per-shard", 6, "--workers", 2)
    with monkeypatch.context() as patch:
        slow(patch)
        stopped = child(lambda: os._exit(int(run(*command))))
    wait_for(lambda: len(list(out.glob("*.tar"))) >= 3 and list(out.glob(".*.tmp")))
    os.kill(stopped.pid, how)
    stopped.join()
    wait_for(lambda: not processes(stopped.pid))  # the others end too
    assert stopped.exitcode == (-how if how == signal.SIGKILL else 130)
    if how != signal.SIGKILL:
        assert not list(out.glob(".*.tmp"))
        assert capfd.readouterr().err == "fastdino-data: stopped\n"
    whole = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 3 <= len(whole) < 10
    assert all(len(open_source(str(path))) == 6 and not open_source(str(path)).notes for path in whole)
    assert run(*command) == 0
    assert f"60 images in 10 shards, {len(whole)} of which were there already" in capfd.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in whole.items())
    assert not list(out.glob(".*"))
    assert sorted(held(open_source(str(out)))) == sorted(held(open_source(str(tmp_path / "in"))))


def test_a_shard_that_was_damaged_is_written_again(tmp_path):
    fill(tmp_path / "in", some(12))
    command = ("pack", tmp_path / "in", tmp_path / "out", "--images-per-shard", 4)
    assert run(*command) == 0
    whole = [(tmp_path / "out" / f"{k:06d}.tar").read_bytes() for k in range(3)]
    (tmp_path / "out" / "000000.tar").unlink()
    os.truncate(tmp_path / "out" / "000001.tar", 3000)
    (tmp_path / "out" / "000002.tar.index.npz").unlink()
    assert run(*command) == 0
    assert [(tmp_path / "out" / f"{k:06d}.tar").read_bytes() for k in range(3)] == whole


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path):
    fill(tmp_path / "in", some(4))
    out = tmp_path / "out"
    assert run("pack", tmp_path / "in", out, "--images-per-shard", 2) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    message = str(run("pack", tmp_path / "in", out, "--images-per-shard", 3, "--seed", 1))
    assert message == (
        f"fastdino-data: {out} holds a pack of other settings (images_per_shard 2 not 3, seed 0 not 1): give "
        "another folder or delete it"
    )
    (tmp_path / "in" / "dog" / "2.png").rename(tmp_path / "in" / "dog" / "3.png")
    message = str(run("pack", tmp_path / "in", out, "--images-per-shard", 2))
    assert message.endswith("out holds a pack of other images: give another folder or delete it")
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    fill(tmp_path / "other", {"x.txt": b"x", ".x.tar.1.tmp": b"x"})
    message = str(run("pack", tmp_path / "in", tmp_path / "other"))
    assert message.endswith("other holds other files: give a new or empty folder for the shards")
    assert names(tmp_path / "other") == [".x.tar.1.tmp", "x.txt"]
    message = str(run("pack", tmp_path / "in", tmp_path / "other" / "x.txt"))
    assert message.endswith("x.txt is a file: give a new folder for the shards")


def test_two_packs_do_not_write_into_one_folder(tmp_path, monkeypatch):
    fill(tmp_path / "in", some(30))
    out = tmp_path / "out"
    command = ("pack", tmp_path / "in", out, "--images-per-shard", 15)
    with monkeypatch.context() as patch:
        slow(patch)
        first = child(lambda: os._exit(int(run(*command))))
    wait_for(lambda: list(out.glob(".*.tmp")))
    assert str(run(*command)).endswith("out: another pack is writing there; wait for it or stop it")
    first.join()
    assert first.exitcode == 0
    assert len(open_source(str(out))) == 30


@pytest.mark.parametrize("where", ["tar", "sync"])
def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path, monkeypatch, where):
    contents = {**some(8), "dog/large.png": encoded(0, (400, 400))}
    fill(tmp_path / "in", contents)
    out = tmp_path / "out"
    command = ("pack", tmp_path / "in", out, "--images-per-shard", 3, "--workers", 1)
    with monkeypatch.context() as patch:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if where == "tar":  # no file can grow so far
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(contents["dog/large.png"]) // 2, limits[1]))
        else:

            def full(path: Path) -> None:
                if path.name.startswith(".000001.tar.") and "index" not in path.name:
                    raise OSError(28, "No space left on device")

            patch.setattr(files, "sync", full)
        try:
            message = str(run(*command))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"out: the disk is full \(.*\): \d of 3 shards are written; free some space", message)
    written = {name.removesuffix(".index.npz") for name in names(out)} - {"classes.txt", "pack.json"}
    assert all(len(open_source(str(out / name))) == 3 for name in written)
    assert {f"{name}.index.npz" for name in written} <= set(names(out))
    assert f"{len(written)} of 3" in message
    assert run(*command) == 0
    assert sorted(held(open_source(str(out)))) == sorted(held(open_source(str(tmp_path / "in"))))


def test_a_process_that_dies_is_said(tmp_path, monkeypatch):
    fill(tmp_path / "in", some(8))
    with monkeypatch.context() as patch:
        patch.setattr(Files, "read", lambda self, i: os._exit(1) if i == 5 else encoded(i))
        message = run("pack", tmp_path / "in", tmp_path / "out", "--images-per-shard", 2)
    assert message == "fastdino-data: a process died: often memory ran out; lower --workers"
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "{in}", "{in}/out", "--images-per-shard", "0"], "--images-per-shard 0: give 1 or more"),
        (["pack", "{in}", "{in}/out", "--seed", "-1"], "--seed -1: give 0 or more"),
        (["pack", "{in}", "{in}/out", "--workers", "0"], "--workers 0: give 1 or more, or -1 for all cores"),
        (["pack", "{in}/none", "{in}/out"], "none: no such folder or file; give a folder of images"),
        (["pack", "{in}/lines", "{in}/out"], r"class 'a\\nb' is empty or has a line break; rename it"),
        (["check", "{in}", "--json", "{in}/no/x.json"], "there is no folder .*/no; make it first"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, arguments, message):
    fill(tmp_path, {"lines/a\nb/1.png": b"", "lines/c/1.png": b""})
    result = run(*(str(argument).replace("{in}", str(tmp_path)) for argument in arguments))
    assert re.match(f"fastdino-data: .*{message}", str(result))
    assert not (tmp_path / "out").exists()


# --- check


def checked(folder: Path, *options: object) -> dict:
    assert run("check", folder, "--json", f"{folder}.json", *options) == 0
    return json.loads(Path(f"{folder}.json").read_text())


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    contents = {
        "ape/1.jpg": encoded(1, (200, 100), "RGB", "jpeg"),
        "ape/2.jpg": encoded(2, (300, 100), "L", "jpeg"),
        "ape/[i]3.jpg": encoded(3, (400, 90), "CMYK", "jpeg"),
        "ape/caf\udce9.png": encoded(4, (500, 95), "RGBA"),
        "dog/1.png": encoded(5, (600, 96), "L"),
        "dog/2.png": encoded(5, (600, 96), "L"),
        "dog/3.png": encoded(1, (200, 100), "RGB", "jpeg"),
        "dog/4.png": encoded(5, (600, 96), "L"),
        "dog/cut.jpg": encoded(6, (200, 100), "RGB", "jpeg")[:-300],
        "dog/empty.jpg": b"",
        "dog/text.jpg": b"hello",
    }
    return fill(tmp_path / "in", contents)


@pytest.mark.parametrize("workers", [1, 3])
def test_check_finds_what_there_is(mixed, workers, capsys):
    report = checked(mixed, "--workers", workers)
    sizes = [200, 300, 400, 500, 600, 600, 200, 600]
    paths = {name: f"{mixed}/{name}" for name in ("ape/[i]3.jpg", "dog/1.png", "dog/2.png", "dog/4.png")}
    twice = [f"{mixed}/ape/1.jpg", f"{mixed}/dog/3.png"]
    broken = report.pop("broken")
    assert report == {
        "data": str(mixed),
        "images": 11,
        "readable": 8,
        "bytes": sum(path.stat().st_size for path in mixed.rglob("*") if path.is_file()),
        "classes": {"ape": 4, "dog": 7},
        "formats": {"JPEG": 4, "PNG": 4},
        "modes": {"L": 4, "RGB": 2, "CMYK": 1, "RGBA": 1},
        "width": {"min": 200, "median": np.median(sizes), "max": 600},
        "height": {"min": 90, "median": 96, "max": 100},
        "small": [paths["ape/[i]3.jpg"], f"{mixed}/ape/caf\\udce9.png"],
        "duplicates": [twice, [paths["dog/1.png"], paths["dog/2.png"], paths["dog/4.png"]]],
        "left_out": {"files": {}, "folders": {}},
        "notes": [],
    }
    assert [Path(one["path"]).name for one in broken] == ["cut.jpg", "empty.jpg", "text.jpg"]
    assert "truncated" in broken[0]["reason"]
    assert broken[1]["reason"] == "empty file"
    out = " ".join(capsys.readouterr().out.split())
    for said in (
        "images │ 11 ",
        "broken │ 3 ",
        "colour modes │ L 4, RGB 2, CMYK 1, RGBA 1",
        "width │ 200 to 600, median 450",
        "shorter side under 96 px │ 2 ",
        "duplicates │ 3, of 2 images",
        "classes │ 2: 4 (ape) to 7 (dog) images, median 5.5",
        f"{mixed}/dog/empty.jpg: empty file",
        " ".join(twice),
    ):
        assert said in out


def test_shards_are_checked_as_the_files_they_were_packed_from(mixed, tmp_path, capsys):
    expected = checked(mixed)
    assert run("pack", mixed, tmp_path / "out", "--images-per-shard", 4) == 0
    report = checked(tmp_path / "out")
    for key in ("readable", "bytes", "formats", "modes", "width", "height"):
        assert report[key] == expected[key]
    assert report["images"] == 10
    assert sorted(map(len, report["duplicates"])) == [2, 3]
    os.truncate(tmp_path / "out" / "000000.tar", 5000)
    assert "000000.tar is cut short" in checked(tmp_path / "out")["notes"][0]
    assert "000000.tar is cut short" in capsys.readouterr().out


def test_check_of_images_without_classes_and_with_many_broken_ones(tmp_path, capsys):
    fill(tmp_path / "in", {f"{k:03d}.png": b"%d" % k for k in range(30)} | {"good.png": encoded(0)})
    report = checked(tmp_path / "in")
    assert report["classes"] is None
    assert len(report["broken"]) == 30
    out = capsys.readouterr().out
    assert "019.png: not a JPEG" in out
    assert "020.png" not in out
    assert "... and 10 more" in out


def test_of_many_that_are_the_same_some_are_shown(tmp_path, capsys):
    fill(tmp_path / "in", {f"{k:03d}.png": encoded(0) for k in range(30)})
    assert checked(tmp_path / "in")["duplicates"] == [[f"{tmp_path}/in/{k:03d}.png" for k in range(30)]]
    out = capsys.readouterr().out
    assert f"{tmp_path}/in/003.png and 26 more\n" in out
    assert "29, of 1 images" in out


def test_check_exits_with_1_if_nothing_can_be_read(tmp_path, capsys):
    fill(tmp_path / "in", {"a.png": b"x", "b.png": b"y"})
    assert run("check", tmp_path / "in") == 1
    assert "not a JPEG" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["check", "pack"])
def test_ctrl_c_ends_it_cleanly_and_at_once(tmp_path, monkeypatch, capfd, command):
    fill(tmp_path / "in", some(202))
    out = tmp_path / "out"
    # a process has 200 images to pack, the other one is soon idle
    options = {"check": [], "pack": [out, "--images-per-shard", 200]}[command]
    with monkeypatch.context() as patch:
        slow(patch)
        stopped = child(lambda: os._exit(int(run(command, tmp_path / "in", *options, "--workers", 2))))
    if command == "pack":
        wait_for(lambda: list(out.glob("000001.tar")))
    time.sleep(0.3)
    os.killpg(stopped.pid, signal.SIGINT)  # as a terminal does
    stopped.join()
    wait_for(lambda: not processes(stopped.pid))
    assert stopped.exitcode == 130
    assert capfd.readouterr() == ("", "fastdino-data: stopped\n")
    assert not list(out.glob("000000*"))


def test_the_hashes_of_all_images_are_grouped():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 4, (300, 2)).astype(np.uint64)
    expected: dict[tuple, list[int]] = {}
    for i, row in enumerate(hashes.tolist()):
        if any(row):
            expected.setdefault(tuple(row), []).append(i)
    assert tool._duplicates(hashes) == sorted(group for group in expected.values() if len(group) > 1)
    assert tool._duplicates(np.zeros((0, 2), np.uint64)) == []
    assert tool._duplicates(np.arange(8, dtype=np.uint64).reshape(4, 2)) == []


def test_help_explains_the_commands(capsys):
    assert run("--help") == 0
    assert "pack" in (text := capsys.readouterr().out)
    assert "check" in text
    assert run("pack", "--help") == 0
    text = capsys.readouterr().out
    for option in ("DATA", "OUT", "--images-per-shard", "--shuffle", "--seed", "--workers"):
        assert option in text
    assert run("check", "--help") == 0
    assert "--json" in capsys.readouterr().out
