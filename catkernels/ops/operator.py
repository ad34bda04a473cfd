"""What an operator of ours is to PyTorch, and how often it can be differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from catkernels.torch_state.device import KERNEL_DEVICES, TRITON_IS_INSTALLED, interpreting

# Keeps the operators that are defined in it alive.
_library = torch.library.Library("catkernels", "FRAGMENT")
_implementations: dict[str, Callable[..., Any]] = {}


def define_operator(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., Any],
) -> Callable[..., Any]:
    """Define ``torch.ops.catkernels.<name>``.

    Args:
        schema: name, arguments and results, as `torch.library.define` takes them.
        implementation: runs kernels; on the CPU only where Triton's interpreter does.
        fake: gives results of the right shape, dtype and device, with no values.
        flops: FLOPs of a call, from the shapes of its tensors.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _implementations[name] = implementation
    for device in (*KERNEL_DEVICES, "cpu") if interpreting() else KERNEL_DEVICES:
        _library.impl(name, implementation, device.upper())
    torch.library.register_fake(f"catkernels::{name}", fake, lib=_library)
    operator = getattr(torch.ops.catkernels, name)
    if TRITON_IS_INSTALLED:
        # imports Triton, and would complain where it is missing; a counter reads the formulas when
        # it is made, which may be before any operator runs
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(operator)(flops)
    return operator


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def draw_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """The seed (1,) of a call's dropout, drawn from the device's generator; None for no dropout.

    It is an argument of the operator, which so gives the same for the same arguments.
    """
    if dropout_p == 0:
        return None
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


@functools.cache
def take_cpu_tensors() -> None:
    """Let the operators take CPU tensors from now on, in a process whose launches only compile.

    Elsewhere they refuse them but under the interpreter, where they take them already.
    """
    if not interpreting():
        for name, implementation in _implementations.items():
            _library.impl(name, implementation, "CPU")


def call_once_differentiable(operator: Callable[..., Any], function: str, *arguments):
    """``operator(*arguments)`` in the backward pass of ``function``, which has no second one.

    `torch.autograd.function.once_differentiable` would stay silent, and wrong, where the incoming
    gradient needs no gradient, as in a gradient penalty.
    """
    # a compiled graph refuses to be differentiated twice by itself
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _OnceDifferentiable.apply(operator, function, *arguments)
    return operator(*arguments)


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(operator, function, *arguments):
        return operator(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.function, *_ = inputs

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            f"the kernels of {ctx.function} cannot be differentiated twice: "
            'use backend="reference" where second derivatives are needed'
        )
