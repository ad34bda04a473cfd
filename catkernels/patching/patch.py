"""Swap the blocks of somebody else's CAT for ours, and back.

Blocks are recognised by their structure, never by their class, and the model's code is not
imported. A block of ours adopts the very children of the one it replaces, so parameters, hooks and
state_dict stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from catkernels.arguments import Backend, check_backend
from catkernels.block import CATBlock
from catkernels.parts import BlockParts
from catkernels.patching.recognise import (
    always_checkpoints,
    is_sharded,
    reasons_to_leave_alone,
    resembles_block,
)
from catkernels.patching.report import BlockReport, PatchReport, serving, shape


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
        if action == "left alone":
            served_by, why = "own", "; ".join(reasons)
        else:
            served_by, why = serving(swaps.get(module, module), backend)
        reports.append(BlockReport(name, action, parts.attn_type, shape(parts), served_by, why))
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
