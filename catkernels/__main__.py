"""The command line: ``python -m catkernels info``, ``check``, ``demo``, ``train``, ``predict``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

import catkernels
from catkernels.arguments import BACKENDS
from catkernels.commands.models import MODELS


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(prog="python -m catkernels", description=catkernels.__doc__)
    parser.add_argument(
        "--version", action="version", version=f"catkernels {catkernels.__version__}"
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{info,check,demo,train,predict}"
    )

    commands.add_parser("info", help="versions, devices, and what would serve here and why")
    _add_check(commands)
    _add_demo(commands)
    _add_train(commands)
    _add_predict(commands)
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    try:
        # only now, since the needs of one command, such as scikit-learn, are not those of another
        return import_module(f"catkernels.commands.{command}").run(**options) or 0
    except (OSError, ValueError, ImportError, MemoryError, RuntimeError) as error:
        reason = _in_words(error)
        if reason is None:
            raise
        print(f"{parser.prog} {command}: {reason}".replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _add_check(commands: Any) -> None:
    check = commands.add_parser("check", help="whether the kernels are right on this GPU")
    check.add_argument(
        "--interpret", action="store_true", help="without a GPU: a few calls in the interpreter"
    )
    check.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        dest="output",
        help="write down versions and results, for a report",
    )


def _in_words(error: Exception) -> str | None:
    """What to tell the user of an error; None for one that is a fault of this package."""
    # PyTorch has no class of its own for a CPU's
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if out_of_memory or "can't allocate memory" in str(error):
        return "there is not enough memory: smaller images, or fewer at once, need less"
    if isinstance(error, RuntimeError):
        return None
    if isinstance(error, OSError) and error.strerror:
        # without the number that it has among the system's errors
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="run a CAT on a photo, or a trained one on digits")
    demo.add_argument("--image", type=Path, metavar="FILE", help="a photo; one is shipped")
    demo.add_argument("--model", choices=MODELS, help="default: the checkpoint's, else cat_small")
    demo.add_argument("--size", type=_whole(1, 4096), help="side of the photo; 224")
    demo.add_argument("--batch", type=_whole(1, 1024), help="copies of it; 8")
    demo.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="weights; by default random, or the digits'"
    )
    demo.add_argument(
        "--save",
        type=Path,
        metavar="FILE.png",
        help="where the picture goes; catkernels-photo.png, or catkernels-digits.png",
    )


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train a CAT classifier, on digits or your images")
    train.add_argument(
        "--data",
        default="digits",
        metavar="FOLDER",
        help="a folder with a folder of images for each class; by default scikit-learn's digits",
    )
    train.add_argument(
        "--model",
        choices=MODELS,
        help="default: the checkpoint's, else digits for the digits, cat_tiny for a folder",
    )
    train.add_argument(
        "--size", type=_whole(1, 4096), help="side of the images; by default the model's"
    )
    train.add_argument(
        "--epochs", type=_whole(1, 10**6), help="default: 40 for the digits, else 100"
    )
    train.add_argument("--batch-size", type=_whole(1, 2**20), help="images of a step; 64")
    train.add_argument("--learning-rate", type=float, help="its peak for 512 images of a step")
    train.add_argument("--drop-path", type=float, help="stochastic depth; by default the model's")
    train.add_argument("--seed", type=_whole(0, 2**32), help="default: 0")
    train.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: fp32")
    train.add_argument("--backend", choices=BACKENDS, default="auto", help="default: %(default)s")
    train.add_argument(
        "--workers", type=_whole(0, 1024), help="processes that read images; up to 8"
    )
    train.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        default=Path("catkernels-run"),
        help="for the weights, metrics, curve and checkpoint; %(default)s",
    )
    train.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights to start from; of other classes all but the head",
    )
    train.add_argument("--resume", action="store_true", help="go on with the run in --output")
    train.add_argument(
        "--strict", action="store_true", help="stop at an unreadable image, do not leave it out"
    )


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser("predict", help="classify photos with trained weights")
    predict.add_argument("images", nargs="+", type=Path, metavar="PHOTO", help="or a folder")
    predict.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help="weights, as train writes"
    )
    predict.add_argument(
        "--size", type=_whole(1, 4096), help="side of the photos; as the model was trained"
    )
    predict.add_argument(
        "--top", type=_whole(1, 1000), default=3, help="classes to name; %(default)s"
    )


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {least} to {most}"
            )
        return int(text)

    return parse


if __name__ == "__main__":
    sys.exit(main())
