"""The launches worth timing beside those that ship, and how one of them is put in their place."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from catkernels.cases import results
from catkernels.families import Task, compile_case, products
from catkernels.torch_state.device import interpreting

# Of each field of a launch, the other values worth a try; what a launch does not have is left out.
# Eight warps and one of 16 rows each share a tile's columns; more than three stages gain nothing.
NEIGHBOURS: dict[str, Callable[[object], tuple]] = {
    "num_stages": lambda stages: (1, 2, 3),
    "num_warps": lambda warps: tuple(w for w in (warps // 2, warps * 2) if 4 <= w <= 16),
    "num_programs": lambda programs: (programs // 2, programs * 2),
    "block_c": lambda channels: (channels // 2, channels * 2) if channels > 1 else (2,),
    "ahead": lambda ahead: (not ahead,),
}
GROUP = 64  # tokens of a group, which is multiplied as one
# What changes together: half the channels leave registers to fetch the next tile ahead.
TOGETHER = (("block_c", "ahead"),)


@dataclass(frozen=True)
class Candidate:
    """A launch in the place of what a table ships; ``launch`` None is what it ships.

    Attributes:
        table: its name below ``catkernels.kernels``, such as "ipsa.launch.forward_launch".
    """

    table: str
    launch: object | None = None

    def __str__(self) -> str:
        return "shipped" if self.launch is None else repr(self.launch)

    @contextlib.contextmanager
    def launched(self) -> Iterator[None]:
        """A context in which kernels are launched so."""
        if self.launch is None:
            yield
            return
        # imported late, so that the benchmarks load where Triton is missing
        from catkernels.kernels.launch import overriding

        def answer(table, problem, shipped):
            return self.launch if table_name(table) == self.table else shipped

        with overriding(answer):
            yield


def table_name(table: Callable) -> str:
    return f"{table.__module__}.{table.__name__}".removeprefix("catkernels.kernels.")


def looked_up(task: Task) -> dict[str, object]:
    """The launches that one case looks up on the task's target, by table; nothing is launched."""
    from catkernels.kernels.compile_ahead import launching_nothing_on
    from catkernels.kernels.launch import overriding
    from catkernels.ops.operator import take_cpu_tensors

    take_cpu_tensors()
    found: dict[str, object] = {}

    def remember(table, problem, shipped):
        found[table_name(table)] = shipped
        return shipped

    # the interpreter has no way to launch nothing
    nothing = contextlib.nullcontext() if interpreting() else launching_nothing_on(task.target)
    with nothing, overriding(remember), products(task.tf32):
        for case, differentiate in task.passes():
            inputs = case.inputs(task.dtype, torch.device("cpu"), seed=0)
            grad_out = torch.empty(case.shape.size, dtype=task.dtype) if differentiate else None
            results(case.attend, inputs, grad_out)
    return found


def candidates(table: str, shipped: object) -> list[Candidate]:
    """What the table ships first, then its neighbours, each once."""
    neighbours = dict.fromkeys(filter(_is_plausible, _neighbours(shipped)))
    neighbours.pop(shipped, None)
    return [Candidate(table), *(Candidate(table, launch) for launch in neighbours)]


def _is_plausible(launch: object) -> bool:
    """Whether map tiles hold whole groups of tokens, and one group where the next is fetched."""
    if isinstance(launch, tuple):
        return all(map(_is_plausible, launch))
    if not hasattr(launch, "patches_high"):
        return True
    tokens = launch.block_c * launch.patches_high * launch.patches_low
    return tokens == GROUP or (tokens > GROUP and not getattr(launch, "ahead", False))


def _neighbours(launch) -> Iterator[object]:
    """One field changed, or two of those that change together; of a tuple, in all its parts."""
    if isinstance(launch, tuple):
        for parts in zip(*map(_aligned, launch), strict=False):
            yield tuple(parts)
        return
    yield from _aligned(launch)


def _aligned(launch) -> Iterator[object]:
    fields = {field.name for field in dataclasses.fields(launch)}
    values = {
        name: others(getattr(launch, name)) for name, others in NEIGHBOURS.items() if name in fields
    }
    if "block_c" in values:
        # the loops over tiles of the map have no loads that stages would fetch ahead
        values.pop("num_stages", None)
    for name, others in values.items():
        for value in others:
            yield replace(launch, **{name: value})
    for first, second in TOGETHER:
        if first in values and second in values:
            pairs = ((a, b) for a in values[first] for b in values[second])
            yield from (replace(launch, **{first: a, second: b}) for a, b in pairs)


def compile_candidate(pair: tuple[Task, Candidate]) -> int:
    """`families.compile_case` with a candidate's launch; for a pool."""
    task, candidate = pair
    with candidate.launched():
        return compile_case(task)
