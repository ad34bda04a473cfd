"""Compile launches for GPUs that are not here and read the resources off the machine code.

Triton's interpreter must be off, so tests do this in a process of their own: `compiled`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import sass
import torch
from reduce_layouts import scattered_reductions

# name -> (backend, architecture, threads of a warp, bytes of shared memory that a program may use)
TARGETS = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_86": ("cuda", 86, 32, 99 * 1024),
    "sm_89": ("cuda", 89, 32, 99 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "sm_120": ("cuda", 120, 32, 99 * 1024),
    "gfx90a": ("hip", "gfx90a", 64, 64 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
    # RDNA takes Ampere's launches, but has no more shared memory than CDNA
    "gfx1100": ("hip", "gfx1100", 32, 64 * 1024),
}

# The dtype of a launch, and torch's setting for products of float32.
PRECISIONS = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
}

# What of `Resources` the recorded tables hold.
COLUMNS = ("registers", "stack_bytes", "spills", "shared_bytes", "instructions", "matrix_products")


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs; bytes, or counts of instructions."""

    kernel: str
    hash: str  # of all that it was compiled from
    registers: int
    stack_bytes: int
    spills: int  # loads and stores of spilled registers; on AMD, spilled vector registers
    shared_bytes: int
    instructions: int
    matrix_products: int
    global_access: dict[str, int]  # "load128": 6, all of the kernel
    # what follows is of NVIDIA's machine code only
    loop_global_access: dict[str, int]  # of its loops
    copies_in_flight: int  # `sass.copies_in_flight`
    hazards: list[str]  # `sass.hazards`


@dataclass(frozen=True)
class Compiled:
    """A kernel as Triton compiled it; its machine code is read when it is asked for."""

    kernel: str
    compiled: object  # triton.compiler.CompiledKernel

    def resources(self) -> Resources:
        machine_code = self.compiled.asm.get("cubin")
        fields = (
            _amd_resources(self.compiled.asm["amdgcn"])
            if machine_code is None
            else (_kept(machine_code, _nvidia_resources))
        )
        shared_bytes = self.compiled.metadata.shared
        return Resources(self.kernel, self.compiled.hash, shared_bytes=shared_bytes, **fields)


@contextmanager
def compiling_for(target: str) -> Iterator[list[Compiled]]:
    """Launches inside compile for ``target`` instead of running; the list collects the results.

    None may hold a reduction that Triton before 3.8 gets wrong: `scattered_reductions`.

    Launchers are called with tensors on the "meta" device, so the specialisation on the arguments'
    values and alignment is that of a real launch.
    """
    from triton.backends.compiler import GPUTarget

    from catkernels.kernels import compile_ahead

    backend, arch, warp_size, _ = TARGETS[target]
    collected: list[Compiled] = []

    def keep(name, kernel, grid):
        assert len(grid) == 1, f"{name} uses grid axes beyond 0"
        scattered = scattered_reductions(kernel.asm["ttgir"])
        assert not scattered, f"{target}: {name} {'; '.join(scattered)}"
        collected.append(Compiled(name, kernel))

    with compile_ahead.compiling_for(GPUTarget(backend, arch, warp_size), keep):
        yield collected


def triton_version() -> tuple[int, int]:
    major, minor, *_ = version("triton").split(".")
    return int(major), int(minor)


def record(name: str, results: dict[object, list[dict]]) -> None:
    """Write down what each kernel of each configuration needs under the installed Triton."""
    with _record_path(name).open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(_table(results))


def compare_with_record(name: str, results: dict[object, list[dict]]) -> None:
    """Assert that the record of the installed Triton says the same; without one, skip the test."""
    path = _record_path(name)
    if not path.exists():
        pytest.skip(f"the bars hold; nothing to compare with: tests/data has no {path.name}")
    with path.open(newline="") as file:
        for recorded, found in zip(csv.reader(file), _table(results), strict=True):
            assert recorded == found or _is_near(recorded, found), f"{found}, not {recorded}"


def _is_near(recorded: list[str], found: list[str]) -> bool:
    """Whether two rows differ in the number of instructions alone, by 1 % at most.

    Of the very same PTX ptxas now and then makes some more or fewer: 2520 or 2528.
    """
    place = 2 + COLUMNS.index("instructions")
    (*ours, count), (*theirs, other) = (
        [*row[:place], *row[place + 1 :], row[place]] for row in (recorded, found)
    )
    return ours == theirs and abs(int(count) - int(other)) <= 0.01 * int(count)


def _record_path(name: str) -> Path:
    return Path(__file__).parent / "data" / f"{name}_triton_{version('triton')}.csv"


def _table(results: dict[object, list[dict]]) -> Iterator[list[str]]:
    yield ["configuration", "kernel", *COLUMNS]
    for configuration, kernels in results.items():
        for kernel in kernels:
            _, name = kernel["kernel"].removesuffix("_kernel").split("_", 1)
            yield [str(configuration), name, *(str(kernel[column]) for column in COLUMNS)]


def compiled(script: str, shipped: dict[str, object], configurations: Iterable) -> dict:
    """What `compile` of each configuration gives, in a process of its own: `main` of ``script``.

    No kernel may overtake its asynchronous products: what the ptxas of CUDA before 13.1 to 13.3 is
    known to do. Wrong descriptors of products, its other known fault, show only on a GPU.
    """
    results = _in_subprocess(script, *map(str, configurations))
    for name, kernels in results.items():
        for kernel in kernels:
            assert not kernel["hazards"], f"{name}: {kernel['kernel']}: {kernel['hazards']}"
    return {shipped[name]: kernels for name, kernels in results.items()}


def main(name: str, script: str, shipped: dict[str, object], compilable: dict | None = None):
    """Print what the configurations named as arguments need, or with ``--write`` record all.

    ``compilable`` are those that may be named, where tests compile more than is ``shipped``.
    """
    if sys.argv[1:] == ["--write"]:
        record(name, compiled(script, shipped, shipped.values()))
    else:
        named = {name: (compilable or shipped)[name] for name in sys.argv[1:]}
        json.dump(
            {name: configuration.compile() for name, configuration in named.items()}, sys.stdout
        )


def _in_subprocess(script: str, *arguments: str) -> dict:
    """The JSON that ``python script *arguments`` prints, run with Triton's interpreter off."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    repository = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([repository, *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _kept(machine_code: bytes, read: Callable[[bytes], dict]) -> dict:
    """``read(machine_code)``, kept beside what Triton compiled: to disassemble takes seconds."""
    from triton.runtime.cache import get_cache_manager

    digest = hashlib.sha256(machine_code)
    for source in (__file__, sass.__file__):
        digest.update(Path(source).read_bytes())
    cache = get_cache_manager(digest.hexdigest())
    path = cache.get_file("resources.json")
    if path is None:
        path = cache.put(json.dumps(read(machine_code)), "resources.json", binary=False)
    return json.loads(Path(path).read_text())


def _nvidia_resources(cubin: bytes) -> dict:
    listing = _cuobjdump(cubin)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", listing).groups()
    code = sass.instructions(listing)
    looped = {instruction for loop in sass.loops(code) for instruction in loop}
    count = Counter(instruction.family for instruction in code)
    return {
        "registers": int(registers),
        "stack_bytes": int(stack),
        "spills": count["LDL"] + count["STL"],
        "instructions": len(code),
        "matrix_products": sum(count[family] for family in sass.PRODUCTS),
        "global_access": _nvidia_access(code),
        "loop_global_access": _nvidia_access(looped),
        "copies_in_flight": sass.copies_in_flight(code),
        "hazards": sass.hazards(code),
    }


def _nvidia_access(code: Iterable[sass.Instruction]) -> dict[str, int]:
    kinds = {"LDG": "load", "LDGSTS": "load", "STG": "store"}
    widths = Counter()
    for instruction in code:
        family, *modifiers = instruction.opcode.split(".")
        if family in kinds:
            width = next((m.strip("US") for m in modifiers if m.strip("US").isdigit()), "32")
            widths[kinds[family] + width] += 1
    return dict(sorted(widths.items()))


def _cuobjdump(cubin: bytes) -> str:
    """Resource usage and machine code of a cubin, as text."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd_resources(listing: str) -> dict:
    def field(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", listing)[1])

    words = {"dwordx4": 128, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16}
    widths = Counter(
        f"{kind}{words[size]}"
        for kind, size in re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", listing)
        if size in words
    )
    return {
        "registers": field("vgpr_count"),
        "stack_bytes": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count"),
        "instructions": len(re.findall(r"^\t[a-z]\w+", listing, re.M)),
        "matrix_products": listing.count("v_mfma"),
        "global_access": dict(sorted(widths.items())),
        "loop_global_access": {},
        "copies_in_flight": 0,
        "hazards": [],
    }
