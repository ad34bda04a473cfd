"""Compile ahead everything that the first minutes on a GPU need, here or without that GPU.

    python -m benchmarks.prebuild FOLDER [--arch 90] [--processes N]
    python -m benchmarks.prebuild --fits FOLDER

The first fills FOLDER with a Triton cache for an NVIDIA GPU of compute capability 9.0. Keys of the
cache hold no paths, so it serves on another machine where Triton itself is the same: `--fits` says
so by its exit status. They hold line numbers: prebuild after the last edit of a kernel.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.candidates import Candidate, candidates, compile_candidate, looked_up
from catkernels import families
from catkernels.block_cases import JoinedCPSACase, MLPCase, ProjectionCase
from catkernels.cases import CPSACase, IPSACase, cat_stages
from catkernels.families import Case, Task
from catkernels.pool import num_cores, run_apart

# Images of a compiled call: those of a large batch take the same kernels.
IMAGES = 16
# The candidates that are timed first: what the predictions leave open, as values of fields by
# attention, pass and stage of CAT-S.
STAGES = {"num_stages": (1, 2, 3)}
OPEN: dict[tuple[str, str, int], dict[str, tuple]] = {
    **{
        ("ipsa", direction, k): STAGES for direction in ("forward", "backward") for k in range(1, 5)
    },
    # 64 patches of 4 channels: half the shared memory, twice the sectors of L2
    ("cpsa", "forward", 1): {"block_c": (4,)},
    # 16 patches of 4 channels, the next tile fetched ahead
    ("cpsa", "backward", 2): {"block_c": (4,), "ahead": (True,)},
}

# The stages of CAT-S at which the MLP's forward pass is one kernel.
MLPS = (MLPCase("stage 1", IMAGES, 56, 56, 96), MLPCase("stage 2", IMAGES, 28, 28, 192))

# What is repeated for the same bits, as large as a device is full: 32 images.
REPEATED = (
    IPSACase("stage 1", 32, 56, 56, num_heads=3),
    IPSACase("stage 1, padded", 32, 52, 50, num_heads=3),
    IPSACase("stage 4", 32, 7, 7, num_heads=24),
    CPSACase("stage 1", 32, 56, 56, 96),
    CPSACase("stage 2", 32, 28, 28, 192),
    CPSACase("stage 3", 32, 14, 14, 384),
    CPSACase("stage 4", 32, 7, 7, 768),
    CPSACase("stage 1 of 512 x 512", 2, 128, 128, 96),
    MLPCase("stage 1", 32, 56, 56, 96),
    MLPCase("stage 2", 32, 28, 28, 192),
    ProjectionCase("stage 1", 32, 56, 56, 96),
    ProjectionCase("stage 2", 32, 28, 28, 192),
    JoinedCPSACase("stage 2", 32, 28, 28, 192),
)


def triton_key() -> str:
    """A digest of all that the keys of Triton's cache take from Triton itself."""
    from triton.runtime.cache import triton_key as key

    return hashlib.sha256(key().encode()).hexdigest()


def fits(folder: Path) -> bool:
    """Whether a prebuilt cache is one of the Triton that is installed here."""
    stored = folder / "KEY"
    return stored.exists() and stored.read_text().strip() == triton_key()


def kind(case: Case) -> str:
    """ "ipsa", "cpsa", "mlp", "projection" or "joinedcpsa"."""
    return type(case).__name__.removesuffix("Case").lower()


def stage_case(attention: str, stage: int, *, model: str = "small", batch: int = IMAGES):
    """A stage of CAT as a case, from 1 to 4."""
    shape = cat_stages(model, batch=batch)[stage - 1]
    sizes = (str(shape), shape.batch, shape.height, shape.width)
    if attention == "cpsa":
        return CPSACase(*sizes, shape.channels)
    return IPSACase(*sizes, num_heads=shape.num_heads, without=("qkv_bias",))


def open_candidates(attention: str, direction: str, stage: int, target: object) -> list[Candidate]:
    """What ships for a stage in bfloat16, and the candidates that a prediction leaves open."""
    task = Task("", (stage_case(attention, stage),), torch.bfloat16, False, "cuda", target)
    forward = looked_up(replace(task, forward=True))
    tables = forward
    if direction == "backward":
        tables = {name: launch for name, launch in looked_up(task).items() if name not in forward}
    found = []
    for table, shipped in tables.items():
        first, *others = candidates(table, shipped)
        values = OPEN.get((attention, direction, stage), {})
        found += [first, *(other for other in others if _is_open(values, shipped, other.launch))]
    return found


def streamed(case: MLPCase, target: object) -> list[Candidate]:
    """A launch of the MLP's forward pass that fetches its weights anew for each tile.

    It is open where what ships keeps them in shared memory.
    """
    task = Task("", (case,), torch.bfloat16, False, "cuda", target, forward=True)
    streams = {"num_warps": 8, "num_stages": 3, "rows": 128, "units": 64}
    return [
        Candidate(table, replace(shipped, **streams, resident_programs=0, max_registers=None))
        for table, shipped in looked_up(task).items()
        if getattr(shipped, "resident_programs", 0)
    ]


def _is_open(values: dict[str, tuple], shipped: object, launch: object) -> bool:
    """Whether only fields differ that are open, and in open values."""
    if isinstance(launch, tuple):
        return all(_is_open(values, *pair) for pair in zip(shipped, launch, strict=True))
    changed = {name: value for name, value in vars(launch).items() if vars(shipped)[name] != value}
    return all(value in values.get(name, ()) for name, value in changed.items())


def other_stages(case, dtype: torch.dtype, target: object) -> list[Candidate]:
    """Launches that differ from what ships in the number of stages alone, and so in no sum.

    Where one stage ships nothing is fetched ahead, and so nothing read too early.
    """
    found = []
    for table, shipped in looked_up(Task("", (case,), dtype, False, "cuda", target)).items():
        if getattr(shipped, "num_stages", 1) == 1:
            continue
        _, *others = candidates(table, shipped)
        for candidate in others:
            stages = candidate.launch.num_stages
            if candidate.launch == replace(shipped, num_stages=stages):
                found.append(candidate)
    return found


def compilations(target: object) -> Iterator[tuple[Task, Candidate]]:
    """Everything that is run in the first minutes, what takes longest first."""
    for stage in range(1, 5):
        for attention in ("cpsa", "ipsa"):
            task = Task(
                attention, (stage_case(attention, stage),), torch.bfloat16, False, "cuda", target
            )
            for direction in ("backward", "forward"):
                for candidate in open_candidates(attention, direction, stage, target):
                    if candidate.launch is not None:
                        yield replace(task, forward=direction == "forward"), candidate
            for half in (torch.bfloat16, torch.float16):
                yield replace(task, dtype=half), Candidate("")
    for case in MLPS:
        task = Task("mlp", (case,), torch.bfloat16, False, "cuda", target, forward=True)
        yield from ((task, candidate) for candidate in streamed(case, target))
    for case in REPEATED:
        task = Task(kind(case), (replace(case, batch=2),), torch.bfloat16, False, "cuda", target)
        for candidate in other_stages(*task.cases, torch.bfloat16, target):
            yield task, candidate
    tasks = families.tasks("cuda", target, (*families.PRECISIONS, "tf32"))
    yield from ((task, Candidate("")) for task in families.compilations(tasks))
    # CAT-T has other channels, which no figure of the first minutes needs
    for stage in range(1, 5):
        case = stage_case("cpsa", stage, model="tiny")
        yield Task("cpsa", (case,), torch.bfloat16, False, "cuda", target), Candidate("")


def compile_all(target: object, processes: int, environment: dict[str, str]) -> list[str]:
    """Compile it in a pool of processes; returns what failed, and how."""
    done = run_apart(
        compile_candidate, compilations(target), workers=processes, environment=environment
    )
    return [
        f"{outcome.task[0]} {outcome.task[0].cases[0].name} {outcome.task[1]}: {outcome.failure}"
        for outcome in done
        if outcome.failure
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the cache, outside what git tracks")
    parser.add_argument("--fits", action="store_true", help="only say whether it serves here")
    parser.add_argument("--arch", type=int, default=90, help="compute capability; %(default)s")
    parser.add_argument("--processes", type=int, default=num_cores())
    arguments = parser.parse_args()
    if arguments.fits:
        served = fits(arguments.folder)
        print(f"triton_key {triton_key()}: {arguments.folder} {'fits' if served else 'does not'}")
        return 0 if served else 1

    from triton.backends.compiler import GPUTarget

    arguments.folder.mkdir(parents=True, exist_ok=True)
    environment = {
        "TRITON_CACHE_DIR": str(arguments.folder.resolve()),
        # the binaries alone: a twentieth of the size
        "TRITON_STORE_BINARY_ONLY": "1",
        "TRITON_INTERPRET": "0",
        "OMP_NUM_THREADS": "1",
    }
    # this process compiles nothing, but asks which launches there are
    os.environ.pop("TRITON_INTERPRET", None)
    start = time.monotonic()
    failures = compile_all(GPUTarget("cuda", arguments.arch, 32), arguments.processes, environment)
    for failure in failures:
        print(failure)
    for path in arguments.folder.rglob("*.source"):
        path.unlink()  # a third of the size, and nothing reads it
    (arguments.folder / "KEY").write_text(triton_key() + "\n")
    kernels = list(arguments.folder.rglob("*.cubin"))
    size = sum(path.stat().st_size for path in arguments.folder.rglob("*") if path.is_file())
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{len(kernels)} kernels, {size / 2**20:.0f} MiB, in {time.monotonic() - start:.0f} s by "
        f"{arguments.processes} processes, {spent.ru_utime + spent.ru_stime:.0f} s of one core; "
        f"triton_key {triton_key()}"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
