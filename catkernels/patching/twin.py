"""Copies of blocks to try them on: their own classes and attributes, and random weights.

The weights are of float64 and on the CPU. Present ones can hide what a block does, as a projection
of zeros does, and random ones make half precision, meta tensors, and parameters that are offloaded
or sharded all alike. Nothing of the original is touched.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from catkernels.parts import BlockParts, has_official_parts
from catkernels.reference import relative_position_index
from catkernels.trust import OF_EVERY_MODULE

# Where PyTorch has modules that only compute. Its others talk to other processes, or compile.
_LAYERS = "torch.nn.modules."


@dataclass(frozen=True)
class Twins:
    """How twins are made.

    Attributes:
        generator: what random weights are drawn from.
        stand_ins: whether a child that a block only calls is stood in for by a function of its own,
            which takes a fraction of an MLP's time. A block that reaches into its children, or
            gives them other axes, needs them as they are.
    """

    generator: torch.Generator
    stand_ins: bool

    def of_block(self, block: nn.Module, parts: BlockParts) -> nn.Module:
        """A block whose own arithmetic, and its attention's, is that of ``block``.

        Its drop path adds a half, and where the MLP drops anything it adds a half there, so that
        numbers show where they are.
        """
        twin = _bare_twin(block)
        for name, child in block._modules.items():
            twin._modules[name] = self._of_child(child)
        twin._modules["attn"] = self._of_attention(parts)
        mlp = twin._modules["mlp"]
        if self.stand_ins or mlp is None:
            twin._modules["mlp"] = _StandIn(self.generator)
        else:
            for module in mlp.modules():
                if isinstance(module, nn.Dropout) and module.p:
                    _add_a_half(module)
        # one that never drops need not be called
        if type(block._modules["drop_path"]) is not nn.Identity:
            _add_a_half(twin.get_submodule("drop_path"))
        for name, child in twin.named_children():
            if name != "attn":
                _call_in_evaluation(child)
        return twin.eval()

    def of_mlp(self, mlp: Any) -> tuple[nn.Module, Tensor]:
        """An MLP of the same class, and tokens (B, H*W, C) for it."""
        twin = _bare_twin(mlp)
        for name, child in mlp._modules.items():
            twin._modules[name] = self._of_child(child)
        hidden = getattr(mlp.fc1, "out_features", 8)
        twin._modules["fc1"] = fc1 = self._linear(mlp.fc1, 8, hidden)
        twin._modules["fc2"] = self._linear(mlp.fc2, hidden, fc1.in_features)
        return twin.eval(), _random((2, 6, fc1.in_features), self.generator)

    def _of_attention(self, parts: BlockParts) -> nn.Module:
        """An attention of the same class, or a stand-in for one that is wrapped."""
        attn: Any = parts.attn
        if not has_official_parts(attn):
            return _StandIn(self.generator)
        channels, side = parts.channels or 0, parts.side or 0
        twin = _bare_twin(attn)
        for name, parameter in attn._parameters.items():
            twin._parameters[name] = self._parameter(parameter)
        for name in attn._buffers:
            # the one buffer that is known here; `recognise` has compared its values
            twin._buffers[name] = relative_position_index(side, torch.device("cpu"))
        for name, child in attn._modules.items():
            twin._modules[name] = self._of_child(child)
        width = channels if parts.attn_type == "ipsa" else side**2
        twin._modules["qkv"] = self._linear(attn.qkv, width, 3 * width)
        twin._modules["proj"] = self._linear(attn.proj, width, width)
        return twin

    def _of_child(self, child: nn.Module | None) -> nn.Module | None:
        """A child that is only called, of its own class where it is PyTorch's or has no weights."""
        if child is None:
            return None
        home = type(child).__module__
        holds = bool(child._modules or child._parameters or child._buffers)
        if not home.startswith(_LAYERS) and (
            home.startswith("torch.") or (self.stand_ins and holds)
        ):
            return _StandIn(self.generator)
        twin = _bare_twin(child)
        for name, grandchild in child._modules.items():
            twin._modules[name] = self._of_child(grandchild)
        for name, parameter in child._parameters.items():
            twin._parameters[name] = self._parameter(parameter)
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                # positive, as a variance must be
                buffer = _random(buffer.shape, self.generator).exp()
            twin._buffers[name] = _copied(buffer)
        return twin

    def _linear(self, layer: Any, in_features: int, out_features: int) -> nn.Linear:
        """A linear layer of the widths of ``layer``, or of these where it does not say them."""
        in_features = getattr(layer, "in_features", in_features)
        out_features = getattr(layer, "out_features", out_features)
        bias = getattr(layer, "bias", None) is not None
        twin = nn.Linear(in_features, out_features, bias, device="meta")
        twin.weight = nn.Parameter(_random((out_features, in_features), self.generator))
        if bias:
            twin.bias = nn.Parameter(_random((out_features,), self.generator))
        return twin

    def _parameter(self, parameter: Tensor | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        return nn.Parameter(_random(parameter.shape, self.generator))


def _bare_twin(module: nn.Module) -> nn.Module:
    """A module of the same class and with the same plain attributes, and nothing else."""
    twin = nn.Module.__new__(type(module))
    nn.Module.__init__(twin)
    for name, value in vars(module).items():
        if name not in OF_EVERY_MODULE:
            if isinstance(value, MethodType) and value.__self__ is module:
                # replaced on the instance, and to compute with what the twin has
                value = MethodType(value.__func__, twin)
            vars(twin)[name] = _copied(value)
    return twin


def _copied(value: Any) -> Any:
    """A value whose changes do not show in the original: what is counted, cached or drawn in it."""
    if isinstance(value, Tensor):
        # a weight that pruning has computed of others, say
        dtype = torch.float64 if value.is_floating_point() else value.dtype
        return value if value.is_meta else value.detach().to("cpu", dtype, copy=True)
    if isinstance(value, dict) and type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(map(_copied, value))
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, random.Random | np.random.Generator):
        return copy.deepcopy(value)
    return value


def _add_a_half(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, arguments, output: 1.5 * output)


def _call_in_evaluation(module: nn.Module) -> None:
    """Let a module that may be random in training be called as in evaluation, whatever its mode.

    A block may do as that mode says.
    """
    modes = []

    def evaluate(module: nn.Module, arguments: object) -> None:
        modes.append(module.training)
        module.training = False

    def restore(module: nn.Module, arguments: object, output: object) -> None:
        module.training = modes.pop()

    module.register_forward_pre_hook(evaluate)
    module.register_forward_hook(restore)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A weight that gives values of about 1 for values of about 1, or a vector of such."""
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    return values / shape[-1] ** 0.5 if len(shape) > 1 else values


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
        return 0.5 * x + (x + self.phase).sin() * (1 + place).cos()
