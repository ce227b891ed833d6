"""`fastdino-eval NAME`: what a trained teacher's features are worth."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastdino import checkpoint, data, dino
from fastdino.config import CropPolicy
from fastdino.data import open_source
from fastdino.distributed import choose_device
from fastdino.eval import knn
from fastdino.eval.features import raw_pixels
from fastdino.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class KNN:
    """Weighted k-nearest-neighbour accuracy, as official DINO's eval_knn."""

    weights: Annotated[str, tyro.conf.Positional]
    """teacher.safetensors, the folder of the run that wrote it, or weights of official DINO or timm."""
    data: str
    """Labelled images that vote: a folder with a sub-folder per class, or a text file of path TAB label."""
    val: str = ""
    """Labelled images to classify. Without them, each image of --data is classified by the others."""
    k: tuple[int, ...] = knn.KS
    """Numbers of neighbours that vote."""
    temperature: float = knn.TEMPERATURE
    """A neighbour's vote weighs exp(similarity / temperature)."""
    baselines: bool = False
    """Also the same network untrained, with the initial weights of the run, and raw pixels."""
    batch_size: int = 128
    """Images in a forward pass."""
    workers: int = -1
    """Processes that read images; 0 reads in this one, -1 chooses by the machine's cores."""
    device: str = "auto"
    """auto (a CUDA GPU if there is one), cpu, cuda, ..."""
    json: str = ""
    """File to write the accuracies to."""

    def run(self) -> None:
        """Print the table, and write the JSON if asked."""
        if not self.k or min(self.k) < 1:
            raise ValueError(f"--k {' '.join(map(str, self.k))}: give numbers of neighbours, 1 or more")
        if self.temperature <= 0:
            raise ValueError(f"--temperature {self.temperature}: a temperature is above 0")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: give 1 or more")
        if self.json and not Path(self.json).parent.is_dir():
            raise ValueError(
                f"--json {self.json}: there is no folder {Path(self.json).parent}; make it first"
            )
        console = Console()
        device = choose_device(self.device)
        config = checkpoint.read_teacher(self.weights)[1] if checkpoint.is_ours(self.weights) else None
        policy = config.data.crops if config else CropPolicy()
        if self.baselines and not config:
            raise ValueError(
                "--baselines needs the weights of a run, which say how the network was initialised"
            )
        train, val = open_source(self.data), open_source(self.val) if self.val else None
        knn.check_classes(train, val)
        networks: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "teacher": dino.load_backbone(self.weights)
        }
        if self.baselines and config:
            torch.manual_seed(config.run.seed)
            untrained = dino.DINO(config).teacher.backbone.eval()
            networks = {"untrained network": untrained, "raw pixels": raw_pixels, **networks}
        results = {}
        for name in track(networks, "k-NN", console=console, transient=True, disable=not console.is_terminal):
            network = networks[name]
            results[name] = knn.evaluate_knn(
                network.to(device) if isinstance(network, torch.nn.Module) else network,
                train,
                val,
                policy,
                ks=self.k,
                temperature=self.temperature,
                device=device,
                workers=data.choose_workers(self.batch_size) if self.workers < 0 else self.workers,
                batch_size=self.batch_size,
            )
        classified = (
            f"{len(val)} images of {self.val} by {len(train)}"
            if val
            else f"{len(train)} images by the others"
        )
        title = f"k-NN accuracy in %: {classified}, {len(train.classes)} classes"
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        table = Table()
        for column in ("features", *(f"k = {k}" for k in self.k)):
            table.add_column(column, justify="left" if column == "features" else "right")
        for name, accuracy in results.items():
            table.add_row(name, *(f"{accuracy[k]:.1f}" for k in self.k))
        console.print(table)
        if self.json:
            text = json.dumps(
                {name: {str(k): a for k, a in accs.items()} for name, accs in results.items()}, indent=2
            )
            write_atomically(Path(self.json), lambda beside: beside.write_text(text + "\n"))


def main() -> None:
    """Entry point of `fastdino-eval`."""
    command = tyro.extras.subcommand_cli_from_dict({"knn": KNN}, prog="fastdino-eval", description=__doc__)
    try:
        command.run()
    except (ValueError, OSError) as error:
        sys.exit(f"fastdino-eval: {error}")
