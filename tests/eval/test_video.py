"""Videos of attention: their frames, rate, colours and size, and what is refused."""

import struct
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_runs import ATTENTION_CONFIG as CONFIG
from eval_runs import make_attention_run, photo
from PIL import Image

from fastdino.eval import attention, video
from fastdino.eval.attention import AttentionCommand, panels
from fastdino.eval.maps import NamedImage, look
from fastdino.eval.video import open_film, tile, write_film
from fastdino.weights import load_backbone


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_attention_run(tmp_path)


def command(run: Path, **flags: Any) -> AttentionCommand:
    return AttentionCommand(**({"weights": str(run), "device": "cpu"} | flags))


def write_video(path: Path, frames: list[Image.Image], rate: Fraction) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return path


def read_video(path: Path) -> tuple[Fraction, list[np.ndarray]]:
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return rate, [np.asarray(frame.to_image()) for frame in container.decode(video=0)]


def near(a: np.ndarray, b: np.ndarray, levels: float) -> bool:
    """Whether two pictures differ by what a codec loses, on average."""
    return a.shape == b.shape and bool(np.abs(a.astype(float) - b).mean() < levels)


def test_a_video_becomes_one_of_as_many_frames_at_its_rate(run: Path, capsys):
    frames = [photo(96, 64, seed=i) for i in range(7)]
    film = write_video(run / "in.mp4", frames, Fraction(24000, 1001))
    out = run / "out.mp4"
    command(run, video=str(film), out=str(out), image_size=32).run()
    assert capsys.readouterr().out == f"{out}: 7 frames, 23.976 a second\n"
    rate, pictures = read_video(out)
    assert rate == Fraction(24000, 1001)
    assert len(pictures) == 7
    network = load_backbone(str(run))
    for decoded, picture in zip(read_video(film)[1], pictures, strict=True):
        seen, maps = look(network, Image.fromarray(decoded), 32, CONFIG.data.crops)
        assert picture.shape == (32, 96, 3)
        assert near(picture[:, :48], np.asarray(seen), 8)  # of another frame by 80
        assert near(picture[:, 48:], panels(seen, maps, 0)[0][1], 5)  # of another by 13


def test_heads_masks_and_maps_over_the_frame_share_the_picture(run: Path):
    film = write_video(run / "in.mp4", [photo(48, 32, seed=i) for i in range(3)], Fraction(25))
    sizes = {}
    for name, flags in {
        "heads": {"heads": 2},
        "masks": {"threshold": 0.6},
        "over": {"over": True},
        "fast": {"over": True, "fps": 50.0},
    }.items():
        command(run, video=str(film), out=str(run / f"{name}.mp4"), **flags).run()
        rate, pictures = read_video(run / f"{name}.mp4")
        sizes[name] = (rate, len(pictures), pictures[0].shape[:2])
    assert sizes == {
        "heads": (25, 3, (32, 192)),
        "masks": (25, 3, (64, 96)),
        "over": (25, 3, (32, 48)),
        "fast": (50, 3, (32, 48)),
    }


def test_a_folder_of_frames_plays_in_the_order_of_their_numbers(run: Path):
    pytest.importorskip("av")
    folder = run / "frames"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (40, 40), (20 * i, 120, 60)).save(folder / f"frame{i}.png")
    command(run, video=str(folder), out=str(run / "out.mp4")).run()
    rate, pictures = read_video(run / "out.mp4")
    assert (rate, len(pictures)) == (30, 12)
    for i, picture in enumerate(pictures):
        assert abs(int(picture[16, 16, 0]) - 20 * i) <= 4
    assert [p.name for p in run.iterdir() if p.suffix == ".tmp"] == []


def test_a_film_is_streamed():
    """No frame is read before the one before it was asked for."""
    read = []

    class Load:
        def __init__(self, i: int) -> None:
            self.i = i

        def __call__(self) -> Image.Image:
            read.append(self.i)
            return photo(16, 16)

    with pytest.MonkeyPatch.context() as patch:
        named = [NamedImage(f"{i}.png", Load(i)) for i in range(3)]
        patch.setattr(video, "open_images", lambda paths: list(named))
        film = open_film("frames.txt")
        for i in range(3):
            assert read == list(range(i))
            next(film.frames)


def test_colours_survive_and_odd_sizes_grow_by_a_pixel(tmp_path: Path):
    pytest.importorskip("av")
    blocks = np.array(attention.COLOURS, np.uint8).reshape(2, 3, 3)
    picture = blocks.repeat(33, 0).repeat(21, 1)[:-1, :]
    assert picture.shape == (65, 63, 3)
    assert write_film(iter([picture] * 3), Fraction(10), tmp_path / "o.mp4") == 3
    _, frames = read_video(tmp_path / "o.mp4")
    assert frames[1].shape == (66, 64, 3)
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(frames[1][16 + 33 * i, 10 + 21 * j], blocks[i, j], atol=6)


def test_a_film_that_stops_in_the_middle_leaves_what_was_there(tmp_path: Path):
    pytest.importorskip("av")

    def frames() -> Iterator[np.ndarray]:
        yield from [np.asarray(photo(32, 32, seed=i)) for i in range(100)]
        raise ValueError("no more")

    (tmp_path / "o.mp4").write_bytes(b"the one before")
    with pytest.raises(ValueError, match="no more"):
        write_film(frames(), Fraction(10), tmp_path / "o.mp4")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("o.mp4", b"the one before")]


def test_wide_rows_are_made_smaller(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(video, "MAX_WIDTH", 100)
    panel = np.zeros((30, 40, 3), np.uint8)
    assert tile([[panel, panel]]).shape == (30, 80, 3)
    assert tile([[panel] * 4, [panel] * 4]).shape == (38, 100, 3)  # 160 x 60 times 5 / 8


def test_a_film_from_a_telephone_is_upright(tmp_path: Path):
    """Telephones store frames on their side, with the turn in the track's header (ISO 14496-12, tkhd)."""
    half = Image.new("RGB", (64, 48), (200, 30, 30))
    half.paste((30, 30, 200), (0, 24, 64, 48))  # red above blue
    path = write_video(tmp_path / "in.mp4", [half] * 2, Fraction(10))
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    one = 1 << 16
    assert struct.unpack_from(">9i", content, matrix) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    # a quarter clockwise: red comes to the right
    struct.pack_into(">9i", content, matrix, 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    path.write_bytes(content)
    frame = np.asarray(next(open_film(str(path)).frames)).astype(int)
    assert frame.shape == (64, 48, 3)
    assert frame[32, 40, 0] > 150 > 100 > frame[32, 8, 0]


def test_a_film_that_breaks_off_is_named_and_nothing_is_written(run: Path):
    content = write_video(run / "in.mp4", [photo(48, 32)] * 3, Fraction(10)).read_bytes()
    (run / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.mp4: no pictures in it, or cut short"):
        command(run, video=str(run / "cut.mp4"), out=str(run / "o.mp4")).run()
    (run / "bad.png").write_bytes(b"no image")
    frames = run / "frames.txt"
    frames.write_text("images/0.png\nbad.png\n")
    with pytest.raises(ValueError, match=r"bad\.png: not a JPEG"):
        command(run, video=str(frames), out=str(run / "o.mp4")).run()
    assert not [p for p in run.iterdir() if p.name.startswith((".o", "o"))]


def test_without_pyav_videos_say_what_to_install_and_pictures_need_none(run: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # importing it raises
    with pytest.raises(ValueError, match=r"pip install 'fastdino\[video\]'"):
        command(run, video=str(run / "images"), out=str(run / "o.mp4")).run()
    command(run, images=(str(run / "images" / "0.png"),), out=str(run / "o.png")).run()
