"""A whole update of a small ViT, as fastdino/train.py makes it of a batch that has been loaded."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Timed = Callable[..., None]


@pytest.mark.parametrize("variant", ["fastdino", "matrix-products"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_update(timed: Timed, small: bool, dtype: str, variant: str) -> None:
    """ViT-Ti/16, two images; beside it, products of matrices of its sizes, which no commit changes."""
    from fastdino import optim
    from fastdino.config import Config, CropPolicy, DataConfig, ModelConfig, OptimConfig
    from fastdino.data import crops
    from fastdino.dino import DINO

    images, out_dim = (1, 100) if small else (2, 65536)
    policy = CropPolicy(global_crops_size=32, local_crops_size=16) if small else CropPolicy()
    config = Config(
        data=DataConfig(crops=policy),
        model=ModelConfig(arch="vit_nano" if small else "vit_tiny", patch_size=16, out_dim=out_dim),
        optim=OptimConfig(batch_size=images),
    )
    dino = DINO(config).train()
    optimizer = optim.make_optimizer(dino.student, config.optim)
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    sides = [policy.global_crops_size] * policy.n_global + [
        policy.local_crops_size
    ] * policy.local_crops_number
    loaded = [torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8) for side in sides]
    compute = getattr(torch, dtype)

    def update() -> None:
        views = [crops.normalize(x, policy) for x in loaded]
        with torch.autocast("cpu", compute, enabled=compute != torch.float32):
            loss, teacher_mean = dino(views, 0)
        loss.backward()
        norm = optim.clip_gradients(dino.student, config.optim.clip_grad, config.optim.clip)
        optimizer.found_inf = (~torch.isfinite(loss.detach() + norm)).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        dino.loss.move_center(teacher_mean)
        dino.update_teacher(0.996)

    width = 32 if small else 768
    x, weight = (torch.randn(2 * width, width).to(compute) for _ in range(2))

    def products() -> Tensor:
        out = x
        for _ in range(8):
            out = (x @ weight.t()) @ weight
        return out

    variants = {"fastdino": update, "matrix-products": products}
    timed(f"update, {dtype}", variant, variants, 20)
