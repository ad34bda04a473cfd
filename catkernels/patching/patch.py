"""Swap the blocks of somebody else's CAT for ours, and back.

Blocks are recognised by their structure, never by their class, and the model's code is not
imported. A block of ours adopts the very children of the one it replaces, so parameters, hooks and
state_dict stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from catkernels.arguments import Backend, check_backend
from catkernels.block import CATBlock
from catkernels.parts import has_mlp_parts
from catkernels.patching.compare import compare_with_ours, mlps_of_known_parts
from catkernels.patching.recognise import (
    always_checkpoints,
    is_sharded,
    reasons_to_leave_alone,
    resembles_block,
)
from catkernels.patching.report import PatchReport, report_block


def patch(model: nn.Module, *, backend: Backend = "auto", compare: bool = True) -> PatchReport:
    """Replace every CAT block in ``model``, in place, by a `CATBlock` with the same children.

    A block is swapped only where ours computes the same: copies of both, with random weights, are
    run on the CPU in float64 before anything is changed. Their outputs and gradients may differ by
    1e-4 of their size; the report says by how much they did.

    Parameters, buffers, hooks, state_dict keys, train/eval mode and other instances of the model's
    classes stay untouched. Blocks of ours, patched earlier or of a `catkernels.CAT`, are kept and
    take on ``backend``. Patch before `torch.compile` and before FSDP2's `fully_shard`; before or
    after DDP.

    Args:
        model: any module that contains CAT blocks: official, downstream copy, wrapped in DDP.
        backend: "auto", "triton" or "reference"; see `catkernels.functional`.
        compare: whether to run the blocks; without it a block that has CAT's structure is trusted
            to compute what CAT's does.

    Returns:
        A report, which prints as a table.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no block was swapped or is served already; the model is unchanged.
    """
    check_backend(backend)
    _check_model(model)
    found = [entry for entry in _modules_with_parent(model) if _is_block(entry[1])]
    reasons = {
        block: reasons_to_leave_alone(block, parent)
        for _, block, parent in found
        if not isinstance(block, CATBlock)
    }
    comparisons = {}
    if compare:
        comparisons = compare_with_ours(block for block, why in reasons.items() if not why)
    for block, comparison in comparisons.items():
        if comparison.reason:
            reasons[block] = [comparison.reason]
    swaps = {block: CATBlock.adopt(block) for block, why in reasons.items() if not why}
    _trust_mlps(swaps.values(), compare)
    for adopted in swaps.values():
        adopted.trust_original()
    rows = []
    for name, block, _ in found:
        ours = block if isinstance(block, CATBlock) else swaps.get(block)
        difference = comparisons[block].difference if block in comparisons else None
        rows.append(report_block(name, block, ours, reasons.get(block, []), difference, backend))
    report = PatchReport(tuple(rows), tuple(_notes(model)))
    if len(report.left_alone) == len(rows):
        left = "; ".join(f"{row.name}: {row.reason}" for row in rows)
        raise ValueError(
            "no CAT block to patch: a block has the children "
            f"{', '.join(CATBlock.CHILDREN)} and the attributes attn_type and patch_size. "
            f"Left alone: {left or 'nothing resembled one'}"
        )
    _replace(model, swaps)
    for block in model.modules():
        if isinstance(block, CATBlock):
            block.backend = backend
    return report


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
    _replace(model, {block: block.original for block in adopted.values()})
    for block in adopted.values():
        block.release()
    return list(adopted)


def _trust_mlps(blocks: Iterable[CATBlock], compare: bool) -> None:
    """Let blocks compute with the parts of their MLPs where those are all that there is to them."""
    blocks = list(blocks)
    mlps = [block.mlp for block in blocks]
    known = mlps_of_known_parts(mlps) if compare else set(filter(has_mlp_parts, mlps))
    for block in blocks:
        if block.mlp in known:
            block.trust_mlp()


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, CATBlock) or resembles_block(module)


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


def _replace(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    """Put ``swaps[module]`` wherever a module is held, shared ones in all their places.

    Where one place refuses, none is changed.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and child in swaps
    ]
    done = []
    try:
        for parent, name, child in places:
            setattr(parent, name, swaps[child])
            done.append((parent, name, child))
    except BaseException:
        for parent, name, child in done:
            setattr(parent, name, child)
        raise


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
