"""fastdino-train against official DINO's algorithm, update by update, from the same weights and crops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from reference import OfficialRun
from tiny import make_config, make_images

from fastdino import checkpoint, data
from fastdino.config import Config
from fastdino.data import crops
from fastdino.dino import DINO
from fastdino.monitor import read_metrics
from fastdino.train import train

EPOCHS, PER_EPOCH, BATCH = 5, 2, 8


def official(config: Config, dtype: torch.dtype) -> tuple[list[float], OfficialRun]:
    """Ten updates of the reference in `dtype`, on the run's own initial weights and crops."""
    torch.manual_seed(config.run.seed)
    dino = DINO(config)
    flat = {name: value for part in (config.method, config.optim) for name, value in vars(part).items()}
    run = OfficialRun(
        dino.student.to(dtype), flat, EPOCHS, PER_EPOCH, config.data.crops.n_views, config.model.out_dim
    )
    loader = data.make_loader(
        data.open_source(config.data.data),
        config.data.crops,
        batch_size=BATCH,
        pieces=1,
        seed=config.run.seed,
        start_step=0,
        total_steps=EPOCHS * PER_EPOCH,
        workers=0,
    )
    losses = []
    for it, batch in enumerate(loader):
        views = [crops.normalize(v, config.data.crops).to(dtype) for v in batch.views]
        losses.append(run.step(it, views))
    return losses, run


@pytest.mark.parametrize(("norm_last_layer", "accumulate"), [(True, 1), (False, 1), (True, 2)])
def test_ten_updates_equal_official_dino(tmp_path: Path, norm_last_layer: bool, accumulate: int) -> None:
    config = make_config(
        make_images(tmp_path / "images", PER_EPOCH * BATCH + 3),  # three are left over in each epoch
        tmp_path / "run",
        epochs=EPOCHS,
        batch_size=BATCH,
        accumulate=accumulate,  # the reference knows nothing of it
        drop_path_rate=0.0,
        norm_last_layer=norm_last_layer,
        warmup_teacher_temp=0.02,
        teacher_temp=0.05,
        warmup_teacher_temp_epochs=3,
    )
    truth_losses, truth = official(config, torch.float64)
    plain_losses, plain = official(config, torch.float32)

    train(config)
    out = Path(config.run.out)
    losses = [m["loss"] for m in read_metrics(out)]
    dino = DINO(config)
    ours = dino.state_dict()
    checkpoint.load(checkpoint.checkpoints(out)[EPOCHS * PER_EPOCH], ours)

    assert max(truth_losses) - min(truth_losses) > 0.2  # the run moves, or equality would say little
    eps = torch.finfo(torch.float32).eps
    scale = max(abs(np.array(truth_losses)))
    error, plain_error = (abs(np.array(x) - np.array(truth_losses)).max() for x in (losses, plain_losses))
    assert error <= 2 * plain_error + 4 * eps * scale

    # A tensor whose gradient is rounding noise (the keys' bias) is moved by Adam in steps of the learning
    # rate, whatever the noise: one tensor may be luckier in one form than another, all together may not.
    for side in ("student", "teacher"):
        true, near = getattr(truth, side).state_dict(), getattr(plain, side).state_dict()
        errors, plain_errors, reach = (
            torch.stack([x.norm() for x in xs])
            for xs in (
                [ours[f"{side}.{k}"].double() - true[k] for k in true],
                [near[k].double() - true[k] for k in true],
                [true[k] for k in true],
            )
        )
        assert errors.norm() <= 2 * plain_errors.norm() + 2 * eps * reach.norm(), side
        for k, error, plain_error, size in zip(true, errors, plain_errors, reach, strict=True):
            assert error <= 8 * plain_error + 8 * eps * size, f"{side}.{k}"
    error, plain_error = ((c.double() - truth.center).norm() for c in (ours["loss.center"], plain.center))
    assert error <= 2 * plain_error + 4 * eps * truth.center.norm()
