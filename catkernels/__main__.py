"""The command line: ``python -m catkernels info``, ``check``, ``demo``, ``train``, ``predict``."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch

import catkernels
from catkernels.commands.models import MODELS
from catkernels.functional import BACKENDS
from catkernels.ops import cpsa, ipsa
from catkernels.torch_state.device import KERNEL_DEVICES, interpreting


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

    info = commands.add_parser("info", help="versions, devices, and what would serve here and why")
    info.set_defaults(run=_info)

    _add_check(commands)
    _add_demo(commands)
    _add_train(commands)
    _add_predict(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except (OSError, ValueError, ImportError, MemoryError) as error:
        print(f"{parser.prog} {options.command}: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _add_check(commands) -> None:
    check = commands.add_parser("check", help="whether the kernels are right on this GPU")
    check.add_argument(
        "--interpret", action="store_true", help="without a GPU: a few calls in the interpreter"
    )
    check.add_argument(
        "--json", type=Path, metavar="FILE", help="write down versions and results, for a report"
    )
    check.set_defaults(run=_check)


def _add_demo(commands) -> None:
    demo = commands.add_parser("demo", help="run a CAT on a photo, or a trained one on digits")
    demo.add_argument("--image", type=Path, metavar="FILE", help="a photo; one is shipped")
    demo.add_argument("--model", choices=MODELS, default="cat_small", help="default: %(default)s")
    demo.add_argument("--size", type=_whole(1, 4096), help="side of the photo; 224")
    demo.add_argument("--batch", type=_whole(1, 1024), help="copies of it; 8")
    demo.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="weights; random, or the digits'"
    )
    demo.add_argument(
        "--save",
        type=Path,
        metavar="FILE.png",
        default=Path("catkernels-demo.png"),
        help="where the picture goes; %(default)s",
    )
    demo.set_defaults(run=_demo)


def _add_train(commands) -> None:
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
    train.set_defaults(run=_train)


def _add_predict(commands) -> None:
    predict = commands.add_parser("predict", help="classify photos with trained weights")
    predict.add_argument("images", nargs="+", type=Path, metavar="PHOTO", help="or a folder")
    predict.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help="weights, as train writes"
    )
    predict.add_argument("--model", choices=MODELS, help="default: what the checkpoint says")
    predict.add_argument(
        "--size", type=_whole(1, 4096), help="side of the photos; as the model was trained"
    )
    predict.add_argument(
        "--top", type=_whole(1, 1000), default=3, help="classes to name; %(default)s"
    )
    predict.set_defaults(run=_predict)


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {least} to {most}"
            )
        return int(text)

    return parse


def _info(_options: argparse.Namespace) -> None:
    print(f"catkernels {catkernels.__version__}, torch {torch.__version__}, {_triton_version()}")
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    devices = [torch.device("cpu")]
    for kind in KERNEL_DEVICES:
        count = torch.get_device_module(kind).device_count()
        devices += [torch.device(kind, index) for index in range(count)]
    for device in devices:
        print(f"\n{_device_name(device)}")
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            where = {"device": device, "dtype": dtype, "patch_size": 7}
            print(_serving(f"ipsa {name}", device, ipsa.unsupported_reasons(**where, head_dim=32)))
            reasons = cpsa.unsupported_reasons(**where, num_patches=64)
            print(_serving(f"cpsa {name}", device, reasons))


def _serving(operation: str, device: torch.device, reasons: list[str]) -> str:
    if device.type == "cpu" and not reasons:
        reasons = ["on a CPU the kernels are only interpreted, on request"]
    if not reasons:
        return f"  {operation:14}  triton"
    return f"  {operation:14}  reference  ({'; '.join(reasons)})"


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        mode = ", Triton's interpreter is on" if interpreting() else ""
        return f"cpu: {torch.get_num_threads()} threads{mode}"
    properties = torch.get_device_module(device).get_device_properties(device)
    return f"{device}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _triton_version() -> str:
    try:
        return f"triton {version('triton')}"
    except PackageNotFoundError:
        return "no triton"


def _check(options: argparse.Namespace) -> int:
    from catkernels.commands.check import run

    return run(interpret=options.interpret, output=options.json)


def _demo(options: argparse.Namespace) -> None:
    save = options.save
    if save.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"cannot save {save}: the picture is a .png, .svg or .pdf")
    if not save.parent.is_dir():
        raise ValueError(f"cannot save {save}: there is no folder {save.parent}")
    # the demos' own needs, such as matplotlib, are no needs of the package
    if options.model == "digits":
        from catkernels.commands import digits_demo

        if options.image or options.size or options.batch:
            raise ValueError(
                "--image, --size and --batch are of photos: leave them out, or give another --model"
            )
        digits_demo.run(checkpoint=options.checkpoint, save=save)
    else:
        from catkernels.commands import demo

        demo.run(
            model=options.model,
            image=options.image,
            size=options.size or 224,
            batch=options.batch or 8,
            checkpoint=options.checkpoint,
            save=save,
        )


def _predict(options: argparse.Namespace) -> None:
    from catkernels.commands.predict import run

    run(**_own(options))


def _train(options: argparse.Namespace) -> None:
    # training's own needs, such as scikit-learn, are no needs of the package
    from catkernels.commands.train import run

    run(**_own(options))


def _own(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a command."""
    return {name: value for name, value in vars(options).items() if name not in ("command", "run")}


if __name__ == "__main__":
    sys.exit(main())
