"""The ``efficient-densenet`` command.

Bad input ends in one line on stderr that quotes it and exit status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from efficient_densenet.config import PRECISIONS, RECIPES, RECOMPUTE, ConfigError, TrainConfig
from efficient_densenet.fashion_mnist import DataError


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv`` if ``None``); returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ConfigError, DataError) as error:
        print(f"efficient-densenet {args.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="efficient-densenet", description="DenseNets trained in O(kL) memory.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "train",
        help="train on Fashion-MNIST",
        description="Train a DenseNet on Fashion-MNIST.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_train)
    network = parser.add_argument_group("network")
    network.add_argument("--model", choices=RECIPES, default="fashion", help="default: fashion")
    network.add_argument("--depth", type=int, help="layers of cifar-bc, 6n+4 (default: 100)")
    network.add_argument("--growth-rate", type=int, help="channels k of cifar-bc (default: 12)")
    network.add_argument(
        "--recompute",
        choices=RECOMPUTE,
        default="bottleneck",
        help="what the backward pass recomputes; bottleneck keeps least, none is the naive network "
        "(default: bottleneck)",
    )
    network.add_argument("--drop-rate", type=float, default=0.0, help="dropout (default: 0)")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--resize", type=int, help=_default("resize", "pixels"))
    recipe.add_argument("--batch-size", type=int, help=_default("batch_size", "of each device"))
    recipe.add_argument("--epochs", type=int, help=_default("epochs", "passes"))
    recipe.add_argument("--lr", type=float, help=_default("lr", "learning rate"))
    recipe.add_argument("--train-size", type=int, help="use the first so many images only")
    recipe.add_argument("--seed", type=int, default=0, help="default: 0")

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--precision", choices=PRECISIONS, default="32-true", help="default: 32-true"
    )
    machine.add_argument("--devices", type=int, default=1, help="of each node (default: 1)")
    machine.add_argument("--num-nodes", type=int, default=1, help="default: 1")

    folders = parser.add_argument_group("folders")
    folders.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        help="where the data are, or are downloaded to (default: data)",
    )
    folders.add_argument("--out", type=Path, default=Path("runs/train"), help="default: runs/train")
    folders.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out, from its last finished epoch",
    )


def _default(name: str, meaning: str) -> str:
    fashion, others = (getattr(RECIPES[model], name) for model in ("fashion", "cifar-bc"))
    values = f"{fashion}" if fashion == others else f"{fashion} for fashion, else {others}"
    return f"{meaning} (default: {values})"


def _train(args: argparse.Namespace) -> None:
    config = TrainConfig.of(
        **{field.name: getattr(args, field.name) for field in fields(TrainConfig)}
    )
    try:
        from efficient_densenet import training
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"training needs {error.name!r}: pip install 'efficient_densenet[train]'"
        ) from error
    training.run(config, args.out, args.data_dir, args.resume)
