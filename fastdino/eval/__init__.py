"""`fastdino-eval NAME`: what a trained teacher's features are worth."""

import signal
import sys
from collections.abc import Callable
from typing import Any

import tyro

from fastdino import distributed
from fastdino.data.images import printable
from fastdino.eval.attention import Attention
from fastdino.eval.features import Features
from fastdino.eval.knn import KNN
from fastdino.eval.linear import Linear
from fastdino.eval.retrieval import Retrieval
from fastdino.eval.segmentation import Segmentation

__all__ = ["KNN", "Attention", "Features", "Linear", "Retrieval", "Segmentation", "main"]

COMMANDS: dict[str, Callable[..., Any]] = {
    "knn": KNN,
    "linear": Linear,
    "retrieval": Retrieval,
    "features": Features,
    "attention": Attention,
    "segmentation": Segmentation,
}


def main() -> None:
    """Entry point of `fastdino-eval`."""
    command = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="fastdino-eval", description=__doc__)
    rank, ranks = distributed.place()[:2]
    if ranks == 1:  # torchrun ends the ranks that are left in this way, which have nothing to say then
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # job managers end it as Ctrl-C does
    name = "fastdino-eval" + (f", rank {rank}" if ranks > 1 else "")
    try:
        command.run()
    except distributed.ElsewhereError:
        sys.exit(1)  # that rank has said it
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {printable(str(error))}")
    except KeyboardInterrupt:
        if rank == 0:
            print("fastdino-eval: stopped", file=sys.stderr)
        sys.exit(130)
