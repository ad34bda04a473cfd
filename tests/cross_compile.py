"""Compile launches for GPUs that are not here and read the resources off the machine code.

Triton's interpreter must be off, so tests do this in a process of their own: `compiled`.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
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
    registers: int
    stack_bytes: int
    spills: int  # loads and stores of spilled registers; on AMD, spilled vector registers
    shared_bytes: int
    instructions: int
    matrix_products: int
    global_access: dict[str, int]  # "load128": 6, all of the kernel
    loop_global_access: dict[str, int]  # of its loops only; empty on AMD


@contextmanager
def compiling_for(target: str) -> Iterator[list[Resources]]:
    """Launches inside compile for ``target`` instead of running; the list collects the results.

    None may hold a reduction that Triton before 3.8 gets wrong: `scattered_reductions`.

    Launchers are called with tensors on the "meta" device, so the specialisation on the arguments'
    values and alignment is that of a real launch.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from catkernels.kernels.launch import architecture

    assert not triton.knobs.runtime.interpret, "the interpreter compiles nothing"
    backend, arch, warp_size, _ = TARGETS[target]

    class Driver:
        """As much of a driver as compiling needs."""

        get_current_target = staticmethod(lambda: GPUTarget(backend, arch, warp_size))
        get_current_device = staticmethod(lambda: target)
        get_current_stream = staticmethod(lambda device: 0)

    collected: list[Resources] = []
    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        assert len(grid) == 1, f"{kernel.__name__} uses grid axes beyond 0"
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        scattered = scattered_reductions(compiled.asm["ttgir"])
        assert not scattered, f"{target}: {kernel.__name__} {'; '.join(scattered)}"
        collected.append(_resources(kernel.__name__, compiled))
        return compiled

    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    architecture.cache_clear()
    try:
        yield collected
    finally:
        JITFunction.run = run
        architecture.cache_clear()
        triton.runtime.driver._active = previous


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
        assert list(csv.reader(file)) == list(_table(results))


def _record_path(name: str) -> Path:
    return Path(__file__).parent / "data" / f"{name}_triton_{version('triton')}.csv"


def _table(results: dict[object, list[dict]]) -> Iterator[list[str]]:
    yield ["configuration", "kernel", *COLUMNS]
    for configuration, kernels in results.items():
        for kernel in kernels:
            _, name = kernel["kernel"].removesuffix("_kernel").split("_", 1)
            yield [str(configuration), name, *(str(kernel[column]) for column in COLUMNS)]


def compiled(script: str, shipped: dict[str, object], configurations: Iterable) -> dict:
    """What `compile` of each configuration gives, in a process of its own: `main` of ``script``."""
    results = _in_subprocess(script, *map(str, configurations))
    return {shipped[name]: kernels for name, kernels in results.items()}


def main(name: str, script: str, shipped: dict[str, object]) -> None:
    """Print what the configurations named as arguments need, or with ``--write`` record all."""
    if sys.argv[1:] == ["--write"]:
        record(name, compiled(script, shipped, shipped.values()))
    else:
        json.dump({name: shipped[name].compile() for name in sys.argv[1:]}, sys.stdout)


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


def _resources(name: str, compiled) -> Resources:
    if "cubin" in compiled.asm:
        return _nvidia_resources(name, compiled)
    return _amd_resources(name, compiled)


def _nvidia_resources(name: str, compiled) -> Resources:
    usage, listing = _cuobjdump(compiled.asm["cubin"])
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    code = [
        (int(address, 16), opcode, operands)
        for address, opcode, operands in re.findall(
            r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(.*);", listing, re.M
        )
    ]
    # a loop is the code between a branch backwards and its target; a wait spins on a few lines
    loops = []
    for address, opcode, operands in code:
        to = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if to and address - int(to[1], 16) > 64 * 16:
            loops.append((int(to[1], 16), address))
    looped = [entry for entry in code if any(a <= entry[0] <= b for a, b in loops)]
    count = Counter(opcode.split(".")[0] for _, opcode, _ in code)
    return Resources(
        kernel=name,
        registers=int(registers),
        stack_bytes=int(stack),
        spills=count["LDL"] + count["STL"],
        shared_bytes=compiled.metadata.shared,
        instructions=len(code),
        matrix_products=sum(count[op] for op in ("HMMA", "HGMMA", "UTCHMMA")),
        global_access=_nvidia_access(code),
        loop_global_access=_nvidia_access(looped),
    )


def _nvidia_access(code: list[tuple[int, str, str]]) -> dict[str, int]:
    kinds = {"LDG": "load", "LDGSTS": "load", "STG": "store"}
    widths = Counter()
    for _, opcode, _ in code:
        family, *modifiers = opcode.split(".")
        if family in kinds:
            width = next((m.strip("US") for m in modifiers if m.strip("US").isdigit()), "32")
            widths[kinds[family] + width] += 1
    return dict(sorted(widths.items()))


def _cuobjdump(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code of a cubin, as text."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, listing = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-res-usage", "-sass")
        )
    return usage.stdout, listing.stdout


def _amd_resources(name: str, compiled) -> Resources:
    listing = compiled.asm["amdgcn"]

    def field(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", listing)[1])

    words = {"dwordx4": 128, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16}
    widths = Counter(
        f"{kind}{words[size]}"
        for kind, size in re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", listing)
        if size in words
    )
    return Resources(
        kernel=name,
        registers=field("vgpr_count"),
        stack_bytes=field("private_segment_fixed_size"),
        spills=field("vgpr_spill_count"),
        shared_bytes=compiled.metadata.shared,
        instructions=len(re.findall(r"^\t[a-z]\w+", listing, re.M)),
        matrix_products=listing.count("v_mfma"),
        global_access=dict(sorted(widths.items())),
        loop_global_access={},
    )
