"""Recognise the blocks of a CAT by their structure, whatever their class and whoever wrote it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from catkernels.block import CATBlock
from catkernels.parts import is_our_index, patch_side
from catkernels.torch_state.hooks import is_compiled, wraps_compiled

# What a class may have of its own beside its forward, and ours need not do.
_ONLY_THEIRS = ("forward", "extra_repr", "_get_name")


def resembles_block(module: nn.Module) -> bool:
    """Whether a module holds an attention with qkv and proj, as the blocks of most models do.

    The attention may be wrapped, by what checkpoints, compiles or adapts it.
    """
    attn = getattr(module, "attn", None)
    if not isinstance(attn, nn.Module):
        return False
    return any({"qkv", "proj"} <= part._modules.keys() for part in attn.modules())


def reasons_to_leave_alone(block: nn.Module, parent: nn.Module | None) -> list[str]:
    """Why a block that resembles one of CAT cannot be swapped; empty where it can."""
    missing = [name for name in ("attn_type", "patch_size") if not hasattr(block, name)]
    missing += _missing_modules(block, CATBlock.CHILDREN)
    if missing:
        return [f"not a CAT block: it has no {', '.join(missing)}"]
    lazy = [name for name, tensor in _tensors(block) if is_lazy(tensor)]
    if lazy:
        return [f"its {lazy[0]} has no shape yet: call the model once, then patch it"]
    return [
        reason
        for reasons in (
            _placement_reasons(block, parent),
            _block_reasons(block),
            _attention_reasons(block),
        )
        for reason in reasons
    ]


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _placement_reasons(block: nn.Module, parent: nn.Module | None) -> Iterator[str]:
    if parent is None:
        yield "it is the model itself: patch the module that holds it"
    if is_sharded(block) or type(parent).__name__ == "FullyShardedDataParallel":
        yield "it is sharded by itself: patch before sharding"
    if is_compiled(block) or (parent is not None and wraps_compiled(parent)):
        yield "it is compiled by itself: patch before compiling"


def _block_reasons(block: Any) -> Iterator[str]:
    if block.attn_type not in ("ipsa", "cpsa"):
        yield f"attn_type is {block.attn_type!r}, not 'ipsa' or 'cpsa'"
    yield from _unknown_parts(block, "the block", set(CATBlock.CHILDREN), set())
    replaced = [name for name in vars(block) if _is_method_of_modules(name)]
    if replaced:
        yield f"its {', '.join(replaced)} was replaced on the instance"
    parameters = list(inspect.signature(type(block).forward).parameters)
    if len(parameters) != 2:
        yield f"its forward takes ({', '.join(parameters)}), not (self, x)"
    # a block of ours does them as every module does
    overridden = [name for name in _own_methods(type(block)) if name not in _ONLY_THEIRS]
    if overridden:
        yield f"its class has a {', '.join(overridden)} of its own"
    if getattr(block, "shift_size", 0):
        yield f"it shifts its windows by {block.shift_size}"
    if patch_side(block.patch_size) is None:
        yield f"its patch_size is {block.patch_size}, not a square"


def _attention_reasons(block: Any) -> Iterator[str]:
    attn = block.attn
    if not {"qkv", "proj"} <= attn._modules.keys():
        # something put around an attention, which our block calls as theirs does
        return
    missing = [name for name in ("num_heads", "scale", "rpe") if not hasattr(attn, name)]
    missing += _missing_modules(attn, ("qkv", "proj", "attn_drop", "proj_drop"))
    if missing:
        yield f"its attention has no {', '.join(missing)}"
        return
    children = {"qkv", "attn_drop", "proj", "proj_drop", "softmax"}
    own = {"relative_position_bias_table", "relative_position_index"}
    yield from _unknown_parts(attn, "its attention", children, own)
    if not isinstance(attn.scale, float | int):
        yield f"its scale is a {type(attn.scale).__name__}, not a number"
    if not isinstance(attn.attn_drop, nn.Dropout | nn.Identity):
        yield f"its attn_drop is a {type(attn.attn_drop).__name__}, not an nn.Dropout"
    softmax = getattr(attn, "softmax", None)
    if softmax is not None and (type(softmax) is not nn.Softmax or softmax.dim != -1):
        yield f"its softmax is {softmax}"

    side = patch_side(block.patch_size)
    if side is None:
        return
    if block.attn_type == "ipsa" and attn.rpe:
        table = getattr(attn, "relative_position_bias_table", None)
        expected = ((2 * side - 1) ** 2, attn.num_heads)
        if table is None or (table.shape != expected and not _is_sharded_tensor(table)):
            yield f"its bias table is no {expected} table"
        index = getattr(attn, "relative_position_index", None)
        if index is not None and not is_our_index(index, side):
            yield "its relative_position_index orders the bias table in another way"
    if block.attn_type == "cpsa":
        if attn.rpe or attn.num_heads != 1:
            yield f"CPSA has one head and no position bias, not {attn.num_heads} heads, {attn.rpe}"
        features = getattr(attn.qkv, "in_features", side**2)
        if features != side**2:
            yield f"its tokens have {features} values, not N*N = {side**2}"


def _unknown_parts(
    module: nn.Module, what: str, children: set[str], own: set[str]
) -> Iterator[str]:
    """Children, parameters and buffers that our block would not use."""
    unknown = sorted(module._modules.keys() - children)
    unknown += sorted((module._parameters.keys() | module._buffers.keys()) - own)
    if unknown:
        yield f"{what} has parts unknown here: {', '.join(unknown)}"


def _missing_modules(module: nn.Module, names: Iterable[str]) -> list[str]:
    return [name for name in names if not isinstance(getattr(module, name, None), nn.Module)]


def _own_methods(kind: type[nn.Module]) -> list[str]:
    """The methods of every module that a class, or one it is made of, has its own way for."""
    bases = (base for base in kind.__mro__ if base not in (nn.Module, object))
    names = {name for base in bases for name in vars(base) if _is_method_of_modules(name)}
    return sorted(name for name in names if getattr(kind, name) is not getattr(nn.Module, name))


def _is_method_of_modules(name: str) -> bool:
    """Whether every module has a method of that name, or looks for one when it is called or set."""
    special = name.startswith("__") and name not in ("__call__", "__getattr__", "__setattr__")
    return not special and callable(getattr(nn.Module, name, None))


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP, in either of its forms, manages this very module's parameters."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return isinstance(module, FSDPModule | FullyShardedDataParallel)


def _is_sharded_tensor(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def always_checkpoints(layer: nn.Module) -> bool:
    """Whether a layer checkpoints also in the ``else`` of an ``if self.use_checkpoint``.

    That is how the official classification and segmentation code does it.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(layer))))
    except (OSError, TypeError, SyntaxError):
        return False
    branches = (
        node.orelse
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "self.use_checkpoint"
    )
    return any(
        isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("checkpoint", "checkpoint.checkpoint")
        for branch in branches
        for statement in branch
        for node in ast.walk(statement)
    )
