"""The command line: ``python -m catkernels info`` and ``python -m catkernels demo``."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

import torch

import catkernels
from catkernels.cat import VARIANTS
from catkernels.ops import cpsa, ipsa
from catkernels.ops.device import KERNEL_DEVICES, interpreting


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(prog="python -m catkernels", description=catkernels.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,demo}")

    info = commands.add_parser("info", help="versions, devices, and what would serve here and why")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="run a CAT on a photo, as it is and patched")
    demo.add_argument("--image", type=Path, metavar="FILE", help="a photo; one is shipped")
    demo.add_argument("--model", choices=VARIANTS, default="cat_small", help="default: %(default)s")
    demo.add_argument("--size", type=_up_to(4096), default=224, help="its side; %(default)s")
    demo.add_argument("--batch", type=_up_to(1024), default=8, help="copies of it; %(default)s")
    demo.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights; random by default")
    demo.add_argument(
        "--save",
        type=Path,
        metavar="FILE.png",
        default=Path("catkernels-demo.png"),
        help="where the picture goes; %(default)s",
    )
    demo.set_defaults(run=_demo)

    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (OSError, ValueError, ImportError, MemoryError) as error:
        print(f"{parser.prog} {options.command}: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _up_to(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {most}")
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


def _demo(options: argparse.Namespace) -> None:
    # the demo's own needs, pillow and matplotlib, are no needs of the package
    from catkernels.demo import run

    run(
        model=options.model,
        image=options.image,
        size=options.size,
        batch=options.batch,
        checkpoint=options.checkpoint,
        save=options.save,
    )


if __name__ == "__main__":
    sys.exit(main())
