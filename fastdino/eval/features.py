"""Features of every image of a source: the backbone's output on the evaluation crop."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastdino.config import CropPolicy
from fastdino.data import crops
from fastdino.data.sources import Source, Unreadable


class _EvalImages(Dataset):
    def __init__(self, source: Source, indices: list[int], size: int) -> None:
        self.source, self.indices, self.size = source, indices, size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, bool]:
        """The evaluation crop as uint8 (3, size, size), and whether the file could be read."""
        try:
            image = self.source.load(self.indices[i])
        except Unreadable:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), False
        return crops.to_tensor(crops.eval_image(image, self.size)), True


@torch.no_grad()
def extract(
    network: Callable[[Tensor], Tensor],
    source: Source,
    policy: CropPolicy,
    *,
    indices: list[int] | None = None,
    device: str | torch.device = "cpu",
    workers: int = 0,
    batch_size: int = 128,
    progress: Callable[[int], None] = lambda images: None,
) -> tuple[Tensor, Tensor]:
    """Features of the readable images among `indices` (default: all), at the global crops' size.

    Args:
        network: normalised float32 images (B, 3, S, S) to features (B, D); put a module in eval mode first.
        progress: called after each batch with the number of images done.

    Returns:
        features: (n, D) float32 on the CPU.
        kept: (n,) int64, the index of each; shorter than `indices` where files were unreadable.
    """
    chosen = list(range(len(source))) if indices is None else indices
    loader = DataLoader(
        _EvalImages(source, chosen, policy.global_crops_size), batch_size=batch_size, num_workers=workers
    )
    features: list[Tensor] = []
    readable: list[Tensor] = []
    for images, ok in loader:
        x = crops.normalize(images.to(device), policy)
        features.append(network(x).flatten(1).float().cpu())
        readable.append(ok)
        progress(len(ok))
    keep = torch.cat(readable)
    return torch.cat(features)[keep], torch.tensor(chosen)[keep]


def raw_pixels(images: Tensor) -> Tensor:
    """The baseline that has learnt nothing: pixels (B, 3, S, S) as features, at most 32 x 32 of them."""
    if images.shape[-1] > 32:
        images = nn.functional.interpolate(images, size=(32, 32), mode="area")
    return images
