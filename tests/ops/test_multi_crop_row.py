"""The row of parameters: one layout for Python and C++."""

from pathlib import Path

import torch

from fastdino.data.crops import View, encode
from fastdino.ops.multi_crop_row import ADJUSTMENTS, AT, FIELDS, ROW, header

HEADER = Path(__file__).parents[2] / "kernels" / "multi_crop_row.h"


def test_the_kernels_header_is_made_from_the_row():
    command = "python fastdino/ops/multi_crop_row.py > kernels/multi_crop_row.h"
    assert HEADER.read_text() == header(), f"run {command}, and build the library again"


def test_fields_lie_one_after_another():
    assert [(at.start, at.stop - at.start) for at in AT.values()] == [
        (sum(list(ROW.values())[:i]), n) for i, n in enumerate(ROW.values())
    ]
    assert list(AT) == list(ROW)
    assert sum(ROW.values()) == FIELDS


def test_a_view_is_encoded_field_by_field():
    jitter = (("hue", -0.1), ("contrast", 1.25))
    view = View(24, (3, 5, 7, 9), True, jitter, False, 1.5, True)
    plain = View(24, (0, 0, 7, 9), False, (), True, None, False)
    rows = encode([view, plain])
    assert rows.dtype == torch.float64
    assert rows.shape == (2, FIELDS)
    fields = [{name: row[at].tolist() for name, at in AT.items()} for row in rows]
    hue, contrast = (1 + ADJUSTMENTS.index(name) for name in ("hue", "contrast"))
    assert fields[0] == {
        "box": [3, 5, 7, 9],
        "flip": [1],
        "jitter": [hue, -0.1, contrast, 1.25, 0, 0, 0, 0],
        "grayscale": [0],
        "blur": [1.5],
        "solarize": [1],
    }
    assert fields[1] == {
        "box": [0, 0, 7, 9],
        "flip": [0],
        "jitter": [0] * 8,
        "grayscale": [1],
        "blur": [-1],
        "solarize": [0],
    }
