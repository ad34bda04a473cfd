"""How often blocks pass over a map and what they launch, counted: the table of kernels/README.md.

A map pass is a read or a write of a tensor as large as the block's map in half precision. Blocks
run on tensors without values, and launch what they would on Hopper: of each operation of PyTorch's
and of each kernel of ours all tensors count that it is given or gives.

`TRITON_INTERPRET=1 python tests/test_block_counts.py` prints the table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch as replaced

import pytest
import torch
from dense_cases import sampled
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import catkernels
from catkernels import block as block_of_ours
from catkernels import official
from catkernels.cases import Shape, cat_stages
from catkernels.ops import operator

README = Path(__file__).parent.parent / "catkernels" / "kernels" / "README.md"
STAGES = cat_stages("small", batch=256)
# What makes a tensor and writes nothing, what PyTorch asks and does not launch, and what goes back
# through a slice that takes all of a map, which is none where no mode looks on.
SILENT = ("empty", "new_empty", "_unsafe_view", "device", "promote_types", "slice_backward")


@dataclass(frozen=True)
class Way:
    """Who computes a block, and in which dtypes.

    Attributes:
        provider: "official", "the attentions' kernels" or "all kernels".
    """

    provider: str
    training: bool
    autocast: bool

    @property
    def stream(self) -> torch.dtype:
        """Of x and the parameters."""
        return torch.float32 if self.autocast else torch.bfloat16

    def block(self, kind: str, shape: Shape) -> nn.Module:
        """A block without values that drops a tenth of its branches in training."""
        sizes = (shape.channels, shape.num_heads, shape.patch_size)
        with torch.device("meta"):
            if self.provider == "official":
                block = _official_block(kind, shape, self.autocast)
            else:
                options = {"attn_type": kind, "drop_path": 0.1, "backend": "triton"}
                block = catkernels.CATBlock(*sizes, **options)
        return block.to(self.stream).train(self.training)


def _official_block(kind: str, shape: Shape, autocast: bool) -> nn.Module:
    size, sizes = (shape.height, shape.width), (shape.num_heads, shape.patch_size)
    options = (4.0, True, None, 0.0, 0.0, 0.1, nn.LayerNorm, kind)
    block = official.CATBlock(shape.channels, size, *sizes, *options)
    if autocast:
        block.attn.softmax = SoftmaxUnderAutocast()
    return block


class SoftmaxUnderAutocast(nn.Module):
    """In float32 of half precision, in one launch: what autocast makes of it on a GPU alone."""

    def forward(self, x: Tensor) -> Tensor:
        return torch._softmax(x, -1, x.dtype != torch.float32)


@dataclass
class Passes:
    """Bytes of maps that are read or written, and launches, the small ones as well."""

    num_bytes: int = 0
    launches: int = 0


class Counting(TorchDispatchMode):
    """A mode that adds up what is launched in it.

    Args:
        shape: of the map. What has fewer values than the map has pixels, or as many as a parameter
            of ``block``, is no map and no pass.
    """

    def __init__(self, shape: Shape, block: nn.Module) -> None:
        super().__init__()
        self.pixels = torch.Size(shape.size).numel() // shape.channels
        self.parameters = {parameter.numel() for parameter in block.parameters()}
        self.passes = Passes()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = options or {}
        namespace, name = function._schema.name.split("::")
        if namespace == "catkernels":
            # what an operator of ours does beside launching its kernels counts as well
            with self:
                return operator._implementations[name](*arguments, **options)
        result = function(*arguments, **options)
        returned = [value.alias_info for value in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if is_view or name.startswith(SILENT):
            return result
        read = arguments[1:] if name == "copy_" else arguments
        if name == "native_layer_norm_backward":
            # two kernels read x and its gradient: one for dx, and one for the norm's parameters
            self.count(*arguments[:2])
        self.count(*tree_leaves((read, {k: v for k, v in options.items() if k != "out"})))
        self._pass(tree_leaves(result))
        return result

    def count(self, *given: Any) -> None:
        """One launch with these arguments, of which each tensor is one pass."""
        self.passes.launches += 1
        self._pass(given)

    def _pass(self, given: Iterable[Any]) -> None:
        tensors = {
            (tensor.untyped_storage()._cdata, tensor.storage_offset()): tensor
            for tensor in given
            if isinstance(tensor, Tensor)
        }
        for tensor in tensors.values():
            # an expanded axis is in memory once
            sizes = (n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
            if self.is_map(tensor):
                self.passes.num_bytes += torch.Size(sizes).numel() * tensor.element_size()

    def is_map(self, tensor: Tensor) -> bool:
        return tensor.numel() >= self.pixels and tensor.numel() not in self.parameters


@contextlib.contextmanager
def launching_on_hopper(count: Callable[..., None], *, blocks: bool) -> Iterator[None]:
    """A context in which kernels are counted instead of run, as they are launched on Hopper.

    Args:
        count: gets the arguments of each launch.
        blocks: whether kernels serve more of a block than its attention.
    """
    from catkernels.kernels import launch
    from catkernels.kernels.tiles import dot as any_jit_function

    def counted(kernel, *arguments, grid, warmup, **options):
        count(*arguments, *options.values())

    def reasons(x, backend):
        return ["only the attention"]

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced.object(type(any_jit_function), "run", counted))
        stack.enter_context(replaced.object(launch, "architecture", lambda device: launch.HOPPER))
        if not blocks:
            stack.enter_context(replaced.object(block_of_ours, "call_reasons", reasons))
        yield


@dataclass(frozen=True)
class Counts:
    """Of a block: both directions, and the bytes of maps that are kept between them."""

    forward: Passes
    backward: Passes
    kept: int


def counted(way: Way, kind: str, shape: Shape, device: torch.device) -> Counts:
    """What a block costs."""
    block = way.block(kind, shape)
    forward, backward = Counting(shape, block), Counting(shape, block)
    directions, kept = [forward], {}

    def count(*arguments) -> None:
        directions[-1].count(*arguments)

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(launching_on_hopper(count, blocks=way.provider == "all kernels"))
        stack.enter_context(torch.set_grad_enabled(way.training))
        block._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
        x = torch.empty(shape.size, dtype=way.stream, device=device)
        x = (x.flatten(1, 2) if way.provider == "official" else x).requires_grad_(way.training)
        with (
            forward,
            torch.autocast(device.type, torch.bfloat16, enabled=way.autocast),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            output = block(x)
        if way.training:
            gradient = torch.empty_like(output)
            directions.append(backward)
            with backward:
                output.backward(gradient)
        parameters = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
        kept_bytes = sum(
            tensor.untyped_storage().nbytes()
            for place, tensor in kept.items()
            if place not in parameters and forward.is_map(tensor)
        )
    return Counts(forward.passes, backward.passes, kept_bytes)


PROVIDERS = ("official", "the attentions' kernels", "all kernels")
# What the table's rows are of: what is done, under autocast or not, and what of it is counted.
SUBJECTS = {
    "inference": (False, False, "forward"),
    "inference, autocast": (False, True, "forward"),
    "forward": (True, False, "forward"),
    "backward": (True, False, "backward"),
    "kept": (True, False, "kept"),
    "forward, autocast": (True, True, "forward"),
    "backward, autocast": (True, True, "backward"),
    "kept, autocast": (True, True, "kept"),
}


def column(shape: Shape, device: torch.device) -> dict[tuple[str, str], str]:
    """A stage's cells, by subject and provider."""
    blocks = {
        way: [counted(way, kind, shape, device) for kind in ("ipsa", "cpsa")]
        for training, autocast in {tuple(mode) for *mode, _ in SUBJECTS.values()}
        for way in (Way(provider, training, autocast) for provider in PROVIDERS)
    }
    map_bytes = 2 * torch.Size(shape.size).numel()
    cells = {}
    for subject, (*mode, name) in SUBJECTS.items():
        for provider in PROVIDERS:
            ipsa, cpsa = (getattr(block, name) for block in blocks[Way(provider, *mode)])
            if name == "kept":
                cell = f"{ipsa / map_bytes:.1f} and {cpsa / map_bytes:.1f}"
            else:
                # of two IPSA blocks and a CPSA block
                maps = (2 * ipsa.num_bytes + cpsa.num_bytes) / map_bytes
                cell = f"{maps:.1f} in {2 * ipsa.launches + cpsa.launches}"
            cells[subject, provider] = cell
    return cells


def table() -> Iterator[str]:
    """The rows of kernels/README.md."""
    columns = [column(shape, torch.device("cpu")) for shape in STAGES]
    for subject, provider in columns[0]:
        cells = (cells[subject, provider] for cells in columns)
        yield f"| {' | '.join((subject, provider, *cells))} |"


@pytest.mark.parametrize("stage", sampled([1], [2, 3, 4]))
def test_the_table_says_what_is_counted(stage, device):
    """After a change that is meant: replace the table by what this file prints."""
    rows = [line.strip("|").split("|") for line in README.read_text().splitlines()]
    written = {(row[0].strip(), row[1].strip()): row for row in rows if len(row) == 6}
    for key, cell in column(STAGES[stage - 1], device).items():
        assert written[key][1 + stage].strip() == cell, key


if __name__ == "__main__":
    print("\n".join(table()))
