"""The ``efficient-densenet`` command.

Every failure is one line on stderr. Exit status 2: an invalid argument, which the line quotes; 1:
out of memory, or a plan in which nothing fits; 130: Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch

from efficient_densenet.functional.modes import MODES
from efficient_densenet.memory.devices import DEVICES
from efficient_densenet.training import plan as planner
from efficient_densenet.training.config import PRECISIONS, RECIPES, ConfigError, TrainConfig
from efficient_densenet.training.fashion_mnist import DataError
from efficient_densenet.training.folder import RunFolder


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv`` if ``None``); returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except ConfigError as error:
        return _complain(args, 2, f"error: {_option(error.argument)} {error.problem}")
    except (DataError, _ExtraMissing) as error:
        return _complain(args, 2, f"error: {error}")
    except torch.OutOfMemoryError as error:
        return _complain(args, 1, f"out of memory: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        return _complain(args, 130, "interrupted")


def _complain(args: argparse.Namespace, status: int, message: str) -> int:
    print(f"efficient-densenet {args.command}: {message}", file=sys.stderr)
    return status


def _option(argument: str) -> str:
    """How the command line spells an argument."""
    return "--" + argument.replace("_", "-")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="efficient-densenet", description="DenseNets trained in O(kL) memory.")
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {version('efficient_densenet')}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_plan(commands)
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
        choices=MODES,
        help="what the backward pass recomputes; bottleneck keeps least, none is the naive network "
        "(default: bottleneck; with --budget the fastest mix that fits, module by module)",
    )
    network.add_argument("--drop-rate", type=float, default=0.0, help="dropout (default: 0)")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--image-size", type=int, help=_default("image_size", "pixels"))
    recipe.add_argument("--batch-size", type=int, help=_default("batch_size", "of each device"))
    recipe.add_argument("--epochs", type=int, help=_default("epochs", "passes"))
    recipe.add_argument("--lr", type=float, help=_default("lr", "learning rate"))
    recipe.add_argument("--train-size", type=int, help="use only this many training images")
    recipe.add_argument("--seed", type=int, default=0, help="default: 0")

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--precision", choices=PRECISIONS, default="32-true", help="default: 32-true"
    )
    machine.add_argument("--devices", type=int, default=1, help="of each node (default: 1)")
    machine.add_argument("--num-nodes", type=int, default=1, help="default: 1")
    machine.add_argument(
        "--budget",
        metavar="SIZE",
        help="most memory that a training step may hold, such as 512MiB; chooses the mode "
        "of each module, or the batch if --recompute is given",
    )

    machine.add_argument(
        "--graphs",
        action="store_true",
        help="replay each training step from CUDA graphs: less work for the host; needs a GPU",
    )

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
        help="resume the run in --out after its last finished epoch; --epochs may be more",
    )


def _default(name: str, meaning: str) -> str:
    fashion, others = (getattr(RECIPES[model], name) for model in ("fashion", "cifar-bc"))
    values = f"{fashion}" if fashion == others else f"{fashion} for fashion, else {others}"
    return f"{meaning} (default: {values})"


def _add_plan(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "plan",
        help="what fits a budget of memory",
        description="The largest batch of a network, or with --batch-size the deepest cifar-bc, "
        "whose training step fits a budget, by mode. Nothing is computed: peaks are estimated.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_plan)
    parser.add_argument(
        "--budget", metavar="SIZE", help="such as 8GiB (default: what the present GPU has free)"
    )
    parser.add_argument(
        "--model",
        default="cifar-bc",
        help=f"{', '.join(RECIPES)}, or package.module:function that makes any model (default: "
        "cifar-bc)",
    )
    parser.add_argument("--shape", help="of an image of package.module:function: 1,96,96,96")
    parser.add_argument("--depth", type=int, help="layers of cifar-bc, 6n+4 (default: 100)")
    parser.add_argument("--growth-rate", type=int, help="channels k of cifar-bc (default: 12)")
    parser.add_argument("--batch-size", type=int, help="plan the depth of cifar-bc for this batch")
    parser.add_argument("--image-size", type=int, help=_default("image_size", "pixels"))
    parser.add_argument("--in-channels", type=int, default=3, help="of an image (default: 3)")
    parser.add_argument("--num-classes", type=int, default=10, help="default: 10")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="32-true", help="default: 32-true"
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        help="whose way of counting and reserve (default: this machine's)",
    )
    parser.add_argument("--chart", type=Path, metavar="PNG", help="draw the peaks into this file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _plan(args: argparse.Namespace) -> int:
    if args.chart is not None and not (args.chart.suffix == ".png" and args.chart.parent.is_dir()):
        raise ConfigError(
            "chart", f"must be a .png file in a folder that exists, got {str(args.chart)!r}"
        )
    made = _plan_model(args) if ":" in args.model else _plan_network(args)
    if args.chart is not None:
        with _extra("a chart"):
            from efficient_densenet.training import pictures
        try:
            pictures.plan_chart(made, args.chart)
        except OSError as error:
            raise ConfigError("chart", f"{str(args.chart)!r} cannot be written: {error}") from error
    print(json.dumps(asdict(made), indent=2) if args.json else made)
    return 0 if any(fit.largest for fit in made.fits.values()) else 1


def _plan_model(args: argparse.Namespace) -> planner.Plan:
    for name in ("depth", "growth_rate", "batch_size", "image_size"):
        if getattr(args, name) is not None:
            raise ConfigError(name, f"is for models by name, and {args.model!r} makes its own")
    options = ("model", "shape", "budget", "precision", "device")
    return planner.plan_model(**{name: getattr(args, name) for name in options})


def _plan_network(args: argparse.Namespace) -> planner.Plan:
    if args.shape is not None:
        raise ConfigError("shape", f"is for package.module:function, got --model {args.model}")
    names = (
        *("budget", "model", "image_size", "batch_size", "depth", "growth_rate"),
        *("in_channels", "num_classes", "precision", "device"),
    )
    return planner.plan(**{name: getattr(args, name) for name in names})


def _train(args: argparse.Namespace) -> int:
    options: dict[str, Any] = {
        field.name: getattr(args, field.name, None) for field in fields(TrainConfig)
    }
    if args.budget is None:
        config = TrainConfig.of(**options)
    else:
        chosen = RunFolder(args.out).chosen() if args.resume else None
        config = planner.config_within(args.budget, options, chosen)
    with _extra("training"):
        from efficient_densenet.training import run as training
    training.run(config, args.out, args.data_dir, args.resume)
    return 0


class _ExtraMissing(Exception):
    pass


@contextmanager
def _extra(purpose: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise _ExtraMissing(
            f"{purpose} needs {error.name!r}: pip install '.[train]' in a clone"
        ) from error
