"""Whether a block of ours computes what a block does in whose place it is to stand.

A name promises nothing about arithmetic, so both are run and their numbers compared before anything
is swapped: outputs and gradients, in evaluation and in training, of twins (`twin.py`) with random
weights of float64 on the CPU. No hook fires, no mode changes, no random state moves.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from catkernels.block import CATBlock
from catkernels.modules import CPSA, IPSA
from catkernels.parts import BlockParts, MlpParts, has_mlp_parts, has_official_parts
from catkernels.patching.twin import Twins
from catkernels.torch_state.hooks import global_hooks_set_aside
from catkernels.torch_state.modes import plainly_on_cpu
from catkernels.trust import OF_EVERY_MODULE

# Two orders of the same operations differ by 1e-15 of their result in float64, and by 1e-7 where a
# block takes its softmax in single precision.
LIMIT = 1e-4
# Pixels of a map that a block is tried on where its size is fixed; CPSA of more takes gigabytes.
LARGEST_MAP = 2**14


# Of a dropout that drops nothing this is true as well.
SAME_IN_BOTH_MODES = (nn.Linear, nn.LayerNorm, nn.Identity, nn.Softmax, nn.GELU, nn.Dropout)


@dataclass(frozen=True)
class Comparison:
    """What came of comparing a block with ours.

    Attributes:
        difference: the largest of any output, relative to what the branches add to the input, and
            of any gradient, relative to its largest element; None where nothing could be compared.
        reason: why ours must not stand in for the block; empty where it may.
    """

    difference: float | None
    reason: str = ""


def compare_with_ours(blocks: Iterable[nn.Module]) -> dict[nn.Module, Comparison]:
    """Compare blocks of CAT's structure with ours, one of a kind.

    Blocks are of one kind where they and all that they consist of agree in class and in every plain
    attribute, and their weights in shape.
    """
    of_kind: dict[Hashable, Comparison] = {}
    comparisons = {}
    for block in blocks:
        kind = _kind(block)
        if kind not in of_kind:
            of_kind[kind] = _compare(block)
        comparisons[block] = of_kind[kind]
    return comparisons


def mlps_of_known_parts(mlps: Iterable[nn.Module]) -> set[nn.Module]:
    """Those MLPs that are their linear layers, activation and dropouts one after the other.

    Twins of those that have the parts of an official one, whose class says no more, are run, one of
    a kind.
    """
    of_kind: dict[Hashable, bool] = {}
    known = set()
    for mlp in filter(has_mlp_parts, mlps):
        kind = _kind(mlp)
        if kind not in of_kind:
            of_kind[kind] = _computes_with_its_parts(mlp)
        if of_kind[kind]:
            known.add(mlp)
    return known


def _computes_with_its_parts(mlp: nn.Module) -> bool:
    try:
        with plainly_on_cpu(), global_hooks_set_aside(), _other_generators_kept():
            twin, x = Twins(torch.Generator("cpu").manual_seed(0), stand_ins=False).of_mlp(mlp)
            parts = MlpParts.of(twin)
            return all(
                difference <= LIMIT
                for training in (False, True)
                for _, difference in _differences(
                    _mlp_results(parts, twin, x, training), _mlp_results(twin, twin, x, training)
                )
            )
    except Exception:
        # whatever it needs to be called with, it is called itself
        return False


def _mlp_results(
    call: Callable[[Tensor], Tensor], mlp: nn.Module, x: Tensor, training: bool
) -> dict[str, Tensor]:
    """What a call of an MLP gives, and the gradients of everything."""
    # its dropouts stay in evaluation, where they draw nothing
    mlp.training = training
    mlp.zero_grad()
    x = x.clone().requires_grad_()
    output = call(x)
    output.backward(torch.arange(output.numel(), dtype=x.dtype).cos().view_as(output))
    results = {"output": output.detach()}
    for name, leaf in (("input", x), *mlp.named_parameters()):
        results[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return results


def _compare(block: nn.Module) -> Comparison:
    quick = _compare_twins(block, stand_ins=True)
    # what reaches into its children is judged by how it does with them
    return _compare_twins(block, stand_ins=False) if quick.reason else quick


def _compare_twins(block: nn.Module, stand_ins: bool) -> Comparison:
    try:
        with (
            plainly_on_cpu(),
            global_hooks_set_aside(),
            _other_generators_kept(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return _compare_results(block, stand_ins)
    except Exception as error:
        message = str(error).partition("\n")[0]
        return Comparison(None, f"it could not be compared: {type(error).__name__}: {message}")


def _compare_results(block: nn.Module, stand_ins: bool) -> Comparison:
    parts = BlockParts.of(block)
    if parts.channels is None:
        raise TypeError("nothing says how many channels it has")
    generator = torch.Generator("cpu").manual_seed(0)
    theirs = Twins(generator, stand_ins).of_block(block, parts)
    ours = CATBlock.adopt(theirs)
    ours.backend = "reference"
    largest = 0.0
    for x, modes in _inputs(theirs, ours, parts, generator):
        for mode in modes:
            expected, actual = _results(ours, x, mode), _results(theirs, x, mode)
            for name, difference in _differences(expected, actual):
                # a difference that is no number is one
                if not difference <= LIMIT:
                    size = f"{difference:.0%}" if difference >= 0.01 else f"{difference:.1e}"
                    return Comparison(
                        difference,
                        "it does not compute what CAT's block does: compared with random weights, "
                        f"its {name} in {mode} differs by {size}",
                    )
                largest = max(largest, difference)
    return Comparison(largest, _dropout_reason(theirs, x))


def _inputs(
    theirs: Any, ours: CATBlock, parts: BlockParts, generator: torch.Generator
) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    """Two images of each size that is tried, which both blocks are told, and the modes to try."""
    side = parts.side or 1
    # 2 x 3 patches, those at the bottom and at the right padded; and a map of whole patches
    sizes = [(2 * side - min(side - 1, 1), 3 * side - min(side - 1, 2)), (2 * side, side)]
    fixed = getattr(theirs, "input_resolution", None)
    free = hasattr(theirs, "H") and hasattr(theirs, "W") and (fixed is None or theirs.H is not None)
    if fixed is not None and not free and fixed[0] * fixed[1] > LARGEST_MAP:
        theirs.input_resolution = ours.input_resolution = fixed = (2 * side, 3 * side)
    # the gradients, which take most of the time, of the first size alone
    modes: tuple[str, ...] = ("evaluation", "training")
    for height, width in [fixed] if fixed is not None and not free else sizes:
        shape = (2, height, width, parts.channels or 0)
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        # what mixes images, or depends on magnitudes, shows in the second
        x[1] *= 8
        if free:
            theirs.H, theirs.W = ours.H, ours.W = height, width
        yield x.flatten(1, 2) if free or fixed is not None else x, modes
        modes = ("evaluation",)


def _results(block: Any, x: Tensor, mode: str) -> dict[str, Tensor]:
    """What a block adds to each image, and in training the gradients of everything."""
    training = mode == "training"
    block.zero_grad()
    x = x.clone().requires_grad_(training)
    with torch.set_grad_enabled(training), _in_mode(block, training):
        # a copy, since some work in place
        output = block(x.clone())
    if not isinstance(output, Tensor) or output.shape != x.shape:
        shape = getattr(output, "shape", None)
        what = type(output).__name__ if shape is None else f"a tensor {tuple(shape)}"
        raise TypeError(f"its forward makes {what} of a tensor {tuple(x.shape)}")
    branches = (output - x).detach()
    results = {"output": branches[0], "output for a larger input": branches[1]}
    if not training:
        return results
    if output.requires_grad:
        # any that differ from place to place
        weights = torch.arange(x.numel(), dtype=x.dtype).cos().view_as(x)
        try:
            torch.autograd.backward(output, weights)
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            # it works on what its norms have kept, so it cannot be trained, and ours may be
            return results
    for name, leaf in (("input", x), *block.named_parameters()):
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        results[f"gradient of {name}"] = gradient
    return results


@contextmanager
def _in_mode(block: nn.Module, training: bool) -> Iterator[None]:
    """Let a block and all that has the same values in both modes have this one.

    Whatever else its children consist of stays in evaluation, where nothing is random; dropouts
    drop nothing meanwhile.
    """
    dropouts = [module for module in block.modules() if type(module) is nn.Dropout]
    probabilities = [dropout.p for dropout in dropouts]
    for module in block.modules():
        if type(module) in SAME_IN_BOTH_MODES:
            module.training = training
    for module in (block, *block.children()):
        module.training = training
    if training:
        for dropout in dropouts:
            dropout.p = 0.0
    try:
        yield
    finally:
        for dropout, probability in zip(dropouts, probabilities, strict=True):
            dropout.p = probability


def _differences(
    expected: dict[str, Tensor], actual: dict[str, Tensor]
) -> Iterator[tuple[str, float]]:
    """Of each result the largest difference, relative to its largest element."""
    sizes = {name: tensor.abs().max().item() for name, tensor in expected.items()}
    # a gradient that cancels to nothing is all rounding
    floor = 1e-6 * max(sizes.values())
    for name, tensor in actual.items():
        difference = (tensor - expected[name]).abs().max().item()
        yield name, difference / max(sizes[name], floor)


def _dropout_reason(block: Any, x: Tensor) -> str:
    """Where an official attention has its dropouts elsewhere than CAT's: no number shows that."""
    attn = block.attn
    if isinstance(attn, IPSA | CPSA) or not has_official_parts(attn):
        return ""
    weights, projected, dropped = [], [], []
    attn.attn_drop.register_forward_pre_hook(lambda _, arguments: weights.append(arguments[0]))
    attn.proj.register_forward_hook(lambda _, arguments, output: projected.append(output))
    attn.proj_drop.register_forward_pre_hook(lambda _, arguments: dropped.append(arguments[0]))
    _results(block, x, "evaluation")
    if _drops(attn.attn_drop) and not (
        len(weights) == 1 and torch.allclose(weights[0].sum(-1), x.new_ones(()))
    ):
        return "its attn_drop is not given the attention weights"
    if _drops(attn.proj_drop) and not (
        len(dropped) == len(projected) == 1 and torch.allclose(dropped[0].sum(), projected[0].sum())
    ):
        return "its proj_drop is not given what proj makes"
    return ""


def _drops(dropout: nn.Module) -> bool:
    return getattr(dropout, "p", 0) > 0


@contextmanager
def _other_generators_kept() -> Iterator[None]:
    """Put back the generators of Python and NumPy; PyTorch's are `plainly_on_cpu`'s."""
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 theirs, not ours
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002 theirs, not ours


def _kind(root: nn.Module) -> Hashable:
    """Equal for blocks, or MLPs, of which one need be compared."""
    modules = []
    for name, module in root.named_modules():
        # the map's size is set from outside before each call
        ignored = OF_EVERY_MODULE | ({"H", "W"} if module is root else set())
        plain = {key: value for key, value in vars(module).items() if key not in ignored}
        tensors = (*module._parameters.items(), *module._buffers.items())
        shapes = tuple((key, None if value is None else value.shape) for key, value in tensors)
        modules.append((name, type(module), _frozen(plain), shapes))
    return tuple(modules)


def _frozen(value: Any) -> Hashable:
    """A value by which attributes can be told apart: of plain ones equal where they are."""
    if isinstance(value, dict):
        return tuple((_frozen(key), _frozen(item)) for key, item in value.items())
    if isinstance(value, list | tuple | set):
        return type(value), *map(_frozen, value)
    plain = bool | int | float | complex | str | bytes | type | torch.dtype | torch.device
    return (type(value), value) if isinstance(value, plain) else id(value)
