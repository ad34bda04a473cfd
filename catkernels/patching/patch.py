"""Swap the blocks of somebody else's CAT for ours, and back.

Blocks are recognised by their structure, never by their class, and the model's code is not
imported. A block of ours adopts the very children of the one it replaces, so parameters, hooks and
state_dict stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from catkernels.block import CATBlock
from catkernels.functional import Backend, check_backend
from catkernels.modules import CPSA, IPSA
from catkernels.ops import cpsa, ipsa
from catkernels.parts import AttentionParts, BlockParts
from catkernels.patching.recognise import (
    always_checkpoints,
    is_sharded,
    reasons_to_leave_alone,
    resembles_block,
)
from catkernels.torch_state.hooks import is_intercepted


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
    """

    name: str
    action: str
    kind: str
    shape: str
    backend: str
    reason: str


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

    def __str__(self) -> str:
        header = ("block", "action", "kind", "shape", "backend", "reason")
        rows = [(b.name, b.action, b.kind, b.shape, b.backend, b.reason) for b in self.blocks]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        counts = (
            f"{len(self.swapped)} swapped, {len(self.already_served)} already served, "
            f"{len(self.left_alone)} left alone"
        )
        return "\n".join([*lines, counts, *(f"note: {note}" for note in self.notes)])


def patch(model: nn.Module, *, backend: Backend = "auto") -> PatchReport:
    """Replace every CAT block in ``model``, in place, by a `CATBlock` with the same children.

    Parameters, buffers, hooks, state_dict keys, train/eval mode and other instances of the model's
    classes stay untouched. Blocks of ours, patched earlier or of a `catkernels.CAT`, are kept and
    take on ``backend``. Patch before `torch.compile` and before FSDP2's `fully_shard`; before or
    after DDP.

    Args:
        model: any module that contains CAT blocks: official, downstream copy, wrapped in DDP.
        backend: "auto", "triton" or "reference"; see `catkernels.functional`.

    Returns:
        A report, which prints as a table.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no block was swapped or is served already; the model is unchanged.
    """
    check_backend(backend)
    _check_model(model)
    reports, served, swaps = [], [], {}
    for name, module, parent in _modules_with_parent(model):
        if isinstance(module, CATBlock):
            served.append(module)
            action, reasons = "already served", []
        elif resembles_block(module):
            reasons = reasons_to_leave_alone(module, parent)
            action = "left alone" if reasons else "swapped"
        else:
            continue
        if action == "swapped":
            swaps[module] = CATBlock.adopt(module)
        parts = BlockParts.of(module)
        if action != "left alone":
            serving, why = _serving(module, parts, backend)
        else:
            serving, why = "own", "; ".join(reasons)
        reports.append(BlockReport(name, action, parts.attn_type, _shape(parts), serving, why))
    if not swaps and not served:
        found = "; ".join(f"{report.name}: {report.reason}" for report in reports)
        raise ValueError(
            "no CAT block to patch: a block has the children "
            f"{', '.join(CATBlock.CHILDREN)} and the attributes attn_type and patch_size. "
            f"Left alone: {found or 'nothing resembled one'}"
        )
    _replace(model, swaps)
    for block in (*served, *swaps.values()):
        block.backend = backend
    return PatchReport(tuple(reports), tuple(_notes(model)))


def unpatch(model: nn.Module) -> list[str]:
    """Put the blocks that `patch` replaced back, with the present children, mode, H and W.

    Returns:
        The names of the blocks restored; empty where none was patched.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a patched block was sharded by `fully_shard`, which would lose it, or is itself
            the model; the model is unchanged.
    """
    _check_model(model)
    adopted = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CATBlock) and module.is_adopted
    }
    sharded = [name for name, block in adopted.items() if is_sharded(block)]
    if sharded:
        raise ValueError(
            f"cannot unpatch a block that fully_shard manages by itself: {', '.join(sharded)}. "
            "Unpatch before sharding, or load the state_dict into an unpatched model."
        )
    if model in adopted.values():
        raise ValueError("the model is itself a patched block: unpatch the module that holds it")
    _replace(model, {block: block.release() for block in adopted.values()})
    return list(adopted)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def _modules_with_parent(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Each module once, with its name and the module that holds it."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        yield name, module, modules.get(parent) if child else None


def _replace(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> None:
    """Put ``swaps[module]`` wherever a module is held, shared ones in all their places."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child in swaps
    ]
    for parent, name, child in places:
        setattr(parent, name, swaps[child])


def _serving(block: nn.Module, parts: BlockParts, backend: Backend) -> tuple[str, str]:
    """What serves a block where its parameters are now, and why that is not the kernels."""
    attn = AttentionParts.of(parts.attn)
    listened_to = is_intercepted(parts.attn) or attn.is_listened_to
    if not isinstance(parts.attn, IPSA | CPSA) and listened_to:
        return "own", "its attention carries hooks and is called itself"
    plain = {"qkv": attn.qkv_is_plain, "proj": attn.proj_is_plain}
    adapters = [name for name, is_plain in plain.items() if not is_plain]
    notes = [f"{name} goes through its own forward" for name in adapters]
    if backend == "reference":
        return "reference", "; ".join([*notes, "asked for"])

    # a quantised layer may have no parameters at all
    weight = next(attn.qkv.parameters(), torch.empty(0))
    trains = block.training and any(parameter.requires_grad for parameter in block.parameters())
    where = {"device": weight.device, "dtype": weight.dtype, "needs_grad": trains}
    if parts.attn_type == "ipsa":
        reasons = ipsa.unsupported_reasons(**where, head_dim=attn.head_dim, patch_size=parts.side)
    else:
        patches = parts.num_patches
        reasons = cpsa.unsupported_reasons(**where, patch_size=parts.side, num_patches=patches)
        reasons += [
            f"the kernels only read weights, and {name} is intercepted" for name in adapters
        ]
    if weight.device.type == "cpu" and not reasons and backend == "auto":
        reasons = ["on a CPU the kernels are only interpreted"]
    if not reasons:
        return "triton", "; ".join(notes)
    return "raises" if backend == "triton" else "reference", "; ".join([*notes, *reasons])


def _shape(block: BlockParts) -> str:
    height, width = block.map_size or ("H", "W")
    channels = "C" if block.channels is None else block.channels
    heads = "?" if block.num_heads is None else block.num_heads
    return f"{height}x{width}x{channels} N={block.patch_size} heads={heads}"


def _notes(model: nn.Module) -> Iterator[str]:
    """What a user of the model would want to know beside the swaps."""
    always = sorted(
        {
            type(module).__name__
            for module in model.modules()
            if getattr(module, "use_checkpoint", None) is False and always_checkpoints(module)
        }
    )
    if always:
        yield (
            f"{', '.join(always)} recomputes every block in training although use_checkpoint is "
            "False; training is faster, for more memory, where its forward does not"
        )
