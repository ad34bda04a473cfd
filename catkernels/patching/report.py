"""What `patch` did: a row a block, and what serves each of them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from catkernels.adopted import ours_within
from catkernels.arguments import Backend
from catkernels.block import CATBlock
from catkernels.ops import cpsa, ipsa
from catkernels.parts import AttentionParts, BlockParts

# Columns of a printed report.
WIDTH = 100


@dataclass(frozen=True)
class BlockReport:
    """What `patch` did with one block.

    Attributes:
        name: the block's name in the model, as `named_modules` has it.
        action: "swapped", "already served" or "left alone".
        kind: "ipsa", "cpsa" or "?".
        shape: the map where it is known, the channels, N and the heads.
        backend: what would serve the block where its parameters are and in its mode now: "triton",
            "reference", "own" for code of the model's own, or "raises" where "triton" was asked for
            in vain.
        reason: why it is not the kernels, or why the block was left alone.
        difference: the largest relative difference from ours when both were compared, or None where
            they were not.
        kernels: those of "attention", an IPSA block's "projections", "MLP" and "norms" that kernels
            serve.
        others: why kernels serve some of these and not the others.
    """

    name: str
    action: str
    kind: str
    shape: str
    backend: str
    reason: str
    difference: float | None = None
    kernels: tuple[str, ...] = ()
    others: str = ""


@dataclass(frozen=True)
class PatchReport:
    """What `patch` found and did: a `BlockReport` each block, and what else is worth knowing."""

    blocks: tuple[BlockReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def swapped(self) -> list[str]:
        """The names of the blocks that were swapped."""
        return self._names("swapped")

    @property
    def already_served(self) -> list[str]:
        """The names of the blocks that were ours before: of our own `CAT`, or patched earlier."""
        return self._names("already served")

    @property
    def left_alone(self) -> list[str]:
        """The names of the blocks that resemble a CAT block but were not swapped."""
        return self._names("left alone")

    def _names(self, action: str) -> list[str]:
        return [block.name for block in self.blocks if block.action == action]

    @property
    def difference(self) -> float | None:
        """The largest of the blocks that were swapped, or None where none was compared."""
        compared = [row.difference for row in self.blocks if row.action == "swapped"]
        return max((difference for difference in compared if difference is not None), default=None)

    def __str__(self) -> str:
        groups: dict[tuple[object, ...], list[BlockReport]] = {}
        for row in self.blocks:
            key = (row.kind, row.action, row.backend, row.reason, row.kernels, row.others)
            groups.setdefault(key, []).append(row)
        lines = [line for rows in groups.values() for line in _group(rows)]
        lines.append(
            f"{len(self.swapped)} swapped, {len(self.already_served)} already served, "
            f"{len(self.left_alone)} left alone"
        )
        if self.difference is not None:
            lines.append(
                f"compared, largest difference {self.difference:.0e}: outputs and gradients of "
                "copies with random weights, in float64"
            )
        elif self.swapped:
            lines.append("not compared: what has the structure of CAT was trusted to compute as it")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(
            textwrap.fill(line, WIDTH, subsequent_indent="    ", break_long_words=False)
            for line in lines
        )


def _group(rows: list[BlockReport]) -> Iterator[str]:
    """What is said of blocks that differ in their names and shapes alone, a line a shape."""
    first = rows[0]
    served_by = {"own": "its own code"}.get(first.backend, first.backend)
    serving = "" if first.action == "left alone" else f", served by {served_by}"
    yield f"{len(rows)} block{'s'[: len(rows) > 1]}: {first.kind}, {first.action}{serving}"
    if first.kernels:
        yield f"  kernels serve: {', '.join(first.kernels)}"
    for reason in filter(None, (first.reason, first.others)):
        yield f"  {reason}"
    names: dict[str, list[str]] = {}
    for row in rows:
        names.setdefault(row.shape, []).append(row.name)
    for shape, alike in names.items():
        yield f"  {shape}: {', '.join(alike)}"


def report_block(
    name: str,
    block: nn.Module,
    ours: CATBlock | None,
    reasons: list[str],
    difference: float | None,
    backend: Backend,
) -> BlockReport:
    """What is done with ``block``, in whose place ``ours`` stands or is to stand, or why none."""
    parts = BlockParts.of(block)
    kernels: tuple[str, ...] = ()
    others = ""
    if ours is None:
        action, served_by, why = "left alone", "own", "; ".join(reasons)
    else:
        action = "already served" if ours is block else "swapped"
        served_by, why = _serving(ours, backend)
        kernels, others = _serving_parts(ours, served_by, backend)
    shape = _shape(parts)
    return BlockReport(
        name, action, parts.attn_type, shape, served_by, why, difference, kernels, others
    )


def _serving_parts(
    block: CATBlock, served_by: str, backend: Backend
) -> tuple[tuple[str, ...], str]:
    """The parts of a block of ours that kernels serve, and why they do not serve the others."""
    weight = next(block.norm2.parameters(), None)
    if served_by == "raises" or weight is None or block.original_was_changed:
        return (), ""
    trains = block.training and any(parameter.requires_grad for parameter in block.parameters())
    channels = BlockParts.of(block).channels or len(weight)
    with torch.set_grad_enabled(trains):
        x = weight.new_empty((1, 1, channels)).requires_grad_(trains)
        unserved = block.unsupported_parts(x, backend)
    kernels = ["attention"] if served_by == "triton" else []
    kernels += [part for part in ("projections", "MLP", "norms") if unserved.get(part) == []]
    others = [f"{part}: {'; '.join(why)}" for part, why in unserved.items() if why]
    return tuple(kernels), ". ".join(others) if kernels else ""


def _serving(block: CATBlock, backend: Backend) -> tuple[str, str]:
    """What serves a block of ours where its parameters are now, and why that is not the kernels."""
    if block.original_was_changed:
        return "own", "the block, or its class, was changed after patching and is called itself"
    ours, attn = next(ours_within(block.attn), None), block.read_attention()
    own_call = ""
    if ours is not None:
        attn = AttentionParts.of(ours)
        if ours is not block.attn:
            own_call = f"its attention is in a {type(block.attn).__name__}, which is called itself"
    elif attn is None:
        return "own", _why_called_itself(block)
    plain = {"qkv": attn.qkv_is_plain, "proj": attn.proj_is_plain}
    adapters = [name for name, is_plain in plain.items() if not is_plain]
    notes = [own_call] if own_call else []
    notes += [f"{name} goes through its own forward" for name in adapters]
    if backend == "reference":
        return "reference", "; ".join([*notes, "asked for"])

    # a quantised layer may have no parameters at all
    weight = next(attn.qkv.parameters(), torch.empty(0))
    trains = block.training and any(parameter.requires_grad for parameter in block.parameters())
    side = block.patch_size
    if block.attn_type == "ipsa":
        reasons = ipsa.unsupported_reasons(
            device=weight.device,
            dtype=weight.dtype,
            head_dim=attn.head_dim,
            patch_size=side,
            needs_grad=trains,
        )
    else:
        reasons = cpsa.unsupported_reasons(
            device=weight.device,
            dtype=weight.dtype,
            patch_size=side,
            num_patches=BlockParts.of(block).num_patches,
            needs_grad=trains,
        )
        reasons += [
            f"the kernels only read weights, and {name} is intercepted" for name in adapters
        ]
    if weight.device.type == "cpu" and not reasons and backend == "auto":
        reasons = ["on a CPU the kernels are only interpreted"]
    if not reasons:
        return "triton", "; ".join(notes)
    return "raises" if backend == "triton" else "reference", "; ".join([*notes, *reasons])


def _why_called_itself(block: CATBlock) -> str:
    """Why a block calls an attention that is none of ours and does not compute with its parts."""
    if block.knows_attention:
        return "its attention carries hooks and is called itself"
    if block.attention_was_changed:
        return "its attention, or its class, was changed after patching and is called itself"
    return f"its attention is in a {type(block.attn).__name__}, which is called itself"


def _shape(block: BlockParts) -> str:
    """The map, the channels, N and the heads of a block, as far as it says."""
    height, width = block.map_size or ("H", "W")
    channels = "C" if block.channels is None else block.channels
    heads = "?" if block.num_heads is None else block.num_heads
    return f"{height}x{width}x{channels} N={block.patch_size} heads={heads}"
