"""Every loader is checked and timed; the JPEGs are as ImageNet's."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import loader
from fastdino.data.samples import render_samples


def test_loader_times_every_loader_and_writes_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render_samples(tmp_path / "samples", train=16, val=8, size=160)
    words = ["--images", str(tmp_path / "samples" / "train"), "--device", "cpu", "--quick", "--workers", "1"]
    monkeypatch.setattr("sys.argv", ["loader", *words, "--out", str(tmp_path / "out")])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Its limit of one thread holds in its forked workers too, where more would wait for ever for threads that
    # only the parent has. The tests that come after get theirs back.
    threads = torch.get_num_threads()
    try:
        loader.main()
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    for part in ("core", "workers"):
        found = {row["loader"]: row for row in rows if row["part"] == part}
        assert {"official DINO", "torchvision v2", "fastdino"} <= found.keys()
        assert all(row["images_per_s"]["low"] > 0 for row in found.values())
    assert found["official DINO"]["KB_sent"] == 4 * found["fastdino"]["KB_sent"]
    assert "times official" in (tmp_path / "out" / "table.md").read_text()


def test_photos_have_the_sizes_and_texture_of_photographs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    loader.make_photos(tmp_path / "photos", 16)
    found = sorted((tmp_path / "photos").glob("*/*.jpg"))
    assert {path.parent.name for path in found} == set(loader.photographs())
    for path in found:
        with Image.open(path) as image:
            assert image.size in {(500, 400), (500, 375), (400, 500), (500, 333)}
            assert [line[1:3] for line in image.layer] == [
                (2, 2),
                (1, 1),
                (1, 1),
            ]  # chroma at half resolution
    before = [path.read_bytes() for path in found]
    assert 90e3 < sum(map(len, before)) / 16 < 130e3
    loader.make_photos(tmp_path / "photos", 8)  # files that are there stay
    assert before == [path.read_bytes() for path in found]
