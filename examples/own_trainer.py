"""A trainer of your own around `fastdino.Update`: your dataset, your crops, your loop.

python examples/own_trainer.py FOLDER_OF_IMAGES teacher.pth
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import fastdino
from fastdino.config import Config, CropPolicy, DataConfig, ModelConfig, OptimConfig

crops = CropPolicy(global_crops_size=32, local_crops_size=16, local_crops_number=4)
config = Config(
    data=DataConfig(crops=crops),
    model=ModelConfig(arch="vit_nano", patch_size=4, out_dim=512, head_hidden_dim=512),
    optim=OptimConfig(epochs=2, batch_size=16, lr=5e-3),
)


class MyImages(Dataset[list[Tensor]]):
    """Each item is the crops of one image, the two global ones first: uint8 (3, side, side)."""

    def __init__(self, folder: str) -> None:
        self.paths = sorted(path for path in Path(folder).rglob("*.*") if path.is_file())
        views = [(32, (0.3, 1.0))] * 2 + [(16, (0.1, 0.3))] * 4
        self.views = [v2.RandomResizedCrop(size, scale) for size, scale in views]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> list[Tensor]:
        image = v2.functional.pil_to_tensor(Image.open(self.paths[i]).convert("RGB"))
        return [view(image) for view in self.views]


loader = DataLoader(MyImages(sys.argv[1]), config.optim.batch_size, shuffle=True, drop_last=True)
schedule = fastdino.Schedule(config, steps_per_epoch=len(loader))
update = fastdino.Update(config, "cuda" if torch.cuda.is_available() else "cpu")
batches = (batch for epoch in range(config.optim.epochs) for batch in loader)
for step, batch in enumerate(batches):
    settings = schedule.at(step)
    row = update([batch], settings)  # a tensor on the device: reading it waits, so read it now and then
    if settings.logs:
        values = dict(zip(update.COLUMNS, row.tolist(), strict=True))
        print(f"step {step + 1}/{schedule.total_steps} loss {values['loss']:.3f} lr {settings.lr:.2g}")
torch.save(update.dino.teacher.state_dict(), sys.argv[2])  # fastdino.load_backbone(sys.argv[2]) reads it
