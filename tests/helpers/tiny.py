"""A run small enough for a test: a folder of little images, and a configuration that trains on it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader

from fastdino import checkpoint
from fastdino.config import Config, CropPolicy, DataConfig, ModelConfig, OptimConfig, RunConfig
from fastdino.dino import DINO


def make_images(folder: Path, n: int, classes: int = 0) -> Path:
    """n random PNGs, in `classes` sub-folders if asked."""
    rng = np.random.default_rng(0)
    for i in range(n):
        path = folder / (f"class{i % classes}" if classes else "") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(path)
    return folder


def make_config(images: Path, out: Path, **flags: Any) -> Config:
    """The tiny run, with any field of any depth changed by its name."""
    base = Config(
        data=DataConfig(
            data=str(images),
            workers=0,
            crops=CropPolicy(global_crops_size=16, local_crops_size=8, local_crops_number=3),
        ),
        model=ModelConfig(arch="vit_nano", patch_size=4, out_dim=96, head_hidden_dim=32, bottleneck_dim=16),
        optim=OptimConfig(epochs=5, batch_size=8, lr=0.05, warmup_epochs=1),
        run=RunConfig(out=str(out), device="cpu", precision="fp32", log_every=1, knn_every_epochs=0),
    )
    config = _changed(base, flags)
    assert not flags, f"no such field: {flags}"
    return config


def _changed(node: Any, flags: dict[str, Any]) -> Any:
    values = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            values[field.name] = _changed(value, flags)
        elif field.name in flags:
            values[field.name] = flags.pop(field.name)
    return dataclasses.replace(node, **values)


def final_tensors(out: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of checkpoint `step`: student, teacher, centre, optimiser."""
    path = checkpoint.checkpoints(out)[step]
    shapes = FileSystemReader(path).read_metadata().state_dict_metadata
    into = {name: torch.zeros(m.size, dtype=m.properties.dtype) for name, m in shapes.items()}
    checkpoint.load(path, into)
    return into


def make_dino(**flags: Any) -> DINO:
    """The tiny run's networks, the same ones each time."""
    torch.manual_seed(0)
    return DINO(make_config(Path("unused"), Path("unused"), **flags))


def perturb(module: nn.Module) -> None:
    """Move every parameter away from where it is."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
