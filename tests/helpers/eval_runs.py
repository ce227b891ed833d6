"""Runs to evaluate, images to show, and what `fastdino-eval` says when it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import checkpoint
from fastdino import eval as eval_
from fastdino.config import Config, CropPolicy, DataConfig, ModelConfig
from fastdino.dino import DINO

CONFIG = Config(
    data=DataConfig(crops=CropPolicy(global_crops_size=16, local_crops_size=8)),
    model=ModelConfig(arch="vit_nano", patch_size=8, out_dim=8, head_hidden_dim=8, bottleneck_dim=4),
)


def make_run(folder: Path, classes: int = 3, n: int = 36, config: Config = CONFIG) -> Path:
    """A run's folder with a teacher, and folders `images` and `val` of n in some classes, hard to tell."""
    torch.manual_seed(11)  # another than the run's: a trained teacher has not its initial weights
    checkpoint.write_teacher(folder / "teacher.safetensors", DINO(config).teacher, config, 7)
    rng = np.random.default_rng(0)
    colours = np.concatenate((np.eye(3), 1 - np.eye(3)))
    for part in ("images", "val"):
        for i in range(n):
            path = folder / part / f"class{i % classes}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            colour = 110 + rng.normal(0, 14, 3) + 16 * colours[i % classes]
            pixels = np.clip(colour + rng.normal(0, 30, (20, 24, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def refusal(command: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `fastdino-eval` says on stderr when it refuses a command."""
    monkeypatch.setattr(eval_.tyro.extras, "subcommand_cli_from_dict", lambda *a, **k: command())
    with pytest.raises(SystemExit) as exit_:
        eval_.main()
    return str(exit_.value.code)


ATTENTION_CONFIG = Config(
    data=DataConfig(crops=CropPolicy(global_crops_size=16, local_crops_size=8, mean=(0.4, 0.5, 0.6))),
    model=ModelConfig(arch="vit_nano", patch_size=4, out_dim=8, head_hidden_dim=8, bottleneck_dim=4),
)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Something smooth, as video codecs want it."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def make_attention_run(folder: Path) -> Path:
    """A run's folder, and in `images` three of different sizes."""
    checkpoint.write_teacher(
        folder / "teacher.safetensors", DINO(ATTENTION_CONFIG).teacher, ATTENTION_CONFIG, 1
    )
    (folder / "images").mkdir()
    for i, size in enumerate([(50, 40), (33, 70), (40, 40)]):
        photo(*size, seed=i).save(folder / "images" / f"{i}.png")
    return folder


def make_run_with_flaws(folder: Path) -> Path:
    """`make_run` with an image that cannot be read, and `flat`: a folder without classes, names not ASCII."""
    folder = make_run(folder, n=14)
    (folder / "images" / "class1" / "4.png").write_bytes(b"no image")
    flat = folder / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted((folder / "val").rglob("*.png"))[:3]):
        Image.open(path).save(flat / f"tür {i}.png")
    return folder
