"""Copies of blocks to try them on: their own classes and attributes, and random weights.

The weights are of float64 and on the CPU. Present ones can hide what a block does, as a projection
of zeros does, and random ones make half precision, meta tensors, and parameters that are offloaded
or sharded all alike. Nothing of the original is touched.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from catkernels.parts import BlockParts, has_official_parts
from catkernels.reference import relative_position_index
from catkernels.torch_state.hooks import OWN_CALL

# What every module has of its own, and what says how it is called and not what it computes.
OF_EVERY_MODULE = OWN_CALL.union(vars(nn.Module()))


def twin_of_block(block: nn.Module, parts: BlockParts, generator: torch.Generator) -> nn.Module:
    """A block whose own arithmetic, and its attention's, is that of ``block``.

    What any block only calls is stood in for: a norm or a dropout of PyTorch's by one like it, the
    rest by functions that know what they get. The drop path adds a half, so that it is seen.
    """
    twin = _bare_twin(block)
    for name, child in block._modules.items():
        twin._modules[name] = _twin_of_child(child, generator)
    twin._modules["attn"] = _twin_of_attention(parts, generator)
    twin._modules["mlp"] = _StandIn(generator)
    drop_path = twin.get_submodule("drop_path")
    drop_path.register_forward_hook(lambda module, arguments, output: 1.5 * output)
    return twin.eval()


def _twin_of_attention(parts: BlockParts, generator: torch.Generator) -> nn.Module:
    """An attention of the same class, or a stand-in for one that is wrapped."""
    attn: Any = parts.attn
    if not has_official_parts(attn):
        return _StandIn(generator)
    channels, side = parts.channels or 0, parts.side or 0
    twin = _bare_twin(attn)
    for name, parameter in attn._parameters.items():
        twin._parameters[name] = None if parameter is None else _random(parameter.shape, generator)
    for name in attn._buffers:
        # the one buffer that is known here; `recognise` has compared its values
        twin._buffers[name] = relative_position_index(side, torch.device("cpu"))
    for name, child in attn._modules.items():
        twin._modules[name] = _twin_of_child(child, generator)
    width = channels if parts.attn_type == "ipsa" else side**2
    twin._modules["qkv"] = _linear_twin(attn.qkv, width, 3 * width, generator)
    twin._modules["proj"] = _linear_twin(attn.proj, width, width, generator)
    return twin


def _twin_of_child(child: nn.Module | None, generator: torch.Generator) -> nn.Module | None:
    """A child that is only called, of the same class where that is harmless to run."""
    if child is None:
        return None
    of_torch = type(child).__module__.startswith("torch.nn.modules.")
    if not of_torch and (child._modules or child._parameters or child._buffers):
        return _StandIn(generator)
    twin = _bare_twin(child)
    for name, grandchild in child._modules.items():
        twin._modules[name] = _twin_of_child(grandchild, generator)
    for name, parameter in child._parameters.items():
        twin._parameters[name] = None if parameter is None else _random(parameter.shape, generator)
    for name, buffer in child._buffers.items():
        # positive, as a variance must be
        twin._buffers[name] = None if buffer is None else _random(buffer.shape, generator).exp()
    return twin


def _bare_twin(module: nn.Module) -> nn.Module:
    """A module of the same class and with the same plain attributes, and nothing else."""
    twin = nn.Module.__new__(type(module))
    nn.Module.__init__(twin)
    for name, value in vars(module).items():
        if name not in OF_EVERY_MODULE:
            # what is counted or cached in it is counted and cached in the copy
            shallow = isinstance(value, list | dict | set)
            vars(twin)[name] = copy.copy(value) if shallow else value
    return twin


def _linear_twin(
    layer: Any, in_features: int, out_features: int, generator: torch.Generator
) -> nn.Linear:
    """A linear layer of the widths of ``layer``, or of these where it does not say them."""
    in_features = getattr(layer, "in_features", in_features)
    out_features = getattr(layer, "out_features", out_features)
    bias = getattr(layer, "bias", None) is not None
    twin = nn.Linear(in_features, out_features, bias, device="meta")
    twin.weight = _random((out_features, in_features), generator)
    if bias:
        twin.bias = _random((out_features,), generator)
    return twin


def _random(shape: tuple[int, ...], generator: torch.Generator) -> nn.Parameter:
    """A weight that gives values of about 1 for values of about 1, or a vector of such."""
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    return nn.Parameter(values / shape[-1] ** 0.5 if len(shape) > 1 else values)


class _StandIn(nn.Module):
    """A function of its own of what it gets, in which every place along every axis counts."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.phase, *self.steps = torch.rand(6, generator=generator).tolist()

    def forward(self, x: Tensor) -> Tensor:
        place: Any = self.phase
        for axis, step in zip(range(1, x.dim()), self.steps, strict=False):
            index = torch.arange(x.shape[axis], dtype=x.dtype)
            place = place + step * index.view(-1, *(1,) * (x.dim() - axis - 1))
        output: Tensor = 0.5 * x + (x + self.phase).sin() * (1 + place).cos()
        return output
