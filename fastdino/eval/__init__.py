"""`fastdino-eval NAME`: what a trained teacher's features are worth."""

from collections.abc import Callable
from typing import Any

import tyro

from fastdino import cli
from fastdino.eval.attention import AttentionCommand
from fastdino.eval.features import FeaturesCommand
from fastdino.eval.knn import KnnCommand
from fastdino.eval.linear import LinearCommand
from fastdino.eval.retrieval import RetrievalCommand
from fastdino.eval.segmentation import SegmentationCommand

COMMANDS: dict[str, Callable[..., Any]] = {
    "knn": KnnCommand,
    "linear": LinearCommand,
    "retrieval": RetrievalCommand,
    "features": FeaturesCommand,
    "attention": AttentionCommand,
    "segmentation": SegmentationCommand,
}


def main() -> None:
    """Entry point of `fastdino-eval`."""
    command = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="fastdino-eval", description=__doc__)
    cli.run("fastdino-eval", command.run)
